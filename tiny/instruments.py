"""Read a clip of the tiny world off its pixels: colour, shape, background, path, kind of motion.

    python tiny/instruments.py --clips 200        # how often they are right on rendered clips

Nothing here is learned. The palette says what is background and what is thing, templates of the
shapes say which thing, and the world's own paths, fitted to the measured one, say how it moves.
Each reading may be -1: none of these.

Axes: B clips, F frames, H W picture, K candidates.
"""
import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from tiny import world  # noqa: E402

COLOURS = torch.tensor(list(world.COLOURS.values())) / 255  # (8, 3)
BACKGROUNDS = torch.tensor(list(world.BACKGROUNDS.values())) / 255  # (5, dark and light, 3)
SYMMETRY = {"circle": 0, "ring": 0, "square": 4, "triangle": 3, "star": 5, "cross": 4}


@dataclass
class Reading:
    """What was read. Indices into the world's tables (B,), -1 for none; measurements (B, F)."""

    colour: torch.Tensor
    shape: torch.Tensor
    background: torch.Tensor
    motion: torch.Tensor
    x: torch.Tensor  # centre of the thing, pixels; repeats its neighbour where nothing was found
    y: torch.Tensor
    size: torch.Tensor  # the root of the covered area, pixels
    found: torch.Tensor  # whether a frame shows a thing
    colours: torch.Tensor  # colour and shape of each frame alone, -1 for none: do looks hold still?
    shapes: torch.Tensor


def to_background(pixels):
    """Distance of RGB values (…, 3) to each background's dark-to-light segment: (…, 5)."""
    planes, distances = pixels.unbind(-1), []  # by plane: sums over an axis of three are slow
    for dark, light in BACKGROUNDS.tolist():
        line = [b - a for a, b in zip(dark, light)]
        to = [p - a for p, a in zip(planes, dark)]
        length = max(sum(e * e for e in line), 1e-9)
        along = (sum(t * e for t, e in zip(to, line)) / length).clamp(0, 1)
        distances.append(sum((t - along * e) ** 2 for t, e in zip(to, line)).sqrt())
    return torch.stack(distances, -1)


def read_background(pixels):
    """(B, F, H, W, 3) in [0, 1] -> index (B,): whose two colours explain most pixels; -1 when they
    explain badly, or when a patterned background's pattern is not there. Also the index without
    the -1, and the distance (B, F, H, W) of each pixel to that background.
    """
    distance = to_background(pixels)
    near = distance.clamp(max=0.3).mean((1, 2, 3))  # (B, 5)
    best = near.argmin(-1)
    rows = torch.arange(len(best))
    own = distance[rows, ..., best]
    dark, light = BACKGROUNDS[best, 0], BACKGROUNDS[best, 1]
    dark, line = dark[:, None, None, None], (light - dark)[:, None, None, None]
    along = ((pixels - dark) * line).sum(-1) / (line**2).sum(-1).clamp(min=1e-9)
    calm = own < 0.12  # pixels that are background, not thing
    share = lambda m: (m & calm).flatten(1).sum(1) / calm.flatten(1).sum(1).clamp(min=1)
    patterned = (share(along > 0.65) > 0.05) & (share(along < 0.35) > 0.05)
    good = (share(calm) > 0) & (calm.flatten(1).float().mean(1) > 0.5) & (patterned | (best == 0))
    return torch.where(good, best, -1), best, own


def read_colour(pixels, distance):
    """Index (B,) of the colour that most of the clip's foreground is nearest to, or -1 where it is
    not near enough; the index without the -1; and that of each frame, (B, F). distance
    (B, F, H, W) is that to the background."""
    B, frames = distance.shape[:2]
    weight = ((distance - 0.22).clamp(min=0) ** 2).flatten(2)  # (B, F, H·W)
    to = torch.cdist(pixels.flatten(1, 3), COLOURS.expand(B, -1, -1))  # (B, F·H·W, 8)
    nearest, which = (t.view(weight.shape) for t in to.min(-1))
    votes = torch.zeros(B, frames, len(COLOURS)).scatter_add_(2, which, weight)
    total, off = weight.sum(2), (nearest * weight).sum(2)

    def decide(votes, total, off):
        sure = (votes.amax(-1) > 0.5 * total) & (off < 0.3 * total.clamp(min=1e-9))
        return torch.where(sure, votes.argmax(-1), -1)

    whole = votes.sum(1)
    colour = decide(whole, total.sum(1), off.sum(1))
    return colour, whole.argmax(-1), decide(votes, total, off)


