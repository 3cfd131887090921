"""Metrics of the tiny world: appearance as in the prompt, motion as in the reference.

    world_scores(video, "a red star", reference)     # {"color": 1.0, …}

Axes: F frames, H W pixels.
"""
import math
import re

import torch.nn.functional as F

from support.tokenizer import has_word, word_pattern

SIDE = 64  # pixels: the size of the tiny world


def world_scores(video, prompt, reference=None):
    """Metrics of a video (3, F, H, W). Color, shape and background are 1 if they match the prompt,
    0 if not, None if the prompt has none. With a reference video, also 1 or 0 for the same kind of
    motion, and the correlation of the trajectories."""
    from tiny import instruments, world  # imported only where needed

    frames = min(v.shape[1] for v in (video, reference) if v is not None)
    measured = instruments.read(resize(video[:, :frames])[None])
    # "an orange star moving in a circle on a blue striped background" names neither the shape
    # circle nor the color blue.
    subject, _, background = prompt.partition(" on a ")
    subject = re.sub(word_pattern(world.MOTIONS), " ", subject)
    row = {"color": matches(subject, world.COLOURS, measured.colour),
           "shape": matches(subject, world.SHAPES, measured.shape),
           "background": matches(background, world.BACKGROUNDS, measured.background)}
    if reference is not None:
        expected = instruments.read(resize(reference[:, :frames])[None])
        r = instruments.agreement(measured, expected).item()
        same = float(measured.motion == expected.motion)
        row["same kind of motion"] = same if expected.motion >= 0 else None
        row["trajectory correlation"] = None if math.isnan(r) else r
    return row


def matches(text, names, index):
    """1.0 if the text has the name at this index, 0.0 if it has another of the names, else None."""
    found = [i for i, name in enumerate(names) if has_word(text, name)]
    return float(int(index) in found) if found else None


def resize(video):
    """(3, F, H, W) at the size of the tiny world."""
    return F.interpolate(video.transpose(0, 1), (SIDE, SIDE), mode="area").transpose(0, 1)
