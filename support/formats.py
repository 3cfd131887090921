"""LoRAs of other programs: right, or refused by name; and ours in the layouts that they open.

    tensors, pairs = read_foreign(read_tensors("x.safetensors"), {}, unet, "x.safetensors")

A LoRA that is half applied looks like one that learned little. So every tensor and every number of
a file is used, or the file is refused with one line that says what was not understood; those of a
text encoder are skipped, and it is said. FORMATS has one entry a format: does it fit, and read.

A layer's change is s·B·A: A is (r, in, *kernel), B (out, r, 1, …), s usually alpha/r.
"""
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.files import PART, BadInput, publish, read_json, room_for, say
from support.hub import pth_name

TEXT = r"(lora_te\d?_|text_encoder(_\d)?\.|text_model\.|(transformer\.)?resblocks\.)"


def read_foreign(state, meta, unet, path, clip=0, whole=False):
    """Another program's file for this UNet as (tensors, pairs).

    state is {name: tensor}, or MotionDirector's list, of which `clip` chooses the clip; meta the
    metadata of a .safetensors. `pairs` maps layers to (A, B), every scale multiplied into B.
    `tensors` maps parameters to their full new values, for what is no pair added to them: whole
    tensors, biases, DoRA. `whole` takes all of a UNet's weights too. Raises BadInput.
    """
    file = File(state, meta, unet, Path(path), dict(unet.named_parameters()))
    if isinstance(state, list):
        return {}, read_motiondirector(file, clip)
    if clip:
        file.refuse(f"has no clip {clip}, being no list of MotionDirector's", f"leave out #{clip}")
    if text := sorted(n for n in state if re.match(TEXT, n)):
        say(f"{path}: skipping {len(text)} tensors of a text encoder, such as {text[0]}")
        file.state = {n: t for n, t in state.items() if not re.match(TEXT, n)}
    if not file.state:
        file.refuse("holds no tensor for the UNet", "give a LoRA of the UNet")
    file.kind, read = next((kind, read) for kind, fits, read in FORMATS if fits(file.state))
    tensors, pairs = read(file)
    left = [n for n in file.own if n not in tensors]
    if not (whole or pairs) and all(re.search(r"temp_|transformer_in", n) for n in left):
        file.refuse("holds all weights of a video or image UNet and is no adapter",
                    "give --weights its folder, or use it as an absorber")
    return tensors, pairs


@dataclass
class File:
    """What is being read, and for which UNet."""

    state: dict
    meta: dict
    unet: torch.nn.Module
    path: Path
    own: dict  # {name: parameter} of the UNet
    kind: str = ""  # the format's name

    def refuse(self, what, do):
        raise BadInput(f"{self.path} {what}; {do}.")

    def fit(self, name, tensor, shape):
        """A tensor as fp32 in the shape its place has; files add or leave out ones at the end."""
        longest = max(len(shape), tensor.dim())
        found, wanted = ((*s, *[1] * (longest - len(s))) for s in (tensor.shape, shape))
        if found != wanted or tensor.is_complex():
            self.refuse(f"has {name} as {tuple(tensor.shape)}, wanted {tuple(shape)}",
                        "give a LoRA for this UNet")
        if not torch.isfinite(tensor).all():
            self.refuse(f"has NaN or infinity in {name}", "download it again")
        return tensor.detach().float().cpu().reshape(shape)

    def weight(self, name):
        """The UNet's own values of a parameter."""
        return self.own[name].detach().float().cpu()


# ------------------------------------------------------------------------------------------------
# From names to layers


