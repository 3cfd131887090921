"""Speed and memory, next to the diffusers UNet in the same training and sampling loops.

    python benchmarks/bench.py cpu      # the tiny model; 10 minutes
    python benchmarks/bench.py gpu      # ZeroScope's size with random weights; 5 minutes
    python benchmarks/bench.py dry      # the rows of `gpu` on a CPU, with a narrow model
    python benchmarks/bench.py page out/bench-cpu.json out/bench-gpu.json    # fill docs/speed.md

Both sides have the same weights, inputs, precision and threads. On a CPU they take turns, so that
other jobs slow both down; the speedup is the median over the turns. On a GPU each side has the
memory for itself. Results are written after every row.
"""
import argparse
import gc
import re
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import sides
import torch
from sides import ROOT, model

from support import machine, media
from support.files import read_json, write_json

SHAPES = {  # command: F, H, W
    "train.py --method vmc": (8, 320, 576), "train.py --method motiondirector": (16, 384, 384),
    "train.py --method newmove": (16, 384, 384),
    "train.py --method customize-a-video": (16, 256, 256), "generate.py": (24, 320, 576)}
SMALL = {"cpu": (16, 64, 64), "dry": (4, 64, 64)}  # shape of all rows of these commands
GROUPS = (("bf16", ""), ("bf16", " --checkpointing on"), ("fp32", ""), ("fp16", ""))
LATENTS = "Sampled latents"  # the case of their error
WARM, SIDE_SECONDS = 2, 20  # untimed steps; seconds after which one timed step is enough


# --- Rows ---------------------------------------------------------------------------------------


def list_rows(command):
    """The rows of the table, the most important first. The case of a row is the command that it
    measures."""
    rows, small = [], SMALL.get(command)

    def add(case, precision, shape):
        steps = 1 if case.startswith("train.py") else 2 if small else 5
        rows.append({"case": case, "precision": precision, "shape": shape, "steps": steps,
                     "seconds": {}, "peak": {}, "relative": {}, "errors": {}})

    for precision, flags in GROUPS:
        for case, shape in SHAPES.items():
            slow = precision == "fp16" and command == "cpu"
            if not slow and (case.startswith("train.py") or not flags):
                add(case + flags, precision, small or shape)
    add(LATENTS, "bf16", small or SHAPES["generate.py"])
    if command == "cpu":
        for frames in (8, 24, 32):
            add("train.py --method vmc", "bf16", (frames, 64, 64))
        for rank in (4, 128):
            ranks = f"motion.rank={rank} appearance.rank={rank}"
            add(f"train.py --method motiondirector {ranks}", "bf16", small)
    return rows


def measure(here, row):
    """Times, peak memory and the outputs' difference of the sides."""
    if row["case"] == LATENTS:
        return accuracy(here, row)
    build = sides.training if row["case"].startswith("train.py") else sides.sampling
    builders, outputs = {"ours": build}, {}
    if row["case"] in SHAPES:
        builders["diffusers"] = partial(sides.with_diffusers, build)
    groups = [builders] if here.device == "cpu" else [{n: b} for n, b in builders.items()]
    for group in groups:
        try:
            outputs |= take_turns(here, row, group)
        except torch.OutOfMemoryError:
            row["errors"] |= dict.fromkeys(group, "out of memory")
    if row["case"] == "generate.py" and len(outputs) == 2:
        row["difference"] = relative_error(*outputs.values())


def accuracy(here, row):
    """The relative error of sampled latents by precision. The reference is fp32 without
    TensorFloat-32, which cuDNN's convolutions use by default."""
    torch.backends.cudnn.allow_tf32 = False
    reference = sides.sampling(here, row | {"precision": "fp32"})()
    torch.backends.cudnn.allow_tf32 = True
    for precision in machine.DTYPES:
        sampled = sides.sampling(here, row | {"precision": precision})()
        row["relative"][f"error in {precision}"] = relative_error(sampled, reference)


def relative_error(x, reference):
    """‖x − reference‖ / ‖reference‖."""
    return ((x - reference).norm() / reference.norm()).item()


