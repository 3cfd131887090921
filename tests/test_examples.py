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


def run(folder, *commands):
    """Run several commands (script, arguments) in one process."""
    loop = "for name, argv in json.loads(sys.argv[1]): importlib.import_module(name).main(argv)"
    script = [sys.executable, "-c", f"import importlib, json, sys\n{loop}", json.dumps(commands)]
    done = subprocess.run(script, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name,method,prefix", [
    ("attention", "steady", "unet"), ("embedding", "embeddings", "embedding"),
])
def test_an_example_applies_trains_resumes_and_samples(code, name, method, prefix):
    """Each changes at most 30 lines in at most two files. Before training, the distance between
    the attention maps and the base model's is 0."""
    diff = ROOT / "docs" / "examples" / f"{name}.diff"
    lines = diff.read_text().splitlines()
    changed = [line for line in lines if line[:1] in "+-" and line[:4] not in ("+++ ", "--- ")]
    assert len(changed) <= 30 and sum(line.startswith("+++ ") for line in lines) <= 2
    subprocess.run(["git", "apply", str(diff)], cwd=code, check=True)
    argv = ["--method", method, "--video", "assets/eight.mp4", "--preview-every", "0", "--frames",
            "4"]
    run(code, ("train", [*argv, "--steps", "3", "--out", "three"]),
        ("train", [*argv, "--steps", "2", "--out", "resumed"]),
        ("train", [*argv, "--steps", "3", "--out", "resumed", "--resume"]))
    tensors, again = (load_file(code / out / f"{method}.safetensors")
                      for out in ("three", "resumed"))
    assert {n.partition(".")[0] for n in tensors} - {"clip_latents"} == {prefix}
    assert all(torch.equal(t, again[n]) for n, t in tensors.items())
    if name == "attention":
        log = (code / "three" / "log.jsonl").read_text().splitlines()
        distances = [json.loads(line)["seen"][0]["distance"] for line in log if line]
        assert distances[0] == 0 and all(distance > 0 for distance in distances[1:])
    argv = ["--adapter", f"three/{method}.safetensors", "--prompt", "a red star moving", "--steps",
            "2", "--noise-prior", "0", "--frames", "4"]
    run(code, *(("generate", [*argv, "--scale", s, "--out", s]) for s in ("0", "8")))
    first, second = (next((code / s).glob("*.mp4")).read_bytes() for s in ("0", "8"))
    assert first != second
