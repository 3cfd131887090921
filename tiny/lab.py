"""The laboratory: what the methods learn on the tiny world, over many motions, with intervals.

    python tiny/lab.py --write docs       # every method: docs/results.json, docs/results.md
    python tiny/lab.py --methods vmc --motions 2 --seeds 1       # a look at a part of it
    python tiny/lab.py --quick            # minutes; proves nothing

One motion that the base never saw, one seed of training: a trial. It is trained once, sampled from
each start for prompts whose looks all differ from the clip's, and read by the world's instruments;
what is done is kept under out/lab, a folder for each base model, its figures in docs/trials.json
too, and skipped the next time.
Figures are means over trials with a 95 % interval by bootstrap over them, since the videos of one
training run are not independent.

Axes: N videos, F frames.
"""
import argparse
import hashlib
import json
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
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
from support import adapter_file, media  # noqa: E402
from support.files import publish, read_json, slug, write_json  # noqa: E402
from support.machine import default_precision, keep_memory  # noqa: E402
from support.recipe import METHODS  # noqa: E402
from tiny import instruments, world  # noqa: E402
from tiny.charts import Panel, Series, chart  # noqa: E402

LOOK = ("colour", "shape", "background")
PROMPTS, STEPS, GUIDANCE = 8, 20, 4.0  # of every sample
# Motions that the base never saw: six with names and twelve drawn at random, in an order in which
# the first few are of both kinds.
MOTIONS = (
    "zigzagging", "moving in a figure eight", "moving along a square", "hopping",
    *(f"novel:{i}" for i in range(4)), "moving in a spiral", "tumbling",
    *(f"novel:{i}" for i in range(4, 12)),
)
SEVERAL = 10  # clips, for methods that take several
RESTING = ("growing", "shrinking", "spinning", "standing still")  # prior clips of other scenes
RESTING_CLIPS = 16


@dataclass(frozen=True)
class Trial:
    """One training run: of a method, on a motion (a name, "novel:7" or "posture:7"), from so many
    clips (0: from one picture), with settings beside the method's own. "base" learns nothing."""

    method: str
    motion: str
    seed: int = 0
    clips: int = 1
    settings: tuple = ()
    prior: str = ""  # another kind of prior clips than the recipe's: none, generated, or resting
    backward: bool = False  # the clips run backward
    looks: bool = False  # captions tell colour and background, for methods whose captions do not
    words: str = ""  # how captions name the motion, where the method has no word for it
    patch: tuple = data.PATCH  # least and most of a frame's sides that an absorber sees
    borrows: "Trial" = None  # whose look is the absorber
    keep: int = 0  # adapters are kept every so many steps

    def folder(self, out):
        """Where it is kept: a name that no other trial has, nor the same one with another line of
        train.TINY. Of a method that changed in another way, remove what is kept."""
        about = repr((self, train.TINY.get(self.method)))
        number = hashlib.sha256(about.encode()).hexdigest()[:8]
        name = f"{self.method}-{slug(self.motion)}-{self.clips}"
        return out / f"{name}-{number}-seed{self.seed}"


@dataclass(frozen=True)
class Cell:
    """How a trial is sampled: by the tuned model or the base, from noise or from the method's own
    share of the inverted clip, with the adapter of a step (0: the last) at a scale. `open` prompts
    name neither colour nor background. The look of another trial may join, and is what is then
    asked for and read; or its motion; at a strength."""

    tuned: bool = True
    start: str = "noise"
    step: int = 0
    scale: float = 1.0
    open: bool = False
    look: Trial = None
    motion: Trial = None
    strength: float = 1.0

    @property
    def name(self):
        """What it is called in files."""
        parts = ["tuned" if self.tuned else "base",
                 "own start" if self.start == "own" else "noise"]
        parts += [f"step {self.step}"] * (self.step > 0)
        parts += [f"scale {self.scale:g}"] * (self.scale != 1)
        parts += ["open prompts"] * self.open
        for kind, other in (("look", self.look), ("motion", self.motion)):
            if other:
                parts.append(f"{kind} of {other.folder(Path()).name} at {self.strength:g}")
        return ", ".join(parts)


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
    return scenes[torch.arange(max(1, trial.clips))], others[torch.arange(PROMPTS)]


