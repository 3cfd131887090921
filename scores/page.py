"""The page to look at: runs side by side, their figures, and how they were learned.

One file that needs no other: videos are in it, and nothing in it loads or runs anything else.
"""
import base64
import json
import math
import tempfile
from pathlib import Path

import data
from support.files import BadInput, finite, publish

TEMPLATES = Path(__file__).resolve().parent
LOWER = ("copy score", "share of copies")  # metrics of which less is better, by their beginning
NEITHER = ("tracks held",)  # and those that only say how far to trust another


def better(metric):
    """↑ where more of a metric is better, ↓ where less is, else nothing."""
    if metric.startswith(NEITHER):
        return ""
    return "↓" if metric.startswith(LOWER) else "↑"


def write_page(path, template, content):
    """Fill a template beside this file with JSON that cannot end its script, whatever prompts
    hold."""
    text = json.dumps(finite(content), ensure_ascii=True, default=str).replace("<", "\\u003c")
    html = (TEMPLATES / template).read_text(encoding="utf-8").replace("__CONTENT__", text)
    with publish(path) as part:
        part.write_text(html, encoding="utf-8")
    print(f"written: {path}")


def embed(video, fps):
    """A video (3, F, H, W) as it was measured, as an address that holds all of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        data.write_video(path, video, fps)
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


# ------------------------------------------------------------------------------------------------
# Loss curves, of the log that train.py wrote: a line a step, {"step", "loss", "seen": [{"t", "mse"}
# of each prediction], …}


def read_log(path):
    """The steps of a log.jsonl, without a last line that was cut. Raises BadInput."""
    if not path.is_file():
        return []
    lines, rows = path.read_bytes().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, TypeError, KeyError, RecursionError):
            if number == len(lines):
                break
            raise BadInput(f"{path}: line {number} is not a step of a run; take the line out, or "
                           "train again.") from None
        rows.append(row)
    return rows


def loss_curves(rows, bins=4, most=100):
    """{"loss": {"all steps": [(step, mean)]}, "squared error of the prediction": {"t 0–174": …}}:
    the second by bins of the timestep, of which the high ones are mostly noise and of small error,
    whatever was learned; in the first their chance mixture hides what changes."""
    losses, seen = [], []
    for row in rows:
        losses.append((row["step"], row.get("loss")))
        for one in row.get("seen") or []:
            if isinstance(one, dict) and is_number(one.get("t")):
                seen.append((row["step"], one["t"], one.get("mse")))
    curves = {"loss": {"all steps": thinned(losses, most)}}
    if seen:
        width = math.ceil((int(max(t for _, t, _ in seen)) + 1) / bins)
        error = {f"t {i * width}–{(i + 1) * width - 1}": thinned(
            [(step, mse) for step, t, mse in seen if t // width == i], most) for i in range(bins)}
        curves["squared error of the prediction, by timestep"] = error
    return curves


def is_number(value):
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, (int, float)) and abs(value) < 1e300


def thinned(points, most):
    """At most `most` points (step, mean value) of many, without those that have no number."""
    points = [p for p in points if is_number(p[1])]
    wide, curve = max(1, math.ceil(len(points) / most)), []
    for i in range(0, len(points), wide):
        part = points[i : i + wide]
        curve.append((part[0][0], sum(value for _, value in part) / len(part)))
    return curve


# ------------------------------------------------------------------------------------------------
# The page of several runs


def against_steps(runs, table):
    """{training folder: {metric: [(step, value)]}} where intermediate adapters were scored."""
    curves = {}
    for run in runs:
        step = run.settings.get("steps_trained")
        if step is None:
            continue
        metrics = curves.setdefault(str(run.training.get("folder", "")), {})
        for metric, value in table[run.name].items():
            if value is not None:
                metrics.setdefault(metric, {})[step] = value
    return {folder: {m: sorted(points.items()) for m, points in metrics.items()}
            for folder, metrics in curves.items() if max(map(len, metrics.values())) > 2}


def report(path, runs, table, each, notes):
    """Write the page: reference, runs side by side, prompts down; figures, curves, settings."""
    clips = {str(r.path): r for run in runs for r in run.references if r.shown}
    shown = []
    for run, rows in zip(runs, each):
        folder, samples = run.training.get("folder"), []
        for s, row in zip(run.samples, rows):
            samples.append({"prompt": s.prompt, "seed": s.seed, "figures": row,
                            "video": embed(s.video, s.fps)})
        losses = loss_curves(read_log(Path(folder) / "log.jsonl")) if folder else {}
        shown.append({"name": run.name, "settings": run.settings, "training": run.training,
                      "losses": losses, "samples": samples})
    metrics = dict.fromkeys(metric for rows in table.values() for metric in rows)
    write_page(path, "page.html", {
        "table": table, "better": {metric: better(metric) for metric in metrics}, "notes": notes,
        "references": [embed(r.video, r.fps) for r in clips.values()],
        "curves": against_steps(runs, table), "runs": shown})
