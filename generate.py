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
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import sampler
from model import TINY, is_tiny, load
from sampler import Sampling, read_sampling
from support import adapters, export, machine, media
from support.files import (
    BadInput,
    check_exists,
    check_weights,
    log,
    output_folder,
    print_line,
    read_size,
    slug,
    write_json,
)
from support.flags import Parser, float_in, int_in, non_empty


def main(argv=None):
    """Prompts to videos, a contact sheet and settings.json, in --out."""
    args = parse(argv)
    prompts = check(args)
    machine.tune_malloc()
    args.device = machine.find_device(args.device)
    args.precision = args.precision or machine.default_precision(args.device)
    with output_folder(args.out, Path("out/generated")) as out:
        model = load(args.weights, args.device, args.precision)
        loaded = [adapters.read_adapter(path, model) for path in args.adapter]
        s, source = resolve(args, model, loaded)
        check_sampling(args, prompts, model, loaded, s)
        clip = starting_clip(args, model, s, source)
        second = load_refiner(args, model) if args.refine else None
        jobs = list(itertools.product(prompts, range(args.seed, args.seed + args.seeds)))
        names = [f"{i // args.seeds:03d}-{slug(p)}-seed{n}.mp4" for i, (p, n) in enumerate(jobs)]
        settings = vars(args) | asdict(s) | {"videos": [
            (name, *job) for name, job in zip(names, jobs)]}
        print_line(f"settings: {json.dumps(settings, ensure_ascii=False, default=str)}")
        rows = []
        for (job, video), name in zip(make(args, s, model, loaded, jobs, clip), names):
            if second:  # one at a time, since its frames are large
                video = refine(args, second, video, *job)
            media.write_video(out / name, video, args.fps)
            rows.append(media.every_nth(video))
            print_line(f"{out / name}: {job[0]}")
        if args.save:  # the adapters are merged by now
            save = export.save_pth if args.save.suffix == ".pth" else export.save_hub
            save(model, args.save, args.weights or TINY)
            print_line(f"merged model: {args.save}")
        if rows:
            write_json(out / "settings.json", settings)
            media.contact_sheet(out / "sheet.png", rows)
            print_line(f"contact sheet: {out / 'sheet.png'}")


def make(args, s, model, loaded, jobs, clip):
    """Yields (job, video (3, F, H, W)) per job, a (prompt, seed)."""
    if args.dmt:
        yield from transfer_motion(args, s, model, loaded, jobs, clip)
        return
    factor, (H, W) = model.vae.config.factor, args.size
    shape = model.unet.config.in_channels, args.frames, H // factor, W // factor
    yield from sampler.sample_videos(model, loaded, args.scale, jobs, s, shape, clip, args.negative,
                            args.batch)


# ------------------------------------------------------------------------------------------------
# Flags, and what can be judged by them alone


