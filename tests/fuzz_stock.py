"""The files that the campaign of fuzz.py damages: a very small model, clips, and LoRAs; ways to
change bytes, tensors, JSON, logs and flags; and inputs that must work.

A way takes a random.Random and a file, changes the file, and returns a description and "refuse" if
the file must not be used, "work" if it still means the same, or "" if both are correct.
"""
import json
import math
import os
import shutil
from fractions import Fraction
from pathlib import Path

import av
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import generate
import lora
import model
import sampler
from support import media
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


def make_weights(place):
    """The very small model, in the hub's layout."""
    folder = place / "weights"
    torch.manual_seed(0)
    for part, (cls, config, values) in CONFIGS.items():
        (folder / part).mkdir(parents=True)
        state = cls(config(**{k: v for k, v in values.items() if k in config.__annotations__})
                    ).state_dict()
        if part == "text_encoder":
            state = text_to_hub({n.removeprefix("tower."): t for n, t in state.items()})
        name = "diffusion_pytorch_model" if part != "text_encoder" else "model"
        save_file({n: t.half().contiguous() for n, t in state.items()},
                  folder / part / f"{name}.safetensors", {"format": "pt"})
        (folder / part / "config.json").write_text(json.dumps(values))
    shutil.copytree(model.TINY / "scheduler", folder / "scheduler")


def use(folder):
    """Use the very small model as the tiny one."""
    model.TINY = generate.TINY = folder


def make_clips(folder):
    """One motion as a video in three containers and as images, and regularization clips."""
    video = world.render(world.sample_scenes(3, torch.Generator().manual_seed(5), ("hopping",)))
    video = video[..., ::2, ::2]  # half as large
    write(folder / "clips/hop.mp4", video[0])
    write(folder / "clips/hop.mkv", video[0])
    images = [Image.fromarray(p) for p in media.to_pixels(video[0][:, :8])]
    images[0].save(folder / "clips/hop.gif", save_all=True, append_images=images[1:],
                     duration=125)
    (folder / "clips/images").mkdir()
    for i, image in enumerate(images):
        image.save(folder / f"clips/images/{i}.{'png' if i % 2 else 'jpg'}")
    for i in (1, 2):
        write(folder / f"prior/thing {i} hopping.mp4", video[i])


def write(path, video, times=None, codec="libx264", **stream_options):
    """Write a small video (3, F, H, W) as any program might. times: seconds of each frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = media.to_pixels(video)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = pixels.shape[1:3]
        for name, value in ({"pix_fmt": "yuv420p"} | stream_options).items():
            setattr(stream, name, value)
        if times:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times:
                frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_foreign(folder):
    """One LoRA in the formats of diffusers, kohya, peft and MotionDirector."""
    unet = model.load_unet(folder / "weights")
    pairs = lora.LoRA(unet, "coupled", 2).pairs
    peft, kohya, listed = {}, {}, []
    for site, (A, B) in pairs.items():
        A, B = A.detach(), torch.full_like(B, 0.01)
        peft |= {f"{site}.lora_A.weight": A, f"{site}.lora_B.weight": B}
        flat = "lora_unet_" + site.replace(".", "_")
        kohya |= {f"{flat}.lora_down.weight": A.clone(), f"{flat}.lora_up.weight": B.clone(),
                  f"{flat}.alpha": torch.tensor(1.0)}
        if site.startswith("transformer_in") or ".temp_attentions." in site:
            listed += [(site.startswith("mid_block"), B, A)]
    (folder / "foreign/peft").mkdir(parents=True)
    save_file({f"unet.{n}": t for n, t in peft.items()}, folder / "foreign/diffusers.safetensors")
    save_file(kohya, folder / "foreign/kohya.safetensors")
    save_file({f"base_model.model.{n}": t for n, t in peft.items()},
              folder / "foreign/peft/adapter_model.safetensors")
    (folder / "foreign/peft/adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_q"],
         "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False, "lora_dropout": 0.1}))
    listed.sort(key=lambda row: row[0])
    torch.save([t for _, B, A in listed for t in (B, A)], folder / "foreign/motiondirector.pt")


# ------------------------------------------------------------------------------------------------
# Bytes


def ruin(r, path):
    """Change a file's bytes, or replace it by a folder, a pipe or a link."""
    how = r.choice(("a flip", "flips", "cut", "more", "a hole", "empty", "text", "pickle", "gone",
                    "a folder", "a pipe", "a loop", "zeros", "another"))
    raw = bytearray(path.read_bytes())
    path.unlink()
    at = r.randrange(len(raw)) if raw else 0
    if how in ("a flip", "flips"):
        for _ in range(1 if how == "a flip" else 30):
            raw[r.choice((r.randrange(len(raw)), r.randrange(min(len(raw), 200))))] ^= (
                1 << r.randrange(8))
    elif how == "cut":
        raw = raw[:at]
    elif how == "more":
        raw += bytes(r.randrange(256) for _ in range(r.choice((1, 9, 5000))))
    elif how == "a hole":
        raw[at : at + r.randrange(1, 9000)] = b""
    elif how in ("a folder", "a pipe", "a loop"):
        put_instead(path, how)
    elif how not in ("gone", "another"):
        raw = {"empty": b"", "text": b"this is no such file\n", "zeros": bytes(len(raw)),
               "pickle": b"\x80\x04cposix\nsystem\n(S'touch ran'\ntR."}[how]
    else:
        raw = Path(__file__).read_bytes()
    if how not in ("gone", "a folder", "a pipe", "a loop"):
        path.write_bytes(raw)
    return how, "" if how in ("a flip", "flips", "cut", "more", "a hole") else "refuse"


