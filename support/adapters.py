"""Adapter files: trained weights in one .safetensors file with metadata, and merging them into a
model.

    python -c "from support.files import read_meta; print(read_meta('vmc.safetensors'))"

Axes: C channels, F frames, h w latent, n vectors of a token, D text width.
"""
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from support import formats
from support.files import BadInput, read_meta, read_tensors, reading, save_tensors

FORMAT = "motion-adapter-4"
CLIP = "clip_latents"  # the tensor that holds the first clip, for methods that start from it

# {kind: apply(model, tensors, scale)} for kinds of trainables that users add. An adapter file names
# their tensors "kind.…"; `apply` gets them without that prefix.
ADAPTER_LOADERS = {}


def fingerprint(pipe):
    """Twelve hexadecimal digits that identify a base model, from the digests of model._load. A
    network that is not loaded from a file, or later (Latte's T5), does not count."""
    networks = pipe.unet, pipe.vae, pipe.text_encoder
    digests = "".join(getattr(network, "digest", "") for network in networks)
    return hashlib.sha256(digests.encode()).hexdigest()[:12]


@dataclass
class Adapter:
    """Trained weights: full tensors by parameter name, and LoRA pairs (A, B) by module name with
    the scale multiplied into B; vectors (n, D) of learned tokens (`words`); {kind: {name: tensor}}
    for ADAPTER_LOADERS (`more`); the first clip's latents (C, F, h, w) or None; and the file's
    metadata (str to str): format, method, base, prompt, step, sampling settings."""

    tensors: dict
    pairs: dict
    latents: torch.Tensor
    meta: dict
    path: Path
    words: dict = field(default_factory=dict)
    more: dict = field(default_factory=dict)


def save_adapter(path, trainables, latents=None, **meta):
    """Write the tensors of trainables and the clip's latents to one file, in full precision.
    diffusers and peft ignore unknown names."""
    state = {} if latents is None else {CLIP: latents}
    for trainable in trainables:
        state |= trainable.tensors()
    save_tensors(path, state, {"format": FORMAT} | {k: str(v) for k, v in meta.items()})


def read_adapter(path, model, whole=False):
    """Read an adapter of train.py, or another program's LoRA. "file.pt#2" is clip 2 of a
    MotionDirector list; `whole` also accepts all weights of an image UNet. Raises BadInput if the
    file is not an adapter, is damaged, or was trained on another base model."""
    path = Path(path)
    name, _, clip = path.name.partition("#")
    numbered = re.fullmatch("[0-9]{1,9}", clip)
    path, clip = (path.with_name(name), int(clip)) if numbered else (path, 0)
    state, meta = read_tensors(path, lists=True), read_meta(path)
    words, more, latents = {}, {}, None
    check_base(path, meta, model)
    with reading(path, "it belongs to another model"):
        if own := meta.get("format") == FORMAT:
            width, channels = model.text_encoder.config.hidden_size, model.unet.config.in_channels
            latents = state.pop(CLIP, None)
            if latents is not None and (latents.dim() != 4 or len(latents) != channels):
                shape = tuple(latents.shape)
                raise ValueError(f"{CLIP} is {shape}, expected ({channels}, F, h, w)")
            for name in list(state):
                kind, _, rest = name.partition(".")
                if kind == "word" and rest:
                    vectors = state.pop(name)
                    words[rest] = formats.fit(vectors, (max(len(vectors), 1), width), name)
                elif kind in ADAPTER_LOADERS:
                    more.setdefault(kind, {})[rest] = state.pop(name)
        tensors, pairs = {}, {}
        if state or not own:
            tensors, pairs = formats.read_foreign(state, meta, model.unet, path, clip, whole or own)
        if not (tensors or pairs or words or more):
            raise ValueError("it holds no trained weights")
    return Adapter(tensors, pairs, latents, meta, path, words, more)