def take_turns(here, row, builders):
    """Build the sides, warm them up, and time their steps in turn. Returns the last outputs."""
    gc.collect()
    torch.cuda.empty_cache()
    cuda, steps = here.device != "cpu", {side: build(here, row) for side, build in builders.items()}
    outputs, times, began = {}, {side: [] for side in steps}, time.perf_counter()
    for turn in range(WARM + here.repeats):
        if cuda and turn == WARM:
            torch.cuda.reset_peak_memory_stats()
        for side, step in steps.items():
            started = time.perf_counter()
            outputs[side] = step()
            if cuda:
                torch.cuda.synchronize()
            times[side].append(time.perf_counter() - started)
        if turn >= WARM and time.perf_counter() - began > SIDE_SECONDS:
            break
    for side in steps:
        row["seconds"][side] = times[side][WARM:]
        if cuda:
            row["peak"][side] = torch.cuda.max_memory_allocated()
    return outputs


def run(here):
    """Measure rows while there is time, and write the results after each."""
    card = torch.cuda.get_device_name() if here.device != "cpu" else "CPU"
    result = {"command": here.command,
              "machine": f"{card}, {torch.get_num_threads()} CPU thread(s)",
              "torch": torch.__version__, "diffusers": sides.diffusers.__version__, "rows": []}
    began = time.perf_counter()
    for row in list_rows(here.command):
        name = f"{row['case']}, {row['precision']}"
        if not re.search(here.only, name):
            continue
        if time.perf_counter() - began > here.seconds:
            print(f"left out: {name}")
            continue
        measure(here, row)
        result["rows"].append(row)
        write_json(here.out, result)
        print(f"{time.perf_counter() - began:4.0f} s  {line_of(row)}")


# --- docs/speed.md ------------------------------------------------------------------------------


def line_of(row):
    """A row of the table: case, precision, shape, and per side ms per step and peak memory; or a
    sentence for values that are relative."""
    if row["relative"]:
        values = [f"{name} {value:.3g}" for name, value in row["relative"].items()]
        return f"{row['case']}, relative: {', '.join(values)}."
    cells = [row["case"], row["precision"], "×".join(map(str, row["shape"]))]
    for side in ("ours", "diffusers"):
        cell = row["errors"].get(side, "")
        if side in row["seconds"]:
            cell = f"{1e3 * statistics.median(row['seconds'][side]) / row['steps']:.0f}"
        if side in row["peak"]:
            cell += f", {row['peak'][side] / 1e9:.1f} GB"
        cells.append(cell)
    speedup = ""
    if len(row["seconds"]) == 2:
        ratios = [b / a for a, b in zip(row["seconds"]["ours"], row["seconds"]["diffusers"])]
        low, middle, high = torch.tensor(ratios).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        speedup = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    return f"| {' | '.join([*cells, speedup])} |"


def page(files):
    """Put results into docs/speed.json, and their tables between the marks of docs/speed.md."""
    path, text = ROOT / "docs" / "speed.md", (ROOT / "docs" / "speed.md").read_text()
    saved = read_json(path.with_suffix(".json"))
    for result in map(read_json, files):
        saved[result["command"]] = result
    for command, result in saved.items():
        table = "| command | precision | F×H×W | ms per step | diffusers | speedup |\n"
        table += "|---|---|---|---|---|---|\n"
        notes = (f"\n{result['machine']}, torch {result['torch']}, diffusers "
                 f"{result['diffusers']}.\n\n")
        for row in result["rows"]:
            if row["relative"]:
                notes += f"- {line_of(row)}\n"
            else:
                table += f"{line_of(row)}\n"
        before, mark, after = text.partition(f"<!-- {command} -->\n")
        text = before + mark + table + notes + after[after.index("<!-- end -->"):]
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
    here.device = "cuda" if here.command == "gpu" else "cpu"
    if here.command in sides.SIZES:
        model.load = partial(sides.random_model, sides.SIZES[here.command])
    with tempfile.TemporaryDirectory() as scratch:
        here.scratch = Path(scratch)
        noise = torch.rand(3, 32, 256, 256) * 2 - 1
        media.write_video(here.scratch / "clips" / f"{sides.PROMPT}.mp4", noise, 8)
        run(here)


if __name__ == "__main__":
    main()
