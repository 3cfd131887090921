"""Do the methods do what the papers say? Their claims, tested in miniature on the tiny world.

    python tiny/claims.py --plan          # how many trials are left, and how long
    python tiny/claims.py                 # docs/claims.md, docs/claims.json, assets/claims-*.svg
    python tiny/claims.py --seed 0        # half of the trials; --seed 1 beside it on another core
    python tiny/claims.py --register      # the page with what is done so far; trains nothing
    python tiny/claims.py --quick         # a minute; proves nothing

What is compared, and what decides, is in tiny/registered.py and was written down before the first
result. "Agrees" is said only where the whole 95 % interval of every measurement lies on the paper's
side, "disagrees" where that of any lies wholly on the other. Trials are kept under out/lab, where
tiny/lab.py has its own, and what is done is skipped the next time; stop it whenever you like.
"""
import argparse
import functools
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402
from losses import debias  # noqa: E402
from support import adapter_file  # noqa: E402
from support.files import publish, read_json, write_json  # noqa: E402
from support.machine import keep_memory  # noqa: E402
from tiny import lab, registered, world  # noqa: E402
from tiny.charts import Panel, Series, chart  # noqa: E402
from tiny.lab import Cell  # noqa: E402
from tiny.registered import ARMS, CLAIMS, CURVES, Side, own, trials_of  # noqa: E402

TRAINING, SAMPLING = 35, 8  # seconds of a trial and of a cell, before any was measured
QUICK = (17, 19, 20)

# ------------------------------------------------------------------------------------------------
# What there is to do


def kept_steps(arm):
    """The steps whose adapters an arm keeps, the last as 0."""
    keep = ARMS[arm].get("keep")
    return [*range(keep, 300, keep), 0] if keep else [0]


def at(side, step):
    """The side at a step that is kept."""
    return replace(side, cell=replace(side.cell, step=step), equal=False)


def sides_of(measure):
    """The sides that a measurement needs, each with one step."""
    sides = [s for s in (measure.more, measure.less) if s]
    if measure.listed in LISTS:
        sides = LISTS[measure.listed][0]
    out = []
    for side in sides:
        steps = kept_steps(side.arm) if side.equal else [side.cell.step]
        out += [at(side, step) for step in steps]
    return out


def shown():
    """The sides that only charts show."""
    sides = [at(own(arm), step) for arm in CURVES for step in kept_steps(arm)]
    sides += [Side(registered.MD1, Cell(scale=scale)) for scale in registered.SCALES]
    return sides + [Side("base"), *map(own, registered.METHODS)]


def plan(claims, charts=True):
    """{trial: its cells}, in the order in which claims are known soonest: all arms of one motion
    and seed, then the next."""
    sides = [s for n in claims for m in CLAIMS[n].measures for s in sides_of(m)]
    rows = {}
    for side in dict.fromkeys(sides + (shown() if charts else [])):
        for number, trial in enumerate(trials_of(side.arm).values()):
            rows.setdefault((number, trial), {})[side.cell_for(trial)] = True
            for other in (side.cell_for(trial).look, side.cell_for(trial).motion):
                if other:
                    rows.setdefault((number, other), {})
    todo = {}
    for _, trial in sorted(rows, key=lambda row: row[0]):
        todo.setdefault(trial, {})
    for (_, trial), cells in rows.items():
        todo[trial] |= cells
    return {trial: list(cells) for trial, cells in todo.items()}


