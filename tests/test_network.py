"""Another network in place of the UNet: only model.py and the layer sets depend on it."""
import re
from dataclasses import dataclass

import imageio.v3 as imageio
import pytest
import torch
from conftest import run_training
from safetensors.torch import load_file
from torch import nn

import generate
import lora
import model
from model import Attention, FeedForward, TimeEmbedding

WIDTH, PATCH = 32, 2


@dataclass
class Config:
    in_channels: int = 8
    sample_size: int = 8
    text_width: int = 64


class Layer(nn.Module):
    """Attention over the pixels of a frame, over text and over time, with feed-forward layers."""

    def __init__(self, config):
        super().__init__()
        for name, wide in (("space", None), ("text", config.text_width), ("time", None)):
            setattr(self, name, Attention(WIDTH, 2, 16, wide))
        self.space_ff, self.time_ff = FeedForward(WIDTH), FeedForward(WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x, text, temporal):  # x (B, F, N, C)
        fold, N = lambda y: y.flatten(0, 1), len(text)
        x = x + self.space(fold(self.norm(x))).view(x.shape)
        x = x + self.text(self.norm(x).reshape(N, -1, WIDTH), text).view(x.shape)
        x = x + self.space_ff(self.norm(x))
        if not temporal:
            return x
        y = self.norm(x).transpose(1, 2)
        x = x + self.time(fold(y)).view(y.shape).transpose(1, 2)
        return x + self.time_ff(self.norm(x))


class Transformer(nn.Module):
    """A small spatio-temporal transformer with the UNet's signature."""

    def __init__(self, config=Config()):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.patch = nn.Linear(config.in_channels * PATCH**2, WIDTH)
        self.frame = nn.Parameter(torch.randn(64, WIDTH))
        self.time_embedding = TimeEmbedding(WIDTH, WIDTH)
        self.layers = nn.ModuleList([Layer(config), Layer(config)])
        self.last = nn.Linear(WIDTH, config.in_channels * PATCH**2)

    def forward(self, latents, timesteps, text, temporal=True):
        B, C, frames, h, w = latents.shape
        x = latents.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # (B, C, F, h', p, w', p)
        x = self.patch(x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3))
        time = self.time_embedding(torch.as_tensor(timesteps).expand(B))
        x = x + time[:, None, None] + temporal * self.frame[:frames, None]
        x = x.repeat(len(text) // B, 1, 1, 1)
        for layer in self.layers:
            x = layer(x, text, temporal)
        x = self.last(x).view(-1, frames, h // PATCH, w // PATCH, C, PATCH, PATCH)
        return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(-1, C, frames, h, w)


LINEARS = r"(to_(q|k|v|out\.0)|net\.(0\.proj|2))"
LAYERS = {
    "temporal-attention-qkv": r"layers\..*\.time\.to_[qkv]\.weight",
    "temporal-attention-ff": rf"layers\..*\.time(_ff)?\.{LINEARS}\.weight",
    "spatial-self-attention-ff": rf"layers\..*\.space(_ff)?\.{LINEARS}\.weight",
    "coupled": rf"layers\..*\.(time|space)(_ff)?\.{LINEARS}\.weight",
}


@pytest.fixture(autouse=True)
def instead_of_the_unet(monkeypatch):
    """model.load_unet returns the transformer, and the layer sets have its names."""
    def load_unet(folder, device="cpu", dtype=torch.float32):
        torch.manual_seed(0)
        return Transformer().to(device).eval().requires_grad_(False)

    monkeypatch.setattr(model, "load_unet", load_unet)
    for name, pattern in LAYERS.items():
        monkeypatch.setitem(lora.LAYERS, name, pattern)


@pytest.mark.parametrize("method", ["coupled", "vmc", "motiondirector"])
def test_methods_train_it_and_samples_change(method, hop, tmp_path):
    out = tmp_path / "run"
    run_training(method, hop, out, "--steps", 4, "motion.lr=0.05", "--precision", "fp32")
    path = out / f"{method}.safetensors"
    names = [n.removeprefix("unet.") for n in load_file(path) if n.startswith("unet.")]
    layers = lora.pattern_of("coupled")
    assert names and all(layers.fullmatch(re.sub(r"lora_[AB]\.", "", name)) for name in names)
    videos = []
    for scale in ("0", "1"):
        generate.main(["--adapter", str(path), "--scale", scale, "--prompt", "a red star",
                       "--steps", "2", "--frames", "4", "--noise-prior", "0", "--precision",
                       "fp32", "--device", "cpu", "--out", str(tmp_path / scale)])
        video = next((tmp_path / scale).glob("*.mp4"))
        videos.append(torch.from_numpy(imageio.imread(video).astype("float32")))
    assert (videos[0] - videos[1]).abs().mean() > 1  # of 255
