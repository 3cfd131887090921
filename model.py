"""The video UNet, the VAE and the text encoder of ZeroScope / ModelScope, and how to load them.

    python -c "import model; print(model.load('tiny/weights').unet.config)"

Modules carry the names of the released files, so their state dicts load strictly and without a
table; the text encoder, which is open_clip's, is the one exception (`hub_text_keys`). The same
classes make the full-size model (1.41 B parameters) and the tiny one: only config.json differs.

Axes: B prompts or clips, F frames, C channels, H W picture, h w latent (H/8, W/8), N text tokens,
D text width. "Folded" tensors are (B·F, C, h, w): to a spatial layer each frame is a picture.
"""
import ctypes
import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from sampler import Schedule


class BadInput(ValueError):
    """What a person gave cannot be used; the message says what was found, wanted and to be done."""


# ------------------------------------------------------------------------------------------------
# Shapes: time folded into batch, and space into tokens


def fold_frames(video):
    """(B, C, F, h, w) -> (B·F, C, h, w), in channels-last memory, where tokens are a free view."""
    B, C, frames, h, w = video.shape
    folded = video.transpose(1, 2).reshape(B * frames, C, h, w)
    return folded.contiguous(memory_format=torch.channels_last)


def unfold_frames(pictures, frames):
    """(B·F, C, h, w) -> (B, C, F, h, w)."""
    BF, C, h, w = pictures.shape
    return pictures.reshape(BF // frames, frames, C, h, w).transpose(1, 2)


def to_tokens(x):
    """(N, C, h, w) -> (N, h·w, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_picture(tokens, h, w):
    """(N, h·w, C) -> (N, C, h, w)."""
    return tokens.unflatten(1, (h, w)).permute(0, 3, 1, 2)


def over_time(x, frames):
    """(B·F, C, h, w) -> (B, C, F, h·w), a view that lets 2-D kernels work along time."""
    BF, C, h, w = x.shape
    return to_tokens(x).reshape(BF // frames, frames, h * w, C).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------
# Layers shared by the UNet and the VAE


LARGE = 2**20  # numbers in a tensor, from where memory counts for more than the calls


def lean(f, *inputs):
    """f(*inputs), of which only the inputs are kept for the backward pass, where they are large:
    there f is computed again, up to its last operation, whose result no gradient needs. For what is
    cheap beside its memory: norms and activations before a convolution, attention's scores."""
    x = inputs[0]
    if torch.is_grad_enabled() and x.requires_grad and x.numel() >= LARGE:
        return checkpoint(f, *inputs, use_reentrant=False)
    return f(*inputs)


class Resnet(nn.Module):
    """norm, SiLU, conv, twice, on a residual path; the time embedding is added in between."""

    def __init__(self, c_in, c_out, groups, eps, time_dim=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if time_dim is not None:
            self.time_emb_proj = nn.Linear(time_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, time=None):
        h = lean(lambda x: self.conv1(F.silu(self.norm1(x))), x)
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = lean(lambda h: self.conv2(F.silu(self.norm2(h))), h)
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size):
        # To the skip's size and not simply ×2: odd sizes were rounded up on the way down.
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Downsample(nn.Module):
    """A convolution of stride 2: (N, C, h, w) -> (N, C, h/2, w/2), rounded up in the UNet."""

    def __init__(self, channels, padding=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x):
        if self.conv.padding == (0, 0):  # the VAE pads on the right and below only
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


def attend(q, k, v):
    """softmax(q·kᵀ/√d)·v on (…, heads, tokens, d).

    On a CPU the fused kernel is slower than two matrix products for the sequences met here, its
    backward several times so, and is kept for those whose scores would need much memory. Rows
    shorter than 128 go through the softmax in fp32, which there is exact and faster than bf16.
    """
    if q.device.type != "cpu" or k.shape[-2] > 1024:
        return F.scaled_dot_product_attention(q, k, v)

    def plain(q, k, v):
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        wide = torch.promote_types(q.dtype, torch.float32 if k.shape[-2] < 128 else q.dtype)
        return scores.softmax(-1, wide).to(v.dtype) @ v

    return lean(plain, q, k, v)


class _Masked(torch.autograd.Function):
    """x·keep·scale, which keeps one byte an element for the backward pass."""

    @staticmethod
    def forward(ctx, x, keep, scale):
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return x * keep.to(x.dtype).mul_(scale)

    @staticmethod
    def backward(ctx, g):
        keep, = ctx.saved_tensors
        return g * keep.to(g.dtype).mul_(ctx.scale), None, None


def dropout(x, p, training):
    """F.dropout; on a CPU its mask is read off random words, 16 bits an element, at a quarter of
    the time of drawing Bernoulli numbers. p is rounded to 1/65536."""
    if x.device.type != "cpu" or not training or p == 0:
        return F.dropout(x, p, training)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    like = torch.empty_like(x)  # never written: for its strides, since the mask lies as x does
    bits = words.view(torch.int16)[: x.numel()].as_strided(like.shape, like.stride())
    keep = (bits >= round(p * 2**16) - 2**15).view(torch.uint8)  # bool itself converts slowly
    if x.numel() >= LARGE:
        return _Masked.apply(x, keep, 1 / (1 - p))
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


class Dropout(nn.Dropout):
    """nn.Dropout with the faster mask."""

    def forward(self, x):
        return dropout(x, self.p, self.training)


class Attention(nn.Module):
    """Multi-head attention; self-attention when no context is given."""

    def __init__(self, dim, heads, head_dim, context_dim=None, bias=False):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, inner, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def forward(self, x, context=None):
        context = x if context is None else context
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        out = attend(split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context)))
        return self.to_out[0](out.transpose(1, 2).flatten(2))