def seconds_left(trial, cells, out):
    """An estimate of what a trial still takes, from others of its method where there are any."""
    if trial.method == "base" or (trial.folder(out) / "seconds.json").is_file():
        training = 0
    else:
        done = [read_json(p)["seconds"] for p in out.glob(f"{trial.method}-*/seconds.json")]
        training = sorted(done)[len(done) // 2] if done else TRAINING
    path = trial.folder(out) / "figures.json"
    known = read_json(path) if path.is_file() else {}
    return training + SAMPLING * sum(cell.name not in known for cell in cells)


def work(todo, out, seed=None):
    """Train and sample what is not done yet."""
    mine = {t: cells for t, cells in todo.items() if seed is None or t.seed == seed}
    left = {trial: seconds_left(trial, cells, out) for trial, cells in mine.items()}
    bar = tqdm(total=sum(left.values()), unit="s", unit_scale=True, desc="claims")
    for trial in [t for t in mine if left[t]]:
        bar.set_postfix_str(trial.folder(out).name)
        lab.learn(trial, out)
        if mine[trial]:
            lab.measure(trial, out, mine[trial])
        bar.update(left[trial])
    if not (out / "phi.json").is_file():
        measure_phi(out)


# ------------------------------------------------------------------------------------------------
# Reading and judging


class Figures:
    """What was measured, read once. Values are means over the prompts of a trial."""

    def __init__(self, out):
        self.out, self.files = out, {}

    def of(self, trial, cell, figure):
        """The mean of a figure, or None where it is not measured yet."""
        path = trial.folder(self.out) / "figures.json"
        if path not in self.files:
            self.files[path] = read_json(path) if path.is_file() else {}
        values = self.files[path].get(cell.name, {}).get(figure)
        return sum(values) / len(values) if values else None

    def side(self, side, figure):
        """{(motion, seed): value} of the trials that are measured."""
        if side.equal:
            side = self.at_equal_looks(side)
        values = {key: self.of(trial, side.cell_for(trial), figure)
                  for key, trial in trials_of(side.arm).items()}
        return {key: value for key, value in values.items() if value is not None}

    def at_equal_looks(self, side):
        """The side at the kept step whose looks are nearest to LEVEL of the base's."""
        base = mean(self.side(Side("base"), "all three"))
        steps = {}
        for step in kept_steps(side.arm):
            one = at(side, step)
            steps[abs(mean(self.side(one, "all three")) - registered.LEVEL * base)] = one
        return steps[min(steps)]


def mean(values):
    """Of a dict of numbers; NaN of none."""
    return sum(values.values()) / len(values) if values else float("nan")


def differences(measure, figures):
    """One number a pair of trials, and how many there are to be."""
    if measure.listed in LISTS:
        return LISTS[measure.listed][1](figures)
    sides = (measure.more, measure.less)
    more, less = (figures.side(s, measure.figure) if s else None for s in sides)
    keys = [k for k in trials_of(next(s for s in sides if s).arm)
            if not measure.motions or k[0] in measure.motions]
    both = [k for k in keys if all(v is None or k in v for v in (more, less))]
    of = lambda values, key: values[key] if values is not None else 0.0
    return [of(more, key) - of(less, key) for key in both], len(keys)


def verdict(low, high, above=0.0):
    """By the whole interval alone."""
    if low > above:
        return "agrees"
    return "disagrees" if high < above else "too close to call"


def judge(measure, figures):
    """A measurement's record: the mean difference with its interval, and the verdict."""
    values, wanted = differences(measure, figures)
    record = {"measure": str(measure), "runs": len(values), "wanted": wanted,
              "verdict": "not measured"}
    if values:
        middle, low, high = lab.interval(values)
        record |= {"mean": middle, "low": low, "high": high, "differences": values}
        if len(values) == wanted:
            record["verdict"] = verdict(low, high, measure.above)
    if measure.more and measure.more.equal and values:
        record["at"] = [str(figures.at_equal_looks(s)) for s in (measure.more, measure.less)]
    return record


def together(records):
    """A claim's verdict from those of its measurements."""
    said = {r["verdict"] for r in records}
    for one in ("not measured", "disagrees", "too close to call"):
        if one in said:
            return one
    return "agrees"


# Measurements that are no plain difference of two sides


def latents(motion, look):
    """Clean latents (F, C·h·w) of a motion in one of three looks, all from the same place."""
    scene = world.scenes_of(motion, 1, torch.Generator().manual_seed(0))
    colour, shape, ground = ((0, 1, 1), (4, 3, 2), (7, 5, 4))[look]
    index = lambda i: torch.tensor([i])
    middle = torch.tensor([world.SIZE / 2])
    scene = scene.but(colour=index(colour), shape=index(shape), background=index(ground),
                      x=middle, y=middle, reach=torch.tensor([15.0]), radius=torch.tensor([11.0]),
                      angle=torch.zeros(1))
    return encoder().encode(world.render(scene))


@functools.cache
def encoder():
    """The tiny model, for its VAE."""
    return model.load(precision="fp32")


def measure_phi(out):
    """One number a motion: by how much φ lowers log(distance of looks / distance of motions)."""
    motions = registered.NAMED + registered.RANDOM
    clips = {(m, look): latents(m, look) for m in motions for look in range(3)}
    values = []
    for i, motion in enumerate(motions):
        other, log = motions[(i + 1) % len(motions)], {}
        for name, change in (("before", lambda z: z), ("after", debias)):
            apart = lambda a, b, f=change: (f(clips[a]) - f(clips[b])).norm().log()
            pairs = [apart((motion, k), (motion, (k + 1) % 3))
                     - apart((motion, k), (other, k)) for k in range(3)]
            log[name] = sum(pairs).item() / 3
        values.append(log["before"] - log["after"])
    write_json(out / "phi.json", {"values": values})


def phi_list(figures):
    """What `measure_phi` wrote."""
    path = figures.out / "phi.json"
    values = read_json(path)["values"] if path.is_file() else []
    return values, len(registered.NAMED + registered.RANDOM)


HALVING = [Side("base"), *(Side(registered.CAV, Cell(step=s)) for s in (150, 200, 250, 0))]


def bends(motion):
    """How a path bends: its second differences against its length."""
    path = world.trajectory(world.scenes_of(motion, 1, torch.Generator().manual_seed(0)))
    way = torch.stack([path.x[0], path.y[0]])
    return (way.diff(n=2).norm(dim=0).sum() / way.diff().norm(dim=0).sum()).item()


def halving_list(figures):
    """One number a pair of runs, of a bendier motion and of a smoother one: steps that the motion
    learned until half of its gain, the first less the second."""
    curves = [figures.side(side, "agreement") for side in HALVING]
    steps = {}
    for key in curves[0]:
        if all(key in curve for curve in curves):
            gains = [curve[key] - curves[0][key] for curve in curves[1:]]
            if gains[-1] > 0.2:
                steps[key] = 50 * (1 + next(i for i, g in enumerate(gains) if g >= gains[-1] / 2))
    order = sorted(registered.MOTIONS, key=bends)
    half = len(order) // 2
    pairs = [((order[half + i], seed), (order[i], seed)) for i in range(half)
             for seed in registered.SEEDS]
    values = [steps[a] - steps[b] for a, b in pairs if a in steps and b in steps]
    done = all(len(curve) == len(registered.MOTIONS) * len(registered.SEEDS) for curve in curves)
    return values, len(values) if done else len(pairs)


LISTS = {registered.PHI: ([], phi_list), registered.HALF: (HALVING, halving_list)}

# ------------------------------------------------------------------------------------------------
# Writing


def page(result):
    """docs/claims.md."""
    number = lambda m: (f"{m['mean']:.2f} [{m['low']:.2f}, {m['high']:.2f}]" if "mean" in m
                        else "–")
    lines = ["# The papers' claims on the tiny world", "", result["about"], "",
             "| no. | claim | the papers' figures | ours, with a 95 % interval | verdict |",
             "|---|---|---|---|---|"]
    for key, row in result["claims"].items():
        claim = CLAIMS[int(key)]
        ours = "<br>".join(number(m) for m in row["measures"])
        lines.append(f"| {key} | {claim.text} ({claim.source}) | {claim.figures} | {ours} | "
                     f"{row['verdict']} |")
    if registered.FINDINGS:
        lines += ["", "## What looking into the disagreements found", ""]
        lines += [f"- **{key}**: {text}" for key, text in registered.FINDINGS.items()]
    lines += ["", *(f"![{p.stem}](../assets/{p.name})\n" for p in CHARTS if p.is_file()),
              registered.preamble(), ""]
    for key, row in result["claims"].items():
        claim = CLAIMS[int(key)]
        lines.append(f"**{key}. {claim.text}.** {claim.limits}".strip() + "\n")
        for measure, one in zip(claim.measures, row["measures"]):
            lines.append(f"- {one['measure']}" + (f" ({measure.why})" if measure.why else "")
                         + f": {number(one)}, {one['runs']} of {one['wanted']} runs, "
                         f"{one['verdict']}"
                         + (f"; {' and '.join(one['at'])}" if "at" in one else ""))
        lines.append("")
    lines += ["## The arms", "", "| arm | what is trained |", "|---|---|"]
    for arm, values in ARMS.items():
        settings = " ".join(f"`{s}`" for s in values.get("settings", ())).replace("|", "\\|")
        more = ", ".join(f"{k} {v}" for k, v in values.items() if k not in ("settings", "method"))
        lines.append(f"| {arm} | {values['method']} {settings} {more} |")
    lines += ["", "Figures:", "", *(f"- *{k}*: {v}" for k, v in lab.FIGURES.items()), "",
              "Rates and steps that the tiny model has beside the methods' own:", ""]
    lines += [f"- {name}: `{line}`" for name, line in train.TINY.items()]
    return "\n".join([*lines, ""])


CHARTS = tuple(ROOT / "assets" / f"claims-{name}.svg" for name in ("methods", "curves", "latents"))


def point(figures, x, side, figure):
    """[(x, mean, low, high)] of a side, or [] where nothing is measured."""
    values = figures.side(side, figure)
    return [(x, *lab.interval(list(values.values())))] if values else []


def methods_chart(figures):
    """Motion against appearance, each method from its own start; and over its kept steps."""
    panels = []
    for title, arms in (("ten clips", registered.TEN), ("one clip", registered.ONE)):
        series = []
        for arm in ("base", *arms):
            side = own(arm)
            x = mean(figures.side(side, "all three"))
            series.append(Series(arm, point(figures, x, side, "agreement"), False))
        panels.append(Panel(title, "looks as asked", "agreement", series))
    return panels


def curves_chart(figures):
    """Over training steps, the LoRA's scale, and α."""
    panels = []
    for figure in ("agreement", "all three"):
        series = []
        for arm in CURVES:
            points = []
            for step in kept_steps(arm):
                points += point(figures, step or 300, at(own(arm), step), figure)
            series.append(Series(arm, points))
        panels.append(Panel(figure, "training steps", figure, series))
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
        if not phi_list(figures)[0]:
            break
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


def report(claims, out, to, about, charts=True):
    """Judge what is done, and write it: the JSON, the page, the charts."""
    figures, rows = Figures(out), {}
    for number in claims:
        records = [judge(measure, figures) for measure in CLAIMS[number].measures]
        rows[str(number)] = {"verdict": together(records), "measures": records}
    result = {"about": about, "commit": lab.commit(), "claims": rows,
              "base": adapter_file.fingerprint(encoder().unet)}
    write_json(to / "claims.json", rounded(result))
    drawn = (methods_chart, curves_chart, latents_chart)
    for path, draw in zip(CHARTS, drawn if charts else ()):
        chart(path, draw(figures))
    with publish(to / "claims.md") as part:
        part.write_text(page(result))
    for number, row in rows.items():
        print(f"{number:>3} {row['verdict']:18} {CLAIMS[int(number)].text}")
    print(to / "claims.md")


def rounded(value):
    """Numbers to four digits after the point, within lists and objects."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def make_quick():
    """One motion, one seed, ten steps of training and four of sampling."""
    registered.MOTIONS, registered.SEEDS = registered.MOTIONS[:1], (0,)
    lab.PROMPTS, lab.STEPS = 2, 4
    for name, arm in ARMS.items():
        ARMS[name] = arm | {"settings": (*arm.get("settings", ()), "steps=10")}


def main():
    """Train, sample, judge, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--claims", type=int, nargs="+", choices=CLAIMS, metavar="NO.", help="only these")
    add("--seed", type=int, choices=registered.SEEDS, help="only trials of this seed of training; "
        "writes no page")
    add("--plan", action="store_true", help="only say what is left to do")
    add("--register", action="store_true", help="write the page from what is done")
    add("--quick", action="store_true", help="three claims in a minute; proves nothing")
    add("--out", type=Path, default=ROOT / "out" / "lab", help="where trials are kept")
    args = parser.parse_args()
    keep_memory()
    claims, to, about = args.claims or list(CLAIMS), ROOT / "docs", registered.ABOUT
    charts = not (args.quick or args.claims)
    if args.quick:
        make_quick()
        claims, args.out = args.claims or QUICK, args.out.with_name("lab-quick")
        about = "**A trial of the program, with hardly any training: this proves nothing.**"
    if args.quick or args.claims:
        to = args.out
    todo = plan(claims, charts)
    left = {t: seconds_left(t, cells, args.out) for t, cells in todo.items()}
    print(f"{len(todo)} trials, {sum(map(len, todo.values()))} cells; left: "
          f"{sum(map(bool, left.values()))} trials, about {sum(left.values()) / 3600:.1f} hours")
    if args.plan:
        return
    if not args.register:
        work(todo, args.out, args.seed)
    if args.seed is None:
        report(claims, args.out, to, about, charts)


if __name__ == "__main__":
    main()
