"""The laboratory: what the methods learn on the tiny world, over many motions, with intervals.

    python tiny/lab.py                    # every method: docs/results.json, docs/results.md
    python tiny/lab.py --methods vmc --motions 2 --seeds 1       # a look at a part of it
    python tiny/lab.py --quick            # minutes; proves nothing

One motion that the base never saw, one seed of training: a trial. It is trained once, sampled from
each start for prompts whose looks all differ from the clip's, and read by the world's instruments;
what is done is kept under out/lab and skipped the next time. Figures are means over trials with a
95 % interval by bootstrap over them, since the videos of one training run are not independent.

Axes: N videos, F frames.
"""
import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import data  # noqa: E402
import lora  # noqa: E402
import model  # noqa: E402
import sampler  # noqa: E402
import train  # noqa: E402
from support.files import read_json, slug, write_json  # noqa: E402
from support.machine import default_precision, keep_memory  # noqa: E402
from support.recipe import METHODS  # noqa: E402
from tiny import instruments, world  # noqa: E402

LOOK = ("colour", "shape", "background")
PROMPTS, STEPS, GUIDANCE = 8, 20, 4.0  # of every sample
RANDOM = 12  # motions drawn at random, beside the six that have names
SEVERAL = 10  # clips, for methods that take several


@dataclass(frozen=True)
class Trial:
    """One training run: of a method, on a motion (a name, or "novel:7"), from so many clips, with
    settings beside the method's own."""

    method: str
    motion: str
    seed: int = 0
    clips: int = 1
    settings: tuple = ()

    def folder(self, out):
        """Where it is kept: a name that no other trial has."""
        more = slug(" ".join(self.settings)) if self.settings else ""
        name = "-".join(filter(None, (self.method, slug(self.motion), f"{self.clips}", more)))
        return out / f"{name}-seed{self.seed}"


# ------------------------------------------------------------------------------------------------
# A trial


def scenes_of(trial):
    """The scenes to learn from, the first of them the same for every method; and PROMPTS others,
    whose colour, shape and background all differ from the first's, no two of them alike."""
    g = torch.Generator().manual_seed(sum(map(ord, trial.motion)))
    scenes = world.scenes_of(trial.motion, SEVERAL, g)
    candidates = world.sample_scenes(480, g, world.BASE, speeds=False)
    looks = lambda s: torch.stack([getattr(s, name) for name in LOOK], 1)
    differs = (looks(candidates) != looks(scenes[:1])).all(1)
    alike = (looks(candidates)[:, None] == looks(candidates)[None]).all(2)
    others = candidates[differs & ~alike.tril(-1).any(1)]
    return scenes[torch.arange(trial.clips)], others[torch.arange(PROMPTS)]


def describe(scenes, i, words, looks=True):
    """A caption: of the thing's shape alone, as the papers advise, or with its looks too."""
    if not looks:
        return world.caption(shape=world.SHAPES[scenes.shape[i]], motion=words)
    name = lambda table, field: list(table)[getattr(scenes, field)[i]]
    return world.caption(name(world.COLOURS, "colour"), name(world.SHAPES, "shape"), words, "",
                         name(world.BACKGROUNDS, "background"))


def words_of(trial):
    """What names the motion in captions: a learned word, its own name, or plain "moving"."""
    word = METHODS[trial.method].parts.get("word")
    if word:
        return f"doing the {word.text}"
    return trial.motion if trial.motion in world.MOTIONS else world.UNNAMED_WORDS[0]


def learn(trial, folder):
    """Train it, unless that is done. Methods with prior clips are told the looks, as those are."""
    if (folder / "seconds.json").is_file():
        return
    scenes, _ = scenes_of(trial)
    looks = METHODS[trial.method].prior is not None
    for i, video in enumerate(world.render(scenes)):
        path = folder / "clips" / f"{i}.mp4"
        data.write_video(path, video, world.FPS)
        path.with_suffix(".txt").write_text(describe(scenes, i, words_of(trial), looks) + "\n")
    started = time.time()
    train.main(["--method", trial.method, "--video", str(folder / "clips"), "--preview-every", "0",
                "--seed", str(trial.seed), "--out", str(folder / "run"), "--overwrite",
                *trial.settings])
    write_json(folder / "seconds.json", {"seconds": round(time.time() - started)})


