"""docs/one_file.py gives the losses and the video of train.py and generate.py."""
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*command):
    """The output of a Python command that must succeed."""
    result = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_one_file_equals_train_and_generate(tmp_path):
    output = run("docs/one_file.py", "--steps", 2, "--out", tmp_path / "one.mp4")
    run("train.py", "--method", "vmc", "--video", "assets/eight.mp4", "--steps", 2,
        "--preview-every", 0, "--out", tmp_path / "run")
    run("generate.py", "--adapter", tmp_path / "run/vmc.safetensors", "--prompt",
        "a red star moving in a figure eight on a grey background", "--out", tmp_path / "videos")
    lines = (tmp_path / "run/log.jsonl").read_text().split("\n")
    losses = [json.loads(line)["loss"] for line in lines if line]
    assert f"step 0: loss {losses[0]:.4f}" in output
    assert f"mean loss of the last tenth: {losses[-1]:.4f}" in output
    video, = (tmp_path / "videos").glob("*.mp4")
    assert (tmp_path / "one.mp4").read_bytes() == video.read_bytes()
    assert "0.000, 2.000" in output and "172,032 parameters in 24 tensors" in output
    assert len((ROOT / "docs/one_file.py").read_text().splitlines()) <= 300