ROLES = {  # what the tensors of a layer are called, by what they are to it
    "A": r"\.lora_A(?:\.[^.]+)?\.weight|\.lora_A|\.lora_down\.weight|[._]lora\.down\.weight"
         r"|\.lora_linear_layer\.down\.weight",
    "B": r"\.lora_B(?:\.[^.]+)?\.weight|\.lora_B|\.lora_up\.weight|[._]lora\.up\.weight"
         r"|\.lora_linear_layer\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "bias": r"\.lora_B(?:\.[^.]+)?\.bias",
    "magnitude": r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?",
    "dora_scale": r"\.dora_scale",
}
NAME = re.compile("(?P<layer>.+?)(?:" + "|".join(f"(?P<{r}>{p})" for r, p in ROLES.items()) + ")")


def own_names(file, join):
    """{a parameter's or layer's name in the file, without prefix: its name in the UNet}. Files of
    the web UIs number the blocks through, as ModelScope's .pth does."""
    names = {n: n for n in file.own}
    if any(re.search(r"(input|middle|output)_blocks?[._]\d", n) for n in file.state):
        per_block = getattr(file.unet.config, "layers_per_block", None)
        names |= {pth_name(n, per_block): n for n in file.own if per_block}
    for name, own in list(names.items()):
        if name.endswith(".weight") and file.own[own].dim() > 1:  # norms have no LoRA
            names[name.removesuffix(".weight")] = own.removesuffix(".weight")
    return {n.replace(".", join): own for n, own in names.items()}


def sort_out(file, prefix="", join="."):
    """({layer: {role: tensor}}, {parameter: whole tensor}) of a file whose names begin with
    `prefix` and join their parts with `join`. Refuses what it does not know."""
    names, layers, whole, strange = own_names(file, join), {}, {}, []
    for name, tensor in file.state.items():
        start = re.match(prefix, name)
        bare = name[start.end():] if start else ""
        bare = bare.replace(".processor.", ".").replace(".base_layer.", ".")
        role = NAME.fullmatch(bare)
        layer = role and names.get(re.sub(r"\.to_out$", ".to_out.0", role["layer"]))
        if names.get(bare) in file.own:
            place, key = whole, names[bare]
            tensor = file.fit(name, tensor, file.own[key].shape)
        elif layer:
            place, key = layers.setdefault(layer, {}), role.lastgroup
        else:
            strange.append(name)
            continue
        if key in place:
            file.refuse(f"has two tensors for one place, of which {name} is one",
                        "if it holds several adapters, save one alone")
        place[key] = tensor
    if strange:
        file.refuse(f"was read as {file.kind}, and {len(strange)} of its {len(file.state)} tensors "
                    f"have no place in this UNet, first {strange[0]}",
                    "give a LoRA for ModelScope, ZeroScope or Stable Diffusion 2.x")
    return layers, whole


# ------------------------------------------------------------------------------------------------
# From layers to changes


def merge(file, layers, whole, settings=None):
    """(tensors, pairs) of what was sorted out, by peft's settings where there are any."""
    settings = settings or metadata_settings(file)
    check_flags(file, layers, settings)
    tensors, pairs = dict(whole), {}
    for layer, parts in layers.items():
        W, bias = f"{layer}.weight", f"{layer}.bias"
        A, B = pair_of(file, layer, parts)
        scale = scale_of(file, layer, parts, settings)
        B = file.fit(f"{layer} B·scale", B * scale, B.shape)
        if W in tensors:
            file.refuse(f"has both the whole of {W} and a LoRA for it", "save one of them alone")
        if not {"magnitude", "dora_scale"} & set(parts):
            pairs[layer] = A, B
        else:
            tensors[W] = dora(file, layer, parts, A, B)
        if "bias" in parts:
            if bias not in file.own or bias in tensors or layer not in pairs:
                file.refuse(f"has a LoRA bias for {layer}, where the layer has none, or a whole "
                            "one or DoRA stands beside it", "train it without lora_bias")
            added = file.fit(f"{layer} lora_B.bias", parts["bias"], file.own[bias].shape)
            tensors[bias] = file.weight(bias) + scale * added
    return tensors, pairs


