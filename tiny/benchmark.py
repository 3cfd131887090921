"""Benchmark: train the methods on many motions of the tiny world and measure their samples.

    python tiny/benchmark.py --write            # every method: docs/results.json, docs/results.md
    python tiny/benchmark.py --methods vmc --motions 2 --seeds 1       # print a small part

A trial is one training run: one method, one motion that the base model has never seen, one seed. It
is sampled from each start, for prompts whose appearance differs from the clip's in every respect,
and the samples are measured from their pixels. Measured trials are recorded in docs/trials.json,
and new ones in out/benchmark too; what is recorded is not run again.
Numbers are means over trials with a 95 % bootstrap interval over trials, because the videos of one
training run are not independent.

Axes: N videos, F frames.
"""
import argparse
import functools
import hashlib
import io
import json
import re
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, replace
from pathlib import Path

import imageio.v3 as imageio
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import data  # noqa: E402
import model  # noqa: E402
import sampler  # noqa: E402
import train  # noqa: E402
from support import media  # noqa: E402
from support.adapters import fingerprint, read_adapter  # noqa: E402
from support.files import read_json, slug, write_json, write_text  # noqa: E402
from support.machine import default_precision, tune_malloc  # noqa: E402
from support.recipe import METHODS  # noqa: E402
from tiny import measurements, world  # noqa: E402

APPEARANCE = ("color", "shape", "background")
PROMPTS, STEPS, GUIDANCE = 8, 20, 4.0  # of every sample
# Motions that the base model has never seen: six named ones and twelve random ones, in an order in
# which the first few are of both kinds.
MOTIONS = (
    "zigzagging", "moving in a figure eight", "moving along a square", "hopping",
    *(f"novel:{i}" for i in range(4)), "moving in a spiral", "tumbling",
    *(f"novel:{i}" for i in range(4, 12)),
)
MAX_CLIPS = 10
IN_PLACE = ("growing", "shrinking", "spinning", "standing still")  # motions of "in place" priors
NUM_IN_PLACE = 16
METRICS = {
    "agreement": "correlation with the clip's exact trajectory; 0 if the amplitude is wrong or the "
                 "object is lost",
    "recognized": "share of videos whose kind of motion is measured as the clip's",
    "appearance": "share of videos with the color, shape and background of the prompt, all three",
    "appearance_stability": "share of frames with the right color and shape",
    "leak": "share of videos with the background of the clip, which no prompt names",
    "copy": "share of color, shape and background that differ from the prompt and equal those of "
            "one of the training clips",
    "jitter": "root mean square of the second difference of the trajectory, pixels",
    "posture": "correlation of the object's size with the clip's",
    "diversity": "share of the other videos with another color or background",
    "pan": "share of videos whose background moves left",
    "backward": "agreement with the reversed trajectory minus agreement with the trajectory",
}


# --- Trials and cells ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One training run: a method, a motion (a name, "novel:7" or "posture:7"), a number of clips
    (0: one image), and settings that differ from the method's. Method "base" trains nothing."""

    method: str
    motion: str
    seed: int = 0
    clips: int = 1
    settings: tuple = ()
    prior: str = ""  # regularization clips other than the recipe's: none, generated, in place
    backward: bool = False  # the clips are reversed
    full_captions: bool = False  # captions name color and background, which not all methods use
    motion_words: str = ""  # words for the motion in captions, if the method has no token for it
    patch: tuple = data.PATCH  # smallest and largest side of an absorber's patch, shares of a frame
    absorber: "Trial" = None  # the appearance LoRA of this trial is the absorber
    save_every: int = 0  # the adapter of every N-th step is kept

    @property
    def key(self):
        """The name in docs/trials.json: the fields that differ from their defaults."""
        text = [self.method, self.motion, f"seed {self.seed}", f"{self.clips} clips"]
        for f in fields(self)[5:]:
            value = getattr(self, f.name)
            if value != f.default:
                text.append(f"{f.name} ({value.key if f.name == 'absorber' else value})")
        return ", ".join([*text[:4], *self.settings, *text[4:]])

    def folder(self, out):
        """The folder, unique for these fields and this line of train.TINY."""
        about = f"{self.key}; {train.TINY.get(self.method)}"
        number = hashlib.sha256(about.encode()).hexdigest()[:8]
        return out / f"{self.method}-{slug(self.motion)}-{self.clips}-{number}-seed{self.seed}"


