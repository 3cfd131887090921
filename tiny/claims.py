"""Do the papers' claims hold on the tiny world? Run the comparisons of tiny/claims_spec.py.

    python tiny/claims.py                 # docs/claims.{md,json}, assets/claims-methods.svg
    python tiny/claims.py --seed 0        # half of the trials; --seed 1 in parallel on another core
    python tiny/claims.py --claims 17 20  # only these claims

A claim "agrees" only if the whole 95 % interval of every comparison is on the paper's side, and
"disagrees" if that of any comparison is on the other side. Trials that are recorded in
docs/trials.json or out/benchmark are not run again, so the command can be interrupted at any time.
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
from support.files import write_json, write_text  # noqa: E402
from support.machine import run, tune_malloc  # noqa: E402
from tiny import benchmark, claims_spec, world  # noqa: E402
from tiny.benchmark import Cell, Results, interval  # noqa: E402
from tiny.claims_spec import CLAIMS, Side, own, trials_of  # noqa: E402

DOCS = ROOT / "docs"

# --- Statistics ---------------------------------------------------------------------------------
# The unit is a training run: its value is the mean over its prompts, and runs are paired by motion
# and seed.


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
    short = lambda number: round(number, 4)
    middle, low, high = interval(numbers)
    record |= {"mean": short(middle), "low": short(low), "high": short(high),
               "differences": list(map(short, numbers)), "verdict": verdict(low, high, above)}
    _, low, high = interval(by_motion(values))
    over = verdict(low, high, above)
    record["by motion"] = {"low": short(low), "high": short(high), "verdict": over}
    if comparison.more and comparison.more.equal:
        sides = [at_equal_appearance(s, results) for s in (comparison.more, comparison.less)]
        record["at"] = {str(s): short(mean(values_of(s, "appearance", results))) for s in sides}
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


# --- Running ------------------------------------------------------------------------------------


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


# --- The page -----------------------------------------------------------------------------------


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


def page(text, result):
    """docs/claims.md with new results: the rows of the table, and the list of each claim. All other
    text is written by hand."""
    table = []
    for key, row in result["claims"].items():
        claim, records = CLAIMS[int(key)], row["comparisons"]
        values = "<br>".join(f"{comparison.metric} {number(record)}".strip()
                             for comparison, record in zip(claim.comparisons, records))
        verdict = row["verdict"] + over_motions(row)
        table.append(f"| [{key}](#claim-{key}) | {claim.text} | {values} | {verdict} |\n")
        bullets = "".join(map(bullet, claim.comparisons, records))
        bullets += f"- **{verdict.capitalize()}**\n" * (len(records) > 1)
        text = re.sub(rf"(^## Claim {key}\n.*\n\n)(- .*\n)+", lambda m, new=bullets: m[1] + new,
                      text, flags=re.MULTILINE)
    return re.sub(r"(^\| \[.*\n)+", lambda m: "".join(table), text, flags=re.MULTILINE)


def bullet(comparison, record):
    """A comparison and its result as a line of the page."""
    why = f" ({comparison.why})" if comparison.why else ""
    at = [f"; {s}: appearance {100 * v:.0f} %" for s, v in record.get("at", {}).items()]
    return (f"- {comparison}{why}: {number(record)}, {record['runs']} runs, {record['verdict']}"
            f"{over_motions(record)}{''.join(at)}\n")


# --- The chart ----------------------------------------------------------------------------------

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


# --- Command ------------------------------------------------------------------------------------


def main():
    """Measure the missing trials, evaluate and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--claims", type=int, nargs="+", choices=CLAIMS, metavar="NO.", help="print only these "
        "claims; writes no page")
    add("--seed", type=int, choices=claims_spec.SEEDS, help="only measure trials of this seed")
    add("--out", type=Path, default=ROOT / "out" / "benchmark", help="folder of new trials")
    args = parser.parse_args()
    tune_malloc()
    results, claims = Results(args.out / benchmark.base_model()), args.claims or list(CLAIMS)
    todo = plan(claims, chart=not args.claims)
    left = missing(todo, results, args.seed)
    print(f"{len(todo)} trials; left to measure: {len(left)}")
    for trial, cells in tqdm(left.items(), desc="trials", disable=not left):
        results.measure(trial, cells)
    if args.seed is not None:
        return
    rows = {}
    for key in claims:
        records = [evaluate(comparison, results) for comparison in CLAIMS[key].comparisons]
        rows[str(key)] = {"verdict": combine(records), "by motion": {
            "verdict": combine([r["by motion"] for r in records])}, "comparisons": records}
        print(f"{key:>3} {rows[str(key)]['verdict']:18} {CLAIMS[key].text}")
    if not args.claims:
        write({"base": benchmark.base_model(), "claims": rows}, results)


def write(result, results):
    """Write the records, the JSON, the page and the chart."""
    results.write()
    write_json(DOCS / "claims.json", result)
    write_text(DOCS / "claims.md", page((DOCS / "claims.md").read_text(), result))
    write_text(ROOT / "assets" / "claims-methods.svg", chart(results))


if __name__ == "__main__":
    run(main)