def pair_of(file, layer, parts):
    """A and B of a layer, as fp32, in the shapes that its weight asks for."""
    if not {"A", "B"} <= set(parts):
        file.refuse(f"has half of a pair: {layer} has {', '.join(sorted(parts))} alone, and wants "
                    "A (down) and B (up)", "download or save it again")
    wide, narrow, *kernel = file.own[f"{layer}.weight"].shape
    one, rank = [1] * len(kernel), len(parts["A"]) if parts["A"].dim() else 0
    if rank < 1:
        file.refuse(f"has a LoRA of rank 0 for {layer}", "give one of rank 1 or more")
    B = file.fit(f"{layer} B (up)", parts["B"], (wide, rank, *one))
    if "mid" not in parts:
        return file.fit(f"{layer} A (down)", parts["A"], (rank, narrow, *kernel)), B
    # LyCORIS's LoCon may keep the kernel apart, between an A and a B of width 1: ΔW = up·mid·down.
    A = file.fit(f"{layer} A (down)", parts["A"], (rank, narrow, *one)).flatten(1)
    mid = file.fit(f"{layer} mid", parts["mid"], (rank, rank, *kernel)).flatten(2)
    return torch.einsum("nmk,mi->nik", mid, A).reshape(rank, narrow, *kernel), B


def scale_of(file, layer, parts, settings):
    """alpha/r: from a tensor beside the pair, or peft's settings, or 1 where neither says it."""
    rank, scales = len(parts["A"]), []
    if "alpha" in parts:
        alpha = file.fit(f"{layer}.alpha", parts["alpha"], ()).item()
        if alpha <= 0:  # 0 means "r" to some programs, and "off" to others
            file.refuse(f"has alpha {alpha} for {layer}", "write one number above 0")
        scales.append(alpha / rank)
    if settings:
        r = by_pattern(settings["rank_pattern"], layer, settings["r"])
        if r != rank:
            file.refuse(f"says that {layer} has rank {r}, and its A has {rank}",
                        "the settings are of another file: save both again")
        alpha = by_pattern(settings["alpha_pattern"], layer, settings["lora_alpha"])
        scales.append(alpha / (math.sqrt(r) if settings["use_rslora"] else r))
    if len(scales) == 2 and not math.isclose(*scales, rel_tol=1e-3):
        file.refuse(f"gives {layer} a scale of {scales[0]:g} in its alpha, of {scales[1]:g} in its "
                    "settings", "save it again with one of them")
    return scales[-1] if scales else 1.0


def dora(file, layer, parts, A, B):
    """W' = m·(W + BA)/‖W + BA‖ (Liu et al. 2024, Eq. 5). peft's m has a number an output; LyCORIS's
    (out, 1, …) too, and its (1, in, 1, …) one an input; the norm is over the other axes."""
    W = file.weight(f"{layer}.weight")
    new = W + (B.flatten(1) @ A.flatten(1)).reshape(W.shape)
    m, axis = parts.get("dora_scale"), 0
    if "magnitude" in parts:
        m = parts["magnitude"].flatten()  # for convolutions peft writes (1, out, 1, …)
    elif m.dim() > 1 and m.shape[0] == 1:
        axis = 1
    shape = [n if a == axis else 1 for a, n in enumerate(W.shape)]
    m = file.fit(f"{layer}'s magnitude", m, shape)
    norm = torch.linalg.vector_norm(new, dim=[a for a in range(W.dim()) if a != axis], keepdim=True)
    return file.fit(f"{layer} by DoRA", m * new / norm, W.shape)


# ------------------------------------------------------------------------------------------------
# peft's settings


# What peft's settings say about the weights, with its defaults; and what says nothing about them.
SETTINGS = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
            "use_dora": False, "lora_bias": False}
IDLE = """peft_type task_type auto_mapping base_model_name_or_path revision inference_mode
    peft_version target_modules exclude_modules lora_dropout bias modules_to_save init_lora_weights
    layers_to_transform layers_pattern loftq_config eva_config corda_config lora_ga_config
    megatron_config megatron_core qalora_group_size ensure_weight_tying runtime_config""".split()
STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others change the base weights


def checked(file, values):
    """peft's settings, complete. Refuses what is not in the formula, and numbers that are none."""
    other = [k for k, v in values.items() if v and k not in SETTINGS and k not in IDLE]
    if (start := values.get("init_lora_weights")) not in STARTS:
        other.append(f"init_lora_weights={start}")
    if values.get("peft_type") not in (None, "LORA"):
        other.append(f"peft_type={values['peft_type']}")
    if other:
        file.refuse(f"was made with {', '.join(other)}, which is not understood here",
                    "merge it in the program that made it, or save it as a plain LoRA")
    settings = SETTINGS | {k: v for k, v in values.items() if k in SETTINGS and v is not None}
    try:
        patterns = settings["rank_pattern"], settings["alpha_pattern"]
        numbers = [settings["r"], settings["lora_alpha"]]
        for pattern in patterns:
            numbers += pattern.values()
            by_pattern(pattern, "", 1)
        fine = all(type(n) in (int, float) and math.isfinite(n) and n > 0 for n in numbers)
        fine = fine and all(type(settings[k]) is bool for k, v in SETTINGS.items() if v is False)
    except (AttributeError, re.error):
        fine = False
    if not fine:
        file.refuse("has settings of peft with a rank or an alpha that is no number above 0, or a "
                    "flag that is neither true nor false", "save it again")
    return settings


def by_pattern(patterns, layer, default):
    """The value of the first pattern that is the layer's name, or its end after a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def check_flags(file, layers, settings):
    """What the settings say is there must be there, and the other way round."""
    for flag, role in (("use_dora", "magnitude"), ("lora_bias", "bias")):
        have = sum(role in parts for parts in layers.values())
        if settings and have != (len(layers) if settings[flag] else 0):
            file.refuse(f"says {flag}={settings[flag]}, and {have} of {len(layers)} layers have "
                        "the tensor for it", "save it again")


def metadata_settings(file):
    """What diffusers writes into the file beside a LoRA, with or without "unet."; or None."""
    if "lora_adapter_metadata" not in file.meta:
        return None
    try:
        values = json.loads(file.meta["lora_adapter_metadata"])
        bare = {k.removeprefix("unet."): v for k, v in values.items() if k.startswith("unet.")}
        bare = bare or {k: v for k, v in values.items() if "." not in k}
    except (ValueError, AttributeError, RecursionError):
        bare = {}
    if not bare:
        file.refuse("has a lora_adapter_metadata that says nothing about the UNet", "save it again")
    return checked(file, bare)


# ------------------------------------------------------------------------------------------------
# The formats


def read_diffusers(file):
    """unet.<layer>.lora_A.weight, with or without "unet." and an adapter's name; ComfyUI's
    diffusion_model.<layer>, in the hub's names or ModelScope's; diffusers' older names
    (.lora.down.weight, .processor.to_q_lora.down.weight); and whole tensors."""
    return merge(file, *sort_out(file, r"(unet\.|diffusion_model\.)?"))


def read_save_pretrained(file):
    """base_model.model.<layer>.lora_A.weight; alpha is in adapter_config.json beside the file."""
    beside = file.path.with_name("adapter_config.json")
    if not beside.is_file():
        file.refuse(f"is by peft's save_pretrained, and its alpha is in {beside.name}, which is "
                    "not beside it", "put it there")
    parts = sort_out(file, r"base_model\.model\.(unet\.)?")
    return merge(file, *parts, checked(file, read_json(beside)))


def read_kohya(file):
    """lora_unet_<layer, "." as "_">.lora_down.weight, .lora_up.weight and .alpha, also of
    convolutions (LoCon, with lora_mid), and dora_scale."""
    layers, whole = sort_out(file, "lora_unet_", "_")
    for layer, parts in layers.items():
        if "ss_network_alpha" in file.meta and "alpha" not in parts:
            file.refuse(f"has an alpha in its metadata and none for {layer}", "save it again")
    return merge(file, layers, whole)


def read_stable_lora(file):
    """<layer>.lora_A and .lora_B, alpha = r, in the hub's names or (for the web UI) ModelScope's.
    Of a convolution with a kernel of k they are (k·r, k·in) and (k·out, k·r), and B·A, read on as
    (out, in, k, k), is the change; in time, as (out, in, k, k, 1), its mean over the second k. As a
    pair: k rows of B are one output's, each with an A of its own."""
    layers, whole = sort_out(file)
    for layer, parts in layers.items():
        wide, narrow, *kernel = file.own[f"{layer}.weight"].shape
        k = kernel[0] if kernel else 1
        if k > 1 and set(parts) == {"A", "B"} and parts["A"].dim() == 2:
            rows = len(parts["A"])
            A = file.fit(f"{layer}.lora_A", parts["A"], (rows, k * narrow))
            A = torch.block_diag(*[A] * k).view(k * rows, narrow, k, k)
            B = file.fit(f"{layer}.lora_B", parts["B"], (k * wide, rows))
            parts["A"] = A.mean(-1, keepdim=True) if len(kernel) == 3 else A
            parts["B"] = B.reshape(wide, k * rows)
    return merge(file, layers, whole)


