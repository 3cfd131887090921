"""fp16: training with loss scaling, on the CPU."""
import functools
import math

import pytest
import torch
from conftest import log_of, run_training, same_weights
from safetensors.torch import load_file

import train


def test_an_overflow_skips_the_step_and_resume_is_exact(hop, tmp_path, monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**26)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    for out, steps in (("whole", (12,)), ("parts", (5, 12))):
        for n in steps:
            run_training("vmc", hop, tmp_path / out, "--precision", "fp16", "--steps", n,
                         *["--resume"] * (n != steps[0]))
    skipped = [["skipped" in record for record in log_of(tmp_path / out)]
               for out in ("whole", "parts")]
    assert skipped[0][0] and not all(skipped[0])  # the scale falls until gradients are finite
    assert skipped[0] == skipped[1]
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_trains_in_fp16(method, hop, tmp_path):
    """Losses are finite over 50 steps, and the adapter is close to the one of fp32."""
    adapters = {}
    for precision in ("fp32", "fp16"):
        out = tmp_path / precision
        run_training(method, hop, out, "--precision", precision, "--steps", 50)
        adapters[precision] = load_file(out / f"{method}.safetensors")
        records = log_of(out)
        assert all(math.isfinite(record["loss"]) for record in records)
    names = [name for name in adapters["fp32"] if name != "clip_latents"]
    flat = {p: torch.cat([tensors[n].float().flatten() for n in names])
            for p, tensors in adapters.items()}
    error = (flat["fp16"] - flat["fp32"]).norm() / flat["fp32"].norm()
    print(f"{method}: {error:.4f}, {sum('skipped' in r for r in records)} steps skipped")
    assert error < 0.05, method