def describe(scenes, i, words, looks=True):
    """A caption: of the thing's shape alone, as VMC advises, or with its looks too."""
    if not looks:
        return world.caption(shape=world.SHAPES[scenes.shape[i]], motion=words)
    name = lambda table, field: list(table)[getattr(scenes, field)[i]]
    return world.caption(name(world.COLOURS, "colour"), name(world.SHAPES, "shape"), words, "",
                         name(world.BACKGROUNDS, "background"))


def words_of(trial, tuned=True):
    """What names the motion in captions: a learned word, its own name, or plain "moving"."""
    known = trial.motion if trial.motion in world.MOTIONS else world.UNNAMED_WORDS[0]
    if not tuned or trial.method == "base":
        return known
    word = METHODS[trial.method].parts.get("word")
    return f"doing the {word.text}" if word else trial.words or known


def write_clips(folder, videos, captions):
    """A folder of clips with captions beside them."""
    for i, (video, caption) in enumerate(zip(videos, captions)):
        path = folder / f"{i:03d}.mp4"
        media.write_video(path, video, world.FPS)
        path.with_suffix(".txt").write_text(caption + "\n")
    return str(folder)


def flags_of(trial, folder, out):
    """What train.py is told; writes the clips. Methods with prior clips are told the looks, as
    those are."""
    scenes, _ = scenes_of(trial)
    looks = trial.looks or METHODS[trial.method].prior is not None
    said = [describe(scenes, i, words_of(trial), looks) for i in range(len(scenes))]
    videos = world.render(scenes)
    if trial.clips:
        flags = ["--video", write_clips(folder / "clips", videos, said)]
    else:
        picture = folder / "picture.png"
        imageio.imwrite(picture, media.to_pixels(videos[0])[0])
        flags = ["--images", str(picture), "--image-prompt", describe(scenes, 0, "", True)]
    flags += ["--reverse"] * trial.backward + ["--keep-every", str(trial.keep)] * (trial.keep > 0)
    if trial.prior == "resting":
        others = world.sample_scenes(RESTING_CLIPS, torch.Generator().manual_seed(trial.seed),
                                     RESTING)
        videos = world.render(others)
        flags += ["--prior", write_clips(folder / "resting", videos, world.captions(others))]
    elif trial.prior:
        flags += ["--prior", trial.prior]
    if trial.borrows:
        flags.append(f"look.file={file_of(trial.borrows, out, '-look')}")
    return flags


