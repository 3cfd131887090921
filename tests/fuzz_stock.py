"""The files that the campaign of fuzz.py damages: a very small model, clips, and LoRAs; and ways to
change bytes, tensors, JSON, flags and texts.

A way takes a random.Random and a file, changes the file, and returns a description.
"""
import contextlib
import io
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
from conftest import encode
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import generate
import lora
import model
from support import formats, media
from support.files import digest
from tiny import world
from tiny.train import text_to_hub

# ------------------------------------------------------------------------------------------------
# The stock


CONFIGS = {  # of a model that takes milliseconds
    "unet": (model.UNet, model.UNetConfig, {
        "block_out_channels": [8, 16], "cross_attention_dim": 16, "attention_head_dim": 4,
        "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"], "layers_per_block": 1,
        "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"], "norm_num_groups": 4,
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "norm_eps": 1e-5, "act_fn": "silu",
        "downsample_padding": 1, "mid_block_scale_factor": 1, "_diffusers_version": "0.15.0"}),
    "vae": (model.VAE, model.VAEConfig, {
        "block_out_channels": [4, 4, 8, 8], "layers_per_block": 1, "latent_channels": 4,
        "norm_num_groups": 4, "scaling_factor": 0.5, "in_channels": 3, "out_channels": 3,
        "act_fn": "silu", "sample_size": 64}),
    "text_encoder": (model.TextEncoder, model.TextConfig, {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "bos_token_id": 0,
        "max_position_embeddings": 77, "vocab_size": 49408, "eos_token_id": 2}),
}
CLIPS = ("hop.mp4", "hop.gif", "hop.mkv", "images")
FOREIGN = ("diffusers.safetensors", "kohya.safetensors", "peft/adapter_model.safetensors",
           "motiondirector.pt")


def write_weights(folder, configs, tensors_of):
    """Write networks in the hub's layout. configs: {name: (class, class of its configuration,
    values)}; tensors_of: the tensors of a network by name."""
    for part, (cls, config, values) in configs.items():
        (folder / part).mkdir(parents=True)
        known = {k: v for k, v in values.items() if k in config.__annotations__}
        state = tensors_of(cls(config(**known)))
        if part == "text_encoder":
            state = text_to_hub({n.removeprefix("tower."): t for n, t in state.items()})
        name = "diffusion_pytorch_model" if part != "text_encoder" else "model"
        save_file({n: t.half().contiguous() for n, t in state.items()},
                  folder / part / f"{name}.safetensors", {"format": "pt"})
        (folder / part / "config.json").write_text(json.dumps(values))


def make_weights(place):
    """The very small model, in the hub's layout."""
    torch.manual_seed(0)
    write_weights(place / "weights", CONFIGS, lambda network: network.state_dict())
    shutil.copytree(model.TINY / "scheduler", place / "weights" / "scheduler")


def use(folder):
    """Use the very small model as the tiny one."""
    model.TINY = generate.TINY = folder


def make_clips(folder):
    """One motion as a video in three containers and as images, and regularization clips."""
    scenes = world.sample_scenes(3, torch.Generator().manual_seed(5), ("hopping",))
    clips = [media.to_pixels(video) for video in world.render(scenes)[..., ::2, ::2]]
    (folder / "clips/images").mkdir(parents=True)
    (folder / "prior").mkdir()
    encode(folder / "clips/hop.mp4", clips[0])
    encode(folder / "clips/hop.mkv", clips[0])
    images = [Image.fromarray(pixels) for pixels in clips[0][:8]]
    images[0].save(folder / "clips/hop.gif", save_all=True, append_images=images[1:],
                   duration=125)
    for i, image in enumerate(images):
        image.save(folder / f"clips/images/{i}.{'png' if i % 2 else 'jpg'}")
    for i in (1, 2):
        encode(folder / f"prior/thing {i} hopping.mp4", clips[i])


