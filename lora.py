"""What learns: sets of layers, LoRA, and the adapter files that keep what was learned.

    python -c "import lora; print(lora.read_adapter('out/clip-vmc/vmc.safetensors').meta)"

A set of layers is a pattern over parameter names. A LoRA (Hu et al. 2021) is a pair of thin
matrices beside each layer of a set: y = W·x + s·B·A·x. An adapter is a .safetensors file with what
changed (whole tensors, LoRA pairs, learned tokens), maybe the clip's latents (a start for
sampling), and its story in the metadata.
"""
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import data
from model import BadInput, TimeConv, dropout, read_tensors

# ------------------------------------------------------------------------------------------------
# Sets of layers

_LINEARS = r"attn{}\.to_(q|k|v|out\.0)"
_SPATIAL, _TEMPORAL = r".*\.attentions\.", r"(transformer_in|.*\.temp_attentions\..*)\."
_FF = r"ff\.net\.(0\.proj|2)"

# Sets of layers, as patterns that a parameter's whole name must match.
LAYERS = {
    # VMC App. D: q, k, v of the temporal attentions. Both of a transformer's are temporal; the
    # published code leaves transformer_in out.
    "temporal-attention-qkv": r".*temp_attentions\..*\.attn[12]\.to_[qkv]\.weight",
    # MotionDirector Sec. 3.2: self-attention and feed-forward, cross-attention never.
    "spatial-self-attention-ff": rf"{_SPATIAL}.*({_LINEARS.format(1)}|{_FF})\.weight",
    "temporal-attention-ff": rf"{_TEMPORAL}.*({_LINEARS.format('[12]')}|{_FF})\.weight",
    # Customize-A-Video: its text names q, k, v, its parameter counts need the output as well.
    "spatial-attention": rf"{_SPATIAL}.*{_LINEARS.format('[12]')}\.weight",
    "temporal-attention": rf"{_TEMPORAL}.*{_LINEARS.format('[12]')}\.weight",
    "cross-attention-kv": rf"{_SPATIAL}.*attn2\.to_[kv]\.weight",  # Custom Diffusion
    # Tune-A-Video: the spatial queries and the temporal attention.
    "tune-a-video": rf"{_SPATIAL}.*attn[12]\.to_q\.weight|{_TEMPORAL}.*attn[12]\..*",
    "temporal": r"transformer_in\..*|.*temp_(attentions|convs)\..*",
    "temporal-convs": r".*temp_convs\..*",
    "spatial": r"(?!transformer_in|.*temp_(attentions|convs)).*",
    # For LoRA alone, after NewMove's ablation (Table 2): the temporal blocks and convolutions.
    "temporal-linears-convs": rf"{_TEMPORAL}.*({_LINEARS.format('[12]')}|{_FF})\.weight"
                              r"|.*temp_convs\..*\.[23]\.weight",
    "all": r".*",
}
LAYERS |= {  # two of them together
    # NewMove Sec. 3.2: all of the temporal layers, and how the pictures read the text.
    "temporal-and-cross-kv": f"{LAYERS['temporal']}|{LAYERS['cross-attention-kv']}",
    # MotionDirector's baseline; and what the tiny model needs for it.
    "coupled": f"{LAYERS['spatial-self-attention-ff']}|{LAYERS['temporal-attention-ff']}",
    "coupled-convs": f"{LAYERS['spatial-self-attention-ff']}|{LAYERS['temporal-linears-convs']}",
}


def select(unet, layers):
    """{name: parameter} of a named set of layers, or of a pattern. BadInput if none match."""
    try:
        pattern = re.compile(LAYERS.get(layers, layers))
    except re.error as error:
        raise BadInput(f"--layers {layers!r} is no pattern ({error}).") from None
    chosen = {n: p for n, p in unet.named_parameters() if pattern.fullmatch(n)}
    if not chosen:
        raise BadInput(f"no layer is called {layers!r}; known sets: {', '.join(LAYERS)}, "
                       "or a pattern over parameter names.")
    return chosen


def halve(unet, keep, dtype=torch.bfloat16):
    """Store all parameters in `dtype` but those named in `keep` and those that are used in fp32
    anyhow: norms (which the temporal convolutions number 0) and the last layer."""
    # Channels last, as the activations lie: or the kernels reorder them at every call.
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for name, p in unet.named_parameters():
        if name not in keep and not re.search(r"norm|\.conv\d\.0\.|^conv_out", name):
            layout = layouts.get(p.dim(), torch.preserve_format)
            p.data = p.data.to(dtype, memory_format=layout)


