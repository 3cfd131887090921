"""Torch functions in versions that are faster or need less memory. Docstrings name the torch code
with the same result.

    python -m pytest tests/test_model.py -k plain

Axes: B clips, C channels, F frames, h w latent; N tokens, d head width.
"""
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

LARGE = 2**20  # elements; tensors of at least this size are recomputed instead of saved
MAX_GRID = 65_535  # blocks of a CUDA grid along one axis


def _checkpointed(f, *inputs):
    """f(*inputs), with gradient checkpointing if the first input is large. The backward pass
    recomputes f, except its last operation."""
    x = inputs[0]
    if torch.is_grad_enabled() and x.requires_grad and x.numel() >= LARGE:
        return checkpoint(f, *inputs, use_reentrant=False)
    return f(*inputs)


def sequential(layers, x):
    """nn.Sequential(*layers)(x) for norms and activations before a convolution. Their outputs need
    little time and much memory, so the backward pass recomputes large ones."""
    def apply(x):
        for layer in layers:
            x = layer(x)
        return x

    return _checkpointed(apply, x)


def _geglu(x_gate):
    x, gate = x_gate.chunk(2, dim=-1)
    return x * F.gelu(gate)


def geglu(x_gate):
    """x·gelu(gate) for the halves x, gate of (…, 2·D) -> (…, D). Saves the input only."""
    return _checkpointed(_geglu, x_gate)


def _plain_attention(q, k, v):
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    # On a CPU, the softmax of rows under 128 is faster in fp32 than in bf16, and more accurate.
    dtype = torch.promote_types(q.dtype, torch.float32 if k.shape[-2] < 128 else q.dtype)
    return scores.softmax(-1, dtype).to(v.dtype) @ v


def scaled_dot_product_attention(q, k, v):
    """F.scaled_dot_product_attention: softmax(q·kᵀ/√d)·v on (B, heads, N, d).

    On a CPU, two matrix products are faster than the fused kernel up to about a thousand tokens,
    especially in the backward pass. Longer sequences use the fused kernel, which needs less memory.
    On CUDA, the fused kernel fails if batch × heads exceeds the grid (PyTorch #146704), so larger
    batches are split.
    """
    if q.device.type == "cpu" and k.shape[-2] <= 1024:
        return _checkpointed(_plain_attention, q, k, v)
    batch = len(q) if q.device.type == "cpu" else MAX_GRID // q.shape[1]
    return _batched_attention(q, k, v, batch)


def _batched_attention(q, k, v, batch):
    if len(q) <= batch:
        return F.scaled_dot_product_attention(q, k, v)
    chunks = zip(q.split(batch), k.split(batch), v.split(batch))
    return torch.cat([F.scaled_dot_product_attention(*chunk) for chunk in chunks])


def dropout(x, p, training):
    """F.dropout(x, p, training). Except on CUDA, 16 random bits per element, drawn on the CPU, are
    compared with p, rounded to 1/65536. On a CPU, that takes a quarter of the time of Bernoulli
    sampling. On MPS, gradient checkpointing restores no random state (PyTorch #127676)."""
    if x.device.type == "cuda" or not training or p == 0:
        return F.dropout(x, p, training)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    like = torch.empty_like(x)  # for its strides: the mask gets the memory layout of x
    bits = words.view(torch.int16)[: x.numel()].as_strided(like.shape, like.stride())
    keep = (bits >= round(p * 2**16) - 2**15).view(torch.uint8)  # bool tensors convert slowly
    return x * keep.to(x.device, x.dtype).mul_(1 / (1 - p))


class Dropout(nn.Dropout):
    """nn.Dropout, with `dropout` above."""

    def forward(self, x):
        return dropout(x, self.p, self.training)


class TemporalConv1d(nn.Conv3d):
    """nn.Conv3d(C, C, (3, 1, 1), padding=(1, 0, 0)) on (B, C, F, h·w), computed by a 2-D kernel,
    which is several times faster."""

    def __init__(self, channels):
        super().__init__(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x):
        return F.conv2d(x, self.weight.squeeze(-1), self.bias, padding=(1, 0))


def in_fp32(name, keep=()):
    """True for parameters that stay in fp32 when frozen weights are stored in bf16: those in
    `keep`, the norms (also those named ".conv1.0.") and the last layer."""
    small = r"norm|\.conv\d\.0\.|^(conv|proj)_out|scale_shift_table"
    return name in keep or re.search(small, name) is not None


def to_half(unet, dtype, keep=()):
    """Store the parameters in bf16 or fp16, except those of `in_fp32`. This halves the memory and
    saves a conversion of the weights at every step."""
    # Channels-last like the activations. Otherwise the kernels reorder the weights at every call.
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for name, p in unet.named_parameters():
        if not in_fp32(name, keep):
            layout = layouts.get(p.dim(), torch.preserve_format)
            p.data = p.data.to(dtype, memory_format=layout)
