"""Tricks of speed and memory behind torch's own signatures: each function here gives what the plain
one in its docstring gives, and the model reads as if that were called.

    python -m pytest tests/test_model.py -k plain

Axes: B clips, C channels, F frames, h w latent; N tokens, d a head's width.
"""
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

LARGE = 2**20  # numbers in a tensor, from where memory counts for more than the calls
MOST_BLOCKS = 65_535  # of a CUDA grid along one axis


def _again(f, *inputs):
    """f(*inputs), of which only the inputs are kept for the backward pass, where they are large:
    there f is computed again, up to its last operation, whose result no gradient needs."""
    x = inputs[0]
    if torch.is_grad_enabled() and x.requires_grad and x.numel() >= LARGE:
        return checkpoint(f, *inputs, use_reentrant=False)
    return f(*inputs)


def _in_turn(x, *layers):
    for layer in layers:
        x = layer(x)
    return x


def sequential(layers, x):
    """nn.Sequential(*layers)(x). Norms and activations before a convolution are cheap beside their
    memory, so none is kept for the backward pass where they are large."""
    return _again(_in_turn, x, *layers)


def _geglu(both):
    x, gate = both.chunk(2, dim=-1)
    return x * F.gelu(gate)


def geglu(both):
    """x·gelu(gate) of the two halves of (…, 2·D) -> (…, D), the halves alone being kept."""
    return _again(_geglu, both)


def _plain_attention(q, k, v):
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    # On a CPU the softmax of rows shorter than 128 is exact in fp32, and faster than in bf16.
    wide = torch.promote_types(q.dtype, torch.float32 if k.shape[-2] < 128 else q.dtype)
    return scores.softmax(-1, wide).to(v.dtype) @ v


def scaled_dot_product_attention(q, k, v):
    """softmax(q·kᵀ/√d)·v on (B, heads, N, d), as F.scaled_dot_product_attention.

    On a CPU the fused kernel is slower than two matrix products for the sequences met here, its
    backward several times so, and is kept for those whose scores would need much memory. On CUDA it
    fails where the batch passes the grid (PyTorch #146704); it goes in parts of which even batch ×
    heads do not.
    """
    if q.device.type == "cpu" and k.shape[-2] <= 1024:
        return _again(_plain_attention, q, k, v)
    most = MOST_BLOCKS // q.shape[1]  # rows of the batch in one part
    if q.device.type == "cpu" or q.shape[0] <= most:
        return F.scaled_dot_product_attention(q, k, v)
    return _in_parts(q, k, v, most)


def _in_parts(q, k, v, most):
    parts = zip(q.split(most), k.split(most), v.split(most))
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])


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
    """F.dropout(x, p, training); on a CPU its mask is read off random words, 16 bits an element, at
    a quarter of the time of drawing Bernoulli numbers. p is rounded to 1/65536."""
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


class TemporalConv1d(nn.Conv3d):
    """nn.Conv3d(C, C, (3, 1, 1), padding=(1, 0, 0)), on (B, C, F, h·w) in the 2-D kernel, which is
    several times faster: same numbers."""

    def __init__(self, channels):
        super().__init__(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x):
        return F.conv2d(x, self.weight.squeeze(-1), self.bias, padding=(1, 0))


def in_fp32(name, keep=()):
    """Whether a parameter of the UNet stays in fp32 when frozen weights are halved: one to keep, or
    used in fp32 anyhow, as norms (which the temporal convolutions number 0) and the last layer are.
    """
    return name in keep or re.search(r"norm|\.conv\d\.0\.|^conv_out", name) is not None


def halve(unet, dtype, keep=()):
    """Store all parameters in bf16 but those that stay in fp32 (`in_fp32`). Half the memory, and
    no weight is converted again at every step."""
    # Channels last, as the activations lie: or the kernels reorder them at every call.
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for name, p in unet.named_parameters():
        if not in_fp32(name, keep):
            layout = layouts.get(p.dim(), torch.preserve_format)
            p.data = p.data.to(dtype, memory_format=layout)
