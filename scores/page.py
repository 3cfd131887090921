"""The HTML report of eval.py: videos side by side, metrics, loss curves and settings.

The page is one self-contained file with its videos embedded. It loads nothing else.
"""
import base64
import contextlib
import io
import json
import math
from pathlib import Path

from support import media
from support.files import nan_to_none

TEMPLATES = Path(__file__).resolve().parent
LOWER = ("copy score", "share of copies", "temporal consistency (LPIPS)")  # lower is better
NEUTRAL = ("reliable tracks",)  # neither


def direction(metric):
    """↓ if lower values of a metric are better, ↑ if higher ones are, "" for neither."""
    if metric.startswith(NEUTRAL):
        return ""
    return "↓" if metric.startswith(LOWER) else "↑"


def fill(template, content):
    """A template of this folder with JSON content, escaped so that no prompt can end the script."""
    text = json.dumps(nan_to_none(content)).replace("<", "\\u003c")
    return (TEMPLATES / template).read_text(encoding="utf-8").replace("__CONTENT__", text)


def embed(video, fps):
    """A video (3, F, H, W) as a data URL."""
    file = io.BytesIO()
    media.encode_mp4(file, video, fps)
    return "data:video/mp4;base64," + base64.b64encode(file.getvalue()).decode()


def read_log(path):
    """[(step, loss, [(t, squared error) per prediction])] of train.py's log.jsonl. If a step occurs
    twice, the last line counts. Lines that are cut off by a kill, or not finite, are skipped."""
    rows = {}
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(Exception):
            row = json.loads(line)
            seen = [(int(record["t"]), float(record["mse"])) for record in row["seen"]]
            if math.isfinite(sum(error for _, error in seen) + row["loss"]):
                rows[int(row["step"])] = row["loss"], seen
    return [(step, *rows[step]) for step in sorted(rows)]


def loss_curves(rows, bins=4):
    """{title: {line: [(step, mean)]}} for the loss, and for the squared error in bins of timesteps.

    The error is small at high timesteps, where the input is almost pure noise. The loss therefore
    jumps with the sampled timesteps, and the binned error does not.
    """
    losses, errors, largest = [], [], 0
    for step, loss, seen in rows:
        losses.append((step, loss))
        for t, error in seen:
            errors.append((step, t, error))
            largest = max(largest, t)
    curves = {"loss": {"all steps": thin(losses)}}
    width = math.ceil((largest + 1) / bins)
    lines = curves["squared error of the prediction, by timestep"] = {}
    for low in range(0, bins * width, width):
        points = [(step, error) for step, t, error in errors if low <= t < low + width]
        lines[f"t {low}–{low + width - 1}"] = thin(points)
    return curves


def thin(points, limit=100):
    """Average neighboring points (step, value), to at most `limit` points."""
    size, curve = max(1, math.ceil(len(points) / limit)), []
    for i in range(0, len(points), size):
        group = points[i : i + size]
        curve.append((group[0][0], sum(value for _, value in group) / len(group)))
    return curve


def metric_curves(runs, table):
    """{training folder: {metric: {step: value}}} over the steps whose adapters were scored."""
    curves = {}
    for run in runs:
        step = run.generated.steps_trained
        if run.training and step is not None:
            metrics = curves.setdefault(run.training.folder, {})
            for metric, value in table[run.name].items():
                metrics.setdefault(metric, {})[step] = value
    return curves


def report(runs, table, notes):
    """The HTML page: the table, one row of videos per prompt with one column per run, curves and
    settings."""
    references, shown, directions = {}, [], {}
    for run in runs:
        references |= {r.path: r for r in run.references}
        directions |= {metric: direction(metric) for metric in table[run.name]}
        training, samples = vars(run.training) if run.training else {}, []
        for s in run.samples:
            samples.append({"prompt": s.prompt, "seed": s.seed, "metrics": s.metrics,
                            "video": embed(s.video, s.fps)})
        losses = loss_curves(read_log(Path(training["folder"]) / "log.jsonl")) if training else {}
        settings = vars(run.generated) if run.generated.videos else {}
        shown.append({"name": run.name, "settings": settings, "training": training,
                      "losses": losses, "samples": samples})
    return fill("page.html", {
        "table": table, "directions": directions, "notes": notes, "runs": shown,
        "references": [embed(r.video, r.fps) for r in references.values()],
        "curves": metric_curves(runs, table)})
