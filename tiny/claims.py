"""Do the papers' claims hold on the tiny world? Run the comparisons of tiny/claims_spec.py.

    python tiny/claims.py                 # docs/claims.{md,json}, assets/claims-methods.svg
    python tiny/claims.py --seed 0        # half of the trials; --seed 1 in parallel on another core
    python tiny/claims.py --quick         # one minute, hardly any training: a test of the program

A claim "agrees" only if the whole 95 % interval of every comparison is on the paper's side, and
"disagrees" if that of any comparison is on the other side. Trials that are recorded in
docs/trials.json or out/benchmark are not run again, so the command can be interrupted at any time.
Paragraphs of docs/claims.md that begin with **Finding** are written by hand and preserved.
"""
import argparse
import functools
import re
import sys
from dataclasses import replace
from html import escape
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import model  # noqa: E402
from losses import debias  # noqa: E402
from support.files import publish, write_json  # noqa: E402
from support.machine import keep_memory, run  # noqa: E402
from tiny import benchmark, claims_spec, world  # noqa: E402
from tiny.benchmark import Cell, Results, interval  # noqa: E402
from tiny.claims_spec import CLAIMS, Side, own, trials_of  # noqa: E402

QUICK = (17, 20, 21)

# ------------------------------------------------------------------------------------------------
# Statistics. The unit is a training run: its value is the mean over its prompts, and runs are
# paired by motion and seed.


def mean(values):
    """The mean of a dict's numbers; NaN if it is empty."""
    return sum(values.values()) / len(values) if values else float("nan")


def kept_steps(arm):
    """The steps whose adapters an arm keeps, the last one as 0."""
    every = claims_spec.ARMS[arm].get("save_every")
    return [*range(every, claims_spec.STEPS, every), 0] if every else [0]


def at_step(side, step):
    """The side at a kept step."""
    return replace(side, cell=replace(side.cell, step=step), equal=False)


def values_of(side, metric, results):
    """{(motion, seed): value} of the measured trials of a side."""
    if side.equal:
        side = at_equal_appearance(side, results)
    values = {}
    for key, trial in trials_of(side.arm).items():
        metrics = results.cells(trial).get(side.cell_for(trial).name, {})
        if metric in metrics:
            values[key] = metrics[metric]
    return values


def at_equal_appearance(side, results):
    """The side at the kept step whose appearance score is nearest to LEVEL of the base's."""
    target = claims_spec.LEVEL * mean(values_of(Side("base"), "appearance", results))
    steps = [at_step(side, step) for step in kept_steps(side.arm)]
    distance = lambda one: abs(mean(values_of(one, "appearance", results)) - target)
    return min(reversed(steps), key=distance)


def differences(comparison, results):
    """{(motion, seed): number}, one per pair of runs, and their expected count."""
    if comparison.special:
        return SPECIAL[comparison.special](results)
    sides = [s for s in (comparison.more, comparison.less) if s]
    measured = [values_of(side, comparison.metric, results) for side in sides]
    keys = [k for k in trials_of(sides[0].arm)
            if not comparison.motions or k[0] in comparison.motions]
    both = [k for k in keys if all(k in values for values in measured)]
    if len(sides) == 2:
        return {k: measured[0][k] - measured[1][k] for k in both}, len(keys)
    return {k: measured[0][k] if comparison.more else 0.0 - measured[0][k] for k in both}, len(keys)


def verdict(low, high, above=0.0):
    """The verdict of one interval."""
    if low > above:
        return "agrees"
    return "disagrees" if high < above else "too close to call"


