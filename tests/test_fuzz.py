"""Broken inputs, and inputs that must work: a part of fuzz.py's campaign, and all of it."""
import signal

import fuzz
import pytest


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What the cases spoil, and in this process what is the same for all of them."""
    place = tmp_path_factory.mktemp("fuzz") / "stock"
    place.mkdir()
    with fuzz.stocked(place):
        yield place


@pytest.mark.parametrize("cases,seed", [(8, 0), pytest.param(385, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [kind for kind in fuzz.KINDS if kind != "fine"])
def test_broken_inputs_are_refused_in_one_line_or_work(kind, cases, seed, place):
    counts, faults = fuzz.campaign(place, [(kind, n) for n in range(cases)], seed)
    assert not faults, "\n".join(faults)
    assert counts[kind]["refused"]


def test_what_must_work_does(place):
    _, faults = fuzz.campaign(place, [("fine", n) for n in range(len(fuzz.stock.FINE))], 0)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("code,said,must,outcome", [
    (2, "warning: x\nerror: x", "", "refused"), (0, "", "", "worked"), (0, "", "work", "worked"),
    (0, "", "refuse", "nonsense"), (2, "error: x", "work", "lost"), (2, "error: x\ny", "", "lines"),
    (2, "usage: x\nx: error: y", "", "lines"), (2, "", "", "lines"), (3, "error: x", "", "exit"),
    (1, "Traceback (most recent call last):\nValueError: x", "", "traceback"),
    (2, "Traceback (most recent call last):\nerror: x", "", "traceback"),
    (-signal.SIGABRT, "double free", "", "crash"), (-signal.SIGKILL, "", "", "hang"),
    (143, "stopped", "", "long"),
])
def test_faults_are_told_by_their_marks(code, said, must, outcome):
    assert fuzz.judge(code, said, must) == outcome


def test_a_file_that_is_not_the_output_is_told(place, tmp_path, monkeypatch):
    def litter(case):
        case.call(lambda argv: (case.folder / "stray").touch())

    monkeypatch.setitem(fuzz.KINDS, "litter", litter)
    assert fuzz.attempt(place, "litter", 0, 0)[1] == ["worked", "stray"]
