"""The scripts at ZeroScope's full size, with random weights. About 14 GB of memory, 6 GB of disk
and several minutes on two cores. Run with -m slow."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import FULL_TEXT, FULL_UNET, ROOT, log_of
from fuzz_stock import write_weights

import model
from support import media

pytestmark = pytest.mark.slow


def run(script, *flags):
    """Run a script, which must succeed."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, flags)], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def random_tensors(module):
    """Small fp16 weights for a module on the meta device, with norms near one."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, t in module.state_dict().items():
        fan = max(1, t[0].numel()) if t.dim() > 1 else 100
        x = torch.randn(t.shape, generator=generator, device="cpu") * (0.5 / fan**0.5)
        state[name] = (x + 1 if "norm" in name and name.endswith("weight") else x).half()
    return state


@pytest.fixture(scope="module")
def full_size_folder(tmp_path_factory):
    """A folder in the hub's layout, with all parts of ZeroScope's size."""
    folder = tmp_path_factory.mktemp("full")
    vae = {"block_out_channels": [128, 256, 512, 512], "scaling_factor": 0.18215}
    with torch.device("meta"):
        write_weights(folder, {
            "unet": (model.UNet, model.UNetConfig, FULL_UNET),
            "vae": (model.VAE, model.VAEConfig, vae),
            "text_encoder": (model.TextEncoder, model.TextConfig, FULL_TEXT)}, random_tensors)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(
        {"beta_schedule": "scaled_linear", "prediction_type": "epsilon", "steps_offset": 1,
         "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}))
    return folder


def test_two_training_steps_and_one_sampling_step(full_size_folder, tmp_path):
    """8 frames of 128×128, from the bundled clip."""
    size = ("--weights", full_size_folder, "--frames", 8, "--size", "128x128")
    clip = ROOT / "assets" / "eight.mp4"
    done = run("train.py", "--video", clip, "--steps", 2, "--preview-every", 0,
               "--out", tmp_path / "run", *size)
    print(done.stdout)
    assert "74,342,400 parameters in 96 tensors (the UNet has 1,411,233,860)" in done.stdout
    log = log_of(tmp_path / "run")
    assert len(log) == 2 and all(0 < line["loss"] < 2 and line["grad"] > 0 for line in log)
    print(log)
    run("generate.py", "--adapter", tmp_path / "run" / "vmc.safetensors", "--prompt", "a bird",
        "--steps", 1, "--out", tmp_path / "g", *size, "--refine", full_size_folder,
        "--refine-steps", 2, "--strength", 0.5, "--refine-size", "192x160")
    path, = (tmp_path / "g").glob("*.mp4")
    shapes = [image().shape for _, image in media.decode(path)]
    assert shapes == [(320, 384, 3)] * 8  # small videos are enlarged