# ------------------------------------------------------------------------------------------------
# The video UNet's own layers


class GEGLU(nn.Module):
    """x·gelu(gate), both linear in the input (Shazeer 2020); gelu is the exact one."""

    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim * 8)

    def forward(self, x):
        def activate(both):
            x, gate = both.chunk(2, dim=-1)
            return x * F.gelu(gate)

        return lean(activate, self.proj(x))


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, dim):
        super().__init__()
        # The identity stands where the released code has a dropout of 0, to keep the numbering.
        self.net = nn.Sequential(GEGLU(dim), nn.Identity(), nn.Linear(dim * 4, dim))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """attn1 (self), attn2 (text in a spatial block, self again in a temporal one), feed-forward."""

    def __init__(self, dim, heads, head_dim, context_dim=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, head_dim, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x, text=None):
        x = self.attn1(self.norm1(x)) + x
        if text is None:
            x = self.attn2(self.norm2(x)) + x
        else:
            # All frames of a clip share one prompt, so its frames stand in one row of queries and
            # the prompt's keys and values are computed once instead of once a frame.
            queries = self.norm2(x).reshape(text.shape[0], -1, x.shape[-1])
            x = self.attn2(queries, text).view(x.shape) + x
        return self.ff(self.norm3(x)) + x


class Transformer(nn.Module):
    """What the spatial and the temporal transformer share. GroupNorm's eps is 1e-6 here."""

    def __init__(self, channels, heads, head_dim, groups, context_dim=None):
        super().__init__()
        inner = heads * head_dim
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(inner, heads, head_dim, context_dim)]
        )
        self.proj_out = nn.Linear(inner, channels)

    def blocks(self, tokens, text=None):
        tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, text)
        return self.proj_out(tokens)


class SpatialTransformer(Transformer):
    """Each frame attends to its own pixels and to the text."""

    def forward(self, x, text):
        h, w = x.shape[-2:]
        return x + to_picture(self.blocks(to_tokens(self.norm(x)), text), h, w)


class TemporalTransformer(Transformer):
    """Each pixel attends to itself at all frames: no text, no mask, no position (order reaches it
    through the zero padding of the temporal convolutions alone)."""

    def forward(self, x, frames):
        h, w = x.shape[-2:]
        y = self.norm(over_time(x, frames))  # (B, C, F, hw): the statistics include the frames
        B, C = y.shape[:2]
        y = y.permute(0, 3, 2, 1).reshape(B * h * w, frames, C).contiguous()
        y = self.blocks(y).view(B, h * w, frames, C).transpose(1, 2)  # (B, F, hw, C)
        return x + to_picture(y.reshape(B * frames, h * w, C), h, w)  # x first: in its layout


class TimeConv(nn.Conv3d):
    """A Conv3d (3, 1, 1), on (B, C, F, h·w) in the 2-D kernel, several times faster: same numbers.
    """

    def __init__(self, channels):
        super().__init__(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x):
        return F.conv2d(x, self.weight.squeeze(-1), self.bias, padding=(1, 0))