def parse(argv=None):
    """The flags; those not given are None where something else fixed_settings."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    # what to make
    add("--prompt", type=non_empty, help="what to show")
    add("--prompts", type=Path, help="a text file, one prompt a line, instead of --prompt")
    add("--negative", type=str, help="what not to show (default: nothing; with --dmt its code's "
        "words, but for the tiny model)")
    add("--seed", type=int_in(0, 2**63), default=0, help="first seed (default: 0)")
    add("--seeds", type=int_in(1, 10**6), default=1, help="videos a prompt, from --seed on "
        "(default: 1)")
    # the model
    add("--adapter", type=Path, nargs="+", default=[], help="what was learned: files that train.py "
        "wrote, or other programs' LoRAs; of several, the first gives the clip")
    add("--scale", type=float_in(-100, 100), nargs="+", default=[1.0], help="strength of each adapter; "
        "0 is the base model (default: 1)")
    add("--weights", type=Path, help="base model, a hub-layout folder (default: the tiny model)")
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 where the hardware has it")
    # the shape
    add("--frames", type=int_in(1, 1024), help="frames (default: the clip's, else 16; "
        "with --dmt 24)")
    add("--size", type=read_size, help="pixels, WIDTHxHEIGHT (default: the clip's, else the "
        "model's; with --dmt 576x320)")
    add("--fps", type=float_in(0.01, 1000), help="frames a second (default: the clip's, else 8)")
    # sampling
    add("--noise-prior", type=float_in(0, 1), help="p in the start √p·inverted + √(1-p)·noise; 0 is "
        "noise alone (default: the method's: VMC 1, MotionDirector 0.5, NewMove 0)")
    add("--init-video", type=Path, help="invert this clip instead of the adapter's")
    add("--inversion-steps", type=int_in(1, 10**4), help="default: --steps, else the method's; with "
        "--dmt one a timestep, and with the tiny model as many as --steps")
    add("--sampler", choices=tuple(sampler.SAMPLERS), help="default: the method's, else ddim")
    add("--steps", dest="sampling_steps", type=int_in(1, 10**4), help="sampling steps (default: the method's, else 50)")
    add("--guidance", type=float_in(0, 1000), help="classifier-free guidance (default: the method's, "
        "else 9, with --dmt 10; tiny model: 4)")
    add("--batch", type=int_in(1), default=1, help="videos at a time on a GPU (default: 1)")
    # Diffusion Motion Transfer
    add("--dmt", type=Path, help="move as this clip does, by guidance, without training; its "
        "caption is its .txt, else its name")
    add("--checkpointing", choices=("on", "off"), help="with --dmt, compute activations again "
        "instead of keeping them (default: on with --weights)")
    # a second model over the first one's videos, as ZeroScope XL
    add("--refine", type=Path, help="its hub-layout folder")
    add("--refine-size", type=read_size, help="pixels, WIDTHxHEIGHT (default: as made)")
    add("--refine-steps", type=int_in(1), default=50, help="its sampling steps (default: 50)")
    add("--refine-guidance", type=float_in(0, 1000), help="default: 15; tiny model: 4")
    add("--strength", type=float_in(0, 1), default=0.6, help="how much it may change (default: 0.6)")
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
        check_exists(clip, "give a video file or a folder of pictures")
    if args.save and (args.save.exists() or args.save.suffix not in ("", ".pth")):
        raise BadInput(f"--save {args.save}: wanted the name of a new folder, or of a .pth.")
    return data.read_prompts(args.prompts) if args.prompts else [args.prompt] * bool(args.prompt)


# ------------------------------------------------------------------------------------------------
# Settings: the defaults of the model, then the adapter's, then DMT's, then the flags


def resolve(args, model, loaded):
    """The Sampling, and the adapter whose clip and settings count, or None. Fills in the flags that
    were not given. Raises BadInput where an adapter's clip is missing or does not fit."""
    tiny, factor = is_tiny(args.weights), model.vae.config.factor
    s = Sampling(guidance=4.0 if tiny else 9.0)
    shape = {"frames": 16, "size": (model.unet.config.sample_size * factor,) * 2, "fps": 8.0,
             "negative": "", "checkpointing": "off" if tiny else "on"}
    source = next((a for a in loaded if a.latents is not None), next(iter(loaded), None))
    if source and "method" in source.meta:  # trained here
        s = read_sampling(source.path, source.meta)
        shape["fps"] = s.fps
    if source and source.latents is not None:
        _, frames, h, w = source.latents.shape
        shape |= {"frames": frames, "size": (h * factor, w * factor)}
    if args.dmt:
        sampling, own_shape = dmt_defaults(model.schedule.num_train_timesteps, tiny)
        s, shape = replace(s, **sampling), shape | own_shape
    if args.sampling_steps and not args.inversion_steps:
        args.inversion_steps = 0  # the adapter's belong to its own sampling steps
    if args.init_video and args.noise_prior is None:
        args.noise_prior = s.noise_prior or 1.0
    given = {f.name: getattr(args, f.name, None) for f in fields(Sampling)}
    s = replace(s, **{name: value for name, value in given.items() if value is not None})
    for name, value in shape.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if s.noise_prior and not (args.dmt or args.init_video):
        check_clip(args, source, factor)
    return s, source


def check_clip(args, source, factor):
    """Raises BadInput where sampling starts from a clip that is missing or has another shape."""
    if source is None or source.latents is None:
        raise BadInput(f"{source.path if source else '--noise-prior'}: sampling starts from a clip, "
                       "and none is given; give --init-video CLIP, or --noise-prior 0.")
    _, frames, h, w = source.latents.shape
    if (args.frames, *args.size) != (frames, h * factor, w * factor):
        raise BadInput(f"{source.path} starts from a clip of {frames} frames of "
                       f"{w * factor}x{h * factor}; drop --frames and --size, or give --init-video "
                       "or --noise-prior 0.")


def check_sampling(args, prompts, model, loaded, s):
    """Raises BadInput for prompts, steps and sizes that do not fit the model."""
    sampler.check_steps(model.schedule, s.sampling_steps)
    if s.noise_prior:
        sampler.check_steps(model.schedule, s.inversion_steps or s.sampling_steps)
        sampler.check_return(model.schedule, s.sampler, s.sampling_steps)
    if any(side % model.vae.config.factor for side in args.size):
        raise BadInput(f"--size: expected multiples of {model.vae.config.factor} pixels.")
    if args.save and any(a.more for a in loaded):
        raise BadInput("--save: an adapter changes more than weights, which a merged model cannot "
                       "hold; keep using the adapter.")
    learned = {word: len(v) for a in loaded for word, v in a.words.items()}
    for prompt in (*prompts, args.negative):
        data.check_prompt(prompt, learned)
    if is_tiny(args.weights):
        known = [f"{a.meta.get('prompt', '')} {' '.join(a.words)}" for a in loaded]
        data.note_unknown_words(prompts, known)
    if loaded and all(a.meta.get("part") == "appearance" for a in loaded):
        log("note: the adapter holds appearance only; the motion is in another file")
    if torch.device(model.device).type == "cpu":  # a batch is no faster there, and its rows would
        args.batch = 1  # depend on each other in their last bits


