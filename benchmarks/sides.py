"""The two sides that bench.py measures: the product, and the same loops with the diffusers UNet."""
import contextlib
import itertools
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import diffusers  # noqa: E402
import open_clip  # noqa: E402, F401  (must not be imported inside `with torch.device`)
import torch  # noqa: E402
from torch import nn  # noqa: E402

import lora  # noqa: E402
import model  # noqa: E402
import sampler  # noqa: E402
import train  # noqa: E402
from support import adapters, machine  # noqa: E402
from support.hub import TextConfig, UNetConfig, VAEConfig  # noqa: E402

PROMPT, GUIDANCE = "a ball doing the sks", 9.0
# Settings that make all steps of a run equal: both losses, the second stage, no augmentation.
EQUAL = {"motiondirector": ("spatial_prob=1",), "newmove": ("augment=none",),
         "customize-a-video": ("absorber_steps=0",)}
# Widths of UNet, VAE and text encoder, and the text encoder's layers.
SIZES = {"gpu": ([320, 640, 1280, 1280], [128, 256, 512, 512], 1024, 23),
         "dry": ([32, 32, 64, 64], [32, 32, 64, 64], 128, 2)}


# --- The product --------------------------------------------------------------------------------


def random_model(size, folder, device, precision="fp32", keep=None):
    """Stands in for model.load: ZeroScope's architecture in these widths, with random weights."""
    widths, vae, text, layers = size
    down, up = ["CrossAttnDownBlock3D"] * 3, ["CrossAttnUpBlock3D"] * 3
    config = UNetConfig(widths, text, [*down, "DownBlock3D"], ["UpBlock3D", *up],
                        attention_head_dim=min(64, widths[0]))
    torch.manual_seed(0)
    with torch.device(device):
        parts = [model.UNet(config), model.VAE(VAEConfig(vae)),
                 model.TextEncoder(TextConfig(text, 4 * text, layers, text // 64))]
    parts = [part.eval().requires_grad_(False) for part in parts]
    pipe = model.Pipeline(*parts, sampler.NoiseSchedule(), device, precision)
    if keep is not None:
        pipe.store_frozen(keep)
    return pipe


def prepare(here, row):
    """The run of a row's train.py command before its first step, on a clip of noise."""
    case, (frames, height, width) = row["case"].split()[1:], row["shape"]
    clips, out = here.scratch / "clips", tempfile.mkdtemp(dir=here.scratch)
    argv = ["--video", clips, "--prompt", PROMPT, "--device", here.device, "--frames", frames,
            "--size", f"{width}x{height}", "--fps", 8, "--precision", row["precision"],
            "--checkpointing", "off", "--preview-every", 0, "--out", out, *case]
    argv += ["--prior", clips] if "newmove" in case else []
    argv += ["--weights", here.scratch] if here.command in SIZES else []
    argv += EQUAL.get(case[1], ())
    with contextlib.redirect_stdout(None):
        return train.prepare(*train.parse([str(arg) for arg in argv]))


def training(here, row):
    """The training step of train.py."""
    run, count = prepare(here, row), itertools.count()
    parameters = list(run.trained.values())
    optimizer = lora.build_optimizer(run.recipe.parts, run.trainables)

    def step():
        train.one_step(run, next(count))
        run.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, run.recipe.max_grad_norm)
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


@torch.no_grad()
def sampling(here, row):
    """Guided DDIM to latents."""
    pipe = model.load(None, here.device, row["precision"], keep=())
    frames, *sides = row["shape"]
    shape = [pipe.unet.config.in_channels, frames, *(n // pipe.vae.config.factor for n in sides)]
    start = sampler.seeded_randn(shape, [0]).to(here.device)
    text, empty = pipe.encode_text([PROMPT]), pipe.encode_text([""])

    @torch.no_grad()
    def step():
        predict = sampler.classifier_free_guidance(pipe.predict, text, empty, GUIDANCE)
        return sampler.ddim(pipe.schedule, predict, start, row["steps"])

    return step


# --- The reference: the diffusers UNet in the same loops ----------------------------------------


def with_diffusers(build, here, row):
    """A side of the product, built with the diffusers UNet."""
    with (mock.patch.object(model, "load", partial(load_reference, model.load)),
          mock.patch.object(adapters, "fingerprint", lambda pipe: "")):
        return build(here, row)


def load_reference(load, folder, device, precision="fp32", keep=None):
    """Stands in for model.load: a pipeline with the diffusers UNet. Its weights are in fp32 for
    training, as in the official codes, and in the precision of the row for sampling."""
    pipe = load(folder, device)
    pipe.precision = precision
    with torch.device("meta"):
        unet = diffusers.UNet3DConditionModel.from_config(asdict(pipe.unet.config))
    dtype = machine.DTYPES[precision if keep == () else "fp32"]
    state = {name: tensor.to(dtype) for name, tensor in pipe.unet.state_dict().items()}
    unet.load_state_dict(state, assign=True)
    unet.forward = partial(forward, unet.forward)
    for name, module in unet.named_modules():  # bypass temporal layers for a single frame
        kind = name.split(".")[-2:-1]
        if name == "transformer_in" or kind == ["temp_attentions"]:
            module.forward = partial(temporal_layer, module.forward, lambda x: (x,))
        elif kind == ["temp_convs"]:
            module.forward = partial(temporal_layer, module.forward, lambda x: x)
    pipe.unet = unet.eval().requires_grad_(False)
    return pipe


def forward(diffusers_forward, x, t, text, temporal=True):
    """The diffusers forward pass with the interface of model.UNet.forward."""
    x = x.repeat(len(text) // len(x), 1, 1, 1, 1)
    t = t.to(x.device) if torch.is_tensor(t) else t
    return diffusers_forward(x, t, text).sample


def temporal_layer(layer_forward, skip, x, *args, num_frames, **more):
    """A temporal layer, bypassed for a single frame."""
    return layer_forward(x, *args, num_frames=num_frames, **more) if num_frames > 1 else skip(x)