class TemporalConv(nn.Module):
    """Four convolutions along time. The last starts at zero, so a fresh one changes nothing."""

    def __init__(self, channels, groups, dropout=0.1):
        super().__init__()
        conv = lambda: TimeConv(channels)
        norm = lambda: nn.GroupNorm(groups, channels)
        self.conv1 = nn.Sequential(norm(), nn.SiLU(), conv())
        for i in (2, 3, 4):
            layers = nn.Sequential(norm(), nn.SiLU(), Dropout(dropout), conv())
            setattr(self, f"conv{i}", layers)
        nn.init.zeros_(self.conv4[-1].weight)
        nn.init.zeros_(self.conv4[-1].bias)

    def forward(self, x, frames):
        h, w = x.shape[-2:]
        y = over_time(x, frames)  # (B, C, F, hw)
        for layers in (self.conv1, self.conv2, self.conv3, self.conv4):
            y = lean(layers, y)
        y = y.permute(0, 2, 3, 1).reshape(x.shape[0], h * w, -1)
        return x + to_picture(y, h, w)


class Block(nn.Module):
    """One level of the UNet: layers of resnet, temporal convolution and, in the first `attended` of
    them, the two transformers; then a change of size. Going up, each layer first takes a skip from
    the way down."""

    def __init__(self, config, c_in, c_out, layers, attended, skips=(), resize=None):
        super().__init__()
        c, groups = config, config.norm_num_groups
        widths = [c_in] + [c_out] * (layers - 1)
        skips = list(skips) or [0] * layers
        heads = c_out // c.attention_head_dim
        sizes = (c_out, heads, c.attention_head_dim, groups)
        make = lambda n, cls, *args: nn.ModuleList([cls(*args) for _ in range(n)])
        self.resnets = nn.ModuleList(
            [Resnet(a + b, c_out, groups, c.norm_eps, c.time_dim) for a, b in zip(widths, skips)]
        )
        self.temp_convs = make(layers, TemporalConv, c_out, groups)
        self.attentions = make(attended, SpatialTransformer, *sizes, c.cross_attention_dim)
        self.temp_attentions = make(attended, TemporalTransformer, *sizes)
        if resize == "down":
            self.downsamplers = nn.ModuleList([Downsample(c_out, c.downsample_padding)])
        if resize == "up":
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def layer(self, i, x, time, text, frames):
        """Layer i on folded x; frames = None leaves everything temporal out."""
        x = self.resnets[i](x, time)
        if frames:
            x = self.temp_convs[i](x, frames)
        if i < len(self.attentions):
            x = self.attentions[i](x, text)
            if frames:
                x = self.temp_attentions[i](x, frames)
        return x


class TimeEmbedding(nn.Module):
    """Sines and cosines of the timestep, and two linear layers."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)

    def forward(self, t):
        """(B,) -> (B, c_out). Cosines first; in fp32 whatever the model's dtype."""
        half = self.linear_1.in_features // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angles = t[:, None].float() * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


# ------------------------------------------------------------------------------------------------
# The video UNet


class Config:
    """Fields read from a hub config.json; names that are not ours are left alone."""

    @classmethod
    def read(cls, path):
        """Raises BadInput when the file is missing, is no JSON, or lacks a field."""
        values = read_json(path)
        names = {f.name for f in fields(cls)}
        try:
            return cls(**{k: v for k, v in values.items() if k in names})
        except TypeError as error:
            raise BadInput(f"{path}: {error}. Take the config.json beside the weights.") from None


@dataclass
class UNetConfig(Config):
    """unet/config.json. attention_head_dim is a head's width: channels/64 heads at full size."""

    block_out_channels: list
    cross_attention_dim: int
    down_block_types: list
    up_block_types: list
    attention_head_dim: int = 64
    layers_per_block: int = 2
    in_channels: int = 4
    out_channels: int = 4
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    downsample_padding: int = 1
    sample_size: int = 32
    # Ours, and off in every released model: tell the resnets which frame of the clip they see. The
    # released ones learn it from the zero padding of their many temporal convolutions; a shallow
    # network trained for an hour does not.
    frame_embedding: bool = False

    @property
    def time_dim(self):
        return self.block_out_channels[0] * 4