def groups(parameters):
    """{kind of layer: (tensors, numbers)} of {name: parameter}; a kind: 'temp_attentions attn1'."""
    count = {}
    for name, p in parameters.items():
        owner = re.search(r"(transformer_in|temp_attentions|temp_convs|attentions|resnets)", name)
        inner = re.search(r"\.(attn[12]|ff)\.", name)
        kind = " ".join(m.group(1) for m in (owner, inner) if m) or "other"
        tensors, numbers = count.get(kind, (0, 0))
        count[kind] = tensors + 1, numbers + p.numel()
    return count


# ------------------------------------------------------------------------------------------------
# LoRA


class LoRA:
    """y = W·x + s·B·A·x on every linear layer and temporal convolution of a set of layers.

    A (r, in) starts at N(0, 1/r²), B (out, r) at zero, so a fresh LoRA changes nothing; the rank r
    is cut to the layer's own width. Dropout is on the LoRA's output, as MotionDirector has it. It
    lives beside the UNet, whose modules and names stay as they are, and acts while `on`.
    """

    def __init__(self, unet, layers, rank, scale=1.0, dropout=0.0, seed=0):
        self.scale, self.dropout, self.on, self.pairs = scale, dropout, True, {}
        g = torch.Generator().manual_seed(seed)
        for site, layer in sites(unet, layers).items():
            wide, narrow, *kernel = layer.weight.shape
            r, device = min(rank, wide, narrow), layer.weight.device
            A = torch.empty(r, narrow, *kernel).normal_(0, 1 / r, generator=g)
            B = torch.zeros(wide, r, *[1] * len(kernel))
            self.pairs[site] = nn.Parameter(A.to(device)), nn.Parameter(B.to(device))
            layer.register_forward_hook(self._beside(*self.pairs[site]))

    def _beside(self, A, B):
        def add(layer, inputs, out):
            if not self.on:
                return out
            if A.dim() == 2:
                low = F.linear(F.linear(inputs[0], A), B)
            else:  # a TimeConv: down along time, up pointwise
                low = F.conv2d(inputs[0], A.squeeze(-1), padding=(1, 0))
                low = F.conv2d(low, B.squeeze(-1))
            return out.add(dropout(low, self.dropout, layer.training), alpha=self.scale)

        return add

    def parameters(self):
        """{name: parameter}, in the names of peft: <module>.lora_A.weight and .lora_B.weight."""
        return {f"{site}.lora_{ab}.weight": p
                for site, pair in self.pairs.items() for ab, p in zip("AB", pair)}


def sites(unet, layers):
    """{module name: linear layer or temporal convolution} with a weight in a set of layers."""
    names = [n.removesuffix(".weight") for n in select(unet, layers) if n.endswith(".weight")]
    found = {n: unet.get_submodule(n) for n in names}
    found = {n: m for n, m in found.items() if isinstance(m, (nn.Linear, TimeConv))}
    if not found:
        raise BadInput(f"--layers {layers!r} has no linear layer or temporal convolution, so no "
                       "LoRA can stand beside it; choose other layers, or --rank 0.")
    return found


def product(A, B, W):
    """B·A in the shape of W, also of convolutions."""
    return (B.flatten(1).float() @ A.flatten(1).float()).view(W.shape).to(W)


# ------------------------------------------------------------------------------------------------
# Formats of other programs. Each function below renames one format to {module: (A, B)}, with the
# file's scale multiplied into B; where a tensor is not ours to use, it is told aloud.


def from_peft(state, unet):
    """diffusers and peft: unet.<module>.lora_A.weight, with or without an adapter's name; alpha is
    taken to be the rank unless the metadata say otherwise (`peft_scale`)."""
    pairs = {}
    for name, A in state.items():
        if m := re.fullmatch(r"(?:unet\.)?(.*)\.lora_A(\.\w+)?\.weight", name):
            pairs[m[1]] = A, state[name.replace(".lora_A", ".lora_B")]
    return pairs


def peft_scale(meta):
    """alpha / rank of the metadata that diffusers writes beside a LoRA, or 1."""
    try:
        values = json.loads(meta.get("lora_adapter_metadata", "{}"))
        return values["unet.lora_alpha"] / values["unet.r"]
    except (ValueError, KeyError, TypeError):
        return 1.0


def from_stable_lora(state, unet):
    """stable_lora: <module>.lora_A (r, in) and .lora_B (out, r)."""
    return {n.removesuffix(".lora_A"): (A, state[n.removesuffix("A") + "B"])
            for n, A in state.items() if n.endswith(".lora_A")}


