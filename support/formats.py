"""LoRA files of other programs, read completely or rejected.

    tensors, pairs = read_foreign(read_tensors("x.safetensors"), {}, unet, "x.safetensors")

A partly applied LoRA gives the results of an undertrained one. Therefore a file is rejected unless
every tensor and setting is used. Only text encoder tensors are skipped, with a message.

The update of a layer is s·B·A: A is (r, in, *kernel), B (out, r, 1, …), s usually alpha/r.
"""
import json
import math
import re
from pathlib import Path

import regex
import torch

from support.files import log, read_json, reading
from support.hub import pth_name

TEXT_ENCODER = r"(lora_te\d?_|text_encoder(_\d)?\.|text_model\.|(transformer\.)?resblocks\.)"
PREFIX = r"(unet\.|diffusion_model\.|base_model\.model\.(unet\.)?|lora_unet_)?"
SUFFIXES = {  # of tensor names in the supported formats
    "A": r"\.lora_A(?:\.[^.]+)?\.weight|\.lora_A|\.lora_down\.weight|[._]lora\.down\.weight"
         r"|\.lora_linear_layer\.down\.weight",
    "B": r"\.lora_B(?:\.[^.]+)?\.weight|\.lora_B|\.lora_up\.weight|[._]lora\.up\.weight"
         r"|\.lora_linear_layer\.up\.weight",
    "alpha": r"\.alpha",
}
NAME = re.compile(f"(?P<layer>.+?)(?:{'|'.join(f'(?P<{k}>{p})' for k, p in SUFFIXES.items())})")


def read_foreign(state, meta, unet, path, clip=0, full_weights=False):
    """Convert another program's file for this UNet to (tensors, pairs): full tensors by parameter
    name, and (A, B) by layer name, with all scales multiplied into B. Raises BadInput.

    state: {name: tensor} of diffusers, peft, kohya, ComfyUI or stable_lora, with the layer names of
    the hub or of ModelScope; or a MotionDirector list, from which `clip` selects a clip. meta: the
    metadata of a .safetensors. full_weights: also accept all weights of a UNet.
    """
    parameters, path = dict(unet.named_parameters()), Path(path)
    with reading(path, "export it again, or merge it in the program that made it"):
        if isinstance(state, list):
            return {}, read_motiondirector(state, parameters, path, clip)
        if clip:
            raise ValueError(f"it is no MotionDirector list, so it has no clip {clip}")
        text = [n for n in state if re.match(TEXT_ENCODER, n)]
        if text:
            log(f"{path}: skipping {len(text)} text encoder tensors, e.g. {text[0]}")
        state = {n: t for n, t in state.items() if n not in text}
        layers, tensors = match_names(state, parameters, unet.config)
        settings = read_settings(state, meta, path)
        pairs = {}
        for layer, found in layers.items():
            A, B = build_pair(layer, found, parameters[f"{layer}.weight"].shape)
            pairs[layer] = A, B * find_scale(layer, found, settings, meta)
        spatial = [n for n in parameters if not re.search(r"temp_|transformer_in", n)]
        if not (full_weights or pairs) and all(n in tensors for n in spatial):
            raise ValueError("it has all weights of a UNet and is not an adapter; give its folder "
                             "to --weights, or appearance.layers=none appearance.load_from=FILE")
        if both := [layer for layer in pairs if f"{layer}.weight" in tensors]:
            raise ValueError(f"it has both full weights and a LoRA for {both[0]}")
        return tensors, pairs


