"""Speed and memory, next to diffusers with the official training loops.

    python benchmarks/bench.py cpu      # the tiny model; 10 minutes
    python benchmarks/bench.py gpu      # ZeroScope's size with random weights; 5 minutes
    python benchmarks/bench.py dry      # the rows of `gpu` on a CPU, with a narrow model
    python benchmarks/bench.py page out/bench-cpu.json out/bench-gpu.json    # fill docs/speed.md

Both sides have the same weights, inputs, precision and threads. On a CPU they take turns, so that
other jobs slow both down; the speedup is the median over the turns. On a GPU each side has the
memory for itself. An error ends one side of one row. Results are written after every row.
"""
import argparse
import contextlib
import gc
import re
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import sides
import torch
from PIL import Image
from sides import PROMPT, ROOT, Loop, load, load_unet, model, our_step, prepare, sample

from support import machine
from support.files import read_json, write_json

PRECISIONS = ("bf16", "fp32", "fp16")  # the most important one first
SHAPES = {"vmc": (8, 320, 576), "motiondirector": (16, 384, 384), "newmove": (16, 384, 384),
          "customize-a-video": (16, 256, 256), "generate": (24, 320, 576)}  # F, H, W
SMALL = {"cpu": (16, 64, 64), "dry": (4, 64, 64)}  # shape of all rows of these commands
WARM, SIDE_SECONDS = 2, 20  # untimed steps; seconds after which one timed step is enough


# ------------------------------------------------------------------------------------------------
# Rows. Each measures {side: function that builds a step}.


def training(here, row, method, checkpointing="off"):
    """The training step of a method, next to the official loop."""
    flags, made = ("--precision", row["precision"], "--checkpointing", checkpointing), []

    def ours():
        made.append(prepare(here, method, row["shape"], flags))
        return our_step(made[0])

    def theirs():
        run = made.pop() if here.alone else made[0]
        parts, clips = run.recipe.parts, [run.clips[0], *run.prior[:1]]
        pipe, run = replace(run.pipe, unet=None), None
        autocast = partial(machine.autocast, here.device, row["precision"])
        unet = load_unet(model.load(None, here.device).unet)
        return Loop(method, unet, parts, clips, pipe, autocast).step

    compared = hasattr(Loop, method) and checkpointing == "off"
    measure(here, row, {"ours": ours} | ({"diffusers": theirs} if compared else {}))


def sampling(here, row, steps):
    """Guided sampling to latents, next to the loop of the diffusers pipeline."""
    row["steps"], precision, made = steps, row["precision"], []

    def ours():
        made.extend(load(here, row, precision))
        return partial(sample, *made, steps)

    def theirs():
        pipe, inputs = made
        pipe.unet = None if here.alone else pipe.unet
        dtype = machine.DTYPES[precision if here.alone else "fp32"]
        unet = load_unet(model.load(None, here.device).unet, dtype)
        autocast = partial(machine.autocast, here.device, precision)
        return partial(sides.official_sample, unet, pipe.schedule, *inputs, steps, autocast)

    measure(here, row, {"ours": ours, "diffusers": theirs})


def accuracy(here, row, steps):
    """The relative error of sampled latents by precision. The reference is fp32 without
    TensorFloat-32, which cuDNN's convolutions use by default."""
    torch.backends.cudnn.allow_tf32 = False
    reference = sample(*load(here, row, "fp32"), steps)
    torch.backends.cudnn.allow_tf32 = True
    for precision in PRECISIONS:
        with recorded(row, precision):
            error = (sample(*load(here, row, precision), steps) - reference).norm()
            row["relative"][f"error in {precision}"] = (error / reference.norm()).item()


def growth(here, row, settings):
    """The training step of one method by settings, {name: (method, frames, flags ...)}."""
    def build(method, frames, *flags):
        return our_step(prepare(here, method, (frames, 64, 64), flags))

    measure(here, row, {name: partial(build, *values) for name, values in settings.items()})
    times = {name: statistics.median(several) for name, several in row["seconds"].items()}
    row["relative"] = {name: t / next(iter(times.values())) for name, t in times.items()}


def rows(here):
    """[(case, precision, key of SHAPES, function, its arguments ...)], the most important first."""
    steps, methods, first = 5 if here.command == "gpu" else 2, list(SHAPES)[:4], PRECISIONS[0]

    def block(precision):
        trained = [(f"train.py --method {m}", precision, m, training, m) for m in methods]
        return [*trained[:2], ("generate.py", precision, "generate", sampling, steps), *trained[2:]]

    found = block(first) + [("Sampled latents", first, "generate", accuracy, steps)]
    found += [(f"train.py --method {m} --checkpointing on", first, m, training, m, "on")
              for m in methods]
    for precision in PRECISIONS[1 : 2 if here.command == "cpu" else None]:  # slow fp16 on CPUs
        found += block(precision)
    if here.command == "cpu":
        frames = {f"{n} frames": ("vmc", n) for n in (8, 16, 24, 32)}
        ranks = {f"rank {n}": ("motiondirector", 16, f"motion.rank={n}", f"appearance.rank={n}")
                 for n in (4, 32, 128)}
        found.append(("Step time of vmc", first, "vmc", growth, frames))
        found.append(("Step time of motiondirector", first, "motiondirector", growth, ranks))
    return found


# ------------------------------------------------------------------------------------------------
# Measuring


@contextlib.contextmanager
def recorded(row, side):
    """An error in the block becomes an entry of the row."""
    try:
        yield
    except (Exception, SystemExit) as error:
        row["errors"][side] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def measure(here, row, builders):
    """Times, peak memory and the outputs' difference of sides."""
    outputs = []
    groups = [{name: build} for name, build in builders.items()] if here.alone else [builders]
    for group in groups:
        with recorded(row, "+".join(group)):
            outputs += take_turns(here, row, group)
    if len(outputs) == 2 and torch.is_tensor(outputs[0]):
        ours, theirs = outputs
        row["difference"] = ((ours - theirs).norm() / theirs.norm()).item()