def evaluate(comparison, results):
    """The record of a comparison: the mean difference with its interval over runs and the verdict;
    and the interval over motions, each the mean of its runs."""
    values, expected = differences(comparison, results)
    record = {"comparison": str(comparison), "runs": len(values), "expected": expected,
              "verdict": "not measured", "by motion": {"verdict": "not measured"}}
    if not values or len(values) < expected:
        return record
    numbers, above = list(values.values()), comparison.above
    middle, low, high = interval(numbers)
    record |= {"mean": middle, "low": low, "high": high, "differences": numbers,
               "verdict": verdict(low, high, above)}
    _, low, high = interval(by_motion(values))
    record["by motion"] = {"low": low, "high": high, "verdict": verdict(low, high, above)}
    if comparison.more and comparison.more.equal:
        sides = [at_equal_appearance(s, results) for s in (comparison.more, comparison.less)]
        record["at"] = {str(s): mean(values_of(s, "appearance", results)) for s in sides}
    return record


def by_motion(values):
    """The mean over the runs of each motion."""
    motions = {}
    for (motion, _), value in values.items():
        motions.setdefault(motion, []).append(value)
    return [sum(runs) / len(runs) for runs in motions.values()]


def combine(records):
    """A claim's verdict from the verdicts of its comparisons."""
    verdicts = [r["verdict"] for r in records]
    worst = ("not measured", "disagrees", "too close to call")
    return next((v for v in worst if v in verdicts), "agrees")


# Claim 17


@functools.cache
def pipeline():
    """The tiny model, for its VAE."""
    return model.load(precision="fp32")


def latents(motion, appearance):
    """Clean latents (1, C, F, h, w) of a motion with one of three appearances, at one position."""
    scene = world.scenes_of(motion, 1, torch.Generator().manual_seed(0))
    color, shape, ground = ((0, 1, 1), (4, 3, 2), (7, 5, 4))[appearance]
    index = lambda i: torch.tensor([i])
    middle = torch.tensor([world.SIZE / 2])
    scene = replace(scene, color=index(color), shape=index(shape), background=index(ground),
                    x=middle, y=middle, amplitude=torch.tensor([15.0]),
                    radius=torch.tensor([11.0]), angle=torch.zeros(1))
    return pipeline().encode(world.render(scene))


def phi_effect(results):
    """{(motion, 0): decrease by φ of log(distance of appearances / distance of motions)}, and their
    count. Requires no training."""
    motions = claims_spec.NAMED + claims_spec.RANDOM
    clips = {(m, look): latents(m, look) for m in motions for look in range(3)}
    debiased = {key: debias(z) for key, z in clips.items()}
    values = {}
    for i, motion in enumerate(motions):
        other = motions[(i + 1) % len(motions)]
        before, after = (sum(log_ratio(c, motion, other, k) for k in range(3)).item() / 3
                         for c in (clips, debiased))
        values[motion, 0] = before - after
    return values, len(values)


def log_ratio(clips, motion, other, k):
    """log(distance of one motion with two appearances / distance of two motions with one)."""
    distance = lambda a, b: (clips[a] - clips[b]).norm().log()
    return distance((motion, k), (motion, (k + 1) % 3)) - distance((motion, k), (other, k))


# Claim 26

HALVING = [Side("base"), *(Side(claims_spec.CAV, Cell(step=s)) for s in (150, 200, 250, 0))]


def curvature(motion):
    """The total second difference of a trajectory, divided by its length."""
    path = world.trajectory(world.scenes_of(motion, 1, torch.Generator().manual_seed(0)))
    points = torch.stack([path.x[0], path.y[0]])
    return (points.diff(n=2).norm(dim=0).sum() / points.diff().norm(dim=0).sum()).item()


