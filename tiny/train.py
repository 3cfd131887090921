"""Train the tiny model from scratch: VAE, CLIP, the video UNet on pictures and on clips, and the
classifier of motions that scores it.

    python tiny/train.py                       # all stages, from scratch or from where they stopped
    python tiny/train.py clips --steps 40000   # go on with the clips alone

Each stage writes its result to tiny/weights, in the hub's layout and fp16, and its state to
tiny/work, from which it resumes. Every random draw comes from (stage, step), and the world is
rendered afresh as training goes on, so there is no data set and no epoch. docs/base.md tells how
the weights in git were made, and how good a start from scratch becomes with these settings.

Axes: B clips or pictures, F frames, C channels, H W picture, h w latent.
"""
import argparse
import json
import math
import os
import sys
import time
from dataclasses import fields
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import model  # noqa: E402
from sampler import Schedule  # noqa: E402
from scores.motion import TRN  # noqa: E402
from support import hub, machine, tokenizer  # noqa: E402
from tiny import instruments, world  # noqa: E402

HERE = Path(__file__).resolve().parent
STAGES = ("vae", "clip", "pictures", "clips", "motion")
STEPS = {"vae": 1800, "clip": 3000, "pictures": 1000, "clips": 13000, "motion": 3000}
BATCH = {"vae": 24, "clip": 128, "pictures": 96, "motion": 48}
RATE = {"vae": 3e-3, "clip": 1e-3, "pictures": 2e-3, "clips": 8e-4, "motion": 2e-3}

# How clips are learned: until this step, so many frames a clip and clips a step, which motions,
# the share of clips whose motion has no name, and timesteps from `low` up. "Left" differs from
# "right" in the product of direction, frame and place alone: given any two of the three, the others
# average out, and there is no slope to follow (we saw none in a thousand steps). With one direction
# of each pair first, frame times place has a slope, and the features it leaves make the opposites
# easy. Where unnamed motions and told courses came from the first step on, no word of a motion was
# read; so these come later (docs/base.md). Motion is decided at high noise, and four frames show a
# line as well as sixteen at a quarter of the cost; four frames would alias what swings, so that
# comes with the eight.
FORTH = ("moving left", "moving up", "growing", "standing still",
         "standing still while the camera pans")
LINES = (*FORTH, "moving right", "moving down", "shrinking")
CURRICULUM = (
    (1500, 4, 32, FORTH, 0.0, 300),
    (2600, 4, 32, LINES, 0.2, 300),
    (4400, 8, 20, world.BASE, 0.5, 150),
    (math.inf, 16, 12, world.BASE, 0.4, 0),
)
PICTURES_EVERY = 6  # a step of pictures in place of every sixth step of clips keeps looks right
WAVE_WEIGHT = 0.02  # of telling frames and places apart, beside the loss of v; see Course
# Steps of clips: until the first the Clock is whole, and no course told; at the second it is gone.
SCAFFOLD = (2600, 4400)

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
TEXT_CONFIG = {  # all of CLIP's text layers but the last, as ZeroScope's 23 of 24
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "gelu",
    "hidden_size": 64, "intermediate_size": 256, "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77, "num_attention_heads": 4, "num_hidden_layers": 3,
    "vocab_size": 49408,
}
# With 8×8 latents that hardly change from pixel to pixel, noise hides less than it does in a large
# picture, so with v-prediction and latents scaled to a standard deviation of 0.5 a linear schedule
# serves better than ZeroScope's. It is cut at 700 of 1000 timesteps: beyond, nothing is decided.
# That leaves ᾱ = 0.007 at the end, as ZeroScope's own does (0.0047): hence a start from an inverted
# clip keeps a trace of its layout, which VMC counts on.
SCHEDULE = {
    "_class_name": "DDIMScheduler", "beta_start": 0.0001, "beta_end": 0.014024,
    "beta_schedule": "linear", "num_train_timesteps": 700, "prediction_type": "v_prediction",
    "timestep_spacing": "trailing", "steps_offset": 0, "clip_sample": False,
    "set_alpha_to_one": False,
}
LATENT_STD = 0.5


# ------------------------------------------------------------------------------------------------
# What every stage shares: state, learning rate, the loop


