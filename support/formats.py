"""LoRAs of other programs: right, or refused by name.

    tensors, pairs = read_foreign(read_tensors("x.safetensors"), {}, unet, "x.safetensors")

A LoRA that is half applied looks like one that learned little. So every tensor and every number of
a file is used, or the file is refused with one line that says what was not understood; those of a
text encoder are skipped, and it is said.

A layer's change is s·B·A: A is (r, in, *kernel), B (out, r, 1, …), s usually alpha/r.
"""
import json
import math
import re
from pathlib import Path

import torch

from support.files import log, read_json, reading
from support.hub import pth_name

TEXT = r"(lora_te\d?_|text_encoder(_\d)?\.|text_model\.|(transformer\.)?resblocks\.)"
PREFIX = r"(unet\.|diffusion_model\.|base_model\.model\.(unet\.)?|lora_unet_)?"
ROLES = {  # what the tensors of a layer are called, by what they are to it
    "A": r"\.lora_A(?:\.[^.]+)?\.weight|\.lora_A|\.lora_down\.weight|[._]lora\.down\.weight"
         r"|\.lora_linear_layer\.down\.weight",
    "B": r"\.lora_B(?:\.[^.]+)?\.weight|\.lora_B|\.lora_up\.weight|[._]lora\.up\.weight"
         r"|\.lora_linear_layer\.up\.weight",
    "alpha": r"\.alpha",
}
NAME = re.compile("(?P<layer>.+?)(?:" + "|".join(f"(?P<{r}>{p})" for r, p in ROLES.items()) + ")")


def read_foreign(state, meta, unet, path, clip=0, whole=False):
    """Another program's file for this UNet as (tensors, pairs).

    state is {name: tensor}, or MotionDirector's list, of which `clip` chooses the clip; meta the
    metadata of a .safetensors. Names are diffusers', peft's, kohya's, ComfyUI's or stable_lora's,
    of the hub's layers or ModelScope's. `pairs` maps layers to (A, B), every scale multiplied into
    B; `tensors` maps parameters to their full new values. `whole` takes all of a UNet's weights
    too. Raises BadInput.
    """
    own, path = dict(unet.named_parameters()), Path(path)
    with reading(path, "save it again, or merge it in the program that made it"):
        if isinstance(state, list):
            return {}, read_motiondirector(state, own, path, clip)
        if clip:
            raise ValueError(f"it has no clip {clip}, being no list of MotionDirector's")
        text = [n for n in state if re.match(TEXT, n)]
        if text:
            log(f"{path}: skipping {len(text)} tensors of a text encoder, such as {text[0]}")
        state = {n: t for n, t in state.items() if n not in text}
        layers, tensors = sort_out(state, own, getattr(unet.config, "layers_per_block", None))
        settings = read_settings(state, meta, path)
        pairs = {}
        for layer, parts in layers.items():
            A, B = pair_of(layer, parts, own[f"{layer}.weight"].shape)
            pairs[layer] = A, B * scale_of(layer, len(parts["A"]), parts, settings, meta)
        left = [n for n in own if n not in tensors]
        if not (whole or pairs) and all(re.search(r"temp_|transformer_in", n) for n in left):
            raise ValueError("it holds all weights of a video or image UNet and is no adapter; "
                             "--weights takes its folder, and an absorber's file= takes it")
        if both := [layer for layer in pairs if f"{layer}.weight" in tensors]:
            raise ValueError(f"it has both the whole of {both[0]} and a LoRA for it")
        return tensors, pairs