def put_instead(path, how, elsewhere=None):
    """A folder, a pipe or a link in place of a file that was removed."""
    if how == "a folder":
        path.mkdir()
    elif how == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"a loop": path, "a link": elsewhere}.get(how, "nowhere"))


OUR_NAMES = ("run.json", "settings.json", "metrics.json", "page.html", "study-key.json",
             "sheet.png", "log.jsonl", "state.safetensors", "vmc.safetensors",
             "samples/step-000000.mp4", ".tmp-abc/vmc.safetensors", ".part-vmc.safetensors",
             ".unfinished/mine")


def write_names(folder, names=OUR_NAMES):
    """Files of others with the names of ours."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"mine": 1, "flags": {"resume": true}}\n')


# ------------------------------------------------------------------------------------------------
# Tensors


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


def retensor(r, path):
    """Change one tensor of a .safetensors file, or a name."""
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    state, must = load_file(path), "refuse"
    name = r.choice(sorted(n for n in state if state[n].dim()))
    if r.random() < 0.2:
        new = r.choice(NAMES)
        state[new] = state[name].clone() if r.random() < 0.5 else state.pop(name)
        how = f"{name} as {new[:30]!r}"
        must = "refuse" if new in ("x", "../x", "é") else ""
    else:
        how = r.choice(list(WAYS))
        old = state.pop(name)
        new = WAYS[how](old)
        state |= {} if new is None else {name: new}
        if how in ("fp16", "bf16", "fp64"):
            must = "work"
        elif how in ("huge", "zeros") or new is not None and new.shape == old.shape and (
                new.is_floating_point() and new.isfinite().all()):
            must = ""
        how = f"{name} {how}"
    save_file(state, path, meta)
    return how, must


STORIES = ("noise_prior", "sampling_steps", "inversion_steps", "guidance", "fps", "step", "sampler",
           "inversion_model", "format", "base", "prompt", "method")


def restory(r, path):
    """Change an adapter's metadata, with a checksum of the new metadata in half of the cases."""
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    name, text = r.choice(STORIES), r.choice(
        ("", "abc", "-1", "nan", "inf", "1e999", "0", "2.5", "9" * 5000, "None", "a\nb", "é", "1e9",
         "[]", "true", "x" * 9999))
    tensors, meta = load_file(path), meta | {name: text}
    if honest := r.random() < 0.5:
        meta["digest"] = digest(tensors, {k: v for k, v in meta.items() if k != "digest"})
    save_file(tensors, path, meta)
    number = name in sampler.Sampling.__dataclass_fields__
    odd = number and text in ("", "abc", "-1", "nan", "inf", "None", "a\nb", "é", "[]")
    return f"{name} = {text[:20]!r}", "refuse" if odd or not honest else ""


# ------------------------------------------------------------------------------------------------
# JSON and logs


ODD = [None, True, False, 0, -1, 1, 3, 7, 2**31, 10**30, -10**400, 1e-300, 0.5, math.nan, math.inf,
       "", "x", "../..", "/etc/hostname", "\0", "a\nb", "é" * 9, "x" * 9999, "\ud800", [], [1], {},
       [[1, 2]], {"a": 1}, [None], ["x"] * 3, [0] * 9999]
