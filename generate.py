"""Make videos, with a learned motion or without.

    python generate.py --adapter out/eight-vmc/vmc.safetensors --prompts assets/prompts.txt
    python generate.py --adapter motion.safetensors look.safetensors --scale 1 0.7 --prompt "…"
    python generate.py --adapter A.safetensors --prompts prompts.txt --seeds 4
    python generate.py --prompt "a red ring moving left on a grey background"

Writes an mp4 a video, one contact sheet and the settings to --out.

Axes: N videos, B of them at a time, C channels, F frames, h w latent, H W picture.
"""
import argparse
import contextlib
import json
import os
import sys
from datetime import timedelta
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


def find_device(device=None):
    """The device that a flag names, or the default; under torchrun each process has its own GPU.
    Raises BadInput when it cannot be used."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:80]
        raise BadInput(f"--device {device} cannot be used ({reason}); give cpu or cuda.") from None
    return device


def load_base(args):
    """The base model that the flags name, in fp32. Raises BadInput."""
    args.device = find_device(args.device)
    args.precision = args.precision or default_precision(args.device)
    return model.load(args.weights or TINY, args.device)


def place(args):
    """This process's number and their count: torchrun's, which meet here, else 0 and 1."""
    number, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if count > 1 and not torch.distributed.is_initialized():
        kind = torch.device(args.device).type
        if kind == "cuda":
            torch.cuda.set_device(args.device)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
                                             timeout=timedelta(days=1))  # samples take long
    return number, count


def store_frozen(args, unet, keep):
    """In bf16, store frozen weights in it too: half the memory, and none are converted again at
    every step. Those named in `keep` stay in fp32."""
    if args.precision == "bf16":
        lora.halve(unet, keep)


def require(args, least):
    """Raises BadInput when a flag's number lies under its least value (or, where two are given,
    outside them), or is none at all."""
    for name, value in least.items():
        low, high = value if isinstance(value, tuple) else (value, None)
        got = getattr(args, name)
        if got is not None and not (low <= got < float("inf") and (high is None or got <= high)):
            wanted = f"{low} or more" if high is None else f"{low} to {high}"
            raise BadInput(f"--{name.replace('_', '-')} {got}: wanted {wanted}.")


def check_size(parts, width, height, what=""):
    """Raises BadInput for pixels that are no whole number of latents."""
    factor = parts.vae.config.factor
    if width % factor or height % factor:
        raise BadInput(f"{what}{width}×{height} pixels: wanted multiples of {factor}.")


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
def invert(parts, latents, steps, precision, on_step=None):
    """DDIM inversion of clean latents (B, C, F, h, w) (VMC Sec. 3.3), with an empty prompt and no
    guidance, as the published code has it."""
    device = next(parts.unet.parameters()).device
    empty = parts.text([""]).expand(len(latents), -1, -1)
    with autocast(device, precision):
        predict = sampler.guide(parts.unet, empty)
        return sampler.ddim_inversion(parts.schedule, predict, latents.to(device), steps,
                                      on_step)


@torch.no_grad()
def sample(parts, prompts, start, seeds, steps=50, guidance=9.0, method="ddim", negative="",
           precision="fp32", on_step=None, **more):
    """Prompts and starting latents (B, C, F, h, w) -> videos (B, 3, F, H, W) in [-1, 1].
    `more` goes to the sampler."""
    device = next(parts.unet.parameters()).device
    text, empty = parts.text(prompts), parts.text([negative]).expand(len(prompts), -1, -1)
    extra = more | ({"seeds": seeds} if method == "ddpm" else {})
    with autocast(device, precision):
        predict = sampler.guide(parts.unet, text, empty, guidance)
        latents = sampler.SAMPLERS[method](
            parts.schedule, predict, start.to(device), steps, on_step=on_step, **extra)
    if not torch.isfinite(latents).all():
        raise BadInput(f"sampling with guidance {guidance:g} gave NaN; lower --guidance, or use "
                       "--precision fp32.")
    return parts.vae.decode_video(latents.float()).cpu()


# ------------------------------------------------------------------------------------------------
# Diffusion Motion Transfer (Yatim et al. 2023): no training; while sampling, the latents are pulled
# until features of the video change over time as those of a reference do.

DMT_SHARE, DMT_STEPS, DMT_RATE = 0.4, 10, (0.007, 0.004)  # of the steps; Adam's, and its rates


def frame_features(unet, x, t, text):
    """Spatially averaged features (B, F, C) of the second upward block."""
    block, seen = unet.up_blocks[1], []
    last = block.upsamplers[0] if hasattr(block, "upsamplers") else block.temp_attentions[-1]
    hook = last.register_forward_hook(lambda module, inputs, out: seen.append(out))
    try:
        unet(x, t, text)
    finally:
        hook.remove()
    return seen[0].float().mean((2, 3)).unflatten(0, (len(x), -1))


def pairwise_differences_loss(got, want):
    """1 − cosine of the differences between each frame and every anchor frame, on (B, F, C)
    features: what all frames share cancels."""
    difference = lambda f: f[:, :, None] - f[:, None]  # (B, F, F, C)
    other = ~torch.eye(got.shape[1], dtype=torch.bool, device=got.device)
    cosine = torch.nn.functional.cosine_similarity(difference(got), difference(want), dim=-1)
    return (1 - cosine[:, other]).mean()


def low_frequencies(x, factor=4):
    """(B, C, F, h, w) without spatial detail finer than `factor` latents."""
    h, w = x.shape[-2:]
    resize = lambda x, size: torch.nn.functional.interpolate(
        x, size, mode="bilinear", antialias=True)
    small = resize(x.flatten(0, 2)[None], (max(1, h // factor), max(1, w // factor)))
    return resize(small, (h, w)).view(x.shape)


def motion_transfer(parts, latents, prompts, start, seeds, args):
    """Videos (B, 3, F, H, W) of the prompts that move as the clean latents (1, C, F, h, w) do."""
    S, unet, device = parts.schedule, parts.unet, start.device
    path, empty = {}, parts.text([""])
    inverted = invert(parts, latents, args.steps, args.precision,
                      on_step=lambda t, x: path.update({t: x}))
    start = start + low_frequencies(inverted) - low_frequencies(start)
    text = parts.text(prompts)
    pulled = S.timesteps(args.steps)[: max(1, int(args.steps * DMT_SHARE))]

    def edit(x, t):
        if t not in pulled:
            return x
        with autocast(device, args.precision):
            with torch.no_grad():
                want = frame_features(unet, path[t], t, empty)
            done = pulled.index(t) / max(1, len(pulled) - 1)
            rate = DMT_RATE[0] + (DMT_RATE[1] - DMT_RATE[0]) * done
            with torch.enable_grad():
                free = x.detach().clone().requires_grad_()
                adam = torch.optim.Adam([free], lr=rate)
                for _ in range(DMT_STEPS):
                    loss = pairwise_differences_loss(frame_features(unet, free, t, text), want)
                    free.grad, = torch.autograd.grad(loss, free)
                    adam.step()
        return free.detach()

    return sample(parts, prompts, start, seeds, args.steps, args.guidance,
                  negative=args.negative, precision=args.precision, edit=edit)


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
    add("--adapter", type=Path, nargs="+", default=[], help="what was learned: files that train.py "
        "wrote, or other programs' LoRAs; of several, the first gives the clip")
    add("--scale", type=float, nargs="+", help="strength of each adapter; 0 is the base model "
        "(default: 1)")
    add("--style", default="", help="words to end every prompt with: 'in watercolour'")
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
        help="start from the inverted clip, or from noise (default: as the adapter's method)")
    add("--init-video", type=Path, help="invert this clip instead of the adapter's")
    add("--dmt", type=Path, help="Diffusion Motion Transfer: move as this clip does, by guidance, "
        "without training (its paper's guidance: 10, steps: 50)")
    add("--noise-prior", type=float, help="p in the start √p·inverted + √(1-p)·noise (default: the "
        "adapter's method's: VMC 1, MotionDirector 0.5, NewMove 0)")
    # sampling
    add("--steps", type=int, help="sampling and inversion steps (default: the method's, else 50)")
    add("--guidance", type=float, help="classifier-free guidance (default: the "
        "method's, else 9; tiny model: 4)")
    add("--sampler", choices=tuple(sampler.SAMPLERS), default="ddim", help="default: ddim")
    add("--batch", type=int, help="videos at a time (default: 1; tiny model: 4)")
    # a second model over the first one's videos, as ZeroScope XL
    add("--refine", type=Path, help="its hub-layout folder; its size is --refine-width and -height")
    add("--strength", type=float, help="how much it may change, 0 to 1 (default: 0.6)")
    add("--refine-steps", type=int, help="its sampling steps (default: 50)")
    add("--refine-guidance", type=float, help="its guidance (default: 15; tiny model: 4)")
    add("--refine-width", type=int, help="pixels (default: as made)")
    add("--refine-height", type=int, help="pixels (default: as made)")
    add("--out", type=Path, default=Path("out/generated"), help="folder (default: out/generated)")
    args = parser.parse_args(argv)
    require(args, {"frames": 1, "width": 8, "height": 8, "fps": 0.01, "seed": 0, "seeds": 1,
                   "steps": 1, "batch": 1, "guidance": 0, "strength": (0, 1),
                   "refine_width": 8, "refine_height": 8, "refine_steps": 1, "refine_guidance": 0})
    if not args.refine:
        for name in ("strength", "refine_width", "refine_height", "refine_steps",
                     "refine_guidance"):
            if getattr(args, name) is not None:
                raise BadInput(f"--{name.replace('_', '-')} needs --refine.")
    args.strength = 0.6 if args.strength is None else args.strength
    args.refine_steps = args.refine_steps or 50
    return args


def read_prompts(args):
    """The prompts, checked. Raises BadInput when there are none, or two sources of them."""
    data.check_prompt(args.negative)
    styled = lambda prompt: data.check_prompt(f"{prompt} {args.style}".strip())
    if (args.prompt is None) == (args.prompts is None):
        raise BadInput("give --prompt \"…\" or --prompts FILE, and not both.")
    if args.prompt is not None:
        return [styled(args.prompt)]
    if not args.prompts.is_file():
        raise BadInput(f"{args.prompts} does not exist; give a text file with one prompt a line.")
    lines = args.prompts.read_text(errors="replace").splitlines()
    prompts = [styled(line.strip()) for line in lines if line.strip()]
    if not prompts:
        raise BadInput(f"{args.prompts} holds no prompts; write one a line.")
    return prompts


def check(args, parts):
    """Read the adapters, and fill in what the flags leave open from the first of them that has a
    clip, and from the model; raise BadInput early. Returns adapters, scales, and that first one."""
    factor, tiny = parts.vae.config.factor, args.weights is None
    adapters = [lora.read_adapter(path, parts.unet) for path in args.adapter]
    scales = args.scale or [1.0]
    if len(scales) not in (1, len(adapters)) or args.scale and not adapters:
        raise BadInput(f"--scale: {len(scales)} numbers for {len(adapters)} --adapter; give one "
                       "for each.")
    scales = scales * len(adapters) if len(scales) == 1 else scales
    clip = next((a for a in adapters if a.latents is not None), None)
    meta = (clip or adapters[0]).meta if adapters else {}
    own = parts.unet.config.sample_size
    F, h, w = clip.latents.shape[1:] if clip else (16, own, own)
    source = clip or args.init_video
    if args.init == "noise" and (args.noise_prior or args.init_video):
        raise BadInput("--init noise uses no clip; leave --noise-prior and --init-video out.")
    prior = float(meta.get("noise_prior", 0)) if clip else 0.0
    if args.init_video or args.init == "inverted":
        prior = prior or 1.0
    prior = prior if args.noise_prior is None else args.noise_prior
    if args.init is None:
        args.init = "inverted" if prior and source else "noise"
    defaults = {"frames": F, "height": h * factor, "width": w * factor, "noise_prior": prior,
                "fps": float(meta.get("fps", 8)), "steps": int(meta.get("sampling_steps", 50)),
                "guidance": 4.0 if tiny else float(meta.get("guidance", 9)),
                "batch": 4 if tiny else 1}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_steps(parts.schedule, args.steps)
    check_size(parts, args.width, args.height)
    if not 0 <= args.noise_prior <= 1:
        raise BadInput(f"--noise-prior {args.noise_prior}: wanted 0 (noise) to 1 (inverted).")
    if (args.init == "inverted" or args.noise_prior) and not source:
        what = "--init inverted" if args.init == "inverted" else "--noise-prior"
        raise BadInput(f"{what} has no clip to invert; give --adapter or --init-video.")
    if args.init == "inverted" and args.noise_prior == 1 and args.seeds > 1:
        data.say("note: from the inverted clip alone every seed gives the same video; "
                 "--noise-prior 0.5 mixes noise in")
    if args.dmt and (args.init == "inverted" or args.sampler != "ddim"):
        raise BadInput("--dmt makes its own start from its clip and samples by DDIM; leave "
                       "--sampler out, and give --init noise.")
    if args.init == "inverted" and args.sampler == "dpm":
        raise BadInput("--init inverted retraces DDIM's own timesteps; use --sampler ddim.")
    return adapters, scales, clip


def read_latents(args, parts, path):
    """A clip's latents (1, C, F, h, w), at the size of what is made; --frames becomes its own."""
    video = data.read_video(path, args.frames, (args.height, args.width), args.fps)
    args.frames = video.shape[1]
    return parts.vae.encode_video(video[None].to(args.device))