def largest_blob(mask):
    """(N, H, W) bool -> the largest connected part of each."""
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
    """All shapes at ten angles each, round ones at one, drawn by the renderer at one area: (K,
    GRID²) coverage, the shape's index (K,) and its angle in radians (K,)."""
    area = (world._distance_maps() < 0).float().mean((1, 2, 3)) * (2 * world.EXTENT) ** 2
    masks, shapes, angles = [], [], []
    for index, name in enumerate(world.SHAPES):
        for k in range(10 if SYMMETRY[name] else 1):
            angle = k * 2 * torch.pi / SYMMETRY[name] / 10 if SYMMETRY[name] else 0.0
            middle, one = torch.full((1, 1), GRID / 2), torch.ones(1, 1)
            path = world.Path_(middle, middle, one, one * angle, one, one)
            radius = (GRID / SPAN) / area[index].sqrt()
            mask = world.thing_masks(torch.tensor([index]), path, radius[None], GRID)
            masks.append(mask.flatten())
            shapes.append(index)
            angles.append(angle)
    return torch.stack(masks), torch.tensor(shapes), torch.tensor(angles)


GRID, SPAN = 40, 2.4  # templates are GRID² pixels, and SPAN roots of the thing's area wide
TEMPLATES, TEMPLATE_SHAPE, TEMPLATE_ANGLE = _templates()


def fit_shape(cover, x, y, area):
    """Coverage (N, H, W) against the templates: overlap (N, 6) and best angle (N, 6), in radians.

    Each thing is moved and scaled to the templates' place and area. The overlap is intersection
    over union, the intersection taken as a product, which for coverage of 0 or 1 is the same.
    """
    axis = ((torch.arange(GRID) + 0.5) / GRID - 0.5) * SPAN
    reach = area.sqrt()[:, None] * axis  # (N, GRID), pixels from the centre
    unit = lambda pixels: pixels / world.SIZE * 2 - 1
    gx, gy = unit(x[:, None] + reach), unit(y[:, None] + reach)
    square = (len(cover), GRID, GRID)
    grid = torch.stack([gx[:, None, :].expand(square), gy[:, :, None].expand(square)], -1)
    own = F.grid_sample(cover[:, None], grid, align_corners=False).flatten(1)  # (N, GRID²)
    both = own @ TEMPLATES.T  # (N, K)
    union = (own**2).sum(1, keepdim=True) + (TEMPLATES**2).sum(1) - both
    overlap = both / union.clamp(min=1)
    masked = torch.where(TEMPLATE_SHAPE == torch.arange(len(world.SHAPES))[:, None], 0.0, -9.0)
    best = (overlap[:, None] + masked).max(-1)  # over the templates of each shape
    return best.values, TEMPLATE_ANGLE[best.indices]


def camera_shift(pixels, background):
    """Pixels a frame (B,) by which the background moves right; background (B, F, H, W) bool."""
    grey, shifts = pixels.mean(-1), range(-7, 8)
    errors = []
    for d in shifts:
        a, b = grey[:, :-1, :, 8 - 1 : -8 + 1], grey[:, 1:, :, 8 - 1 + d : world.SIZE - 8 + 1 + d]
        ok = background[:, :-1, :, 7:-7] & background[:, 1:, :, 7 + d : world.SIZE - 7 + d]
        errors.append(((a - b).abs() * ok).sum((1, 2, 3)) / ok.sum((1, 2, 3)).clamp(min=1))
    errors = torch.stack(errors, 1)  # (B, 15)
    best = errors.argmin(1)
    sure = errors.amin(1) < 0.8 * errors[:, 7]  # clearly better than no shift at all
    return torch.where(sure, torch.tensor(list(shifts))[best], 0)


def hold(values, found):
    """Fill frames where nothing was found with the nearest found value before them, or after."""
    index = torch.where(found, torch.arange(found.shape[1]), -1).cummax(1).values
    first = found.float().argmax(1, keepdim=True)
    return values.gather(1, torch.where(index < 0, first, index))