def make_foreign(folder):
    """One LoRA in the formats of diffusers, kohya, peft and MotionDirector."""
    pairs = lora.LoRA(model.load_unet(folder / "weights"), "coupled", 2).pairs
    pairs = {site: (A.detach(), torch.full_like(B, 0.01)) for site, (A, B) in pairs.items()}
    peft, kohya, listed = formats.to_peft(pairs), {}, []
    for site, (A, B) in pairs.items():
        flat = "lora_unet_" + site.replace(".", "_")
        kohya |= {f"{flat}.lora_down.weight": A.clone(), f"{flat}.lora_up.weight": B.clone(),
                  f"{flat}.alpha": torch.tensor(1.0)}
        if site.startswith("transformer_in") or ".temp_attentions." in site:
            listed += [(site.startswith("mid_block"), B, A)]
    (folder / "foreign/peft").mkdir(parents=True)
    save_file(peft, folder / "foreign/diffusers.safetensors")
    save_file(kohya, folder / "foreign/kohya.safetensors")
    save_file({n.replace("unet.", "base_model.model.", 1): t for n, t in peft.items()},
              folder / "foreign/peft/adapter_model.safetensors")
    (folder / "foreign/peft/adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_q"],
         "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False, "lora_dropout": 0.1}))
    listed.sort(key=lambda row: row[0])
    torch.save([t for _, B, A in listed for t in (B, A)], folder / "foreign/motiondirector.pt")


# ------------------------------------------------------------------------------------------------
# Bytes


OTHER_CONTENT = {"empty": b"", "text": b"this is no such file\n", "zeros": bytes(5000),
                 "pickle": b"\x80\x04cposix\nsystem\n(S'touch ran'\ntR.",
                 "code": Path(__file__).read_bytes()}
INSTEAD = {"a folder": os.mkdir, "a pipe": os.mkfifo, "a loop": lambda path: os.symlink(path, path),
           "gone": lambda path: None}
SPOILED = ("a flip", "flips", "cut", "more", "a hole")  # the file may still be usable


def ruin(r, path):
    """Change a file's bytes, or replace it by a folder, a pipe or a link."""
    how = r.choice((*SPOILED, *OTHER_CONTENT, *INSTEAD))
    raw = bytearray(path.read_bytes())
    at = r.randrange(len(raw)) if raw else 0
    if how in ("a flip", "flips"):
        for _ in range(1 if how == "a flip" else 30):
            raw[r.choice((r.randrange(len(raw)), r.randrange(min(len(raw), 200))))] ^= (
                1 << r.randrange(8))
    elif how == "cut":
        raw = raw[:at]
    elif how == "more":
        raw += r.randbytes(r.choice((1, 9, 5000)))
    elif how == "a hole":
        raw[at : at + r.randrange(1, 9000)] = b""
    path.unlink()
    if how in INSTEAD:
        INSTEAD[how](path)
    else:
        path.write_bytes(OTHER_CONTENT.get(how, raw))
    return how


# ------------------------------------------------------------------------------------------------
# Tensors and metadata


