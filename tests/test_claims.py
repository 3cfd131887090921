"""The laboratory's registration and its judging. What it measures is not tested here."""
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import data
import train
from support.files import read_json, write_json
from support.recipe import METHODS
from tiny import claims, claims_page, instruments, judging, lab, registered, world
from tiny.lab import Cell, Trial
from tiny.registered import CLAIMS, Measure, Side, trials_of

MEASURES = [(n, m) for n, claim in CLAIMS.items() for m in claim.measures]


def settings_of(trial):
    """{name: value} of all that a trial's method has, as these settings leave it."""
    return METHODS[trial.method].but(*trial.settings).settings()


def differs(a, b):
    """The names of what two trials differ in, beside their motion and seed."""
    if "base" in (a.method, b.method):
        return ["method"]
    names = {f.name for f in fields(Trial)} - {"motion", "seed", "settings", "keep"}
    out = [name for name in names if getattr(a, name) != getattr(b, name)]
    one, other = settings_of(a), settings_of(b)
    if a.method != b.method:  # each has its own recipe; how long it trains must be given, and equal
        given = [registered.LONG[0] in t.settings for t in (a, b)]
        return out + ["steps"] * (not all(given))
    return out + [name for name in one if one[name] != other[name]]


def test_every_claim_is_there():
    assert list(CLAIMS) == list(range(1, 28))
    assert all(claim.measures or claim.limits for claim in CLAIMS.values())
    assert all(m.listed in judging.LISTS or m.more or m.less for _, m in MEASURES)


@pytest.mark.parametrize("number, measure", MEASURES)
def test_sides_differ_in_one_thing(number, measure):
    more, less = measure.more, measure.less
    assert measure.listed or measure.figure in lab.FIGURES
    if not (more and less):
        return  # against a number
    apart = differs(trials_of(more.arm)["novel:0", 1] if "posture" not in more.arm else
                    trials_of(more.arm)["posture:0", 1],
                    next(t for k, t in trials_of(less.arm).items() if k[1] == 1))
    apart += [f.name for f in fields(Cell) if getattr(more.cell, f.name) !=
              getattr(less.cell, f.name)]
    apart += ["joins"] * (more.joins != less.joins)
    assert len(apart) == 1 or (apart and measure.why), (number, str(measure), apart)
    assert more.equal == less.equal


def test_the_laboratory_is_as_large_as_it_says():
    assert len(registered.NAMED) and len(registered.RANDOM) and lab.PROMPTS == 8
    for arm in registered.ARMS:
        trials = trials_of(arm)
        assert len(trials) == 16 and len({t.folder(Path()) for t in trials.values()}) == 16
    assert not {f"novel:{i}" for i in range(100, 104)} & set(registered.MOTIONS)
    everything = claims.plan(CLAIMS)
    assert len(everything) <= 600
    assert len({t.folder(Path()) for t in everything}) == len(everything)
    for trial in everything:  # a setting that its method lacks raises here
        if trial.method != "base":
            settings_of(trial)


def test_train_takes_every_arm(hop, tmp_path, monkeypatch):
    """That what is registered can be trained: no flag or setting is refused."""
    monkeypatch.setattr(lab, "write_clips", lambda folder, *clips: str(hop))
    monkeypatch.setattr(lab, "file_of", lambda *of: hop)  # an absorber to borrow
    for arm in registered.ARMS:
        trial = trials_of(arm)["posture:0" if "posture" in arm else "novel:0", 0]
        if trial.method != "base":
            train.parse(["--method", trial.method, *lab.flags_of(trial, tmp_path, tmp_path),
                         *trial.settings])


def test_the_page_says_what_is_registered():
    page = (ROOT / "docs" / "claims.md").read_text()
    assert registered.preamble() in page and all(str(m) in page for _, m in MEASURES)


def test_a_trial_that_differs_has_another_folder(monkeypatch):
    trial = Trial("vmc", "hopping")
    others = [Trial("vmc", "hopping", 1), replace(trial, backward=True), replace(trial, keep=50),
              replace(trial, settings=("loss=mse",)), replace(trial, looks=True),
              replace(trial, borrows=trial), Trial("vmc", "zigzagging")]
    names = {t.folder(Path()) for t in (trial, *others)}
    assert len(names) == len(others) + 1
    monkeypatch.setitem(train.TINY, "vmc", "steps=301")  # a recipe that changed since
    assert trial.folder(Path()) not in names


# ------------------------------------------------------------------------------------------------
# Judging


