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
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if supported() else "fp32"


def load_base(args):
    """The base model that the flags name, in fp32 (see `on_gpu` for less). Raises BadInput."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:80]
        raise BadInput(f"--device {args.device} cannot be used ({reason}); "
                       "give cpu or cuda.") from None
    args.precision = args.precision or default_precision(args.device)
    return model.load(args.weights or TINY, args.device)


def on_gpu(args, unet, keep):
    """On a GPU in bf16, store frozen weights in it, which halves the memory; `keep` stays fp32."""
    if torch.device(args.device).type == "cuda" and args.precision == "bf16":
        lora.halve(unet, keep)


def require(args, least):
    """Raises BadInput when a flag's number lies under its least value, or is none at all."""
    for name, value in least.items():
        got = getattr(args, name)
        if got is not None and not value <= got < float("inf"):
            raise BadInput(f"--{name.replace('_', '-')} {got}: wanted {value} or more.")


def check_steps(schedule, steps, name="steps"):
    """Raises BadInput for a number of sampling steps that the schedule does not have, and warns of
    one whose whole-number spacing would begin far from pure noise."""
    T = schedule.num_train_timesteps
    if not 1 <= steps < T:
        raise BadInput(f"--{name} {steps}: wanted 1 to {T - 1}.")
    if (first := schedule.timesteps(steps)[0]) < 0.9 * T:
        data.say(f"warning: {steps} steps, {T // steps} timesteps apart, begin at t = {first} and "
                 f"not in pure noise; a number that divides {T} begins there")


@torch.no_grad()
def invert(parts, latents, steps, precision):
    """DDIM inversion of clean latents (B, C, F, h, w) (VMC Sec. 3.3), with an empty prompt and no
    guidance, as the published code has it."""
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
    """The flags. Raises BadInput for numbers that make no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # what to make
    add("--prompt", help="what to show")
    add("--prompts", type=Path, help="a text file, one prompt a line, instead of --prompt")
    add("--negative", default="", help="what not to show (default: nothing)")
    add("--seed", type=int, default=0, help="first seed (default: 0)")
    add("--seeds", type=int, default=1, help="videos a prompt, from --seed on (default: 1)")
    # the model
    add("--adapter", type=Path, help="a learned motion: the .safetensors that train.py wrote")
    add("--weights", type=Path, help="base model, a hub-layout folder (default: the tiny model)")
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
        help="p in the start √p·inverted + √(1-p)·noise (default: 1, as VMC)")
    # sampling
    add("--steps", type=int, help="sampling and inversion steps (default: the method's, else 50)")
    add("--guidance", type=float, help="classifier-free guidance (default: 9; tiny model: 4)")
    add("--sampler", choices=tuple(sampler.SAMPLERS), default="ddim", help="default: ddim")
    add("--batch", type=int, help="videos at a time (default: 1; tiny model: 4)")
    add("--out", type=Path, default=Path("out/generated"), help="folder (default: out/generated)")
    args = parser.parse_args(argv)
    require(args, {"frames": 1, "width": 8, "height": 8, "fps": 0.01, "seed": 0, "seeds": 1,
                   "steps": 1, "batch": 1, "guidance": 0})
    return args


def read_prompts(args):
    """The prompts, checked. Raises BadInput when there are none, or two sources of them."""
    data.check_prompt(args.negative)
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
    factor, tiny, meta = parts.vae.config.factor, args.weights is None, {}
    adapter = lora.read_adapter(args.adapter) if args.adapter else None
    if adapter:
        lora.apply_adapter(parts.unet, adapter)
        meta = adapter.meta
    on_gpu(args, parts.unet, adapter.tensors if adapter else {})
    own = parts.unet.config.sample_size
    F, h, w = adapter.latents.shape[1:] if adapter else (16, own, own)
    inverted = "inverted" if adapter or args.init_video else "noise"
    defaults = {"frames": F, "height": h * factor, "width": w * factor, "init": inverted,
                "fps": float(meta.get("fps", 8)), "steps": int(meta.get("sampling_steps", 50)),
                "guidance": 4.0 if tiny else 9.0, "batch": 4 if tiny else 1}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_steps(parts.schedule, args.steps)
    if args.height % factor or args.width % factor:
        raise BadInput(f"{args.width}×{args.height} pixels: wanted multiples of {factor}.")
    if not 0 <= args.noise_prior <= 1:
        raise BadInput(f"--noise-prior {args.noise_prior}: wanted 0 (noise) to 1 (inverted).")
    if args.init == "inverted" and not (adapter or args.init_video):
        raise BadInput("--init inverted has no clip to invert; give --adapter or --init-video.")
    if args.init == "inverted" and args.noise_prior == 1 and args.seeds > 1:
        data.say("note: from the inverted clip alone every seed gives the same video; "
                 "--noise-prior 0.5 mixes noise in")
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
        factor = parts.vae.config.factor
        own = latents.shape[2], latents.shape[3] * factor, latents.shape[4] * factor
        wanted = args.frames, args.height, args.width
        if own != wanted:
            raise BadInput(
                f"the adapter's clip has {own[0]} frames of {own[2]}×{own[1]}, wanted are "
                f"{wanted[0]} of {wanted[2]}×{wanted[1]}; leave --frames, --width and --height "
                "out, or give --init-video or --init noise.")
    args.frames = latents.shape[2]
    return invert(parts, latents, args.steps, args.precision)


def main(argv=None):
    """Prompts to videos, a contact sheet and the settings, in --out."""
    args = parse(argv)
    prompts = read_prompts(args)
    model.keep_memory()
    parts = load_base(args)
    adapter = check(args, parts)
    inverted = starting_latents(args, parts, adapter)
    factor, channels = parts.vae.config.factor, parts.unet.config.in_channels
    shape = (channels, args.frames, args.height // factor, args.width // factor)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    print("settings:", json.dumps(settings, ensure_ascii=False))
    with data.publish(args.out / "settings.json") as path:
        path.write_text(json.dumps(settings | {"all_prompts": prompts}, indent=1))

    jobs = [(p, s) for p in prompts for s in range(args.seed, args.seed + args.seeds)]
    made = []
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
            made.append(data.every_nth(video))
            print(f"{args.out / name}: {prompt}")
    data.contact_sheet(args.out / "sheet.png", made)
    print(f"contact sheet: {args.out / 'sheet.png'}")


def run(command):
    """Run a script's main; a person's mistake becomes one line and exit code 2."""
    try:
        return command()
    except BadInput as error:
        line = str(error)
    except torch.OutOfMemoryError:
        line = ("out of memory at the size printed above. Try, in this order: --checkpointing "
                "(when training), smaller --width and --height, fewer --frames, --batch 1.")
    except OSError as error:  # a disk that is full, a folder that is a file, no permission
        line = (f"{error.filename or 'a file'}: {error.strerror or error}; "
                "give another --out, or free some space.")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    run(main)
