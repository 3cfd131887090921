"""Which kind of motion a video shows, told by a network.

    net = tiny_trn(); net(videos).argmax(1)      # tiny/world.py's motions, by number

Axes: B videos, F frames, H W picture.
"""
import torch
import torch.nn.functional as F
from torch import nn

from model import TINY, fold_frames
from support.files import read_tensors
from support.hub import load_strictly


class TRN(nn.Module):
    """Temporal relation network, multi-scale (Zhou et al. 2018, Eq. 3): for each number k of frames
    an MLP reads the features of k ordered ones. Here the k frames are evenly spaced, from every
    start; the features of a frame keep their place, for a path is what is asked for; and a frame
    comes with its change since the one before, or what spins looks as if it stood still.

    (B, 3, F, H, W) in [-1, 1] -> logits (B, classes)."""

    SIZE, FRAMES, SCALES, WIDTH = 64, 16, (2, 3, 4, 8, 16), 64

    def __init__(self, classes):
        super().__init__()
        self.none = classes - 1  # the last class is "none of these"
        conv = lambda a, b: (nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())
        self.features = nn.Sequential(
            *conv(6, 16), *conv(16, 32), *conv(32, 32), nn.Conv2d(32, 8, 1), nn.Flatten(),
            nn.Linear(8 * (self.SIZE // 8) ** 2, self.WIDTH))
        self.relations = nn.ModuleList()
        for k in self.SCALES:
            self.relations.append(nn.Sequential(
                nn.ReLU(), nn.Linear(k * self.WIDTH, 128), nn.ReLU(), nn.Linear(128, classes)))

    def forward(self, video):
        B, _, frames, H, _ = video.shape
        video = video[:, :, torch.linspace(0, frames - 1, self.FRAMES).round().long()]
        change = 3 * (video - video[:, :, [0, *range(self.FRAMES - 1)]])
        flat = fold_frames(torch.cat([video, change], 1))
        if H != self.SIZE:
            flat = F.interpolate(flat, (self.SIZE, self.SIZE), mode="area")
        x = self.features(flat).reshape(B, self.FRAMES, self.WIDTH)
        logits = 0
        for k, relation in zip(self.SCALES, self.relations):
            stride = self.FRAMES // k
            groups = torch.stack([x[:, i : i + stride * k : stride] for i in range(stride)], 1)
            logits = logits + relation(groups.flatten(2)).mean(1)  # groups (B, stride, k, WIDTH)
        return logits


def tiny_trn(folder=TINY, device="cpu"):
    """The TRN that tiny/train.py trained on the tiny world's motions and "none of these"."""
    state = read_tensors(folder / "motion" / "model.safetensors")
    net = TRN(len(state["relations.0.3.bias"]))
    load_strictly(net, {n: t.float() for n, t in state.items()}, folder / "motion")
    return net.eval().to(device)


@torch.no_grad()
def kind_of(classifier, video, device="cpu"):
    """The class that a classifier gives a video (3, F, H, W)."""
    return classifier(video[None].to(device)).argmax().item()


def wanted_kind(classifier, references, device="cpu"):
    """The class that most of the references (3, F, H, W) have; None where there are none, or where
    the TRN sees none of its motions in them."""
    if not references:
        return None
    kinds = [kind_of(classifier, video, device) for video in references]
    most = max(set(kinds), key=kinds.count)
    return None if most == getattr(classifier, "none", None) else most