@torch.no_grad()
def starting_latents(args, parts, adapter):
    """The inverted clip (1, C, F, h, w), or None for noise."""
    if args.init == "noise":
        return None
    if args.init_video:
        latents = read_latents(args, parts, args.init_video)
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


def load_refiner(args, first):
    """The second model, for `refine`. Raises BadInput when its size makes no sense."""
    parts = model.load(args.refine, args.device)
    store_frozen(args, parts.unet, {})
    if parts.text.config.hidden_size == first.text.config.hidden_size:
        parts.text.learned = first.text.learned
    args.refine_width = args.refine_width or args.width
    args.refine_height = args.refine_height or args.height
    if args.refine_guidance is None:
        args.refine_guidance = 4.0 if args.refine.resolve() == TINY.resolve() else 15.0
    check_steps(parts.schedule, args.refine_steps, "refine-steps")
    check_size(parts, args.refine_width, args.refine_height, "--refine-width, --refine-height: ")
    return parts


@torch.no_grad()
def refine(parts, videos, prompts, seeds, args):
    """Video to video (SDEdit, Meng et al. 2021, as ZeroScope XL is used): resize, encode (a sample
    of the posterior, as the public pipeline takes), noise to `strength` of the way, and denoise
    with the same prompts. (B, 3, F, H, W) -> (B, 3, F, H', W')."""
    B, _, frames, _, _ = videos.shape
    size = args.refine_height, args.refine_width
    flat = model.fold_frames(videos)
    flat = torch.nn.functional.interpolate(flat, size, mode="bicubic", antialias=True).clamp(-1, 1)
    latents = []
    for part in flat.split(max(1, model.PIXELS_AT_ONCE // (size[0] * size[1]))):
        mean, std = parts.vae.encode(part.to(args.device))
        latents.append(torch.cat([mean, std], 1))
    mean, std = torch.cat(latents).chunk(2, 1)
    draw = lambda key: sampler.noise_like_shape(
        (mean.shape[1], frames, *mean.shape[2:]), [sampler.generator(s, key) for s in seeds])
    x0 = model.unfold_frames(mean, frames) + model.unfold_frames(std, frames) * draw(2).to(mean)
    x0 = x0 * parts.vae.config.scaling_factor
    steps = args.refine_steps
    skip = steps - min(int(steps * args.strength), steps)
    if skip == steps:
        return parts.vae.decode_video(x0).cpu()
    t = torch.tensor([parts.schedule.timesteps(steps)[skip]] * B)
    start = parts.schedule.add_noise(x0, draw(3).to(x0), t)
    return sample(parts, prompts, start, seeds, steps, args.refine_guidance,
                  negative=args.negative, precision=args.precision, skip=skip)


def main(argv=None):
    """Prompts to videos, a contact sheet and the settings, in --out."""
    args = parse(argv)
    prompts = read_prompts(args)
    model.keep_memory()
    parts = load_base(args)
    adapters, scales, clip = check(args, parts)
    inverted = None
    if clip and clip.meta.get("inverts") == "base":  # before the motion is in the weights
        inverted = starting_latents(args, parts, clip)
    lora.apply_adapters(parts, adapters, scales)
    store_frozen(args, parts.unet, {n for a in adapters for n in a.tensors})
    if inverted is None:
        inverted = starting_latents(args, parts, clip)
    with torch.no_grad():
        reference = read_latents(args, parts, args.dmt) if args.dmt else None
    factor, channels = parts.vae.config.factor, parts.unet.config.in_channels
    shape = (channels, args.frames, args.height // factor, args.width // factor)
    second = load_refiner(args, parts) if args.refine else None
    settings = plain(args)
    jobs = [(i, p, s) for i, p in enumerate(prompts)
            for s in range(args.seed, args.seed + args.seeds)]
    print("settings:", json.dumps(settings, ensure_ascii=False))
    with data.publish(args.out / "settings.json") as path:
        more = {"videos": [(file_name(*job), job[1], job[2]) for job in jobs]}
        if adapters and "step" in adapters[0].meta:
            more["steps_trained"] = int(adapters[0].meta["step"])
        path.write_text(json.dumps(settings | more, indent=1))

    process, processes = place(args)
    made = {}
    for i in range(process * args.batch, len(jobs), processes * args.batch):
        part = jobs[i : i + args.batch]
        texts, seeds = [p for _, p, _ in part], [s for _, _, s in part]
        start = sampler.noise_like_shape(shape, seeds).to(args.device)
        if inverted is not None:
            start = sampler.blend_noise(inverted, start, args.noise_prior)
        if reference is not None:
            videos = motion_transfer(parts, reference, texts, start, seeds, args)
        else:
            videos = sample(parts, texts, start, seeds, args.steps, args.guidance,
                            args.sampler, args.negative, args.precision)
        if second:
            videos = refine(second, videos, texts, seeds, args)
        for number, (job, video) in enumerate(zip(part, videos), i):
            data.write_video(args.out / file_name(*job), video, args.fps)
            made[number] = data.every_nth(video)
            print(f"{args.out / file_name(*job)}: {job[1]}")
    if made := gather(made, processes, process):
        data.contact_sheet(args.out / "sheet.png", [made[n] for n in sorted(made)])
        print(f"contact sheet: {args.out / 'sheet.png'}")


def plain(args):
    """The flags as JSON can hold them."""
    one = lambda v: str(v) if isinstance(v, Path) else v
    return {k: [one(i) for i in v] if isinstance(v, list) else one(v)
            for k, v in vars(args).items()}


def agreed(value):
    """The first process's value, in all of them."""
    if torch.distributed.is_initialized():
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]
    return value


def file_name(number, prompt, seed):
    """A video's name in its folder."""
    return f"{number:03d}-{data.slug(prompt)}-seed{seed}.mp4"


def gather(mine, processes, process):
    """The dicts of all processes as one, in the first process; {} in the others."""
    if processes == 1:
        return mine
    parts = [None] * processes
    torch.distributed.all_gather_object(parts, mine)
    return {k: v for part in parts for k, v in part.items()} if process == 0 else {}


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
