"""Measure the tiny model, and the methods on it, with the world's own instruments.

    python tiny/measure.py base                 # 200 held-out prompts of base motions
    python tiny/measure.py vmc                  # six novel motions, base and tuned, two starts
    python tiny/measure.py vmc --layers all --loss mse    # the ceiling: every parameter tuned
    python tiny/measure.py methods --clips 10   # all methods, from ten clips where they take them

Prints a table, and writes it with contact sheets to out/measure-*. Flags that are not its own go to
train.py.

Axes: N videos, F frames.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import imageio.v3 as imageio
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import data  # noqa: E402
import generate  # noqa: E402
import model  # noqa: E402
import sampler  # noqa: E402
import train  # noqa: E402
from support import adapter_file, media  # noqa: E402
from tiny import instruments, world  # noqa: E402

LOOK = ("colour", "shape", "background")


def make(parts, prompts, seeds, args, inverted=None, p=1.0):
    """Videos (N, 3, F, H, W) of N prompts, sixteen at a time, from noise, or from the inverted clip
    with a share p."""
    videos = []
    shape = (parts.unet.config.in_channels, world.FRAMES, 8, 8)
    for i in range(0, len(prompts), 16):
        start = sampler.noise_like_shape(shape, seeds[i : i + 16])
        if inverted is not None:
            start = sampler.blend_noise(inverted, start, p)
        videos.append(generate.sample(parts, prompts[i : i + 16], start, seeds[i : i + 16],
                                      args.sampling_steps, args.guidance, precision=args.precision))
    return torch.cat(videos)


def invert(parts, adapter, args):
    """The noise that the clip of an adapter came from."""
    return generate.invert(parts, adapter.latents[None], args.sampling_steps, args.precision)


def share(hits):
    """Per cent, to one digit."""
    return round(100 * hits.float().mean().item(), 1)


def measure_base(args):
    """Colour, shape, background and kind of motion, read off samples of held-out prompts."""
    parts = load(args)
    scenes = world.sample_scenes(args.prompts, torch.Generator().manual_seed(10**6))
    prompts = world.captions(scenes)
    videos = make(parts, prompts, list(range(args.prompts)), args)
    reading = instruments.read(videos)
    result = {n: share(getattr(reading, n) == getattr(scenes, n)) for n in (*LOOK, "motion")}
    result["each motion"] = {}
    for m, name in enumerate(world.BASE):
        rows = scenes.motion == m
        result["each motion"][name] = share(reading.motion[rows] == m)
    opposite = {"moving left": "moving right", "growing": "shrinking", "moving up": "moving down"}
    for a, b in [*opposite.items(), *[(b, a) for a, b in opposite.items()]]:
        rows = scenes.motion == world.MOTIONS.index(a)
        result[f"{a} read as {b}"] = share(reading.motion[rows] == world.MOTIONS.index(b))
    print(json.dumps(result, indent=1))
    media.contact_sheet(args.out / "base.png", list(videos[:24]))
    with data.publish(args.out / "base.json") as path:
        path.write_text(json.dumps(result | vars_of(args), indent=1))


def other_looks(scenes, n, g):
    """n scenes whose colour, shape and background all differ from those of `scenes` (one scene); no
    two look alike."""
    candidates = world.sample_scenes(480, g, world.BASE, speeds=False)
    looks = lambda s: torch.stack([getattr(s, name) for name in LOOK], 1)
    differs = (looks(candidates) != looks(scenes)).all(1)
    alike = (looks(candidates)[:, None] == looks(candidates)[None]).all(2)
    return candidates[differs & ~alike.tril(-1).any(1)][torch.arange(n)]  # the first of each look


def learn_motion(name, method, args):
    """One novel motion, learned by one method from one clip (or --clips). Returns the folder, the
    first clip's scene, the words that now name the motion, what else it looks like in 16 scenes,
    and how many seconds it took."""
    g = torch.Generator().manual_seed(world.MOTIONS.index(name))
    clip = world.sample_scenes(1, g, (name,), speeds=False)
    looks = other_looks(clip, 16, g)
    several = "look" not in train.METHODS[method].parts or method == "motiondirector"
    count = args.clips if several and method not in ("vmc", "tune-a-video") else 1
    scenes = world.sample_scenes(count, g, (name,), speeds=False)
    for field in vars(scenes):
        getattr(scenes, field)[:1] = getattr(clip, field)
    folder = args.out / method / data.slug(name)
    words = f"doing the {word}" if (word := train.METHODS[method].word) else name
    for i, video in enumerate(world.render(scenes)):
        path = folder / "clips" / f"{i}.mp4"
        media.write_video(path, video, world.FPS)
        path.with_suffix(".txt").write_text(
            world.caption(shape=world.SHAPES[scenes.shape[i]], motion=words))
    flags = ["--method", method, "--video", folder / "clips", "--out", folder / "run",
             "--preview-every", 0, "--seed", 0, *args.train]
    started = time.time()
    train.main([str(f) for f in flags])
    return folder, clip, words, looks, time.time() - started


def score(videos, clip, looks):
    """The figures of N videos, one a look, against a clip's motion."""
    reading = instruments.read(videos)
    right = {n: getattr(reading, n) == getattr(looks, n) for n in LOOK}
    agrees = instruments.agreement(reading, world.trajectory(clip)).mean().item()
    return {"agreement": round(agrees, 3),
            "recognised": share(reading.motion == clip.motion),
            **{n: share(hits) for n, hits in right.items()},
            "all three": share(right["colour"] & right["shape"] & right["background"]),
            "leak": share(reading.background == clip.background)}


