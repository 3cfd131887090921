"""How things move: points followed through a video, and two videos' motion compared.

    tracks, held = track(video)          # (P, F, 2) in pixels, and which of them can be trusted
    motion_fidelity(source, tracks)      # up to 2

Axes: P Q points, F frames, H W picture, w the pixels of a window.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from support.files import BadInput


def gradients(picture):
    """Central differences along x and y of (N, H, W), edges repeated."""
    p = F.pad(picture[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    return (p[:, 1:-1, 2:] - p[:, 1:-1, :-2]) / 2, (p[:, 2:, 1:-1] - p[:, :-2, 1:-1]) / 2


def at(picture, points, radius):
    """Windows (P, w) of a picture (H, W) around points (P, 2) in pixels, interpolated. In pictures
    higher than 64 a window grows with them, and its places lie further apart."""
    H, W = picture.shape
    offsets = torch.arange(-radius, radius + 1.0) * max(1.0, H / 64)
    window = torch.cartesian_prod(offsets, offsets).flip(1)  # (w, 2), as x and y
    unit = 2 / torch.tensor([W, H])  # grid_sample's picture is from -1 to 1
    grid = ((points + 0.5) * unit - 1)[:, None] + window * unit
    out = F.grid_sample(picture[None, None], grid[None], padding_mode="border",
                        align_corners=False)
    return out[0, 0]


def pyramid(picture, levels):
    """A picture (H, W) and its halves, finest first."""
    steps = [picture]
    for _ in range(levels - 1):
        steps.append(F.avg_pool2d(steps[-1][None, None], 2)[0, 0])
    return steps


COARSEST = 16  # pixels: at this height a window sees far enough for what moves fast


def lucas_kanade(a, b, points, radius=5, rounds=8):
    """Where points (P, 2) of picture a (H, W) are in picture b: pyramidal, iterated least squares
    of the brightness change in a window (Lucas & Kanade 1981; Bouguet 2001). The pyramid ends at
    the same height whatever the video's size, so the same motion is found at each."""
    levels = max(1, 1 + round(math.log2(a.shape[0] / COARSEST)))
    moved = torch.zeros_like(points)
    pyramids = zip(pyramid(a, levels), pyramid(b, levels))
    for level, (a, b) in reversed(list(enumerate(pyramids))):
        here = (points + 0.5) / 2**level - 0.5
        moved = refine(a, b, here, 2 * moved, radius, rounds)
    return points + moved


def refine(a, b, points, moved, radius, rounds):
    """Displacements (P, 2) at one level of the pyramids, from those of the level above. Of all
    rounds the one whose windows agree best is kept: where a level is too fine to see what moved,
    its steps lead astray."""
    gx, gy = (at(g[0], points, radius) for g in gradients(a[None]))
    patch = at(a, points, radius)
    xx, xy, yy = (gx * gx).sum(1), (gx * gy).sum(1), (gy * gy).sum(1)
    A = torch.stack([xx, xy, xy, yy], 1).unflatten(1, (2, 2))
    A = A + 1e-4 * torch.eye(2)  # flat windows stay where they are
    best, least = moved, torch.full((len(points),), math.inf)
    for _ in range(rounds + 1):
        change = patch - at(b, points + moved, radius)
        error = (change**2).mean(1)
        best = torch.where((error < least)[:, None], moved, best)
        least = torch.minimum(error, least)
        right = torch.stack([(gx * change).sum(1), (gy * change).sum(1)], 1)
        moved = moved + torch.linalg.solve(A, right).clamp(-2, 2)
    return best


def seen_points(picture, textured=0.02):
    """Points (P, 2) of a 16×16 grid on a picture (H, W) where there is something to see."""
    H, W = picture.shape
    every = max(4, H // 16)
    y, x = torch.meshgrid(torch.arange(every // 2, H, every), torch.arange(every // 2, W, every),
                          indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], 1).float()
    gx, gy = gradients(picture[None])
    near = every + 1 - every % 2  # a cell of the grid sees what is in it, at any size
    strength = F.avg_pool2d((gx**2 + gy**2)[None], near, 1, near // 2)[0, 0]
    there = strength[points[:, 1].long(), points[:, 0].long()]
    return points[there > textured * strength.max().clamp(min=1e-6)]


def track(video):
    """Tracks (P, F, 2) in pixels through a video (3, F, H, W), followed from frame to frame, and
    which of them hold (P,): those that come back to where they were when each step is followed
    backward (Kalal et al. 2010), within a 64th of the height, and stay in the picture."""
    grey = video.mean(0)  # (F, H, W)
    H, W = grey.shape[1:]
    tracks = [seen_points(grey[0])]
    held = torch.ones(len(tracks[0]), dtype=torch.bool)
    for a, b in zip(grey[:-1], grey[1:]):
        there = lucas_kanade(a, b, tracks[-1])
        back = lucas_kanade(b, a, there)
        held &= (back - tracks[-1]).norm(dim=1) < H / 64
        held &= ((there >= 0) & (there < torch.tensor([W, H]))).all(1)
        tracks.append(there)
    return torch.stack(tracks, 1), held


@torch.no_grad()
def motion_fidelity(source, made, still=0.05):
    """Yatim et al. 2023: for every track of one video the best correlation among the other's,
    averaged, both ways. A correlation is the mean over frames of the cosine between displacements;
    two that are both still (shorter than `still` pixels) agree, one that is still and one that
    moves do not. Tracks (P, F, 2), compared as long as both last; at most 2."""
    if not len(source) or not len(made):
        return 0.0
    last = min(source.shape[1], made.shape[1])
    a, b = source[:, :last].diff(dim=1), made[:, :last].diff(dim=1)  # (P, F-1, 2), (Q, F-1, 2)
    cosine = torch.einsum("pfc,qfc->pqf", F.normalize(a, dim=-1), F.normalize(b, dim=-1))
    rest_a, rest_b = (a.norm(dim=-1) < still)[:, None], (b.norm(dim=-1) < still)[None]
    cosine = torch.where(rest_a & rest_b, 1.0, torch.where(rest_a | rest_b, 0.0, cosine))
    best = cosine.mean(-1)  # (P, Q)
    return (best.amax(0).mean() + best.amax(1).mean()).item()


def read_tracks(path, frames):
    """Another program's tracks, a .npy of (P, F, 2) pixels. Raises BadInput."""
    try:
        if not path.is_file():
            raise ValueError("for a pipe one would wait")
        tracks = torch.from_numpy(np.load(path, allow_pickle=False)).float()
        P, last, two = tracks.shape
    except (OSError, ValueError, TypeError, EOFError):
        raise BadInput(f"{path} holds no tracks; wanted an array of (P, F, 2).") from None
    if (last, two) != (frames, 2) or not P or not tracks.isfinite().all():
        raise BadInput(f"{path} is {tuple(tracks.shape)}, wanted (P, {frames}, 2), all finite, of "
                       "one track or more.")
    return tracks
