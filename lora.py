"""Which layers learn, and the small files that hold what they learned.

    python -c "import lora; print(lora.read_adapter('out/clip-vmc/vmc.safetensors').meta)"

A set of layers is a pattern over parameter names. An adapter is a .safetensors file with just the
tensors that changed, the clip's latents (a start for sampling), and its story in the metadata.
"""
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import data
from model import BadInput, read_tensors

# Sets of layers, as patterns that a parameter's whole name must match.
LAYERS = {
    # VMC App. D: q, k, v of the temporal attentions. Both of a transformer's are temporal; the
    # published code leaves transformer_in out.
    "temporal-attention-qkv": r".*temp_attentions\..*\.attn[12]\.to_[qkv]\.weight",
    # All of the temporal layers, and everything: what the papers' ablations compare with.
    "temporal": r"transformer_in\..*|.*temp_(attentions|convs)\..*",
    "all": r".*",
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


def train_only(unet, layers):
    """Make one set of layers learn and freeze all else; {name: parameter}."""
    chosen = select(unet, layers)
    for name, p in unet.named_parameters():
        p.requires_grad_(name in chosen)
    return chosen


def halve(unet, keep, dtype=torch.bfloat16):
    """Store all parameters in `dtype` but those named in `keep`, which stay in fp32."""
    for name, p in unet.named_parameters():
        if name not in keep:
            p.data = p.data.to(dtype)


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


def fingerprint(unet):
    """Twelve letters that tell one base model from another, the same for its fp16 and fp32 files.
    Taken from the configuration and from layers that no method trains."""
    digest = hashlib.sha256(json.dumps(asdict(unet.config), sort_keys=True).encode())
    for tensor in (unet.conv_in.weight, unet.conv_out.weight, unet.time_embedding.linear_1.weight):
        digest.update(tensor.detach().to("cpu", torch.float16).numpy().tobytes())
    return digest.hexdigest()[:12]


@dataclass
class Adapter:
    """What was learned: tensors by parameter name, the clip's latents (C, F, h, w), and meta, the
    file's metadata (str to str): format, method, base, prompt, step, seed, fps and more."""

    tensors: dict
    latents: torch.Tensor
    meta: dict
    path: Path


FORMAT = "motion-adapter-1"


def save_adapter(path, tensors, latents, **meta):
    """Write an adapter, atomically. Tensors keep their precision, so loading it is exact."""
    state = {f"unet.{n}": t.detach().cpu().contiguous() for n, t in tensors.items()}
    state["clip.latents"] = latents.detach().cpu().contiguous()
    data.room_for(path, sum(t.nbytes for t in state.values()))
    with data.publish(path) as part:
        save_file(state, part, {"format": FORMAT} | {k: str(v) for k, v in meta.items()})


def read_adapter(path):
    """Read an adapter's file. Raises BadInput when it is no adapter, or is damaged."""
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"{path} is a folder; give the .safetensors file in it.")
    if path.is_file() and path.suffix != ".safetensors":
        raise BadInput(f"{path} is no .safetensors file; give the adapter that train.py wrote.")
    state = read_tensors(path)
    with safe_open(path, "pt") as file:
        meta = file.metadata() or {}
    if meta.get("format") != FORMAT:
        raise BadInput(f"{path} is not an adapter (format {meta.get('format', 'missing')!r}, "
                       f"wanted {FORMAT!r}); give the .safetensors that train.py wrote.")
    missing = [k for k in ("method", "base", "fps") if k not in meta]
    missing += ["clip.latents"] * ("clip.latents" not in state)
    if missing:
        raise BadInput(f"{path} lacks {', '.join(missing)}; train it again.")
    latents = state.pop("clip.latents")
    return Adapter({n.removeprefix("unet."): t for n, t in state.items()}, latents, meta, path)


def apply_adapter(unet, adapter, method=None):
    """Put the adapter's tensors into the UNet. Raises BadInput when it was made for another base or
    by another method than the one asked for, or does not fit; then nothing is changed."""
    if method and adapter.meta.get("method") != method:
        raise BadInput(f"{adapter.path} was made by --method {adapter.meta.get('method')}, wanted "
                       f"{method}; give that method, or another adapter.")
    if adapter.meta.get("base") != fingerprint(unet):
        raise BadInput(f"{adapter.path} was trained on {adapter.meta.get('base_name')} "
                       f"({adapter.meta.get('base')}), these weights are {fingerprint(unet)}; "
                       "give --weights the base it was trained on.")
    own = dict(unet.named_parameters())
    wrong = [n for n, t in adapter.tensors.items() if n not in own or own[n].shape != t.shape]
    if wrong or not adapter.tensors:
        raise BadInput(f"{adapter.path} does not fit the model: {len(wrong)} of "
                       f"{len(adapter.tensors)} tensors, first {wrong[:5]}.")
    for name, tensor in adapter.tensors.items():
        own[name].data = tensor.to(own[name].device)
