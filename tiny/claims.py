"""Do the methods do what the papers say? Their claims, tested in miniature on the tiny world.

    python tiny/claims.py --plan          # how many trials are left, and how long
    python tiny/claims.py                 # docs/claims.md, docs/claims.json, assets/claims-*.svg
    python tiny/claims.py --seed 0        # half of the trials; --seed 1 beside it on another core
    python tiny/claims.py --register      # the page with what is done so far; trains nothing
    python tiny/claims.py --quick         # a minute; proves nothing

What is compared, and what decides, is in tiny/registered.py and was written down before the first
result. "Agrees" is said only where the whole 95 % interval of every measurement lies on the paper's
side, "disagrees" where that of any lies wholly on the other; "so far" where some of the runs are
still to be made. Trials are kept under out/lab, where tiny/lab.py has its own, their figures in
docs/trials.json too; what is done is skipped the next time, so stop it whenever you like.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tqdm import tqdm  # noqa: E402

from support import adapter_file  # noqa: E402
from support.files import publish, read_json, write_json  # noqa: E402
from support.machine import keep_memory, run  # noqa: E402
from tiny import claims_page, judging, lab, registered  # noqa: E402
from tiny.charts import chart  # noqa: E402
from tiny.judging import LISTS, at, kept_steps  # noqa: E402
from tiny.lab import Cell  # noqa: E402
from tiny.registered import ARMS, CLAIMS, CURVES, Side, own, trials_of  # noqa: E402

TRAINING, SAMPLING = 35, 8  # seconds of a trial and of a cell, before any was measured
QUICK = (17, 20, 21)

# ------------------------------------------------------------------------------------------------
# What there is to do


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
    todo = {}
    for (_, trial), cells in sorted(rows.items(), key=lambda row: row[0][0]):
        todo.setdefault(trial, {}).update(cells)
    return {trial: list(cells) for trial, cells in todo.items()}


def missing(todo, out, seed=None):
    """What is not measured yet of a plan, or of its trials of one seed: {trial: cells}."""
    left = {}
    for trial, cells in todo.items():
        path = trial.folder(out) / "figures.json"
        known = read_json(path) if path.is_file() else {}
        cells = [cell for cell in cells if cell.name not in known]
        if cells and seed in (None, trial.seed):
            left[trial] = cells
    return left


def seconds_of(left, out):
    """{trial: an estimate of what it still takes}: its cells, and the training of itself and of all
    that joins it, unless that is done or counted before."""
    counted, seconds = set(), {}
    for trial, cells in left.items():
        joined = [other for cell in cells for other in (cell.look, cell.motion)]
        needed = {trial, trial.borrows, *joined} - {None} - counted
        counted |= needed
        seconds[trial] = SAMPLING * len(cells) + sum(training_of(one, out) for one in needed)
    return seconds


def training_of(trial, out):
    """Seconds that training it still takes, from others of its method where there are any."""
    if trial.method == "base" or (trial.folder(out) / "seconds.json").is_file():
        return 0
    done = [read_json(p)["trial"]["seconds"] for p in out.glob(f"{trial.method}-*/figures.json")]
    return sorted(done)[len(done) // 2] if done else TRAINING


def work(left, out):
    """Train and sample what is not done yet."""
    seconds = seconds_of(left, out)
    bar = tqdm(total=sum(seconds.values()), unit="s", unit_scale=True, desc="claims")
    for trial, cells in left.items():
        bar.set_postfix_str(trial.folder(out).name)
        lab.measure(trial, out, cells)
        bar.update(seconds[trial])


# ------------------------------------------------------------------------------------------------
# Writing


def report(claims, out, to, about, charts=True):
    """Judge what is done, and write it: the JSON, the page, the charts."""
    figures, rows = judging.Figures(out), {}
    for number in claims:
        records = [judging.judge(measure, figures) for measure in CLAIMS[number].measures]
        over_motions = judging.together([r["by motion"] for r in records])
        rows[str(number)] = {"verdict": judging.together(records),
                             "by motion": {"verdict": over_motions}, "measures": records}
    result = {"about": about, "commit": lab.commit(), "claims": rows,
              "base": adapter_file.fingerprint(judging.encoder().unet)}
    write_json(to / "claims.json", claims_page.rounded(result))
    for path, draw in claims_page.CHARTS.items() if charts else ():
        chart(path, draw(figures))
    with publish(to / "claims.md") as part:
        part.write_text(claims_page.page(result))
    for number, row in rows.items():
        print(f"{number:>3} {row['verdict']:18} {CLAIMS[int(number)].text}")
    print(to / "claims.md")


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
    out = args.out / lab.base_model()
    if not args.quick:
        lab.restore(out)
    todo = plan(claims, charts)
    left = missing(todo, out, args.seed)
    hours = sum(seconds_of(left, out).values()) / 3600
    print(f"{len(todo)} trials, {sum(map(len, todo.values()))} cells; left: "
          f"{len(left)} trials, about {hours:.1f} hours of a core")
    if args.plan:
        return
    if not args.register:
        work(left, out)
    if to == lab.KEPT.parent and args.seed is None:
        lab.keep(out)
    if args.seed is None:
        report(claims, out, to, about, charts)


if __name__ == "__main__":
    run(main)
