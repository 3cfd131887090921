"""The transformer of Latte (Ma et al. 2024), with the names of the released files.

Axes: B clips, C channels, F frames, h w patches, S = h·w, N text tokens, D width.
"""
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model import Attention, TimeEmbedding, fold_frames
from support.files import BadInput, number, one_of
from support.machine import to_device

_SPATIAL, _TEMPORAL = r"transformer_blocks\.\d+\.", r"temporal_transformer_blocks\.\d+\."
_ATTN1, _FF = r"attn1\.to_(q|k|v|out\.0)", r"ff\.net\.(0\.proj|2)"

# The layer sets of lora.LAYERS on this network, except those with temporal convolutions.
LAYERS = {
    "temporal-attention-qkv": rf"{_TEMPORAL}attn1\.to_[qkv]\.weight",
    "spatial-self-attention-ff": rf"{_SPATIAL}({_ATTN1}|{_FF})\.weight",
    "temporal-attention-ff": rf"{_TEMPORAL}({_ATTN1}|{_FF})\.weight",
    "coupled": rf"(temporal_)?{_SPATIAL}({_ATTN1}|{_FF})\.weight",
    "spatial-attention": rf"{_SPATIAL}attn[12]\.to_(q|k|v|out\.0)\.weight",
    "temporal-attention": rf"{_TEMPORAL}{_ATTN1}\.weight",
    "cross-attention-kv": rf"{_SPATIAL}attn2\.to_[kv]\.weight",
    "temporal-and-cross-kv": rf"{_TEMPORAL}.*|{_SPATIAL}attn2\.to_[kv]\.weight",
    "tune-a-video": rf"{_SPATIAL}attn[12]\.to_q\.weight|{_TEMPORAL}attn1\..*",
    "temporal": rf"{_TEMPORAL}.*",
    "spatial": rf"(?!{_TEMPORAL}).*",
    "all": r".*",
}


@dataclass
class LatteConfig:
    """transformer/config.json. sample_size is the side of the latents in training."""

    num_layers: int
    caption_channels: int
    num_attention_heads: int = 16
    attention_head_dim: int = number(4, 1024, 88)
    in_channels: int = 4
    out_channels: int = 8
    sample_size: int = 64
    patch_size: int = 2
    activation_fn: str = one_of("gelu-approximate")
    norm_eps: float = one_of(1e-6)
    _class_name: str = one_of("LatteTransformer3DModel")