def match_names(state, parameters, config):
    """({layer: {"A", "B" or "alpha": tensor}}, {parameter name: full tensor}) of a file. Raises
    ValueError if a tensor matches no layer."""
    modelscope = any(re.search(r"(input|middle|output)_blocks?[._]\d", n) for n in state)
    names, layers, full, unknown = {}, {}, {}, []
    for hub, parameter in parameters.items():
        name = pth_name(hub, config.layers_per_block) if modelscope else hub
        names[hub] = names[name] = names[name.replace(".", "_")] = hub  # with underscores: kohya
        if name.endswith(".weight") and parameter.dim() > 1:  # no LoRA on norms
            name, hub = name.removesuffix(".weight"), hub.removesuffix(".weight")
            names[hub] = names[name] = names[name.replace(".", "_")] = hub
    for name, tensor in state.items():
        short = re.sub(PREFIX, "", name, count=1)
        short = short.replace(".processor.", ".").replace(".base_layer.", ".")
        match = NAME.fullmatch(short)
        layer = match and names.get(re.sub(r"\.to_out$", ".to_out.0", match["layer"]))
        if names.get(short) in parameters:
            group, key = full, names[short]
            tensor = fit(tensor, parameters[key].shape, name)
        elif layer:
            group, key = layers.setdefault(layer, {}), match.lastgroup
        else:
            unknown.append(name)
            continue
        if key in group:
            raise ValueError(f"duplicate tensor {name}")
        group[key] = tensor
    if unknown or not state:
        raise ValueError(f"{len(unknown)} of its {len(state)} tensors match no layer, e.g. "
                         f"{unknown[0]}" if unknown else "it has no tensor for the UNet")
    return layers, full


def fit(tensor, shape, name):
    """The tensor in fp32 with the given shape. Trailing dimensions of size 1 may differ."""
    dims = max(len(shape), tensor.dim())
    found, expected = ((*s, *[1] * (dims - len(s))) for s in (tensor.shape, shape))
    if found != expected:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {tuple(shape)}")
    return tensor.detach().float().cpu().reshape(shape)


def build_pair(layer, found, shape):
    """(A, B) of a layer whose weight has this shape.

    For a convolution of kernel size k, stable_lora stores (k·r, k·in) and (k·out, k·r). The update
    is B·A reshaped to (out, in, k, k); for a temporal convolution, its mean over the second k.
    Here, k rows of B are joined to one row, and A is repeated for each.
    """
    c_out, c_in, *kernel = shape
    if not {"A", "B"} <= set(found) or not len(found["A"]):
        raise ValueError(f"expected A and B of rank 1 or more, found {sorted(found)} for {layer}")
    A, B, rank = found["A"], found["B"], len(found["A"])
    if kernel and (k := kernel[0]) > 1 and A.dim() == 2:
        A = torch.block_diag(*[fit(A, (rank, k * c_in), layer)] * k).view(-1, c_in, k, k)
        A = A.mean(-1, keepdim=True) if len(kernel) == 3 else A
        B, rank = fit(B, (k * c_out, rank), layer).reshape(c_out, k * rank), k * rank
    A = fit(A, (rank, c_in, *kernel), f"{layer} A (down)")
    return A, fit(B, (c_out, rank, *[1] * len(kernel)), f"{layer} B (up)")


# --- Scales -------------------------------------------------------------------------------------


# peft's settings that change the update, with their defaults, and those that do not change it.
SETTINGS = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
IGNORED = """peft_type task_type auto_mapping base_model_name_or_path revision inference_mode
    peft_version target_modules exclude_modules lora_dropout bias modules_to_save init_lora_weights
    layers_to_transform layers_pattern loftq_config eva_config corda_config lora_ga_config
    megatron_config megatron_core qalora_group_size ensure_weight_tying runtime_config""".split()
INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # others change base weights


def read_settings(state, meta, path):
    """peft's settings, from adapter_config.json or from the metadata; None for other formats.
    Raises ValueError for unsupported settings."""
    if any(n.startswith("base_model.model.") for n in state):
        values = read_json(path.with_name("adapter_config.json"))
    elif "lora_adapter_metadata" in meta:
        values = json.loads(meta["lora_adapter_metadata"])
        values = {k.removeprefix("unet."): v for k, v in values.items() if k[:12] != "text_encoder"}
    else:
        return None
    other = [k for k, v in values.items() if v and k not in SETTINGS and k not in IGNORED]
    other += ["init_lora_weights"] * (values.get("init_lora_weights") not in INITS)
    other += ["peft_type"] * (values.get("peft_type") not in (None, "LORA"))
    if other:
        raise ValueError(f"its adapter settings are not supported: {', '.join(other)}")
    return SETTINGS | {k: v for k, v in values.items() if k in SETTINGS and v is not None}