def take_turns(here, row, group):
    """Build the sides, warm them up, and time their steps in turn; the last step's outputs."""
    gc.collect()
    torch.cuda.empty_cache()
    cuda, steps = here.device != "cpu", {name: build() for name, build in group.items()}
    outputs, times, began = {}, {name: [] for name in steps}, time.perf_counter()
    for turn in range(WARM + here.repeats):
        if cuda and turn == WARM:
            torch.cuda.reset_peak_memory_stats()
        for name, step in steps.items():
            started = time.perf_counter()
            outputs[name] = step()
            if cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
        if turn >= WARM and time.perf_counter() - began > SIDE_SECONDS:
            break
    row["seconds"] |= {name: several[WARM:] for name, several in times.items()}
    if cuda:
        row["peak"] |= {name: torch.cuda.max_memory_allocated() for name in steps}
    return outputs.values()


def run(here):
    """Measure rows while there is time, and write the results after each."""
    card = torch.cuda.get_device_name() if here.device != "cpu" else "CPU"
    machine_text = f"{card}, {torch.get_num_threads()} CPU thread(s)"
    result = {"command": here.command, "machine": machine_text,
              "torch": torch.__version__, "diffusers": sides.diffusers.__version__,
              "rows": []}
    began = time.perf_counter()
    chosen = [row for row in rows(here) if re.search(here.only, ", ".join(row[:2]))]
    for case, precision, name, fill, *arguments in chosen:
        row = {"case": case, "precision": precision, "steps": 1, "seconds": {}, "peak": {},
               "shape": SMALL.get(here.command, SHAPES[name]), "relative": {}, "errors": {}}
        if time.perf_counter() - began > here.seconds:
            print(f"left out: {case}, {precision}")
            continue
        with recorded(row, "row"):
            fill(here, row, *arguments)
        result["rows"].append(row)
        write_json(here.out, result)
        print(f"{time.perf_counter() - began:4.0f} s  {line_of(row)}", *row["errors"].items())


# ------------------------------------------------------------------------------------------------
# docs/speed.md


def line_of(row):
    """A row of the table: case, precision, shape, and per side ms per step and peak memory; or a
    sentence for values that are relative."""
    if row["relative"]:
        values = [f"{name} {value:.3g}" for name, value in row["relative"].items()]
        return f"{row['case']}, relative: {', '.join(values)}."
    found = [row["case"], row["precision"], "×".join(map(str, row["shape"]))]
    for side in ("ours", "diffusers"):
        error = next((text for name, text in row["errors"].items() if side in name), "")
        times, peak = row["seconds"].get(side), row["peak"].get(side)
        failed = "out of memory" if error.startswith("OutOfMemory") else error[:20]
        ms = f"{1e3 * statistics.median(times) / row['steps']:.0f}" if times else failed
        found.append(f"{ms}, {peak / 1e9:.1f} GB" if peak else ms)
    if len(row["seconds"]) == 2:
        ratios = torch.tensor([b / a for a, b in zip(*row["seconds"].values())])
        low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        found.append(f"{middle:.2f} [{low:.2f}, {high:.2f}]")
    else:
        found.append("")
    return f"| {' | '.join(found)} |"


def page(files):
    """Put results into docs/speed.json, and their tables between the marks of docs/speed.md."""
    path, text = ROOT / "docs" / "speed.md", (ROOT / "docs" / "speed.md").read_text()
    saved = read_json(path.with_suffix(".json"))
    saved |= {result["command"]: result for result in map(read_json, files)}
    for command, result in saved.items():
        lines = [line_of(row) for row in result["rows"]]
        table = ["| command | precision | F×H×W | ms per step | diffusers | speedup |",
                 "|---|---|---|---|---|---|", *[line for line in lines if line[0] == "|"], "",
                 f"{result['machine']}, torch {result['torch']}, diffusers {result['diffusers']}.",
                 "", *[f"- {line}" for line in lines if line[0] != "|"], ""]
        before, mark, after = text.partition(f"<!-- {command} -->\n")
        text = before + mark + "\n".join(table) + after[after.index("<!-- end -->"):]
    path.write_text(text)
    write_json(path.with_suffix(".json"), saved)


def main():
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=("cpu", "gpu", "dry", "page"))
    add("files", type=Path, nargs="*", help="results for `page`")
    add("--out", type=Path, help="default: out/bench-COMMAND.json")
    add("--only", default="", help="a regular expression: the rows to measure (default: all)")
    add("--seconds", type=float, default=3600, help="start no row after this (default: 3600)")
    add("--repeats", type=int, default=9, help="timed steps per side (default: 9)")
    here = parser.parse_args()
    if here.command == "page":
        return page(here.files)
    machine.tune_malloc()
    here.out = here.out or Path(f"out/bench-{here.command}.json")
    here.device, here.alone = "cuda" if here.command == "gpu" else "cpu", here.command != "cpu"
    if here.alone:
        model.load = partial(sides.random_model, sides.SIZES[here.command])
    with tempfile.TemporaryDirectory() as scratch:
        here.scratch = Path(scratch)
        clip = here.scratch / "clips" / "0"
        clip.mkdir(parents=True)
        (clip / "caption.txt").write_text(PROMPT)
        for i in range(32):
            pixels = torch.randint(256, (256, 256, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(clip / f"{i:02d}.png")
        run(here)


if __name__ == "__main__":
    main()
