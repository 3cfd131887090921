"""The benchmark and the papers' claims: specification, records, statistics and metrics."""
import math
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import data
import train
from support.files import read_json
from support.recipe import METHODS
from tiny import benchmark, claims, claims_spec, measurements, world
from tiny.benchmark import Cell, Results, Trial
from tiny.claims_spec import ARMS, CLAIMS, Comparison, Side, trials_of

COMPARISONS = [(n, c) for n, claim in CLAIMS.items() for c in claim.comparisons]


# ------------------------------------------------------------------------------------------------
# The specification


def settings_of(trial):
    """{name: value} of all settings of a trial's method. Raises for one that the method lacks."""
    return METHODS[trial.method].override(*trial.settings).settings(idle=True)


def differing(a, b):
    """The names of the fields and settings in which two trials differ, except motion and seed."""
    if "base" in (a.method, b.method):
        return ["method"]
    names = {f.name for f in fields(Trial)} - {"motion", "seed", "settings", "save_every"}
    out = [name for name in names if getattr(a, name) != getattr(b, name)]
    if a.method != b.method:  # each has its own recipe, but the number of steps must be the same
        return out + ["steps"] * (not all(claims_spec.LONG[0] in t.settings for t in (a, b)))
    one, other = settings_of(a), settings_of(b)
    return out + [name for name in one if one[name] != other[name]]


def test_every_claim_is_specified():
    assert list(CLAIMS) == list(range(1, 28))
    assert all(claim.comparisons for claim in CLAIMS.values())
    assert all(c.special in claims.SPECIAL or c.more or c.less for _, c in COMPARISONS)


@pytest.mark.parametrize("number, comparison", COMPARISONS)
def test_sides_differ_in_one_setting(number, comparison):
    more, less = comparison.more, comparison.less
    assert comparison.special or comparison.metric in benchmark.METRICS
    if not (more and less):
        return  # against a number
    first, second = (list(trials_of(side.arm).values())[1] for side in (more, less))
    apart = differing(first, second)
    apart += [f.name for f in fields(Cell)
              if getattr(more.cell, f.name) != getattr(less.cell, f.name)]
    apart += ["plus"] * (more.plus != less.plus)
    assert len(apart) == 1 or (apart and comparison.why), (number, str(comparison), apart)
    assert more.equal == less.equal


def test_size_of_the_benchmark():
    assert claims_spec.NAMED and claims_spec.RANDOM and benchmark.PROMPTS == 8
    for arm in ARMS:
        assert len(trials_of(arm)) == len({t.key for t in trials_of(arm).values()}) == 16
    assert not {f"novel:{i}" for i in range(100, 104)} & set(benchmark.MOTIONS)
    todo = claims.plan(CLAIMS)
    assert len(todo) == len({t.folder(Path()) for t in todo}) == len({t.key for t in todo}) <= 600


def test_train_accepts_every_arm(hop, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "write_clips", lambda folder, *clips: str(hop))
    monkeypatch.setattr(benchmark, "adapter_of", lambda *of: hop)  # an external absorber
    for arm in ARMS:
        trial = next(iter(trials_of(arm).values()))
        if trial.method != "base":
            train.parse(["--method", trial.method, *benchmark.flags_of(trial, tmp_path, tmp_path)])


# ------------------------------------------------------------------------------------------------
# Records


def test_nothing_is_left_to_measure_and_the_page_is_current(tmp_path):
    assert not claims.missing(claims.plan(CLAIMS), Results(tmp_path))
    for name, page in (("claims", claims.page), ("results", benchmark.page)):
        text = (ROOT / "docs" / f"{name}.md").read_text()
        old = re.sub(r"^([-|] .*)\d\.\d\d \[", r"\1? [", text, flags=re.MULTILINE)
        assert page(old, read_json(ROOT / "docs" / f"{name}.json")) == text and old != text
    text = (ROOT / "docs" / "claims.md").read_text()
    assert all(f"\n{c.text} ({c.source}: {c.numbers})." in text for c in CLAIMS.values())


