"""Measure the tiny base model: appearance, motion, and the effect of the captions' motion words.

    python tiny/measure.py                        # 200 held-out prompts of base motions
    python tiny/measure.py --weights DIR --prompts 96

Samples are measured from their pixels. Prompts that contain only "moving" show how much the
trajectories vary over seeds. The loss alone shows whether a motion word has an effect, long before
samples show a motion. Prints the numbers, and writes them and a contact sheet to --out.

Axes: N videos, F frames.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import model  # noqa: E402
from sampler import Sampling, sample_videos  # noqa: E402
from support.files import write_json  # noqa: E402
from support.machine import default_precision, tune_malloc  # noqa: E402
from support.media import contact_sheet  # noqa: E402
from tiny import measurements, world  # noqa: E402

APPEARANCE = ("color", "shape", "background")
PAIRS = (("moving left", "moving right"), ("moving up", "moving down"), ("growing", "shrinking"))
OPPOSITES = (*PAIRS, *((b, a) for a, b in PAIRS))


def sample(pipe, prompts, first_seed, args):
    """Videos (N, 3, F, H, W) of N prompts from noise, sixteen at a time."""
    s = Sampling(sampling_steps=args.steps, guidance=args.guidance)
    jobs = list(zip(prompts, range(first_seed, first_seed + len(prompts))))
    shape = pipe.unet.config.in_channels, world.FRAMES, 8, 8
    videos = sample_videos(pipe, [], [], jobs, s, shape, batch=16)
    return torch.stack([video for _, video in videos])


def percent(hits):
    """The share of True, in per cent."""
    return round(100 * hits.float().mean().item(), 1)


def measure_named(pipe, args):
    """Appearance and motion of samples of held-out prompts; and the videos."""
    scenes = world.sample_scenes(args.prompts, torch.Generator().manual_seed(10**6))
    videos = sample(pipe, world.captions(scenes), 0, args)
    reading = measurements.read(videos)
    result = {n: percent(getattr(reading, n) == getattr(scenes, n))
              for n in (*APPEARANCE, "motion")}
    result["frames right"] = percent(measurements.appearance_stability(scenes, reading))
    result["each motion"] = {name: percent(reading.motion[scenes.motion == m] == m)
                             for m, name in enumerate(world.BASE)}
    for a, b in OPPOSITES:
        rows = scenes.motion == world.MOTIONS.index(a)
        result[f"{a} measured as {b}"] = percent(reading.motion[rows] == world.MOTIONS.index(b))
    return result, videos


def spread(x, y):
    """Standard deviations, in pixels, of positions (N, F): over clips, and over the frames of a
    clip. """
    return [round((x.var(axis).mean() + y.var(axis).mean()).sqrt().item(), 1) for axis in (0, 1)]


def measure_unnamed(pipe, args):
    """Samples of prompts that contain only "moving", compared with the world's unnamed motions."""
    g = torch.Generator().manual_seed(10**6 + 1)
    scenes = world.sample_scenes(args.moving, g, unnamed=1.0)
    videos = sample(pipe, world.captions(scenes), 10**6, args)
    reading, path = measurements.read(videos), world.trajectory(scenes)
    result = {n: percent(getattr(reading, n) == getattr(scenes, n)) for n in APPEARANCE}
    result["model: spread over clips, over frames"] = spread(reading.x, reading.y)
    result["world: spread over clips, over frames"] = spread(path.x, path.y)
    return result, videos


@torch.no_grad()
def measure_words(pipe, frames=world.FRAMES, clips=24, low=0.5):
    """The increase of the loss, in per cent, if the caption names the opposite motion, over the
    noisier half of the timesteps; 0 if the word has no effect."""
    schedule, result = pipe.schedule, {}
    for pair in OPPOSITES:
        g = torch.Generator().manual_seed(10**6 + 2)
        scenes = world.scenes_of(pair[0], clips, g)
        latents = pipe.encode(world.render(scenes, frames))
        T = schedule.num_train_timesteps
        t = torch.randint(int(low * T), T, (clips,), generator=g)
        noise = torch.randn(latents.shape, generator=g)
        x, target = schedule.add_noise(latents, noise, t), schedule.target(latents, noise, t)
        losses = []
        for motion in pair:
            scenes.motion = torch.full_like(scenes.motion, world.MOTIONS.index(motion))
            text = pipe.encode_text(world.captions(scenes))
            losses.append((pipe.predict(x, t, text) - target).square().mean())
        result[f"{pair[0]}, not {pair[1]}"] = round(100 * (losses[1] / losses[0] - 1).item(), 1)
    return result


def main():
    """Measure the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", type=Path, default=model.TINY, help="model folder (default: tiny/weights)")
    add("--prompts", type=int, default=200, help="prompts of base motions (default: 200)")
    add("--moving", type=int, default=48, help='prompts that contain only "moving" (default: 48)')
    add("--steps", type=int, default=20, help="sampling steps (default: 20)")
    add("--guidance", type=float, default=4.0, help="classifier-free guidance (default: 4)")
    add("--out", type=Path, default=Path("out/measure-base"), help="folder")
    args = parser.parse_args()
    tune_malloc()
    pipe = model.load(args.weights, precision=default_precision("cpu"))
    named, videos = measure_named(pipe, args)
    unnamed, moving = measure_unnamed(pipe, args)
    result = {"words": measure_words(pipe), "named": named, "moving": unnamed}
    print(json.dumps(result, indent=1))
    contact_sheet(args.out / "base.png", [*videos[:24], *moving[:12]])
    write_json(args.out / "base.json", result | {"settings": vars(args)})


if __name__ == "__main__":
    main()
