"""Make videos, with a learned motion or without.

    python generate.py --adapter out/hopping-vmc/vmc.safetensors --prompt "a pink star hopping"
    python generate.py --adapter A.safetensors --prompts prompts.txt --seeds 4
    python generate.py --prompt "a red ring moving left on a grey background"

Writes an mp4 a video, one contact sheet and the settings to --out.

Axes: N videos, B of them at a time, C channels, F frames, h w latent, H W picture.
"""
import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch

import data
import lora
import model
import sampler
from model import BadInput

TINY = Path(__file__).resolve().parent / "tiny" / "weights"


# ------------------------------------------------------------------------------------------------
# What train.py shares: where and how precisely to compute, and sampling itself


def autocast(device, precision):
    """The context in which the networks run: bf16 products, or plain fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def default_precision(device):
    """bf16 wherever the hardware multiplies it faster than fp32, else fp32."""
    if torch.device(device).type == "cuda":
        return "bf16"
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return "bf16" if supported() else "fp32"


def load_base(args):
    """The base model that the flags name; frozen weights in bf16 on a GPU, fp32 on a CPU."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = args.precision or default_precision(args.device)
    half = args.device.startswith("cuda") and args.precision == "bf16"
    parts = model.load(args.weights or TINY, args.device, torch.bfloat16 if half else torch.float32)
    parts.vae.float()  # the VAE is small, and its groups overflow easily in half precision
    return parts


@torch.no_grad()
def invert(parts, latents, steps, precision):
    """DDIM inversion of clean latents (B, C, F, h, w), empty prompt, no guidance (VMC Sec. 3.3)."""
    device = next(parts.unet.parameters()).device
    empty = parts.text([""]).expand(len(latents), -1, -1)
    with autocast(device, precision):
        predict = sampler.guide(parts.unet, empty)
        return sampler.ddim_inversion(parts.schedule, predict, latents.to(device), steps)


@torch.no_grad()
def sample(parts, prompts, start, seeds, steps=50, guidance=9.0, method="ddim", negative="",
           precision="fp32", on_step=None):
    """Prompts and starting latents (B, C, F, h, w) -> videos (B, 3, F, H, W) in [-1, 1]."""
    device = next(parts.unet.parameters()).device
    text, empty = parts.text(prompts), parts.text([negative]).expand(len(prompts), -1, -1)
    extra = {"seeds": seeds} if method == "ddpm" else {}
    with autocast(device, precision):
        predict = sampler.guide(parts.unet, text, empty, guidance)
        latents = sampler.SAMPLERS[method](
            parts.schedule, predict, start.to(device), steps, on_step=on_step, **extra)
    if not torch.isfinite(latents).all():
        raise BadInput(f"sampling with guidance {guidance:g} gave NaN; lower --guidance, or use "
                       "--precision fp32.")
    return parts.vae.decode_video(latents.float()).cpu()


# ------------------------------------------------------------------------------------------------
# The command


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = lambda *names, **kw: parser.add_argument(*names, **kw)
    # what to make
    add("--prompt", help="what to show")
    add("--prompts", type=Path, help="a text file, one prompt a line, instead of --prompt")
    add("--negative", default="", help="what not to show (default: nothing)")
    add("--seed", type=int, default=0, help="first seed (default: 0)")
    add("--seeds", type=int, default=1, help="videos a prompt, from --seed on (default: 1)")
    # the model
    add("--adapter", type=Path, help="a learned motion: the .safetensors that train.py wrote")
    add("--weights", type=Path, help="base model, a folder in the hub's layout (default: the tiny model)")
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 where the hardware has it")
    # the shape; from the adapter's clip, where there is one
    add("--frames", type=int, help="frames (default: the clip's, else 16)")
    add("--width", type=int, help="pixels (default: the clip's, else the model's)")
    add("--height", type=int, help="pixels (default: the clip's, else the model's)")
    add("--fps", type=float, help="frames a second (default: the clip's, else 8)")
    # the start
    add("--init", choices=("inverted", "noise"),
        help="start from the inverted clip, or from noise (default: inverted with an adapter)")
    add("--init-video", type=Path, help="invert this clip instead of the adapter's")
    add("--noise-prior", type=float, default=1.0,
        help="share p of the inverted start in √p·inverted + √(1-p)·noise (default: 1, as VMC)")
    # sampling
    add("--steps", type=int, default=50, help="sampling steps, and inversion steps (default: 50)")
    add("--guidance", type=float, help="classifier-free guidance (default: 9; tiny model: 4)")
    add("--sampler", choices=tuple(sampler.SAMPLERS), default="ddim", help="default: ddim")
    add("--batch", type=int, default=4, help="videos made at a time (default: 4)")
    add("--out", type=Path, default=Path("out/generated"), help="folder (default: out/generated)")
    return parser.parse_args(argv)