LYCORIS = (r".*(\.(hada|lokr)_\w+|[._]b?oft_\w+|\.[ab][12]\.weight|\.(diff|diff_b|w_norm|b_norm)"
           r"|\.on_input|\.vera_\w+)$")


def read_lycoris(file):
    """Refuses the kinds of LyCORIS that are no product of two thin matrices."""
    name = next(n for n in file.state if re.match(LYCORIS, n))
    file.refuse(f"has {name}, of a kind of LyCORIS (LoHa, LoKr, OFT, GLoRA, full, norms) that is "
                "no pair of thin matrices", "merge it where it was made, or train a LoRA or LoCon")


def has(pattern):
    """Does any of a file's names begin so?"""
    return lambda names: any(re.match(pattern, n) for n in names)


FORMATS = (  # the first that fits reads the file
    ("LyCORIS's other kinds", has(LYCORIS), read_lycoris),
    ("stable_lora", has(r".*\.lora_[AB]$"), read_stable_lora),
    ("kohya or LoCon", has(r"lora_unet_"), read_kohya),
    ("peft's save_pretrained", has(r"base_model\.model\."), read_save_pretrained),
    ("diffusers, peft, ComfyUI or whole tensors", has(r""), read_diffusers),
)


_ENDS = r"to_(q|k|v|out\.0)", r"ff\.net\.(0\.proj|2)"
MOTIONDIRECTOR = (  # its layers: of the temporal path, and of the spatial one
    r"(transformer_in|.*\.temp_attentions)\..*(attn[12]\.{}|{})\.weight".format(*_ENDS),
    r".*\.attentions\..*(attn1\.{}|{})\.weight".format(*_ENDS),
)


def read_motiondirector(file, clip):
    """A list without names: up, down, up, down, … over its layers, down blocks before up blocks and
    the middle last; of N clips, layer k's pair of clip i is number k·N + i."""
    ups, downs = file.state[0::2], file.state[1::2]
    for pattern in MOTIONDIRECTOR:
        layers = [n.removesuffix(".weight") for n in file.own if re.fullmatch(pattern, n)]
        layers.sort(key=lambda n: n.startswith("mid_block"))
        clips = len(ups) // max(len(layers), 1)
        wanted = [tuple(file.own[f"{n}.weight"].shape) for n in layers for _ in range(clips)]
        found = [(*up.shape[:1], *down.shape[1:]) for up, down in zip(ups, downs)]
        if wanted and wanted == found and len(file.state) == 2 * len(wanted):
            break
    else:
        file.refuse(f"is a list of {len(file.state)} tensors without names, which are not "
                    "MotionDirector's for this UNet", "give the UNet it was trained on")
    if clip >= clips:
        file.refuse(f"has no clip {clip}, only {clips} of them", f"give #0 to #{clips - 1}")
    if clips > 1:
        say(f"{file.path}: clip {clip} of {clips}; {file.path.name}#{clips - 1} takes the last")
    pairs = {}
    for layer, up, down in zip(layers, ups[clip::clips], downs[clip::clips]):
        pairs[layer] = pair_of(file, layer, {"A": down, "B": up})
    return pairs


