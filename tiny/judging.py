"""From measured trials to verdicts: reading, differences with their intervals, and what they say.

The unit is a training run: a run's figure is the mean over its prompts, runs are paired by motion
and seed, and the interval that decides is a bootstrap over the pairs (`lab.interval`). Both runs of
a motion have its clips and prompts, so what the interval over motions would say is kept beside it.
"""
import functools
from dataclasses import replace

import torch

import model
from losses import debias
from support.files import read_json
from tiny import lab, registered, world
from tiny.lab import Cell
from tiny.registered import ARMS, Side, trials_of


def kept_steps(arm):
    """The steps whose adapters an arm keeps, the last as 0."""
    keep = ARMS[arm].get("keep")
    return [*range(keep, registered.STEPS, keep), 0] if keep else [0]


def at(side, step):
    """The side at a step that is kept."""
    return replace(side, cell=replace(side.cell, step=step), equal=False)


SO_FAR = " so far"  # of a verdict from half of the runs or more, but not all


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
    """{(motion, seed): number}, one a pair of trials, and how many there are to be."""
    if measure.listed in LISTS:
        return LISTS[measure.listed][1](figures)
    sides = (measure.more, measure.less)
    more, less = (figures.side(s, measure.figure) if s else None for s in sides)
    keys = [k for k in trials_of(next(s for s in sides if s).arm)
            if not measure.motions or k[0] in measure.motions]
    both = [k for k in keys if all(v is None or k in v for v in (more, less))]
    of = lambda values, key: values[key] if values is not None else 0.0
    return {key: of(more, key) - of(less, key) for key in both}, len(keys)


def verdict(low, high, above=0.0):
    """By the whole interval alone."""
    if low > above:
        return "agrees"
    return "disagrees" if high < above else "too close to call"


def judge(measure, figures):
    """A measurement's record: the mean difference with its interval, and the verdict; and both over
    motions, each the mean of its runs."""
    values, wanted = differences(measure, figures)
    record = {"measure": str(measure), "runs": len(values), "wanted": wanted,
              "verdict": "not measured", "by motion": {"verdict": "not measured"}}
    if values:
        middle, low, high = lab.interval(list(values.values()))
        record |= {"mean": middle, "low": low, "high": high, "differences": list(values.values())}
        so_far = SO_FAR * (len(values) < wanted)
        if len(values) >= wanted / 2:  # of which a seed is one half
            record["verdict"] = verdict(low, high, measure.above) + so_far
            _, low, high = lab.interval(by_motion(values))
            said = verdict(low, high, measure.above) + so_far
            record["by motion"] = {"low": low, "high": high, "verdict": said}
    if measure.more and measure.more.equal and values:
        sides = map(figures.at_equal_looks, (measure.more, measure.less))
        record["at"] = {str(side): mean(figures.side(side, "all three")) for side in sides}
    return record


def by_motion(values):
    """The mean over its runs of each motion: a list."""
    motions = {}
    for (motion, _), value in values.items():
        motions.setdefault(motion, []).append(value)
    return [sum(several) / len(several) for several in motions.values()]


def together(records):
    """A claim's verdict from those of its measurements."""
    said = [r["verdict"] for r in records]
    so_far = SO_FAR * any(v.endswith(SO_FAR) for v in said)
    said = [v.removesuffix(SO_FAR) for v in said]
    if "not measured" in said:
        return "not measured"
    return next((v for v in ("disagrees", "too close to call") if v in said), "agrees") + so_far


# Measurements that are no plain difference of two sides


def latents(motion, look):
    """Clean latents (1, C, F, h, w) of a motion in one of three looks, all from the same place."""
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


@functools.cache
def phi_values():
    """{(motion, 0): by how much φ lowers log(distance of looks / distance of motions)}."""
    motions = registered.NAMED + registered.RANDOM
    clips = {(m, look): latents(m, look) for m in motions for look in range(3)}
    values = {}
    for i, motion in enumerate(motions):
        other, log = motions[(i + 1) % len(motions)], {}
        for name, change in (("before", lambda z: z), ("after", debias)):
            apart = lambda a, b, f=change: (f(clips[a]) - f(clips[b])).norm().log()
            pairs = [apart((motion, k), (motion, (k + 1) % 3))
                     - apart((motion, k), (other, k)) for k in range(3)]
            log[name] = sum(pairs).item() / 3
        values[motion, 0] = log["before"] - log["after"]
    return values


def phi_list(figures):
    """What needs no training is measured when it is asked for."""
    return phi_values(), len(phi_values())


HALVING = [Side("base"), *(Side(registered.CAV, Cell(step=s)) for s in (150, 200, 250, 0))]


def bends(motion):
    """How a path bends: its second differences against its length."""
    path = world.trajectory(world.scenes_of(motion, 1, torch.Generator().manual_seed(0)))
    way = torch.stack([path.x[0], path.y[0]])
    return (way.diff(n=2).norm(dim=0).sum() / way.diff().norm(dim=0).sum()).item()


def halving_list(figures):
    """{(bendier motion, seed): number}, one a pair of runs, of it and of a smoother motion: steps
    that the motion learned until half of its gain, the first less the second."""
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
    values = {a: steps[a] - steps[b] for a, b in pairs if a in steps and b in steps}
    done = all(len(curve) == len(registered.MOTIONS) * len(registered.SEEDS) for curve in curves)
    return values, max(len(values), len(pairs) // 2) if done else len(pairs)


LISTS = {registered.PHI: ([], phi_list), registered.HALF: (HALVING, halving_list)}
