"""Measure a clip of the tiny world from its pixels: color, shape, background, trajectory, motion.

Nothing here is trained. The palette separates background from object, templates identify the shape,
and the world's own trajectories, fitted to the measured one, identify the motion. Each index can be
-1: none of these.

Axes: B clips, F frames, H W frame, K candidates.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tiny import world

COLORS = torch.tensor(list(world.COLORS.values())) / 255  # (8, 3)
BACKGROUNDS = torch.tensor(list(world.BACKGROUNDS.values())) / 255  # (5, dark and light, 3)
SYMMETRY = {"circle": 0, "ring": 0, "square": 4, "triangle": 3, "star": 5, "cross": 4}


@dataclass
class Reading:
    """Indices into the world's tables (B,), -1 for none; and measurements per frame (B, F)."""

    color: torch.Tensor
    shape: torch.Tensor
    background: torch.Tensor
    motion: torch.Tensor
    x: torch.Tensor  # center of the object, pixels; a frame without an object repeats its neighbor
    y: torch.Tensor
    size: torch.Tensor  # square root of the covered area, pixels
    found: torch.Tensor  # whether the frame shows an object
    frame_colors: torch.Tensor  # color and shape of each frame alone, -1 for none
    frame_shapes: torch.Tensor


# --- Color and background -----------------------------------------------------------------------


def distance_to_backgrounds(pixels):
    """Distance of RGB values (…, 3) to each background's dark-to-light segment: (…, 5)."""
    channels, distances = pixels.unbind(-1), []  # by channel: sums over an axis of three are slow
    for dark, light in BACKGROUNDS.tolist():
        line = [b - a for a, b in zip(dark, light)]
        to = [p - a for p, a in zip(channels, dark)]
        length = max(sum(e * e for e in line), 1e-9)
        along = (sum(t * e for t, e in zip(to, line)) / length).clamp(0, 1)
        distances.append(sum((t - along * e) ** 2 for t, e in zip(to, line)).sqrt())
    return torch.stack(distances, -1)


def read_background(pixels):
    """(B, F, H, W, 3) in [0, 1] -> the index (B,) of the background that explains most pixels, or
    -1 where it explains few, or where its pattern is missing; the same index without the -1; and
    the distance (B, F, H, W) of each pixel to that background."""
    distance = distance_to_backgrounds(pixels)
    mean = distance.clamp(max=0.3).mean((1, 2, 3))  # (B, 5)
    best = mean.argmin(-1)
    rows = torch.arange(len(best))
    nearest = distance[rows, ..., best]
    dark, light = BACKGROUNDS[best, 0], BACKGROUNDS[best, 1]
    dark, line = dark[:, None, None, None], (light - dark)[:, None, None, None]
    along = ((pixels - dark) * line).sum(-1) / (line**2).sum(-1).clamp(min=1e-9)
    behind = nearest < 0.12  # pixels of the background, not of the object
    share = lambda m: (m & behind).flatten(1).sum(1) / behind.flatten(1).sum(1).clamp(min=1)
    patterned = (share(along > 0.65) > 0.05) & (share(along < 0.35) > 0.05)
    most = (share(behind) > 0) & (behind.flatten(1).float().mean(1) > 0.5)
    return torch.where(most & (patterned | (best == 0)), best, -1), best, nearest


def read_color(pixels, distance):
    """The index (B,) of the color nearest to most of the clip's foreground, or -1 where it is too
    far; the same index without the -1; and the index of each frame alone, (B, F). distance
    (B, F, H, W) is the distance to the background."""
    B, frames = distance.shape[:2]
    weight = ((distance - 0.22).clamp(min=0) ** 2).flatten(2)  # (B, F, H·W)
    to = torch.cdist(pixels.flatten(1, 3), COLORS.expand(B, -1, -1))  # (B, F·H·W, 8)
    nearest, which = (t.view(weight.shape) for t in to.min(-1))
    votes = torch.zeros(B, frames, len(COLORS)).scatter_add_(2, which, weight)
    total, error = weight.sum(2), (nearest * weight).sum(2)

    def decide(votes, total, error):
        sure = (votes.amax(-1) > 0.5 * total) & (error < 0.3 * total.clamp(min=1e-9))
        return torch.where(sure, votes.argmax(-1), -1)

    clip_votes = votes.sum(1)
    color = decide(clip_votes, total.sum(1), error.sum(1))
    return color, clip_votes.argmax(-1), decide(votes, total, error)