def sincos(positions, D):
    """(n,) positions -> (n, D): D/2 sines, then D/2 cosines. On the CPU, since MPS has no fp64."""
    rates = 10_000 ** -(torch.arange(D // 2).double() / (D / 2))
    angles = torch.outer(positions.double(), rates)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def patch_positions(h, w, D, config):
    """(h·w, D): the first half encodes the column, the second half the row. A grid of another size
    is interpolated to the extent of the training grid."""
    base, scale = config.sample_size // config.patch_size, max(config.sample_size // 64, 1)
    y, x = (torch.arange(n).float() / (n / base) / scale for n in (h, w))
    columns, rows = sincos(x, D // 2), sincos(y, D // 2)
    return torch.cat([columns.repeat(h, 1), rows.repeat_interleave(w, 0)], dim=-1)


def modulated_norm(x, shift, scale):
    """LayerNorm without parameters, then a shift and a scale that the timestep sets."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """Self-attention, cross-attention in a spatial block, feed-forward. The timestep shifts, scales
    and gates the first and the last (adaLN-single, Chen et al. 2023)."""

    def __init__(self, D, heads, spatial):
        super().__init__()
        self.attn1 = Attention(D, heads, D // heads, bias=True)
        if spatial:
            self.attn2 = Attention(D, heads, D // heads, bias=True)
        wide = nn.ModuleDict({"proj": nn.Linear(D, 4 * D)})
        net = nn.ModuleList([wide, nn.Identity(), nn.Linear(4 * D, D)])
        self.ff = nn.ModuleDict({"net": net})
        self.scale_shift_table = nn.Parameter(torch.randn(6, D) / D**0.5)

    def forward(self, x, time, text=None):
        """x (n, L, D), time (n, 6, D), text: B tensors (1, N, D) -> (n, L, D)."""
        rows = (self.scale_shift_table + time).unsqueeze(2)  # (n, 6, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(1)
        x = x + gate1 * self.attn1(modulated_norm(x, shift1, scale1))
        if text is not None:  # the frames of a clip share a prompt: they are one row of queries
            queries = x.reshape(len(text), -1, x.shape[-1]).split(1)
            x = x + torch.cat([self.attn2(*both) for both in zip(queries, text)]).view(x.shape)
        wide, _, narrow = self.ff["net"]
        y = F.gelu(wide["proj"](modulated_norm(x, shift2, scale2)), approximate="tanh")
        return x + gate2 * narrow(y)


class Latte(nn.Module):
    """LatteTransformer3DModel of diffusers, with the interface of model.UNet."""

    layer_sets, subfolder = LAYERS, "transformer"

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        c, D = config, config.num_attention_heads * config.attention_head_dim
        blocks = lambda spatial: nn.ModuleList(
            Block(D, c.num_attention_heads, spatial) for _ in range(c.num_layers))
        patches = nn.Conv2d(c.in_channels, D, c.patch_size, c.patch_size)
        self.pos_embed = nn.ModuleDict({"proj": patches})
        self.transformer_blocks, self.temporal_transformer_blocks = blocks(True), blocks(False)
        time = nn.ModuleDict({"timestep_embedder": TimeEmbedding(256, D)})
        self.adaln_single = nn.ModuleDict({"emb": time, "linear": nn.Linear(D, 6 * D)})
        self.caption_projection = nn.ModuleDict({
            "linear_1": nn.Linear(c.caption_channels, D), "linear_2": nn.Linear(D, D)})
        self.scale_shift_table = nn.Parameter(torch.randn(2, D) / D**0.5)
        self.proj_out = nn.Linear(D, c.patch_size**2 * c.out_channels)

    def forward(self, latents, timesteps, text, temporal=True):
        """The predicted noise, as UNet.forward; latents (B, C, F, H, W). The last channel of the
        text marks its tokens. temporal=False skips the temporal blocks: frames do not meet."""
        c, (clips, C, frames, H, W) = self.config, latents.shape
        if H % c.patch_size or W % c.patch_size:
            raise BadInput(f"latents of {W}x{H}: expected multiples of {c.patch_size}; give --size "
                           f"in multiples of {8 * c.patch_size} pixels.")
        B, h, w, D = len(text), H // c.patch_size, W // c.patch_size, self.proj_out.in_features
        timesteps = torch.as_tensor(timesteps, device=latents.device).expand(clips)
        time = self.adaln_single["emb"]["timestep_embedder"](timesteps).repeat(B // clips, 1)
        six = self.adaln_single["linear"](F.silu(time)).unflatten(-1, (6, -1))
        text = self.project_text(text, guided=B == 2 * clips)
        x = self.pos_embed["proj"](fold_frames(latents)).flatten(2).transpose(1, 2)
        x = (x + to_device(patch_positions(h, w, D, c), x.device).to(x)).repeat(B // clips, 1, 1)
        again = self.checkpointing and torch.is_grad_enabled()
        run = partial(checkpoint, use_reentrant=False) if again else Block.__call__
        for i, block in enumerate(self.transformer_blocks):
            x = run(block, x, six.repeat_interleave(frames, 0), text)  # (B·F, S, D)
            if temporal:
                x = x.unflatten(0, (B, frames)).transpose(1, 2).flatten(0, 1)  # (B·S, F, D)
                if i == 0 and frames > 1:
                    x = x + to_device(sincos(torch.arange(frames), D), x.device).to(x)
                x = run(self.temporal_transformer_blocks[i], x, six.repeat_interleave(h * w, 0))
                x = x.unflatten(0, (B, h * w)).transpose(1, 2).flatten(0, 1)
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, dim=1)  # (B, 1, D)
        x = modulated_norm(x.unflatten(0, (B, frames)), shift[:, None], scale[:, None])
        with torch.autocast(x.device.type, enabled=False):  # guidance amplifies its rounding
            x = self.proj_out(x.to(self.proj_out.weight.dtype))
        x = x.reshape(B, frames, h, w, c.patch_size, c.patch_size, -1)[..., :C]  # no variance
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, C, frames, H, W)

    def project_text(self, text, guided):
        """The states of each prompt without padding, B tensors (1, N, D). As in the published
        pipeline, guidance cuts the unconditional prompt to the length of the other one."""
        lengths = text[..., -1].sum(1).long().tolist()
        lengths = lengths[len(text) // 2:] * 2 if guided else lengths
        first, second = self.caption_projection["linear_1"], self.caption_projection["linear_2"]
        text = second(F.gelu(first(text[..., :-1]), approximate="tanh"))
        return [row[None, :n] for row, n in zip(text, lengths)]
