"""Train the tiny model from scratch: VAE, CLIP, and the video UNet on images and on clips.

    python tiny/train.py                       # all stages; resumes where a stage stopped
    python tiny/train.py clips --steps 40000   # continue the clips stage alone

Each stage writes its result to tiny/weights, in the hub's layout and fp16, and its state to
tiny/work, from which it resumes. Every random draw comes from (stage, step). The world is rendered
on the fly, so there is no data set and no epoch. docs/base.md describes how the committed weights
were made, and how good a model trained from scratch is with these settings.

Axes: B clips or images, F frames, C channels, H W frame, h w latent, N text tokens, D text width.
"""
import argparse
import json
import math
import os
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import model  # noqa: E402
from sampler import NoiseSchedule  # noqa: E402
from support import hub, machine, tokenizer  # noqa: E402
from tiny import world  # noqa: E402

HERE = Path(__file__).resolve().parent
STAGES = ("vae", "clip", "images", "clips")
STEPS = {"vae": 4000, "clip": 3000, "images": 4000, "clips": 30000}
BATCH = {"vae": 24, "clip": 128, "images": 96}
LEARNING_RATE = {"vae": 3e-3, "clip": 1e-3, "images": 2e-3, "clips": 8e-4}

# The curriculum of the clips stage: last step, frames per clip, clips per step, motions, share of
# unnamed motions, lowest timestep. "Left" differs from "right" only in the product of direction,
# frame and position: with any two of the three, the others average out, and the loss has no slope.
# With one direction of each pair first, frame times position has a slope, and the resulting
# features make the opposites easy. With unnamed motions and trajectory hints from the first step,
# the words of motions had no effect; with many unnamed motions before all named ones, circles,
# swinging and bobbing failed for ten thousand steps more. So unnamed motions are few until all
# words have an effect (docs/base.md). Motion is decided at high noise. Four frames show a line as
# well as sixteen do, at a quarter of the cost; oscillations would alias in four frames, so they
# come with eight. A spinning star aliases even in eight.
ONE_DIRECTION = ("moving left", "moving up", "growing", "standing still",
                 "standing still while the camera pans")
LINES = (*ONE_DIRECTION, "moving right", "moving down", "shrinking")
HARD = ("spinning", "spinning", "shrinking", "moving in a circle", "standing still")
WEIGHTED = (*world.BASE, *HARD)  # the hard motions are more frequent
CURRICULUM = (
    (1200, 4, 32, ONE_DIRECTION, 0.0, 300),
    (2100, 4, 32, LINES, 0.0, 300),
    (5000, 8, 20, world.BASE, 0.1, 100),
    (10000, 16, 16, WEIGHTED, 0.2, 0),
    (math.inf, 16, 24, WEIGHTED, 0.4, 0),
)
PLAIN = 0.08  # share of additional white objects on grey, where no color marks the object
IMAGES_EVERY = 6  # every sixth step of the clips stage is an image step, to maintain appearance
WAVE_WEIGHT = 0.02  # weight of TrajectoryHint.wave_loss
# Steps of the clips stage. Until the first, the frame hint has full strength and there is no
# trajectory hint; at the second, the frame hint reaches zero.
HINTS = (2100, 5000)