def prompts_of(looks, words):
    """The prompts of `looks` with the words of the motion, and a seed each."""
    count = range(len(looks))
    name = lambda table, field, i: list(table)[getattr(looks, field)[i]]
    prompts = [world.caption(name(world.COLOURS, "colour", i), name(world.SHAPES, "shape", i),
                             words, "", name(world.BACKGROUNDS, "background", i)) for i in count]
    return prompts, list(count)


def measure_motion(name, args):
    """VMC on one novel motion: 16 prompts in each of four cells."""
    folder, clip, words, looks, seconds = learn_motion(name, "vmc", args)
    prompts, seeds = prompts_of(looks, words)
    adapter = adapter_file.read_adapter(folder / "run" / "vmc.safetensors")
    rows, sheets = {}, []
    for tuned in (False, True):
        parts = load(args)
        if tuned:
            adapter_file.apply_adapters(parts, [adapter])
        inverted = invert(parts, adapter, args)
        for start in ("noise", "inverted"):
            videos = make(parts, prompts, seeds, args, inverted if start == "inverted" else None)
            rows[f"{'tuned' if tuned else 'base'}, {start}"] = score(videos, clip, looks)
            sheets += list(videos[:3])
    rows["tuned, inverted"]["seconds"] = round(seconds)
    reference = world.render(clip)[0]
    media.contact_sheet(folder / "sheet.png", [reference, *sheets])
    write_gif(folder / "result.gif", [reference, *videos[:4]])
    return rows


def measure_methods(args):
    """Each method on novel motions, sampled as it says: 16 prompts."""
    table = {}
    for method in args.methods or train.METHODS:
        rows = []
        for name in args.motions or world.NOVEL[:1]:
            folder, clip, words, looks, seconds = learn_motion(name, method, args)
            prompts, seeds = prompts_of(looks, words)
            parts = load(args)
            adapter = adapter_file.read_adapter(folder / "run" / f"{method}.safetensors")
            p, base = float(adapter.meta["noise_prior"]), adapter.meta["inverts"] == "base"
            before, after = ([adapter], []) if not base else ([], [adapter])
            adapter_file.apply_adapters(parts, before)
            inverted = invert(parts, adapter, args) if p else None
            adapter_file.apply_adapters(parts, after)
            videos = make(parts, prompts, seeds, args, inverted, p)
            media.contact_sheet(folder / "sheet.png", [world.render(clip)[0], *videos])
            trained = [*adapter.tensors.values(), *adapter.words.values(),
                       *(t for pair in adapter.pairs.values() for t in pair)]
            rows.append(score(videos, clip, looks) | {
                "seconds": round(seconds), "parameters": sum(t.numel() for t in trained)})
        table[method] = {k: round(sum(r[k] for r in rows) / len(rows), 3) for k in rows[0]}
        print(f"{method:20} {table[method]}", flush=True)
    with data.publish(args.out / "methods.json") as path:
        path.write_text(json.dumps(table | vars_of(args), indent=1))


def write_gif(path, videos, scale=2):
    """Videos (3, F, H, W) side by side, the first (the reference) apart from the others."""
    gap = torch.ones_like(videos[0][..., :4])
    row = torch.cat([videos[0], gap, gap, *[v for video in videos[1:] for v in (gap, video)]], -1)
    pixels = media.to_pixels(row).repeat(scale, 1).repeat(scale, 2)
    with data.publish(path) as part:
        imageio.imwrite(part, pixels, duration=1000 / world.FPS, loop=0)


def measure_vmc(args):
    """The table of all novel motions, and its mean."""
    table = {}
    for name in args.motions or world.NOVEL:
        table[name] = measure_motion(name, args)
        for cell, row in table[name].items():
            print(f"{name:26} {cell:16} {row}", flush=True)
    cells = next(iter(table.values()))
    table["mean"] = {cell: {k: round(sum(t[cell][k] for t in table.values()) / len(table), 3)
                            for k in row} for cell, row in cells.items()}
    for cell, row in table["mean"].items():
        print(f"{'mean':26} {cell:16} {row}")
    with data.publish(args.out / "vmc.json") as path:
        path.write_text(json.dumps(table | vars_of(args), indent=1))


def load(args):
    """The tiny model, fresh."""
    parts = model.load(args.weights)
    parts.unet.eval()
    return parts


def vars_of(args):
    """The settings, to be written beside the figures."""
    return {"settings": {k: str(v) for k, v in vars(args).items()}}


def main():
    """Measure the model, or VMC on it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=("base", "vmc", "methods"), help="what to measure")
    add("--prompts", type=int, default=200, help="prompts for base (default: 200)")
    add("--motions", nargs="*", choices=world.NOVEL, metavar="MOTION",
        help="novel motions (default: all six; methods: the first)")
    add("--methods", nargs="*", choices=tuple(train.METHODS), metavar="METHOD",
        help="which methods (default: all)")
    add("--clips", type=int, default=1, help="clips, for methods that take several (default: 1)")
    add("--sampling-steps", type=int, default=20, help="and inversion steps (default: 20)")
    add("--guidance", type=float, default=4.0, help="classifier-free guidance (default: 4)")
    add("--weights", type=Path, default=generate.TINY, help="the model (default: tiny/weights)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 where the hardware has it")
    add("--out", type=Path, help="folder (default: out/measure-…)")
    args, args.train = parser.parse_known_args()
    if args.what == "base" and args.train:
        parser.error(f"base trains nothing: {' '.join(args.train)} does nothing")
    generate.require(args, {"prompts": 1, "clips": 1, "sampling_steps": 1, "guidance": 0})
    args.precision = args.precision or generate.default_precision("cpu")
    args.out = args.out or Path("out") / f"measure-{args.what}"
    model.keep_memory()
    {"base": measure_base, "vmc": measure_vmc, "methods": measure_methods}[args.what](args)


if __name__ == "__main__":
    generate.run(main)
