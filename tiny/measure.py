"""Measure the tiny model with the world's own instruments.

    python tiny/measure.py                        # 200 held-out prompts of base motions
    python tiny/measure.py --weights DIR --prompts 96

What things look like and how they move is read off the videos by `instruments`; the prompts that
only say "moving" show how far the model's paths differ from seed to seed; the loss alone tells
whether it reads the words of motions. Prints its figures, and writes them with a contact sheet to
out/measure-base. How much hold layers have on motion is `leverage.py`'s to measure.

Axes: N videos, F frames.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import model  # noqa: E402
import sampler  # noqa: E402
from support.files import write_json  # noqa: E402
from support.machine import default_precision, keep_memory  # noqa: E402
from support.media import contact_sheet  # noqa: E402
from tiny import instruments, world  # noqa: E402

LOOK = ("colour", "shape", "background")
OPPOSITES = (("moving left", "moving right"), ("moving up", "moving down"),
             ("growing", "shrinking"))


def make(parts, prompts, first_seed, args):
    """Videos (N, 3, F, H, W) of N prompts from noise, sixteen at a time, by DDIM."""
    shape, videos = (parts.unet.config.in_channels, world.FRAMES, 8, 8), []
    for i in range(0, len(prompts), 16):
        some = prompts[i : i + 16]
        seeds = list(range(first_seed + i, first_seed + i + len(some)))
        noise = sampler.noise_like_shape(shape, seeds)
        videos.append(sampler.sample(parts, some, noise, seeds, args.steps, args.guidance))
    return torch.cat(videos)


def share(hits):
    """Per cent, to one digit."""
    return round(100 * hits.float().mean().item(), 1)


def measure_named(parts, args):
    """Look and motion, read off samples of held-out prompts; and the videos."""
    scenes = world.sample_scenes(args.prompts, torch.Generator().manual_seed(10**6))
    videos = make(parts, world.captions(scenes), 0, args)
    reading = instruments.read(videos)
    result = {n: share(getattr(reading, n) == getattr(scenes, n)) for n in (*LOOK, "motion")}
    result["frames right"] = share(instruments.steadiness(scenes, reading))
    result["each motion"] = {
        name: share(reading.motion[scenes.motion == m] == m) for m, name in enumerate(world.BASE)}
    for a, b in (*OPPOSITES, *((b, a) for a, b in OPPOSITES)):
        rows = scenes.motion == world.MOTIONS.index(a)
        result[f"{a} read as {b}"] = share(reading.motion[rows] == world.MOTIONS.index(b))
    return result, videos


def spread(x, y):
    """Standard deviations, in pixels, of positions (N, F): over clips at a frame, and over a clip's
    frames."""
    return [round((x.var(axis).mean() + y.var(axis).mean()).sqrt().item(), 1) for axis in (0, 1)]


def measure_unnamed(parts, args):
    """What the model does with prompts that only say "moving", beside what the world does."""
    scenes = world.sample_scenes(args.moving, torch.Generator().manual_seed(10**6 + 1), unnamed=1.0)
    videos = make(parts, world.captions(scenes), 10**6, args)
    reading, path = instruments.read(videos), world.trajectory(scenes)
    result = {n: share(getattr(reading, n) == getattr(scenes, n)) for n in LOOK}
    for name, (over_clips, over_frames) in (
            ("model", spread(reading.x, reading.y)), ("world", spread(path.x, path.y))):
        result[f"{name}: spread over clips, over frames"] = [over_clips, over_frames]
    return result, videos


@torch.no_grad()
def measure_words(parts, frames=world.FRAMES, clips=24, low=0.5):
    """How much more the loss is, in per cent, where a caption says the opposite motion, at the
    noisier half of the timesteps: 0 for a network that does not read the word. This is seen long
    before samples show a motion."""
    S, result = parts.schedule, {}
    for pair in (*OPPOSITES, *((b, a) for a, b in OPPOSITES)):
        g = torch.Generator().manual_seed(10**6 + 2)
        scenes = world.scenes_of(pair[0], clips, g)
        latents = parts.encode(world.render(scenes, frames))
        T = S.num_train_timesteps
        t = torch.randint(int(low * T), T, (clips,), generator=g)
        noise = torch.randn(latents.shape, generator=g)
        x, goal = S.add_noise(latents, noise, t), S.target(latents, noise, t)
        losses = []
        for motion in pair:
            said = scenes.but(motion=torch.full_like(scenes.motion, world.MOTIONS.index(motion)))
            text = parts.read(world.captions(said))
            losses.append((parts.predict(x, t, text) - goal).square().mean())
        result[f"{pair[0]}, not {pair[1]}"] = round(100 * (losses[1] / losses[0] - 1).item(), 1)
    return result


def main():
    """Measure the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    weights = Path(__file__).parent / "weights"
    add("--weights", type=Path, default=weights, help="the model (default: tiny/weights)")
    add("--prompts", type=int, default=200, help="prompts of base motions (default: 200)")
    add("--moving", type=int, default=48, help='prompts that only say "moving" (default: 48)')
    add("--steps", type=int, default=20, help="sampling steps (default: 20)")
    add("--guidance", type=float, default=4.0, help="classifier-free guidance (default: 4)")
    add("--out", type=Path, default=Path("out/measure-base"), help="folder")
    args = parser.parse_args()
    keep_memory()
    parts = model.load(args.weights, precision=default_precision("cpu"))
    named, videos = measure_named(parts, args)
    unnamed, wandering = measure_unnamed(parts, args)
    result = {"words": measure_words(parts), "named": named, "moving": unnamed}
    print(json.dumps(result, indent=1))
    contact_sheet(args.out / "base.png", [*videos[:24], *wandering[:12]])
    write_json(args.out / "base.json", result | {"settings": vars(args)})


if __name__ == "__main__":
    main()