def sort_out(state, own, per_block):
    """({layer: {role: tensor}}, {parameter: whole tensor}) of a file. Raises ValueError for what
    has no place in the UNet."""
    names = {n: n for n in own}
    if any(re.search(r"(input|middle|output)_blocks?[._]\d", n) for n in state):  # the web UIs'
        names |= {pth_name(n, per_block): n for n in own}
    for name, mine in list(names.items()):
        if name.endswith(".weight") and own[mine].dim() > 1:  # norms have no LoRA
            names[name.removesuffix(".weight")] = mine.removesuffix(".weight")
    names |= {n.replace(".", "_"): mine for n, mine in names.items()}  # kohya's
    layers, whole, strange = {}, {}, []
    for name, tensor in state.items():
        bare = re.sub(PREFIX, "", name, count=1)
        bare = bare.replace(".processor.", ".").replace(".base_layer.", ".")
        role = NAME.fullmatch(bare)
        layer = role and names.get(re.sub(r"\.to_out$", ".to_out.0", role["layer"]))
        if names.get(bare) in own:
            place, key, tensor = whole, names[bare], fit(tensor, own[names[bare]].shape, name)
        elif layer:
            place, key = layers.setdefault(layer, {}), role.lastgroup
        else:
            strange.append(name)
            continue
        if key in place:
            raise ValueError(f"two tensors for one place, of which {name} is one")
        place[key] = tensor
    if strange or not layers and not whole:
        raise ValueError(f"{len(strange)} of its {len(state)} tensors have no place in this UNet, "
                         f"first {(strange or ['none'])[0]}")
    return layers, whole


def fit(tensor, shape, name):
    """A tensor as fp32 in the shape its place has; files add or leave out ones at the end."""
    longest = max(len(shape), tensor.dim())
    found, wanted = ((*s, *[1] * (longest - len(s))) for s in (tensor.shape, shape))
    if found != wanted:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, wanted {tuple(shape)}")
    return tensor.detach().float().cpu().reshape(shape)


def pair_of(layer, parts, shape):
    """A and B of a layer, in the shapes that its weight asks for.

    stable_lora's of a convolution with a kernel of k are (k·r, k·in) and (k·out, k·r), and B·A,
    read on as (out, in, k, k), is the change; in time, as (out, in, k, k, 1), its mean over the
    second k. As a pair: k rows of B are one output's, each with an A of its own.
    """
    wide, narrow, *kernel = shape
    if not {"A", "B"} <= set(parts):
        raise ValueError(f"half of a pair: {layer} has {', '.join(sorted(parts))} alone")
    A, B, rows = parts["A"], parts["B"], len(parts["A"])
    if not rows:
        raise ValueError(f"a LoRA of rank 0 for {layer}")
    if kernel and (k := kernel[0]) > 1 and A.dim() == 2:
        A = torch.block_diag(*[fit(A, (rows, k * narrow), layer)] * k).view(-1, narrow, k, k)
        A = A.mean(-1, keepdim=True) if len(kernel) == 3 else A
        B, rows = fit(B, (k * wide, rows), layer).reshape(wide, k * rows), k * rows
    return fit(A, (rows, narrow, *kernel), f"{layer} A (down)"), fit(
        B, (wide, rows, *[1] * len(kernel)), f"{layer} B (up)")


# ------------------------------------------------------------------------------------------------
# Scales


# What peft's settings say about the weights, with its defaults; and what says nothing about them.
SETTINGS = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
IDLE = """peft_type task_type auto_mapping base_model_name_or_path revision inference_mode
    peft_version target_modules exclude_modules lora_dropout bias modules_to_save init_lora_weights
    layers_to_transform layers_pattern loftq_config eva_config corda_config lora_ga_config
    megatron_config megatron_core qalora_group_size ensure_weight_tying runtime_config""".split()
STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others change the base weights


def read_settings(state, meta, path):
    """peft's settings, complete, from beside or from within the file; None where there are none.
    Raises ValueError for any that is not in the formula."""
    if any(n.startswith("base_model.model.") for n in state):
        values = read_json(path.with_name("adapter_config.json"))
    elif "lora_adapter_metadata" in meta:
        values = json.loads(meta["lora_adapter_metadata"])
        values = {k.removeprefix("unet."): v for k, v in values.items() if k[:12] != "text_encoder"}
    else:
        return None
    other = [k for k, v in values.items() if v and k not in SETTINGS and k not in IDLE]
    if other or values.get("init_lora_weights") not in STARTS or (
            values.get("peft_type") not in (None, "LORA")):
        raise ValueError(f"it was made with {', '.join(other) or 'another start or kind'}, which "
                         "is not understood here")
    return SETTINGS | {k: v for k, v in values.items() if k in SETTINGS and v is not None}


