"""Export of merged models: a folder in the hub's layout, or ModelScope's .pth."""
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.files import BadInput, atomic_write, log, temporary_folder
from support.hub import pth_name

SAVED = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "vae", "clip")  # copied


def save_hub(model, folder, base_folder):
    """Write the model with its merged UNet as a folder in the hub's layout, for diffusers and for
    --weights. unet/ is stored in fp16; all other files are hard links to the base model, or copies.
    The folder appears complete or not at all. Raises BadInput if it exists."""
    folder, base = Path(folder), Path(base_folder)
    subfolder = getattr(model.unet, "subfolder", "unet")
    state = to_fp16(model.unet, folder)
    with temporary_folder(folder) as parent:
        part = parent / folder.name
        for name in (*SAVED, f"{subfolder}/config.json"):
            if (base / name).is_dir():
                shutil.copytree(base / name, part / name, copy_function=link)
            elif (base / name).exists():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                link(base / name, part / name)
        with atomic_write(part / subfolder / "diffusion_pytorch_model.safetensors") as file:
            save_file(state, file, {"format": "pt"})
        os.replace(part, folder)
    warn_of_tokens(model, folder)


def save_pth(model, path, base_folder=None):
    """Write the UNet as ModelScope's .pth in fp16, for the ModelScope nodes of ComfyUI and the web
    UI. Raises BadInput if the file exists."""
    if hasattr(model.unet, "subfolder"):
        raise BadInput(f"--save-merged {path}: a .pth can only hold ModelScope's UNet; give the "
                       "name of a folder.")
    state = as_pth(to_fp16(model.unet, path), model.unet)
    with atomic_write(path) as part:
        torch.save(state, part)
    warn_of_tokens(model, path)


def warn_of_tokens(model, path):
    """Warn if the model has learned tokens, which the exported files cannot hold."""
    if words := getattr(model.text_encoder, "learned", None):
        log(f"warning: {path} does not hold the learned tokens {', '.join(words)}; only their "
            "adapter does")


def as_pth(state, unet):
    """The UNet's tensors with ModelScope's names. proj_in and proj_out of the temporal transformers
    become pointwise convolutions."""
    pth = {}
    for name, tensor in state.items():
        if re.search(r"(temp_attentions\.\d+|transformer_in)\.proj_(in|out)\.weight$", name):
            tensor = tensor.unsqueeze(-1)
        pth[pth_name(name, unet.config.layers_per_block)] = tensor
    return pth


def to_fp16(unet, path):
    """The UNet's tensors in fp16 on the CPU. Raises BadInput if a weight does not fit, and if the
    path for them exists."""
    if Path(path).exists():
        raise BadInput(f"{path} exists; give --save-merged another name.")
    state = {}
    for name, tensor in unet.state_dict().items():
        state[name] = tensor.detach().to("cpu", torch.float16).contiguous()
        if not torch.isfinite(state[name]).all():
            raise BadInput(f"{path}: {name} is too large for fp16; give a smaller --scale.")
    return state


def link(source, target):
    """A hard link, or a copy on disks without hard links."""
    try:
        os.link(Path(source).resolve(), target)  # files in a hub cache are symbolic links
    except OSError:
        shutil.copyfile(source, target)
