"""The two sides that bench.py measures: the product, and the official loops on the diffusers UNet.

As in the official code, the diffusers UNet keeps fp32 weights under autocast, LoRA layers wrap
linear layers, the text is encoded at every step (VMC: once), MotionDirector runs two forward passes
before its two backward passes, and NewMove batches the clip with the regularization clip. On both
sides latents are cached.
"""
import contextlib
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import diffusers  # noqa: E402
import open_clip  # noqa: E402, F401  (must not be imported inside `with torch.device`)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import lora  # noqa: E402
import model  # noqa: E402
import sampler  # noqa: E402
import train  # noqa: E402
from support.hub import TextConfig, UNetConfig, VAEConfig  # noqa: E402

PROMPT, GUIDANCE = "a ball doing the sks", 9.0
# Settings that make all steps of a run equal: both losses, the second stage, no augmentation.
EQUAL = {"motiondirector": ("spatial_prob=1",), "newmove": ("augment=none",),
         "customize-a-video": ("absorber_steps=0",)}
# Widths of UNet, VAE and text encoder, and the text encoder's layers.
SIZES = {"gpu": ([320, 640, 1280, 1280], [128, 256, 512, 512], 1024, 23),
         "dry": ([32, 32, 64, 64], [32, 32, 64, 64], 128, 2)}


# ------------------------------------------------------------------------------------------------
# The product


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


def prepare(here, method, shape, flags=()):
    """A run of train.py before its first step, on a clip of noise."""
    frames, height, width = shape
    argv = ["--method", method, "--video", here.scratch / "clips" / "0", "--prompt", PROMPT,
            "--device", here.device, "--frames", frames, "--size", f"{width}x{height}", "--fps", 8,
            "--preview-every", 0, "--out", tempfile.mkdtemp(dir=here.scratch), *flags]
    argv += EQUAL.get(method, ())
    argv += ["--prior", here.scratch / "clips"] if method == "newmove" else []
    argv += ["--weights", here.scratch] if here.alone else []
    with contextlib.redirect_stdout(None):
        return train.prepare(*train.parse([str(arg) for arg in argv]))


