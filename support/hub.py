"""The hub's files: configurations, weights, and other names for the same tensors.

    python -c "from support import hub; print(hub.pth_name('down_blocks.0.resnets.0.norm1.weight'))"

The UNet and the VAE carry the hub's own names, so its files load without a table. The tables here
are for the text encoder, for old files of the VAE, and for ModelScope's own .pth.
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from support.files import BadInput, number, one_of, read_tensors

# ------------------------------------------------------------------------------------------------
# config.json: what of it changes the network. A field of one value is one that would mean another.


@dataclass
class UNetConfig:
    """unet/config.json. attention_head_dim is a head's width: channels/64 heads at full size."""

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
    """vae/config.json. Latents are multiplied by scaling_factor before the UNet sees them."""

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
        """How many pixels a latent is wide: 8 for four levels."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass
class TextConfig:
    """text_encoder/config.json. ZeroScope's has 23 layers: CLIP ViT-H's 24 without the last."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int = number(1, 100)
    num_attention_heads: int = number(1, 1000)
    hidden_act: str = one_of("gelu")  # and not SD 1's quick_gelu
    layer_norm_eps: float = number(0, 1, 1e-5)
    max_position_embeddings: int = number(3, 2**12, 77)
    vocab_size: int = one_of(49408)
    model_type: str = one_of("clip_text_model")


# ------------------------------------------------------------------------------------------------
# Finding and loading


def find_weights(folder):
    """The weights files in a part's folder: a .safetensors, else a .bin, else a .pth; the plain one
    before the hub's variants (.fp16.…), or all shards of one (…-00001-of-00002…). Raises
    BadInput."""
    folder = Path(folder)
    for suffix in (".safetensors", ".bin", ".pth"):
        files = sorted(folder.glob(f"*{suffix}"), key=lambda p: (p.name.count("."), p.name))
        if files:
            return [p for p in files if "-of-" in p.name] or files[:1]
    raise BadInput(f"{folder} has no weights; wanted diffusion_pytorch_model.safetensors or .bin "
                   "there. Give --weights the folder that holds unet/, vae/ and text_encoder/.")


def read_weights(folder):
    """The tensors of a part's folder by name. Raises BadInput."""
    state = {}
    for path in find_weights(folder):
        state |= read_tensors(path)
    return state


def load_strictly(module, state, source):
    """load_state_dict(strict=True) with a short message: the first five wrong names."""
    own = module.state_dict()
    wrong = [f"{n} missing" for n in own if n not in state]
    for name, t in state.items():
        if name not in own:
            wrong.append(f"{name} unexpected")
        elif own[name].shape != t.shape or own[name].is_floating_point() != t.is_floating_point():
            wrong.append(f"{name} is {t.dtype} {tuple(t.shape)}, wanted {tuple(own[name].shape)}")
    if wrong:
        raise BadInput(f"{source} does not fit its config.json: {len(wrong)} names differ, first "
                       + "; ".join(wrong[:5]))
    module.load_state_dict(state, strict=True, assign=True)


# ------------------------------------------------------------------------------------------------
# The text encoder and CLIP, which are open_clip's here


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
            names = [f"{stem}{p}_proj.{kind}" for p in "qkv"]
            parts = [out[n] for n in names if n in out]
            # Parts that do not belong together stay as they are, and are told of by their names.
            if len(parts) == 3 and parts[0].dim() and len({p.shape for p in parts}) == 1:
                out[f"{stem.replace('self_attn', 'attn')}in_proj_{kind}"] = torch.cat(parts)
                out = {n: t for n, t in out.items() if n not in names}
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


CLIP_NAMES = [  # the hub's CLIPModel -> open_clip's, the picture tower's
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
]


def clip_from_hub(state):
    """The tensors of the hub's CLIPModel by open_clip's names; projections are transposed there."""
    out, parts = {}, {}
    for name, tensor in state.items():
        if name.endswith("position_ids"):
            continue
        if name == "text_projection.weight":
            out["text_projection"] = tensor.T.contiguous()
        elif name == "visual_projection.weight":
            out["visual.proj"] = tensor.T.contiguous()
        elif name == "logit_scale":
            out[name] = tensor
        else:
            for hub, ours in CLIP_NAMES:
                name = name.replace(hub, ours)
            parts[name] = tensor
    return out | text_from_hub(parts)  # q, k, v and the inner names are alike in both towers


# ------------------------------------------------------------------------------------------------
# The VAE's old names


def vae_from_legacy(state):
    """Old files call the mid-block attention's matrices query, key, value and proj_attn."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for old, new in names.items():
        old, new = f"attentions.0.{old}.", f"attentions.0.{new}."
        state = {name.replace(old, new): t for name, t in state.items()}
    return state


# ------------------------------------------------------------------------------------------------
# ModelScope's original .pth


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
