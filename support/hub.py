"""Files in the Hugging Face hub's layout: configurations, weights and parameter names.

    python -c "from support import hub; print(hub.pth_name('down_blocks.0.resnets.0.norm1.weight'))"

The UNet and the VAE here have the hub's parameter names, so its files load directly. The tables
convert the names in text encoders, old VAE files, and ModelScope's .pth.
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from support.files import BadInput, number, one_of, read_tensors

# --- config.json: fields that define the network. `one_of` rejects unsupported values. ----------


@dataclass
class UNetConfig:
    """unet/config.json. attention_head_dim is the width of a head: 64 at full size."""

    block_out_channels: list[int]
    cross_attention_dim: int
    down_block_types: list[str]  # DownBlock3D or, with transformers, CrossAttnDownBlock3D
    up_block_types: list[str]
    attention_head_dim: int = 64
    layers_per_block: int = number(1, 16, 2)
    in_channels: int = 4
    out_channels: int = 4
    norm_num_groups: int = 32
    norm_eps: float = number(0, 1, 1e-5)
    downsample_padding: int = one_of(1, 0)
    sample_size: int | None = 32
    act_fn: str = one_of("silu", "swish")
    mid_block_scale_factor: float = one_of(1)
    num_attention_heads: int | None = one_of(None)
    time_cond_proj_dim: int | None = one_of(None)
    _class_name: str = one_of("UNet3DConditionModel")

    @property
    def time_dim(self):
        return self.block_out_channels[0] * 4


@dataclass
class VAEConfig:
    """vae/config.json. The UNet's latents are the VAE's times scaling_factor."""

    block_out_channels: list[int]
    layers_per_block: int = number(1, 16, 2)
    latent_channels: int = 4
    in_channels: int = one_of(3)
    out_channels: int = one_of(3)
    norm_num_groups: int = 32
    scaling_factor: float = number(1e-6, 1e6, 0.18215)
    act_fn: str = one_of("silu", "swish")
    shift_factor: float | None = one_of(None, 0)
    latents_mean: list[float] | None = one_of(None)
    latents_std: list[float] | None = one_of(None)
    use_quant_conv: bool = one_of(True)
    use_post_quant_conv: bool = one_of(True)
    mid_block_add_attention: bool = one_of(True)
    _class_name: str = one_of("AutoencoderKL")

    @property
    def factor(self):
        """The downsampling factor in pixels per latent: 8 for four levels."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass
class TextConfig:
    """text_encoder/config.json. ZeroScope has 23 layers: all 24 of CLIP ViT-H except the last."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int = number(1, 100)
    num_attention_heads: int = number(1, 1000)
    hidden_act: str = one_of("gelu")  # Stable Diffusion 1 has quick_gelu
    layer_norm_eps: float = number(0, 1, 1e-5)
    max_position_embeddings: int = number(3, 2**12, 77)
    vocab_size: int = one_of(49408)
    model_type: str = one_of("clip_text_model")


# --- Finding and loading ------------------------------------------------------------------------


def find_weights(folder):
    """The weights files in a network's folder: .safetensors, else .bin, else .pth; the default file
    rather than a variant (.fp16.…); all shards of a sharded file (…-00001-of-00002…). Raises
    BadInput."""
    folder = Path(folder)
    for suffix in (".safetensors", ".bin", ".pth"):
        files = sorted(folder.glob(f"*{suffix}"), key=lambda p: (p.name.count("."), p.name))
        if files:
            return [p for p in files if "-of-" in p.name] or files[:1]
    raise BadInput(f"{folder} has no weights file; expected diffusion_pytorch_model.safetensors or "
                   ".bin. Give --weights the folder that contains unet/, vae/ and text_encoder/.")


def read_weights(folder):
    """{name: tensor} of the weights in a network's folder. Raises BadInput."""
    state = {}
    for path in find_weights(folder):
        state |= read_tensors(path)
    return state


def load_strictly(module, state, source):
    """load_state_dict(strict=True) with a one-line error. Raises BadInput."""
    kind = lambda t: f"{'float' if t.is_floating_point() else 'integer'} {tuple(t.shape)}"
    found = {name: kind(t) for name, t in state.items()}
    expected = {name: kind(t) for name, t in module.state_dict().items()}
    errors = []
    for name in expected | found:
        actual, required = found.get(name, "missing"), expected.get(name, "none")
        if actual != required:
            errors.append(f"{name} is {actual}, expected {required}")
    if errors:
        raise BadInput(f"{source} does not match its config.json: {len(errors)} tensors differ, "
                       f"e.g. {'; '.join(errors[:5])}")
    module.load_state_dict(state, strict=True, assign=True)


