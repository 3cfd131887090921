"""What the tiny world's instruments read off videos: the looks that a prompt names, and the motion.

    world_scores(videos, prompts, reference)     # a dict a video

Axes: F frames, H W picture.
"""
import math
import re

import torch
import torch.nn.functional as F

from model import has_word, word_pattern

SIDE = 64  # pixels: the size of the tiny world


def world_scores(videos, prompts, reference=None):
    """Videos (3, F, H, W) with their prompts -> a dict each. Of the looks: 1 where what is read is
    what the prompt names, 0 where not, None where it names none. With a reference video: whether
    the kind of motion is the same, and the correlation with its path."""
    from tiny import instruments, world  # only where it is asked for

    last = min(video.shape[1] for video in [*videos, *([] if reference is None else [reference])])
    reading = instruments.read(torch.stack([small(video[:, :last]) for video in videos]))
    each = []
    for i, prompt in enumerate(prompts):
        # "an orange star moving in a circle on a blue striped background" is of neither a circle
        # nor anything blue.
        thing, _, ground = prompt.partition(" on a ")
        thing = re.sub(word_pattern(world.MOTIONS), " ", thing)
        each.append({"colour": names(thing, world.COLOURS, reading.colour[i]),
                     "shape": names(thing, world.SHAPES, reading.shape[i]),
                     "background": names(ground, world.BACKGROUNDS, reading.background[i])})
    if reference is None:
        return each
    goal = instruments.read(small(reference[:, :last])[None])
    correlations = instruments.agreement(reading, goal).tolist()
    for row, kind, r in zip(each, reading.motion, correlations):
        row["same kind of motion"] = float(kind == goal.motion) if goal.motion >= 0 else None
        row["trajectory correlation"] = None if math.isnan(r) else r
    return each


def names(text, table, read):
    """1.0 where the text names entry `read` of a table, 0.0 where it names others; else None."""
    named = [i for i, name in enumerate(table) if has_word(text, name)]
    return float(int(read) in named) if named else None


def small(video):
    """(3, F, H, W) at the world's size."""
    return F.interpolate(video.transpose(0, 1), (SIDE, SIDE), mode="area").transpose(0, 1)
