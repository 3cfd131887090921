"""The procedural world of the tiny model: a colored shape that moves in front of a background.

    python tiny/world.py --clip hopping.mp4 --motion hopping  # one training clip and its caption
    python tiny/world.py --clip seven.mp4 --motion novel:7    # a random motion, drawn from seed 7

A scene is an object (color, shape) that moves (motion, speed) in front of a background. The
renderer is exact, antialiased, batched and a deterministic function of the scene; a scene is a
function of its seed.

Some motions have names. There is also a continuum of unnamed motions: random trajectories, growth,
rotation and flattening, whose captions contain only "moving". As a real model does, a model of this
world therefore knows far more motions than it has words for, and customization selects one of them.

Axes: B scenes, F frames, H W frame (64×64). Positions are in pixels, x to the right, y down.
"""
import argparse
import functools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

SIZE, FRAMES, FPS = 64, 16, 8

COLORS = {  # bright, so that none is close to a background color
    "red": (225, 35, 45), "orange": (250, 140, 20), "yellow": (250, 230, 50),
    "green": (60, 215, 70), "cyan": (70, 225, 230), "blue": (50, 100, 255),
    "pink": (250, 120, 205), "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
ROUND = ("circle", "ring")  # a rotation in the plane does not show on these
BACKGROUNDS = {  # caption -> two dark colors
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
UNNAMED = len(MOTIONS)  # the motion index of a scene that follows its own keyframes
UNNAMED_WORDS = ("moving", "moving about", "in motion")
POINTS = 61  # keyframes per motion; four between two frames, so that frames fall on keyframes
SPEEDS = {"slowly": 0.55, "": 1.0, "quickly": 1.5}
NOUN = "thing"  # the caption's noun where no shape is named
WORDS = (*COLORS, *SHAPES, *BACKGROUNDS, *BASE, *SPEEDS, *UNNAMED_WORDS, "a", "an", "on", NOUN,
         "background")
ONE_SPEED = ("standing still", "growing", "shrinking")


@dataclass
class Scenes:
    """B scenes: indices into the tables above, and continuous values. All tensors are (B,), except
    the keyframes (B, 5, POINTS) that scenes with an unnamed motion follow (`random_keyframes`)."""

    color: torch.Tensor
    shape: torch.Tensor
    background: torch.Tensor
    motion: torch.Tensor
    speed: torch.Tensor  # index into SPEEDS
    x: torch.Tensor  # center of the motion, pixels
    y: torch.Tensor
    amplitude: torch.Tensor  # distance that the object moves from there, pixels
    radius: torch.Tensor  # of the object, pixels
    angle: torch.Tensor  # orientation at the start, radians
    keyframes: torch.Tensor = None

    def __len__(self):
        return len(self.x)

    def __getitem__(self, rows):
        return Scenes(*(v if v is None else v[rows] for v in vars(self).values()))


def sample_scenes(n, generator, motions=BASE, speeds=True, unnamed=0.0, brisk=False):
    """n random scenes. The motion is one of `motions`, or, with probability `unnamed`, a random one
    without a name, with sharper turns if `brisk`. The same generator state gives the same scenes.
    """
    pick = lambda m: torch.randint(m, (n,), generator=generator)
    between = lambda a, b: a + (b - a) * torch.rand(n, generator=generator)
    indices = torch.tensor([MOTIONS.index(m) for m in motions])
    motion = indices[pick(len(motions))]
    shape, background = pick(len(SHAPES)), pick(len(BACKGROUNDS))
    # A circle does not show rotation, and a plain background does not show a camera pan.
    turning = is_motion(motion, "spinning")
    shape = torch.where(turning & is_shape(shape, *ROUND), 1 + pick(3), shape)
    panning = is_motion(motion, "standing still while the camera pans")
    background = torch.where(panning & (background == 0), 1 + pick(4), background)
    chance = torch.rand(n, generator=generator)
    speed = torch.where(chance < 0.15, 0, torch.where(chance < 0.85, 1, 2))
    if not speeds:
        speed = torch.ones_like(speed)
    speed = torch.where(is_motion(motion, *ONE_SPEED), 1, speed)
    in_place = is_motion(motion, "standing still", "growing", "shrinking", "spinning",
                         "standing still while the camera pans")
    spread = torch.where(in_place, 13.0, 4.0)  # an object that stays in place can stay anywhere
    scenes = Scenes(
        pick(len(COLORS)), shape, background, motion, speed,
        SIZE / 2 + spread * between(-1, 1), SIZE / 2 + spread * between(-1, 1),
        between(14, 16), between(10, 12), between(-0.2, 0.2),
    )
    if unnamed:
        rows = torch.rand(n, generator=generator) < unnamed
        keyframes = torch.stack([random_keyframes(generator, brisk) for _ in range(n)])
        scenes = with_keyframes(scenes, keyframes, rows)
    return scenes


def with_keyframes(scenes, keyframes, rows=True):
    """The same scenes; those selected by `rows` (B,) follow their `keyframes` (B, 5, POINTS)."""
    rows = torch.as_tensor(rows).expand(len(scenes))
    middle = SIZE / 2 + (torch.stack([scenes.x, scenes.y]) - SIZE / 2).clamp(-4, 4)
    x, y = torch.where(rows, middle, torch.stack([scenes.x, scenes.y]))
    return replace(scenes, motion=torch.where(rows, UNNAMED, scenes.motion), x=x, y=y,
                   speed=torch.where(rows, 1, scenes.speed), keyframes=keyframes)


def is_motion(motion, *names):
    """Mask of the indices (B,) that stand for one of the named motions."""
    return torch.isin(motion, torch.tensor([MOTIONS.index(n) for n in names]))


def is_shape(shape, *names):
    """Mask of the indices (B,) that stand for one of the named shapes."""
    return torch.isin(shape, torch.tensor([SHAPES.index(n) for n in names]))


# --- Motions without a name ---------------------------------------------------------------------


def interpolate_corners(corners, smooth):
    """A path (2, POINTS) through corners (2, K) at even times, by straight lines or Catmull-Rom."""
    if not smooth:
        return F.interpolate(corners[None], POINTS, mode="linear", align_corners=True)[0]
    last = corners.shape[1] - 1
    s = torch.linspace(0, last, POINTS)
    i = s.long().clamp(max=last - 1)
    s = s - i
    a, b, c, d = (corners[:, (i + k).clamp(0, last)] for k in (-1, 0, 1, 2))
    return b + 0.5 * s * (c - a + s * (2 * a - 5 * b + 4 * c - d + s * (3 * (b - c) + d - a)))


def random_path(g, brisk=False):
    """A random path (2, POINTS) in units of the amplitude: 3 to 7 corners at even times, joined by
    straight lines or smoothly, or a sum of two slow waves per axis. Brisk paths have straight lines
    more often, up to 8 corners, and faster waves."""
    kind = torch.rand((), generator=g)
    straight, cornered, corners, fast = (0.5, 0.75, 8, 2.0) if brisk else (0.35, 0.65, 7, 1.5)
    if kind < cornered:
        count = int(torch.randint(3, corners + 1, (), generator=g))
        corners = 2.5 * torch.rand(2, count, generator=g) - 1.25
        return interpolate_corners(corners, smooth=kind > straight).clamp(-1.4, 1.4)
    cycles, phase, weight = torch.rand(3, 2, 2, 1, generator=g)  # two axes, two waves each
    waves = torch.sin(2 * math.pi * ((0.5 + fast * cycles) * torch.linspace(0, 1, POINTS) + phase))
    path = (weight * waves).sum(1)
    amplitude = 0.7 + 0.55 * torch.rand(2, 1, generator=g)
    return amplitude * path / path.abs().amax(1, keepdim=True)


def random_keyframes(g, brisk=False):
    """A random unnamed motion (5, POINTS): x and y in units of the amplitude, size, angle in
    radians and width. One in six stays in place; most of the others only change position."""
    path, rotation, scaling = (random_path(g, brisk) for _ in range(3))
    stays, *chance = (torch.rand(4, generator=g) < torch.tensor([1 / 6, 0.2, 0.2, 0.15])).tolist()
    if stays and not any(chance):
        chance[int(torch.randint(3, (), generator=g))] = True
    grows, rotates, flattens = chance
    one = torch.ones(POINTS)
    return torch.stack([
        *(path * (not stays)),
        1 + 0.3 * scaling[1] if grows else one,
        rotation[0] - rotation[0, 0] if rotates else 0 * one,
        (0.65 + 0.35 * scaling[0] / 1.25).clamp(0.25, 1) if flattens else one,
    ])


def explained_variance(path, motions=BASE):
    """The largest share of the variance of a path (2, F) that the path of a named motion explains,
    at any speed and best scale."""
    index = torch.tensor([[MOTIONS.index(m), s] for m in motions for s in range(len(SPEEDS))])
    zero, one = torch.zeros(len(index)), torch.ones(len(index))
    none = torch.zeros(len(index), dtype=torch.long)
    named = trajectory(Scenes(none, none, none, *index.unbind(1), zero, zero, one, one, zero),
                       path.shape[1])
    named = torch.stack([named.x, named.y], 1).flatten(1)  # (K, 2·F)
    center = lambda p: (p.unflatten(-1, (2, -1)) - p.unflatten(-1, (2, -1)).mean(-1, True))
    a, b = center(path.flatten()).flatten(), center(named).flatten(1)
    return ((b @ a).clamp(min=0) ** 2 / ((b**2).sum(1) * (a**2).sum()).clamp(min=1e-9)).max().item()


def novel_keyframes(seed, posture=False):
    """The novel motion with this number: a random path, large on both axes, of which no base motion
    explains more than half. With `posture` the object also rotates and flattens, each at a fixed
    place on the path."""
    g = torch.Generator().manual_seed(10**7 + seed)
    path = random_path(g)
    while explained_variance(path) > 0.5 or (path.amax(1) - path.amin(1)).amin() < 1.2:
        path = random_path(g)
    rotation, flattening = random_path(g)
    one = torch.ones(POINTS)
    if not posture:
        return torch.stack([*path, one, 0 * one, one])
    return torch.stack([*path, one, 1.2 * rotation, (0.65 + 0.35 * flattening).clamp(0.25, 1)])


def scenes_of(motion, n, generator, speeds=False):
    """n scenes with one motion: a name, "novel:7" or "posture:7"."""
    kind, _, seed = motion.partition(":")
    if kind not in ("novel", "posture"):
        return sample_scenes(n, generator, (motion,), speeds)
    scenes = sample_scenes(n, generator, ("moving left",), speeds=False)
    keyframes = novel_keyframes(int(seed), posture=kind == "posture")
    return with_keyframes(scenes, keyframes.expand(n, -1, -1))


def interpolate_keyframes(keyframes, u):
    """Keyframes (B, 5, POINTS) at times u (1 or B, F) in [0, 1]: (5, B, F)."""
    B, at = len(keyframes), (u * (POINTS - 1)).expand(len(keyframes), -1)
    i = at.long().clamp(max=POINTS - 2)
    value = lambda k: keyframes.gather(2, (i + k)[:, None].expand(B, 5, -1))
    return torch.lerp(value(0), value(1), (at - i)[:, None].expand(B, 5, -1)).transpose(0, 1)


# --- Trajectories -------------------------------------------------------------------------------


@dataclass
class Trajectory:
    """The exact motion of each scene's object and camera. All (B, F)."""

    x: torch.Tensor
    y: torch.Tensor
    size: torch.Tensor  # factor on the radius
    angle: torch.Tensor  # radians
    width: torch.Tensor  # factor on the width alone: a coin seen from the side
    pan: torch.Tensor  # displacement of the background, pixels


def trajectory(scenes, frames=FRAMES, times=None):
    """The exact Trajectory of each scene's object. `table` has one line per motion.

    A clip covers time 0 to 1 in `frames` equal steps, unless `times` (B, F) are given.
    """
    s = scenes
    u = torch.linspace(0, 1, frames)[None] if times is None else times
    pace = torch.tensor(list(SPEEDS.values()))[s.speed][:, None]
    one, zero = torch.ones_like(pace * u), torch.zeros_like(pace * u)
    line = (2 * u - 1) * pace.clamp(max=1.2)  # -1 … 1 at normal speed; "quickly" stays in the frame
    turn = 2 * math.pi * u
    sin, cos = torch.sin, torch.cos
    wave = lambda cycles: sin(turn * cycles)
    tri = lambda cycles: 2 / math.pi * torch.asin(wave(cycles).clamp(-1, 1))
    lap = 4 * u * pace.clamp(max=1.2) % 4  # corners of a square passed so far
    edge = lambda q: (2 - (q % 4 - 2).abs()).clamp(0.5, 1.5) * 2 - 2  # -1, up, 1, down, one lap
    table = {  # motion: x, y (in units of the amplitude), size, angle, width, pan (in pixels)
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
    unnamed = (zero, zero, one, zero, one)
    if s.keyframes is not None:
        unnamed = interpolate_keyframes(s.keyframes, u)
    rows = [*(table[m] for m in MOTIONS), (*unnamed, zero)]
    everything = torch.stack([torch.stack([c + zero for c in row]) for row in rows])
    x, y, size, angle, width, pan = everything[s.motion, :, torch.arange(len(s))].unbind(1)
    amplitude = s.amplitude[:, None]
    return Trajectory(s.x[:, None] + amplitude * x, s.y[:, None] + amplitude * y, size,
                      s.angle[:, None] + angle, width, pan)


# --- Rendering ----------------------------------------------------------------------------------


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
    rise = edge[:, 1].where(edge[:, 1] != 0, torch.tensor(1.0))  # a level edge is never crossed
    left = to[..., 0] < edge[:, 0] * to[..., 1] / rise
    inside = (crosses & left).sum(1) % 2 == 1
    return torch.where(inside, -distance, distance)


EXTENT, TEXTURE = 1.6, 160  # the distance maps cover [-1.6, 1.6]² in TEXTURE² samples


@functools.cache
def distance_maps():
    """(6, 1, TEXTURE, TEXTURE): the signed distance of each shape, in radii. All areas are similar.
    """
    axis = (torch.arange(TEXTURE) + 0.5) / TEXTURE * 2 * EXTENT - EXTENT
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    p, r = torch.stack([x.flatten(), y.flatten()], 1), x.hypot(y).flatten()
    w, k = 0.38, 1.12  # half the width and half the length of the bars of the cross
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


def object_masks(shape, path, radius, size=SIZE):
    """Coverage (B, F, H, W) in [0, 1] of objects of `shape` (B,) and `radius` (B,) on a Trajectory.
    """
    B, frames = path.x.shape
    axis = torch.arange(size) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    each = lambda t: t[..., None, None]
    r = each(radius[:, None] * path.size)
    dx, dy = x - each(path.x), y - each(path.y)
    c, s = each(path.angle.cos()), each(path.angle.sin())
    # From the frame to the object's axes: rotate back, then divide by width and radius.
    own_x, own_y = (c * dx + s * dy) / r / each(path.width), (c * dy - s * dx) / r
    grid = (torch.stack([own_x, own_y], -1) / EXTENT).flatten(0, 1)
    maps = distance_maps()[shape].repeat_interleave(frames, 0)
    distance = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    distance = distance.reshape(B, frames, size, size)
    outside = (own_x.abs().maximum(own_y.abs()) > EXTENT)
    return torch.where(outside, 0.0, (0.5 - distance * r * each(path.width)).clamp(0, 1))


def backgrounds(kind, pan, size=SIZE):
    """(B, 3, F, H, W) in [0, 1]: the patterns `kind` (B,), shifted right by pan (B, F) pixels."""
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
    mix = torch.empty(*pan.shape, size, size)  # (B, F, H, W): 0 for dark, 1 for light
    for i, pattern in enumerate(patterns):
        mix[kind == i] = pattern(x - pan[kind == i][..., None, None])
    mix = mix[:, None]
    table = torch.tensor(list(BACKGROUNDS.values())) / 255
    dark, light = table[kind, 0], table[kind, 1]
    shape = lambda t: t[:, :, None, None, None]
    return shape(dark) + (shape(light) - shape(dark)) * mix


def render(scenes, frames=FRAMES, times=None):
    """Scenes -> clips (B, 3, F, H, W) in [-1, 1]."""
    path = trajectory(scenes, frames, times)
    video = backgrounds(scenes.background, path.pan)
    mask = object_masks(scenes.shape, path, scenes.radius)[:, None]
    color = (torch.tensor(list(COLORS.values())) / 255)[scenes.color]
    video = video * (1 - mask) + color[:, :, None, None, None] * mask
    return video * 2 - 1


# --- Captions -----------------------------------------------------------------------------------


def caption(color=None, shape=None, motion=None, speed="", background=None):
    """'a red star moving left slowly on a blue striped background', with any part left out."""
    words = ["an" if color == "orange" else "a", color, shape or NOUN, motion, speed]
    text = " ".join(w for w in words if w)
    return text + (f" on a {background} background" if background else "")


def motion_words(motion, generator=None):
    """The words for a motion index; an unnamed motion has three variants."""
    if motion != UNNAMED:
        return MOTIONS[motion]
    which = generator is not None and torch.randint(3, (), generator=generator)
    return UNNAMED_WORDS[which]


def captions(scenes, generator=None, motion=True):
    """One caption per scene. With a generator, parts are dropped at random, so that the model is
    trained on partial prompts: color 8 %, background 12 %, motion 8 %; 10 % of the captions are
    empty, for classifier-free guidance."""
    n = len(scenes)
    chance = torch.rand(n, 4, generator=generator) if generator is not None else torch.ones(n, 4)
    out = []
    for i in range(n):
        name = lambda table, index, i=i: list(table)[index[i]]
        drop = (chance[i] < torch.tensor([0.08, 0.12, 0.08, 0.1])).tolist()
        moves = motion and not drop[2]
        out.append("" if drop[3] else caption(
            None if drop[0] else name(COLORS, scenes.color), name(SHAPES, scenes.shape),
            motion_words(scenes.motion[i], generator) if moves else None,
            name(SPEEDS, scenes.speed) if moves else "",
            None if drop[1] else name(BACKGROUNDS, scenes.background)))
    return out


# --- Command ------------------------------------------------------------------------------------


def write_clip(path, motion, seed):
    """One clip as an mp4, and its caption in a .txt with the same name."""
    from support.media import write_video  # imported only where needed

    scenes = scenes_of(motion, 1, torch.Generator().manual_seed(seed))
    write_video(path, render(scenes)[0], FPS)
    text = caption(shape=SHAPES[scenes.shape], motion=motion_words(scenes.motion[0]))
    path.with_suffix(".txt").write_text(text + "\n")
    print(f"{path}: {captions(scenes)[0]}")


def motion_name(text):
    """A motion's name, "novel:N" or "posture:N", for argparse."""
    kind, _, seed = text.partition(":")
    if text not in MOTIONS and not (kind in ("novel", "posture") and seed.isdecimal()):
        raise ValueError(text)
    return text


def main():
    """Write a clip and its caption."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, required=True, help="the clip, an mp4")
    parser.add_argument("--motion", default="hopping", type=motion_name, metavar="MOTION",
                        help=f"motion of the clip: {', '.join(MOTIONS)}; or novel:N, posture:N, "
                             "drawn from seed N (default: hopping)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the clip (default: 0)")
    args = parser.parse_args()
    write_clip(args.clip, args.motion, args.seed)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
    from support import machine

    machine.run(main)
