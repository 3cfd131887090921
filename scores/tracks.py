"""Point tracks through a video, and the motion fidelity of two videos.

    tracks, reliable = track(video)      # (P, F, 2) in pixels, and (P,)
    motion_fidelity(source, tracks)      # at most 2

Axes: P Q points, F frames, H W pixels, w pixels of a window.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from support.files import reading


def gradients(image):
    """Central differences along x and y of (N, H, W), with replicated edges."""
    p = F.pad(image[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    return (p[:, 1:-1, 2:] - p[:, 1:-1, :-2]) / 2, (p[:, 2:, 1:-1] - p[:, :-2, 1:-1]) / 2


def windows(image, points, radius):
    """Interpolated windows (P, w) of an image (H, W) around points (P, 2) in pixels. In images over
    64 pixels high, the spacing of a window's samples grows with the height."""
    H, W = image.shape
    offsets = torch.arange(-radius, radius + 1.0) * max(1.0, H / 64)
    window = torch.cartesian_prod(offsets, offsets).flip(1)  # (w, 2), x and y
    unit = 2 / torch.tensor([W, H])  # grid_sample's coordinates range from -1 to 1
    grid = ((points + 0.5) * unit - 1)[:, None] + window * unit
    out = F.grid_sample(image[None, None], grid[None], padding_mode="border", align_corners=False)
    return out[0, 0]


def pyramid(image, levels):
    """An image (H, W) at full, half, quarter … resolution."""
    images = [image]
    for _ in range(levels - 1):
        images.append(F.avg_pool2d(images[-1][None, None], 2)[0, 0])
    return images


COARSEST = 16  # pixels: the height of the top level, where windows cover fast motion


def lucas_kanade(a, b, points, radius=5, iterations=8):
    """The positions in image b of points (P, 2) in image a (H, W): pyramidal, iterative least
    squares on the brightness change in a window (Lucas & Kanade 1981; Bouguet 2001). The top level
    has the same height for all videos, so the result does not depend on the resolution."""
    levels = max(1, 1 + round(math.log2(a.shape[0] / COARSEST)))
    shift = torch.zeros_like(points)
    pyramids = zip(pyramid(a, levels), pyramid(b, levels))
    for level, (a, b) in reversed(list(enumerate(pyramids))):
        scaled = (points + 0.5) / 2**level - 0.5
        shift = refine(a, b, scaled, 2 * shift, radius, iterations)
    return points + shift


def refine(a, b, points, shift, radius, iterations):
    """Displacements (P, 2) at one level of the pyramids, from those of the coarser level. Keeps the
    iteration with the smallest error, since iterations diverge where the motion is too large for
    the level."""
    gx, gy = (windows(g[0], points, radius) for g in gradients(a[None]))
    patch = windows(a, points, radius)
    xx, xy, yy = (gx * gx).sum(1), (gx * gy).sum(1), (gy * gy).sum(1)
    A = torch.stack([xx, xy, xy, yy], 1).unflatten(1, (2, 2))
    A = A + 1e-4 * torch.eye(2)  # regularized: points in flat windows do not move
    best, lowest = shift, torch.full((len(points),), math.inf)
    for _ in range(iterations + 1):
        change = patch - windows(b, points + shift, radius)
        error = (change**2).mean(1)
        best = torch.where((error < lowest)[:, None], shift, best)
        lowest = torch.minimum(error, lowest)
        rhs = torch.stack([(gx * change).sum(1), (gy * change).sum(1)], 1)
        shift = shift + torch.linalg.solve(A, rhs).clamp(-2, 2)
    return best


def textured_points(image, threshold=0.02):
    """The points (P, 2) of a 16×16 grid on an image (H, W) that have texture around them."""
    H, W = image.shape
    spacing = max(4, H // 16)
    y, x = torch.meshgrid(torch.arange(spacing // 2, H, spacing),
                          torch.arange(spacing // 2, W, spacing), indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], 1).float()
    gx, gy = gradients(image[None])
    kernel = spacing + 1 - spacing % 2  # one grid cell, odd
    strength = F.avg_pool2d((gx**2 + gy**2)[None], kernel, 1, kernel // 2)[0, 0]
    at_points = strength[points[:, 1].long(), points[:, 0].long()]
    return points[at_points > threshold * strength.max().clamp(min=1e-6)]


def track(video):
    """Tracks (P, F, 2) in pixels through a video (3, F, H, W), and a mask (P,) of reliable tracks.
    These stay in the frame, and tracking each step backward returns to the same point within 1/64
    of the height (Kalal et al. 2010)."""
    gray = video.mean(0)  # (F, H, W)
    H, W = gray.shape[1:]
    tracks = [textured_points(gray[0])]
    reliable = torch.ones(len(tracks[0]), dtype=torch.bool)
    for a, b in zip(gray[:-1], gray[1:]):
        forward = lucas_kanade(a, b, tracks[-1])
        backward = lucas_kanade(b, a, forward)
        reliable &= (backward - tracks[-1]).norm(dim=1) < H / 64
        reliable &= ((forward >= 0) & (forward < torch.tensor([W, H]))).all(1)
        tracks.append(forward)
    return torch.stack(tracks, 1), reliable


@torch.no_grad()
def motion_fidelity(source, generated, still=0.05):
    """Motion fidelity of two sets of tracks (P, F, 2), at most 2 (Yatim et al. 2023).

    For each track of one video, the best correlation with a track of the other, averaged over
    tracks and summed over both directions. A correlation is the mean cosine of the displacements.
    Two still points (displacement under `still` pixels) have cosine 1; a still and a moving one, 0.
    Tracks of different lengths are cut to the shorter.
    """
    if not len(source) or not len(generated):
        return 0.0
    frames = min(source.shape[1], generated.shape[1])
    a, b = source[:, :frames].diff(dim=1), generated[:, :frames].diff(dim=1)  # (P or Q, F-1, 2)
    cosine = torch.einsum("pfc,qfc->pqf", F.normalize(a, dim=-1), F.normalize(b, dim=-1))
    still_a, still_b = (a.norm(dim=-1) < still)[:, None], (b.norm(dim=-1) < still)[None]
    cosine = torch.where(still_a & still_b, 1.0, torch.where(still_a | still_b, 0.0, cosine))
    correlation = cosine.mean(-1)  # (P, Q)
    return (correlation.amax(0).mean() + correlation.amax(1).mean()).item()


def read_tracks(path, frames):
    """Another program's tracks, a .npy of (P, F, 2) pixels. Raises BadInput."""
    with reading(path, f"expected a .npy array (P, {frames}, 2)"):
        tracks = torch.from_numpy(np.load(path, allow_pickle=False)).float()
        if tracks.dim() != 3 or not len(tracks) or tracks.shape[1:] != (frames, 2):
            raise ValueError(f"its shape is {tuple(tracks.shape)}")
        if not tracks.isfinite().all():
            raise ValueError("it has NaN or infinite values")
    return tracks