# --- Shape --------------------------------------------------------------------------------------


def largest_component(mask):
    """(N, H, W) bool -> the largest connected component of each."""
    N, H, W = mask.shape
    label = torch.arange(1, H * W + 1, dtype=torch.float32).reshape(1, H, W) * mask
    for _ in range(4 * H):
        wider = F.max_pool2d(label[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(wider, label):
            break
        label = wider
    counts = torch.zeros(N, H * W + 1).scatter_add_(
        1, label.long().flatten(1), torch.ones(N, H * W))
    counts[:, 0] = 0
    return label == counts.argmax(1)[:, None, None]


def _templates():
    """Every shape at ten angles, round ones at one, rendered at one area: coverage (K, GRID²), the
    index of the shape (K,) and its angle in radians (K,)."""
    area = (world.distance_maps() < 0).float().mean((1, 2, 3)) * (2 * world.EXTENT) ** 2
    masks, shapes, angles = [], [], []
    for index, name in enumerate(world.SHAPES):
        for k in range(10 if SYMMETRY[name] else 1):
            angle = k * 2 * torch.pi / SYMMETRY[name] / 10 if SYMMETRY[name] else 0.0
            middle, one = torch.full((1, 1), GRID / 2), torch.ones(1, 1)
            path = world.Trajectory(middle, middle, one, one * angle, one, one)
            radius = (GRID / SPAN) / area[index].sqrt()
            mask = world.object_masks(torch.tensor([index]), path, radius[None], GRID)
            masks.append(mask.flatten())
            shapes.append(index)
            angles.append(angle)
    return torch.stack(masks), torch.tensor(shapes), torch.tensor(angles)


GRID, SPAN = 40, 2.4  # a template has GRID² pixels and is SPAN times √(object area) wide
TEMPLATES, TEMPLATE_SHAPE, TEMPLATE_ANGLE = _templates()


def fit_shape(cover, x, y, area):
    """Coverage (N, H, W) against the templates: overlap (N, 6) and best angle (N, 6), in radians.

    Each object is shifted and scaled to the templates' center and area. The overlap is intersection
    over union, with the product as intersection, which is exact for coverage of 0 or 1.
    """
    axis = ((torch.arange(GRID) + 0.5) / GRID - 0.5) * SPAN
    offset = area.sqrt()[:, None] * axis  # (N, GRID), pixels from the center
    unit = lambda pixels: pixels / world.SIZE * 2 - 1
    gx, gy = unit(x[:, None] + offset), unit(y[:, None] + offset)
    square = (len(cover), GRID, GRID)
    grid = torch.stack([gx[:, None, :].expand(square), gy[:, :, None].expand(square)], -1)
    patch = F.grid_sample(cover[:, None], grid, align_corners=False).flatten(1)  # (N, GRID²)
    both = patch @ TEMPLATES.T  # (N, K)
    union = (patch**2).sum(1, keepdim=True) + (TEMPLATES**2).sum(1) - both
    overlap = both / union.clamp(min=1)
    masked = torch.where(TEMPLATE_SHAPE == torch.arange(len(world.SHAPES))[:, None], 0.0, -9.0)
    best = (overlap[:, None] + masked).max(-1)  # over the templates of each shape
    return best.values, TEMPLATE_ANGLE[best.indices]


# --- Motion -------------------------------------------------------------------------------------


def camera_shift(pixels, background):
    """Shift of the background to the right, pixels per frame (B,); background (B, F, H, W) bool."""
    gray, shifts = pixels.mean(-1), range(-7, 8)
    errors = []
    for d in shifts:
        a, b = gray[:, :-1, :, 8 - 1 : -8 + 1], gray[:, 1:, :, 8 - 1 + d : world.SIZE - 8 + 1 + d]
        ok = background[:, :-1, :, 7:-7] & background[:, 1:, :, 7 + d : world.SIZE - 7 + d]
        errors.append(((a - b).abs() * ok).sum((1, 2, 3)) / ok.sum((1, 2, 3)).clamp(min=1))
    errors = torch.stack(errors, 1)  # (B, 15)
    best = errors.argmin(1)
    sure = errors.amin(1) < 0.8 * errors[:, 7]  # clearly better than no shift
    return torch.where(sure, torch.tensor(list(shifts))[best], 0)


def fill_gaps(values, found):
    """Replace frames without an object by the previous found value, or else by the next."""
    index = torch.where(found, torch.arange(found.shape[1]), -1).cummax(1).values
    first = found.float().argmax(1, keepdim=True)
    return values.gather(1, torch.where(index < 0, first, index))


def prototypes(frames):
    """Every motion at every speed: centered positions (K, 2, F) and the motion's index (K,)."""
    indices, paths = [], []
    for m in range(len(world.MOTIONS)):
        for s in range(3):
            zero, one = torch.zeros(1), torch.ones(1)
            fields = [torch.tensor([v]) for v in (0, 0, 0, m, s)]
            scenes = world.Scenes(*fields, x=zero, y=zero, amplitude=one, radius=one, angle=zero)
            path = world.trajectory(scenes, frames)
            paths.append(torch.stack([path.x[0], path.y[0]]))
            indices.append(m)
    paths = torch.stack(paths)
    return paths - paths.mean(-1, keepdim=True), torch.tensor(indices)


def read_motion(x, y, size, rotation, thinness, shift):
    """Index of the motion (B,), or -1, from the measured position and size (B, F), and the total
    rotation, thinness and camera shift (B,).

    If the object moves, the best-fitting trajectory of the world counts (amplitude 6 to 26 pixels,
    at least 3/4 of the variance explained). If it stays, size, rotation and camera decide.
    """
    index = world.MOTIONS.index
    position = torch.stack([x, y], 1)  # (B, 2, F)
    position = position - position.mean(-1, keepdim=True)
    paths, motions = prototypes(x.shape[1])
    power = (paths**2).sum((1, 2))
    moving = power > 1e-6
    paths, motions, power = paths[moving], motions[moving], power[moving]
    amplitude = (torch.einsum("bcf,kcf->bk", position, paths) / power).clamp(6, 26)
    rest = ((position[:, None] - amplitude[..., None, None] * paths) ** 2).sum((2, 3))
    total = (position**2).sum((1, 2))
    unexplained, best = (rest / total[:, None].clamp(min=1e-6)).min(1)
    moves = torch.where(unexplained < 0.25, motions[best], -1)
    # Tumbling is a falling diagonal with the object seen edge-on; the diagonal alone is no motion.
    tumbles = moves == index("tumbling")
    moves = torch.where(tumbles & (thinness > 0.6), -1, moves)

    growth = torch.log(size[:, -3:].mean(1) / size[:, :3].mean(1))
    stays = torch.full_like(moves, index("standing still"))
    stays = torch.where(shift <= -1, index("standing still while the camera pans"), stays)
    stays = torch.where(rotation.abs() > 1.6, index("spinning"), stays)
    stays = torch.where(growth > 0.3, index("growing"), stays)
    stays = torch.where(growth < -0.3, index("shrinking"), stays)
    spread = (total / x.shape[1]).sqrt()  # RMS distance from the mean position
    return torch.where(spread < 3.0, stays, moves)


def total_rotation(angle, shape):
    """Signed rotation (B,) over a clip, from angles (B, F) known up to the shape's symmetry."""
    period = torch.tensor([2 * torch.pi / n if n else 1e9 for n in SYMMETRY.values()])
    order = torch.tensor([list(SYMMETRY).index(s) for s in world.SHAPES])
    period = period[order][shape][:, None]
    step = angle.diff(dim=1)
    step = step - period * (step / period).round()
    return step.sum(1)


# --- All together -------------------------------------------------------------------------------


def read(video):
    """Clips (B, 3, F, H, W) in [-1, 1] -> Reading."""
    B, _, frames, H, W = video.shape
    pixels = ((video.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 4, 1)
    background, nearest, distance = read_background(pixels)
    color, likely, frame_colors = read_color(pixels, distance)
    # (B,): distance between the object's color and the background
    reference = distance_to_backgrounds(COLORS)[likely, nearest]
    cover = (distance / reference[:, None, None, None]).clamp(0, 1).flatten(0, 1)  # (B·F, H, W)
    inside = largest_component(cover > 0.5)[:, None].float()
    cover = cover * F.max_pool2d(inside, 3, 1, 1)[:, 0]

    area = cover.sum((1, 2))
    axis = torch.arange(W) + 0.5
    center = lambda along: (cover.sum(along) * axis).sum(1) / area.clamp(min=1)
    x, y = center(1), center(2)
    variance = lambda along, mean: (cover.sum(along) * (axis - mean[:, None]) ** 2).sum(1)
    thinness = (variance(1, x) / variance(2, y).clamp(min=1)).sqrt().reshape(B, frames)
    overlap, angle = fit_shape(cover, x, y, area.clamp(min=1))

    fold = lambda t: t.reshape(B, frames, *t.shape[1:])
    found = (fold(area) > 35) & (fold(area) < 0.4 * H * W)
    score = torch.where(found[..., None], fold(overlap), 0.0)
    top = score.topk(frames // 2, dim=1).values.mean(1)  # (B, 6), over the half that fits best
    quality, shape = top.max(1)
    angle = fold(angle)[torch.arange(B), :, shape]
    fill = lambda t: fill_gaps(t.reshape(B, frames), found)
    x, y, size = fill(x), fill(y), fill(area.sqrt())
    shift = camera_shift(pixels, F.max_pool2d(cover, 5, 1, 2).reshape(B, frames, H, W) < 0.2)
    is_round = world.is_shape(shape, *world.ROUND)
    rotation = torch.where(is_round, 0.0, total_rotation(fill(angle), shape))
    motion = read_motion(x, y, size, rotation, thinness.amin(1), shift)
    visible = found.sum(1) >= frames * 7 // 8
    frame_quality, frame_shape = score.max(2)
    frame_shapes = torch.where(frame_quality > 0.6, frame_shape, -1)
    return Reading(torch.where(visible, color, -1),
                   torch.where(visible & (quality > 0.7), shape, -1),
                   background, torch.where(visible, motion, -1), x, y, size, found,
                   torch.where(found, frame_colors, -1), frame_shapes)


def agreement(reading, path):
    """Agreement (N,) with a reference Trajectory, x and y of (1, F): the mean Pearson correlation
    over the axes on which the reference moves more than 2 pixels; NaN if it moves on none. An axis
    counts 0 if its amplitude is not within half and twice the reference's. A video counts 0 if its
    object is found in fewer than 7/8 of the frames."""
    scores, frames = [], path.x.shape[1]
    for x, target in ((reading.x, path.x), (reading.y, path.y)):
        if target.amax() - target.amin() > 2:
            a, b = x - x.mean(1, keepdim=True), target - target.mean(1, keepdim=True)
            r = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-6)
            ratio = a.norm(dim=1) / b.norm(dim=1)
            scores.append(torch.where((ratio >= 0.5) & (ratio <= 2), r, 0.0))
    if not scores:
        return torch.full((len(reading.x),), float("nan"))
    return torch.where(reading.found.sum(1) * 8 >= frames * 7, torch.stack(scores).mean(0), 0.0)


def appearance_stability(scenes, reading):
    """Share of frames (B,) with the right color and the right shape."""
    right = reading.frame_colors == scenes.color[:, None]
    return (right & (reading.frame_shapes == scenes.shape[:, None])).float().mean(1)