def from_kohya(state, unet):
    """kohya: lora_unet_<module, "." as "_">.lora_down.weight, .lora_up.weight and .alpha; the scale
    is alpha/rank, or 1."""
    modules = {"lora_unet_" + n.replace(".", "_"): n for n, _ in unet.named_modules()}
    pairs = {}
    for name, A in state.items():
        stem, _, kind = name.partition(".")
        if kind == "lora_down.weight" and stem.startswith("lora_unet_"):
            if stem not in modules:
                raise BadInput(f"{name}: this UNet has no such layer; is the LoRA for Stable "
                               "Diffusion 2.x?")
            scale = float(state.get(f"{stem}.alpha", A.shape[0])) / A.shape[0]
            pairs[modules[stem]] = A, state[f"{stem}.lora_up.weight"] * scale
    return pairs


def from_motiondirector(tensors, unet, clip=0):
    """MotionDirector's published lists without names: up, down, up, down, … over its layers, down
    blocks before up blocks and the middle last; of a file from N clips, layer k's pair of clip i is
    number k·N + i."""
    ups, downs = tensors[0::2], tensors[1::2]
    for layers in ("temporal-attention-ff", "spatial-self-attention-ff"):
        order = sorted(sites(unet, layers), key=lambda n: n.startswith("mid_block"))
        shape = lambda site: unet.get_submodule(site).weight.shape
        N = len(ups) // len(order)
        fits = N and len(ups) == N * len(order) and all(
            (up.shape[0], down.shape[1]) == shape(order[k // N])
            for k, (up, down) in enumerate(zip(ups, downs)))
        if fits and clip < N:
            return {site: (downs[k * N + clip], ups[k * N + clip]) for k, site in enumerate(order)}
    raise BadInput(f"a list of {len(tensors)} tensors does not fit MotionDirector's layers of this "
                   "UNet" + (f", or has no clip {clip}" if clip else "") + ".")


def to_peft(pairs):
    """{module: (A, B)} as other programs read it: unet.<module>.lora_A.weight and .lora_B.weight.
    """
    return {f"unet.{site}.lora_{ab}.weight": t.contiguous()
            for site, pair in pairs.items() for ab, t in zip("AB", pair)}


# ------------------------------------------------------------------------------------------------
# Adapter files


def fingerprint(unet):
    """Twelve letters that tell one base model from another, the same for its fp16 and fp32 files.
    Taken from the configuration and from layers that few methods train."""
    digest = hashlib.sha256(json.dumps(asdict(unet.config), sort_keys=True).encode())
    for tensor in (unet.conv_in.weight, unet.conv_out.weight, unet.time_embedding.linear_1.weight):
        digest.update(tensor.detach().to("cpu", torch.float16).numpy().tobytes())
    return digest.hexdigest()[:12]


@dataclass
class Adapter:
    """What was learned: whole tensors by parameter name, LoRA pairs (A, B) by module name with the
    scale multiplied into B, learned words' vectors (n, D); the first clip's latents (C, F, h, w) or
    None; and meta, the file's metadata (str to str): format, method, base, prompt, step and more.
    """

    tensors: dict
    pairs: dict
    words: dict
    latents: torch.Tensor
    meta: dict
    path: Path


FORMAT = "motion-adapter-2"


def save_adapter(path, tensors=None, loras=(), words=None, latents=None, **meta):
    """Write an adapter, atomically. Tensors keep their precision, so loading it is exact. A LoRA's
    scale goes into B, so that every program that reads peft's names applies the same change."""
    state = {f"unet.{n}": t for n, t in (tensors or {}).items()}
    for one in loras:
        state |= to_peft({site: (A, B * one.scale) for site, (A, B) in one.pairs.items()})
    state |= {f"word.{word}": t for word, t in (words or {}).items()}
    state |= {} if latents is None else {"clip.latents": latents}
    state = {n: t.detach().cpu().contiguous() for n, t in state.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    data.room_for(path, sum(t.nbytes for t in state.values()))
    with data.publish(path) as part:
        save_file(state, part, {"format": FORMAT} | {k: str(v) for k, v in meta.items()})


def read_adapter(path, unet=None):
    """Read an adapter's file: our own, or another program's LoRA, for which `unet` gives the names.
    "file.pt#2" is clip 2 of a MotionDirector list. Raises BadInput when it is none, or damaged."""
    path = Path(path)
    name, _, clip = path.name.partition("#")
    if clip.isdigit():
        path = path.with_name(name)
    if path.is_dir():
        raise BadInput(f"{path} is a folder; give the .safetensors file in it.")
    state, meta = read_tensors(path, lists=True), {}
    if isinstance(state, list):
        pairs = from_motiondirector(state, unet, int(clip) if clip.isdigit() else 0)
        return Adapter({}, pairs, {}, None, {"method": "motiondirector's list"}, path)
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
    if meta.get("format", "").startswith("motion-adapter") and meta["format"] != FORMAT:
        raise BadInput(f"{path} has the older format {meta['format']!r}, wanted {FORMAT!r}; train "
                       "it again.")
    latents = state.pop("clip.latents", None)
    words = {n.removeprefix("word."): t for n, t in state.items() if n.startswith("word.")}
    other = sorted(n for n in state if re.match(r"(lora_te\d?_|text_encoder[._])", n))
    if other:
        data.say(f"{path}: skipping {len(other)} tensors of a text encoder, such as {other[0]}")
    rest = {n: t for n, t in state.items() if n not in other and not n.startswith("word.")}
    pairs = {}
    for rename in (from_peft, from_stable_lora, from_kohya):
        try:
            pairs = pairs or rename(rest, unet) if unet or rename is not from_kohya else pairs
        except KeyError as error:
            raise BadInput(f"{path} has half of a pair: {error} is missing.") from None
    if (scale := peft_scale(meta)) != 1:
        pairs = {site: (A, B * scale) for site, (A, B) in pairs.items()}
    whole = {n.removeprefix("unet."): t for n, t in rest.items()
             if "lora" not in n and not n.endswith(".alpha")}
    if not (pairs or words or whole):
        raise BadInput(f"{path} is not an adapter: no learned tensor in it has a known name; give "
                       "the .safetensors that train.py wrote, or a LoRA of a known format.")
    return Adapter(whole, pairs, words, latents, meta, path)


def check_fit(unet, adapter):
    """Raises BadInput when an adapter was made for another base, or does not fit the UNet."""
    base = adapter.meta.get("base")
    if base and base != fingerprint(unet):
        raise BadInput(f"{adapter.path} was trained on {adapter.meta.get('base_name')} "
                       f"({base}), these weights are {fingerprint(unet)}; "
                       "give --weights the base it was trained on.")
    own = dict(unet.named_parameters())
    wrong = [n for n, t in adapter.tensors.items() if n not in own or own[n].shape != t.shape]
    for site, (A, B) in adapter.pairs.items():
        shape = own[f"{site}.weight"].shape if f"{site}.weight" in own else (0, 0)
        if (B.shape[0], A.shape[1]) != tuple(shape[:2]) or B.shape[1] != A.shape[0]:
            wrong.append(f"{site}: {tuple(B.shape)}·{tuple(A.shape)} on {tuple(shape)}")
    if wrong:
        raise BadInput(f"{adapter.path} does not fit the model: {len(wrong)} of "
                       f"{len(adapter.tensors) + len(adapter.pairs)} tensors, first {wrong[:5]}.")


@torch.no_grad()
def apply_adapters(parts, adapters, scales=None):
    """Merge adapters into the model, each with its scale: W + Σ s·(change). Scale 0 leaves W as it
    is to the bit, scale 1 of whole tensors sets them exactly. Learned words join the text encoder,
    at any scale but 0. Raises BadInput when one does not fit, or when two bring the same word; then
    nothing is changed."""
    for adapter in adapters:
        check_fit(parts.unet, adapter)
    words = [w for adapter in adapters for w in adapter.words]
    if twice := {w for w in words if words.count(w) > 1}:
        raise BadInput(f"two adapters bring the word {', '.join(twice)}; train one of them with "
                       "another --word.")
    own, before = dict(parts.unet.named_parameters()), {}
    chosen = [(a, s) for a, s in zip(adapters, scales or [1.0] * len(adapters)) if s != 0]
    for adapter, _ in chosen:
        device = own["conv_in.weight"].device
        parts.text.learned |= {w: t.to(device) for w, t in adapter.words.items()}
    for adapter, scale in chosen:
        for name, tensor in adapter.tensors.items():
            p, tensor = own[name], tensor.to(own[name])
            if scale == 1 and name not in before:
                before[name], p.data = p.data, tensor
            else:
                p.data = p.data + scale * (tensor - before.setdefault(name, p.data))
    for adapter, scale in chosen:
        for site, (A, B) in adapter.pairs.items():
            p = own[f"{site}.weight"]
            p.data = p.data + scale * product(A, B, p.data)
