"""A seeded part of the campaign in fuzz.py, and all inputs that must work.

    FUZZ_CASES=3000 SEED=1 pytest -m slow tests/test_fuzz.py     # the campaign
"""
import os
import signal
import subprocess
import sys

import fuzz
import pytest
from conftest import ROOT

KINDS = [kind for kind in fuzz.KINDS if kind != "fine"]
CASES, SEED = int(os.environ.get("FUZZ_CASES", 3000)), int(os.environ.get("SEED", 1))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The stock of files, and all that the forks share."""
    place = tmp_path_factory.mktemp("fuzz") / "stock"
    with fuzz.stocked(place):
        yield place


@pytest.mark.parametrize("cases,seed", [(4, 0), pytest.param(
    CASES // len(KINDS) + 1, SEED, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs_are_refused_in_one_line_or_work(kind, cases, seed, place):
    counts, faults = fuzz.campaign(place, [(kind, n) for n in range(cases)], seed)
    print(fuzz.table(counts))
    assert not faults, "\n".join(faults)


def test_inputs_that_must_work(place):
    _, faults = fuzz.campaign(place, [("fine", n) for n in range(len(fuzz.stock.FINE))], 0)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("code,text,must,outcome", [
    (2, "warning: x\nerror: x", "", "refused"), (0, "", "", "worked"), (0, "", "work", "worked"),
    (0, "", "refuse", "nonsense"), (2, "error: x", "work", "lost"), (2, "error: x\ny", "", "lines"),
    (2, "usage: x\nx: error: y", "", "lines"), (2, "", "", "lines"), (3, "error: x", "", "exit"),
    (1, "Traceback (most recent call last):\nValueError: x", "", "traceback"),
    (2, "Traceback (most recent call last):\nerror: x", "", "traceback"),
    (-signal.SIGABRT, "double free", "", "crash"), (-signal.SIGKILL, "", "", "hang"),
    (143, "stopped", "", "long")])
def test_outcomes_are_judged_by_exit_code_and_text(code, text, must, outcome):
    assert fuzz.judge(code, text, must) == outcome


def test_the_campaign_detects_other_files_and_wrong_results(place, tmp_path, monkeypatch):
    def litter(case):
        case.call(lambda argv: (case.folder / "stray").touch())
        case.truth = lambda: ["other numbers"] if case.number else []

    monkeypatch.setitem(fuzz.KINDS, "litter", litter)
    assert fuzz.attempt(place, "litter", 0, 0)[1] == ["worked", "stray"]
    assert fuzz.attempt(place, "litter", 1, 0)[1] == ["nonsense", "stray"]
    argv = ["--frames", "4", "rank=2", "--prompt", "a star"]
    assert fuzz.given(argv)[0]["--prompt"] == "a star"
    assert fuzz.differs("steps", 3, "4") and not fuzz.differs("steps", 3, "3.0")


@pytest.mark.parametrize("more,code", [({}, 0), ({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
                                               2)])
def test_the_c_locale_and_the_variables_of_other_launchers(more, code, place, tmp_path):
    """A process of its own. Without UTF-8 file names the command ends in one line."""
    (tmp_path / "prompts.txt").write_text("ein grüner Stern 中\n", "utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "RANK": "1",
                                "WORLD_SIZE": ""} | more
    done = subprocess.run(
        [sys.executable, ROOT / "generate.py", "--weights", place / "weights", "--size", "64x64",
         "--prompts", "prompts.txt", *fuzz.QUICK], cwd=tmp_path, env=environment,
        capture_output=True)
    assert done.returncode == code, done.stderr.decode()
    if code:
        assert done.stderr.decode().startswith("error: ") and done.stderr.count(b"\n") == 1
    else:
        assert "ein grüner Stern 中" in (tmp_path / "out/settings.json").read_text("utf-8")
        assert "ein grüner Stern 中" in done.stdout.decode("utf-8")