def test_a_different_trial_has_another_key_and_folder(monkeypatch):
    trial = Trial("vmc", "hopping")
    others = [replace(trial, seed=1), replace(trial, backward=True), replace(trial, save_every=50),
              replace(trial, settings=("loss=mse",)), replace(trial, full_captions=True),
              replace(trial, absorber=trial), replace(trial, motion="zigzagging")]
    assert len({t.key for t in (trial, *others)}) == len(others) + 1
    before = trial.folder(Path())
    monkeypatch.setitem(train.TINY, "vmc", "steps=301")  # the recipe changed
    assert trial.folder(Path()) != before


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Empty results, with the record file in a temporary folder."""
    monkeypatch.setattr(benchmark, "RECORDS", tmp_path / "trials.json")
    return Results(tmp_path / "a")


def test_records_are_valid_for_their_base_model_and_recipes(results, tmp_path, monkeypatch):
    trial, cell = Trial("vmc", "hopping"), Cell(start="own")
    metrics = {name: i / 8 for i, name in enumerate(benchmark.METRICS)}
    results.add(trial, cell, metrics)
    assert Results(tmp_path / "a").cells(trial) == {cell.name: metrics}  # from its folder
    results.write()
    again = Results(tmp_path / "b")  # from the record file
    assert again.cells(trial)[cell.name] == pytest.approx(metrics, abs=1e-4)
    again.measure(trial, [cell])  # trains nothing
    assert not (tmp_path / "b").exists()
    monkeypatch.setitem(train.TINY, "vmc", "steps=301")
    assert not Results(tmp_path / "b").cells(trial)
    monkeypatch.undo()
    monkeypatch.setattr(benchmark, "RECORDS", tmp_path / "trials.json")
    monkeypatch.setattr(benchmark, "base_model", lambda: "another")
    assert not Results(tmp_path / "b").cells(trial)


# ------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize("low, high, above, expected", [
    (0.01, 0.2, 0, "agrees"), (-0.01, 0.2, 0, "too close to call"), (-0.2, -0.01, 0, "disagrees"),
    (0.0, 0.0, 0, "too close to call"), (-0.04, 0.0, -0.05, "agrees"),
    (-0.2, 0.1, -0.05, "too close to call"), (-0.2, -0.06, -0.05, "disagrees")])
def test_verdict(low, high, above, expected):
    assert claims.verdict(low, high, above) == expected


def test_a_claim_agrees_only_if_all_comparisons_do():
    combine = lambda *verdicts: claims.combine([{"verdict": v} for v in verdicts])
    assert combine("agrees", "agrees") == "agrees"
    assert combine("agrees", "too close to call") == "too close to call"
    assert combine("agrees", "too close to call", "disagrees") == "disagrees"
    assert combine("disagrees", "not measured") == "not measured"


def test_number_shows_the_side_that_must_be_small():
    small = Comparison("agreement", None, Side("vmc"), -0.3)
    record = {"comparison": str(small), "mean": -0.18, "low": -0.25, "high": 0.0}
    assert claims.number(record) == "0.18 [0.00, 0.25]"
    record["comparison"] = str(Comparison("agreement", Side("vmc"), Side("base")))
    assert claims.number(record) == "-0.18 [-0.25, 0.00]"


def test_the_table_counts_the_seeds_of_a_motion_once():
    trials = [{"base, noise": {"agreement": value}} for value in (0.0, 1.0, 0.0, 1.0)]
    assert benchmark.summary(trials, 2)["base, noise"]["agreement"] == (0.5, 0.5, 0.5)
    middle, low, high = benchmark.summary(trials)["base, noise"]["agreement"]
    assert low < middle < high


def test_width_of_the_interval():
    values = torch.randn(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    middle, low, high = benchmark.interval(values.tolist())
    error = values.std(correction=0).item() / 4
    assert middle == pytest.approx(values.mean().item())
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def fill(results, arm, value, cell=None, metric="agreement", skip=0):
    """Record value(run) for the trials of an arm."""
    for run, trial in enumerate(list(trials_of(arm).values())[skip:]):
        results.add(trial, cell or Cell(), {metric: value(run)})


def test_differences_are_paired_by_run(results):
    comparison = Comparison("agreement", Side("vmc"), Side("vmc, l2"))
    fill(results, "vmc", lambda run: run + 0.5 + 0.01 * run)
    fill(results, "vmc, l2", lambda run: run)
    record = claims.evaluate(comparison, results)
    assert record["differences"] == pytest.approx([0.5 + 0.01 * run for run in range(16)])
    # The runs differ by up to 15, but the pairs only by 0.15.
    assert 0.54 < record["low"] < record["mean"] < record["high"] < 0.61
    assert record["verdict"] == "agrees"
    other = replace(comparison, more=comparison.less, less=comparison.more)
    assert claims.evaluate(other, results)["verdict"] == "disagrees"


def test_two_equal_runs_of_a_motion_count_once_over_motions(results):
    """With equal runs per motion, the interval over motions is √2 as wide."""
    comparison, values = Comparison("agreement", Side("vmc")), [1, 1, 1, 1, 1, -1, -1, 0]
    fill(results, "vmc", lambda run: values[run // 2])
    record = claims.evaluate(comparison, results)
    other = record["by motion"]
    assert other["high"] - other["low"] == pytest.approx(
        2**0.5 * (record["high"] - record["low"]), rel=0.15)
    comparison = replace(comparison, above=(record["low"] + other["low"]) / 2)
    record = claims.evaluate(comparison, results)
    assert record["verdict"] == "agrees"
    assert claims.over_motions(record).endswith("too close to call)")
    assert not claims.over_motions(record | {"by motion": record})


def test_an_incomplete_comparison_has_no_verdict(results):
    fill(results, "vmc", lambda run: 1.0, skip=1)
    record = claims.evaluate(Comparison("agreement", Side("vmc")), results)
    assert (record["runs"], record["expected"], record["verdict"]) == (15, 16, "not measured")


def test_missing_cells(results):
    trial, other = (Trial("vmc", "hopping", seed) for seed in (0, 1))
    todo = {trial: [Cell(), Cell(start="own")], other: [Cell(appearance=trial)]}
    results.add(trial, Cell(), {})
    assert claims.missing(todo, results) == todo | {trial: [Cell(start="own")]}
    results.add(trial, Cell(start="own"), {})
    assert claims.missing(todo, results) == {other: todo[other]}
    assert not claims.missing(todo, results, seed=0)


def test_equal_appearance_selects_the_nearest_step(results):
    fill(results, "base", lambda run: 0.7, metric="appearance")  # 0.9 of it is 0.63
    for step, value in {50: 0.9, 100: 0.8, 150: 0.55, 0: 0.2}.items():
        fill(results, "newmove", lambda run, v=value: v, Cell(step=step), "appearance")
    side = claims.at_equal_appearance(Side("newmove", equal=True), results)
    assert side.cell.step == 150


def test_phi_effect_by_hand(monkeypatch):
    """The appearance is constant over frames, the motion zero in the anchor frame: φ multiplies the
    first by √2 − 1 and the second by √2."""
    def latents(motion, appearance):
        path = torch.arange(4.0) * (1 + claims_spec.MOTIONS.index(motion))
        codes = torch.tensor([[3.0, 5, 9], [2, 7, 1]])[:, appearance]
        return path.view(1, 1, 4, 1, 1) + codes.view(1, 2, 1, 1, 1)

    monkeypatch.setattr(claims, "latents", latents)
    values, count = claims.phi_effect(None)
    expected = math.log(2**0.5 / (2**0.5 - 1))
    assert count == 8 and list(values.values()) == pytest.approx([expected] * 8, rel=1e-4)


def test_halving_steps_by_hand(results):
    curvature = [claims.curvature(m) for m in ("moving right", "moving in a circle", "hopping")]
    assert curvature == sorted(curvature)
    curvy = sorted(claims_spec.MOTIONS, key=claims.curvature)[4:]
    fill(results, "base", lambda run: 0.1)
    curves = {True: [0.1, 0.2, 0.7, 0.9], False: [0.6, 0.8, 0.8, 0.9]}
    for i, step in enumerate((150, 200, 250, 0)):
        fill(results, claims_spec.CAV,
             lambda run, i=i: curves[claims_spec.MOTIONS[run // 2] in curvy][i], Cell(step=step))
    values, expected = claims.halving_steps(results)
    assert expected == 8 and list(values.values()) == [100] * 8  # the third step against the first


# ------------------------------------------------------------------------------------------------
# Metrics


def score(trial, scenes, expected):
    """{metric: mean} of rendered scenes."""
    video = world.render(scenes)
    video = video.flip(2) if trial.backward else video
    return {k: sum(v) / len(v) for k, v in benchmark.score(video, trial, expected).items()}


def test_score_of_a_perfect_transfer_and_of_a_copy():
    trial = Trial("vmc", "posture:1", clips=3)
    scenes, expected = benchmark.scenes_of(trial)
    keyframes = scenes.keyframes[:1].expand(len(expected), -1, -1)
    perfect = score(trial, world.with_keyframes(expected, keyframes), expected)
    assert perfect["agreement"] > 0.95 and perfect["appearance"] == 1 and perfect["posture"] > 0.8
    assert perfect["copy"] == perfect["leak"] == perfect["pan"] == 0
    copied = score(trial, scenes[torch.zeros(len(expected), dtype=torch.long)], expected)
    assert copied["agreement"] > 0.95 and copied["appearance"] == copied["diversity"] == 0
    assert copied["copy"] == copied["leak"] == 1


def test_score_of_a_reversed_motion():
    trial = Trial("vmc", "novel:1", backward=True)
    scenes, expected = benchmark.scenes_of(trial)
    rows = torch.zeros(2, dtype=torch.long)
    assert score(trial, scenes[rows], expected[torch.arange(2)])["agreement"] > 0.95
    forward = score(replace(trial, backward=False), scenes[rows], expected[torch.arange(2)])
    assert forward["agreement"] > 0.95 and forward["backward"] < 0


@pytest.mark.parametrize("motion, expected", [
    ("standing still while the camera pans", True), ("standing still", False)])
def test_pan_and_jitter(motion, expected):
    video = world.render(world.scenes_of(motion, 2, torch.Generator().manual_seed(1)))
    reading = measurements.read(video)
    assert benchmark.pans(video, reading).tolist() == [expected] * 2
    assert benchmark.jitter(reading).max() < 1


def test_a_patch_of_full_size_is_the_whole_frame(monkeypatch):
    video = torch.rand(3, 4, 16, 16)
    monkeypatch.setattr(data, "PATCH", (1.0, 1.0))
    patch = data.random_patch(video, torch.Generator().manual_seed(0))
    assert any(torch.allclose(patch[:, 0], video[:, f], atol=1e-5) for f in range(4))


# ------------------------------------------------------------------------------------------------
# End to end


def test_claims_are_trained_sampled_and_evaluated(results, tmp_path, monkeypatch, capsys):
    """Three claims on one motion, with ten training steps and four sampling steps."""
    monkeypatch.setattr(claims_spec, "MOTIONS", claims_spec.MOTIONS[:1])
    monkeypatch.setattr(claims_spec, "SEEDS", (0,))
    monkeypatch.setattr(benchmark, "PROMPTS", 2)
    monkeypatch.setattr(benchmark, "STEPS", 4)
    for name in ("vmc", "vmc, full captions"):
        monkeypatch.setitem(ARMS, name, ARMS[name] | {"settings": ("steps=10",)})
    monkeypatch.setattr(sys, "argv", ["claims.py", "--claims", "17", "20", "21", "--out",
                                      str(tmp_path)])
    for left in (2, 0):
        claims.main()
        printed = capsys.readouterr().out
        assert f"left to measure: {left}\n" in printed and " 20 " in printed
        assert "not measured" not in printed
