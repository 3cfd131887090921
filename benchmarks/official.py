"""The official training loops on the diffusers UNet, operation by operation, for bench.py.

As in the official code, the UNet keeps fp32 weights under autocast, LoRA layers wrap linear layers,
the text is encoded at every step (VMC: once), MotionDirector runs two forward passes before its two
backward passes, and NewMove batches the clip with the regularization clip. As in bench.py, latents
are cached, and there is no gradient checkpointing.
"""
from dataclasses import asdict

import diffusers
import torch
import torch.nn.functional as F
from torch import nn

import lora


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
    """An official training loop. parts: the product's, by name; model: for text and schedule."""

    def __init__(self, method, unet, parts, clips, model, autocast):
        self.clips, self.model, self.autocast, self.unet = clips, model, autocast, unet
        self.backward, self.lora = getattr(self, method), {}
        bypass_temporal_layers(unet.train())
        self.groups = {name: self.trainable(name, part) for name, part in parts.items()
                       if isinstance(part, lora.Part) and part.learns}
        self.optimizers = {name: torch.optim.AdamW(group, parts[name].lr)
                           for name, group in self.groups.items()}
        self.encoded_once = self.encode(clips[0].prompt) if method == "vmc" else None

    def trainable(self, name, part):
        """The parameters of a part: its LoRA or, for rank 0, those of the UNet."""
        if not part.rank:
            return [p.requires_grad_() for p in lora.select(self.unet, part.layers).values()]
        self.lora[name] = []
        for site, linear in lora.sites(self.unet, part.layers).items():
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
            return self.model.text([prompt])

    def noised(self):
        """All clips as one batch: noisy latents, target, timesteps and text."""
        S, latents = self.model.schedule, torch.cat([clip.latents for clip in self.clips])
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
        kept = [p.grad for p in self.groups["look"]]
        self.optimizers["look"].zero_grad(set_to_none=True)
        (F.mse_loss(out, target) + F.mse_loss(debiased(out), debiased(target))).backward()
        for p, grad in zip(self.groups["look"], kept):  # the second gradient is discarded
            p.grad = grad


@torch.no_grad()
def sample(unet, schedule, text, empty, start, steps, guidance, autocast):
    """Latents by the loop of diffusers' TextToVideoSDPipeline, with its DDIM scheduler."""
    scheduler = diffusers.DDIMScheduler.from_config(schedule)
    scheduler.set_timesteps(steps, device=start.device)
    both, x = torch.cat([empty, text]), start
    for t in scheduler.timesteps:
        with autocast():
            plain, prompted = unet(torch.cat([x, x]), t, both).sample.chunk(2)
        x = scheduler.step(plain + guidance * (prompted - plain), t, x).prev_sample
    return x
