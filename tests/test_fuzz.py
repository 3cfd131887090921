"""Broken inputs, and inputs that must work: a part of fuzz.py's campaign, and all of it."""
from pathlib import Path

import fuzz
import pytest


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """What the cases spoil, and in this process what is the same for all of them."""
    place = tmp_path_factory.mktemp("fuzz") / "stock"
    place.mkdir()
    with fuzz.stocked(place):
        yield place


@pytest.mark.parametrize("cases,seed", [(12, 0), pytest.param(385, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [kind for kind in fuzz.KINDS if kind != "fine"])
def test_broken_inputs_are_refused_in_one_line_or_work(kind, cases, seed, place):
    counts, faults = fuzz.campaign(place, [(kind, n) for n in range(cases)], seed)
    assert not faults, "\n".join(faults)
    assert counts[kind]["refused"] and not counts[kind]["long"]


def test_what_must_work_does(place):
    _, faults = fuzz.campaign(place, [("fine", n) for n in range(len(fuzz.stock.FINE))], 0)
    assert not faults, "\n".join(faults)


def test_the_campaign_tells_every_fault(place, monkeypatch):
    """A command that does each of them."""
    def bad(argv):
        act = {"traceback": lambda: 1 / 0, "lines": lambda: print("error: a\nb", file=fuzz.sys.stderr)
               or fuzz.sys.exit(2), "crash": fuzz.os.abort, "exit": lambda: fuzz.sys.exit(3),
               "nonsense": lambda: None, "stray": lambda: Path("x").write_text("x"),
               "hang": lambda: fuzz.signal.pthread_sigmask(0, range(1, 16)) and None
               or fuzz.time.sleep(99), "lost": lambda: fuzz.sys.exit("error: x")}
        act[argv[0]]()

    monkeypatch.setattr(fuzz, "LIMIT", 0.1)
    monkeypatch.setattr(fuzz, "PATIENCE", 0.1)