def prototypes(frames):
    """Every motion at every speed: positions (K, 2, F) centred, in reaches; and its index (K,)."""
    kinds, paths = [], []
    for m in range(len(world.MOTIONS)):
        for s in range(3):
            zero, one = torch.zeros(1), torch.ones(1)
            indices = [torch.tensor([v]) for v in (0, 0, 0, m, s)]
            scenes = world.Scenes(*indices, x=zero, y=zero, reach=one, radius=one, angle=zero)
            path = world.trajectory(scenes, frames)
            paths.append(torch.stack([path.x[0], path.y[0]]))
            kinds.append(m)
    paths = torch.stack(paths)
    return paths - paths.mean(-1, keepdim=True), torch.tensor(kinds)


def read_motion(x, y, size, turn, thin, shift):
    """Kind of motion (B,) from measured position, size (B, F), total turn, thinness and shift (B,).

    A thing that travels takes the world's path that fits best after scaling (at least 3/4 of the
    variance explained, reach between 6 and 26 pixels); one that stays is told by size, turn and
    camera. -1 when neither.
    """
    name = world.MOTIONS.index
    position = torch.stack([x, y], 1)  # (B, 2, F)
    position = position - position.mean(-1, keepdim=True)
    paths, kinds = prototypes(x.shape[1])
    power = (paths**2).sum((1, 2))
    moving = power > 1e-6
    paths, kinds, power = paths[moving], kinds[moving], power[moving]
    reach = (torch.einsum("bcf,kcf->bk", position, paths) / power).clamp(6, 26)
    rest = ((position[:, None] - reach[..., None, None] * paths) ** 2).sum((2, 3))
    total = (position**2).sum((1, 2))
    unexplained, best = (rest / total[:, None].clamp(min=1e-6)).min(1)
    travels = torch.where(unexplained < 0.25, kinds[best], -1)
    # Along a falling diagonal and turning edge-on is tumbling; without turning it is nothing.
    tumbles = travels == name("tumbling")
    travels = torch.where(tumbles & (thin > 0.6), -1, travels)

    growth = torch.log(size[:, -3:].mean(1) / size[:, :3].mean(1))
    stays = torch.full_like(travels, name("standing still"))
    stays = torch.where(shift <= -1, name("standing still while the camera pans"), stays)
    stays = torch.where(turn.abs() > 1.6, name("spinning"), stays)
    stays = torch.where(growth > 0.3, name("growing"), stays)
    stays = torch.where(growth < -0.3, name("shrinking"), stays)
    spread = (total / x.shape[1]).sqrt()  # RMS distance from the mean position
    return torch.where(spread < 3.0, stays, travels)


def total_turn(angle, shape):
    """Signed rotation (B,) over a clip from angles (B, F) known up to the shape's symmetry."""
    period = torch.tensor([2 * torch.pi / n if n else 1e9 for n in SYMMETRY.values()])
    order = torch.tensor([list(SYMMETRY).index(s) for s in world.SHAPES])
    period = period[order][shape][:, None]
    step = angle.diff(dim=1)
    step = step - period * (step / period).round()
    return step.sum(1)


