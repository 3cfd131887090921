"""The documentation agrees with the code and the measurements, and its commands parse."""
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "benchmarks")]

import write  # noqa: E402

import eval  # noqa: E402
import generate  # noqa: E402
import train  # noqa: E402
from support.files import read_json  # noqa: E402
from support.recipe import METHODS  # noqa: E402
from tiny.claims import number as number_of  # noqa: E402

README = (ROOT / "README.md").read_text()
MAKE = (ROOT / "Makefile").read_text().replace("\\\n", "").replace("$(BIN)/", "").replace(
    "$(RUN)", "out/eight-vmc").partition("$$(")[0]
COMMANDS = re.findall(r"^\s*python (train|generate|eval)\.py (.*)$", README + MAKE, re.MULTILINE)


def test_methods_page_is_current():
    """If it fails, run `python docs/write.py`."""
    assert (ROOT / "docs" / "methods.md").read_text() == write.page()


def test_speed_page_has_the_measured_tables():
    """If it fails, run `python benchmarks/bench.py page`."""
    bench = pytest.importorskip("bench")
    page = (ROOT / "docs" / "speed.md").read_text()
    results = read_json(ROOT / "docs" / "speed.json")
    assert len(page.splitlines()) <= 120 and "cpu" in results
    for command, result in results.items():
        part = page.split(f"<!-- {command} -->")[1].split("<!-- end -->")[0]
        assert len(result["rows"]) >= 6
        for row in result["rows"]:
            assert bench.line_of(row) in part


@pytest.mark.slow
def test_benchmark_compares_the_same_computation(tmp_path):
    out = tmp_path / "dry.json"
    subprocess.run([sys.executable, ROOT / "benchmarks" / "bench.py", "dry", "--repeats", "1",
                    "--only", "(vmc|generate.py), fp32", "--out", out], check=True)
    training, sampling = read_json(out)["rows"]
    assert training["errors"] == sampling["errors"] == {}
    assert training["seconds"].keys() == {"ours", "diffusers"}
    assert sampling["difference"] < 1e-4


@pytest.mark.parametrize("script,flags", COMMANDS)
def test_commands_of_the_readme_parse(script, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("out/eight-vmc", "out/eight-motiondirector"):  # outputs of earlier commands
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").touch()
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "hop.mp4").touch()
    parse = {"train": train.parse, "generate": generate.parse, "eval": eval.parse}[script]
    parse([arg.replace("zeroscope_v2_576w", str(ROOT)) for arg in shlex.split(flags)])


def test_commands_of_the_readme_run_in_order(tmp_path, monkeypatch):
    """Each run has a folder of its own, and each adapter is used with the base model that it was
    trained on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "hop.mp4").touch()
    made = {}  # folder -> base model
    for script, line in re.findall(r"^python (train|generate)\.py (.*)$", README, re.MULTILINE):
        argv = [arg.replace("zeroscope_v2_576w", str(ROOT)) for arg in shlex.split(line)]
        if script == "train" and "--help" not in argv:
            flags, _ = train.parse(argv)
            folder = flags.out or flags.default_out
            assert folder not in made, line
            made[folder] = flags.weights
        elif script == "generate":
            flags = generate.parse(argv)
            for path in flags.adapter:
                assert made[path.parent] == flags.weights, line


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 240 and len(COMMANDS) >= 12


@pytest.mark.parametrize("page", ["README.md", "docs/base.md", "docs/claims.md",
                                  "docs/equations.md", "docs/exercises.md", "docs/methods.md",
                                  "docs/results.md", "docs/speed.md", "docs/tour.md"])
def test_links_of_a_page_exist(page):
    for path in re.findall(r"\]\(([\w./-]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(path).exists(), path


def test_the_example_method_of_the_readme_trains(hop, tmp_path, monkeypatch):
    code, = re.findall(r"```python\n(@method.*?)```", README, re.DOTALL)
    monkeypatch.setitem(METHODS, "mine", None)  # so that it is removed after the test
    del METHODS["mine"]
    exec(code, dict(vars(train)))
    train.main(["--method", "mine", "--video", str(hop), "--frames", "4", "--steps", "2",
                "--preview-every", "0", "--out", str(tmp_path / "out"), "weight=0.5"])
    assert (tmp_path / "out" / "mine.safetensors").is_file()


def test_every_setting_has_a_description():
    for recipe in METHODS.values():
        for action in recipe.parser()._actions:
            assert not action.help.startswith(" ("), f"{recipe.name}: {action.dest}"


def test_claims_table_of_the_readme_is_current():
    """If it fails, copy the rows and counts from docs/claims.md after `python tiny/claims.py`."""
    claims = read_json(ROOT / "docs" / "claims.json")["claims"]
    section = README.split("## Do the papers' claims hold?")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \| (.*) \|$", section, re.MULTILINE)
    assert 5 <= len(rows) <= 10
    for number, measured, verdict in rows:
        printed = re.findall(r"-?\d\.\d\d \[-?\d\.\d\d, -?\d\.\d\d\]", measured)
        true = [number_of(record) for record in claims[number]["comparisons"]]
        assert verdict == claims[number]["verdict"] and printed, number
        assert set(printed) <= set(true), number
    verdicts = [row["verdict"] for row in claims.values()]
    counts = re.findall(r"(\d+) (?:claims |are )?(agree|disagree|too close to call)\b", section)
    assert len(counts) == 3 and sum(int(count) for count, _ in counts) == len(claims)
    for count, verdict in counts:
        assert verdicts.count(verdict.replace("agree", "agrees")) == int(count), verdict


def test_methods_table_of_the_readme_is_current():
    """Agreement and appearance from each method's own start, or from noise if it has none."""
    methods = read_json(ROOT / "docs" / "results.json")["methods"]
    for name, row in methods.items():
        cells = row["cells"]
        own = cells.get("tuned, own start", cells["tuned, noise"])
        agreement, appearance = own["agreement"][0], 100 * own["appearance"][0]
        assert re.search(rf"^\| `{name}` .*\| {agreement:.2f}, {appearance:.0f} % \|$", README,
                         re.MULTILINE)


def test_files_section_lists_every_module():
    section = README.split("## Files")[1].split("\n## ")[0]
    for folder in ("", "support", "tiny"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.name == "__init__.py" or path.name in section, path