def learn(trial, out):
    """Train it, unless that is done or there is nothing to train."""
    folder = trial.folder(out)
    if trial.method == "base" or (folder / "seconds.json").is_file():
        return
    if trial.borrows:
        learn(trial.borrows, out)
    folder.mkdir(parents=True, exist_ok=True)
    flags, patch, started = flags_of(trial, folder, out), data.PATCH, time.time()
    caught = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        data.PATCH = trial.patch
        with (folder / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
            train.main(["--method", trial.method, "--preview-every", "0",
                        "--preview-steps", str(STEPS), "--seed", str(trial.seed), "--overwrite",
                        "--out", str(folder / "run"), *flags, *trial.settings])
    finally:  # the handlers that train.py sets would stop no sampling
        data.PATCH = patch
        for s, handler in caught.items():
            signal.signal(s, handler)
    (folder / "run" / "state.pt").unlink()  # large, and the run is at its end
    write_json(folder / "seconds.json", {"seconds": round(time.time() - started)})


def file_of(trial, out, part="", step=0):
    """Where a trial's adapter is, or its look's, of a step that was kept (0: the last)."""
    where = Path("steps") / f"{step:06d}" if step else ""
    return trial.folder(out) / "run" / where / f"{trial.method}{part}.safetensors"


@torch.no_grad()
def sample(trial, out, cell):
    """Videos (N, 3, F, H, W) of the trial's prompts, and what the instruments read of them."""
    whole = model.load(precision=default_precision("cpu"))
    looks = scenes_of(trial)[1]
    if cell.look:
        looks = scenes_of(cell.look)[0][torch.zeros(PROMPTS, dtype=torch.long)]
    told, words = not (cell.open or cell.look), words_of(trial, cell.tuned)
    prompts = [describe(looks, i, words, told) for i in range(PROMPTS)]
    acting, own = [], {"noise_prior": 0, "inverts": "base", "sampler": "ddim"}
    if trial.method != "base":
        adapter = adapter_file.read_adapter(file_of(trial, out, "", cell.step))
        own = adapter.meta
        acting += [(adapter, cell.scale)] * cell.tuned
    for other, part in ((cell.look, "-look"), (cell.motion, "")):
        if other:
            acting.append((adapter_file.read_adapter(file_of(other, out, part)), cell.strength))
    act = lambda: adapter_file.apply_adapters(whole, *map(list, zip(*acting))) if acting else None
    share = float(own["noise_prior"]) if cell.start == "own" else 0.0
    if own["inverts"] != "base":
        act()
    seeds = [PROMPTS * trial.seed + i for i in range(PROMPTS)]
    start = sampler.noise_like_shape((whole.unet.config.in_channels, world.FRAMES, 8, 8), seeds)
    if share:
        inverted = sampler.invert(whole, adapter.latents[None], STEPS)
        start = sampler.blend_noise(inverted, start, share)
    if own["inverts"] == "base":
        act()
    method = own["sampler"] if share else "ddim"
    videos = sampler.sample(whole, prompts, start, seeds, STEPS, GUIDANCE, method)
    return videos, score(videos, trial, looks)


# ------------------------------------------------------------------------------------------------
# What is read off the videos

FIGURES = {
    "agreement": "correlation with the exact path of the clip, 0 where the amplitude is wrong or "
                 "the thing is lost",
    "recognised": "share of videos whose kind of motion is read as the clip's",
    "all three": "looks: share of videos whose colour, shape and background are all as asked",
    "steady": "share of frames with the right colour and shape",
    "leak": "share of videos with the background of the clip, which no prompt asks for",
    "copy": "looks, of three, that are not as asked but as in one of the training clips",
    "jitter": "root mean square of the path's second difference, pixels",
    "posture": "correlation of the thing's size with the clip's",
    "diversity": "share of the other videos with another colour or background",
    "pan": "share of videos whose background moves left",
    "backward": "agreement with the path backward, less that with the path forward",
}


def score(videos, trial, looks):
    """{figure: a list, one number a video} against a trial's motion and the looks asked for."""
    scenes, reading = scenes_of(trial)[0], instruments.read(videos)
    clip, path = scenes[:1], world.trajectory(scenes[:1])
    back = world.Path_(*(v.flip(1) for v in vars(path).values()))
    forth = instruments.agreement(reading, path)
    other = instruments.agreement(reading, back)
    right = {name: getattr(reading, name) == getattr(looks, name) for name in LOOK}
    got, asked, seen = (torch.stack([getattr(s, name) for name in LOOK], -1)
                        for s in (reading, looks, scenes))
    copied = (got[:, None] == seen) & (got != asked)[:, None]  # (N, clips, 3)
    seen_as = got[:, [LOOK.index("colour"), LOOK.index("background")]]
    differ = (seen_as[:, None] != seen_as).any(2)
    figures = {"agreement": other if trial.backward else forth, **right,
               "all three": right["colour"] & right["shape"] & right["background"],
               "steady": instruments.steadiness(looks, reading),
               "leak": reading.background == clip.background,
               "copy": copied.float().mean(2).amax(1), "recognised": reading.motion == clip.motion,
               "jitter": jitter(reading), "posture": posture(reading, back if trial.backward else
                                                             path),
               "diversity": differ.float().sum(1) / max(1, len(videos) - 1),
               "pan": pans(videos, reading), "backward": other - forth}
    return {name: values.float().nan_to_num(0.0).tolist() for name, values in figures.items()}


def jitter(reading):
    """Root mean square of the second difference of the thing's path, pixels, (N,)."""
    bend = torch.stack([reading.x, reading.y]).diff(n=2, dim=2)
    return bend.square().sum(0).mean(1).sqrt()


def posture(reading, path):
    """Correlation (N,) of the thing's size with a path's, over frames, both as logarithms; NaN
    where the path's does not change."""
    want = (path.size * path.width.clamp(min=0.05).sqrt()).log()
    got = reading.size.clamp(min=1).log()
    a, b = got - got.mean(1, keepdim=True), want - want.mean(1, keepdim=True)
    if b.norm() < 0.1:
        return torch.full((len(got),), float("nan"))
    found = reading.found.float().mean(1) >= 7 / 8
    return found * (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-6)


def pans(videos, reading):
    """Whether the background moves left by a pixel a frame or more, (N,)."""
    axis = torch.arange(world.SIZE) + 0.5
    each = lambda t: t[..., None, None]
    away = (axis[:, None] - each(reading.y)) ** 2 + (axis - each(reading.x)) ** 2
    background = away > (1.2 * each(reading.size)) ** 2  # (N, F, H, W)
    pixels = ((videos.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 4, 1)
    return instruments.camera_shift(pixels, background) <= -1


FROM_NOISE = [Cell(tuned=False), Cell()]
FROM_OWN = [Cell(tuned=False, start="own"), Cell(start="own")]


def starts_of(trial, out, done):
    """The cells of the methods' table: base and tuned, from noise and from the method's start. Of a
    trial whose adapter is not here any more, those that are done."""
    known = lambda cells: all(cell.name in done for cell in cells)
    if not file_of(trial, out).is_file() and known(FROM_NOISE):
        return FROM_NOISE + FROM_OWN * known(FROM_OWN)
    learn(trial, out)
    own = float(adapter_file.read_adapter(file_of(trial, out)).meta["noise_prior"])
    return FROM_NOISE + FROM_OWN * bool(own)


def measure(trial, out, cells=None):
    """{cell: {figure: list}} of a trial, trained and sampled where that is not done yet; of the
    cells asked for, or those of the table with a sheet of their videos."""
    path, rows = trial.folder(out) / "figures.json", []
    done = read_json(path) if path.is_file() else {}
    if any(cell.name not in done for cell in cells or ()):
        learn(trial, out)
    asked = cells or starts_of(trial, out, done)
    for cell in asked:
        if cell.name not in done:
            for other in filter(None, (cell.look, cell.motion)):
                learn(other, out)
            videos, done[cell.name] = sample(trial, out, cell)
            rows += list(videos[:4])
            if trial.method != "base":
                done["trial"] = asdict(trial) | read_json(trial.folder(out) / "seconds.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, done)
    if cells is None and rows:
        sheet = [world.render(scenes_of(trial)[0])[0], *rows]
        media.contact_sheet(path.parent / "sheet.png", sheet)
    return {name: done[name] for name in ("trial", *(c.name for c in asked)) if name in done}


# ------------------------------------------------------------------------------------------------
# Every trial that was measured, in one small file: so that a clone need not measure it again

KEPT = ROOT / "docs" / "trials.json"


def base_model():
    """What tells the tiny model from another base."""
    return adapter_file.fingerprint(model.load_unet(model.TINY))


def restore(out):
    """Put into `out` what KEPT holds of trials on this base model and `out` does not."""
    kept = read_json(KEPT) if KEPT.is_file() else {}
    if kept.get("base") != base_model():
        return
    for name, cells in kept["trials"].items():
        path = out / name / "figures.json"
        rows = {c: {f: [v] for f, v in zip(kept["figures"], values)}
                for c, values in cells["cells"].items()}
        rows["trial"] = {"seconds": cells["seconds"]}
        here = read_json(path) if path.is_file() else {}
        if rows.keys() - here.keys():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, rows | here)


def keep(out):
    """Write KEPT from all that is in `out`: of each cell the means over its videos."""
    trials = {}
    for path in sorted(out.glob("*/figures.json")):
        cells = read_json(path)
        about = cells.pop("trial", {})
        means = {c: [round(sum(row[f]) / len(row[f]), 4) for f in FIGURES if f in row]
                 for c, row in cells.items()}
        trials[path.parent.name] = {"seconds": about.get("seconds", 0), "cells": means}
    rows = [f"{json.dumps(n)}: {json.dumps(t)}" for n, t in trials.items()]
    head = json.dumps({"base": base_model(), "figures": list(FIGURES)})
    with publish(KEPT) as part:
        part.write_text(head[:-1] + ', "trials": {\n' + ",\n".join(rows) + "\n}}\n")


# ------------------------------------------------------------------------------------------------
# Many trials


def interval(values, draws=2000):
    """(mean, low, high) of numbers, one a trial: a 95 % interval by bootstrap over trials."""
    values = torch.tensor(values, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(len(values), (draws, len(values)), generator=g)
    low, high = values[rows].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return values.mean().item(), low.item(), high.item()


def summary(trials, seeds=1):
    """{cell: {figure: (mean, low, high)}} over motions, each the mean of its `seeds` measured
    trials, one behind the other; and of the gain of the tuned model over the base from the same
    start, trial by trial."""
    table = {}
    by_motion = lambda means: interval(torch.tensor(means).view(-1, seeds).mean(1).tolist())
    for cell in [c for c in trials[0] if c != "trial"]:
        table[cell] = {}
        for figure in trials[0][cell]:
            means = [sum(t[cell][figure]) / len(t[cell][figure]) for t in trials]
            table[cell][figure] = by_motion(means)
            base = cell.replace("tuned", "base")
            if cell != base and figure == "agreement":
                other = [sum(t[base][figure]) / len(t[base][figure]) for t in trials]
                table[cell]["gain"] = by_motion([a - b for a, b in zip(means, other)])
    return table


def rows_of(args):
    """[(name of the row, its trials)] that the flags ask for."""
    motions, rows = MOTIONS[: args.motions], []
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
    seeds = f"{settings['seeds']} seed{'s' * (settings['seeds'] > 1)}"
    lines = ["# What the methods learn on the tiny world", "",
             f"Written by `{result['command']}` at commit {result['commit']}; "
             f"{settings['motions']} motions that the base never saw × {seeds} of training × "
             f"{PROMPTS} prompts whose looks all differ from the clip's; {STEPS} "
             f"steps, guidance {GUIDANCE:g}. *Agreement* is the correlation with the clip's exact "
             "path, 0 where the amplitude is wrong or the thing is lost; *gain* what the tuned "
             "model has over the base from the same start, trial by trial; *looks* the share of "
             "videos whose colour, shape and background are all as asked; *steady* the share of "
             "frames with the right colour and shape; *leak* the share with the clip's background. "
             "In brackets a 95 % interval over motions, each the mean of its seeds, since those "
             "share clip and prompts.", "",
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


def panel(methods):
    """Motion against appearance: each method from its own start, or from noise where it has none,
    with the interval of its agreement; and the base from noise."""
    points = {}
    for name, row in methods.items():
        cells = row["cells"]
        points.setdefault("base", cells[FROM_NOISE[0].name])
        points[name] = cells.get(FROM_OWN[1].name, cells[FROM_NOISE[1].name])
    series = [Series(name, [(100 * c["all three"][0], *c["agreement"])], False)
              for name, c in points.items()]
    return Panel("what methods learn", "videos that look as asked, %", "agreement", series)


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
    out = args.out / base_model()
    restore(out)
    rows, methods = rows_of(args), {}
    bar = tqdm(total=sum(len(trials) for _, trials in rows), desc="trials")
    for name, trials in rows:
        measured = []
        for trial in trials:
            measured.append(measure(trial, out))
            bar.update()
        seconds = sorted(m["trial"]["seconds"] for m in measured)[len(measured) // 2]
        methods[name] = {"cells": summary(measured, args.seeds), "seconds": seconds}
    count = len(rows[0][1]) // args.seeds
    result = {"command": " ".join(["python tiny/lab.py", *sys.argv[1:]]), "commit": commit(),
              "settings": {"motions": count, "seeds": args.seeds, "prompts": PROMPTS,
                           "more": args.settings}, "methods": methods}
    folder = (args.write or args.out).resolve()
    if folder == KEPT.parent:
        keep(out)
        chart(ROOT / "assets" / "results.svg", [panel(methods)])
    write_json(folder / "results.json", result)
    (folder / "results.md").write_text(page(result))
    print(json.dumps({n: {c: f["agreement"] for c, f in m["cells"].items()}
                      for n, m in methods.items()}, indent=1))
    print(folder / "results.md")


if __name__ == "__main__":
    main()
