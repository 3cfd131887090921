"""Make videos, with a learned motion or without.

    python generate.py --prompt "a red ring moving left on a grey background"
    python generate.py --adapter out/eight-vmc/vmc.safetensors --prompts assets/prompts.txt
    python generate.py --adapter motion.safetensors look.safetensors --scale 1 0.7 --prompt "…"
    python generate.py --dmt clip.mp4 --prompt "a red star"        # a motion without training
    python generate.py --adapter motion.safetensors --save merged  # keep the model it makes

Writes an mp4 a video, one contact sheet and the settings to --out. What the flags leave open is
taken from the adapter's file, and what that leaves open from the model.

Axes: B videos, C channels, F frames, h w latent, H W picture.
"""
import itertools
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import sampler
from model import TINY, is_tiny, load
from support import adapter_file, dmt, export, machine, media, videos
from support.files import (
    BadInput,
    check_there,
    check_weights,
    own_folder,
    read_size,
    slug,
    write_json,
)
from support.flags import Parser, real, some_text, whole
from support.videos import Sampling


def main(argv=None):
    """Prompts to videos, a contact sheet and the settings, in --out."""
    args = parse(argv)
    prompts = check(args)
    machine.keep_memory()
    args.device = machine.find_device(args.device)
    args.precision = args.precision or machine.default_precision(args.device)
    with own_folder(args.out, Path("out/generated")) as out:
        model = load(args.weights, args.device, args.precision)
        adapters = [adapter_file.read_adapter(path, model) for path in args.adapter]
        s, clip = settle(args, prompts, model, adapters)
        second = load_refiner(args, model) if args.refine else None
        jobs = list(itertools.product(prompts, range(args.seed, args.seed + args.seeds)))
        names = [f"{i // args.seeds:03d}-{slug(p)}-seed{n}.mp4" for i, (p, n) in enumerate(jobs)]
        settings = vars(args) | asdict(s) | {"steps": s.sampling_steps, "videos": [
            (name, *job) for name, job in zip(names, jobs)]}
        print("settings:", json.dumps(settings, ensure_ascii=False, default=str), flush=True)
        rows = []
        for name, (job, video) in zip(names, make(args, s, model, adapters, jobs, clip)):
            if second:  # one by one: its pictures are large
                video = refine(args, second, video, *job)
            media.write_video(out / name, video, args.fps)
            rows.append(media.every_nth(video))
            print(f"{out / name}: {job[0]}", flush=True)
        if args.save:  # merged by now
            (export.save_pth if args.save.suffix == ".pth" else export.save_hub)(
                model, args.save, args.weights or TINY)
            print(f"merged model: {args.save}")
        if rows:
            write_json(out / "settings.json", settings)
            media.contact_sheet(out / "sheet.png", rows)
            print(f"contact sheet: {out / 'sheet.png'}")


def make(args, s, model, adapters, jobs, clip):
    """Yields (job, video (3, F, H, W)) of every job, (prompt, seed)."""
    if args.dmt:
        model.unet.checkpointing = args.checkpointing == "on"
        adapter_file.apply_adapters(model, adapters, args.scale)
        path, levels = {}, dmt.inversion_levels(s, model)
        sampler.invert(model, clip, s.inversion_steps or s.sampling_steps, args.caption, lambda t, x:
                       path.update({t: x} if t in levels else {}), "inverting")
        for job in jobs:
            yield job, dmt.transfer_motion(s, model, clip, path, *job, args.caption, args.negative)
        return
    factor, (H, W) = model.vae.config.factor, args.size
    shape = model.unet.config.in_channels, args.frames, H // factor, W // factor
    yield from videos.make(model, adapters, args.scale, jobs, s, shape, clip, args.negative,
                           args.batch)


# ------------------------------------------------------------------------------------------------
# Flags, and what can be judged by them alone