def scale_of(layer, rank, parts, settings, meta):
    """alpha/r: from a tensor beside the pair, or peft's settings, or 1 where neither says it."""
    scales = []
    if "alpha" in parts:
        scales.append(fit(parts["alpha"], (), f"{layer}.alpha").item() / rank)
    elif "ss_network_alpha" in meta:
        raise ValueError(f"an alpha in its metadata and none for {layer}")
    if settings:
        r = by_pattern(settings["rank_pattern"], layer, settings["r"])
        alpha = by_pattern(settings["alpha_pattern"], layer, settings["lora_alpha"])
        if r != rank or type(settings["use_rslora"]) is not bool:
            raise ValueError(f"its settings say that {layer} has rank {r}, and its A has {rank}")
        scales.append(alpha / (math.sqrt(r) if settings["use_rslora"] else r))
    if not all(0 < s < 1e6 and math.isclose(s, scales[0], rel_tol=1e-3) for s in scales):
        raise ValueError(f"the scale of {layer} is {scales}, in its alpha and its settings")
    return scales[0] if scales else 1.0


def by_pattern(patterns, layer, default):
    """The value of the first pattern that is the layer's name, or its end after a dot."""
    return next((value for pattern, value in patterns.items()
                 if re.match(rf"(.*\.)?({pattern})$", layer)), default)


# ------------------------------------------------------------------------------------------------
# MotionDirector's lists


_ENDS = r"to_(q|k|v|out\.0)", r"ff\.net\.(0\.proj|2)"
MOTIONDIRECTOR = (  # its layers: of the temporal path, and of the spatial one
    r"(transformer_in|.*\.temp_attentions)\..*(attn[12]\.{}|{})\.weight".format(*_ENDS),
    r".*\.attentions\..*(attn1\.{}|{})\.weight".format(*_ENDS),
)


def read_motiondirector(state, own, path, clip):
    """A list without names: up, down, up, down, … over its layers, down blocks before up blocks and
    the middle last; of N clips, layer k's pair of clip i is number k·N + i."""
    ups, downs = state[0::2], state[1::2]
    for pattern in MOTIONDIRECTOR:
        layers = [n.removesuffix(".weight") for n in own if re.fullmatch(pattern, n)]
        layers.sort(key=lambda n: n.startswith("mid_block"))
        clips = len(ups) // max(len(layers), 1)
        wanted = [tuple(own[f"{n}.weight"].shape) for n in layers for _ in range(clips)]
        found = [(*up.shape[:1], *down.shape[1:]) for up, down in zip(ups, downs)]
        if wanted and wanted == found and len(state) == 2 * len(wanted):
            break
    else:
        raise ValueError(f"a list of {len(state)} tensors without names, which are not "
                         "MotionDirector's for this UNet")
    if clip >= clips:
        raise ValueError(f"it has no clip {clip}, only #0 to #{clips - 1}")
    if clips > 1:
        log(f"{path}: clip {clip} of {clips}; {path.name}#{clips - 1} takes the last")
    return {layer: pair_of(layer, {"A": down, "B": up}, own[f"{layer}.weight"].shape)
            for layer, up, down in zip(layers, ups[clip::clips], downs[clip::clips])}


def to_peft(pairs):
    """{layer: (A, B)} as diffusers and peft read it: unet.<layer>.lora_A.weight, .lora_B.weight."""
    state = {}
    for layer, (A, B) in pairs.items():
        state[f"unet.{layer}.lora_A.weight"] = A.contiguous()
        state[f"unet.{layer}.lora_B.weight"] = B.contiguous()
    return state