# ------------------------------------------------------------------------------------------------
# Out


def to_peft(pairs):
    """{layer: (A, B)} as diffusers and peft read it: unet.<layer>.lora_A.weight, .lora_B.weight."""
    state = {}
    for layer, (A, B) in pairs.items():
        state[f"unet.{layer}.lora_A.weight"] = A.contiguous()
        state[f"unet.{layer}.lora_B.weight"] = B.contiguous()
    return state


def save_hub(model, folder, base_folder):
    """Keep the model with its merged UNet as a folder in the hub's layout, for diffusers and for
    --weights: unet/ in fp16, all other parts as the base has them, hard-linked where the disk
    allows. The folder is there whole or not at all. Raises BadInput where it is already."""
    folder, base = Path(folder), Path(base_folder)
    state = halved(model.unet, folder)
    if words := getattr(model.text, "learned", None):
        say(f"{folder} will not know the learned words {', '.join(words)}; their adapter does.")
    part = folder.with_name(PART + folder.name)
    shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
    try:
        (part / "unet").mkdir(parents=True)
        for kind in ("vae", "text_encoder", "tokenizer", "scheduler"):
            if (base / kind).is_dir():
                shutil.copytree(base / kind, part / kind, copy_function=link)
        for name in ("model_index.json", "unet/config.json"):
            if (base / name).is_file():
                shutil.copyfile(base / name, part / name)
        with publish(part / "unet" / "diffusion_pytorch_model.safetensors") as file:
            save_file(state, file, {"format": "pt"})
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save_pth(unet, path):
    """Keep a UNet as ModelScope's own .pth in fp16, which ComfyUI's and the web UI's nodes open.
    Raises BadInput where the file is already."""
    if not hasattr(unet.config, "layers_per_block"):
        raise BadInput(f"{path}: only a UNet has a place in ModelScope's .pth; give a folder.")
    state = as_pth(halved(unet, path), unet)
    with publish(path) as part:
        torch.save(state, part)


def as_pth(state, unet):
    """A UNet's tensors by ModelScope's own names, where the temporal transformers' proj_in and
    proj_out are convolutions of width 1."""
    pth = {}
    for name, tensor in state.items():
        if re.search(r"(temp_attentions\.\d+|transformer_in)\.proj_(in|out)\.weight$", name):
            tensor = tensor.unsqueeze(-1)
        pth[pth_name(name, unet.config.layers_per_block)] = tensor
    return pth


def halved(unet, path):
    """The UNet's tensors as the hub has them, fp16 on the CPU, for a path that is not there yet."""
    if Path(path).exists():
        raise BadInput(f"{path} is there already; give --save another name.")
    state = {}
    for name, tensor in unet.state_dict().items():
        state[name] = tensor.detach().to("cpu", torch.float16).contiguous()
        if not torch.isfinite(state[name]).all():
            raise BadInput(f"{path}: {name} is too large for fp16; use a smaller --scale.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    room_for(path, sum(t.nbytes for t in state.values()))
    return state


def link(source, target):
    """The same file under another name, or a copy where the disk cannot."""
    try:
        os.link(Path(source).resolve(), target)  # what a hub cache has is a link itself
    except OSError:
        shutil.copyfile(source, target)