NUMBERS = {  # numbers that determine a network or a schedule
    "attention_head_dim", "cross_attention_dim", "layers_per_block", "norm_num_groups", "norm_eps",
    "in_channels", "out_channels", "latent_channels", "scaling_factor", "hidden_size", "r",
    "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps", "lora_alpha",
    "max_position_embeddings", "num_train_timesteps", "beta_start", "beta_end", "steps_offset"}


def rejson(r, path):
    """Change one value in a JSON file, take one out, or nest it deeply."""
    tree = node = json.loads(path.read_text())
    if r.random() < 0.05:
        path.write_text('{"a":' * 99_999)
        return "deep", "refuse"
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = r.choice(keys)
        inner = isinstance(node[key], (dict, list)) and len(node[key])
        if not inner or r.random() < 0.3:
            break
        node = node[key]
    odd, must = r.choice(ODD), ""
    if r.random() < 0.1:
        del node[key]
        odd = "gone"
    elif r.random() < 0.1 and isinstance(node, dict):
        node["_unheard_of"], key = odd, "_unheard_of"
    else:
        node[key] = odd
        if key in NUMBERS and not isinstance(odd, (int, float, type(None))) or (
                key in NUMBERS and isinstance(odd, float) and not math.isfinite(odd)):
            must = "refuse"
    path.write_text(json.dumps(tree))
    return f"{key} = {str(odd)[:40]!r}", must


def relog(r, path):
    """Change lines of a log."""
    lines = path.read_bytes().splitlines(True) or [b""]
    odd = r.choice((b"", b"\n", b"{}\n", b"[]\n", b"null\n", b"\xff\x00\n", b'{"step": "x"}\n',
                    b'{"step": 1e999}\n', b'{"step": 10}\n', b'{"step": true, "seen": 3}\n',
                    b'{"step": 0, "loss": "x", "seen": [{"t": "x", "mse": []}]}\n', b"[" * 99_999,
                    b'{"step": NaN}\n', b'{"step": 1, "seen": [{"t": -5e200}], "loss": 1e400}\n',
                    b'{"step": 1, "seen": [{"t": true, "mse": 1}], "loss": {}}\n',
                    b'{"step": ' + b"9" * 5000 + b"}\n"))
    lines.insert(r.randrange(len(lines) + 1), odd)
    path.write_bytes(b"".join(lines))
    return repr(odd[:40]), ""


# ------------------------------------------------------------------------------------------------
# Flags and texts


PATTERNS = ("(.*)*x", "(a|a)*$", "(a+)+b", ".*" * 30, "(", "[", "((.*)+)+\\1", "(?P<x>.*)*y",
            "(?:.?)" * 40 + "$", "none", "all", "attn1:2", "attn1:x,:3", ".*:nan", "coupled")


def odd_value(r, place):
    """A value that somebody could type. Half of them are sensible, so that commands go further."""
    files = [str(place / name) for name in (
        "clips", "clips/hop.mp4", "weights", "adapters/vmc.safetensors", "prompts.txt", "set",
        "foreign/motiondirector.pt", "weights/unet/config.json", "votes/votes.json")]
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
    """All flags of a command."""
    seen = []
    parse = __import__("support.flags", fromlist=["Parser"]).Parser
    add = parse.add_argument

    def note(self, *names, **more):
        seen.extend(name for name in names if name.startswith("--"))
        return add(self, *names, **more)

    parse.add_argument = note
    try:
        command.parse([])
    except ValueError:
        pass
    finally:
        parse.add_argument = add
    return sorted({*seen, "--no-world", "--unheard-of"})


def odd_text(r):
    """A prompt of odd characters."""
    letters = ["a", "red", "star", " ", "\n", "\t", "\r\n", "!", "é", "ß", "中文", "😀", "\u202e",
               "\0", "\u2028", "<script>", "</script>", "&amp;", "\"", "'", "\\", "/", "..", "%s",
               "{}", "sks", "<look>", "X*", "\x1b[31m", "-", "--", "\ufeff", "\udcff", "ﬁ", "1",
               "E=mc2", "a=b", "steps=3 "]
    return "".join(r.choice(letters) for _ in range(r.choice((0, 1, 2, 5, 20, 60, 400))))


# ------------------------------------------------------------------------------------------------
# Inputs that must work: [(description, function from a case to a command and its flags)]