def find_scale(layer, found, settings, meta):
    """The scale alpha/r, from the layer's alpha tensor or peft's settings; 1 without either."""
    scales, rank = [], len(found["A"])
    if "alpha" in found:
        scales.append(fit(found["alpha"], (), f"{layer}.alpha").item() / rank)
    elif "ss_network_alpha" in meta:
        raise ValueError(f"its metadata has an alpha, but {layer} has no alpha tensor")
    if settings:
        r = match_pattern(settings["rank_pattern"], layer, settings["r"])
        alpha = match_pattern(settings["alpha_pattern"], layer, settings["lora_alpha"])
        if r != rank or type(settings["use_rslora"]) is not bool:
            raise ValueError(f"its settings are r={r!r}, use_rslora={settings['use_rslora']!r}; "
                             f"expected r={rank} and a boolean for {layer}")
        scales.append(alpha / (math.sqrt(r) if settings["use_rslora"] else r))
    if not all(0 < s < 1e6 and math.isclose(s, scales[0], rel_tol=1e-3) for s in scales):
        raise ValueError(f"the scale of {layer} is {scales}; expected one positive number")
    return scales[0] if scales else 1.0


def match_pattern(patterns, layer, default):
    """The value of the first pattern that matches the layer's name, or its part after a dot. Raises
    TimeoutError, since a pattern of another program could take any time."""
    return next((value for pattern, value in patterns.items()
                 if regex.match(rf"(.*\.)?({pattern})$", layer, timeout=1)), default)


# --- MotionDirector's lists ---------------------------------------------------------------------


_ENDS = r"to_(q|k|v|out\.0)", r"ff\.net\.(0\.proj|2)"
MOTIONDIRECTOR = (  # the layers of the temporal and of the spatial path
    r"(transformer_in|.*\.temp_attentions)\..*(attn[12]\.{}|{})\.weight".format(*_ENDS),
    r".*\.attentions\..*(attn1\.{}|{})\.weight".format(*_ENDS),
)


def read_motiondirector(state, parameters, path, clip):
    """{layer: (A, B)} of a list without names: up, down, up, down, …, for the down blocks, the up
    blocks and the mid block. With N clips, pair k·N + i belongs to layer k and clip i."""
    ups, downs = state[0::2], state[1::2]
    shapes = {n.removesuffix(".weight"): tuple(p.shape) for n, p in parameters.items()}
    for pattern in MOTIONDIRECTOR:
        layers = [n for n in shapes if re.fullmatch(pattern, f"{n}.weight")]
        layers.sort(key=lambda n: n.startswith("mid_block"))
        clips = len(ups) // max(len(layers), 1)
        expected = [shapes[n] for n in layers for _ in range(clips)]
        found = [(*up.shape[:1], *down.shape[1:]) for up, down in zip(ups, downs)]
        if expected and expected == found and len(state) == 2 * len(expected):
            break
    else:
        raise ValueError(f"its {len(state)} unnamed tensors do not match MotionDirector's layers")
    if clip >= clips:
        raise ValueError(f"it has no clip {clip}, only #0 to #{clips - 1}")
    if clips > 1:
        log(f"{path}: reading clip {clip} of {clips}, counted from 0; {path.name}#{clips - 1} "
            "selects the last one")
    return {layer: build_pair(layer, {"A": down, "B": up}, shapes[layer])
            for layer, up, down in zip(layers, ups[clip::clips], downs[clip::clips])}


def to_peft(pairs):
    """The tensors of {layer: (A, B)} by peft's names, unet.<layer>.lora_A.weight and B."""
    state = {}
    for layer, (A, B) in pairs.items():
        state[f"unet.{layer}.lora_A.weight"] = A.contiguous()
        state[f"unet.{layer}.lora_B.weight"] = B.contiguous()
    return state
