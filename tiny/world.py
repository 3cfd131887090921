"""A procedural world of moving things with captions: the tiny model's whole universe.

    python tiny/world.py --sheet world.png        # look at every motion
    python tiny/world.py --clip hopping.mp4       # one clip to learn from
    python tiny/world.py --clip seven.mp4 --motion novel:7    # of a motion drawn from seed 7

A scene is a thing (colour, shape) that moves (motion, speed) in front of a background. Rendering is
exact, antialiased, batched and a function of the scene alone; a scene is one of its seed.

Some motions have names. Beside them is a continuum of motions that have none: random paths, growth,
turning and flattening, of which captions only say "moving". As real models do, a model of this
world so knows far more motions than it has words for, and customizing it picks one of them.

Axes: B scenes, F frames, H W picture (64×64). Positions are in pixels, x to the right, y down.
"""
import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

SIZE, FRAMES, FPS = 64, 16, 8

COLOURS = {  # bright, so that none is near a background's
    "red": (225, 35, 45), "orange": (250, 140, 20), "yellow": (250, 230, 50),
    "green": (60, 215, 70), "cyan": (70, 225, 230), "blue": (50, 100, 255),
    "pink": (250, 120, 205), "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
ROUND = ("circle", "ring")  # turning them in the plane shows nothing
BACKGROUNDS = {  # caption -> two dark colours
    "grey": ((105, 105, 110), (105, 105, 110)),
    "blue striped": ((22, 30, 75), (48, 66, 128)),
    "green checkered": ((18, 52, 30), (40, 92, 56)),
    "brown dotted": ((84, 58, 38), (134, 104, 74)),
    "purple wavy": ((58, 22, 66), (98, 52, 108)),
}
BASE = (
    "moving left", "moving right", "moving up", "moving down", "growing", "shrinking", "spinning",
    "moving in a circle", "standing still", "swinging from side to side", "bobbing up and down",
    "standing still while the camera pans",
)
NOVEL = ("zigzagging", "moving in a spiral", "moving in a figure eight", "moving along a square",
         "hopping", "tumbling")
MOTIONS = BASE + NOVEL
UNNAMED = len(MOTIONS)  # the motion's index of a scene that follows its own course
UNNAMED_WORDS = ("moving", "moving about", "in motion")
POINTS = 61  # samples of a course; four between two frames, so that frames fall on samples
SPEEDS = {"slowly": 0.55, "": 1.0, "quickly": 1.5}
WORDS = (*COLOURS, *SHAPES, *BACKGROUNDS, *BASE, *SPEEDS, *UNNAMED_WORDS, "a an on thing background")
UNHURRIED = ("standing still", "growing", "shrinking")  # have one speed only


@dataclass
class Scenes:
    """B scenes: indices into the tables above and the numbers that vary. Tensors (B,), but for the
    course, which scenes with an unnamed motion follow: (B, 5, POINTS), see `free_course`."""

    colour: torch.Tensor
    shape: torch.Tensor
    background: torch.Tensor
    motion: torch.Tensor
    speed: torch.Tensor  # index into SPEEDS
    x: torch.Tensor  # centre of the motion, pixels
    y: torch.Tensor
    reach: torch.Tensor  # how far it goes from there, pixels
    radius: torch.Tensor  # of the thing, pixels
    angle: torch.Tensor  # its orientation at the start, radians
    course: torch.Tensor = None

    def __len__(self):
        return len(self.x)

    def __getitem__(self, rows):
        return Scenes(*(v if v is None else v[rows] for v in vars(self).values()))

    def but(self, **changes):
        """The same scenes with some fields replaced."""
        return replace(self, **changes)


def sample_scenes(n, generator, motions=BASE, speeds=True, unnamed=0.0):
    """n random scenes whose motion is one of `motions`, or, for a share `unnamed` of them, none
    that has a name. Same generator state, same scenes."""
    pick = lambda m: torch.randint(m, (n,), generator=generator)
    between = lambda a, b: a + (b - a) * torch.rand(n, generator=generator)
    kinds = torch.tensor([MOTIONS.index(m) for m in motions])
    motion = kinds[pick(len(motions))]
    shape, background = pick(len(SHAPES)), pick(len(BACKGROUNDS))
    # A circle does not show that it spins, nor a plain wall that the camera pans.
    turning = is_motion(motion, "spinning")
    shape = torch.where(turning & is_shape(shape, *ROUND), 1 + pick(3), shape)
    panning = is_motion(motion, "standing still while the camera pans")
    background = torch.where(panning & (background == 0), 1 + pick(4), background)
    chance = torch.rand(n, generator=generator)
    speed = torch.where(chance < 0.15, 0, torch.where(chance < 0.85, 1, 2))
    if not speeds:
        speed = torch.ones_like(speed)
    speed = torch.where(is_motion(motion, *UNHURRIED), 1, speed)
    resting = is_motion(motion, "standing still", "growing", "shrinking", "spinning",
                        "standing still while the camera pans")
    spread = torch.where(resting, 13.0, 4.0)  # a thing that stays may stay anywhere
    scenes = Scenes(
        pick(len(COLOURS)), shape, background, motion, speed,
        SIZE / 2 + spread * between(-1, 1), SIZE / 2 + spread * between(-1, 1),
        between(14, 16), between(10, 12), between(-0.2, 0.2),
    )
    if unnamed:
        free = torch.rand(n, generator=generator) < unnamed
        courses = torch.stack([free_course(generator) for _ in range(n)])
        scenes = on_course(scenes, courses, free)
    return scenes


def on_course(scenes, courses, free=True):
    """The same scenes, those in `free` (B,) following their `courses` (B, 5, POINTS) instead."""
    free = torch.as_tensor(free).expand(len(scenes))
    middle = SIZE / 2 + (torch.stack([scenes.x, scenes.y]) - SIZE / 2).clamp(-4, 4)
    x, y = torch.where(free, middle, torch.stack([scenes.x, scenes.y]))
    return scenes.but(motion=torch.where(free, UNNAMED, scenes.motion), x=x, y=y,
                      speed=torch.where(free, 1, scenes.speed), course=courses)


def is_motion(motion, *names):
    """Which of the indices (B,) are those of one of the named motions."""
    return torch.isin(motion, torch.tensor([MOTIONS.index(n) for n in names]))


def is_shape(shape, *names):
    """Which of the indices (B,) are those of one of the named shapes."""
    return torch.isin(shape, torch.tensor([SHAPES.index(n) for n in names]))


# ------------------------------------------------------------------------------------------------
# Motions without a name


def corners_path(corners, smooth):
    """A path (2, POINTS) through corners (2, K) at even times: straight, or by Catmull-Rom."""
    if not smooth:
        return F.interpolate(corners[None], POINTS, mode="linear", align_corners=True)[0]
    last = corners.shape[1] - 1
    s = torch.linspace(0, last, POINTS)
    i = s.long().clamp(max=last - 1)
    s = s - i
    a, b, c, d = (corners[:, (i + k).clamp(0, last)] for k in (-1, 0, 1, 2))
    return b + 0.5 * s * (c - a + s * (2 * a - 5 * b + 4 * c - d + s * (3 * (b - c) + d - a)))


def free_path(g):
    """A random path (2, POINTS), in reaches: 3 to 7 corners at even times, joined straight or
    smoothly, or on each axis a sum of two slow waves."""
    kind = torch.rand((), generator=g)
    if kind < 0.65:
        count = int(torch.randint(3, 8, (), generator=g))
        corners = 2.5 * torch.rand(2, count, generator=g) - 1.25
        return corners_path(corners, smooth=kind > 0.35).clamp(-1.4, 1.4)
    cycles, phase, loud = torch.rand(3, 2, 2, 1, generator=g)  # of two axes, two waves each
    waves = torch.sin(2 * math.pi * ((0.5 + 1.5 * cycles) * torch.linspace(0, 1, POINTS) + phase))
    path = (loud * waves).sum(1)
    reach = 0.7 + 0.55 * torch.rand(2, 1, generator=g)
    return reach * path / path.abs().amax(1, keepdim=True)


def free_course(g):
    """All that a thing may do at once, at random: x and y in reaches, size, angle in radians and
    width, (5, POINTS). One in six stays in its place, most of the others only travel."""
    path, turns, flattens = free_path(g), free_path(g), free_path(g)
    stays, *chance = (torch.rand(4, generator=g) < torch.tensor([1 / 6, 0.2, 0.2, 0.15])).tolist()
    if stays and not any(chance):
        chance[int(torch.randint(3, (), generator=g))] = True
    grows, turns_too, flattens_too = chance
    one = torch.ones(POINTS)
    return torch.stack([
        *(path * (not stays)),
        1 + 0.3 * flattens[1] if grows else one,
        turns[0] - turns[0, 0] if turns_too else 0 * one,
        (0.65 + 0.35 * flattens[0] / 1.25).clamp(0.25, 1) if flattens_too else one,
    ])


def explained(path, motions=BASE):
    """The largest share of a path's variance, (2, F), that a named motion's path explains at any
    of its speeds, when scaled to fit."""
    index = torch.tensor([[MOTIONS.index(m), s] for m in motions for s in range(len(SPEEDS))])
    zero, one = torch.zeros(len(index)), torch.ones(len(index))
    none = torch.zeros(len(index), dtype=torch.long)
    named = trajectory(Scenes(none, none, none, *index.unbind(1), zero, zero, one, one, zero),
                       path.shape[1])
    named = torch.stack([named.x, named.y], 1).flatten(1)  # (K, 2·F)
    centred = lambda p: (p.unflatten(-1, (2, -1)) - p.unflatten(-1, (2, -1)).mean(-1, True))
    a, b = centred(path.flatten()).flatten(), centred(named).flatten(1)
    return ((b @ a).clamp(min=0) ** 2 / ((b**2).sum(1) * (a**2).sum()).clamp(min=1e-9)).max().item()


def novel_course(seed, posture=False):
    """The course of the novel motion of that number: a random path that no motion of the base
    explains by half, and that goes far on both axes. With `posture`, what the thing does belongs
    to where it is: it turns and flattens at moments of its own."""
    g = torch.Generator().manual_seed(10**7 + seed)
    path = free_path(g)
    while explained(path) > 0.5 or (path.amax(1) - path.amin(1)).amin() < 1.2:
        path = free_path(g)
    turns, flattens = free_path(g)
    one = torch.ones(POINTS)
    if not posture:
        return torch.stack([*path, one, 0 * one, one])
    return torch.stack([*path, one, 1.2 * turns, (0.65 + 0.35 * flattens).clamp(0.25, 1)])


def scenes_of(motion, n, generator, speeds=False):
    """n scenes of one motion: one that has a name, or 'novel:7', or 'posture:7'."""
    kind, _, seed = motion.partition(":")
    if kind not in ("novel", "posture"):
        return sample_scenes(n, generator, (motion,), speeds)
    scenes = sample_scenes(n, generator, ("moving left",), speeds=False)
    course = novel_course(int(seed), posture=kind == "posture")
    return on_course(scenes, course.expand(n, -1, -1))


def along(course, u):
    """A course (B, 5, POINTS) at times u (1 or B, F) in [0, 1]: (5, B, F)."""
    B, at = len(course), (u * (POINTS - 1)).expand(len(course), -1)
    i = at.long().clamp(max=POINTS - 2)
    part = lambda k: course.gather(2, (i + k)[:, None].expand(B, 5, -1))
    return torch.lerp(part(0), part(1), (at - i)[:, None].expand(B, 5, -1)).transpose(0, 1)


# ------------------------------------------------------------------------------------------------
# Trajectories


@dataclass
class Path_:
    """What a scene's thing does, exactly. All (B, F)."""

    x: torch.Tensor
    y: torch.Tensor
    size: torch.Tensor  # factor on the radius
    angle: torch.Tensor  # radians
    width: torch.Tensor  # factor on the width alone: a coin seen from the side
    pan: torch.Tensor  # how far the background has moved, pixels


def trajectory(scenes, frames=FRAMES, times=None):
    """The exact path of each scene's thing. Each motion is one line of `table`.

    The clip runs from time 0 to 1 in `frames` equal steps, unless `times` (B, F) are given.
    """
    s = scenes
    u = torch.linspace(0, 1, frames)[None] if times is None else times
    pace = torch.tensor(list(SPEEDS.values()))[s.speed][:, None]
    one, zero = torch.ones_like(pace * u), torch.zeros_like(pace * u)
    line = (2 * u - 1) * pace.clamp(max=1.2)  # -1 … 1 at normal speed; quickly must stay in view
    turn = 2 * math.pi * u
    sin, cos = torch.sin, torch.cos
    wave = lambda cycles: sin(turn * cycles)
    tri = lambda cycles: 2 / math.pi * torch.asin(wave(cycles).clamp(-1, 1))
    lap = 4 * u * pace.clamp(max=1.2) % 4  # corners passed of a square
    edge = lambda q: (2 - (q % 4 - 2).abs()).clamp(0.5, 1.5) * 2 - 2  # -1, up, 1, down, one lap
    table = {  # motion: x, y (in reaches), size, angle, width, pan (in pixels)
        "moving left": (-line, zero, one, zero, one, zero),
        "moving right": (line, zero, one, zero, one, zero),
        "moving up": (zero, -line, one, zero, one, zero),
        "moving down": (zero, line, one, zero, one, zero),
        "growing": (zero, zero, 0.55 + 0.85 * u + zero, zero, one, zero),
        "shrinking": (zero, zero, 1.4 - 0.85 * u + zero, zero, one, zero),
        "spinning": (zero, zero, one, turn * pace * 0.75, one, zero),
        "moving in a circle": (sin(turn * pace), -cos(turn * pace), one, zero, one, zero),
        "standing still": (zero, zero, one, zero, one, zero),
        "swinging from side to side": (wave(1.5 * pace), zero, one, zero, one, zero),
        "bobbing up and down": (zero, wave(1.5 * pace), one, zero, one, zero),
        "standing still while the camera pans": (zero, zero, one, zero, one, -48 * u * pace),
        "zigzagging": (line, 0.8 * tri(2 * pace), one, zero, one, zero),
        "moving in a spiral": (1.15 * u * sin(2 * turn * pace), -1.15 * u * cos(2 * turn * pace),
                               one, zero, one, zero),
        "moving in a figure eight": (1.1 * wave(pace), 0.8 * wave(2 * pace), one, zero, one, zero),
        "moving along a square": (edge(lap + 0.5), edge(lap - 0.5), one, zero, one, zero),
        "hopping": (line, 0.6 - 1.5 * wave(1.5 * pace).abs(), one, zero, one, zero),
        "tumbling": (0.8 * line, 0.8 * line, one, zero, 0.2 + 0.8 * cos(turn * pace).abs(), zero),
    }
    own = (zero, zero, one, zero, one) if s.course is None else along(s.course, u)
    rows = [*(table[m] for m in MOTIONS), (*own, zero)]
    everything = torch.stack([torch.stack([c + zero for c in row]) for row in rows])
    x, y, size, angle, width, pan = everything[s.motion, :, torch.arange(len(s))].unbind(1)
    reach = s.reach[:, None]
    return Path_(s.x[:, None] + reach * x, s.y[:, None] + reach * y, size,
                 s.angle[:, None] + angle, width, pan)


# ------------------------------------------------------------------------------------------------
# Rendering


def _polygon(radii, start=-math.pi / 2):
    angles = torch.arange(len(radii)) * 2 * math.pi / len(radii) + start
    return torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor(radii)[:, None]


def _polygon_distance(p, corners):
    """Signed distance of points p (N, 2) to a closed polygon (V, 2); negative inside."""
    a, b = corners, corners.roll(-1, 0)
    edge, to = b - a, p[:, None] - a
    along = ((to * edge).sum(-1) / (edge * edge).sum(-1)).clamp(0, 1)
    distance = (to - along[..., None] * edge).norm(dim=-1).amin(1)
    crosses = (a[:, 1] > p[:, None, 1]) != (b[:, 1] > p[:, None, 1])
    rise = edge[:, 1].where(edge[:, 1] != 0, torch.tensor(1.0))  # level edges are never crossed
    left = to[..., 0] < edge[:, 0] * to[..., 1] / rise
    inside = (crosses & left).sum(1) % 2 == 1
    return torch.where(inside, -distance, distance)


EXTENT, TEXTURE = 1.6, 160  # the distance maps cover [-1.6, 1.6]² in TEXTURE² samples


def _distance_maps():
    """(6, 1, TEXTURE, TEXTURE): each shape's signed distance, in radii. Areas are made alike."""
    axis = (torch.arange(TEXTURE) + 0.5) / TEXTURE * 2 * EXTENT - EXTENT
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    p, r = torch.stack([x.flatten(), y.flatten()], 1), x.hypot(y).flatten()
    w, k = 0.38, 1.12  # half the width and half the length of the cross's bars
    cross = [(w, -k), (w, -w), (k, -w), (k, w), (w, w), (w, k)]
    cross = torch.tensor(cross + [(-a, -b) for a, b in cross])
    maps = {
        "circle": r - 0.92,
        "square": _polygon_distance(p, _polygon([1.16] * 4, -math.pi / 4)),
        "triangle": _polygon_distance(p, _polygon([1.3] * 3)),
        "star": _polygon_distance(p, _polygon([1.4, 0.58] * 5)),
        "ring": (r - 0.8).abs() - 0.3,
        "cross": _polygon_distance(p, cross),
    }
    return torch.stack([maps[s].reshape(1, TEXTURE, TEXTURE) for s in SHAPES])


_maps = None


def thing_masks(shape, path, radius, size=SIZE):
    """Coverage (B, F, H, W) in [0, 1] of things of `shape` (B,) and `radius` (B,) on their path."""
    global _maps
    _maps = _distance_maps() if _maps is None else _maps
    B, frames = path.x.shape
    axis = torch.arange(size) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    each = lambda t: t[..., None, None]
    r = each(radius[:, None] * path.size)
    dx, dy = x - each(path.x), y - each(path.y)
    c, s = each(path.angle.cos()), each(path.angle.sin())
    # From the picture to the thing's own axes: turn back, then undo width and radius.
    own_x, own_y = (c * dx + s * dy) / r / each(path.width), (c * dy - s * dx) / r
    grid = (torch.stack([own_x, own_y], -1) / EXTENT).flatten(0, 1)
    maps = _maps[shape].repeat_interleave(frames, 0)
    distance = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    distance = distance.reshape(B, frames, size, size)
    outside = (own_x.abs().maximum(own_y.abs()) > EXTENT)
    return torch.where(outside, 0.0, (0.5 - distance * r * each(path.width)).clamp(0, 1))


def backgrounds(kind, pan, size=SIZE):
    """(B, 3, F, H, W) in [0, 1]: the patterns `kind` (B,), moved right by pan (B, F) pixels."""
    axis = torch.arange(size) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    soft = lambda wave, slope: (wave * slope + 0.5).clamp(0, 1)  # slope: pixels per unit of wave
    w = 2 * math.pi / 32
    patterns = (
        lambda x: torch.zeros_like(x),
        lambda x: soft(torch.sin(w * (x + y)), 5.0),
        lambda x: soft(torch.sin(w * x) * torch.sin(w * y), 5.0),
        lambda x: soft(torch.cos(2 * w * x) + torch.cos(2 * w * y) - 0.9, 2.0),
        lambda x: soft(torch.sin(1.5 * w * y + 1.2 * torch.sin(w * x)), 3.0),
    )
    mix = torch.empty(*pan.shape, size, size)  # (B, F, H, W): how light
    for i, pattern in enumerate(patterns):
        mix[kind == i] = pattern(x - pan[kind == i][..., None, None])
    mix = mix[:, None]
    table = torch.tensor(list(BACKGROUNDS.values())) / 255
    dark, light = table[kind, 0], table[kind, 1]
    shape = lambda t: t[:, :, None, None, None]
    return shape(dark) + (shape(light) - shape(dark)) * mix


def render(scenes, frames=FRAMES, also=(), times=None, path=None):
    """Scenes -> clips (B, 3, F, H, W) in [-1, 1]; things of the Scenes in `also` join them. With a
    `path` the things follow that instead of their own motion."""
    path = trajectory(scenes, frames, times) if path is None else path
    video = backgrounds(scenes.background, path.pan)
    for s, p in ((scenes, path), *((s, trajectory(s, frames, times)) for s in also)):
        mask = thing_masks(s.shape, p, s.radius)[:, None]
        colour = (torch.tensor(list(COLOURS.values())) / 255)[s.colour]
        video = video * (1 - mask) + colour[:, :, None, None, None] * mask
    return video * 2 - 1


# ------------------------------------------------------------------------------------------------
# Captions


def caption(colour=None, shape=None, motion=None, speed="", background=None):
    """'a red star moving left slowly on a blue striped background', with any part left out."""
    words = ["an" if colour == "orange" else "a", colour, shape or "thing", motion, speed]
    text = " ".join(w for w in words if w)
    return text + (f" on a {background} background" if background else "")


def motion_words(motion, generator=None):
    """How a caption says a motion's index; without a name, in one of the three ways."""
    if motion != UNNAMED:
        return MOTIONS[motion]
    which = generator is not None and torch.randint(3, (), generator=generator)
    return UNNAMED_WORDS[which]


def captions(scenes, generator=None, motion=True):
    """One caption a scene. With a generator, parts are left out at random, so that the model knows
    partial prompts: colour 8 %, background 12 %, motion 8 %; 10 % are empty, for guidance."""
    n = len(scenes)
    chance = torch.rand(n, 4, generator=generator) if generator is not None else torch.ones(n, 4)
    out = []
    for i in range(n):
        name = lambda table, index, i=i: list(table)[index[i]]
        drop = (chance[i] < torch.tensor([0.08, 0.12, 0.08, 0.1])).tolist()
        moves = motion and not drop[2]
        out.append("" if drop[3] else caption(
            None if drop[0] else name(COLOURS, scenes.colour), name(SHAPES, scenes.shape),
            motion_words(scenes.motion[i], generator) if moves else None,
            name(SPEEDS, scenes.speed) if moves else "",
            None if drop[1] else name(BACKGROUNDS, scenes.background)))
    return out


def sheet(path):
    """A contact sheet: one row a motion, every second frame; some random ones at the end."""
    from PIL import Image

    g = torch.Generator().manual_seed(0)
    rows = []
    for motion in (*MOTIONS, *(f"novel:{i}" for i in range(4)), "posture:0", "posture:1"):
        video = render(scenes_of(motion, 1, g))[0, :, ::2]
        rows.append(video.permute(2, 1, 3, 0).flatten(1, 2))  # (H, F·W, 3)
    pixels = ((torch.cat(rows) + 1) * 127.5).round().byte().numpy()
    Image.fromarray(pixels).save(path)


def motion_name(text):
    """A motion's name, or the kind and seed of a random one; argparse reports the rest."""
    kind, _, seed = text.partition(":")
    if text not in MOTIONS and not (kind in ("novel", "posture") and seed.isdecimal()):
        raise ValueError(text)
    return text


def main():
    """Write pictures of the world."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of all motions, a PNG")
    parser.add_argument("--clip", type=Path, help="write one clip, an mp4, and its caption")
    parser.add_argument("--motion", default="hopping", type=motion_name, metavar="MOTION",
                        help=f"of the clip: {', '.join(MOTIONS)}; or novel:N, posture:N, drawn "
                             "from seed N (default: hopping)")
    parser.add_argument("--seed", type=int, default=0, help="of the clip")
    args = parser.parse_args()
    if args.sheet:
        sheet(args.sheet)
    if args.clip:
        sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
        from support.media import write_video

        g = torch.Generator().manual_seed(args.seed)
        scenes = scenes_of(args.motion, 1, g)
        write_video(args.clip, render(scenes)[0], FPS)
        text = caption(shape=SHAPES[scenes.shape], motion=motion_words(scenes.motion[0]))
        args.clip.with_suffix(".txt").write_text(text + "\n")
        print(f"{args.clip}: {captions(scenes)[0]}")


if __name__ == "__main__":
    main()