@dataclass(frozen=True)
class Cell:
    """A way to sample a trial: the tuned or the base model, from noise or from the method's own
    share of the inverted clip, with the adapter of a step (0: the last) at a scale. Open prompts
    name neither color nor background. The appearance LoRA or the motion of another trial can be
    added at a strength; prompts then name that trial's appearance, and the metrics expect it."""

    tuned: bool = True
    start: str = "noise"
    step: int = 0
    scale: float = 1.0
    open_prompts: bool = False
    appearance: Trial = None
    motion: Trial = None
    strength: float = 1.0

    @property
    def name(self):
        """The name in files."""
        text = ["tuned" if self.tuned else "base",
                "own start" if self.start == "own" else "noise"]
        text += [f"step {self.step}"] * (self.step > 0)
        text += [f"scale {self.scale:g}"] * (self.scale != 1)
        text += ["open prompts"] * self.open_prompts
        for kind, other in (("appearance", self.appearance), ("motion", self.motion)):
            if other:
                text.append(f"{kind} of ({other.key}) at {self.strength:g}")
        return ", ".join(text)


FROM_NOISE = [Cell(tuned=False), Cell()]
FROM_OWN = [Cell(tuned=False, start="own"), Cell(start="own")]


# --- Training -----------------------------------------------------------------------------------


def scenes_of(trial):
    """The training scenes, the first of which is the same for every method; and PROMPTS different
    test scenes, whose color, shape and background all differ from the first's."""
    g = torch.Generator().manual_seed(sum(map(ord, trial.motion)))
    scenes = world.scenes_of(trial.motion, MAX_CLIPS, g)
    candidates = world.sample_scenes(480, g, world.BASE, speeds=False)
    appearance = lambda s: torch.stack([getattr(s, name) for name in APPEARANCE], 1)
    differs = (appearance(candidates) != appearance(scenes[:1])).all(1)
    same = (appearance(candidates)[:, None] == appearance(candidates)[None]).all(2)
    others = candidates[differs & ~same.tril(-1).any(1)]
    return scenes[torch.arange(max(1, trial.clips))], others[torch.arange(PROMPTS)]


def describe(scenes, i, words, full=True):
    """A caption with the shape alone, as VMC recommends, or with the full appearance."""
    if not full:
        return world.caption(shape=world.SHAPES[scenes.shape[i]], motion=words)
    name = lambda table, field: list(table)[getattr(scenes, field)[i]]
    return world.caption(name(world.COLORS, "color"), name(world.SHAPES, "shape"), words, "",
                         name(world.BACKGROUNDS, "background"))


def words_of(trial, tuned=True):
    """The words for the motion in captions: the method's token, the motion's name, or "moving"."""
    known = trial.motion if trial.motion in world.MOTIONS else world.UNNAMED_WORDS[0]
    if not tuned or trial.method == "base":
        return known
    token = METHODS[trial.method].parts.get("word")
    return f"doing the {token.token}" if token else trial.motion_words or known


def write_clips(folder, videos, captions):
    """Write a folder of clips with their captions."""
    for i, (video, caption) in enumerate(zip(videos, captions)):
        path = folder / f"{i:03d}.mp4"
        media.write_video(path, video, world.FPS)
        path.with_suffix(".txt").write_text(caption + "\n")
    return str(folder)


def flags_of(trial, folder, out):
    """The flags of train.py; writes the clips. Captions of methods with regularization clips name
    the full appearance, as the captions of those clips do."""
    scenes, _ = scenes_of(trial)
    full = trial.full_captions or "prior" in METHODS[trial.method].own
    captions = [describe(scenes, i, words_of(trial), full) for i in range(len(scenes))]
    videos = world.render(scenes)
    if trial.clips:
        flags = ["--video", write_clips(folder / "clips", videos, captions)]
    else:
        image = folder / "image.png"
        imageio.imwrite(image, media.to_pixels(videos[0])[0])
        flags = ["--images", str(image), "--image-prompt", describe(scenes, 0, "")]
    if trial.prior == "in place":
        g = torch.Generator().manual_seed(trial.seed)
        others = world.sample_scenes(NUM_IN_PLACE, g, IN_PLACE)
        videos = world.render(others)
        flags += ["--prior", write_clips(folder / "prior", videos, world.captions(others))]
    elif trial.prior:
        flags += ["--prior", trial.prior]
    flags += ["--reverse"] * trial.backward
    flags += ["--save-every", str(trial.save_every)] * (trial.save_every > 0)
    if trial.absorber:
        absorber = adapter_of(trial.absorber, out, "-appearance")
        flags += ["appearance.layers=none", f"appearance.load_from={absorber}"]
    return [*flags, *trial.settings]