def write_part(out, part, config, state, name="diffusion_pytorch_model", config_name="config.json"):
    """One part's folder of the hub's layout: config and fp16 safetensors."""
    folder = out / part
    folder.mkdir(parents=True, exist_ok=True)
    (folder / config_name).write_text(json.dumps(config, indent=2) + "\n")
    halves = {n: t.detach().cpu().half().contiguous() for n, t in state.items()}
    save_file(halves, folder / f"{name}.safetensors", metadata={"format": "pt"})
    os.chmod(folder / f"{name}.safetensors", 0o644)


def generator(stage, step):
    """The source of all randomness of a step."""
    return torch.Generator().manual_seed(STAGES.index(stage) * 10**9 + step)


def rate(step, steps, peak, warm=100):
    """Linear warm-up, constant, and over the last fifth down to a fiftieth: so that the number of
    steps can still be raised until then."""
    left = (steps - step) / (0.2 * steps)
    return peak * min(1.0, (step + 1) / warm) * (0.02 + 0.98 * min(1.0, left))


class Average:
    """An exponential moving average of a module's weights: what is exported."""

    def __init__(self, module, decay):
        self.decay, self.module = decay, module
        self.state = {n: p.detach().clone() for n, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        names, values = zip(*self.module.named_parameters())
        torch._foreach_lerp_([self.state[n] for n in names], list(values), 1 - decay)


def run(stage, module, loss_of, export, args, decay=0.999, no_decay=(), file=None):
    """Train `module` on loss_of(step) to the stage's last step; resume, log, save and export.

    Names that hold one of `no_decay` get no weight decay; the state goes to `file`.pt.
    """
    steps, peak = args.steps or STEPS[stage], args.rate or RATE[stage]
    kept = [p for n, p in module.named_parameters() if p.dim() < 2 or any(s in n for s in no_decay)]
    decayed = [p for p in module.parameters() if not any(p is k for k in kept)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": kept, "weight_decay": 0.0}],
        betas=(0.9, 0.99), fused=True)
    average, first = Average(module, decay), 0
    path = args.work / f"{file or stage}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True, map_location=args.device)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        average.state, first = saved["average"], saved["step"]
        print(f"{stage}: resumed at step {first} of {steps}", flush=True)

    def save(step):
        args.work.mkdir(parents=True, exist_ok=True)
        torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict(),
                    "average": average.state, "step": step}, f"{path}.part")
        os.replace(f"{path}.part", path)
        export(average.state)

    started, total = time.time(), 0.0
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak)
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(step)
        total = loss.item() if step == first else 0.98 * total + 0.02 * loss.item()
        if (step + 1) % 20 == 0:
            pace = (step + 1 - first) / (time.time() - started)
            print(f"{stage} {step + 1}/{steps} loss {total:.4f} {pace:.2f} steps/s", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save(step + 1)


def autocast(args):
    """bf16 products: five times as fast as fp32 on a recent CPU."""
    return torch.autocast(args.device, torch.bfloat16)


# ------------------------------------------------------------------------------------------------
# VAE


def frames_of(scenes, g):
    """One frame a scene, at a random time: (B, 3, H, W)."""
    return world.render(scenes, times=torch.rand(len(scenes), 1, generator=g))[:, :, 0]


def train_vae(args):
    """Reconstruction of single frames, of the novel motions too, with a slight pull to N(0, 1)."""
    torch.manual_seed(0)
    vae = model.VAE(model.VAEConfig(**{k: VAE_CONFIG[k] for k in (
        "block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups")}))
    vae = vae.to(args.device)

    def loss_of(step):
        g = generator("vae", step)
        scenes = world.sample_scenes(BATCH["vae"], g, world.MOTIONS)
        x = frames_of(scenes, g).to(args.device)
        with autocast(args):
            mean, std = vae.encode(x)
            out = vae.decode(mean + std * torch.randn(mean.shape, generator=g).to(mean))
        mean, std, out = mean.float(), std.float(), out.float()
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        return (out - x).abs().mean() + 2 * ((out - x) ** 2).mean() + 1e-4 * kl

    def export(state):
        g = generator("vae", 10**8)
        x = frames_of(world.sample_scenes(512, g, world.MOTIONS), g).to(args.device)
        held = {n: p.detach().clone() for n, p in vae.named_parameters()}
        vae.load_state_dict(state)
        with torch.no_grad():
            means = torch.cat([vae.encode(part)[0] for part in x.split(64)])
            out = torch.cat([vae.decode(part) for part in means.split(64)]).clamp(-1, 1)
        vae.load_state_dict(held)
        psnr = 10 * math.log10(4 / ((out - x) ** 2).mean().item())
        print(f"vae: {psnr:.2f} dB on held-out frames", flush=True)
        config = VAE_CONFIG | {"scaling_factor": round(LATENT_STD / means.std().item(), 5)}
        write_part(args.out, "vae", config, state)

    run("vae", vae, loss_of, export, args)


# ------------------------------------------------------------------------------------------------
# CLIP


def word_directions():
    """{token id: a vector (64,)} of every word of colour and shape: its own axis of a fixed random
    frame, less the mean of its kind. See train_clip."""
    words = [*world.SHAPES, *world.COLOURS]
    g = torch.Generator().manual_seed(3)
    frame = torch.linalg.qr(torch.randn(64, len(words), generator=g)).Q.T  # (14, 64)
    shapes, colours = frame[: len(world.SHAPES)], frame[len(world.SHAPES) :]
    code = torch.cat([shapes - shapes.mean(0), colours - colours.mean(0)])
    code = 3 * F.normalize(code, dim=1)  # of states that are about eight long
    return {tokenizer.words_to_ids(w)[-1]: code[i] for i, w in enumerate(words)}, frame


class Clip(nn.Module):
    """open_clip's CLIP of CLIP_CONFIG, and what only its training needs: a linear head that reads
    the scene from the text, and the frame of `word_directions`."""

    def __init__(self):
        super().__init__()
        self.clip = open_clip.model.CLIP(**CLIP_CONFIG)
        self.head = nn.Linear(64, 5 * world.FRAMES + 8 + 6 + 5)
        self.directions, frame = word_directions()
        self.register_buffer("frame", frame, persistent=False)

    def keep_text(self, kept):
        """Take a text encoder's weights, which learn no more."""
        self.clip.load_state_dict(kept, strict=False)
        for name, p in self.clip.named_parameters():
            p.requires_grad_(name not in kept)

    def read(self, ids):
        """The text encoder's states (B, N, 64), and CLIP's features (B, 64)."""
        clip, layers = self.clip, self.clip.transformer.resblocks
        mask = clip.attn_mask[: ids.shape[1], : ids.shape[1]]
        x = clip.token_embedding(ids) + clip.positional_embedding[: ids.shape[1]]
        for layer in layers[:-1]:
            x = layer(x, attn_mask=mask)
        last = clip.ln_final(layers[-1](x, attn_mask=mask))
        return clip.ln_final(x), end_of(last, ids) @ clip.text_projection

    def word_loss(self, states, ids):
        """Along the frame, every state is the sum of the words of the thing read so far; those of
        the background, after "on", do not count."""
        on = tokenizer.words_to_ids("on")[0]
        goal, thing = torch.zeros_like(states), ((ids == on).cumsum(1) == 0)[..., None]
        for token, vector in self.directions.items():
            read = (((ids == token)[..., None] & thing).cumsum(1) > 0).float()
            goal = goal + read * vector.to(goal)
        return (((states - goal) @ self.frame.T) ** 2).mean()

    def scene_loss(self, text, scenes):
        """How badly the head reads the scene, its path above all, from text (B, 64)."""
        path, reach = world.trajectory(scenes), scenes.reach[:, None]
        goal = [(path.x - scenes.x[:, None]) / reach, (path.y - scenes.y[:, None]) / reach,
                3 * (path.size - 1), path.angle / 2, path.pan / 24,
                F.one_hot(scenes.colour, 8), F.one_hot(scenes.shape, 6),
                F.one_hot(scenes.background, 5)]
        return F.mse_loss(self.head(text.float()), torch.cat(goal, 1).to(text.device))

    def contrast(self, image, text, texts):
        """CLIP's loss of features (B, 64); equal captions are not each other's negatives."""
        image, words = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        logits = self.clip.logit_scale.exp() * image @ words.T
        number = {t: i for i, t in enumerate(texts)}
        number = torch.tensor([number[t] for t in texts])
        same = (number[:, None] == number).float().to(logits.device)
        same = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


def end_of(states, ids):
    """Of states (B, N, D) those at the end of the text, (B, D)."""
    return states[torch.arange(len(ids)), ids.argmax(1)]


def train_clip(args):
    """Frames against captions (Radford et al. 2021, Fig. 3). Two things are added, or the UNet
    would read next to nothing. Frames do not show motion, so a linear head that exists only here
    reads the scene, the thing's path above all, from the text: the words "left" and "right" then
    get states as far apart as words of colour. And words of shape and colour, whose states CLIP
    leaves almost alike (cosine 1.00 between "star" and "cross"), get fixed directions of their own.

    With --keep-text the text encoder stays as it is, for the UNet's sake, and the rest learns."""
    torch.manual_seed(1)
    both = Clip().to(args.device)
    if args.keep_text:
        both.keep_text(model.load_text(args.out, args.device).tower.state_dict())

    def loss_of(step):
        g, loss = generator("clip", step), 0
        pictures = args.keep_text or step % 3 == 0  # two steps in three are text alone, and cheap
        scenes = world.sample_scenes(BATCH["clip"] * (1 if pictures else 2), g)
        texts = world.captions(scenes, g)
        ids = tokenizer.tokenize(texts)[:, :24].to(args.device)  # causal: the rest changes nothing
        with autocast(args):
            states, text = both.read(ids)
        if not args.keep_text:
            ends = end_of(states, ids)
            loss = 10 * (both.scene_loss(text, scenes) + both.scene_loss(ends, scenes))
            loss = loss + both.word_loss(states.float(), ids)
        if pictures:
            with autocast(args):
                image = both.clip.encode_image(frames_of(scenes, g).to(args.device))
            loss = loss + both.contrast(image, text, texts)
        return loss

    run("clip", both, loss_of, export_clip(args), args, no_decay=("embedding",),
        file="clip-kept" if args.keep_text else "clip")


def export_clip(args):
    """The function that writes the text encoder, unless it is kept, and the rest of CLIP: the last
    text layer, the projections, the pictures."""
    def export(state):
        state = {n.removeprefix("clip."): t for n, t in state.items() if n.startswith("clip.")}
        last = f"transformer.resblocks.{CLIP_CONFIG['text_cfg']['layers'] - 1}."
        stem = ("token_embedding", "positional_embedding", "transformer.", "ln_final")
        text = {n: t for n, t in state.items() if n.startswith(stem) and not n.startswith(last)}
        if not args.keep_text:
            write_part(args.out, "text_encoder", TEXT_CONFIG, hub.text_to_hub(text), "model")
        rest = {n: t for n, t in state.items() if n not in text}
        write_part(args.out, "clip", CLIP_CONFIG, rest, "model", "open_clip_config.json")

    return export


# ------------------------------------------------------------------------------------------------
# UNet


def build_unet(args):
    """A fresh UNet, the same at every start."""
    torch.manual_seed(2)
    names = {f.name for f in fields(model.UNetConfig)}
    unet = model.UNet(model.UNetConfig(**{k: v for k, v in UNET_CONFIG.items() if k in names}))
    for name, module in unet.named_modules():
        # The order of frames reaches the network through these alone: let them act from the start.
        if name.endswith("conv4"):
            module[-1].reset_parameters()
            module[-1].weight.data.mul_(0.5)
            module[-1].bias.data.zero_()
    for attention in first_attentions(unet):
        look_at_own_frame(attention)
    return unet.to(args.device).eval()  # no dropout: the data never repeats


def first_attentions(unet):
    """The first of the two attentions of each temporal transformer but transformer_in, in order."""
    return [m for n, m in unet.named_modules() if "temp_attentions" in n and n.endswith("attn1")]


def own_rows(attention):
    """How many rows of queries, keys and values belong to the quarter of the heads that stay with
    their own frame."""
    return attention.to_v.out_features // 4


def look_at_own_frame(attention):
    """A quarter of the heads keep to the frame they stand in, which untrained attention never finds
    the way to: equal queries and keys, so that every token's product is largest with itself. They
    stay as they are while the base is trained."""
    rows = own_rows(attention)
    head = attention.to_q.out_features // attention.heads
    axes = [torch.linalg.qr(torch.randn(attention.to_q.in_features, head)).Q.T
            for _ in range(rows // head)]
    for layer in (attention.to_q, attention.to_k):
        layer.weight.data[:rows] = 4 * torch.cat(axes)
        layer.weight.register_hook(lambda gradient: gradient.index_fill(
            0, torch.arange(rows, device=gradient.device), 0.0))


class Clock(nn.Module):
    """A scaffold of the first steps: one learned vector a frame, added to the first convolution's
    output. Learning to tell frames apart from zero padding alone is slow before anything else is
    known about time; so they are told at first, ever more softly, and at last not at all. Nothing
    of it is in the exported weights."""

    def __init__(self, channels):
        super().__init__()
        self.vectors = nn.Parameter(0.5 * torch.randn(world.FRAMES, channels))
        self.frames, self.loud = 1, 0.0

    def set(self, step, frames):
        """How loud at a step of clips; frames are spread over a clip's whole time."""
        whole, gone = SCAFFOLD
        self.frames, self.loud = frames, min(1.0, max(0.0, (gone - step) / (gone - whole)))

    def forward(self, module, inputs, x):
        """A forward hook of conv_in; x (B·F, C, h, w)."""
        if self.frames == 1 or self.loud == 0:
            return x
        rows = torch.linspace(0, world.FRAMES - 1, self.frames).round().long()
        vectors = self.vectors[rows].repeat(len(x) // self.frames, 1)
        return x + self.loud * vectors[:, :, None, None].to(x)


class Course(nn.Module):
    """A scaffold that gives the temporal attentions their hold on motion. Nothing of it is in the
    exported weights.

    Left to itself, so small a network lets its temporal convolutions say where things go, uses
    attention to average frames, and hardly tells it which frame is which; then nothing that a
    method writes into queries, keys and values moves anything. So, while clips are learned,
    - half of them come with their course: how near a column and how near a row of pixels is to the
      thing, frame by frame, put by a linear map into the values of the first attention of each
      temporal transformer but the earliest, each left out in part. All that follows learns to draw
      a thing of any look where the values say;
    - the tokens that these attentions read shall hold waves over frames, over columns and rows, and
      their products, along fixed directions. Nearness can be made of these by a matrix: by to_v.
    """

    TIMES, PLACES, SHARE, EACH, LOUD = 4, 2, 0.5, 0.6, 0.7

    def __init__(self, unet):
        super().__init__()
        self.maps, self.told, self.tokens = nn.ModuleList(), None, {}
        waves = (1 + self.TIMES) * (1 + 2 * self.PLACES) - 1
        for i, attention in enumerate(first_attentions(unet)):
            self.maps.append(nn.Linear(2, own_rows(attention), bias=False))
            nn.init.normal_(self.maps[i].weight, std=0.7)
            axes = torch.linalg.qr(torch.randn(attention.to_v.in_features, waves)).Q
            self.register_buffer(f"axes{i}", axes)
            attention.to_v.register_forward_hook(self.hook(i))

    def hook(self, i):
        """A forward hook of the values of the i-th attention, (B·h·w, F, C)."""
        def tell(module, inputs, values):
            self.tokens[i] = inputs[0]
            if self.told is None:
                return values
            x, y, on = self.told
            near = nearness(x, y, math.isqrt(len(values) // len(x)))  # (B, h, w, F, 2)
            code = self.maps[i](near) * on[:, i, None, None, None, None]
            code = F.pad(code.flatten(0, 2), (0, values.shape[-1] - code.shape[-1]))
            return values + code

        return tell

    def tell(self, path, g):
        """The courses of a batch, and which attentions hear them; of None, nothing is told."""
        self.told = None
        if path is None:
            return
        chance = torch.rand(len(path.x), 1 + len(self.maps), generator=g)
        on = (chance[:, :1] < self.SHARE) & (chance[:, 1:] < self.EACH)
        on[:, 0] = False  # its tokens cannot tell the frame, see `wave_loss`
        device = self.maps[0].weight.device
        self.told = tuple(t.to(device).float() for t in (path.x, path.y, on))

    def wave_loss(self, batch):
        """How badly the tokens of a batch tell frame and place. The first attention is not asked:
        the one convolution before it sees four frames far, not sixteen."""
        loss = 0.0
        for i in range(1, len(self.maps)):
            tokens, axes = self.tokens[i].float(), getattr(self, f"axes{i}")
            goal = self.waves(tokens.shape[1], math.isqrt(len(tokens) // batch)).to(axes)
            loss = loss + ((tokens @ axes).unflatten(0, (batch, -1)) - goal).square().mean()
        return loss

    def waves(self, frames, side):
        """(h·w, F, waves): cosines over frames times those over columns, and over rows."""
        def cosines(n, count):
            at = math.pi * (torch.arange(n) + 0.5) / n
            return torch.stack([(k * at).cos() for k in range(count + 1)], 1)

        time, place = cosines(frames, self.TIMES), cosines(side, self.PLACES)
        column = torch.einsum("fk,xj->xfkj", time, place).expand(side, -1, -1, -1, -1)
        both = [column.flatten(3), column[..., 1:].transpose(0, 1).flatten(3)]
        return self.LOUD * torch.cat(both, -1)[..., 1:].flatten(0, 1)  # without the constant


def nearness(x, y, side):
    """How near each column and each row of side × side pixels is to a place (B, F): (B, h, w, F, 2)
    in [0, 1]."""
    centre = (torch.arange(side, device=x.device) + 0.5) * world.SIZE / side
    bell = lambda at: torch.exp(-(((centre[:, None] - at[:, None]) / 9) ** 2) / 2)  # (B, side, F)
    columns = bell(x)[:, None].expand(-1, side, -1, -1)
    rows = bell(y)[:, :, None].expand(-1, -1, side, -1)
    return torch.stack([columns, rows], -1)


def build_schedule():
    """The noise schedule of SCHEDULE."""
    return Schedule(**{k: v for k, v in SCHEDULE.items() if k[0] != "_"})


def unet_loss(unet, schedule, latents, text, g, args, temporal, skew, low=0):
    """Mean squared error of v, at timesteps low + (T − low)·u^skew: with 1 they are uniform, with
    more low noise is favoured. With this schedule a thing's shape and colour are decided below
    t = 400 or so, its motion, which all frames show together, above."""
    B, T = len(latents), schedule.num_train_timesteps
    t = (low + torch.rand(B, generator=g) ** skew * (T - low)).long()
    noise = torch.randn(latents.shape, generator=g).to(latents)
    x, goal = schedule.add_noise(latents, noise, t), schedule.target(latents, noise, t)
    with autocast(args):
        out = unet(x, t.to(args.device), text, temporal=temporal)
    return ((out.float() - goal) ** 2).mean()


def export_unet(args):
    """The function that writes the UNet's averaged weights, and what belongs beside them."""
    def export(state):
        write_part(args.out, "unet", UNET_CONFIG, state)
        (args.out / "scheduler").mkdir(exist_ok=True)
        path = args.out / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(SCHEDULE, indent=2) + "\n")
        (args.out / "model_index.json").write_text(json.dumps(
            {"_class_name": "TextToVideoSDPipeline", "scheduler": ["diffusers", "DDIMScheduler"],
             "text_encoder": ["transformers", "CLIPTextModel"],
             "unet": ["diffusers", "UNet3DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]},
            indent=2) + "\n")

    return export


class Pool:
    """Encoded scenes, each used REUSE times on average (with other noise, timesteps and captions)
    before the next pool is rendered: encoding would otherwise cost a third of the time."""

    REUSE = 6

    def __init__(self, key, size, batch, render, motions, args, unnamed=0.0):
        self.key, self.size, self.batch_size, self.args = key, size, batch, args
        self.render, self.motions, self.unnamed = render, motions, unnamed
        self.vae = model.load_vae(args.out, args.device)
        self.text = model.load_text(args.out, args.device)
        self.steps, self.number = size * self.REUSE // batch, None

    def fill(self, number):
        """Render and encode the pool's `number`-th contents."""
        self.number, latents = number, []
        g = generator("clips", 10**8 + self.key * 10**6 + number)
        self.scenes = world.sample_scenes(self.size, g, self.motions, unnamed=self.unnamed)
        for rows in torch.arange(self.size).split(64):
            video = self.render(self.scenes[rows], g).to(self.args.device)
            with torch.no_grad(), autocast(self.args):
                latents.append(self.vae.encode_video(video).float())
        self.latents = torch.cat(latents)

    def batch(self, step, g, motion):
        """Latents (B, C, F, h, w), caption states (B, N, D) and scenes of a step, from its number.
        """
        if step // self.steps != self.number:
            self.fill(step // self.steps)
        rows = torch.randint(self.size, (self.batch_size,), generator=g)
        with torch.no_grad(), autocast(self.args):
            states = self.text(world.captions(self.scenes[rows], g, motion)).float()
        return self.latents[rows], states, self.scenes[rows]


def picture_pool(args):
    """Encoded single frames."""
    render = lambda scenes, g: frames_of(scenes, g)[:, :, None]
    return Pool(0, 8192, BATCH["pictures"], render, world.BASE, args)


def train_pictures(args):
    """Single frames, all temporal layers bypassed, captions without motion: what things look like.
    """
    unet, schedule = build_unet(args), build_schedule()
    pool = picture_pool(args)

    def loss_of(step):
        g = generator("pictures", step)
        latents, states, _ = pool.batch(step, g, motion=False)
        return unet_loss(unet, schedule, latents, states, g, args, False, skew=1.5)

    run("pictures", unet, loss_of, export_unet(args), args)


def train_clips(args):
    """Whole clips, along CURRICULUM: how things move. Every sixth step is one of pictures, which
    keep looks right. Starts from the pictures' state where there is one, else from the weights that
    are there, and then in the curriculum's last part: so the committed model can be trained on."""
    unet, schedule = build_unet(args), build_schedule()
    clock = Clock(UNET_CONFIG["block_out_channels"][0]).to(args.device)
    unet.conv_in.register_forward_hook(clock)
    course = Course(unet).to(args.device)
    pictures, pools, offset = picture_pool(args), {}, 0
    if (args.work / "pictures.pt").exists():
        unet.load_state_dict(torch.load(args.work / "pictures.pt", weights_only=True,
                                        map_location=args.device)["average"])
    else:
        unet.load_state_dict(model.load_unet(args.out).state_dict())
        offset = CURRICULUM[-2][0]
    for p in unet.parameters():
        p.requires_grad_(True)
    both = nn.ModuleDict({"unet": unet, "clock": clock, "course": course})

    def loss_of(step):
        g = generator("clips", step)
        at = step + offset
        part = next(i for i, c in enumerate(CURRICULUM) if at < c[0])
        _, frames, batch, motions, unnamed, low = CURRICULUM[part]
        if step % PICTURES_EVERY == PICTURES_EVERY - 1:
            clock.set(at, 1)
            course.tell(None, g)
            latents, states, _ = pictures.batch(step // PICTURES_EVERY, g, False)
            return unet_loss(unet, schedule, latents, states, g, args, False, skew=1.5)
        clock.set(at, frames)
        if part not in pools:
            pools.clear()
            render = lambda scenes, g: world.render(scenes, frames)
            pools[part] = Pool(1 + part, 24576 // frames, batch, render, motions, args, unnamed)
        latents, states, scenes = pools[part].batch(step, g, True)
        course.tell(world.trajectory(scenes, frames) if at >= SCAFFOLD[0] else None, g)
        loss = unet_loss(unet, schedule, latents, states, g, args, True, args.skew, low)
        return loss + WAVE_WEIGHT * course.wave_loss(len(latents))

    def export(state):
        own = {n.removeprefix("unet."): p for n, p in state.items() if n.startswith("unet.")}
        export_unet(args)(own)

    run("clips", both, loss_of, export, args)


# ------------------------------------------------------------------------------------------------
# The classifier of motions


def strange_path(scenes, g):
    """What no motion of the world looks like, mostly: half of the scenes wander smoothly, the other
    half change their motion midway."""
    n, u = len(scenes), torch.linspace(0, 1, world.FRAMES)
    path = world.trajectory(scenes)
    other = world.trajectory(scenes.but(motion=scenes.motion.roll(1)))
    halves = {k: torch.where(u < 0.5, v, getattr(other, k)) for k, v in vars(path).items()}
    wave = lambda: sum(torch.randn(n, 1, generator=g) / k ** 0.5 * torch.sin(
        2 * math.pi * (k * u / 2 + torch.rand(n, 1, generator=g))) for k in (1, 2, 3, 5))
    wanders = torch.rand(n, 1, generator=g) < 0.5
    for axis in ("x", "y"):
        centre = getattr(scenes, axis)[:, None]
        free = (centre + 0.7 * scenes.reach[:, None] * wave()).clamp(6, world.SIZE - 6)
        halves[axis] = torch.where(wanders, free, halves[axis])
    return world.Path_(**halves)


def motions_to_tell(n, g):
    """n clips (n, 3, F, H, W) and their kinds of motion (n,), the last kind for none of these. So
    that a model's imperfect videos are told too, shapes and sizes waver in half of the clips."""
    scenes = world.sample_scenes(n, g, world.MOTIONS)
    strange = torch.rand(n, generator=g) < 0.15
    path, odd = world.trajectory(scenes), strange_path(scenes, g)
    for name, values in vars(odd).items():
        setattr(path, name, torch.where(strange[:, None], values, getattr(path, name)))
    read = instruments.read_motion(
        path.x, path.y, scenes.radius[:, None] * path.size, path.angle[:, -1] - path.angle[:, 0],
        path.width.amin(1), path.pan.diff(dim=1).mean(1))
    kinds = torch.where(strange, read, scenes.motion) % (len(world.MOTIONS) + 1)
    wavering = scenes.but(shape=torch.randint(6, (n,), generator=g),
                          radius=scenes.radius * (0.8 + 0.4 * torch.rand(n, generator=g)))
    spins = world.is_motion(kinds, "spinning", "tumbling")
    often = 0.8 * (torch.rand(n, generator=g) - 0.5).clamp(min=0) * ~spins
    wavers = torch.rand(n, world.FRAMES, generator=g) < often[:, None]
    video = torch.where(wavers[:, None, :, None, None], world.render(wavering, path=path),
                        world.render(scenes, path=path))
    return video, kinds


def train_motion(args):
    """The temporal relation network of scores/motion.py, on all motions and on others."""
    torch.manual_seed(4)
    net, pool = TRN(len(world.MOTIONS) + 1).to(args.device), {}

    def loss_of(step):
        number = step * BATCH["motion"] // (1024 * Pool.REUSE)
        if number not in pool:
            pool.clear()
            parts = [motions_to_tell(64, generator("motion", 10**7 + 16 * number + i))
                     for i in range(16)]
            pool[number] = [torch.cat(p) for p in zip(*parts)]
        g = generator("motion", step)
        rows = torch.randint(1024, (BATCH["motion"],), generator=g)
        video, kinds = pool[number][0][rows], pool[number][1][rows]
        loud = 0.3 * torch.rand(len(rows), 1, 1, 1, 1, generator=g) ** 2
        video = video + loud * torch.randn(video.shape, generator=g)
        with autocast(args):
            logits = net(video.to(args.device))
        return F.cross_entropy(logits.float(), kinds.to(args.device))

    def export(state):
        write_part(args.out, "motion", {"classes": [*world.MOTIONS, "none of these"]}, state,
                   "model")
        scenes = world.sample_scenes(400, generator("motion", 10**8), world.MOTIONS)
        held = {n: p.detach().clone() for n, p in net.named_parameters()}
        net.load_state_dict(state)
        with torch.no_grad():
            right = net(world.render(scenes).to(args.device)).argmax(1).cpu() == scenes.motion
        net.load_state_dict(held)
        print(f"motion: {100 * right.float().mean():.1f} % of held-out clips", flush=True)

    run("motion", net, loss_of, export, args)


def main():
    """Run the stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--out", type=Path, default=HERE / "weights", help="where the weights go")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="where the state goes")
    parser.add_argument("--steps", type=int, help="last step of the stage; default per stage")
    parser.add_argument("--rate", type=float, help="peak learning rate; default per stage")
    parser.add_argument("--keep-text", action="store_true",
                        help="clip: learn all but the text encoder, which a UNet already reads")
    parser.add_argument("--skew", type=float, default=0.8,
                        help="clips' timesteps are T·u^skew (default: 0.8, somewhat to high noise)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where to compute; default: a GPU if any")
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(unknown)}; choose from {', '.join(STAGES)}")
    machine.keep_memory()
    for stage in args.stages or STAGES:
        globals()[f"train_{stage}"](args)


if __name__ == "__main__":
    main()