def put(value):
    """A way that writes one odd value into a tensor."""
    def way(t):
        t = t.clone().float()
        t.view(-1)[len(t.flatten()) // 2] = value
        return t
    return way


WAYS = {  # {change: the new tensor, or None if it is removed}
    "NaN": put(math.nan), "infinity": put(math.inf), "gone": lambda t: None,
    "whole numbers": lambda t: t.long(), "bool": lambda t: t > 0, "bytes": lambda t: t.byte(),
    "an axis more": lambda t: t[None, None], "shorter": lambda t: t[: len(t) // 2],
    "flat": lambda t: t.reshape(1, 1, 1, -1), "one number": lambda t: t.sum(),
    "empty": lambda t: t[:0], "longer": lambda t: torch.cat([t, t]),
    "turned": lambda t: t.transpose(0, -1).contiguous(),
    "fp16": lambda t: t.half(), "bf16": lambda t: t.bfloat16(), "fp64": lambda t: t.double(),
    "huge": lambda t: t.float() * 1e30, "zeros": torch.zeros_like,
}
NAMES = ("x", "", "a\nb", "é", "unet.x", "../x", "word.", "x" * 3000, "unet.conv_in.lora_A.weight")


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def retensor(r, path):
    """Change one tensor of a .safetensors file, or a name."""
    meta, state = metadata_of(path), load_file(path)
    name = r.choice(sorted(n for n in state if state[n].dim()))
    if r.random() < 0.2:
        how = r.choice(NAMES)
        state[how] = state[name].clone() if r.random() < 0.5 else state.pop(name)
    else:
        how = r.choice(list(WAYS))
        new = WAYS[how](state.pop(name))
        state |= {} if new is None else {name: new}
    save_file(state, path, meta)
    return f"{name} {how[:30]!r}"


STORIES = ("noise_prior", "sampling_steps", "inversion_steps", "guidance", "fps", "step", "sampler",
           "inversion_model", "format", "base", "prompt", "method")


def restory(r, path):
    """Change an adapter's metadata, with a checksum of the new metadata in half of the cases."""
    meta, tensors = metadata_of(path), load_file(path)
    name, text = r.choice(STORIES), r.choice(
        ("", "abc", "-1", "nan", "inf", "1e999", "0", "2.5", "9" * 5000, "None", "a\nb", "é", "1e9",
         "[]", "true", "x" * 9999))
    meta |= {name: text}
    if honest := r.random() < 0.5:
        meta["digest"] = digest(tensors, {k: v for k, v in meta.items() if k != "digest"})
    save_file(tensors, path, meta)
    return f"{name} = {text[:20]!r}{'' if honest else ', with the old checksum'}"


# ------------------------------------------------------------------------------------------------
# JSON


ODD = [None, True, False, 0, -1, 1, 3, 7, 2**31, 10**30, -10**400, 1e-300, 0.5, math.nan, math.inf,
       "", "x", "../..", "/etc/hostname", "\0", "a\nb", "é" * 9, "x" * 9999, "\ud800", [], [1], {},
       [[1, 2]], {"a": 1}, [None], ["x"] * 3, [0] * 9999]


def rejson(r, path):
    """Change one value in a JSON file, take one out, add one, or nest it deeply."""
    tree = node = json.loads(path.read_text())
    if r.random() < 0.05:
        path.write_text('{"a":' * 99_999)
        return "deep"
    while True:
        key = r.choice(list(node) if isinstance(node, dict) else range(len(node)))
        inner = isinstance(node[key], (dict, list)) and len(node[key])
        if not inner or r.random() < 0.3:
            break
        node = node[key]
    odd = r.choice(ODD)
    if r.random() < 0.1:
        del node[key]
        odd = "gone"
    elif r.random() < 0.1 and isinstance(node, dict):
        node["_unheard_of"] = odd
    else:
        node[key] = odd
    path.write_text(json.dumps(tree))
    return f"{key} = {str(odd)[:40]!r}"


# ------------------------------------------------------------------------------------------------
# Flags and texts


PATTERNS = ("(.*)*x", "(a|a)*$", "(a+)+b", ".*" * 30, "(", "[", "((.*)+)+\\1", "(?P<x>.*)*y",
            "(?:.?)" * 40 + "$", "none", "all", "attn1:2", "attn1:x,:3", ".*:nan", "coupled")


def odd_value(r, place):
    """A value that somebody could type. Half of them are sensible, so that commands go further."""
    files = [str(place / name) for name in (
        "clips", "clips/hop.mp4", "weights", "adapters/vmc.safetensors", "prompts.txt", "set",
        "foreign/motiondirector.pt", "weights/unet/config.json")]
    sensible = ["0", "1", "2", "3", "4", "0.5", "1.5", "64x64", "8x16", "cpu", "none", "mse",
                "ddpm", "dpm", "on", "off", "a star", "inverted", "noise", "fp32", "base", *files]
    odd = ["", " ", "-1", "-0.5", "1e9", "1e-9", "nan", "inf", "-inf", "9" * 400, "0x10", "1_0",
           "٣", "abc", "é", "a\nb", "\udcff", "--", "-", "-x", "x" * 5000, "../..", "/", "*", "%s",
           "{}", "/dev/null", "/dev/zero", "/proc/nowhere/x", "out", "4096x4096", "64X65", "64×64",
           "cuda:99", "meta", "world", "generated", "sks", "org/name", "https://x.org/a",
           str(place), files[6] + "#0", files[0] + "\n", "8x8", "E=mc2", "\x1b[31m", "\u202e",
           "a=b.c", "steps=3", "\x7f\x9b"]
    return r.choice(r.choice((sensible, odd)))


def flags_of(command):
    """All flags on a command's help page, and one that no command has."""
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        command.parse(["--help"])
    return sorted({*re.findall(r"^  (?:-h, )?(--[\w-]+)", page.getvalue(), re.MULTILINE),
                   "--no-world", "--unheard-of"})


def odd_text(r):
    """A prompt of odd characters."""
    letters = ["a", "red", "star", " ", "\n", "\t", "\r\n", "!", "é", "ß", "中文", "😀", "\u202e",
               "\0", "\u2028", "<script>", "</script>", "&amp;", "\"", "'", "\\", "/", "..", "%s",
               "{}", "sks", "<look>", "X*", "\x1b[31m", "-", "--", "\ufeff", "\udcff", "ﬁ", "1",
               "E=mc2", "a=b", "steps=3 "]
    return "".join(r.choice(letters) for _ in range(r.choice((0, 1, 2, 5, 20, 60, 400))))
