"""Adapter files: what was learned, kept in one .safetensors file that says where it is from, and
put to work in a model.

    python -c "from support.adapter_file import *; print(read_story('vmc.safetensors'))"

Axes: C channels, F frames, h w latent, n vectors of a word, D text width.
"""
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lora import KINDS, product
from support import formats
from support.files import BadInput, publish, read_tensors, reading

FORMAT = "motion-adapter-3"


def fingerprint(unet):
    """Twelve letters that tell one base model from another, the same for its fp16 and fp32 files.
    Taken from the configuration and from the last layer, which is never stored in bf16."""
    digest = hashlib.sha256(json.dumps(asdict(unet.config), sort_keys=True).encode())
    own = dict(unet.named_parameters())
    for name in [n for n in own if n.startswith(("conv_out", "proj_out"))] or own:
        tensor = own[name].detach().to("cpu", torch.float16)
        digest.update(tensor.flatten()[:4096].contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@dataclass
class Adapter:
    """What was learned: whole tensors by parameter name, LoRA pairs (A, B) by module name with the
    scale multiplied into B; learned words' vectors (n, D); `more`, {kind: {name: tensor}}, of
    learners that were added to lora.KINDS; the first clip's latents (C, F, h, w) or None; and
    meta, the file's metadata (str to str): format, method, base, prompt, step and more."""

    tensors: dict
    pairs: dict
    latents: torch.Tensor
    meta: dict
    path: Path
    words: dict = field(default_factory=dict)
    more: dict = field(default_factory=dict)


def save_adapter(path, learners, latents=None, **meta):
    """Write what learners hold, atomically. Tensors keep their precision, so loading is exact. The
    clip's latents go into a file beside it, <name>.clip.safetensors, since other programs read the
    adapter too and know no such tensor. Returns the files written."""
    state = {}
    for one in learners:
        state |= one.tensors()
    path, kept = Path(path), {k: str(v) for k, v in meta.items()}
    files = {path: (state, {"format": FORMAT} | kept)}
    if latents is not None:
        files[clip_file(path)] = ({"latents": latents}, {"of": path.name})
    for file, (tensors, more) in files.items():
        tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        with publish(file) as part:
            save_file(tensors, part, more)
    return list(files)


def clip_file(path):
    """Where the latents of the clip that an adapter learned from are kept."""
    return path.with_name(f"{path.stem}.clip.safetensors")


def read_meta(path):
    """A .safetensors file's metadata; {} of other files. Raises BadInput."""
    if path.suffix != ".safetensors":
        return {}
    with reading(path, "give an adapter's file"), safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_adapter(path, model, whole=False):
    """Read an adapter's file for a model: our own, or another program's LoRA. "file.pt#2" is clip 2
    of a MotionDirector list; `whole` takes an image UNet's weights too. Raises BadInput when it is
    none, is damaged, was made for another base, or does not fit."""
    path = Path(path)
    name, _, clip = path.name.partition("#")
    path, clip = (path.with_name(name), int(clip)) if clip.isdigit() else (path, 0)
    state, meta = read_tensors(path, lists=True), read_meta(path)
    mine, base, words, more = meta.get("format") == FORMAT, meta.get("base"), {}, {}
    if base and base != fingerprint(model.unet):
        raise BadInput(f"{path} was trained on {meta.get('base_name')} ({base}), these weights are "
                       f"{fingerprint(model.unet)}; give --weights the base it was trained on.")
    with reading(path, "it is of another model"):
        for name in list(state) if mine else ():
            kind, _, rest = name.partition(".")
            if kind == "word":
                vectors = state.pop(name)
                words[rest] = formats.fit(vectors, (len(vectors), model.text.config.hidden_size), rest)
            elif kind in KINDS:
                more.setdefault(kind, {})[rest] = state.pop(name)
        tensors, pairs = formats.read_foreign(state, meta, model.unet, path, clip, whole) if (
            state or not mine) else ({}, {})
        latents = read_tensors(clip_file(path))["latents"] if clip_file(path).is_file() else None
        if latents is not None:
            _, frames, h, w = latents.shape
            formats.fit(latents, (model.unet.config.in_channels, frames, h, w), "the clip")
    return Adapter(tensors, pairs, latents, meta, path, words, more)


@torch.no_grad()
def apply_adapters(model, adapters, scales=None):
    """Merge adapters into the model, each with its scale: W + Σ s·(change). Scale 0 leaves W as it
    is to the bit, scale 1 of whole tensors sets them exactly. Learned words join the text encoder,
    at any scale but 0. Raises BadInput when two bring the same word; then nothing is changed.
    Returns for each (path, layers changed, ‖ΔW‖/‖W‖ over these)."""
    words = [w for adapter in adapters for w in adapter.words]
    if twice := {w for w in words if words.count(w) > 1}:
        raise BadInput(f"two adapters bring the word {', '.join(twice)}; train one of them with "
                       "another word.text.")
    own, before = dict(model.unet.named_parameters()), {}
    device, changes = next(iter(own.values())).device, [[] for _ in adapters]
    chosen = [row for row in zip(adapters, scales or [1.0] * len(adapters), changes) if row[1]]
    for adapter, scale, mine in chosen:  # all whole tensors first: they take a layer's place
        for name, tensor in adapter.tensors.items():
            mine.append(move_whole(own[name], tensor.to(own[name]), name, scale, before))
    for adapter, scale, mine in chosen:
        for site, (A, B) in adapter.pairs.items():
            W = own[f"{site}.weight"]
            low = scale * product(A.to(device), B.to(device), W.data)
            mine.append((low.norm(), W.data.norm()))
            W.data = W.data + low
        for kind, tensors in adapter.more.items():
            KINDS[kind](model, {n: t.to(device) for n, t in tensors.items()}, scale)
        model.text.learned |= {w: t.to(device) for w, t in adapter.words.items()}
    return [(a.path, len(mine), relative_change(mine)) for a, mine in zip(adapters, changes)]


def relative_change(changes):
    """‖ΔW‖/‖W‖ of layers taken together, from [(norm of a layer's change, norm of the layer)]."""
    if not changes:
        return 0.0
    apart, size = torch.tensor(changes, dtype=torch.float64).norm(dim=0).tolist()
    return apart / size if size else 0.0


def move_whole(p, tensor, name, scale, before):
    """p + scale·(tensor − the base's own), in place; `before` keeps the base's own of each name.
    Returns the norms of the change and of the base's."""
    base = before.get(name, p.data)
    if scale == 1 and name not in before:
        p.data = tensor
    else:
        p.data = p.data + scale * (tensor - base)
    before[name] = base
    return scale * (tensor - base).norm(), base.norm()
