"""Adapter files: what was learned, kept in one .safetensors file that says where it is from, and
put to work in a model.

    python -c "from support.adapter_file import *; print(read_adapter('vmc.safetensors').meta)"

Axes: C channels, F frames, h w latent, n vectors of a word, D text width.
"""
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lora import KINDS, product
from support import formats
from support.files import BadInput, publish, read_tensors, room_for


def fingerprint(unet):
    """Twelve letters that tell one base model from another, the same for its fp16 and fp32 files.
    Taken from the configuration and from the last layer, which is never stored in bf16."""
    digest = hashlib.sha256(json.dumps(asdict(unet.config), sort_keys=True).encode())
    own = dict(unet.named_parameters())
    for name in [n for n in own if n.startswith("conv_out")] or own:
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
    words: dict
    latents: torch.Tensor
    meta: dict
    path: Path
    more: dict = field(default_factory=dict)


FORMAT = "motion-adapter-3"


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
        file.parent.mkdir(parents=True, exist_ok=True)
        room_for(file, sum(t.nbytes for t in tensors.values()))
        with publish(file) as part:
            save_file(tensors, part, more)
    return list(files)


def clip_file(path):
    """Where the latents of the clip that an adapter learned from are kept."""
    return path.with_name(f"{path.stem}.clip.safetensors")


def read_adapter(path, unet=None, whole=False):
    """Read an adapter's file: our own, or another program's LoRA, for which `unet` gives the names.
    "file.pt#2" is clip 2 of a MotionDirector list; `whole` takes an image UNet's weights too.
    Raises BadInput when it is none, or damaged."""
    path = Path(path)
    name, _, clip = path.name.partition("#")
    if clip.isdigit():
        path = path.with_name(name)
    if path.is_dir():
        raise BadInput(f"{path} is a folder; give the .safetensors file in it.")
    state, meta = read_tensors(path, lists=True), {}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
    kind = meta.get("format", "")
    if kind == FORMAT:
        return read_own(path, state, meta)
    if kind.startswith("motion-adapter"):
        raise BadInput(f"{path} has the older format {kind!r}, wanted {FORMAT!r}; train it again.")
    if unet is None:
        raise BadInput(f"{path} is not one of our own adapters ({FORMAT}).")
    number = int(clip) if clip.isdigit() else 0
    tensors, pairs = formats.read_foreign(state, meta, unet, path, number, whole)
    return Adapter(tensors, pairs, {}, None, meta, path)


def read_own(path, state, meta):
    """The Adapter of a file of ours. Raises BadInput for a tensor that no learner wrote."""
    adapter, halves = Adapter({}, {}, {}, None, meta, path), {}
    for name, tensor in state.items():
        kind, _, rest = name.partition(".")
        pair = re.fullmatch(r"(.*)\.lora_([AB])\.weight", rest)
        if kind == "unet" and pair:
            halves.setdefault(pair[1], {})[pair[2]] = tensor
        elif kind == "unet":
            adapter.tensors[rest] = tensor
        elif kind == "word":
            adapter.words[rest] = tensor
        elif kind in KINDS:
            adapter.more.setdefault(kind, {})[rest] = tensor
        else:
            raise BadInput(f"{path}: {name} is of no learner known here; get the code that made "
                           "it, or train it again.")
    for site, pair in halves.items():
        if len(pair) != 2:
            raise BadInput(f"{path} has half of a pair: {site} has lora_{''.join(pair)} alone.")
        adapter.pairs[site] = pair["A"], pair["B"]
    if not state:
        raise BadInput(f"{path} holds nothing that was learned; train it again.")
    if clip_file(path).is_file():
        adapter.latents = read_tensors(clip_file(path)).get("latents")
    return adapter


def check_fit(model, adapter):
    """Raises BadInput when an adapter was made for another base, or does not fit the model."""
    base, unet = adapter.meta.get("base"), model.unet
    if base and base != fingerprint(unet):
        raise BadInput(f"{adapter.path} was trained on {adapter.meta.get('base_name')} "
                       f"({base}), these weights are {fingerprint(unet)}; "
                       "give --weights the base it was trained on.")
    own = {n: tuple(p.shape) for n, p in unet.named_parameters()}
    wrong = []
    for name, tensor in adapter.tensors.items():
        if own.get(name) != tuple(tensor.shape):
            wrong.append(f"{name}: {tuple(tensor.shape)} on {own.get(name)}")
    for site, (A, B) in adapter.pairs.items():
        shape = own.get(f"{site}.weight", ())
        fits = A.dim() == B.dim() == len(shape) >= 2 and B.shape[1] == A.shape[0] > 0
        if not fits or (B.shape[0], A.shape[1]) != shape[:2] or B[0, 0].numel() > 1 or (
                A[0].numel() * shape[0] != torch.Size(shape).numel()):
            wrong.append(f"{site}: {tuple(B.shape)}·{tuple(A.shape)} on {shape}")
    width = model.text.config.hidden_size
    for word, vectors in adapter.words.items():
        if vectors.dim() != 2 or vectors.shape[1] != width or not (
                0 < len(vectors) <= 64 and word.strip()):
            wrong.append(f"word {word[:40]!r}: {tuple(vectors.shape)}, wanted (1 to 64, {width})")
    channels = unet.config.in_channels
    if adapter.latents is not None and (
            adapter.latents.dim() != 4 or adapter.latents.shape[0] != channels):
        wrong.append(f"the clip's latents: {tuple(adapter.latents.shape)}, wanted ({channels}, "
                     "F, h, w)")
    if wrong:
        raise BadInput(f"{adapter.path} does not fit the model: {len(wrong)} tensors differ, first "
                       + "; ".join(wrong[:3]))


@torch.no_grad()
def apply_adapters(model, adapters, scales=None):
    """Merge adapters into the model, each with its scale: W + Σ s·(change). Scale 0 leaves W as it
    is to the bit, scale 1 of whole tensors sets them exactly. Learned words join the text encoder,
    at any scale but 0. Raises BadInput when one does not fit, or when two bring the same word; then
    nothing is changed. Returns for each (path, layers changed, ‖ΔW‖/‖W‖ over these)."""
    for adapter in adapters:
        check_fit(model, adapter)
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