class UNet(nn.Module):
    """UNet3DConditionModel of ModelScope and ZeroScope (graph: Wang et al. 2023, Fig. 2)."""

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        c, width, layers = config, config.block_out_channels, config.layers_per_block
        first, last = width[0], width[-1]
        self.conv_in = nn.Conv2d(c.in_channels, first, 3, padding=1)
        # Always eight heads, whatever the channels.
        self.transformer_in = TemporalTransformer(
            first, 8, c.attention_head_dim, c.norm_num_groups
        )
        self.time_embedding = TimeEmbedding(first, c.time_dim)
        if c.frame_embedding:
            self.frame_embedding = TimeEmbedding(first, c.time_dim)
            nn.init.zeros_(self.frame_embedding.linear_2.weight)
            nn.init.zeros_(self.frame_embedding.linear_2.bias)

        self.down_blocks, skips, here = nn.ModuleList(), [first], first
        for i, (kind, out) in enumerate(zip(c.down_block_types, width)):
            resize = "down" if i < len(width) - 1 else None
            attended = layers * kind.startswith("CrossAttn")
            self.down_blocks.append(Block(c, here, out, layers, attended, resize=resize))
            skips += [out] * (layers + (resize is not None))
            here = out
        self.mid_block = Block(c, last, last, layers=2, attended=1)
        self.up_blocks = nn.ModuleList()
        for i, (kind, out) in enumerate(zip(c.up_block_types, reversed(width))):
            taken = [skips.pop() for _ in range(layers + 1)]
            resize = "up" if i < len(width) - 1 else None
            attended = len(taken) * kind.startswith("CrossAttn")
            self.up_blocks.append(Block(c, here, out, len(taken), attended, taken, resize))
            here = out

        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, first, c.norm_eps)
        self.conv_out = nn.Conv2d(first, c.out_channels, 3, padding=1)

    def forward(self, latents, timesteps, text, temporal=True):
        """The prediction (epsilon or v, as the schedule says) for noisy latents.

        latents (B, C, F, h, w), timesteps (B,) or a number, text (B, N, D) -> (B, C, F, h, w).
        With k·B texts, all first ones, then all second ones …, -> (k·B, C, F, h, w): guidance reads
        two texts, and what comes before the first of them is computed once.
        temporal=False leaves every temporal layer out, the mid-block's too: a pure image model
        that sees F independent pictures.
        """
        B, _, F_, h, w = latents.shape
        texts = text.shape[0] // B
        assert text.shape[0] == texts * B, f"{text.shape[0]} prompts for {B} clips; give one each"
        frames = F_ if temporal else None
        timesteps = torch.as_tensor(timesteps, device=latents.device).expand(B)
        time = self.time_embedding(timesteps).repeat_interleave(F_, dim=0)  # (B·F, time_dim)
        if frames and self.config.frame_embedding:
            clip = torch.linspace(0, 999, F_, device=latents.device)  # start to end, as timesteps
            time = time + self.frame_embedding(clip).repeat(B, 1)

        x = self.conv_in(fold_frames(latents))  # (B·F, C, h, w)
        if frames:
            x = self.transformer_in(x, frames)
        x, time = torch.cat([x] * texts), torch.cat([time] * texts)  # channels stay last
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = self._run(block.layer, i, x, time, text, frames)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)  # (B·F, C, h/2, w/2)
                skips.append(x)
        for i in range(2):
            x = self._run(self.mid_block.layer, i, x, time, text, frames)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = torch.cat([x, skips.pop()], dim=1)
                x = self._run(block.layer, i, x, time, text, frames)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x, skips[-1].shape[-2:])  # (B·F, C, 2h, 2w)
        x = F.silu(self.conv_norm_out(x))
        if torch.is_autocast_enabled(x.device.type):
            # Guidance multiplies the rounding of the last layer; in fp32 there is none.
            with torch.autocast(x.device.type, enabled=False):
                weight, bias = self.conv_out.weight.float(), self.conv_out.bias.float()
                return unfold_frames(F.conv2d(x.float(), weight, bias, padding=1), F_)
        return unfold_frames(self.conv_out(x), F_)

    def _run(self, layer, *inputs):
        """With checkpointing, a layer's activations are computed again in the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


# ------------------------------------------------------------------------------------------------
# The VAE


@dataclass
class VAEConfig(Config):
    """vae/config.json. Latents are multiplied by scaling_factor before the UNet sees them."""

    block_out_channels: list
    layers_per_block: int = 2
    latent_channels: int = 4
    in_channels: int = 3
    out_channels: int = 3
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def factor(self):
        """How many pixels a latent is wide: 8 for four levels."""
        return 2 ** (len(self.block_out_channels) - 1)


VAE_EPS = 1e-6
PIXELS_AT_ONCE = 2**18  # that the VAE works on: 64 frames of 64×64, one of 576×320


class PictureAttention(Attention):
    """One head over all pixels, with its own GroupNorm and residual."""

    def __init__(self, channels, groups):
        super().__init__(channels, 1, channels, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, VAE_EPS)

    def forward(self, x):
        h, w = x.shape[-2:]
        return to_picture(super().forward(to_tokens(self.group_norm(x))), h, w) + x


class VAEMid(nn.Module):
    """Resnet, attention, resnet."""

    def __init__(self, channels, groups):
        super().__init__()
        make = lambda: Resnet(channels, channels, groups, VAE_EPS)
        self.resnets = nn.ModuleList([make(), make()])
        self.attentions = nn.ModuleList([PictureAttention(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class VAEBlock(nn.Module):
    """One level of the VAE: resnets, then a change of size."""

    def __init__(self, c_in, c_out, layers, groups, down=False, up=False):
        super().__init__()
        widths = [c_in] + [c_out] * (layers - 1)
        self.resnets = nn.ModuleList([Resnet(w, c_out, groups, VAE_EPS) for w in widths])
        if down:
            self.downsamplers = nn.ModuleList([Downsample(c_out, padding=0)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, (2 * x.shape[-2], 2 * x.shape[-1]))
        return x


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) to moments (B, 2·C, H/8, W/8)."""

    def __init__(self, config):
        super().__init__()
        width, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, width[0], 3, padding=1)
        pairs = list(zip([width[0], *width], width))
        self.down_blocks = nn.ModuleList(
            VAEBlock(a, b, config.layers_per_block, groups, down=i < len(pairs) - 1)
            for i, (a, b) in enumerate(pairs)
        )
        self.mid_block = VAEMid(width[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, width[-1], VAE_EPS)
        self.conv_out = nn.Conv2d(width[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents (B, C, h, w) to pictures (B, 3, 8h, 8w)."""

    def __init__(self, config):
        super().__init__()
        width, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, width[0], 3, padding=1)
        self.mid_block = VAEMid(width[0], groups)
        pairs = list(zip([width[0], *width], width))
        self.up_blocks = nn.ModuleList(
            VAEBlock(a, b, config.layers_per_block + 1, groups, up=i < len(pairs) - 1)
            for i, (a, b) in enumerate(pairs)
        )
        self.conv_norm_out = nn.GroupNorm(groups, width[-1], VAE_EPS)
        self.conv_out = nn.Conv2d(width[-1], config.out_channels, 3, padding=1)

    def forward(self, x):
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Stable Diffusion's AutoencoderKL (Rombach et al. 2022). Frames are independent pictures."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)

    def encode(self, frames):
        """(B, 3, H, W) in [-1, 1] -> mean and standard deviation, each (B, C, H/8, W/8), unscaled.
        """
        frames = frames.contiguous(memory_format=torch.channels_last)
        moments = self.quant_conv(self.encoder(frames))
        mean, logvar = moments.chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30, 20))

    def decode(self, latents):
        """Unscaled latents (B, C, h, w) -> frames (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        latents = latents.contiguous(memory_format=torch.channels_last)
        return self.decoder(self.post_quant_conv(latents))

    def encode_video(self, video):
        """(B, 3, F, H, W) in [-1, 1] -> posterior means, scaled for the UNet, (B, C, F, h, w)."""
        chunk = max(1, PIXELS_AT_ONCE // (video.shape[-2] * video.shape[-1]))
        means = [self.encode(part)[0] for part in fold_frames(video).split(chunk)]
        return unfold_frames(torch.cat(means), video.shape[2]) * self.config.scaling_factor

    def decode_video(self, latents):
        """Scaled latents (B, C, F, h, w) -> (B, 3, F, H, W) in [-1, 1], a few frames at a time."""
        pixels = latents.shape[-2] * latents.shape[-1] * self.config.factor**2
        chunk = max(1, PIXELS_AT_ONCE // pixels)
        folded = fold_frames(latents / self.config.scaling_factor)
        frames = [self.decode(part).clamp(-1, 1) for part in folded.split(chunk)]
        return unfold_frames(torch.cat(frames), latents.shape[2])


# ------------------------------------------------------------------------------------------------
# The text encoder


@dataclass
class TextConfig(Config):
    """text_encoder/config.json. ZeroScope's has 23 layers: CLIP ViT-H's 24 without the last."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 77
    vocab_size: int = 49408


START, END = 49406, 49407  # <|startoftext|> and <|endoftext|> in CLIP's vocabulary
_tokenizer = None


def word_pattern(words):
    """The pattern of any of the words, standing alone: 'sks' is not in 'desks'."""
    words = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    return rf"(?<!\w)({words})(?!\w)"


def has_word(prompt, word):
    """Whether a prompt has a word standing alone."""
    return re.search(word_pattern([word]), prompt) is not None


def words_to_ids(prompt, learned=None):
    """A prompt's token ids, without start and end; learned: {word: its ids} of learned words."""
    global _tokenizer
    if learned:
        parts = re.split(word_pattern(learned), prompt)
        return [i for p in parts for i in (learned[p] if p in learned else words_to_ids(p))]
    if _tokenizer is None:
        from open_clip.tokenizer import SimpleTokenizer  # here, because it takes seconds to import

        _tokenizer = SimpleTokenizer()
    pieces = [_tokenizer.encode(piece) for piece in prompt.split("!")]
    return pieces[0] + [t for piece in pieces[1:] for t in [0, *piece]]


def tokenize(prompts, length=77, learned=None):
    """list of str -> ids (B, length), as the hub's tokenizer makes them: start, text, end, zeros.

    Its padding token is "!", whose id is 0; so every "!" of a prompt is 0 too, where open_clip's
    own rule would give 256. Longer prompts are cut, with the end token kept.
    """
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens = [START, *words_to_ids(prompt, learned)[: length - 2], END]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids


class TextEncoder(nn.Module):
    """open_clip's text tower, run through all its layers and the final norm: no pooling."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.hidden_act != "gelu":
            raise BadInput(f"text encoder: activation {c.hidden_act!r}; wanted 'gelu', ZeroScope's")
        from open_clip.transformer import TextTransformer  # here, as in `tokenize`

        self.tower = TextTransformer(
            context_length=c.max_position_embeddings, vocab_size=c.vocab_size, width=c.hidden_size,
            heads=c.num_attention_heads, layers=c.num_hidden_layers, output_dim=None,
            mlp_ratio=c.intermediate_size / c.hidden_size,
            norm_layer=lambda width: nn.LayerNorm(width, eps=c.layer_norm_eps),
        )
        self.tower.attn_mask = None  # made in `embed`, to fit the ids
        self.learned = {}  # word -> its vectors (n, D): words that the released table lacks

    def forward(self, prompts):
        """list of B prompts -> (B, 77, D). Padding is not masked: the UNet sees all 77 states."""
        ids, first = {}, self.config.vocab_size
        for word, vectors in self.learned.items():  # their ids follow the table's
            ids[word] = list(range(first, first := first + len(vectors)))
        device = self.tower.positional_embedding.device
        return self.embed(tokenize(prompts, self.config.max_position_embeddings, ids).to(device))

    def embed(self, ids):
        """Token ids (B, N) -> (B, N, D); ids past the vocabulary are the learned vectors'."""
        tower, N, V = self.tower, ids.shape[1], self.config.vocab_size
        x = tower.token_embedding(ids.clamp(max=V - 1))
        for i, vector in enumerate(v for vectors in self.learned.values() for v in vectors):
            x = torch.where((ids == V + i)[..., None], vector.to(x), x)
        x = x + tower.positional_embedding[:N]
        causal = torch.full((N, N), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        return tower.ln_final(tower.transformer(x, attn_mask=causal))


HUB_TEXT_NAMES = [  # hub name -> open_clip name, by prefix or part
    ("text_model.", ""),
    ("embeddings.token_embedding.weight", "token_embedding.weight"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("encoder.layers.", "transformer.resblocks."),
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("final_layer_norm", "ln_final"),
]


def text_from_hub(state):
    """The hub's text encoder tensors, by open_clip's names: q, k and v become one matrix."""
    out = {}
    for name, tensor in state.items():
        if name.endswith("position_ids"):  # a constant 0 … 76 that old files carry
            continue
        for hub, ours in HUB_TEXT_NAMES:
            name = name.replace(hub, ours)
        out[name] = tensor
    for name in [n for n in out if n.endswith("self_attn.q_proj.weight")]:
        for kind in ("weight", "bias"):
            stem = name.removesuffix("q_proj.weight")
            parts = [out.pop(f"{stem}{p}_proj.{kind}", None) for p in "qkv"]
            if all(p is not None for p in parts):
                out[f"{stem.replace('self_attn', 'attn')}in_proj_{kind}"] = torch.cat(parts)
    return out


def text_to_hub(state):
    """The reverse of text_from_hub, for writing a folder in the hub's layout."""
    out = {}
    for name, tensor in state.items():
        parts = {"": tensor}
        for kind in ("weight", "bias"):
            if name.endswith(f"attn.in_proj_{kind}"):
                parts = dict(zip("qkv", tensor.chunk(3)))
                name = name.replace(f"attn.in_proj_{kind}", "self_attn.{}_proj." + kind)
        for hub, ours in reversed(HUB_TEXT_NAMES[1:]):
            if "self_attn" not in name or ours != "attn.out_proj":
                name = name.replace(ours, hub)
        for letter, part in parts.items():
            out["text_model." + name.format(letter)] = part.contiguous()
    return out


# ------------------------------------------------------------------------------------------------
# Loading a folder in the hub's layout


def keep_memory():
    """Ask glibc to keep freed memory instead of handing it back to the system and asking again.

    On a Linux CPU a training step maps and unmaps all its activations otherwise, which can cost
    several times the arithmetic. Call it before the first large tensor; elsewhere it does nothing.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        trim, top_pad, mmap = -1, -2, -3  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
        for option, size in ((mmap, 1 << 30), (trim, (1 << 31) - 1), (top_pad, 256 << 20)):
            libc.mallopt(option, size)
    except (OSError, AttributeError):
        pass


@dataclass
class Model:
    """The parts of a text-to-video model: what `load` gives."""

    unet: UNet
    vae: VAE
    text: TextEncoder
    schedule: Schedule


def read_json(path):
    """The object in a JSON file. Raises BadInput when there is none."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path} is missing. A weights folder in the hub's layout has it: "
                       "unet/, vae/, text_encoder/ and scheduler/, each with its config.")
    try:
        values = json.loads(path.read_text())
        assert isinstance(values, dict)
        return values
    except (ValueError, AssertionError):
        raise BadInput(f"{path} is not a JSON object; download it again.") from None


def read_tensors(path, lists=False):
    """The tensors of a .safetensors, .bin, .pt or .pth file, by name, or, where `lists` are allowed
    too, a file's plain list of tensors. Nothing in the file can run.

    Raises BadInput, naming the file, when it is missing, damaged, or holds NaN or infinity.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; check the path.") from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else "empty"
        raise BadInput(f"{path} cannot be read ({reason}); download or save it again.") from None
    except Exception as error:  # pickle's own errors: code in the file, or not a checkpoint at all
        raise BadInput(f"{path} is not a file of plain tensors ({type(error).__name__}); "
                       "nothing in it was run. Get it as .safetensors.") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    named = dict(enumerate(state)) if lists and isinstance(state, list) else state
    if not isinstance(named, dict) or not all(isinstance(v, torch.Tensor) for v in named.values()):
        raise BadInput(f"{path} does not map names to tensors; is it the right file?")
    for name, tensor in named.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BadInput(f"{path}: {name} holds NaN or infinity; download or save it again.")
    return state


def find_weights(folder):
    """The weights file in a part's folder: .safetensors, .fp16.safetensors, .bin, or a lone .pth.
    """
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
        for suffix in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"):
            if (folder / (stem + suffix)).is_file():
                return folder / (stem + suffix)
    if len(pth := sorted(folder.glob("*.pth"))) == 1:  # ModelScope's own format
        return pth[0]
    files = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    raise BadInput(f"{folder} has no weights (found: {', '.join(files[:5]) or 'nothing'}); wanted "
                   "diffusion_pytorch_model.safetensors or .bin there. "
                   "Give --weights the folder that holds unet/, vae/ and text_encoder/.")


def load_strictly(module, state, source):
    """load_state_dict(strict=True) with a short message: the first five wrong names."""
    own = module.state_dict()
    wrong = [f"{n} missing" for n in own if n not in state]
    wrong += [f"{n} unexpected" for n in state if n not in own]
    wrong += [f"{n} is {tuple(t.shape)}, wanted {tuple(own[n].shape)}"
              for n, t in state.items() if n in own and own[n].shape != t.shape]
    if wrong:
        raise BadInput(f"{source} does not fit its config.json: {len(wrong)} names differ, first "
                       + "; ".join(wrong[:5]))
    module.load_state_dict(state, strict=True, assign=True)


def _load(build, folder, part, device, dtype, convert=lambda state, module: state):
    """Build a part without allocating it, then put the file's tensors in its place."""
    folder = Path(folder) / part
    with torch.device("meta"):
        module = build(folder / "config.json")
    source = find_weights(folder)
    state = convert(read_tensors(source), module)
    load_strictly(module, {n: t.to(dtype) for n, t in state.items()}, source)
    module = module.to(device).eval()
    for p in module.parameters():
        p.requires_grad_(False)
    return module


_PTH_NAMES = (  # ours -> ModelScope's own, in turn, after the block's number
    ("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."), ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
)


def pth_name(name, layers=2):
    """A UNet parameter's name in ModelScope's original .pth (the web UIs' format): input_blocks,
    middle_block and output_blocks number the layers through, `layers` a block."""
    stem, *rest = name.split(".")
    if stem == "conv_in":
        return ".".join(["input_blocks.0.0", *rest])
    if stem == "transformer_in":
        return ".".join(["input_blocks.0.1", *rest])
    if stem == "time_embedding":
        return name.replace("time_embedding.linear_1", "time_embed.0").replace(
            "time_embedding.linear_2", "time_embed.2")
    if stem.startswith("conv_"):
        return {"conv_norm_out": "out.0.", "conv_out": "out.2."}[stem] + ".".join(rest)
    if stem == "mid_block":
        kind, j, *tail = rest
        at = f"middle_block.{ {'attentions': 1, 'temp_attentions': 2}.get(kind, 3 * int(j))}"
    else:
        block, kind, j, *tail = rest
        down = stem == "down_blocks"
        n = int(block) * (layers + 1) + int(j) + down
        at = f"{'input' if down else 'output'}_blocks.{n}"
        if kind == "downsamplers":
            return ".".join([f"input_blocks.{n + layers}.op", *tail[1:]])
        if kind == "upsamplers":
            # After the level's last layer, which has two transformers from the second level on.
            last = 1 if int(block) == 0 else 3
            return ".".join([f"output_blocks.{n + layers}.{last}", *tail])
        at += {"attentions": ".1", "temp_attentions": ".2"}.get(kind, ".0")
    tail = ".".join(tail)
    if kind == "temp_convs":
        return f"{at}.temopral_conv.{tail}"  # spelt so in the released file
    if kind == "resnets":
        for ours, theirs in _PTH_NAMES:
            tail = theirs + tail.removeprefix(ours) if tail.startswith(ours) else tail
    return f"{at}.{tail}"


def unet_from_pth(state, unet):
    """The tensors of a ModelScope .pth by the UNet's own names; its proj_in and proj_out are
    convolutions of width 1. Leaves any other file as it is."""
    if "input_blocks.0.0.weight" not in state:
        return state
    pth = {pth_name(n, unet.config.layers_per_block): n for n in unet.state_dict()}
    flat = lambda n, t: t.squeeze(-1) if n.endswith(("proj_in.weight", "proj_out.weight")) else t
    return {pth.get(n, n): flat(n, t) for n, t in state.items()}


def load_unet(folder, device="cpu", dtype=torch.float32):
    """The UNet of a hub-layout folder, frozen and in eval mode. Raises BadInput."""
    build = lambda p: UNet(UNetConfig.read(p))
    return _load(build, folder, "unet", device, dtype, unet_from_pth)


def vae_from_legacy(state, vae=None):
    """Old files call the mid-block attention's matrices query, key, value and proj_attn."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for old, new in names.items():
        old, new = f"attentions.0.{old}.", f"attentions.0.{new}."
        state = {name.replace(old, new): t for name, t in state.items()}
    return state


def load_vae(folder, device="cpu", dtype=torch.float32):
    """The VAE of a hub-layout folder, either naming version. Raises BadInput."""
    build = lambda p: VAE(VAEConfig.read(p))
    return _load(build, folder, "vae", device, dtype, vae_from_legacy)


def load_text(folder, device="cpu", dtype=torch.float32):
    """The text encoder of a hub-layout folder. Raises BadInput."""
    build = lambda p: TextEncoder(TextConfig.read(p))
    convert = lambda state, _: {f"tower.{n}": t for n, t in text_from_hub(state).items()}
    return _load(build, folder, "text_encoder", device, dtype, convert)


def load(folder, device="cpu", dtype=torch.float32):
    """All parts of a hub-layout folder (ZeroScope, ModelScope, or the tiny model).

    Raises BadInput when a part is missing, damaged, or does not fit its config.json.
    """
    if not Path(folder).is_dir():
        raise BadInput(f"{folder} is not a folder; give one in the hub's layout, with unet/, vae/, "
                       "text_encoder/ and scheduler/ in it.")
    return Model(load_unet(folder, device, dtype), load_vae(folder, device, dtype),
                 load_text(folder, device, dtype), load_schedule(folder))


def load_schedule(folder):
    """The noise schedule of a hub-layout folder. Raises BadInput."""
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    read_json(path)  # is it there, and JSON at all?
    try:
        return Schedule.read(path)
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path}: {error}; take the file that came with the weights.") from None
