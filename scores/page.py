"""The page to look at: runs side by side, their figures, and how they were learned.

One file that needs no other: videos are in it, and nothing in it loads or runs anything else.
"""
import base64
import contextlib
import json
import math
import tempfile
from pathlib import Path

from support import media
from support.files import nan_to_none

TEMPLATES = Path(__file__).resolve().parent
LOWER = ("copy score", "share of copies")  # metrics of which less is better, by their beginning
NEITHER = ("tracks held",)  # and those that only say how far to trust another


def better(metric):
    """↑ where more of a metric is better, ↓ where less is, else nothing."""
    if metric.startswith(NEITHER):
        return ""
    return "↓" if metric.startswith(LOWER) else "↑"


def fill(template, content):
    """A template from this folder, filled with JSON in which prompts cannot end the script."""
    text = json.dumps(nan_to_none(content), ensure_ascii=True, default=str).replace("<", "\\u003c")
    return (TEMPLATES / template).read_text(encoding="utf-8").replace("__CONTENT__", text)


def embed(video, fps):
    """A video (3, F, H, W) as it was measured, as an address that holds all of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        media.write_video(path, video, fps)
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


# ------------------------------------------------------------------------------------------------
# Loss curves, of the log that train.py wrote: a line a step, {"step", "loss", "seen": [{"t", "mse"}
# of each prediction], …}


def read_log(path):
    """The steps of a log.jsonl, of each what was told last; lines that are none, as one that was
    cut when the run was killed, are passed by."""
    rows = {}
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            row = json.loads(line)
            if type(row["step"]) is int and isinstance(row["seen"], list):
                rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def loss_curves(rows, bins=4, most=100):
    """{title: {line: [(step, mean)]}}: the loss, and the squared error of the predictions by bins
    of the timestep. At a high one nearly all is noise and the error small, whatever was learned, so
    the loss alone jumps with the timesteps that were drawn."""
    losses, seen = [], []
    for row in rows:
        losses.append((row["step"], row.get("loss")))
        for one in row["seen"]:
            if isinstance(one, dict) and is_number(one.get("t")):
                seen.append((row["step"], one["t"], one.get("mse")))
    curves = {"loss": {"all steps": thinned(losses, most)}}
    if seen:
        width = math.ceil((int(max(t for _, t, _ in seen)) + 1) / bins)
        error = curves["squared error of the prediction, by timestep"] = {}
        for low in range(0, bins * width, width):
            mine = [(step, mse) for step, t, mse in seen if low <= t < low + width]
            error[f"t {low}–{low + width - 1}"] = thinned(mine, most)
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
    folders = {}
    trained = [run for run in runs if run.trained and run.made.steps_trained is not None]
    for run in sorted(trained, key=lambda run: run.made.steps_trained):
        step = run.made.steps_trained
        metrics = folders.setdefault(run.trained.folder, {})
        for metric, value in table[run.name].items():
            if value is not None and (metric not in metrics or metrics[metric][-1][0] < step):
                metrics.setdefault(metric, []).append((step, value))
    curves = {}
    for folder, metrics in folders.items():
        if max(map(len, metrics.values())) > 2:
            curves[folder] = metrics
    return curves


def report(runs, table, notes):
    """The page: the references, one column per run, one row per prompt; metrics, curves, settings."""
    clips, shown, metrics = {}, [], {}
    for run in runs:
        clips |= {r.path: r for r in run.references}
        metrics |= {metric: better(metric) for metric in table[run.name]}
        folder, samples = run.trained and run.trained.folder, []
        for s in run.samples:
            samples.append({"prompt": s.prompt, "seed": s.seed, "figures": s.figures,
                            "video": embed(s.video, s.fps)})
        losses = loss_curves(read_log(Path(folder) / "log.jsonl")) if folder else {}
        shown.append({"name": run.name, "settings": vars(run.made) if run.made else {}, "training":
                      vars(run.trained) if run.trained else {}, "losses": losses,
                      "samples": samples})
    return fill("page.html", {
        "table": table, "better": metrics, "notes": notes, "runs": shown,
        "references": [embed(r.video, r.fps) for r in clips.values()],
        "curves": against_steps(runs, table)})