def our_step(run):
    """The training step of train.py."""
    parameters, count = list(run.trained.values()), iter(range(10**6))
    optimizer = lora.build_optimizer(run.recipe.parts, run.trainables)

    def step():
        train.one_step(run, next(count))
        run.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, run.recipe.max_grad_norm)
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def load(here, row, precision):
    """A model, and (prompt states, empty states, start) for sampling."""
    pipe = model.load(None, here.device, precision, keep=())
    frames, *sides = row["shape"]
    shape = [pipe.unet.config.in_channels, frames, *(n // pipe.vae.config.factor for n in sides)]
    with torch.no_grad():
        start = sampler.seeded_randn(shape, [0]).to(here.device)
        return pipe, (pipe.encode_text([PROMPT]), pipe.encode_text([""]), start)


@torch.no_grad()
def sample(pipe, inputs, steps):
    """Latents by guided DDIM."""
    text, empty, start = inputs
    predict = sampler.classifier_free_guidance(pipe.predict, text, empty, GUIDANCE)
    return sampler.ddim(pipe.schedule, predict, start, steps)


# ------------------------------------------------------------------------------------------------
# The official loops


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
        rank = min(rank, linear.in_features, linear.out_features)
        device = linear.weight.device
        self.linear = linear
        self.down = nn.Linear(linear.in_features, rank, bias=False, device=device)
        self.up = nn.Linear(rank, linear.out_features, bias=False, device=device)
        self.dropout, self.scale = nn.Dropout(dropout), 1.0
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.linear(x) + self.dropout(self.up(self.down(x))) * self.scale


def bypass_temporal_layers(unet):
    """Skip the temporal layers for a single frame, as the official UNet does."""
    for name, module in unet.named_modules():
        kind = name.split(".")[-2:-1]
        if name == "transformer_in" or kind in (["temp_attentions"], ["temp_convs"]):
            def skip(x, *args, num_frames, forward=module.forward, kind=kind, **more):
                if num_frames > 1:
                    return forward(x, *args, num_frames=num_frames, **more)
                return x if kind == ["temp_convs"] else (x,)

            module.forward = skip


class Loop:
    """An official training loop. parts: the product's recipe.parts; pipe: without its UNet."""

    def __init__(self, method, unet, parts, clips, pipe, autocast):
        self.clips, self.pipe, self.autocast, self.unet = clips, pipe, autocast, unet
        self.backward, self.lora = getattr(self, method), {}
        bypass_temporal_layers(unet.train())
        self.groups = {name: self.trainable(name, part) for name, part in parts.items()
                       if isinstance(part, lora.Trainable) and part.trainable}
        self.optimizers = {name: torch.optim.AdamW(group, parts[name].lr)
                           for name, group in self.groups.items()}
        self.encoded_once = self.encode(clips[0].prompt) if method == "vmc" else None

    def trainable(self, name, part):
        """The parameters of a part: its LoRA or, for rank 0, those of the UNet."""
        if not part.rank:
            return [p.requires_grad_() for p in lora.select(self.unet, part.layers).values()]
        self.lora[name] = []
        for site, linear in lora.lora_targets(self.unet, part.layers).items():
            owner, _, last = site.rpartition(".")
            self.lora[name].append(WrappedLinear(linear, part.rank, part.dropout))
            setattr(self.unet.get_submodule(owner), last, self.lora[name][-1])
        return [m.weight for layer in self.lora[name] for m in (layer.down, layer.up)]

    def step(self):
        self.backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def predict(self, x, t, text):
        with self.autocast():
            return self.unet(x, t.to(x.device), text).sample.float()

    @torch.no_grad()
    def encode(self, prompt):
        with self.autocast():
            return self.pipe.text_encoder([prompt])

    def noised(self):
        """All clips as one batch: noisy latents, target, timesteps and text."""
        S, latents = self.pipe.schedule, torch.cat([clip.latents for clip in self.clips])
        noise = torch.randn_like(latents)
        t = torch.randint(S.num_train_timesteps, (len(latents),))
        text = self.encoded_once
        if text is None:
            text = torch.cat([self.encode(clip.prompt) for clip in self.clips])
        return S.target(latents, noise, t), (S.add_noise(latents, noise, t), t, text)

    def vmc(self):
        target, inputs = self.noised()
        out = self.predict(*inputs)
        difference = lambda v: (v[:, :, 1:] - v[:, :, :-1]).abs()
        loss = 1 - F.cosine_similarity(difference(out), difference(target), dim=2)
        loss.mean().backward()
        nn.utils.clip_grad_norm_(self.groups["motion"], 1.0)

    def newmove(self):
        target, inputs = self.noised()
        out = self.predict(*inputs)
        (F.mse_loss(out[:1], target[:1]) + 0.5 * F.mse_loss(out[1:], target[1:])).backward()
        nn.utils.clip_grad_norm_(self.groups["motion"], 1.0)

    def motiondirector(self):
        target, (x, t, text) = self.noised()
        i = int(torch.randint(x.shape[2], ()))
        for layer in self.lora["motion"]:
            layer.scale = 0.0
        frame = self.predict(x[:, :, i : i + 1], t, text)
        for layer in self.lora["motion"]:
            layer.scale = 1.0
        out = self.predict(x, t, text)
        debiased = lambda v: 2**0.5 * v - v[:, :, i : i + 1]
        F.mse_loss(frame, target[:, :, i : i + 1]).backward()
        kept = [p.grad for p in self.groups["appearance"]]
        self.optimizers["appearance"].zero_grad(set_to_none=True)
        (F.mse_loss(out, target) + F.mse_loss(debiased(out), debiased(target))).backward()
        for p, grad in zip(self.groups["appearance"], kept):  # the second gradient is discarded
            p.grad = grad


@torch.no_grad()
def official_sample(unet, schedule, text, empty, start, steps, autocast):
    """Latents by the loop of diffusers' TextToVideoSDPipeline, with its DDIM scheduler."""
    config = vars(schedule).copy()
    del config["alpha_bar"], config["dpm_spacing"]
    scheduler = diffusers.DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps, device=start.device)
    both, x = torch.cat([empty, text]), start
    for t in scheduler.timesteps:
        with autocast():
            plain, prompted = unet(torch.cat([x, x]), t, both).sample.chunk(2)
        x = scheduler.step(plain + GUIDANCE * (prompted - plain), t, x).prev_sample
    return x
