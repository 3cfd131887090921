"""The examples in docs/examples: each diff applies to the code, trains, resumes and samples."""
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

FILES = ("*.py", "support", "scores", "tiny", "assets")


@pytest.fixture
def code(tmp_path):
    """A copy of the code."""
    folder = tmp_path / "code"
    folder.mkdir()
    for path in (path for pattern in FILES for path in ROOT.glob(pattern)):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, folder / path.name)
    return folder


def run(folder, *command):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name,method,prefix", [
    ("attention", "steady", "unet."), ("embedding", "embeddings", "embedding."),
])
def test_an_example_applies_trains_resumes_and_samples(code, name, method, prefix):
    """Each adds at most 30 lines to at most two files. Before training, the distance between the
    attention maps and the base model's is 0."""
    diff = ROOT / "docs" / "examples" / f"{name}.diff"
    lines = diff.read_text().splitlines()
    changed = [line for line in lines if line[:1] in "+-" and line[:4] not in ("+++ ", "--- ")]
    assert len(changed) <= 30 and sum(line.startswith("+++ ") for line in lines) <= 2
    run(code, "git", "apply", str(diff))
    train = (sys.executable, "train.py", "--method", method, "--video", "assets/eight.mp4",
             "--preview-every", "0", "--frames", "4", "--seed", "3")
    run(code, *train, "--steps", "4", "--out", "four")
    run(code, *train, "--steps", "2", "--out", "resumed")
    run(code, *train, "--steps", "4", "--out", "resumed", "--resume")
    tensors, again = (load_file(code / out / f"{method}.safetensors")
                      for out in ("four", "resumed"))
    assert {n.split(".")[0] + "." for n in tensors if n != "clip_latents"} == {prefix}
    assert all(torch.equal(t, again[n]) for n, t in tensors.items())
    if name == "attention":
        log = (code / "four" / "log.jsonl").read_text().splitlines()
        distances = [row["seen"][0]["distance"] for row in map(json.loads, filter(None, log))]
        assert distances[0] == 0 and all(distance > 0 for distance in distances[1:])
    videos = set()
    for scale in ("0", "8"):
        run(code, sys.executable, "generate.py", "--adapter", f"four/{method}.safetensors",
            "--scale", scale, "--prompt", "a red star moving", "--steps", "2",
            "--noise-prior", "0", "--frames", "4", "--out", scale)
        videos.add(next((code / scale).glob("*.mp4")).read_bytes())
    assert len(videos) == 2