def adapter_of(trial, out, suffix="", step=0):
    """The adapter file of a trial, or with a suffix of its appearance LoRA, at a kept step (0: the
    last)."""
    steps = Path("steps") / f"{step:06d}" if step else ""
    return trial.folder(out) / "run" / steps / f"{trial.method}{suffix}.safetensors"


def train_trial(trial, out):
    """Train a trial, unless its run is complete or it trains nothing. Output goes to log.txt."""
    folder = trial.folder(out)
    if trial.method == "base" or (folder / "seconds.json").is_file():
        return
    if trial.absorber:
        train_trial(trial.absorber, out)
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
    folder.mkdir(parents=True)
    flags, patch, started = flags_of(trial, folder, out), data.PATCH, time.time()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        data.PATCH = trial.patch
        with (folder / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
            train.main(["--method", trial.method, "--seed", str(trial.seed), "--preview-every", "0",
                        "--preview-steps", str(STEPS), "--out", str(folder / "run"), *flags])
    finally:  # train.py installs signal handlers, which would not interrupt sampling
        data.PATCH = patch
        for s, handler in handlers.items():
            signal.signal(s, handler)
    (folder / "run" / "state.safetensors").unlink()  # large, and not needed any more
    write_json(folder / "seconds.json", {"seconds": round(time.time() - started)})


# --- Sampling and measuring ---------------------------------------------------------------------


def sample(trial, out, cell):
    """Videos (N, 3, F, H, W) of the trial's prompts, and the scenes that the prompts describe."""
    pipe = model.load(precision=default_precision("cpu"))
    expected = scenes_of(trial)[1]
    if cell.appearance:
        expected = scenes_of(cell.appearance)[0][torch.zeros(PROMPTS, dtype=torch.long)]
    full = not (cell.open_prompts or cell.appearance)
    prompts = [describe(expected, i, words_of(trial, cell.tuned), full) for i in range(PROMPTS)]
    s, clip, adapters, scales = sampler.Sampling(), None, [], []
    if trial.method != "base":
        adapter = read_adapter(adapter_of(trial, out, "", cell.step), pipe)
        if cell.tuned:
            adapters, scales = [adapter], [cell.scale]
        if cell.start == "own":
            s, clip = sampler.read_sampling(adapter.path, adapter.meta), adapter.latents[None]
    for other, suffix in ((cell.appearance, "-appearance"), (cell.motion, "")):
        if other:
            adapters.append(read_adapter(adapter_of(other, out, suffix), pipe))
            scales.append(cell.strength)
    s = replace(s, sampling_steps=STEPS, inversion_steps=0, guidance=GUIDANCE)
    seeds = range(PROMPTS * trial.seed, PROMPTS * (trial.seed + 1))
    shape = pipe.unet.config.in_channels, world.FRAMES, 8, 8
    jobs = list(zip(prompts, seeds))
    with redirect_stdout(io.StringIO()):  # one line per adapter
        videos = list(sampler.sample_videos(pipe, adapters, scales, jobs, s, shape, clip,
                                            batch=PROMPTS, progress=None))
    return torch.stack([video for _, video in videos]), expected


def score(videos, trial, expected):
    """{metric: one number per video}, against the trial's motion and the expected appearance."""
    scenes, reading = scenes_of(trial)[0], measurements.read(videos)
    clip, path = scenes[:1], world.trajectory(scenes[:1])
    reverse = world.Trajectory(*(v.flip(1) for v in vars(path).values()))
    forward = measurements.agreement(reading, path)
    backward = measurements.agreement(reading, reverse)
    measured, named, trained = (torch.stack([getattr(s, name) for name in APPEARANCE], -1)
                                for s in (reading, expected, scenes))
    right = measured == named
    copied = (measured[:, None] == trained) & ~right[:, None]  # (N, clips, 3)
    visible = measured[:, [APPEARANCE.index("color"), APPEARANCE.index("background")]]
    differ = (visible[:, None] != visible).any(2)
    values = {
        "agreement": backward if trial.backward else forward,
        "recognized": reading.motion == clip.motion,
        "appearance": right.all(1),
        "appearance_stability": measurements.appearance_stability(expected, reading),
        "leak": reading.background == clip.background,
        "copy": copied.float().mean(2).amax(1),
        "jitter": jitter(reading),
        "posture": posture(reading, reverse if trial.backward else path),
        "diversity": differ.float().sum(1) / max(1, len(videos) - 1),
        "pan": pans(videos, reading),
        "backward": backward - forward,
    }
    return {name: value.float().nan_to_num(0.0).tolist() for name, value in values.items()}


def jitter(reading):
    """Root mean square of the second difference of the trajectory, pixels, (N,)."""
    bend = torch.stack([reading.x, reading.y]).diff(n=2, dim=2)
    return bend.square().sum(0).mean(1).sqrt()


def posture(reading, path):
    """Correlation (N,) over frames of the object's log size with a Trajectory's; NaN if the latter
    is constant."""
    target = (path.size * path.width.clamp(min=0.05).sqrt()).log()
    size = reading.size.clamp(min=1).log()
    a, b = size - size.mean(1, keepdim=True), target - target.mean(1, keepdim=True)
    if b.norm() < 0.1:
        return torch.full((len(size),), float("nan"))
    found = reading.found.float().mean(1) >= 7 / 8
    return found * (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-6)


def pans(videos, reading):
    """Whether the background moves left by one pixel per frame or more, (N,)."""
    axis = torch.arange(world.SIZE) + 0.5
    each = lambda t: t[..., None, None]
    distance = (axis[:, None] - each(reading.y)) ** 2 + (axis - each(reading.x)) ** 2
    background = distance > (1.2 * each(reading.size)) ** 2  # (N, F, H, W)
    pixels = ((videos.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 4, 1)
    return measurements.camera_shift(pixels, background) <= -1


# --- Results ------------------------------------------------------------------------------------

RECORDS = ROOT / "docs" / "trials.json"


@functools.cache
def base_model():
    """The fingerprint of the tiny base model."""
    return fingerprint(model.load())


class Results:
    """Measured trials, {key: {"seconds": s, "cells": {cell name: {metric: mean over the videos}}}}:
    those of docs/trials.json, if they were measured on this base model with these lines of
    train.TINY, and those in the folder `out`."""

    def __init__(self, out):
        self.out, self.trials = out, {}
        records = read_json(RECORDS) if RECORDS.is_file() else {}
        if records.get("base") == base_model():
            changed = [m for m, line in records["recipes"].items() if line != train.TINY.get(m)]
            valid = lambda name: not any(method in name for method in changed)
            for key, row in records["trials"].items():
                cells = {name: dict(zip(records["metrics"], values))
                         for name, values in row["cells"].items() if valid(name)}
                if valid(key):
                    self.trials[key] = row | {"cells": cells}
        for path in out.glob("*/results.json"):
            row = read_json(path)
            cells = self.trials.get(row["key"], {"cells": {}})["cells"] | row["cells"]
            self.trials[row["key"]] = {"seconds": row["seconds"], "cells": cells}

    def cells(self, trial):
        """{cell name: {metric: mean}} of a trial."""
        return self.trials.get(trial.key, {"cells": {}})["cells"]

    def measure(self, trial, cells):
        """Train and sample a trial as far as its cells are not measured yet."""
        for cell in cells:
            if cell.name in self.cells(trial):
                continue
            for one in filter(None, (trial, cell.appearance, cell.motion)):
                train_trial(one, self.out)
            videos, expected = sample(trial, self.out, cell)
            metrics = score(videos, trial, expected)
            self.add(trial, cell, {name: sum(v) / len(v) for name, v in metrics.items()})

    def add(self, trial, cell, metrics):
        """Record the metrics of one cell, here and in the trial's folder."""
        folder = trial.folder(self.out)
        seconds = folder / "seconds.json"
        row = self.trials.setdefault(trial.key, {"seconds": 0, "cells": {}})
        row["cells"][cell.name] = metrics
        if seconds.is_file():
            row["seconds"] = read_json(seconds)["seconds"]
        write_json(folder / "results.json", {"key": trial.key} | row)

    def write(self):
        """Write docs/trials.json, one line per trial."""
        lines = []
        for key, row in sorted(self.trials.items()):
            cells = {name: [round(m[f], 4) for f in METRICS if f in m]
                     for name, m in row["cells"].items()}
            row = json.dumps({"seconds": row["seconds"], "cells": cells}, ensure_ascii=False)
            lines.append(f"{json.dumps(key, ensure_ascii=False)}: {row}")
        head = json.dumps({"base": base_model(), "metrics": list(METRICS), "recipes": train.TINY},
                          ensure_ascii=False)
        write_text(RECORDS, head[:-1] + ', "trials": {\n' + ",\n".join(lines) + "\n}}\n")


# --- The table of the methods -------------------------------------------------------------------


def interval(values, draws=2000):
    """(mean, low, high) of one number per trial: a 95 % bootstrap interval over trials."""
    values = torch.tensor(values, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(len(values), (draws, len(values)), generator=g)
    low, high = values[rows].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return values.mean().item(), low.item(), high.item()


def summary(trials, seeds=1):
    """{cell: {metric: (mean, low, high)}} of a list of {cell: {metric: mean}}, with intervals over
    motions, each the mean of its `seeds` consecutive trials. "gain" is the tuned agreement minus
    the base's from the same start."""
    by_motion = lambda means: interval(torch.tensor(means).view(-1, seeds).mean(1).tolist())
    table = {}
    for cell in trials[0]:
        table[cell] = {m: by_motion([t[cell][m] for t in trials]) for m in trials[0][cell]}
        base = cell.replace("tuned", "base")
        if cell != base:
            gains = [t[cell]["agreement"] - t[base]["agreement"] for t in trials]
            table[cell]["gain"] = by_motion(gains)
    return table


def start_cells(trial):
    """The cells of the table: base and tuned, from noise and from the method's own start."""
    kind = "one clip" if trial.clips == 1 else "several clips"
    lines = train.BY_DATA.get((trial.method, kind), ""), train.TINY.get(trial.method, "")
    recipe = METHODS[trial.method].override(*lines, *trial.settings)
    return FROM_NOISE + FROM_OWN * bool(recipe.noise_prior)


COLUMNS = {"agreement": 2, "gain": 2, "appearance": 0, "appearance_stability": 0, "leak": 0}


def page(text, result):
    """docs/results.md with new rows in its table. All other text is written by hand."""
    rows = []
    for name, row in result["methods"].items():
        for cell, metrics in row["cells"].items():
            numbers = [show(metrics.get(metric), digits) for metric, digits in COLUMNS.items()]
            seconds = row["seconds"] if cell.startswith("tuned") else ""
            rows.append(f"| {name} | {cell} | {' | '.join(numbers)} | {seconds} |\n")
    return re.sub(r"(?<=---\|\n)(\|.*\n)+", "".join(rows), text)


def show(value, digits):
    """A mean with its interval; in per cent if there are no digits after the point."""
    if value is None:
        return ""
    mean, low, high = (v if digits else 100 * v for v in value)
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def main():
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("settings", nargs="*", help="name=value, for every method")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help="methods (default: all)")
    add("--motions", type=int, help="number of motions (default: 6 named and 12 random)")
    add("--seeds", type=int, default=2, help="number of training seeds (default: 2)")
    add("--clips", type=int, default=1, choices=range(1, MAX_CLIPS + 1), metavar="N",
        help=f"training clips, up to {MAX_CLIPS} (default: 1)")
    add("--out", type=Path, default=ROOT / "out" / "benchmark", help="folder of new trials")
    add("--write", action="store_true", help="write docs/trials.json, results.json and results.md")
    args = parser.parse_args()
    tune_malloc()
    results, methods = Results(args.out / base_model()), {}
    motions = MOTIONS[: args.motions]
    for method in args.methods:
        trials = [Trial(method, motion, seed, args.clips, tuple(args.settings))
                  for motion in motions for seed in range(args.seeds)]
        cells = start_cells(trials[0])
        for trial in tqdm(trials, desc=method):
            results.measure(trial, cells)
        seconds = sorted(results.trials[t.key]["seconds"] for t in trials)[len(trials) // 2]
        measured = [{c.name: results.cells(t)[c.name] for c in cells} for t in trials]
        methods[method] = {"cells": summary(measured, args.seeds), "seconds": seconds}
    result = {"command": " ".join(["python tiny/benchmark.py", *sys.argv[1:]]),
              "motions": len(motions), "seeds": args.seeds, "methods": methods}
    if args.write:
        results.write()
        write_json(ROOT / "docs" / "results.json", result)
        path = ROOT / "docs" / "results.md"
        write_text(path, page(path.read_text(), result))
    for method, row in methods.items():
        for cell, metrics in row["cells"].items():
            print(f"{method}, {cell}: agreement {show(metrics['agreement'], 2)}, "
                  f"appearance {show(metrics['appearance'], 0)} %")


if __name__ == "__main__":
    main()
