"""Scores on the tiny world, measured from pixels: the appearance named by the prompt, the motion.

    world_scores(video, "a red star", reference)     # {"color": 1.0, …}

Axes: F frames, H W frame.
"""
import math
import re

import torch.nn.functional as F

from support.tokenizer import has_word, word_pattern

SIDE = 64  # pixels: the frame size of the tiny world


def world_scores(video, prompt, reference=None):
    """Scores of a video (3, F, H, W). Color, shape and background: 1 if the video shows the one
    that the prompt names, 0 if not, None if the prompt names none. With a reference video: whether
    the kind of motion is the same, and the correlation of the trajectories."""
    from tiny import measurements, world  # imported only if these scores are requested

    last = min(v.shape[1] for v in (video, reference) if v is not None)
    reading = measurements.read(resize(video[:, :last])[None])
    # "an orange star moving in a circle on a blue striped background" names neither a circle as its
    # shape nor blue as its color.
    subject, _, ground = prompt.partition(" on a ")
    subject = re.sub(word_pattern(world.MOTIONS), " ", subject)
    row = {"color": names(subject, world.COLORS, reading.color),
           "shape": names(subject, world.SHAPES, reading.shape),
           "background": names(ground, world.BACKGROUNDS, reading.background)}
    if reference is not None:
        target = measurements.read(resize(reference[:, :last])[None])
        r = measurements.agreement(reading, target).item()
        same = float(reading.motion == target.motion)
        row["same kind of motion"] = same if target.motion >= 0 else None
        row["trajectory correlation"] = None if math.isnan(r) else r
    return row


def names(text, table, index):
    """1.0 if the text names entry `index` of a table, 0.0 if it names others, None if it names
    none."""
    named = [i for i, name in enumerate(table) if has_word(text, name)]
    return float(int(index) in named) if named else None


def resize(video):
    """(3, F, H, W) at the frame size of the world."""
    return F.interpolate(video.transpose(0, 1), (SIDE, SIDE), mode="area").transpose(0, 1)