def starts_of(meta):
    """{name: (whether the adapter acts, share of the inverted clip)}: the cells of a trial."""
    own = float(meta["noise_prior"])
    cells = {"base, noise": (False, 0.0), "tuned, noise": (True, 0.0)}
    if own:
        cells |= {"base, own start": (False, own), "tuned, own start": (True, own)}
    return cells


@torch.no_grad()
def sample(trial, folder, tuned, share):
    """Videos (N, 3, F, H, W) of the trial's prompts, and what the instruments read of them."""
    whole = model.load(precision=default_precision("cpu"))
    adapter = lora.read_adapter(folder / "run" / f"{trial.method}.safetensors")
    scenes, looks = scenes_of(trial)
    words = words_of(trial) if tuned or trial.motion in world.MOTIONS else world.UNNAMED_WORDS[0]
    if not tuned and trial.motion in world.MOTIONS:
        words = trial.motion
    prompts = [describe(looks, i, words) for i in range(PROMPTS)]
    by_base = adapter.meta["inverts"] == "base" or not tuned
    if tuned and not by_base:
        lora.apply_adapters(whole, [adapter])
    start = sampler.noise_like_shape((whole.unet.config.in_channels, world.FRAMES, 8, 8),
                                     range(PROMPTS))
    if share:
        inverted = sampler.invert(whole, adapter.latents[None], STEPS)
        start = sampler.blend_noise(inverted, start, share)
    if tuned and by_base:
        lora.apply_adapters(whole, [adapter])
    method = adapter.meta["sampler"] if share else "ddim"
    videos = sampler.sample(whole, prompts, start, list(range(PROMPTS)), STEPS, GUIDANCE, method)
    return videos, score(videos, scenes[:1], looks)


def score(videos, clip, looks):
    """{figure: a list, one number a video} against a clip's motion and the looks asked for."""
    reading = instruments.read(videos)
    right = {name: getattr(reading, name) == getattr(looks, name) for name in LOOK}
    agrees = instruments.agreement(reading, world.trajectory(clip))
    figures = {"agreement": agrees, **right,
               "all three": right["colour"] & right["shape"] & right["background"],
               "steady": instruments.steadiness(looks, reading),
               "leak": reading.background == clip.background}
    return {name: values.float().nan_to_num(0.0).tolist() for name, values in figures.items()}


def measure(trial, out):
    """{cell: {figure: list}} of a trial, trained and sampled where that is not done yet."""
    folder = trial.folder(out)
    if (folder / "figures.json").is_file():
        return read_json(folder / "figures.json")
    learn(trial, folder)
    adapter = lora.read_adapter(folder / "run" / f"{trial.method}.safetensors")
    cells, rows = {}, []
    for name, (tuned, share) in starts_of(adapter.meta).items():
        videos, cells[name] = sample(trial, folder, tuned, share)
        rows += list(videos[:4])
    data.contact_sheet(folder / "sheet.png", [world.render(scenes_of(trial)[0])[0], *rows])
    cells["trial"] = asdict(trial) | read_json(folder / "seconds.json")
    write_json(folder / "figures.json", cells)
    return cells


# ------------------------------------------------------------------------------------------------
# Many trials


