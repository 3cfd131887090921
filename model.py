"""The video UNet, VAE and text encoder of ZeroScope and ModelScope, and how to load them.

    python -c "import model; print(model.load().unet.config)"

Parameters have the names of the released files, so state dicts load with strict=True, except for
the text encoder, which is open_clip's (support/hub.py). The same classes build the full-size model
(1.41 B parameters) and the tiny one; only config.json differs. Functions in support/fast.py give
the same results as the torch functions that they replace.

Axes: B prompts or clips, F frames, C channels, H W pixels, h w latent (H/8, W/8), N text tokens,
D text width. "Folded" tensors are (B·F, C, h, w): spatial layers treat each frame as an image.
"""
import importlib
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sampler import NoiseSchedule, seeded_randn
from support import fast, hub
from support.fast import Dropout, TemporalConv1d
from support.files import digest, read_fields, read_json, reading
from support.hub import TextConfig, UNetConfig, VAEConfig
from support.machine import DTYPES, autocast, to_device
from support.tokenizer import has_word, tokenize, words_to_ids

TINY = Path(__file__).resolve().parent / "tiny" / "weights"


def is_tiny(weights):
    """True if `weights` is the tiny model: None, or its folder."""
    return weights is None or Path(weights).resolve() == TINY.resolve()


# --- Reshaping: time into the batch axis, space into tokens -------------------------------------


def fold_frames(video):
    """(B, C, F, h, w) -> (B·F, C, h, w) in channels-last memory, so `to_tokens` needs no copy."""
    B, C, frames, h, w = video.shape
    folded = video.transpose(1, 2).reshape(B * frames, C, h, w)
    return folded.contiguous(memory_format=torch.channels_last)


def unfold_frames(images, frames):
    """(B·F, C, h, w) -> (B, C, F, h, w)."""
    BF, C, h, w = images.shape
    return images.reshape(BF // frames, frames, C, h, w).transpose(1, 2)


def to_tokens(x):
    """(N, C, h, w) -> (N, h·w, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(tokens, h, w):
    """(N, h·w, C) -> (N, C, h, w)."""
    return tokens.unflatten(1, (h, w)).permute(0, 3, 1, 2)


def over_time(x, frames):
    """(B·F, C, h, w) -> (B, C, F, h·w), a view for 2-D kernels along time."""
    BF, C, h, w = x.shape
    return to_tokens(x).reshape(BF // frames, frames, h * w, C).permute(0, 3, 1, 2)


# --- Layers shared by the UNet and the VAE ------------------------------------------------------


class Resnet(nn.Module):
    """Residual block: (norm, SiLU, conv) twice, with the time embedding added in between."""

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
        h = fast.sequential([self.norm1, F.silu, self.conv1], x)
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = fast.sequential([self.norm2, F.silu, self.conv2], h)
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size):
        # The size of the skip, not ×2, since downsampling rounds odd sizes up.
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Downsample(nn.Module):
    """Convolution with stride 2: (N, C, h, w) -> (N, C, h/2, w/2), rounded up in the UNet."""

    def __init__(self, channels, padding=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x):
        if self.conv.padding == (0, 0):  # the VAE pads right and bottom only
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, Eq. 1). Without a context, self-attention."""

    def __init__(self, dim, heads, head_dim, context_dim=None, bias=False):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, inner, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def split(self, x):
        """(B, N, heads·d) -> (B, heads, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        out = fast.scaled_dot_product_attention(self.split(q), self.split(k), self.split(v))
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def maps(self, x, context=None):
        """Attention maps softmax(q·kᵀ/√d), (B, heads, N, M) for M context tokens."""
        q, k = self.split(self.to_q(x)), self.split(self.to_k(x if context is None else context))
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)


# --- Layers of the video UNet -------------------------------------------------------------------


class GEGLU(nn.Module):
    """x·gelu(gate), with x and gate linear in the input and the exact gelu (Shazeer 2020)."""

    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim * 8)

    def forward(self, x):
        return fast.geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU to four times the width, then a linear layer back to the width."""

    def __init__(self, dim):
        super().__init__()
        # The identity stands for a dropout of 0 in the released code, so the layer numbers match.
        self.net = nn.Sequential(GEGLU(dim), nn.Identity(), nn.Linear(dim * 4, dim))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention; cross-attention to the text, or self-attention again; feed-forward."""

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
            # The frames of a clip share a prompt. With all their queries in one sequence, keys and
            # values are computed once per prompt, not once per frame.
            queries = self.norm2(x).reshape(text.shape[0], -1, x.shape[-1])
            x = self.attn2(queries, text).view(x.shape) + x
        return self.ff(self.norm3(x)) + x


class Transformer(nn.Module):
    """Base class of the spatial and the temporal transformer. GroupNorm's eps is 1e-6 here."""

    def __init__(self, channels, heads, head_dim, groups, context_dim=None):
        super().__init__()
        inner = heads * head_dim
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner)
        block = TransformerBlock(inner, heads, head_dim, context_dim)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Linear(inner, channels)

    def blocks(self, tokens, text=None):
        return self.proj_out(self.transformer_blocks[0](self.proj_in(tokens), text))


