"""The two sides that bench.py measures: the product, and the official loops on the diffusers UNet.

As in the official code, the diffusers UNet keeps fp32 weights under autocast, LoRA layers wrap
linear layers, the text is encoded at every step (VMC: once), MotionDirector runs two forward passes
before its two backward passes, and NewMove batches the clip with the regularization clip. On both
sides latents are cached.
"""
import contextlib
import itertools
import sys
import tempfile
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

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
from losses import motiondirector, mse, residual_cosine_official  # noqa: E402
from support import machine  # noqa: E402
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


def train_ours(here, row):
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


def sampling_inputs(here, row):
    """A model, and (prompt states, empty states, starting latents)."""
    pipe = model.load(None, here.device, row["precision"], keep=())
    frames, *sides = row["shape"]
    shape = [pipe.unet.config.in_channels, frames, *(n // pipe.vae.config.factor for n in sides)]
    with torch.no_grad():
        start = sampler.seeded_randn(shape, [0]).to(here.device)
        return pipe, (pipe.encode_text([PROMPT]), pipe.encode_text([""]), start)


def sample_ours(here, row):
    """Guided DDIM to latents."""
    pipe, (text, empty, start) = sampling_inputs(here, row)

    @torch.no_grad()
    def step():
        predict = sampler.classifier_free_guidance(pipe.predict, text, empty, GUIDANCE)
        return sampler.ddim(pipe.schedule, predict, start, row["steps"])

    return step


# --- The official loops -------------------------------------------------------------------------


def load_unet(ours, dtype=torch.float32):
    """The diffusers UNet with the weights of the product's, frozen and in eval mode."""
    with torch.device("meta"):
        unet = diffusers.UNet3DConditionModel.from_config(asdict(ours.config))
    unet.load_state_dict({name: t.to(dtype) for name, t in ours.state_dict().items()}, assign=True)
    return unet.eval().requires_grad_(False)


class WrappedLinear(nn.Module):
    """A linear layer with a LoRA on top, as in the official MotionDirector code."""

    def __init__(self, linear, rank, dropout):
        super().__init__()
        new = partial(nn.Linear, bias=False, device=linear.weight.device)
        self.linear, self.dropout, self.scale = linear, nn.Dropout(dropout), 1.0
        self.down, self.up = new(linear.in_features, rank), new(rank, linear.out_features)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.linear(x) + self.dropout(self.up(self.down(x))) * self.scale


def skip_single_frames(unet):
    """Bypass the temporal layers for a single frame, as the official UNet does."""
    for name, module in unet.named_modules():
        kind = name.split(".")[-2:-1]
        if name == "transformer_in" or kind == ["temp_attentions"]:
            module.forward = partial(temporal_layer, module.forward, lambda x: (x,))
        elif kind == ["temp_convs"]:
            module.forward = partial(temporal_layer, module.forward, lambda x: x)


def temporal_layer(forward, skip, x, *args, num_frames, **more):
    return forward(x, *args, num_frames=num_frames, **more) if num_frames > 1 else skip(x)


class OfficialLoop:
    """The official training loop of a method: one function per method runs the backward passes."""

    def __init__(self, here, row):
        run = prepare(here, row)
        self.clips, self.pipe = [run.clips[0], *run.prior[:1]], run.pipe
        self.autocast = partial(machine.autocast, here.device, row["precision"])
        self.unet, run.pipe.unet = load_unet(model.load(None, here.device).unet).train(), None
        skip_single_frames(self.unet)
        self.motion_lora, groups = [], []
        for name, part in run.recipe.parts.items():
            if isinstance(part, lora.Trainable) and part.trainable:
                groups.append({"params": self.add(name, part), "lr": part.lr})
        self.motion = groups[-1]["params"]
        self.backward, self.optimizer = getattr(self, run.recipe.name), torch.optim.AdamW(groups)
        if run.recipe.name == "vmc":
            self.encode = cache(self.encode)

    def add(self, name, part):
        """The parameters of a part: its LoRA or, for rank 0, those of the UNet."""
        if not part.rank:
            return [p.requires_grad_() for p in lora.select(self.unet, part.layers).values()]
        parameters = []
        for site, linear in lora.lora_targets(self.unet, part.layers).items():
            layer = WrappedLinear(linear, part.rank, part.dropout)
            self.unet.set_submodule(site, layer)
            parameters += [layer.down.weight, layer.up.weight]
            if name == "motion":
                self.motion_lora.append(layer)
        return parameters

    def step(self):
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def predict(self, x, t, text):
        with self.autocast():
            return self.unet(x, t.to(x.device), text).sample.float()

    @torch.no_grad()
    def encode(self, prompt):
        with self.autocast():
            return self.pipe.text_encoder([prompt])

    def noised(self):
        """All clips as one batch: target, and (noisy latents, timesteps, text)."""
        S, latents = self.pipe.schedule, torch.cat([clip.latents for clip in self.clips])
        noise = torch.randn_like(latents)
        t = torch.randint(S.num_train_timesteps, (len(latents),))
        text = torch.cat([self.encode(clip.prompt) for clip in self.clips])
        return S.target(latents, noise, t), (S.add_noise(latents, noise, t), t, text)

    def vmc(self):
        target, inputs = self.noised()
        residual_cosine_official(self.predict(*inputs), target).backward()
        nn.utils.clip_grad_norm_(self.motion, 1.0)

    def newmove(self):
        target, inputs = self.noised()
        out = self.predict(*inputs)
        (mse(out[:1], target[:1]) + 0.5 * mse(out[1:], target[1:])).backward()
        nn.utils.clip_grad_norm_(self.motion, 1.0)

    def motiondirector(self):
        target, (x, t, text) = self.noised()
        i = int(torch.randint(x.shape[2], ()))
        for layer in self.motion_lora:
            layer.scale = 0.0
        frame = self.predict(x[:, :, i : i + 1], t, text)
        for layer in self.motion_lora:
            layer.scale = 1.0
        out = self.predict(x, t, text)
        mse(frame, target[:, :, i : i + 1]).backward()
        motiondirector(out, target, anchor=i).backward()  # adds to the same gradients


def sample_official(here, row):
    """Guided DDIM by the pipeline of diffusers, to latents."""
    pipe, (text, empty, start) = sampling_inputs(here, row)
    unet = load_unet(model.load(None, here.device).unet, machine.DTYPES[row["precision"]])
    config = vars(pipe.schedule).copy()
    del config["alpha_bar"], config["dpm_spacing"]
    official = diffusers.TextToVideoSDPipeline(
        None, None, None, unet, diffusers.DDIMScheduler.from_config(config))
    official.set_progress_bar_config(disable=True)
    frames, height, width = row["shape"]

    def step():
        with machine.autocast(here.device, row["precision"]):
            return official(height=height, width=width, num_frames=frames, latents=start,
                            num_inference_steps=row["steps"], guidance_scale=GUIDANCE,
                            prompt_embeds=text, negative_prompt_embeds=empty,
                            output_type="latent").frames

    return step
