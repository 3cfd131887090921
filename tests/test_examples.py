"""The README's worked examples: each diff applies to the code as it is, and what it adds works."""
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

FILES = ("*.py", "support", "scores", "tiny", "assets", "docs")


@pytest.fixture
def copy(tmp_path):
    """The code in a folder of its own."""
    folder = tmp_path / "code"
    folder.mkdir()
    for pattern in FILES:
        for path in ROOT.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("work"))
            else:
                shutil.copy(path, folder)
    return folder


def run(folder, *command):
    """A command in the copy; what it printed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def added(diff):
    """How many lines a diff adds, and to how many files."""
    lines = diff.read_text().splitlines()
    files = sum(line.startswith("+++") for line in lines)
    return sum(line.startswith("+") for line in lines) - files, files


@pytest.mark.parametrize("name,method,keys", [
    ("attention", "steady", "unet."), ("embedding", "embeddings", "embedding."),
])
def test_an_example_applies_learns_and_acts(copy, name, method, keys):
    diff = ROOT / "docs" / "examples" / f"{name}.diff"
    lines, files = added(diff)
    assert lines <= 30 and files <= 2
    run(copy, "git", "apply", str(diff))
    train = (sys.executable, "train.py", "--method", method, "--video", "assets/eight.mp4",
             "--preview-every", "0", "--seed", "3")
    run(copy, *train, "--steps", "4", "--out", "four")
    tensors = load_file(copy / "four" / f"{method}.safetensors")
    assert all(n.startswith(keys) for n in tensors)
    run(copy, *train, "--steps", "2", "--out", "resumed")
    run(copy, *train, "--steps", "4", "--out", "resumed", "--resume")
    again = load_file(copy / "resumed" / f"{method}.safetensors")
    assert all(torch.equal(t, again[n]) for n, t in tensors.items())
    videos = {}
    for scale in ("0", "8"):
        run(copy, sys.executable, "generate.py", "--adapter", f"four/{method}.safetensors",
            "--scale", scale, "--prompt", "a red star moving", "--steps", "2", "--init", "noise",
            "--out", scale)
        videos[scale] = next((copy / scale).glob("*.mp4")).read_bytes()
    assert videos["0"] != videos["8"]