class SpatialTransformer(Transformer):
    """Self-attention over the pixels of each frame, and cross-attention to the text."""

    def forward(self, x, text):
        h, w = x.shape[-2:]
        return x + to_image(self.blocks(to_tokens(self.norm(x)), text), h, w)


class TemporalTransformer(Transformer):
    """Each pixel attends over time, without text, mask or position embedding. Only the temporal
    convolutions depend on the order of frames."""

    def forward(self, x, frames):
        h, w = x.shape[-2:]
        y = self.norm(over_time(x, frames))  # (B, C, F, hw), with statistics over all frames
        B, C = y.shape[:2]
        y = y.permute(0, 3, 2, 1).reshape(B * h * w, frames, C).contiguous()
        y = self.blocks(y).view(B, h * w, frames, C).transpose(1, 2)  # (B, F, hw, C)
        return x + to_image(y.reshape(B * frames, h * w, C), h, w)  # keeps the memory layout of x


class TemporalConvLayer(nn.Module):
    """Four convolutions along time, the last zero-initialized; the layer starts as the identity."""

    def __init__(self, channels, groups):
        super().__init__()
        norm = lambda: nn.GroupNorm(groups, channels)
        self.conv1 = nn.Sequential(norm(), nn.SiLU(), TemporalConv1d(channels))
        for i in (2, 3, 4):
            layers = nn.Sequential(norm(), nn.SiLU(), Dropout(0.1), TemporalConv1d(channels))
            setattr(self, f"conv{i}", layers)
        nn.init.zeros_(self.conv4[-1].weight)
        nn.init.zeros_(self.conv4[-1].bias)

    def forward(self, x, frames):
        h, w = x.shape[-2:]
        y = over_time(x, frames)  # (B, C, F, hw)
        for layers in (self.conv1, self.conv2, self.conv3, self.conv4):
            y = fast.sequential(layers, y)
        y = y.permute(0, 2, 3, 1).reshape(x.shape[0], h * w, -1)
        return x + to_image(y, h, w)


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the timestep, then two linear layers."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)

    def forward(self, t):
        """(B,) -> (B, c_out). Cosines come first. The sinusoids are always computed in fp32."""
        half = self.linear_1.in_features // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angles = t[:, None].float() * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class Block(nn.Module):
    """One level of the UNet. Each layer has a resnet and a temporal convolution; the first
    `transformers` layers add a spatial and a temporal transformer. skips: channels per layer."""

    def __init__(self, config, c_in, c_out, layers, transformers, skips=None):
        super().__init__()
        c, groups = config, config.norm_num_groups
        self.checkpointing = False
        self.resnets, self.temp_convs = nn.ModuleList(), nn.ModuleList()
        self.attentions, self.temp_attentions = nn.ModuleList(), nn.ModuleList()
        for i in range(layers):
            channels = (c_out if i else c_in) + (skips[i] if skips else 0)
            self.resnets.append(Resnet(channels, c_out, groups, c.norm_eps, c.time_dim))
            self.temp_convs.append(TemporalConvLayer(c_out, groups))
        sizes = (c_out, c_out // c.attention_head_dim, c.attention_head_dim, groups)
        for _ in range(transformers):
            self.attentions.append(SpatialTransformer(*sizes, c.cross_attention_dim))
            self.temp_attentions.append(TemporalTransformer(*sizes))

    def layer(self, i, x, time, text, frames):
        """Apply layer i to folded x. frames = None bypasses the temporal layers."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._layer, i, x, time, text, frames, use_reentrant=False)
        return self._layer(i, x, time, text, frames)

    def _layer(self, i, x, time, text, frames):
        x = self.resnets[i](x, time)
        if frames:
            x = self.temp_convs[i](x, frames)
        if i < len(self.attentions):
            x = self.attentions[i](x, text)
            if frames:
                x = self.temp_attentions[i](x, frames)
        return x


class DownBlock(Block):
    """A downsampling level. The outputs of all layers and of the downsampling become skips."""

    def __init__(self, config, c_in, c_out, attention, last):
        layers = config.layers_per_block
        super().__init__(config, c_in, c_out, layers, layers * attention)
        self.last = last
        if not last:
            self.downsamplers = nn.ModuleList([Downsample(c_out, config.downsample_padding)])

    def forward(self, x, *inputs):
        """Folded x -> (B·F, C, h/2, w/2), and the skips. The last level keeps the size."""
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, *inputs)
            skips.append(x)
        if not self.last:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    """The lowest level: two layers, the first one with transformers."""

    def __init__(self, config, channels):
        super().__init__(config, channels, channels, layers=2, transformers=1)

    def forward(self, x, *inputs):
        return self.layer(1, self.layer(0, x, *inputs), *inputs)


class UpBlock(Block):
    """An upsampling level. Each layer concatenates a skip from a downsampling level."""

    def __init__(self, config, c_in, c_out, skips, attention, last):
        super().__init__(config, c_in, c_out, len(skips), len(skips) * attention, skips)
        self.last = last
        if not last:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x, skips, *inputs):
        """Folded x -> (B·F, C, 2h, 2w). The last level keeps the size. Pops its skips."""
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), *inputs)
        return x if self.last else self.upsamplers[0](x, skips[-1].shape[-2:])


# --- The video UNet -----------------------------------------------------------------------------


class UNet(nn.Module):
    """UNet3DConditionModel of ModelScope and ZeroScope (Wang et al. 2023, Fig. 2)."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        width, groups, layers = c.block_out_channels, c.norm_num_groups, c.layers_per_block
        first, last = width[0], width[-1]
        self.conv_in = nn.Conv2d(c.in_channels, first, 3, padding=1)
        # Always eight heads, as in the released code.
        self.transformer_in = TemporalTransformer(first, 8, c.attention_head_dim, groups)
        self.time_embedding = TimeEmbedding(first, c.time_dim)

        self.down_blocks, skips, c_in = nn.ModuleList(), [first], first
        for block_type, c_out in zip(c.down_block_types, width):
            is_last = len(self.down_blocks) == len(width) - 1
            attention = block_type == "CrossAttnDownBlock3D"
            self.down_blocks.append(DownBlock(c, c_in, c_out, attention, is_last))
            skips += [c_out] * (layers + (not is_last))
            c_in = c_out
        self.mid_block = MidBlock(c, last)
        self.up_blocks = nn.ModuleList()
        for block_type, c_out in zip(c.up_block_types, reversed(width)):
            is_last = len(self.up_blocks) == len(width) - 1
            attention = block_type == "CrossAttnUpBlock3D"
            block_skips = [skips.pop() for _ in range(layers + 1)]
            self.up_blocks.append(UpBlock(c, c_in, c_out, block_skips, attention, is_last))
            c_in = c_out

        self.conv_norm_out = nn.GroupNorm(groups, first, c.norm_eps)
        self.conv_out = nn.Conv2d(first, c.out_channels, 3, padding=1)

    def forward(self, latents, timesteps, text, temporal=True):
        """Predict epsilon or v (the schedule's prediction_type) for noisy latents.

        latents (B, C, F, h, w), timesteps (B,) or a number, text (B, N, D) -> (B, C, F, h, w).
        With k·B texts, ordered as k batches of B, -> (k·B, C, F, h, w): classifier-free guidance
        passes k = 2, and the layers before the first cross-attention run once.
        temporal=False bypasses all temporal layers: an image model on F independent frames
        (Customize-A-Video, Sec. A.1). Raises ValueError unless len(text) is a multiple of B.
        """
        B, _, length, h, w = latents.shape
        if len(text) % B:
            raise ValueError(f"{len(text)} prompts for {B} clips; expected a multiple of {B}")
        frames, texts = (length if temporal else None), len(text) // B
        if not torch.is_tensor(timesteps):  # torch.full avoids a host-to-device sync
            timesteps = torch.full((B,), timesteps, device=latents.device)
        time = self.time_embedding(timesteps.to(latents.device).expand(B))  # (B, time_dim)
        time = time.repeat_interleave(length, dim=0, output_size=B * length)

        x = self.conv_in(fold_frames(latents))  # (B·F, C, h, w)
        if frames:
            x = self.transformer_in(x, frames)
        x, time = torch.cat([x] * texts), torch.cat([time] * texts)  # still channels-last
        skips = [x]
        for block in self.down_blocks:
            x, block_skips = block(x, time, text, frames)
            skips += block_skips
        x = self.mid_block(x, time, text, frames)
        for block in self.up_blocks:
            x = block(x, skips, time, text, frames)
        x = F.silu(self.conv_norm_out(x))
        # The last layer runs in fp32, since guidance amplifies bf16 rounding.
        with torch.autocast(x.device.type, enabled=False):
            x = self.conv_out(x.to(self.conv_out.weight.dtype))
        return unfold_frames(x, length)

    @property
    def checkpointing(self):
        """Gradient checkpointing: about half of the memory, 1.5 to 3 times the time per step."""
        return self.mid_block.checkpointing

    @checkpointing.setter
    def checkpointing(self, on):
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            block.checkpointing = on


# --- The VAE ------------------------------------------------------------------------------------


VAE_EPS = 1e-6
VAE_BATCH_PIXELS = 2**18  # per forward pass: 64 frames of 64×64 pixels, or one of 576×320


class VAEAttention(Attention):
    """Single-head self-attention over all pixels, with a GroupNorm and a residual connection."""

    def __init__(self, channels, groups):
        super().__init__(channels, 1, channels, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, VAE_EPS)

    def forward(self, x):
        h, w = x.shape[-2:]
        return to_image(super().forward(to_tokens(self.group_norm(x))), h, w) + x


class VAEMid(nn.Module):
    """Resnet, attention, resnet."""

    def __init__(self, channels, groups):
        super().__init__()
        resnet = lambda: Resnet(channels, channels, groups, VAE_EPS)
        self.resnets = nn.ModuleList([resnet(), resnet()])
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class VAEBlock(nn.Module):
    """One level of the VAE: resnets, then down- or upsampling."""

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
    """Images (B, 3, H, W) -> posterior moments (B, 2·C, H/8, W/8)."""

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
    """Latents (B, C, h, w) -> images (B, 3, 8h, 8w)."""

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
    """Stable Diffusion's AutoencoderKL (Rombach et al. 2022), applied to each frame."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)

    def encode(self, frames):
        """(B, 3, H, W) in [-1, 1] -> unscaled mean and standard deviation (B, C, H/8, W/8)."""
        frames = frames.contiguous(memory_format=torch.channels_last)
        moments = self.quant_conv(self.encoder(frames))
        mean, logvar = moments.chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30, 20))

    def decode(self, latents):
        """Unscaled latents (B, C, h, w) -> frames (B, 3, 8h, 8w), about [-1, 1], unclamped."""
        latents = latents.contiguous(memory_format=torch.channels_last)
        return self.decoder(self.post_quant_conv(latents))

    def moments(self, video):
        """(B, 3, F, H, W) in [-1, 1] -> unscaled mean and standard deviation (B, C, F, h, w)."""
        batch = max(1, VAE_BATCH_PIXELS // (video.shape[-2] * video.shape[-1]))
        moments = [torch.cat(self.encode(f), 1) for f in fold_frames(video).split(batch)]
        return unfold_frames(torch.cat(moments), video.shape[2]).chunk(2, dim=1)

    def decode_video(self, latents):
        """Scaled latents (B, C, F, h, w) -> (B, 3, F, H, W) in [-1, 1]."""
        pixels = latents.shape[-2] * latents.shape[-1] * self.config.factor**2
        batch = max(1, VAE_BATCH_PIXELS // pixels)
        folded = fold_frames(latents / self.config.scaling_factor)
        frames = [self.decode(z).clamp(-1, 1) for z in folded.split(batch)]
        return unfold_frames(torch.cat(frames), latents.shape[2])


# --- The text encoder ---------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """open_clip's text tower, with all layers and the final norm, without pooling."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        from open_clip.transformer import TextTransformer  # imported here, since it takes seconds

        self.tower = TextTransformer(
            context_length=c.max_position_embeddings, vocab_size=c.vocab_size, width=c.hidden_size,
            heads=c.num_attention_heads, layers=c.num_hidden_layers, output_dim=None,
            mlp_ratio=c.intermediate_size / c.hidden_size,
            norm_layer=lambda width: nn.LayerNorm(width, eps=c.layer_norm_eps),
        )
        self.tower.attn_mask = None  # `embed` builds one of the right length
        self.learned = {}  # learned token -> vectors (n, D), in addition to the embedding table
        self.words_to_ids = words_to_ids

    @property
    def token_table(self):
        """The embeddings of all tokens (V, D)."""
        return self.tower.token_embedding.weight

    def forward(self, prompts):
        """List of B prompts -> (B, 77, D). Padding tokens are not masked."""
        ids, first = {}, self.config.vocab_size
        for token, vectors in self.learned.items():  # with ids that follow the vocabulary's
            ids[token] = list(range(first, first := first + len(vectors)))
        device = self.tower.positional_embedding.device
        ids = tokenize(prompts, self.config.max_position_embeddings, ids)
        return self.embed(to_device(ids, device))

    def embed(self, ids):
        """Token ids (B, N) -> (B, N, D). Ids beyond the vocabulary select learned vectors."""
        tower, N, V = self.tower, ids.shape[1], self.config.vocab_size
        x = tower.token_embedding(ids.clamp(max=V - 1))
        for i, vector in enumerate(v for vectors in self.learned.values() for v in vectors):
            x = torch.where((ids == V + i)[..., None], vector.to(x), x)
        x = x + tower.positional_embedding[:N]
        causal = torch.full((N, N), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        return tower.ln_final(tower.transformer(x, attn_mask=causal))


# --- The pipeline, and loading it from a folder in the hub's layout -----------------------------


@dataclass
class Pipeline:
    """A text-to-video model: UNet, VAE, text encoder, noise schedule, device and precision."""

    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    schedule: NoiseSchedule
    device: str = "cpu"
    precision: str = "fp32"
    text_cache: dict = field(default_factory=dict)  # prompt -> text states

    def predict(self, x, t, text, temporal=True):
        """The UNet's prediction in fp32 for noisy latents x (B, C, F, h, w) at timestep t, an int
        or (B,). text: see UNet.forward. Each call opens a new autocast context, since an open one
        caches bf16 copies of weights that the optimizer updates."""
        with autocast(self.device, self.precision):
            return self.unet(x, t, text, temporal).float()

    @torch.no_grad()
    def encode(self, video, generator=None):
        """(B, 3, F, H, W) in [-1, 1] -> scaled latents (B, C, F, h, w): the posterior mean, or,
        given a CPU generator (or a list, one per clip), a posterior sample."""
        mean, std = self.vae.moments(to_device(video, self.device))
        if generator is not None:
            generators = generator if isinstance(generator, list) else [generator] * len(mean)
            noise = seeded_randn(mean.shape[1:], generators)
            mean = mean + std * to_device(noise, mean.device)
        return mean.float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents):
        """Scaled latents (B, C, F, h, w) -> videos (B, 3, F, H, W) in [-1, 1], on the CPU."""
        return self.vae.decode_video(latents.to(self.device).float()).cpu()

    def encode_text(self, prompts):
        """B prompts -> text states (B, N, D) in fp32. Prompts without learned tokens are cached;
        gradients reach trainable tokens."""
        return torch.cat([self._encode_text(prompt) for prompt in prompts])

    def _encode_text(self, prompt):
        learned = [v for token, v in self.text_encoder.learned.items() if has_word(prompt, token)]
        training = torch.is_grad_enabled() and any(v.requires_grad for v in learned)
        with torch.set_grad_enabled(training):
            if learned:
                return self.text_encoder([prompt]).float()
            if prompt not in self.text_cache:
                self.text_cache[prompt] = self.text_encoder([prompt]).float()
            return self.text_cache[prompt]

    def store_frozen(self, keep=()):
        """With precision bf16 or fp16, convert the UNet to it, except the parameters in `keep`."""
        if self.precision != "fp32":
            fast.to_half(self.unet, DTYPES[self.precision], keep)

    def to(self, device):
        """Move all networks in place. Parameters stay the same objects."""
        for network in (self.unet, self.vae, self.text_encoder):
            network.to(device)
        self.device = device
        self.text_cache.clear()
        return self


def load(folder=None, device="cpu", precision="fp32", keep=None):
    """The Pipeline of a hub-layout folder (ZeroScope, ModelScope; None: the tiny model).

    keep: None, or the names of UNet parameters to keep in fp32. All others are then converted to
    bf16 or fp16 one by one, so that they are never all in memory in fp32. Raises BadInput when a
    file is missing, damaged, or does not match its config.json.
    """
    folder = TINY if folder is None else Path(folder)
    if other := other_backbone(folder):
        return other.load(folder, device, precision, keep)
    half = keep is not None and precision != "fp32"
    dtype = lambda name: DTYPES[precision if half and not fast.in_fp32(name, keep) else "fp32"]
    pipe = Pipeline(load_unet(folder, dtype=dtype), load_vae(folder), load_text(folder),
                    load_schedule(folder), precision=precision)
    if half:
        pipe.store_frozen(keep)
    return pipe.to(device)


def other_backbone(folder):
    """The module <name>/load.py for the <Name>Pipeline of model_index.json. None for the UNet."""
    path = folder / "model_index.json"
    index = read_json(path) if path.is_file() else {}
    name = str(index.get("_class_name")).removesuffix("Pipeline").lower()
    if name.isidentifier() and (Path(__file__).parent / name / "load.py").is_file():
        return importlib.import_module(f"{name}.load")


def load_unet(folder, device="cpu", dtype=torch.float32):
    """The UNet of a hub-layout folder, or of a .pth next to its config.json. Raises BadInput."""
    return _load(UNet, UNetConfig, Path(folder) / "unet", device, dtype, hub.unet_from_pth)


def load_vae(folder, device="cpu", dtype=torch.float32):
    """The VAE of a hub-layout folder. Old parameter names are accepted. Raises BadInput."""
    convert = lambda state, vae: hub.vae_from_legacy(state)
    return _load(VAE, VAEConfig, Path(folder) / "vae", device, dtype, convert)


def load_text(folder, device="cpu", dtype=torch.float32):
    """The text encoder of a hub-layout folder. Raises BadInput."""
    import open_clip  # noqa: F401  (older torchvisions cannot be imported on the meta device)

    convert = lambda state, text: {f"tower.{n}": t for n, t in hub.text_from_hub(state).items()}
    return _load(TextEncoder, TextConfig, Path(folder) / "text_encoder", device, dtype, convert)


def load_schedule(folder):
    """The noise schedule of a hub-layout folder. Raises BadInput."""
    return NoiseSchedule.read(Path(folder) / "scheduler" / "scheduler_config.json")


def _load(cls, config, folder, device, dtype, convert):
    """Build a network without allocating memory, then assign the tensors of its weights file.
    dtype: one for all parameters, or a function of the name."""
    dtype_of = dtype if callable(dtype) else lambda name: dtype
    path = folder / "config.json"
    with reading(path, "take the config.json released with the weights"), torch.device("meta"):
        module = cls(read_fields(config, read_json(path), path))
    state = convert(hub.read_weights(folder), module)
    # Of the first numbers of all tensors, in fp16, so it is equal for fp16 and fp32 files.
    module.digest = digest({n: t.flatten()[:64].half() for n, t in state.items()},
                           asdict(module.config))
    for name in state:  # one at a time, which frees the original tensors
        if state[name].is_floating_point():
            state[name] = state[name].to(dtype_of(name))
    hub.load_strictly(module, state, folder)
    return module.to(device).eval().requires_grad_(False)
