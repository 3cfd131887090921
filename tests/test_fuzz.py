"""A seeded part of the campaign in fuzz.py, and inputs that must work.

    FUZZ_CASES=3000 SEED=1 pytest -m slow tests/test_fuzz.py                # the campaign
    FUZZ_FIRST=177 FUZZ_CASES=1 SEED=1 pytest -m slow tests/test_fuzz.py -k weights   # one case
"""
import json
import os
import signal
import subprocess
import sys

import fuzz
import fuzz_stock as stock
import pytest
from conftest import ROOT

from support.recipe import METHODS, write_value
from train import TINY

FIRST, CASES, SEED = (int(os.environ.get(name, default)) for name, default in (
    ("FUZZ_FIRST", 0), ("FUZZ_CASES", 3000), ("SEED", 1)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The stock of files, and all that the forks share."""
    place = tmp_path_factory.mktemp("fuzz") / "stock"
    with fuzz.stocked(place):
        yield place


@pytest.mark.parametrize("numbers,seed", [(range(4), 0), pytest.param(
    range(FIRST, FIRST + CASES // len(fuzz.KINDS) + 1), SEED, marks=pytest.mark.slow)],
    ids=("some", "all"))
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_inputs_are_refused_in_one_line_or_work(kind, numbers, seed, place):
    faults = fuzz.campaign(place, kind, numbers, seed)
    assert not faults, faults


TEXTS = ("中文 é 😀!", "-", "a\tb <script>alert(1)</script>", "../../x", "a " * 70, "100% {a} \\n")
ADAPTERS = [*(f"adapters/{name}.safetensors" for name in ("vmc", "motiondirector", "newmove")),
            *(f"foreign/{name}" for name in stock.FOREIGN)]


def unheard_of(folder):
    """Names of other versions in all configurations."""
    for path in folder.rglob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_name": None, "new": [1]}))


def caption(case, text):
    clip = case.take("clips/hop.mp4")
    clip.with_suffix(".txt").write_bytes(text.encode())
    case.train("--video", clip)


def all_settings(case, name):
    """A method with all its settings given, each with its default."""
    settings = METHODS[name].override(TINY[name]).settings().items()
    case.train(*fuzz.hop_of(case.place, name), *[
        f"{k}={write_value(v)}" for k, v in settings if k not in ("steps", "prior")])


def other_weights(case, change):
    folder = case.take("weights")
    change(folder)
    case.generate("--weights", folder, "--prompt", "a star", "--size", "64x64")


FINE = {  # {description: (function of a case and an input, inputs)}
    "a clip": (lambda case, name: case.train("--video", case.place / "clips" / name), stock.CLIPS),
    "an adapter": (lambda case, name: case.generate(
        "--adapter", case.place / name, "--prompt", "a star"), ADAPTERS),
    "a prompt": (lambda case, text: case.generate("--prompt", text), TEXTS),
    "a caption": (caption, TEXTS), "all settings": (all_settings, METHODS),
    "weights": (other_weights, (unheard_of,)),
    "to score": (lambda case, name: case.score(case.take(name)), ("set", "clips")),
}


@pytest.mark.parametrize("what", FINE)
def test_inputs_that_must_work(what, place):
    make, inputs = FINE[what]
    for one in inputs:
        def prepare(case, one=one):
            make(case, one)
            case.must = "work"

        fault = fuzz.attempt(place, prepare, what)[1]
        assert not fault, fault


def test_the_campaign_detects_tracebacks_hangs_other_files_and_wrong_results(place):
    def litter(case):
        case.call(lambda argv: (case.folder / "stray").touch())
        case.truth = lambda: ["other numbers"] * case.number

    assert fuzz.attempt(place, litter, "litter", 0)[0] == ["worked", "stray"]
    assert fuzz.attempt(place, litter, "litter", 1)[0] == ["nonsense", "stray"]
    assert fuzz.given(["--frames", "4", "rank=2", "--prompt", "a star"])[0]["--prompt"] == "a star"
    assert fuzz.differs("steps", 3, "4") and not fuzz.differs("steps", 3, "3.0")
    for code, text, must in (
            (0, "", "refuse"), (2, "error: x", "work"), (2, "error: x\ny", ""), (2, "", ""),
            (2, "Traceback (most recent call last):\nerror: x", ""), (3, "error: x", ""),
            (-signal.SIGABRT, "double free", ""), (-signal.SIGKILL, "", "")):
        assert fuzz.judge(code, text, must) not in fuzz.GOOD
    assert fuzz.judge(2, "warning: x\nerror: x", "") == "refused"


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