def starting_clip(args, model, s, source):
    """Clean latents (1, C, F, h, w) of the clip that sampling starts from, or None."""
    path = args.dmt or args.init_video
    if not (s.noise_prior or args.dmt):
        return None
    if not path:
        return source.latents[None].to(model.device).float()
    video = media.read_video(path, args.frames, args.size, args.fps)
    args.frames, args.caption = video.shape[1], data.find_caption(path)[0]
    # DMT's code samples the VAE's posterior.
    return model.encode(video[None], sampler.generator(args.seed, 5) if args.dmt else None)


# ------------------------------------------------------------------------------------------------
# Refining


def load_refiner(args, first):
    """The second model, for `refine`. Raises BadInput when its numbers make no sense."""
    model = load(args.refine, args.device, args.precision, keep=())
    if model.text_encoder.config.hidden_size == first.text_encoder.config.hidden_size:
        model.text_encoder.learned = first.text_encoder.learned
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
    noise = sampler.seeded_randn(x0.shape[1:], [sampler.generator(seed, 3)]).to(x0)
    start = model.schedule.add_noise(x0, noise, model.schedule.timesteps(steps)[-run])
    return sampler.sample(model, [prompt], start, [seed], steps, args.refine_guidance,
                          negative=args.negative, progress="refining", skip=steps - run)[0]


# ------------------------------------------------------------------------------------------------
# Diffusion Motion Transfer (Yatim et al. 2023): a motion without training. The clip is inverted; a
# new video starts from the coarse part of that noise, and while it is sampled its latents are
# optimized until features of the network change over time as the clip's do. Settings, layers and
# the order of the steps are those of the published code. Differences: fp32 latents; the loss leaves
# out the anchor frame's difference from itself, which is zero; a step up is exactly the inverse of
# the step down, where that code is one timestep off; frames are picked by time, not the first 24;
# "Amazing quality, masterpiece" is not added to prompts.


NEGATIVE = "bad quality, distortions, unrealistic, distorted image, watermark, signature"


def dmt_defaults(timesteps, tiny):
    """Its Sampling, and its shape, for a schedule of so many timesteps; inversion takes nearly each.

    The tiny model has its own shape, knows none of the negative words, is guided as always, and
    inversion_model in as many steps as it samples in (0): all of its 700 would take a CPU half a minute.
    """
    if tiny:
        return {"guidance": 4.0}, {}
    return {"guidance": 10.0, "inversion_steps": timesteps - 1}, {
        "negative": NEGATIVE, "frames": 24, "size": (320, 576)}


# Of the second upward block: the second resnet before its skip, the temporal convolution after it,
# and the upsampling. In a network where that block is the last there is no upsampling.
LAYERS = r"up_blocks\.1\.(resnets\.1\.conv2|temp_convs\.1|upsamplers\.0)"
SHARE = 0.4  # of the steps, the first, optimize_latents
PULLS, RATES = 10, (0.007, 0.004)  # Adam's steps in each, and its rates from the first to the last


class StopForward(Exception):
    """All that a forward pass was wanted for is there."""


def frame_features(model, x, t, text):
    """Spatially averaged outputs [(B, F, C)] of LAYERS; what comes after the last of them is
    not computed. Raises BadInput for a network without such layers."""
    layers = [m for name, m in model.unet.named_modules() if re.fullmatch(LAYERS, name)]
    if not layers:
        raise BadInput(f"--dmt reads the layers {LAYERS}, which this model has not.")
    seen = {}

    def keep(layer, inputs, out):  # out (B·F, C, h, w)
        seen[layer] = out.float().mean((2, 3)).unflatten(0, (len(x), -1))
        if len(seen) == len(layers):
            raise StopForward

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        model.predict(x, t, text)
    except StopForward:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return list(seen.values())


def pairwise_differences_loss(got, want):
    """1 − cosine of the differences between each frame and every anchor frame, on (B, F, C)
    features: what all frames share cancels."""
    difference = lambda f: f[:, :, None] - f[:, None]  # (B, F, F, C)
    frames = got.shape[1]
    other = 1 - torch.eye(frames, device=got.device)  # to choose by it would wait for a GPU
    cosine = F.cosine_similarity(difference(got), difference(want), dim=-1)
    return ((1 - cosine) * other).sum() / (len(got) * frames * (frames - 1))