def clip_of(name, size=(32, 32), frames=16, **more):
    """A training clip as other programs write them."""
    def set_up(case):
        video = torch.rand(3, 4, 1, 1).repeat_interleave(frames // 4, 1).expand(-1, -1, *size)
        write(case.folder / name, video * torch.linspace(-1, 1, size[1]), **more)
        return "train", ["--video", f"./{name}"]
    return f"a clip: {name} {more}", set_up


def adapter_of(name):
    return f"an adapter: {name}", lambda case: (
        "generate", ["--adapter", case.place / name, "--prompt", "a star"])


def text_of(text):
    """A prompt, and the caption of a clip."""
    def prompt(case):
        return "generate", ["--prompt", text]

    def caption(case):
        clip = case.take("clips/hop.mp4", "text.mp4")
        clip.with_suffix(".txt").write_bytes(text.encode())
        return "train", ["--video", clip]

    return [(f"a prompt: {text!r}", prompt), (f"a caption: {text!r}", caption)]


def method_of(name, method):
    """A method with all its settings given, each with its default."""
    from support.recipe import write_value
    from train import TINY

    method = method.override(TINY.get(name, ""))

    def set_up(case):
        argv = ["--method", name, "--video", case.place / "clips/hop.mp4"]
        argv += ["--prior", case.place / "prior"] if "prior" in method.own else []
        return "train", argv + [f"{k}={write_value(v)}" for k, v in method.settings().items()
                                if k not in ("steps", "prior")]
    return f"all settings of {name}", set_up


def weights_as(what, change):
    def set_up(case):
        folder = case.take("weights")
        change(folder)
        return "generate", ["--weights", folder, "--prompt", "a star", "--size", "64x64"]
    return f"weights: {what}", set_up


def as_bin(folder):
    for path in list(folder.rglob("*.safetensors")):
        torch.save(load_file(path), path.with_name(
            "pytorch_model.bin" if path.name == "model.safetensors" else
            "diffusion_pytorch_model.bin"))
        path.unlink()


def recast(folder):
    for path in folder.rglob("*.safetensors"):
        save_file({n: t.float() for n, t in load_file(path).items()}, path)


def unheard_of(folder):
    for path in folder.rglob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_name": None, "new": [1]}))


def of_a_run(*argv):
    def set_up(case):
        case.take("run", "out")
        return "train", ["--video", case.place / "clips/hop.mp4", "--prompt", "a thing hopping",
                         "sampling_steps=2", *argv]
    return f"a run: {argv}", set_up


def scored(name):
    def set_up(case):
        path = case.take(name)
        if name == "set":
            case.take("run")  # which the set names
        return "eval", [path]
    return f"to score: {name}", set_up


def find_fine():
    """All inputs that must work."""
    from support.recipe import METHODS

    rows = [(f"a clip: {name}", lambda case, name=name: (
        "train", ["--video", case.place / "clips" / name])) for name in CLIPS]
    rows += [
        clip_of("odd.mkv", size=(47, 63), codec="ffv1", pix_fmt="bgr0"),
        clip_of("tall.mp4", size=(128, 34)), clip_of("c.webm", codec="libvpx-vp9"),
        clip_of("c.mov", codec="qtrle", pix_fmt="argb"),
        clip_of("c.avi", codec="mpeg4"),
        clip_of("deep.mp4", pix_fmt="yuv420p10le"),
        clip_of("wide.mp4", sample_aspect_ratio=Fraction(4, 3)),
        clip_of("grey.mkv", codec="ffv1", pix_fmt="gray"), clip_of("UPPER.MP4"),
        clip_of("a clip, é 中 'x'.mp4"), clip_of("-x.mp4"), clip_of("4.mp4", frames=8),
        clip_of("rate.mkv", frames=32, times=[*[i / 24 for i in range(16)],
                                              *[1 + i / 4 for i in range(16)]]),
    ]
    rows += [adapter_of(name) for name in (
        "adapters/vmc.safetensors", "adapters/motiondirector.safetensors",
        "adapters/newmove.safetensors", *[f"foreign/{name}" for name in FOREIGN])]
    rows += [weights_as("as they are", lambda folder: None), weights_as(".bin", as_bin),
             weights_as("fp32", recast), weights_as("names of other versions", unheard_of)]
    for text in ("中文 é 😀!", "-", "a\tb <script>alert(1)</script>", "../../x", "a " * 70,
                 "100% {a} \\n"):
        rows += text_of(text)
    rows += [method_of(name, method) for name, method in METHODS.items()]
    rows += [of_a_run("--steps", 3, "--resume"),
             scored("set"), scored("clips"), scored("run"),
             ("votes", lambda case: ("eval", ["--votes", case.place / "votes/votes.json"]))]
    return rows


FINE = find_fine()
