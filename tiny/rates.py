"""Each method's learning rate on the tiny model, chosen once, on motions that the laboratory leaves
alone.

    python tiny/rates.py                  # docs/rates.json; half an hour on one core

Each is trained as in the laboratory at three rates, the middle one that of its recipe, and sampled
from its own start. The best is the highest product of the mean agreement with the clip's path and
the mean share of videos that look as asked. What is done is kept, with tiny/lab.py's trials.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tqdm import tqdm  # noqa: E402

from support.files import write_json  # noqa: E402
from support.machine import keep_memory, run  # noqa: E402
from tiny import lab, registered  # noqa: E402
from tiny.lab import Trial  # noqa: E402

# arm: the settings that get the rate, and the rates
RATES = {
    "newmove, one clip": (("motion.lr",), (3e-4, 1e-3, 3e-3)),
    "newmove": (("motion.lr",), (3e-4, 1e-3, 3e-3)),
    "vmc": (("motion.lr",), (3e-4, 1e-3, 3e-3)),
    "motiondirector, one clip": (("motion.lr", "look.lr"), (1e-3, 3e-3, 1e-2)),
    "customize-a-video": (("motion.lr",), (1e-3, 3e-3, 1e-2)),
}


def trial_of(arm, rate, motion):
    """An arm's trial at a rate; without kept steps, which nobody asks for here."""
    names, values = RATES[arm][0], registered.ARMS[arm] | {"keep": 0}
    settings = (*values.get("settings", ()), *(f"{name}={rate:g}" for name in names))
    return Trial(motion=motion, **values | {"settings": settings})


def main():
    """Measure, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "lab", help="where trials are")
    args = parser.parse_args()
    keep_memory()
    out = args.out / lab.base_model()
    todo = [(arm, rate, motion) for arm, (_, rates) in RATES.items() for rate in rates
            for motion in registered.RATES_FROM]
    found, mean = {}, lambda values: sum(values) / len(values)
    for arm, rate, motion in tqdm(todo, desc="rates"):
        trial, cell = trial_of(arm, rate, motion), registered.own(arm).cell
        figures = lab.measure(trial, out, [cell])[cell.name]
        row = found.setdefault(arm, {}).setdefault(f"{rate:g}", {"agreement": [], "all three": []})
        for name in row:
            row[name].append(round(mean(figures[name]), 3))
    for arm, rows in found.items():
        worth = {rate: mean(r["agreement"]) * mean(r["all three"]) for rate, r in rows.items()}
        found[arm] = {"best": max(worth, key=worth.get), "rates": rows}
        print(f"{arm:28}", *(f"{rate}: {worth[rate]:.2f} " for rate in rows), found[arm]["best"])
    write_json(ROOT / "docs" / "rates.json", {"motions": registered.RATES_FROM, "arms": found})


if __name__ == "__main__":
    run(main)
