"""docs/colab.ipynb runs up to the download of the real weights, with few steps."""
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

from conftest import ROOT

CELLS = json.loads((ROOT / "docs" / "colab.ipynb").read_text(encoding="utf-8"))["cells"]
DONE = "!git clone", "!pip install"  # the test runs in a copy, offline


def run_cell(source, names):
    """Run a code cell as Jupyter does: %cd, !shell with {name} replaced, and Python."""
    python = []
    for line in source.replace("\\\n", " ").splitlines():
        if line.startswith("%cd "):
            os.chdir(line[4:])
        elif line.startswith("!") and not line.startswith(DONE):
            python.append(f"_shell({line[1:]!r})")
        elif not line.startswith("!"):
            python.append(line)
    exec("\n".join(python), names)


def shell(names, command):
    command = re.sub(r"\{(\w+)\}", lambda found: str(names[found[1]]), command)
    subprocess.run(["bash", "-c", command], check=True)


def test_the_notebook_runs(tmp_path, monkeypatch):
    skip = shutil.ignore_patterns(".*", "out", "__pycache__", "tests")
    shutil.copytree(ROOT, tmp_path / "motion", ignore=skip)
    monkeypatch.chdir(tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)  # for `python`
    shown, display = [], types.ModuleType("IPython.display")
    display.Video, display.display = lambda path, embed: Path(path).read_bytes(), shown.append
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    names = {}
    names["_shell"] = lambda command: shell(names, command)
    for cell in CELLS:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            if "hf download" in source:
                break
            run_cell(source.replace("300, 20", "1, 2"), names)
    assert names["TRAIN_STEPS"] == 1
    assert len(shown) == 2 + 4 + 2 + 1 and min(map(len, shown)) > 1000


def test_the_notebook_is_short_and_has_no_outputs():
    assert len(CELLS) <= 15
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in CELLS)