@pytest.mark.parametrize("low, high, above, wanted", [
    (0.01, 0.2, 0, "agrees"), (-0.01, 0.2, 0, "too close to call"), (-0.2, -0.01, 0, "disagrees"),
    (0.0, 0.0, 0, "too close to call"),  # no difference at all is none of the paper's
    (-0.04, 0.0, -0.05, "agrees"), (-0.2, 0.1, -0.05, "too close to call"),
    (-0.2, -0.06, -0.05, "disagrees")])
def test_verdict(low, high, above, wanted):
    assert judging.verdict(low, high, above) == wanted


def test_trials_are_kept_in_one_file_for_the_base_they_were_measured_on(tmp_path, monkeypatch):
    trial, cell = Trial("vmc", "hopping"), Cell(start="own")
    values = {name: [i / 8, 0.5] for i, name in enumerate(lab.FIGURES)}
    cells = [*lab.FROM_NOISE, *lab.FROM_OWN]
    write_json_in(trial.folder(tmp_path / "a"),
                  {c.name: values for c in cells} | {"trial": {"seconds": 7}})
    monkeypatch.setattr(lab, "KEPT", tmp_path / "trials.json")
    lab.keep(tmp_path / "a")
    lab.restore(tmp_path / "b")
    read = judging.Figures(tmp_path / "b")
    for i, name in enumerate(lab.FIGURES):
        assert read.of(trial, cell, name) == pytest.approx((i / 8 + 0.5) / 2, abs=1e-3)
    assert read.of(trial, Cell(step=50), "agreement") is None
    again = lab.measure(trial, tmp_path / "b")  # and is not trained again
    assert again.keys() == {"trial", *(c.name for c in cells)} and again["trial"]["seconds"] == 7
    drawn = lab.panel({"vmc": {"cells": lab.summary([again])}}).series
    assert [s.name for s in drawn] == ["base", "vmc"] and drawn[1].points[0][0] == 100 * sum(
        values["all three"]) / 2
    some = trial.folder(tmp_path / "c") / "figures.json"  # a cell is here, of a trial that has more
    write_json_in(some.parent, {cells[0].name: {"agreement": [0.25]}})
    lab.restore(tmp_path / "c")
    assert read_json(some)[cells[0].name] == {"agreement": [0.25]}
    assert all(cell.name in read_json(some) for cell in cells)
    monkeypatch.setattr(lab, "base_model", lambda: "another")
    lab.restore(tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_side_that_is_to_be_small_is_shown_itself():
    small = Measure("agreement", None, Side("vmc"), -0.3)
    record = {"measure": str(small), "mean": -0.18, "low": -0.25, "high": 0.0}
    assert claims_page.number(record) == "0.18 [0.00, 0.25]"
    record["measure"] = str(Measure("agreement", Side("vmc"), Side("base")))
    assert claims_page.number(record) == "-0.18 [-0.25, 0.00]"


def test_a_claim_agrees_only_where_all_of_it_does():
    said = lambda *verdicts: judging.together([{"verdict": v} for v in verdicts])
    assert said("agrees", "agrees") == "agrees"
    assert said("agrees", "too close to call") == "too close to call"
    assert said("agrees", "too close to call", "disagrees") == "disagrees"
    assert said("disagrees", "not measured") == "not measured"
    assert said("disagrees so far", "agrees") == "disagrees so far"
    assert said("agrees", "too close to call so far") == "too close to call so far"


def test_seeds_of_a_motion_count_as_one_in_the_methods_table():
    """Two motions that have 0 with one seed and 1 with the other are alike."""
    trials = [{"base, noise": {"agreement": [value]}} for value in (0.0, 1.0, 0.0, 1.0)]
    assert lab.summary(trials, 2)["base, noise"]["agreement"] == (0.5, 0.5, 0.5)
    middle, low, high = lab.summary(trials)["base, noise"]["agreement"]
    assert low < middle < high


def test_interval_has_the_width_that_the_runs_give():
    values = torch.randn(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    middle, low, high = lab.interval(values.tolist())
    error = values.std(correction=0).item() / 4
    assert middle == pytest.approx(values.mean().item())
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def fill(out, arm, cell, value, leave_out=0):
    """Write measured trials of an arm: value(run) a video, eight videos each."""
    for run, trial in enumerate(list(trials_of(arm).values())[leave_out:]):
        write_json_in(trial.folder(out), {cell.name: {"agreement": [value(run)] * 8}})


def write_json_in(folder, content):
    folder.mkdir(parents=True)
    write_json(folder / "figures.json", content)


def test_differences_are_paired_and_clustered_by_run(tmp_path):
    measure = Measure("agreement", Side("vmc"), Side("vmc, l2"))
    fill(tmp_path, "vmc", Cell(), lambda run: run + 0.5 + 0.01 * run)
    fill(tmp_path, "vmc, l2", Cell(), lambda run: run)
    record = judging.judge(measure, judging.Figures(tmp_path))
    assert record["differences"] == pytest.approx([0.5 + 0.01 * run for run in range(16)])
    # The runs differ by up to 15, but in pairs by 0.15 alone; and 128 videos are 16 runs.
    assert 0.54 < record["low"] < record["mean"] < record["high"] < 0.61
    assert record["high"] - record["low"] > 0.03
    assert record["verdict"] == "agrees"
    other = replace(measure, more=measure.less, less=measure.more)
    assert judging.judge(other, judging.Figures(tmp_path))["verdict"] == "disagrees"


def test_a_motion_whose_two_runs_agree_is_one_motion(tmp_path):
    """Both runs of every motion say the same: over motions the interval is √2 as wide, and says
    another thing, which the page shows."""
    measure, values = Measure("agreement", Side("vmc"), None), [1, 1, 1, 1, 1, -1, -1, 0]
    fill(tmp_path, "vmc", Cell(), lambda run: values[run // 2])
    record = judging.judge(measure, judging.Figures(tmp_path))
    other = record["by motion"]
    assert other["high"] - other["low"] == pytest.approx(
        2**0.5 * (record["high"] - record["low"]), rel=0.15)
    measure = replace(measure, above=(record["low"] + other["low"]) / 2)
    record = judging.judge(measure, judging.Figures(tmp_path))
    assert record["verdict"] == "agrees"
    assert record["by motion"]["verdict"] == "too close to call"
    assert claims_page.otherwise(record).endswith("too close to call)")
    assert not claims_page.otherwise(record | {"by motion": record})


@pytest.mark.parametrize("left_out, wanted", [
    (0, "agrees"), (1, "agrees so far"), (8, "agrees so far"), (9, "not measured")])
def test_a_verdict_says_whether_all_runs_are_measured(tmp_path, left_out, wanted):
    measure = Measure("agreement", Side("vmc"), None)
    fill(tmp_path, "vmc", Cell(), lambda run: 1.0, leave_out=left_out)
    record = judging.judge(measure, judging.Figures(tmp_path))
    assert (record["runs"], record["wanted"]) == (16 - left_out, 16)
    assert record["verdict"] == wanted


def test_what_is_measured_needs_no_training(tmp_path):
    trial, other = (Trial("vmc", "hopping", seed) for seed in (0, 1))
    todo = {trial: [Cell(), Cell(start="own")], other: [Cell(look=trial)]}
    write_json_in(trial.folder(tmp_path),
                  {c.name: {} for c in todo[trial]} | {"trial": {"seconds": 41}})
    left = claims.missing(todo, tmp_path)
    assert left == {other: todo[other]} and not claims.missing(todo, tmp_path, seed=0)
    # `other` is to be trained, and `trial` again: its figures are here, its adapter is not.
    assert claims.seconds_of(left, tmp_path) == {other: 2 * 41 + claims.SAMPLING}
    third = Trial("vmc", "hopping", keep=50)  # joined by the same one, which is trained once
    both = left | {third: [Cell(), Cell(look=trial)]}
    assert claims.seconds_of(both, tmp_path)[third] == 41 + 2 * claims.SAMPLING
    write_json(trial.folder(tmp_path) / "seconds.json", {"seconds": 41})  # its adapter is here
    assert claims.seconds_of(left, tmp_path) == {other: 41 + claims.SAMPLING}


def test_equal_looks_picks_the_step_nearest_to_the_level(tmp_path):
    looks = {50: 0.9, 100: 0.8, 150: 0.55, 0: 0.2}  # the base's are 0.7, and 0.9 of that is 0.63
    for trial in trials_of("base").values():
        write_json_in(trial.folder(tmp_path), {Cell().name: {"all three": [0.7]}})
    for trial in trials_of("newmove").values():
        cells = {Cell(step=s).name: {"all three": [v]} for s, v in looks.items()}
        write_json_in(trial.folder(tmp_path), cells)
    side = judging.Figures(tmp_path).at_equal_looks(Side("newmove", equal=True))
    assert side.cell.step == 150


def test_phi_takes_looks_away_by_what_the_formula_says(monkeypatch):
    """A look is the same in all frames, a motion nought in the anchor: φ makes of the one √2 − 1
    and of the other √2."""
    def latents(motion, look):
        path = torch.arange(4.0) * (1 + registered.MOTIONS.index(motion))
        return path.view(1, 1, 4, 1, 1) + torch.tensor([[3.0, 5, 9], [2, 7, 1]])[:, look].view(
            1, 2, 1, 1, 1)

    monkeypatch.setattr(judging, "latents", latents)
    values = judging.phi_values.__wrapped__()
    wanted = math.log(2**0.5 / (2**0.5 - 1))
    assert list(values.values()) == pytest.approx([wanted] * 8, rel=1e-4)


def test_steps_to_half_of_the_gain_are_of_the_bendier_less_the_smoother(tmp_path):
    assert judging.bends("moving right") < judging.bends("moving in a circle")
    assert judging.bends("moving in a circle") < judging.bends("hopping")
    order = sorted(registered.MOTIONS, key=judging.bends)
    bendy = lambda run: registered.MOTIONS[run // 2] in order[4:]
    for trial in trials_of("base").values():
        write_json_in(trial.folder(tmp_path), {Cell().name: {"agreement": [0.1]}})
    for run, trial in enumerate(trials_of(registered.CAV).values()):
        curve = [0.1, 0.2, 0.7, 0.9] if bendy(run) else [0.6, 0.8, 0.8, 0.9]  # of 0.8 more
        cells = {Cell(step=s).name: {"agreement": [v]} for s, v in zip((150, 200, 250, 0), curve)}
        write_json_in(trial.folder(tmp_path), cells)
    values, wanted = judging.halving_list(judging.Figures(tmp_path))
    assert wanted == 8 and list(values.values()) == [100] * 8  # the third step against the first


# ------------------------------------------------------------------------------------------------
# Reading


def read(trial, scenes, looks):
    """{figure: mean} of clips that the world draws."""
    video = world.render(scenes)
    video = video.flip(2) if trial.backward else video
    return {k: sum(v) / len(v) for k, v in lab.score(video, trial, looks).items()}


def test_score_knows_a_perfect_transfer_and_a_perfect_copy():
    trial = Trial("vmc", "posture:1", clips=3)
    scenes, looks = lab.scenes_of(trial)
    course = scenes.course[:1].expand(len(looks), -1, -1)
    perfect = read(trial, world.on_course(looks, course), looks)
    assert perfect["agreement"] > 0.95 and perfect["all three"] == 1 and perfect["posture"] > 0.8
    assert perfect["copy"] == perfect["leak"] == perfect["pan"] == 0
    same = scenes[torch.zeros(len(looks), dtype=torch.long)]
    copied = read(trial, same, looks)
    assert copied["agreement"] > 0.95 and copied["all three"] == 0
    assert copied["copy"] == copied["leak"] == 1 and copied["diversity"] == 0


def test_score_reads_a_motion_backward():
    trial = Trial("vmc", "novel:1", backward=True)
    scenes, looks = lab.scenes_of(trial)
    same = scenes[torch.zeros(2, dtype=torch.long)]
    assert read(trial, same, looks[torch.arange(2)])["agreement"] > 0.95
    forth = read(replace(trial, backward=False), same, looks[torch.arange(2)])
    assert forth["agreement"] > 0.95 and forth["backward"] < 0


def test_pans_and_jitter():
    g = torch.Generator().manual_seed(1)
    pans = world.scenes_of("standing still while the camera pans", 2, g)
    stands = world.scenes_of("standing still", 2, g)
    for scenes, wanted in ((pans, True), (stands, False)):
        video = world.render(scenes)
        reading = instruments.read(video)
        assert lab.pans(video, reading).tolist() == [wanted] * 2
        assert lab.jitter(reading).max() < 1


def test_whole_frames_are_patches_of_all(monkeypatch):
    video = torch.rand(3, 4, 16, 16)
    monkeypatch.setattr(data, "PATCH", (1.0, 1.0))
    got = data.crop(video, torch.Generator().manual_seed(0))
    assert any(torch.allclose(got[:, 0], video[:, f], atol=1e-5) for f in range(4))


# ------------------------------------------------------------------------------------------------
# End to end


def test_quick(tmp_path):
    command = [sys.executable, "tiny/claims.py", "--quick", "--out", str(tmp_path / "lab")]
    for more in ([], ["--plan"]):
        done = subprocess.run(command + more, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "left: 0 trials" in done.stdout  # what is done is skipped
    page = (tmp_path / "lab-quick" / "claims.md").read_text()
    assert "proves nothing" in page and "| 21 |" in page
