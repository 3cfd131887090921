"""The merged model, in the layouts that other programs open: the hub's, and ModelScope's .pth."""
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.files import PART, BadInput, publish, say
from support.hub import pth_name


def save_hub(model, folder, base_folder):
    """Keep the model with its merged UNet as a folder in the hub's layout, for diffusers and for
    --weights: unet/ in fp16, all other parts as the base has them, hard-linked where the disk
    allows. The folder is there whole or not at all. Raises BadInput where it is already."""
    folder, base = Path(folder), Path(base_folder)
    own = getattr(model.unet, "subfolder", "unet")  # the part that is merged
    state = halved(model.unet, folder)
    if words := getattr(model.text, "learned", None):
        say(f"{folder} will not know the learned words {', '.join(words)}; their adapter does.")
    part = folder.with_name(PART + folder.name)
    shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
    shutil.copytree(base, part, copy_function=link, ignore=lambda place, names: [
        n for n in names if Path(place, n).parent == base / own and n != "config.json"])
    with publish(part / own / "diffusion_pytorch_model.safetensors") as file:
        save_file(state, file, {"format": "pt"})
    os.replace(part, folder)


def save_pth(model, path, base_folder=None):
    """Keep a UNet as ModelScope's own .pth in fp16, which ComfyUI's and the web UI's nodes open.
    Raises BadInput where the file is already."""
    if hasattr(model.unet, "subfolder"):
        raise BadInput(f"--save {path}: a .pth can hold ModelScope's UNet only; give a folder.")
    state = as_pth(halved(model.unet, path), model.unet)
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
    return state


def link(source, target):
    """The same file under another name, or a copy where the disk cannot."""
    try:
        os.link(Path(source).resolve(), target)  # what a hub cache has is a link itself
    except OSError:
        shutil.copyfile(source, target)
