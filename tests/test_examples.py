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


EXAMPLES = {  # file: the prefixes of its names in the adapter
    "attention": "unet", "features": "unet", "two-clips": "unet", "time-warp": "warp",
    "motion-inversion": "embedding", "motion-matcher": "unet",
}
PUBLISHED = ("motion-inversion", "motion-matcher")
UNCHANGED = ("attention", "features")  # their second loss is 0 before training


def test_every_example_is_tested_and_in_the_readme():
    files = (ROOT / "docs" / "examples").iterdir()
    assert {f"{name}.diff" for name in EXAMPLES} == {path.name for path in files}
    readme = (ROOT / "README.md").read_text()
    assert all(f"(docs/examples/{name}.diff)" in readme for name in EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short(name):
    """Ideas: at most 30 added and removed lines in at most two files. Published methods: at most 70
    lines, with those of context."""
    lines = (ROOT / "docs" / "examples" / f"{name}.diff").read_text().splitlines()
    changed = [line for line in lines if line[:1] in "+-" and line[:4] not in ("+++ ", "--- ")]
    context = [line for line in lines if line[:1] == " "]
    assert len(changed) + len(context) <= 70 and sum(line[:4] == "+++ " for line in lines) <= 2
    assert name in PUBLISHED or len(changed) <= 30


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_applies_trains_resumes_and_samples(code, name, hop):
    """All trained tensors change from zero, and the scale of the adapter changes the video."""
    diff = ROOT / "docs" / "examples" / f"{name}.diff"
    subprocess.run(["git", "apply", str(diff)], cwd=code, check=True)
    method = "steady" if name == "attention" else name
    clips = ["assets/eight.mp4", *([str(hop)] if name == "two-clips" else [])]
    argv = ["--method", method, "--video", *clips, "--preview-every", "0", "--frames", "4"]
    run(code, ("train", [*argv, "--steps", "2", "--out", "two"]),
        ("train", [*argv, "--steps", "1", "--out", "resumed"]),
        ("train", [*argv, "--steps", "2", "--out", "resumed", "--resume"]))
    tensors, again = (load_file(code / out / f"{method}.safetensors") for out in ("two", "resumed"))
    assert {n.partition(".")[0] for n in tensors} - {"clip_latents"} == {EXAMPLES[name]}
    assert all(torch.equal(t, again[n]) and t.any() for n, t in tensors.items())
    if name in UNCHANGED:
        log = (code / "two" / "log.jsonl").read_text().splitlines()
        distances = [json.loads(line)["seen"][0]["distance"] for line in log if line]
        assert distances[0] == 0 and distances[1] > 0
    argv = ["--adapter", f"two/{method}.safetensors", "--prompt", "a red star moving", "--steps",
            "2", "--noise-prior", "0", "--frames", "4"]
    run(code, *(("generate", [*argv, "--scale", s, "--out", s]) for s in ("0", "8")))
    first, second = (next((code / s).glob("*.mp4")).read_bytes() for s in ("0", "8"))
    assert first != second