def low_frequencies(x, factor=4):
    """(B, C, F, h, w) without spatial detail finer than `factor` latents."""
    h, w = x.shape[-2:]
    resize = lambda x, size: F.interpolate(x, size, mode="bilinear", align_corners=True,
                                           antialias=True)
    small = resize(x.flatten(0, 2)[None], (max(1, h // factor), max(1, w // factor)))
    return resize(small, (h, w)).view(x.shape)


def nearest(times, t):
    """The one of some timesteps that is nearest to t."""
    return min(times, key=lambda other: abs(other - t))


def inversion_levels(s, model):
    """The timesteps at which the inverted clip is needed: its last, and nearest to the pulled ones.
    """
    times = model.schedule.timesteps(s.inversion_steps or s.sampling_steps)
    return {times[0]} | {nearest(times, t) for t in guided_timesteps(s, model)}


def guided_timesteps(s, model):
    """Those before whose steps the latents are pulled."""
    return model.schedule.timesteps(s.sampling_steps)[: max(1, int(s.sampling_steps * SHARE))]


def optimize_latents(model, x, t, text, want, rate):
    """The latents x after some of Adam's steps towards the features `want`."""
    free = x.detach().clone().requires_grad_()
    adam = torch.optim.Adam([free], lr=rate)
    for _ in range(PULLS):
        with torch.enable_grad():
            got = frame_features(model, free, t, text)
            loss = sum(pairwise_differences_loss(*pair) for pair in zip(got, want))
            free.grad, = torch.autograd.grad(loss, free)
        adam.step()
    return free.detach()


def step_down_and_up(S, predict, x, t, steps, g):
    """One DDIM step down from t and, with fresh noise of the generator g, up again (Xu et al.
    2023): what the optimize_latents has put out of the network's way comes back to it."""
    a, b = S.alpha_bar_at(t, x), S.alpha_bar_prev(t - S.num_train_timesteps // steps)
    x0, eps = S.to_x0_eps(predict(x, t), x, a)
    below = b**0.5 * x0 + (1 - b) ** 0.5 * eps
    noise = sampler.seeded_randn(x.shape[1:], [g]).to(x)
    return (a / b) ** 0.5 * below + (1 - a / b) ** 0.5 * noise


@torch.no_grad()
def transfer_motion(args, s, model, loaded, jobs, clip):
    """Yields (job, video (3, F, H, W)) per job, a (prompt, seed): videos with the motion of the
    clean latents clip (1, C, F, h, w). The clip is inverted once."""
    model.unet.checkpointing = args.checkpointing == "on"
    adapters.apply_adapters(model, loaded, args.scale)
    inverted, levels = {}, inversion_levels(s, model)
    keep = lambda t, x: inverted.update({t: x} if t in levels else {})
    sampler.invert(model, clip, s.inversion_steps or s.sampling_steps, args.caption, keep,
                   "inverting")
    for job in jobs:
        yield job, transfer_one(args, s, model, clip, inverted, *job)


def transfer_one(args, s, model, clip, inverted, prompt, seed):
    """A video (3, F, H, W) of the prompt. inverted: {timestep: latents of the inverted clip}."""
    S, times = model.schedule, model.schedule.timesteps(s.sampling_steps)
    pulled = guided_timesteps(s, model)
    rates = torch.linspace(*RATES, len(pulled)).tolist()
    text, source, empty = (model.encode_text([p]) for p in (prompt, args.caption, args.negative))
    predict = sampler.classifier_free_guidance(model.predict, text, empty, s.guidance)
    g = sampler.generator(seed, 4)

    def edit(x, t):
        if t in pulled:
            level = nearest(inverted, t)
            want = frame_features(model, inverted[level], level, source)
            x = optimize_latents(model, x, t, text, want, rates[pulled.index(t)])
        return x if t == times[-1] else step_down_and_up(S, predict, x, t, s.sampling_steps, g)

    # The noise found by the inversion, at the level of the first step, with new fine detail.
    top, noise = max(inverted), sampler.seeded_randn(clip.shape[1:], [seed]).to(clip)
    found = (inverted[top] - S.alpha_bar_at(top, clip) ** 0.5 * clip) / (1 - S.alpha_bar_at(top, clip)) ** 0.5
    start = noise + low_frequencies(S.add_noise(clip, found, times[0])) - low_frequencies(noise)
    return sampler.sample(model, [prompt], start, [seed], s.sampling_steps, s.guidance,
                          negative=args.negative, progress="transferring the motion", edit=edit)[0]


if __name__ == "__main__":
    machine.run(main)
