"""The page of the claims and its charts, from what was judged."""
from pathlib import Path

import torch

import train
from losses import debias
from tiny import lab, registered, world
from tiny.charts import Panel, Series
from tiny.judging import at, kept_steps, latents, mean
from tiny.lab import Cell
from tiny.registered import ARMS, CLAIMS, CURVES, Side, own

ROOT = Path(__file__).resolve().parents[1]


def number(record):
    """A measurement's mean with its interval; of one side that is to be small, the side itself."""
    if "mean" not in record:
        return "–"
    mean, low, high = (record[name] for name in ("mean", "low", "high"))
    if " < " in record["measure"]:
        mean, low, high = 0 - mean, 0 - high, 0 - low
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def runs(record):
    """How many are measured, where that is not all."""
    if record["runs"] in (0, record["wanted"]):
        return ""
    return f" ({record['runs']} of {record['wanted']} runs)"


def otherwise(record):
    """What the interval over motions says, where that is another verdict."""
    other = record["by motion"]
    if other["verdict"] == record["verdict"]:
        return ""
    middle = f"{number(record | other)}, " if "low" in other else ""
    return f" (over motions {middle}{other['verdict']})"


def page(result):
    """docs/claims.md."""
    lines = ["# The papers' claims on the tiny world", "", result["about"], "",
             "| no. | claim | the papers' figures | ours, with a 95 % interval | verdict |",
             "|---|---|---|---|---|"]
    for key, row in result["claims"].items():
        claim = CLAIMS[int(key)]
        ours = "<br>".join(f"{measure.figure} {number(one)}{runs(one)}".strip()
                           for measure, one in zip(claim.measures, row["measures"]))
        lines.append(f"| {key} | {claim.text} ({claim.source}) | {claim.figures} | {ours} | "
                     f"{row['verdict']}{otherwise(row)} |")
    if registered.FINDINGS:
        lines += ["", "## What a second look found", ""]
        lines += [f"- **{key}**: {text}" for key, text in registered.FINDINGS.items()]
    pictures = [f"![{p.stem}](../assets/{p.name})\n" for p in CHARTS if p.is_file()]
    lines += ["", *pictures, registered.preamble(), "", *details(result), *arms()]
    return "\n".join([*lines, ""])


def details(result):
    """Every measurement: its sides, its margin, and what came of it."""
    lines = []
    for key, row in result["claims"].items():
        claim = CLAIMS[int(key)]
        lines.append(f"**{key}. {claim.text}.** {claim.limits}".strip() + "\n")
        for measure, one in zip(claim.measures, row["measures"]):
            why = f" ({measure.why})" if measure.why else ""
            at = "; " * ("at" in one) + " and ".join(
                f"{side} (looks {100 * looks:.0f} %)" for side, looks in one.get("at", {}).items())
            lines.append(f"- {one['measure']}{why}: {number(one)}, {one['runs']} of "
                         f"{one['wanted']} runs, {one['verdict']}{otherwise(one)}{at}")
        lines.append("")
    return lines


def arms():
    """What is trained, what is read, and the tiny model's own settings."""
    lines = ["## The arms", "", "| arm | what is trained |", "|---|---|"]
    for arm, values in ARMS.items():
        settings = " ".join(f"`{s}`" for s in values.get("settings", ())).replace("|", "\\|")
        more = [f"{k} {v}" for k, v in values.items() if k not in ("settings", "method")]
        borrows = next(iter(registered.trials_of(arm).values())).borrows
        more += [f"look of {borrows.method}, {borrows.clips} clip"] if borrows else []
        more = ", ".join(more)
        lines.append(f"| {arm} | {values['method']} {settings} {more} |")
    lines += ["", "Figures:", "", *(f"- *{k}*: {v}" for k, v in lab.FIGURES.items()), "",
              "Rates and steps that the tiny model has beside the methods' own:", ""]
    return lines + [f"- {name}: `{line}`" for name, line in train.TINY.items()]


def point(figures, x, side, figure):
    """[(x, mean, low, high)] of a side, or [] where nothing is measured."""
    values = figures.side(side, figure)
    return [(x, *lab.interval(list(values.values())))] if values else []


def methods_chart(figures):
    """Motion against appearance, each method from its own start."""
    panels = []
    for title, arms in (("ten clips", registered.TEN), ("one clip", registered.ONE)):
        series = []
        for arm in ("base", *arms):
            side = own(arm)
            x = 100 * mean(figures.side(side, "all three"))
            series.append(Series(arm, point(figures, x, side, "agreement"), False))
        panels.append(Panel(title, "videos that look as asked, %", "agreement", series))
    return panels


def curves_chart(figures):
    """Over training steps, the LoRA's scale, and α."""
    panels = []
    looks = ("all three", "videos that look as asked"), ("copy", "looks copied from clips")
    for figure, title in (("agreement", "agreement"), *looks):
        series = []
        for arm in CURVES:
            points = []
            for step in kept_steps(arm):
                points += point(figures, step or registered.STEPS, at(own(arm), step), figure)
            series.append(Series(arm, points))
        panels.append(Panel(title, "training steps", "", series))
    scales, alphas = [], []
    for figure in ("agreement", "steady"):
        rows = [point(figures, s, Side(registered.MD1, Cell(scale=s)), figure)
                for s in registered.SCALES]
        scales.append(Series(figure, sum(rows, [])))
    panels.append(Panel(registered.MD1, "scale of the LoRA", "", scales))
    for figure in ("agreement", "copy"):
        rows = [point(figures, a, Side(arm), figure) for a, arm in registered.ALPHAS.items()]
        alphas.append(Series(figure, sum(rows, [])))
    return [*panels, Panel("newmove", "α", "", alphas)]


def latents_chart(figures):
    """Two motions in two looks: the frames' latents before and after φ, along the two directions in
    which they vary most, in order of frames."""
    names, panels = [(m, look) for m in registered.NAMED[:2] for look in range(2)], []
    for title, change in (("before φ", lambda z: z), ("after φ", debias)):
        points = torch.cat([change(latents(*name))[0].transpose(0, 1).flatten(1)
                            for name in names])
        points = points - points.mean(0)
        flat = (points @ torch.linalg.svd(points, full_matrices=False)[2][:2].T).tolist()
        series = []
        for i, (motion, look) in enumerate(names):
            mine = flat[i * world.FRAMES : (i + 1) * world.FRAMES]
            series.append(Series(f"{motion}, look {look + 1}", [tuple(p) for p in mine]))
        panels.append(Panel(title, "first direction", "second", series))
    return panels


def rounded(value):
    """Numbers to four digits after the point, within lists and objects."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


CHARTS = {ROOT / "assets" / "claims-methods.svg": methods_chart,
          ROOT / "assets" / "claims-curves.svg": curves_chart,
          ROOT / "assets" / "claims-latents.svg": latents_chart}