def check_base(path, meta, model):
    """Raises BadInput if an adapter was trained on another base model."""
    base, here = meta.get("base"), fingerprint(model)
    if base and base != here:
        raise BadInput(f"{path} was trained on {meta.get('base_name')} ({base}), but these weights "
                       f"are {here}; give --weights its base model.")


def load_trainables(path, trainables, model):
    """Set trainables to an adapter of train.py. Raises BadInput unless it holds exactly their
    tensors."""
    state, meta = read_tensors(path), read_meta(path)
    if meta.get("format") != FORMAT:
        raise BadInput(f"{path} is not an adapter of train.py, so it cannot be trained further; to "
                       "use it frozen, also give layers=none of the same part.")
    check_base(path, meta, model)
    state.pop(CLIP, None)
    own = {name: t for one in trainables for name, t in one.tensors().items()}
    shape = lambda tensors, name: tuple(tensors[name].shape) if name in tensors else "missing"
    if wrong := [n for n in own | state if shape(own, n) != shape(state, n)]:
        raise BadInput(f"{path} cannot be trained further: the shape of {wrong[0]} is "
                       f"{shape(state, wrong[0])} in the file, {shape(own, wrong[0])} here; give "
                       "the layers, rank and tokens of its run, and load_from for all its parts.")
    for one in trainables:
        one.load(state)


@torch.no_grad()
def apply_adapters(model, adapters, scales=None):
    """Merge adapters into the model, each with its scale s: W + Σ s·ΔW. Scale 0 leaves W unchanged
    exactly; scale 1 sets full tensors exactly. Learned tokens are added to the text encoder unless
    the scale is 0. Raises BadInput, before any change, if two adapters hold the same token. Returns
    (path, number of changed layers, ‖ΔW‖/‖W‖ over these) per adapter."""
    words = [w for adapter in adapters for w in adapter.words]
    if twice := {w for w in words if words.count(w) > 1}:
        raise BadInput(f"two adapters hold the token {', '.join(twice)}; train one of them with "
                       "another word.token.")
    named, before = dict(model.unet.named_parameters()), {}
    device, norms = next(iter(named.values())).device, [[] for _ in adapters]
    active = [row for row in zip(adapters, scales or [1.0] * len(adapters), norms) if row[1]]
    for adapter, scale, changes in active:  # full tensors first: they replace a layer
        for name, tensor in adapter.tensors.items():
            changes.append(merge_full(named[name], tensor.to(named[name]), name, scale, before))
    for adapter, scale, changes in active:
        for layer, (A, B) in adapter.pairs.items():
            W = named[f"{layer}.weight"]
            delta = scale * lora_delta(A.to(device), B.to(device), W.data)
            changes.append((delta.norm(), W.data.norm()))
            W.data = W.data + delta
        for kind, tensors in adapter.more.items():
            ADAPTER_LOADERS[kind](model, {n: t.to(device) for n, t in tensors.items()}, scale)
        model.text_encoder.learned |= {w: t.to(device) for w, t in adapter.words.items()}
    return [(a.path, len(rows), relative_change(rows)) for a, rows in zip(adapters, norms)]


def lora_delta(A, B, W):
    """B·A in the shape of W, also for convolutions."""
    return (B.flatten(1).float() @ A.flatten(1).float()).view(W.shape).to(W)


def merge_full(p, tensor, name, scale, before):
    """Set p to p + scale·(tensor − base weight); `before` keeps the base weight of each name.
    Returns the norms of the change and of the base weight."""
    base = before.get(name, p.data)
    if scale == 1 and name not in before:
        p.data = tensor
    else:
        p.data = p.data + scale * (tensor - base)
    before[name] = base
    return scale * (tensor - base).norm(), base.norm()


def relative_change(norms):
    """‖ΔW‖/‖W‖ over layers, from [(norm of a layer's change, norm of the layer)]."""
    if not norms:
        return 0.0
    change, size = torch.tensor(norms, dtype=torch.float64).norm(dim=0).tolist()
    return change / size if size else 0.0