# --- The text encoder and CLIP, which are open_clip modules here --------------------------------

HUB_TEXT_NAMES = [  # (part of a hub name, part of an open_clip name), replaced in this order
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
    """The hub's text encoder tensors with open_clip's names, and q, k and v concatenated."""
    out = {}
    for name, tensor in state.items():
        if name.endswith("position_ids"):  # 0 … 76, in old files
            continue
        for hub, open_clip in HUB_TEXT_NAMES:
            name = name.replace(hub, open_clip)
        out[name] = tensor
    for name in [n for n in out if n.endswith("self_attn.q_proj.weight")]:
        for kind in ("weight", "bias"):
            stem = name.removesuffix("q_proj.weight")
            names = [f"{stem}{p}_proj.{kind}" for p in "qkv"]
            qkv = [out[n] for n in names if n in out]
            # Incomplete or mismatched q, k, v keep their names, which load_strictly reports.
            if len(qkv) == 3 and qkv[0].dim() and len({t.shape for t in qkv}) == 1:
                out[f"{stem.replace('self_attn', 'attn')}in_proj_{kind}"] = torch.cat(qkv)
                out = {n: t for n, t in out.items() if n not in names}
    return out


CLIP_NAMES = [  # the same for the image encoder of the hub's CLIPModel
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
]


def clip_from_hub(state):
    """The tensors of the hub's CLIPModel with open_clip's names, and transposed projections."""
    out, towers = {}, {}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            out["text_projection"] = tensor.T.contiguous()
        elif name == "visual_projection.weight":
            out["visual.proj"] = tensor.T.contiguous()
        else:
            for hub, open_clip in CLIP_NAMES:
                name = name.replace(hub, open_clip)
            towers[name] = tensor
    return out | text_from_hub(towers)  # layers have the same names in both towers


def vae_from_legacy(state):
    """Rename query, key, value and proj_attn, the mid-block attention in old VAE files."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for old, new in names.items():
        old, new = f"attentions.0.{old}.", f"attentions.0.{new}."
        state = {name.replace(old, new): t for name, t in state.items()}
    return state


# --- ModelScope's original .pth -----------------------------------------------------------------

# {the hub's name: ModelScope's name}, outside the blocks and inside a resnet
_PTH_OUTER = {"conv_in": "input_blocks.0.0", "transformer_in": "input_blocks.0.1",
              "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
              "conv_norm_out": "out.0", "conv_out": "out.2"}
_PTH_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
               "norm2": "out_layers.0", "conv2": "out_layers.3",
               "conv_shortcut": "skip_connection"}


def pth_name(name, layers=2):
    """The name of a UNet parameter in ModelScope's original .pth, the format of web UIs. Its
    input_blocks and output_blocks number layers across all blocks, of `layers` layers each."""
    for hub, modelscope in _PTH_OUTER.items():
        if name.startswith(f"{hub}."):
            return modelscope + name.removeprefix(hub)
    stem, *rest = name.split(".")
    if stem == "mid_block":
        kind, j, *tail = rest
        prefix = f"middle_block.{ {'attentions': 1, 'temp_attentions': 2}.get(kind, 3 * int(j))}"
    else:
        block, kind, j, *tail = rest
        down = stem == "down_blocks"
        n = int(block) * (layers + 1) + int(j) + down
        prefix = f"{'input' if down else 'output'}_blocks.{n}"
        if kind == "downsamplers":
            return ".".join([f"input_blocks.{n + layers}.op", *tail[1:]])
        if kind == "upsamplers":
            # After the block's last layer, which has two transformers except in block 0.
            last = 1 if int(block) == 0 else 3
            return ".".join([f"output_blocks.{n + layers}.{last}", *tail])
        prefix += {"attentions": ".1", "temp_attentions": ".2"}.get(kind, ".0")
    if kind == "temp_convs":
        prefix += ".temopral_conv"  # a typo in the released file
    if kind == "resnets":
        tail[0] = _PTH_RESNET[tail[0]]
    return ".".join([prefix, *tail])


def unet_from_pth(state, unet):
    """The tensors of a ModelScope .pth with the hub's names. Its proj_in and proj_out are pointwise
    convolutions. Other files are returned unchanged."""
    if "input_blocks.0.0.weight" not in state:
        return state
    names = {pth_name(n, unet.config.layers_per_block): n for n in unet.state_dict()}
    flat = lambda n, t: t.squeeze(-1) if n.endswith(("proj_in.weight", "proj_out.weight")) else t
    return {names.get(n, n): flat(n, t) for n, t in state.items()}
