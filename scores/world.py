"""What the tiny world's instruments read off videos: the looks that a prompt names, and the motion.

    world_scores(video, "a red star", reference)     # {"colour": 1.0, …}

Axes: F frames, H W picture.
"""
import math
import re

import torch.nn.functional as F

from support.tokenizer import has_word, word_pattern

SIDE = 64  # pixels: the size of the tiny world


def world_scores(video, prompt, reference=None):
    """What is read off a video (3, F, H, W). Of the looks: 1 where it is what the prompt names, 0
    where not, None where the prompt names none. With a reference video: whether the kind of motion
    is the same, and the correlation with its path."""
    from tiny import instruments, world  # only where it is asked for

    last = min(v.shape[1] for v in (video, reference) if v is not None)
    reading = instruments.read(small(video[:, :last])[None])
    # "an orange star moving in a circle on a blue striped background" is of neither a circle nor
    # anything blue.
    thing, _, ground = prompt.partition(" on a ")
    thing = re.sub(word_pattern(world.MOTIONS), " ", thing)
    row = {"colour": names(thing, world.COLOURS, reading.colour),
           "shape": names(thing, world.SHAPES, reading.shape),
           "background": names(ground, world.BACKGROUNDS, reading.background)}
    if reference is not None:
        goal = instruments.read(small(reference[:, :last])[None])
        r = instruments.agreement(reading, goal).item()
        same = float(reading.motion == goal.motion)
        row["same kind of motion"] = same if goal.motion >= 0 else None
        row["trajectory correlation"] = None if math.isnan(r) else r
    return row


def names(text, table, read):
    """1.0 where the text names entry `read` of a table, 0.0 where it names others; else None."""
    named = [i for i, name in enumerate(table) if has_word(text, name)]
    return float(int(read) in named) if named else None


def small(video):
    """(3, F, H, W) at the world's size."""
    return F.interpolate(video.transpose(0, 1), (SIDE, SIDE), mode="area").transpose(0, 1)