def read(video):
    """Clips (B, 3, F, H, W) in [-1, 1] -> Reading."""
    B, _, frames, H, W = video.shape
    pixels = ((video.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 4, 1)
    background, nearest, distance = read_background(pixels)
    colour, own, colours = read_colour(pixels, distance)
    reference = to_background(COLOURS)[own, nearest]  # (B,): how far the thing's colour stands off
    cover = (distance / reference[:, None, None, None]).clamp(0, 1).flatten(0, 1)  # (B·F, H, W)
    cover = cover * F.max_pool2d(largest_blob(cover > 0.5)[:, None].float(), 3, 1, 1)[:, 0]

    area = cover.sum((1, 2))
    axis = torch.arange(W) + 0.5
    centre = lambda along: (cover.sum(along) * axis).sum(1) / area.clamp(min=1)
    x, y = centre(1), centre(2)
    square = lambda along, mid: (cover.sum(along) * (axis - mid[:, None]) ** 2).sum(1)
    thin = (square(1, x) / square(2, y).clamp(min=1)).sqrt().reshape(B, frames)
    overlap, turn = fit_shape(cover, x, y, area.clamp(min=1))

    fold = lambda t: t.reshape(B, frames, *t.shape[1:])
    found = (fold(area) > 35) & (fold(area) < 0.4 * H * W)
    score = torch.where(found[..., None], fold(overlap), 0.0)
    top = score.topk(frames // 2, dim=1).values.mean(1)  # (B, 6), over the half that fits best
    quality, shape = top.max(1)
    angle = fold(turn)[torch.arange(B), :, shape]
    held = lambda t: hold(t.reshape(B, frames), found)
    x, y, size = held(x), held(y), held(area.sqrt())
    shift = camera_shift(pixels, F.max_pool2d(cover, 5, 1, 2).reshape(B, frames, H, W) < 0.2)
    turned = torch.where(world.is_shape(shape, *world.ROUND), 0.0, total_turn(held(angle), shape))
    motion = read_motion(x, y, size, turned, thin.amin(1), shift)
    seen = found.sum(1) >= frames * 7 // 8
    own_quality, own_shape = score.max(2)
    shapes = torch.where(own_quality > 0.6, own_shape, -1)
    return Reading(torch.where(seen, colour, -1), torch.where(seen & (quality > 0.7), shape, -1),
                   background, torch.where(seen, motion, -1), x, y, size, found,
                   torch.where(found, colours, -1), shapes)


def agreement(reading, path):
    """(N,) agreement with a reference path, x and y of (1, F): mean Pearson correlation over the
    axes on which the reference moves more than 2 pixels; NaN where it moves on none. An axis whose
    amplitude is not within half and twice the reference's counts 0, and so does a video whose thing
    is found in fewer than 7/8 of its frames."""
    scores, frames = [], path.x.shape[1]
    for got, want in ((reading.x, path.x), (reading.y, path.y)):
        if want.amax() - want.amin() > 2:
            a, b = got - got.mean(1, keepdim=True), want - want.mean(1, keepdim=True)
            r = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-6)
            ratio = a.norm(dim=1) / b.norm(dim=1)
            scores.append(torch.where((ratio >= 0.5) & (ratio <= 2), r, 0.0))
    if not scores:
        return torch.full((len(reading.x),), float("nan"))
    return torch.where(reading.found.sum(1) * 8 >= frames * 7, torch.stack(scores).mean(0), 0.0)


def steadiness(scenes, reading):
    """Share of frames (B,) whose colour and shape are both read as they were drawn."""
    right = reading.colours == scenes.colour[:, None]
    return (right & (reading.shapes == scenes.shape[:, None])).float().mean(1)


def accuracy(scenes, reading):
    """Share of clips (a dict of floats) in which each thing was read as it was drawn."""
    names = ("colour", "shape", "background", "motion")
    return {n: (getattr(scenes, n) == getattr(reading, n)).float().mean().item() for n in names}


def main():
    """Count how often the instruments are right."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=400, help="rendered clips to read")
    parser.add_argument("--vae", action="store_true", help="pass them through the tiny VAE first")
    args = parser.parse_args()
    g, total, wrong, steady = torch.Generator().manual_seed(7), {}, [], 0.0
    vae = None
    if args.vae:
        import model
        vae = model.load_vae(Path(__file__).parent / "weights")
    for start in range(0, args.clips, 40):
        scenes = world.sample_scenes(40, g, world.MOTIONS)
        video = world.render(scenes)
        if vae:
            with torch.no_grad():
                video = vae.decode_video(vae.encode_video(video))
        reading = read(video)
        steady += steadiness(scenes, reading).mean().item() * 40 / args.clips
        for name, share in accuracy(scenes, reading).items():
            total[name] = total.get(name, 0) + share * 40 / args.clips
            for i in (getattr(scenes, name) != getattr(reading, name)).nonzero()[:, 0].tolist():
                wrong.append((start + i, name, world.captions(scenes[i : i + 1])[0],
                              getattr(reading, name)[i].item()))
    print({n: round(v, 4) for n, v in total.items()}, "frames", round(steady, 4))
    for w in wrong[:30]:
        print("  wrong:", *w)


if __name__ == "__main__":
    main()