def interval(values, draws=2000):
    """(mean, low, high) of numbers, one a trial: a 95 % interval by bootstrap over trials."""
    values = torch.tensor(values, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(len(values), (draws, len(values)), generator=g)
    low, high = values[rows].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return values.mean().item(), low.item(), high.item()


def summary(trials):
    """{cell: {figure: (mean, low, high)}} over measured trials of one method; and of the gain of
    the tuned model over the base from the same start, trial by trial."""
    table = {}
    for cell in [c for c in trials[0] if c != "trial"]:
        table[cell] = {}
        for figure in trials[0][cell]:
            means = [sum(t[cell][figure]) / len(t[cell][figure]) for t in trials]
            table[cell][figure] = interval(means)
            base = cell.replace("tuned", "base")
            if cell != base and figure == "agreement":
                other = [sum(t[base][figure]) / len(t[base][figure]) for t in trials]
                table[cell]["gain"] = interval([a - b for a, b in zip(means, other)])
    return table


def rows_of(args):
    """[(name of the row, its trials)] that the flags ask for."""
    motions = [*world.NOVEL, *(f"novel:{i}" for i in range(RANDOM))]
    if args.motions:
        motions = motions[:: max(1, len(motions) // args.motions)][: args.motions]
    rows = []
    for method in args.methods or METHODS:
        counts = (1, SEVERAL) if method in ("newmove", "motiondirector") else (1,)
        for clips in counts if args.several else (1,):
            trials = [Trial(method, motion, seed, clips, tuple(args.settings))
                      for motion in motions for seed in range(args.seeds)]
            rows.append((method + (f", {clips} clips" if clips > 1 else ""), trials))
    return rows


def commit():
    """The commit that the figures are of, or None."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                          text=True)
    return done.stdout.strip() or None


def page(result):
    """docs/results.md from docs/results.json."""
    settings = result["settings"]
    lines = ["# What the methods learn on the tiny world", "",
             f"Written by `{result['command']}` at commit {result['commit']}; "
             f"{settings['motions']} motions that the base never saw × {settings['seeds']} seeds "
             f"of training × {PROMPTS} prompts whose looks all differ from the clip's; {STEPS} steps, "
             f"guidance {GUIDANCE:g}. *Agreement* is the correlation with the clip's exact path, 0 "
             "where the amplitude is wrong or the thing is lost; *gain* what the tuned model has "
             "over the base from the same start, trial by trial; *looks* the share of videos whose "
             "colour, shape and background are all as asked; *steady* the share of frames with the "
             "right colour and shape; *leak* the share with the clip's background. In brackets a "
             "95 % interval over trials.", "",
             "| method | start | agreement | gain | looks % | steady % | leak % | seconds |",
             "|---|---|---|---|---|---|---|---|"]
    show = lambda v, by=1, digits=2: (
        f"{by * v[0]:.{digits}f} [{by * v[1]:.{digits}f}, {by * v[2]:.{digits}f}]" if v else "")
    for name, row in result["methods"].items():
        for cell, figures in row["cells"].items():
            per_cent = [show(figures[f], 100, 0) for f in ("all three", "steady", "leak")]
            lines.append(f"| {name} | {cell} | {show(figures['agreement'])} | "
                         f"{show(figures.get('gain'))} | {' | '.join(per_cent)} | "
                         f"{row['seconds'] if cell.startswith('tuned') else ''} |")
    return "\n".join([*lines, ""])


def main():
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("settings", nargs="*", help="name=value, beside every method's own")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="which (default: all)")
    add("--motions", type=int, help="how many (default: 6 with names and 12 without)")
    add("--seeds", type=int, default=2, help="of training (default: 2)")
    add("--several", action="store_true", help="ten clips too, for methods that take several")
    add("--quick", action="store_true", help="two motions, one seed: a look, not a result")
    add("--out", type=Path, default=ROOT / "out" / "lab", help="where trials are kept")
    add("--write", type=Path, help="folder of results.json and results.md (default: --out; docs "
        "for what is to be shown)")
    args = parser.parse_args()
    if args.quick:
        args.motions, args.seeds = 2, 1
    keep_memory()
    rows, methods = rows_of(args), {}
    bar = tqdm(total=sum(len(trials) for _, trials in rows), desc="trials")
    for name, trials in rows:
        measured = []
        for trial in trials:
            measured.append(measure(trial, args.out))
            bar.update()
        seconds = sorted(m["trial"]["seconds"] for m in measured)[len(measured) // 2]
        methods[name] = {"cells": summary(measured), "seconds": seconds}
    count = len(rows[0][1]) // args.seeds
    result = {"command": " ".join(["python tiny/lab.py", *sys.argv[1:]]), "commit": commit(),
              "settings": {"motions": count, "seeds": args.seeds, "prompts": PROMPTS,
                           "more": args.settings}, "methods": methods}
    folder = args.write or args.out
    write_json(folder / "results.json", result)
    (folder / "results.md").write_text(page(result))
    print(json.dumps({n: {c: f["agreement"] for c, f in m["cells"].items()}
                      for n, m in methods.items()}, indent=1))
    print(folder / "results.md")


if __name__ == "__main__":
    main()