def read_prompts(args):
    """The prompts, checked. Raises BadInput when there are none, or two sources of them."""
    if (args.prompt is None) == (args.prompts is None):
        raise BadInput("give --prompt \"…\" or --prompts FILE, and not both.")
    if args.prompt is not None:
        return [data.check_prompt(args.prompt)]
    if not args.prompts.is_file():
        raise BadInput(f"{args.prompts} does not exist; give a text file with one prompt a line.")
    lines = args.prompts.read_text(errors="replace").splitlines()
    prompts = [data.check_prompt(line.strip()) for line in lines if line.strip()]
    if not prompts:
        raise BadInput(f"{args.prompts} holds no prompts; write one a line.")
    return prompts


def check(args, parts):
    """Fill in what the flags leave open from the adapter and the model; raise BadInput early."""
    factor = parts.vae.config.factor
    adapter = lora.read_adapter(args.adapter) if args.adapter else None
    if adapter:
        lora.apply_adapter(parts.unet, adapter)
    own = parts.unet.config.sample_size
    C, F, h, w = adapter.latents.shape if adapter else (None, 16, own, own)
    args.frames, args.fps = args.frames or F, args.fps or float(adapter.meta["fps"] if adapter else 8)
    args.height, args.width = args.height or h * factor, args.width or w * factor
    args.guidance = (4.0 if args.weights is None else 9.0) if args.guidance is None else args.guidance
    args.init = args.init or ("inverted" if adapter or args.init_video else "noise")
    for name in ("frames", "width", "height", "steps", "seeds", "batch"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: wanted 1 or more.")
    if args.height % factor or args.width % factor:
        raise BadInput(f"{args.width}×{args.height} pixels: wanted multiples of {factor}.")
    if not 0 <= args.noise_prior <= 1:
        raise BadInput(f"--noise-prior {args.noise_prior}: wanted 0 (noise alone) to 1 (inverted alone).")
    if args.init == "inverted" and not (adapter or args.init_video):
        raise BadInput("--init inverted has no clip to invert; give --adapter or --init-video.")
    if args.init == "inverted" and args.sampler == "dpm":
        raise BadInput("--init inverted retraces DDIM's own timesteps; use --sampler ddim.")
    return adapter


def starting_latents(args, parts, adapter):
    """The inverted clip (1, C, F, h, w), or None for noise."""
    if args.init == "noise":
        return None
    if args.init_video:
        video = data.read_video(args.init_video, args.frames, (args.height, args.width), args.fps)
        latents = parts.vae.encode_video(video[None].to(args.device))
    else:
        latents = adapter.latents[None].to(args.device).float()
    args.frames = latents.shape[2]
    wanted = (args.height // parts.vae.config.factor, args.width // parts.vae.config.factor)
    if latents.shape[-2:] != wanted:
        raise BadInput(f"the adapter's clip is {latents.shape[-1]}×{latents.shape[-2]} latents, "
                       f"{args.width}×{args.height} pixels ask for {wanted[1]}×{wanted[0]}; "
                       "leave --width and --height out, or give --init-video or --init noise.")
    return invert(parts, latents, args.steps, args.precision)


def main(argv=None):
    args = parse(argv)
    prompts = read_prompts(args)
    model.keep_memory()
    parts = load_base(args)
    adapter = check(args, parts)
    inverted = starting_latents(args, parts, adapter)
    factor = parts.vae.config.factor
    shape = (parts.unet.config.in_channels, args.frames, args.height // factor, args.width // factor)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    print("settings:", json.dumps(settings, ensure_ascii=False))

    jobs = [(p, s) for p in prompts for s in range(args.seed, args.seed + args.seeds)]
    made, files = [], []
    for i in range(0, len(jobs), args.batch):
        part, seeds = jobs[i : i + args.batch], [s for _, s in jobs[i : i + args.batch]]
        start = sampler.noise_like_shape(shape, seeds).to(args.device)
        if inverted is not None:
            start = sampler.blend_noise(inverted, start, args.noise_prior)
        videos = sample(parts, [p for p, _ in part], start, seeds, args.steps, args.guidance,
                        args.sampler, args.negative, args.precision)
        for (prompt, seed), video in zip(part, videos):
            name = f"{prompts.index(prompt):03d}-{data.slug(prompt)}-seed{seed}.mp4"
            data.write_video(args.out / name, video, args.fps)
            made.append(video)
            files.append(name)
            print(f"{args.out / name}: {prompt}")
    data.contact_sheet(args.out / "sheet.png", made)
    with data.publish(args.out / "settings.json") as path:
        path.write_text(json.dumps(settings | {"videos": files, "all_prompts": prompts}, indent=1))
    print(f"contact sheet: {args.out / 'sheet.png'}")


def run(command):
    """Run a script's main; a person's mistake becomes one line and exit code 2."""
    try:
        return command()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main)