VAE_CONFIG = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [32, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3, "out_channels": 3, "latent_channels": 8, "layers_per_block": 1,
    "norm_num_groups": 2, "sample_size": 64, "scaling_factor": 1.0,
}
UNET_CONFIG = {
    "_class_name": "UNet3DConditionModel", "act_fn": "silu", "attention_head_dim": 16,
    "block_out_channels": [64, 128], "cross_attention_dim": 64,
    "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
    "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
    "downsample_padding": 1, "in_channels": 8, "out_channels": 8, "layers_per_block": 1,
    "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 4, "sample_size": 8,
}
CLIP_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 96, "head_width": 24, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 4},
}
TEXT_CONFIG = {  # all of CLIP's text layers except the last, as ZeroScope uses 23 of 24
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "gelu",
    "hidden_size": 64, "intermediate_size": 256, "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77, "num_attention_heads": 4, "num_hidden_layers": 3,
    "vocab_size": 49408,
}
MODEL_INDEX = {
    "_class_name": "TextToVideoSDPipeline", "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet3DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}
# Neighboring pixels of an 8×8 latent differ little, so noise hides less than in a large image.
# With v-prediction and latents scaled to a standard deviation of 0.5, a linear schedule works
# better than ZeroScope's. It ends at timestep 700 of 1000: beyond, nothing is decided. ᾱ is then
# 0.007 at the end, close to ZeroScope's 0.0047, so a start from an inverted clip keeps a trace of
# its layout, which VMC relies on.
SCHEDULE = {
    "_class_name": "DDIMScheduler", "beta_start": 0.0001, "beta_end": 0.014024,
    "beta_schedule": "linear", "num_train_timesteps": 700, "prediction_type": "v_prediction",
    "timestep_spacing": "trailing", "steps_offset": 0, "clip_sample": False,
    "set_alpha_to_one": False,
}
LATENT_STD = 0.5
PRECISION = "bf16"  # five times as fast as fp32 on a recent CPU


# --- Shared by all stages: files, learning rate, EMA, the loop ----------------------------------


def write_component(out, name, config, state, file="diffusion_pytorch_model.safetensors",
                    config_file="config.json"):
    """One component's folder in the hub's layout: config and fp16 safetensors."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / config_file).write_text(json.dumps(config, indent=2) + "\n")
    halves = {n: t.detach().cpu().half().contiguous() for n, t in state.items()}
    save_file(halves, folder / file, metadata={"format": "pt"})
    os.chmod(folder / file, 0o644)


def generator(stage, step):
    """The random generator of one step."""
    return torch.Generator().manual_seed(STAGES.index(stage) * 10**9 + step)


def learning_rate(step, steps, peak, warmup=100):
    """Linear warm-up, then constant, then a linear decay to a fiftieth over the last fifth. The
    number of steps can be raised until the decay starts."""
    left = (steps - step) / (0.2 * steps)
    return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * min(1.0, left))


class EMA:
    """An exponential moving average of a module's parameters: the exported weights."""

    def __init__(self, module, decay):
        self.decay, self.module = decay, module
        self.state = {n: p.detach().clone() for n, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        names, values = zip(*self.module.named_parameters())
        torch._foreach_lerp_([self.state[n] for n in names], list(values), 1 - decay)


def make_optimizer(module, no_decay):
    """AdamW, without weight decay on vectors and on parameters whose name contains one of
    `no_decay`."""
    decayed, kept = [], []
    for name, p in module.named_parameters():
        (kept if p.dim() < 2 or any(s in name for s in no_decay) else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)


def run(stage, module, loss_of, export, args, no_decay=()):
    """Train `module` on loss_of(step) until the stage's last step: resume, log, save and export."""
    steps, peak = args.steps or STEPS[stage], args.rate or LEARNING_RATE[stage]
    optimizer, ema, first = make_optimizer(module, no_decay), EMA(module, 0.999), 0
    path = args.work / f"{stage}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True, map_location=args.device)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        ema.state, first = saved["average"], saved["step"]
        print(f"{stage}: resumed at step {first} of {steps}", flush=True)
    started, average = time.time(), 0.0
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        average = loss.item() if step == first else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % 20 == 0:
            pace = (step + 1 - first) / (time.time() - started)
            print(f"{stage} {step + 1}/{steps} loss {average:.4f} {pace:.2f} steps/s", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            args.work.mkdir(parents=True, exist_ok=True)
            torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict(),
                        "average": ema.state, "step": step + 1}, f"{path}.part")
            os.replace(f"{path}.part", path)
            export(args, ema.state)


# --- VAE ----------------------------------------------------------------------------------------


def random_frames(scenes, g):
    """One frame per scene, at a random time: (B, 3, H, W)."""
    return world.render(scenes, times=torch.rand(len(scenes), 1, generator=g))[:, :, 0]


def train_vae(args):
    """Reconstruct single frames, of the novel motions too, with a weak KL term."""
    torch.manual_seed(0)
    vae = model.VAE(model.VAEConfig(**{k: VAE_CONFIG[k] for k in (
        "block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups")}))
    vae = vae.to(args.device)

    def loss_of(step):
        g = generator("vae", step)
        scenes = world.sample_scenes(BATCH["vae"], g, world.MOTIONS)
        x = random_frames(scenes, g).to(args.device)
        with machine.autocast(args.device, PRECISION):
            mean, std = vae.encode(x)
            out = vae.decode(mean + std * torch.randn(mean.shape, generator=g).to(mean))
        mean, std, out = mean.float(), std.float(), out.float()
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        return (out - x).abs().mean() + 2 * ((out - x) ** 2).mean() + 1e-4 * kl

    def export(args, state):
        g = generator("vae", 10**8)
        x = random_frames(world.sample_scenes(512, g, world.MOTIONS), g).to(args.device)
        current = {n: p.detach().clone() for n, p in vae.named_parameters()}
        vae.load_state_dict(state)
        with torch.no_grad():
            means = torch.cat([vae.encode(batch)[0] for batch in x.split(64)])
            out = torch.cat([vae.decode(batch) for batch in means.split(64)]).clamp(-1, 1)
        vae.load_state_dict(current)
        psnr = 10 * math.log10(4 / ((out - x) ** 2).mean().item())
        print(f"vae: {psnr:.2f} dB on held-out frames", flush=True)
        config = VAE_CONFIG | {"scaling_factor": round(LATENT_STD / means.std().item(), 5)}
        write_component(args.out, "vae", config, state)

    run("vae", vae, loss_of, export, args)


# --- CLIP ---------------------------------------------------------------------------------------


def word_directions():
    """{token id: vector (64,)} of every word for a color or shape: its own axis of a fixed random
    frame, minus the mean over colors or shapes; and that frame (14, 64). See train_clip."""
    words = [*world.SHAPES, *world.COLORS]
    g = torch.Generator().manual_seed(3)
    frame = torch.linalg.qr(torch.randn(64, len(words), generator=g)).Q.T  # (14, 64)
    shapes, colors = frame[: len(world.SHAPES)], frame[len(world.SHAPES) :]
    code = torch.cat([shapes - shapes.mean(0), colors - colors.mean(0)])
    code = 3 * F.normalize(code, dim=1)  # the states have a norm of about eight
    return {tokenizer.words_to_ids(w)[-1]: code[i] for i, w in enumerate(words)}, frame


class Clip(nn.Module):
    """open_clip's CLIP of CLIP_CONFIG with two parts that only training uses: a linear head that
    predicts the scene from the text, and the frame of `word_directions`."""

    def __init__(self):
        super().__init__()
        self.clip = open_clip.model.CLIP(**CLIP_CONFIG)
        self.head = nn.Linear(64, 5 * world.FRAMES + 8 + 6 + 5)
        self.directions, frame = word_directions()
        self.register_buffer("frame", frame, persistent=False)

    def encode_text(self, ids):
        """The text encoder's states (B, N, 64), and CLIP's features (B, 64)."""
        clip, layers = self.clip, self.clip.transformer.resblocks
        mask = clip.attn_mask[: ids.shape[1], : ids.shape[1]]
        x = clip.token_embedding(ids) + clip.positional_embedding[: ids.shape[1]]
        for layer in layers[:-1]:
            x = layer(x, attn_mask=mask)
        last = clip.ln_final(layers[-1](x, attn_mask=mask))
        return clip.ln_final(x), last_token(last, ids) @ clip.text_projection

    def word_loss(self, states, ids):
        """Along the frame, the target of every state is the sum of the object's words so far. Words
        of the background, after "on", do not count."""
        on = tokenizer.words_to_ids("on")[0]
        target, subject = torch.zeros_like(states), ((ids == on).cumsum(1) == 0)[..., None]
        for token, vector in self.directions.items():
            seen = (((ids == token)[..., None] & subject).cumsum(1) > 0).float()
            target = target + seen * vector.to(target)
        return (((states - target) @ self.frame.T) ** 2).mean()

    def scene_loss(self, text, scenes):
        """Error of the head's prediction of the scene, mainly its trajectory, from text (B, 64)."""
        path, scale = world.trajectory(scenes), scenes.amplitude[:, None]
        target = [(path.x - scenes.x[:, None]) / scale, (path.y - scenes.y[:, None]) / scale,
                  3 * (path.size - 1), path.angle / 2, path.pan / 24,
                  F.one_hot(scenes.color, 8), F.one_hot(scenes.shape, 6),
                  F.one_hot(scenes.background, 5)]
        return F.mse_loss(self.head(text.float()), torch.cat(target, 1).to(text.device))

    def contrastive_loss(self, image, text, captions):
        """CLIP's loss of features (B, 64); equal captions are not each other's negatives."""
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        logits = self.clip.logit_scale.exp() * image @ text.T
        number = {t: i for i, t in enumerate(captions)}
        number = torch.tensor([number[t] for t in captions])
        same = (number[:, None] == number).float().to(logits.device)
        same = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


def last_token(states, ids):
    """The states (B, D) of (B, N, D) at the end-of-text token."""
    return states[torch.arange(len(ids)), ids.argmax(1)]


def train_clip(args):
    """Frames against captions (Radford et al. 2021, Fig. 3), with two additions, without which the
    text would hardly affect the UNet. Frames do not show motion, so a linear head, used only here,
    predicts the scene and mainly its trajectory from the text: "left" and "right" then get states
    as far apart as words of color. And CLIP leaves the states of words of shape and color almost
    equal (cosine 1.00 between "star" and "cross"), so these words get fixed directions of their
    own."""
    torch.manual_seed(1)
    clip = Clip().to(args.device)

    def loss_of(step):
        g = generator("clip", step)
        with_images = step % 3 == 0  # text alone, in two of three steps, is cheap
        scenes = world.sample_scenes(BATCH["clip"] * (1 if with_images else 2), g)
        captions = world.captions(scenes, g)
        ids = tokenizer.tokenize(captions)[:, :24].to(args.device)  # causal: no effect of the rest
        with machine.autocast(args.device, PRECISION):
            states, text = clip.encode_text(ids)
        ends = last_token(states, ids)
        loss = 10 * (clip.scene_loss(text, scenes) + clip.scene_loss(ends, scenes))
        loss = loss + clip.word_loss(states.float(), ids)
        if with_images:
            with machine.autocast(args.device, PRECISION):
                image = clip.clip.encode_image(random_frames(scenes, g).to(args.device))
            loss = loss + clip.contrastive_loss(image, text, captions)
        return loss

    run("clip", clip, loss_of, export_clip, args, no_decay=("embedding",))


def export_clip(args, state):
    """Write the text encoder, and the rest of CLIP: the last text layer, the projections, the image
    encoder."""
    state = {n.removeprefix("clip."): t for n, t in state.items() if n.startswith("clip.")}
    last = f"transformer.resblocks.{CLIP_CONFIG['text_cfg']['layers'] - 1}."
    stem = ("token_embedding", "positional_embedding", "transformer.", "ln_final")
    text = {n: t for n, t in state.items() if n.startswith(stem) and not n.startswith(last)}
    write_component(args.out, "text_encoder", TEXT_CONFIG, text_to_hub(text), "model.safetensors")
    rest = {n: t for n, t in state.items() if n not in text}
    write_component(args.out, "clip", CLIP_CONFIG, rest, "model.safetensors",
                    "open_clip_config.json")


def text_to_hub(state):
    """open_clip's text tensors with the hub's names: the inverse of hub.text_from_hub."""
    out = {}
    for name, tensor in state.items():
        tensors = {"": tensor}
        for kind in ("weight", "bias"):
            if name.endswith(f"attn.in_proj_{kind}"):
                tensors = dict(zip("qkv", tensor.chunk(3)))
                name = name.replace(f"attn.in_proj_{kind}", "self_attn.{}_proj." + kind)
        for new, old in reversed(hub.HUB_TEXT_NAMES[1:]):
            if "self_attn" not in name or old != "attn.out_proj":
                name = name.replace(old, new)
        for letter, t in tensors.items():
            out["text_model." + name.format(letter)] = t.contiguous()
    return out


# --- UNet ---------------------------------------------------------------------------------------


def build_unet(args):
    """A new UNet, with the same initial weights at every start."""
    torch.manual_seed(2)
    names = {f.name for f in fields(model.UNetConfig)}
    unet = model.UNet(model.UNetConfig(**{k: v for k, v in UNET_CONFIG.items() if k in names}))
    for name, module in unet.named_modules():
        # Only these layers see the order of frames, so their output is not zero at the start.
        if name.endswith("conv4"):
            module[-1].reset_parameters()
            module[-1].weight.data.mul_(0.5)
            module[-1].bias.data.zero_()
    for attention in first_attentions(unet):
        fix_own_frame_heads(attention)
    return unet.to(args.device).eval()  # no dropout: the data never repeats


def first_attentions(unet):
    """The first attention of each temporal transformer except transformer_in, in order."""
    return [m for n, m in unet.named_modules() if "temp_attentions" in n and n.endswith("attn1")]


def own_frame_rows(attention):
    """The number of rows of to_q, to_k and to_v in the quarter of the heads that attend to their
    own frame."""
    return attention.to_v.out_features // 4


def fix_own_frame_heads(attention):
    """Let a quarter of the heads attend to their own frame: queries equal keys, so that each
    token's product is largest with itself. Attention trained from scratch never finds this
    solution. These rows are frozen while the base is trained."""
    rows = own_frame_rows(attention)
    head = attention.to_q.out_features // attention.heads
    axes = [torch.linalg.qr(torch.randn(attention.to_q.in_features, head)).Q.T
            for _ in range(rows // head)]
    for layer in (attention.to_q, attention.to_k):
        layer.weight.data[:rows] = 4 * torch.cat(axes)
        layer.weight.register_hook(lambda gradient: gradient.index_fill(
            0, torch.arange(rows, device=gradient.device), 0.0))


class FrameEmbeddingHint(nn.Module):
    """A hint for the first steps: one trainable vector per frame, added to the output of the first
    convolution. A network that has to tell frames apart by zero padding alone trains slowly at the
    start. The hint fades out and is not part of the exported weights."""

    def __init__(self, channels):
        super().__init__()
        self.vectors = nn.Parameter(0.5 * torch.randn(world.FRAMES, channels))
        self.frames, self.strength = 1, 0.0

    def set(self, step, frames):
        """The strength at a step; `frames` are spread over the duration of a clip."""
        full, zero = HINTS
        self.frames, self.strength = frames, min(1.0, max(0.0, (zero - step) / (zero - full)))

    def forward(self, module, inputs, x):
        """A forward hook of conv_in; x (B·F, C, h, w)."""
        if self.frames == 1 or self.strength == 0:
            return x
        rows = torch.linspace(0, world.FRAMES - 1, self.frames).round().long()
        vectors = self.vectors[rows].repeat(len(x) // self.frames, 1)
        return x + self.strength * vectors[:, :, None, None].to(x)


class TrajectoryHint(nn.Module):
    """A hint that gives the temporal attentions control over motion. It is not part of the exported
    weights.

    Without it, so small a network moves objects by its temporal convolutions and averages frames in
    its attentions, so no change of queries, keys and values moves anything. In the clips stage:
    - Half of the clips come with their trajectory: the proximity of each column and row to the
      object, per frame, enters the values of the first attention of each temporal transformer
      except the earliest, through a linear map, at random subsets of these attentions. The
      following layers are trained to draw an object of any appearance there.
    - The tokens that these attentions read have a target along fixed directions: waves over frames,
      columns and rows, and their products. A matrix, i.e. to_v, can compute the proximity from
      these.
    """

    FRAME_WAVES, SPACE_WAVES, SHARE, SUBSET, SCALE = 4, 2, 0.5, 0.6, 0.7

    def __init__(self, unet):
        super().__init__()
        self.maps, self.hint, self.tokens = nn.ModuleList(), None, {}
        waves = (1 + self.FRAME_WAVES) * (1 + 2 * self.SPACE_WAVES) - 1
        for i, attention in enumerate(first_attentions(unet)):
            self.maps.append(nn.Linear(2, own_frame_rows(attention), bias=False))
            nn.init.normal_(self.maps[i].weight, std=0.7)
            axes = torch.linalg.qr(torch.randn(attention.to_v.in_features, waves)).Q
            self.register_buffer(f"axes{i}", axes)
            attention.to_v.register_forward_hook(self.make_hook(i))

    def make_hook(self, i):
        """A forward hook of the values of the i-th attention, (B·h·w, F, C)."""
        def hook(module, inputs, values):
            self.tokens[i] = inputs[0]
            if self.hint is None:
                return values
            x, y, on = self.hint
            near = proximity(x, y, math.isqrt(len(values) // len(x)))  # (B, h, w, F, 2)
            code = self.maps[i](near) * on[:, i, None, None, None, None]
            code = F.pad(code.flatten(0, 2), (0, values.shape[-1] - code.shape[-1]))
            return values + code

        return hook

    def set(self, path, g):
        """The Trajectory of a batch, and the random subset of attentions that get it; None for no
        hint."""
        self.hint = None
        if path is None:
            return
        chance = torch.rand(len(path.x), 1 + len(self.maps), generator=g)
        on = (chance[:, :1] < self.SHARE) & (chance[:, 1:] < self.SUBSET)
        on[:, 0] = False  # its tokens do not encode the frame, see `wave_loss`
        device = self.maps[0].weight.device
        self.hint = tuple(t.to(device).float() for t in (path.x, path.y, on))

    def wave_loss(self, batch):
        """Error of the tokens' encoding of frame and position. The first attention is left out: the
        one convolution before it has a receptive field of four frames, not sixteen."""
        loss = 0.0
        for i in range(1, len(self.maps)):
            tokens, axes = self.tokens[i].float(), getattr(self, f"axes{i}")
            target = self.waves(tokens.shape[1], math.isqrt(len(tokens) // batch)).to(axes)
            loss = loss + ((tokens @ axes).unflatten(0, (batch, -1)) - target).square().mean()
        return loss

    def waves(self, frames, side):
        """(h·w, F, waves): cosines over frames times cosines over columns, and over rows."""
        def cosines(n, count):
            at = math.pi * (torch.arange(n) + 0.5) / n
            return torch.stack([(k * at).cos() for k in range(count + 1)], 1)

        time, space = cosines(frames, self.FRAME_WAVES), cosines(side, self.SPACE_WAVES)
        column = torch.einsum("fk,xj->xfkj", time, space).expand(side, -1, -1, -1, -1)
        both = [column.flatten(3), column[..., 1:].transpose(0, 1).flatten(3)]
        return self.SCALE * torch.cat(both, -1)[..., 1:].flatten(0, 1)  # without the constant


def proximity(x, y, side):
    """Proximity in [0, 1] of each column and each row of side × side pixels to a position (B, F):
    (B, h, w, F, 2)."""
    center = (torch.arange(side, device=x.device) + 0.5) * world.SIZE / side
    bell = lambda at: torch.exp(-(((center[:, None] - at[:, None]) / 9) ** 2) / 2)  # (B, side, F)
    columns = bell(x)[:, None].expand(-1, side, -1, -1)
    rows = bell(y)[:, :, None].expand(-1, -1, side, -1)
    return torch.stack([columns, rows], -1)


def unet_loss(unet, latents, text, g, args, temporal, skew, low=0):
    """Mean squared error of v at timesteps low + (T − low)·u^skew, u uniform: a skew of 1 is
    uniform, a lower one favors high noise. With this schedule an object's shape and color are
    decided below about t = 400, and its motion, which all frames show together, above."""
    schedule = NoiseSchedule(**{k: v for k, v in SCHEDULE.items() if k[0] != "_"})
    B, T = len(latents), schedule.num_train_timesteps
    t = (low + torch.rand(B, generator=g) ** skew * (T - low)).long()
    noise = torch.randn(latents.shape, generator=g).to(latents)
    x, target = schedule.add_noise(latents, noise, t), schedule.target(latents, noise, t)
    with machine.autocast(args.device, PRECISION):
        out = unet(x, t.to(args.device), text, temporal=temporal)
    return ((out.float() - target) ** 2).mean()


def export_unet(args, state):
    """Write the UNet's averaged weights, the schedule and the model index."""
    write_component(args.out, "unet", UNET_CONFIG, state)
    (args.out / "scheduler").mkdir(exist_ok=True)
    schedule = json.dumps(SCHEDULE, indent=2) + "\n"
    (args.out / "scheduler" / "scheduler_config.json").write_text(schedule)
    (args.out / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


def plainer(scenes, g):
    """The same scenes, a share PLAIN of them with a white object on grey. Scenes with a camera pan,
    which a grey background would hide, do not change."""
    pans = world.is_motion(scenes.motion, "standing still while the camera pans")
    plain = (torch.rand(len(scenes), generator=g) < PLAIN) & ~pans
    white, grey = list(world.COLORS).index("white"), list(world.BACKGROUNDS).index("grey")
    return replace(scenes, color=torch.where(plain, white, scenes.color),
                   background=torch.where(plain, grey, scenes.background))


class LatentPool:
    """Encoded scenes. Each is used REUSE times on average, with other noise, timesteps and
    captions, before the next pool is rendered: encoding would otherwise take a third of the
    time."""

    REUSE = 6

    def __init__(self, key, size, batch, render, motions, args, unnamed=0.0):
        self.key, self.size, self.batch_size, self.args = key, size, batch, args
        self.render, self.motions, self.unnamed = render, motions, unnamed
        self.vae = model.load_vae(args.out, args.device)
        self.text = model.load_text(args.out, args.device)
        self.steps, self.number = size * self.REUSE // batch, None

    def fill(self, number):
        """Render and encode pool number `number`."""
        self.number, latents = number, []
        g = generator("clips", 10**8 + self.key * 10**6 + number)
        scenes = world.sample_scenes(self.size, g, self.motions, unnamed=self.unnamed, brisk=True)
        self.scenes = plainer(scenes, g)
        for rows in torch.arange(self.size).split(64):
            video = self.render(self.scenes[rows], g).to(self.args.device)
            with torch.no_grad(), machine.autocast(self.args.device, PRECISION):
                mean, _ = self.vae.moments(video)
                latents.append((mean * self.vae.config.scaling_factor).float())
        self.latents = torch.cat(latents)

    def batch(self, step, g, motion):
        """Latents (B, C, F, h, w), text states (B, N, D) and scenes of a step."""
        if step // self.steps != self.number:
            self.fill(step // self.steps)
        rows = torch.randint(self.size, (self.batch_size,), generator=g)
        with torch.no_grad(), machine.autocast(self.args.device, PRECISION):
            states = self.text(world.captions(self.scenes[rows], g, motion)).float()
        return self.latents[rows], states, self.scenes[rows]


def image_pool(args):
    """Encoded single frames."""
    render = lambda scenes, g: random_frames(scenes, g)[:, :, None]
    return LatentPool(0, 8192, BATCH["images"], render, world.BASE, args)


def train_images(args):
    """Train appearance: single frames, temporal layers bypassed, captions without motion."""
    unet, pool = build_unet(args), image_pool(args)

    def loss_of(step):
        g = generator("images", step)
        latents, states, _ = pool.batch(step, g, motion=False)
        return unet_loss(unet, latents, states, g, args, temporal=False, skew=1.5)

    run("images", unet, loss_of, export_unet, args)


def train_clips(args):
    """Train motion: clips, along CURRICULUM. Every sixth step is an image step, which maintains
    appearance. Starts from the state of the images stage. If there is none, starts from the weights
    in --out and in the last part of the curriculum, so the committed model can be trained further.
    """
    unet = build_unet(args)
    frame_hint = FrameEmbeddingHint(UNET_CONFIG["block_out_channels"][0]).to(args.device)
    unet.conv_in.register_forward_hook(frame_hint)
    trajectory_hint = TrajectoryHint(unet).to(args.device)
    images, pools, offset = image_pool(args), {}, 0
    if (args.work / "images.pt").exists():
        unet.load_state_dict(torch.load(args.work / "images.pt", weights_only=True,
                                        map_location=args.device)["average"])
    else:
        unet.load_state_dict(model.load_unet(args.out).state_dict())
        offset = CURRICULUM[-2][0]
    for p in unet.parameters():
        p.requires_grad_(True)
    # The keys are the names in the state file.
    modules = nn.ModuleDict({"unet": unet, "clock": frame_hint, "course": trajectory_hint})

    def loss_of(step):
        g = generator("clips", step)
        at = step + offset
        part = next(i for i, c in enumerate(CURRICULUM) if at < c[0])
        _, frames, batch, motions, unnamed, low = CURRICULUM[part]
        if step % IMAGES_EVERY == IMAGES_EVERY - 1:
            frame_hint.set(at, 1)
            trajectory_hint.set(None, g)
            latents, states, _ = images.batch(step // IMAGES_EVERY, g, False)
            return unet_loss(unet, latents, states, g, args, temporal=False, skew=1.5)
        frame_hint.set(at, frames)
        if part not in pools:
            pools.clear()
            render = lambda scenes, g: world.render(scenes, frames)
            size = 24576 // frames
            pools[part] = LatentPool(1 + part, size, batch, render, motions, args, unnamed)
        latents, states, scenes = pools[part].batch(step, g, True)
        trajectory_hint.set(world.trajectory(scenes, frames) if at >= HINTS[0] else None, g)
        loss = unet_loss(unet, latents, states, g, args, temporal=True, skew=0.8, low=low)
        return loss + WAVE_WEIGHT * trajectory_hint.wave_loss(len(latents))

    def export(args, state):
        own = {n.removeprefix("unet."): p for n, p in state.items() if n.startswith("unet.")}
        export_unet(args, own)

    run("clips", modules, loss_of, export, args)


def main():
    """Run the stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stages", nargs="*", help=f"stages to run: {', '.join(STAGES)} (default: all)")
    add("--out", type=Path, default=HERE / "weights", help="folder of the weights")
    add("--work", type=Path, default=HERE / "work", help="folder of the training state")
    add("--steps", type=int, help="last step of the stage (default: per stage)")
    add("--rate", type=float, help="peak learning rate (default: per stage)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="device (default: cuda if there is one)")
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(unknown)}; choose from {', '.join(STAGES)}")
    machine.tune_malloc()
    for stage in args.stages or STAGES:
        globals()[f"train_{stage}"](args)


if __name__ == "__main__":
    main()