def parse(argv=None):
    """The flags; those not given are None where something else decides."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    # what to make
    add("--prompt", type=some_text, help="what to show")
    add("--prompts", type=Path, help="a text file, one prompt a line, instead of --prompt")
    add("--negative", type=str, help="what not to show (default: nothing; with --dmt its code's "
        "words, but for the tiny model)")
    add("--seed", type=whole(0, 2**63), default=0, help="first seed (default: 0)")
    add("--seeds", type=whole(1, 10**6), default=1, help="videos a prompt, from --seed on "
        "(default: 1)")
    # the model
    add("--adapter", type=Path, nargs="+", default=[], help="what was learned: files that train.py "
        "wrote, or other programs' LoRAs; of several, the first gives the clip")
    add("--scale", type=real(-100, 100), nargs="+", default=[1.0], help="strength of each adapter; "
        "0 is the base model (default: 1)")
    add("--weights", type=Path, help="base model, a hub-layout folder (default: the tiny model)")
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 where the hardware has it")
    # the shape
    add("--frames", type=whole(1, 1024), help="frames (default: the clip's, else 16; "
        "with --dmt 24)")
    add("--size", type=read_size, help="pixels, WIDTHxHEIGHT (default: the clip's, else the "
        "model's; with --dmt 576x320)")
    add("--fps", type=real(0.01, 1000), help="frames a second (default: the clip's, else 8)")
    # sampling
    add("--noise-prior", type=real(0, 1), help="p in the start √p·inverted + √(1-p)·noise; 0 is "
        "noise alone (default: the method's: VMC 1, MotionDirector 0.5, NewMove 0)")
    add("--init-video", type=Path, help="invert this clip instead of the adapter's")
    add("--inversion-steps", type=whole(1, 10**4), help="default: --steps, else the method's; with "
        "--dmt one a timestep, and with the tiny model as many as --steps")
    add("--sampler", choices=tuple(sampler.SAMPLERS), help="default: the method's, else ddim")
    add("--steps", type=whole(1, 10**4), help="sampling steps (default: the method's, else 50)")
    add("--guidance", type=real(0, 1000), help="classifier-free guidance (default: the method's, "
        "else 9, with --dmt 10; tiny model: 4)")
    add("--batch", type=whole(1), default=1, help="videos at a time on a GPU (default: 1)")
    # Diffusion Motion Transfer
    add("--dmt", type=Path, help="move as this clip does, by guidance, without training; its "
        "caption is its .txt, else its name")
    add("--checkpointing", choices=("on", "off"), help="with --dmt, compute activations again "
        "instead of keeping them (default: on with --weights)")
    # a second model over the first one's videos, as ZeroScope XL
    add("--refine", type=Path, help="its hub-layout folder")
    add("--refine-size", type=read_size, help="pixels, WIDTHxHEIGHT (default: as made)")
    add("--refine-steps", type=whole(1), default=50, help="its sampling steps (default: 50)")
    add("--refine-guidance", type=real(0, 1000), help="default: 15; tiny model: 4")
    add("--strength", type=real(0, 1), default=0.6, help="how much it may change (default: 0.6)")
    # what is kept
    add("--save", type=Path, help="keep the merged model: a folder in the hub's layout, or a .pth "
        "in ModelScope's")
    add("--out", type=Path, help="a new folder (default: out/generated, out/generated-2 …)")
    return parser.parse_args(argv)


def check(args):
    """The prompts. Raises BadInput for flags that do not go together, and for what is not where
    they say."""
    if bool(args.prompt) == bool(args.prompts) and not (args.save and not args.prompt):
        raise BadInput("give --prompt \"…\" or --prompts FILE.")
    if args.dmt and (args.noise_prior or args.init_video or args.sampler):
        raise BadInput("--dmt has its own start and sampler; leave --noise-prior, --init-video and "
                       "--sampler out.")
    if len(args.scale) not in (1, len(args.adapter)):
        raise BadInput(f"--scale: {len(args.scale)} numbers for {len(args.adapter)} --adapter; "
                       "give one for each.")
    args.scale = args.scale * len(args.adapter) if len(args.scale) == 1 else args.scale
    check_weights(args.weights)
    check_weights(args.refine, "--refine")
    for clip in filter(None, (args.dmt, args.init_video)):
        check_there(clip, "give a video file or a folder of pictures")
    if args.save and (args.save.exists() or args.save.suffix not in ("", ".pth")):
        raise BadInput(f"--save {args.save}: wanted the name of a new folder, or of a .pth.")
    return data.read_prompts(args.prompts) if args.prompts else [args.prompt] * bool(args.prompt)


# ------------------------------------------------------------------------------------------------
# The settings


def settle(args, prompts, model, adapters):
    """The Sampling, and the clip that gives the start or the motion as clean latents
    (1, C, F, h, w), or None; fills in the flags that were left open. Raises BadInput for what the
    model or the adapters cannot do."""
    tiny, factor = is_tiny(args.weights), model.vae.config.factor
    source = next((a for a in adapters if a.latents is not None), None)
    first, s = source or next(iter(adapters), None), Sampling(guidance=4.0 if tiny else 9.0)
    open_ = {"frames": 16, "size": (model.unet.config.sample_size * factor,) * 2, "fps": 8.0,
             "negative": "", "checkpointing": "off" if tiny else "on"}
    if first and "method" in first.meta:  # others may mean something else
        s = videos.read_sampling(first.path, first.meta)
        open_["fps"] = s.fps
    if source:
        open_ |= {"frames": source.latents.shape[1],
                  "size": tuple(side * factor for side in source.latents.shape[2:])}
    if args.dmt:
        own, shape = dmt.defaults(model.schedule.num_train_timesteps, tiny)
        s, open_ = replace(s, **own), open_ | shape
    for name, value in open_.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.steps and not args.inversion_steps:  # the method's belong to its steps of sampling
        s = replace(s, inversion_steps=0)
    if args.init_video and args.noise_prior is None:
        args.noise_prior = s.noise_prior or 1.0
    given = {"sampling_steps": args.steps} | {f.name: getattr(args, f.name, None)
                                              for f in fields(Sampling) if f.name != "sampling_steps"}
    s = replace(s, **{name: value for name, value in given.items() if value is not None})
    path = args.dmt or args.init_video
    if s.noise_prior and not (source or path):
        s = replace(s, noise_prior=0.0)
        if args.noise_prior:
            raise BadInput("--noise-prior has no clip to invert; give --adapter or --init-video.")
    check_sampling(args, s, model)
    learned = {word: len(v) for a in adapters for word, v in a.words.items()}
    for prompt in (*prompts, args.negative):
        data.check_prompt(prompt, learned)
    if tiny:
        data.explain_strange_words(prompts, [f"{a.meta.get('prompt', '')} {' '.join(a.words)}"
                                             for a in adapters])
    if not (s.noise_prior or args.dmt):
        return s, None
    if path:
        video = media.read_video(path, args.frames, args.size, args.fps)
        args.frames, args.caption = video.shape[1], data.find_caption(path)[0]
        # DMT's code takes a sample of the VAE's posterior.
        return s, model.encode(video[None], sampler.generator(args.seed, 5) if args.dmt else None)
    if (args.frames, *args.size) != (source.latents.shape[1],
                                     *(side * factor for side in source.latents.shape[2:])):
        raise BadInput(f"{source.path} has a clip of another shape, which cannot start others; "
                       "leave --frames and --size out, or give --init-video or --noise-prior 0.")
    return s, source.latents[None].to(model.device).float()


def check_sampling(args, s, model):
    """Raises BadInput for steps and sizes that the model does not have, and for a sampler that
    would not come back to the clip."""
    sampler.check_steps(model.schedule, s.sampling_steps)
    if s.noise_prior:
        sampler.check_steps(model.schedule, s.inversion_steps or s.sampling_steps)
        sampler.check_return(model.schedule, s.sampler, s.sampling_steps)
    if any(side % model.vae.config.factor for side in args.size):
        raise BadInput(f"--size: wanted multiples of {model.vae.config.factor} pixels.")
    if torch.device(model.device).type == "cpu":  # where each would depend on the others in its
        args.batch = 1  # last bits, and several take as long as one by one


# ------------------------------------------------------------------------------------------------
# Refining


def load_refiner(args, first):
    """The second model, for `refine`. Raises BadInput when its numbers make no sense."""
    model = load(args.refine, args.device, args.precision, keep=())
    if model.text.config.hidden_size == first.text.config.hidden_size:
        model.text.learned = first.text.learned
    args.refine_size = args.refine_size or args.size
    args.refine_guidance = args.refine_guidance or (4.0 if is_tiny(args.refine) else 15.0)
    sampler.check_steps(model.schedule, args.refine_steps, "--refine-steps")
    return model


@torch.no_grad()
def refine(args, model, video, prompt, seed):
    """Video to video (SDEdit, Meng et al. 2021, as ZeroScope XL is used): resize, encode (a sample
    of the posterior, as the public pipeline takes), noise to `strength` of the way, and denoise
    with the same prompt. (3, F, H, W) -> (3, F, H', W')."""
    pictures = F.interpolate(video.transpose(0, 1), args.refine_size, mode="bicubic",
                             antialias=True).clamp(-1, 1)
    x0, steps = model.encode(pictures.transpose(0, 1)[None], sampler.generator(seed, 2)), (
        args.refine_steps)
    run = min(int(steps * args.strength), steps)  # of the steps, the last so many
    if run == 0:
        return model.decode(x0)[0]
    noise = sampler.noise_like_shape(x0.shape[1:], [sampler.generator(seed, 3)]).to(x0)
    start = model.schedule.add_noise(x0, noise, model.schedule.timesteps(steps)[-run])
    return sampler.sample(model, [prompt], start, [seed], steps, args.refine_guidance,
                          negative=args.negative, progress="refining", skip=steps - run)[0]


if __name__ == "__main__":
    machine.run(main)