def halving_steps(results):
    """{(curvier motion, seed): number}, one per pair of runs, of this motion and of a smoother one:
    the difference of the steps until half of the gain in agreement; and their expected count."""
    curves, steps = [values_of(side, "agreement", results) for side in HALVING], {}
    for key in curves[0]:
        if all(key in curve for curve in curves):
            gains = [curve[key] - curves[0][key] for curve in curves[1:]]
            if gains[-1] > 0.2:
                steps[key] = 50 * (1 + next(i for i, g in enumerate(gains) if g >= gains[-1] / 2))
    order = sorted(claims_spec.MOTIONS, key=curvature)
    half = len(order) // 2
    pairs = [((order[half + i], seed), (order[i], seed)) for i in range(half)
             for seed in claims_spec.SEEDS]
    values = {a: steps[a] - steps[b] for a, b in pairs if a in steps and b in steps}
    runs = len(claims_spec.MOTIONS) * len(claims_spec.SEEDS)
    complete = all(len(curve) == runs for curve in curves)
    return values, max(len(values), len(pairs) // 2) if complete else len(pairs)


SPECIAL = {claims_spec.PHI: phi_effect, claims_spec.HALF: halving_steps}


# ------------------------------------------------------------------------------------------------
# Running


def sides_of(comparison):
    """The sides to measure, each at one step."""
    if comparison.special:
        return HALVING if comparison.special == claims_spec.HALF else []
    sides = []
    for side in filter(None, (comparison.more, comparison.less)):
        steps = kept_steps(side.arm) if side.equal else [side.cell.step]
        sides += [at_step(side, step) for step in steps]
    return sides


def plan(claims, chart=True):
    """{trial: its cells}, ordered so that all arms of one motion and seed come before the next."""
    sides = [s for n in claims for c in CLAIMS[n].comparisons for s in sides_of(c)]
    if chart:
        sides += map(own, ("base", *claims_spec.TEN, *claims_spec.ONE))
    rows = [(number, trial, side.cell_for(trial)) for side in dict.fromkeys(sides)
            for number, trial in enumerate(trials_of(side.arm).values())]
    cells = {}
    for _, trial, cell in sorted(rows, key=lambda row: row[0]):
        cells.setdefault(trial, {})[cell] = True
    return {trial: list(unique) for trial, unique in cells.items()}


def missing(todo, results, seed=None):
    """The part of a plan that is not measured yet, of one seed or of all."""
    left = {}
    for trial, cells in todo.items():
        cells = [cell for cell in cells if cell.name not in results.cells(trial)]
        if cells and seed in (None, trial.seed):
            left[trial] = cells
    return left


# ------------------------------------------------------------------------------------------------
# The page


def number(record):
    """A comparison's mean with its interval; of a side that must be small, the value itself."""
    if "mean" not in record:
        return "–"
    mean, low, high = (record[name] for name in ("mean", "low", "high"))
    if " < " in record["comparison"]:
        mean, low, high = 0 - mean, 0 - high, 0 - low
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def over_motions(record):
    """The interval over motions, if its verdict differs."""
    other = record["by motion"]
    if other["verdict"] == record["verdict"]:
        return ""
    interval = f"{number(record | other)}, " if "low" in other else ""
    return f" (over motions: {interval}{other['verdict']})"


ABOUT = f"""Written by `python tiny/claims.py`. All comparisons were registered in
[claims_spec.py](../tiny/claims_spec.py) before the first result; its `ARMS` lists the settings of
every arm. A value is the mean difference over pairs of training runs, each averaged over
{benchmark.PROMPTS} prompts, with a 95 % bootstrap interval over the pairs. The pairs come from
{len(claims_spec.NAMED)} named and {len(claims_spec.RANDOM)} random motions that the base model has
never seen, and {len(claims_spec.SEEDS)} seeds. A positive difference favors the paper. A claim
*agrees* if the whole interval of every comparison is above its margin, and *disagrees* if that of
any is below.

The metrics are measured from pixels. *Agreement* is the correlation of the object's trajectory with
the clip's. *Appearance* is the share of videos whose color, shape and background are all those of
the prompt. [benchmark.py](../tiny/benchmark.py) defines all `METRICS`."""

LIMITS = """## What these results can and cannot show

- They show whether an effect of a loss, a layer set, a start or a caption exists in a small video
  diffusion model, with exact measurements and repeated runs.
- The tiny model is hundreds of times smaller than the papers' models, and its world has one object
  per clip. A disagreement can come from the world, from the base model or from this code.
- The model predicts v, so losses compare v; the papers' models predict ε.
- Methods are trained for 200 steps on ten clips, or for their own steps on one clip; NewMove's
  paper stops at an equal appearance score. The papers use one caption for all clips; here each clip
  has its own appearance and caption.
- Captions of NewMove, DreamBooth and Custom Diffusion name the appearance, as those of their
  regularization clips do. Captions of the other methods name the shape alone.
- Both runs of a motion share clip and prompts, so the page shows where the interval over the eight
  motions gives another verdict. Nothing corrects for the number of claims.
- Learning rates were chosen once, on two motions that are not used here ([rates.json](rates.json)).
"""


def page(result, findings):
    """docs/claims.md."""
    lines = ["# The papers' claims on the tiny world", "", result["about"], "",
             "| no. | claim | measured, with a 95 % interval | verdict |", "|---|---|---|---|"]
    for key, row in result["claims"].items():
        claim = CLAIMS[int(key)]
        values = "<br>".join(f"{c.metric} {number(record)}".strip()
                             for c, record in zip(claim.comparisons, row["comparisons"]))
        lines.append(f"| [{key}](#claim-{key}) | {claim.text} | {values} | {row['verdict']}"
                     f"{over_motions(row)} |")
    lines += ["", "![Motion against appearance](../assets/claims-methods.svg)", "", LIMITS.strip()]
    for key, row in result["claims"].items():
        claim = CLAIMS[int(key)]
        lines += ["", f"## Claim {key}", f"{claim.text} ({claim.source}: {claim.numbers}). "
                  f"**{row['verdict'].capitalize()}.** {claim.limits}".strip(), ""]
        for comparison, record in zip(claim.comparisons, row["comparisons"]):
            why = f" ({comparison.why})" if comparison.why else ""
            at = [f"; {side}: appearance {100 * v:.0f} %" for side, v in record.get("at", {}).items()]
            lines.append(f"- {record['comparison']}{why}: {number(record)}, {record['runs']} runs, "
                         f"{record['verdict']}{over_motions(record)}{''.join(at)}")
        if key in findings:
            lines += ["", findings[key]]
    return "\n".join([*lines, ""])


def read_findings(path):
    """{claim: the paragraph of a page that begins with **Finding**}."""
    text = path.read_text() if path.is_file() else ""
    sections = re.split(r"^## Claim (\d+)$", text, flags=re.MULTILINE)[1:]
    paragraphs = [re.search(r"^\*\*Finding.*?(?=\n\n|\Z)", s.strip(), re.MULTILINE | re.DOTALL)
                  for s in sections[1::2]]
    return {key: found[0] for key, found in zip(sections[::2], paragraphs) if found}


def rounded(value):
    """Numbers rounded to four digits, in nested lists and objects."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


# ------------------------------------------------------------------------------------------------
# The chart

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
WIDE, HIGH, LEFT, TOP = 330, 240, 52, 34  # of a panel's field and its margins, pixels


def chart(results):
    """The SVG of assets/claims-methods.svg: agreement against appearance, by method."""
    panels = []
    groups = (("ten clips", claims_spec.TEN), ("one clip", claims_spec.ONE))
    for i, (title, arms) in enumerate(groups):
        points = []
        for arm in ("base", *arms):
            x = 100 * mean(values_of(own(arm), "appearance", results))
            agreement = list(values_of(own(arm), "agreement", results).values())
            points.append((arm, x, *interval(agreement)))
        panels += panel(title, points, LEFT + i * (LEFT + WIDE + 24))
    return "\n".join(['<svg xmlns="http://www.w3.org/2000/svg" width="812" height="462" '
                      'font-family="sans-serif" font-size="12">',
                      '<rect width="100%" height="100%" fill="white"/>', *panels, "</svg>", ""])


def panel(title, points, left):
    """The SVG elements of one panel; points (name, x in per cent, y, low, high)."""
    at = lambda x, y: (left + x / 100 * WIDE, TOP + (1.0 - y) / 1.2 * HIGH)  # y from -0.2 to 1
    text = lambda x, y, what, more="": (
        f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(str(what))}</text>')
    out = [f'<rect x="{left}" y="{TOP}" width="{WIDE}" height="{HIGH}" fill="none" stroke="#999"/>',
           text(left, TOP - 12, title, 'font-weight="bold"'), text(left + 6, TOP + 14, "agreement"),
           text(left + WIDE / 2, TOP + HIGH + 34, "videos with the right appearance, %",
                'text-anchor="middle"')]
    for x in range(0, 101, 20):
        out.append(text(at(x, 0)[0], TOP + HIGH + 16, x, 'text-anchor="middle"'))
    for y in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        out.append(text(left - 6, at(0, y)[1] + 4, y, 'text-anchor="end"'))
        out.append(f'<path d="M{left} {at(0, y)[1]:.1f}h{WIDE}" stroke="#eee"/>')
    for i, (name, x, y, low, high) in enumerate(points):
        (x, y), low, high = at(x, y), at(x, low)[1], at(x, high)[1]
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLORS[i]}"/>'
                   f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{COLORS[i]}"/>')
        out.append(text(left, TOP + HIGH + 56 + 15 * i, f"● {name}", f'fill="{COLORS[i]}"'))
    return out


# ------------------------------------------------------------------------------------------------
# Command


def report(claims, results, to, about, with_chart):
    """Evaluate the claims; write the JSON, the page and the chart."""
    rows = {}
    for key in claims:
        records = [evaluate(comparison, results) for comparison in CLAIMS[key].comparisons]
        rows[str(key)] = {"verdict": combine(records), "by motion": {
            "verdict": combine([r["by motion"] for r in records])}, "comparisons": records}
        print(f"{key:>3} {rows[str(key)]['verdict']:18} {CLAIMS[key].text}")
    result = {"about": about, "base": benchmark.base_model(), "claims": rows}
    text = page(result, read_findings(to / "claims.md"))
    write_json(to / "claims.json", rounded(result))
    with publish(to / "claims.md") as part:
        part.write_text(text)
    if with_chart:
        with publish(ROOT / "assets" / "claims-methods.svg") as part:
            part.write_text(chart(results))
    print(to / "claims.md")


def make_quick():
    """One motion, one seed, ten training steps and four sampling steps."""
    claims_spec.MOTIONS, claims_spec.SEEDS = claims_spec.MOTIONS[:1], (0,)
    benchmark.PROMPTS, benchmark.STEPS = 2, 4
    for name, arm in claims_spec.ARMS.items():
        claims_spec.ARMS[name] = arm | {"settings": (*arm["settings"], "steps=10")}


def main():
    """Measure the missing trials, evaluate and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--claims", type=int, nargs="+", choices=CLAIMS, metavar="NO.", help="only these claims")
    add("--seed", type=int, choices=claims_spec.SEEDS, help="only trials of this training seed; "
        "writes no page")
    add("--quick", action="store_true", help="three claims in one minute; proves nothing")
    add("--out", type=Path, default=ROOT / "out" / "benchmark", help="folder of new trials")
    args = parser.parse_args()
    keep_memory()
    if args.quick:
        make_quick()
        args.out = args.out.with_name("quick")
    part = args.quick or bool(args.claims)
    claims = args.claims or (QUICK if args.quick else list(CLAIMS))
    results = Results(args.out / benchmark.base_model())
    todo = plan(claims, chart=not part)
    left = missing(todo, results, args.seed)
    print(f"{len(todo)} trials, {sum(map(len, todo.values()))} cells; left to measure: "
          f"{len(left)} trials")
    for trial, cells in tqdm(left.items(), desc="trials", disable=not left):
        results.measure(trial, cells)
    if args.seed is None:
        if not part:
            results.write()
        about = "**Hardly any training: this proves nothing.**" if args.quick else ABOUT
        report(claims, results, args.out if part else ROOT / "docs", about, not part)


if __name__ == "__main__":
    run(main)
