"""Generate videos from prompts, with or without adapters.

    python generate.py --prompt "a red ring moving left on a grey background"
    python generate.py --adapter out/eight-vmc/vmc.safetensors --prompts assets/prompts.txt
    python generate.py --adapter motion.safetensors style.safetensors --scale 1 0.7 --prompt "…"
    python generate.py --dmt clip.mp4 --prompt "a red star"     # motion transfer without training
    python generate.py --adapter motion.safetensors --save-merged merged

Writes one mp4 per video, a contact sheet and settings.json to --out. Missing flags default to the
adapter's settings, then the model's.

Axes: B videos, C channels, F frames, h w latent, H W image.
"""
import itertools
import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import lora  # noqa: F401  (registers loaders of new kinds of trainables)
import sampler
from model import TINY, is_tiny, load
from sampler import Sampling, read_sampling
from support import adapters, export, machine, media
from support.files import BadInput, log, output_folder, print_line, slug, write_json
from support.flags import Parser, existing, float_in, hub_folder, int_in, non_empty, read_size


def main(argv=None):
    """Generate videos, a contact sheet and settings.json in --out."""
    args = parse(argv)
    prompts = check(args)
    machine.tune_malloc()
    args.device = machine.find_device(args.device)
    args.precision = args.precision or machine.default_precision(args.device)
    with output_folder(args.out, Path("out/generated")) as out:
        pipe = load(args.weights, args.device, args.precision)
        loaded = [adapters.read_adapter(path, pipe) for path in args.adapter]
        s, source = resolve_settings(args, pipe, loaded)
        check_sampling(args, prompts, pipe, loaded, s)
        clip = starting_clip(args, pipe, s, source)
        refiner = load_refiner(args, pipe) if args.refine else None
        count = args.videos_per_prompt
        jobs = list(itertools.product(prompts, range(args.seed, args.seed + count)))
        names = [f"{i // count:03d}-{slug(p)}-seed{n}.mp4" for i, (p, n) in enumerate(jobs)]
        settings = vars(args) | asdict(s) | {"videos": [
            (name, *job) for name, job in zip(names, jobs)]}
        print_line(f"settings: {json.dumps(settings, ensure_ascii=False, default=str)}")
        if args.save_merged:
            save_merged(args, loaded)
        rows = []
        for name, (job, video) in zip(names, generate(args, s, pipe, loaded, jobs, clip)):
            if refiner:  # one video at a time, since its frames are large
                video = refine(args, refiner, video, *job)
            media.write_video(out / name, video, args.fps)
            rows.append(media.every_nth(video))
            print_line(f"{out / name}: {job[0]}")
        if rows:
            write_json(out / "settings.json", settings)
            media.contact_sheet(out / "sheet.png", rows)
            print_line(f"contact sheet: {out / 'sheet.png'}")


def save_merged(args, loaded):
    """Save a merged model, for which the base model is loaded again, in fp32."""
    pipe = load(args.weights)
    adapters.apply_adapters(pipe, loaded, args.scale)
    save = export.save_pth if args.save_merged.suffix == ".pth" else export.save_hub
    save(pipe, args.save_merged, args.weights or TINY)
    print_line(f"merged model: {args.save_merged}")


def generate(args, s, pipe, loaded, jobs, clip):
    """Yields (job, video (3, F, H, W)) per job (prompt, seed)."""
    if args.dmt:
        yield from transfer_motion(args, s, pipe, loaded, jobs, clip)
        return
    factor, (H, W) = pipe.vae.config.factor, args.size
    shape = pipe.unet.config.in_channels, args.frames, H // factor, W // factor
    yield from sampler.sample_videos(pipe, loaded, args.scale, jobs, s, shape, clip,
                                     args.negative_prompt, args.batch)


# --- Flags --------------------------------------------------------------------------------------


def parse(argv=None):
    """The flags; None for those that default to the adapter's or the model's settings."""
    parser = Parser(REQUIRES, description=__doc__)
    add_model_flags(parser.add_argument)
    add_sampling_flags(parser.add_argument)
    return parser.parse_args(argv)


def add_model_flags(add):
    """Flags for prompts, model, shape and output."""
    add("--prompt", type=non_empty, help="the prompt")
    add("--prompts", type=Path, help="a text file with one prompt per line, instead of --prompt")
    add("--negative-prompt", type=str, help="content to avoid (default: empty; with --dmt and real "
        "weights, that of its published code)")
    add("--seed", type=int_in(0, 2**63), default=0, help="first seed (default: 0)")
    add("--videos-per-prompt", type=int_in(1, 10**6), default=1, help="videos per prompt, with "
        "consecutive seeds (default: 1)")
    add("--adapter", type=Path, nargs="+", default=[], help="adapters of train.py, or LoRAs of "
        "other programs; the first one with a clip provides clip and settings")
    add("--scale", type=float_in(-100, 100), nargs="+", help="scale of each "
        "adapter; 0 is the base model (default: 1)")
    add("--weights", type=hub_folder, help="base model, a hub-layout folder (default: tiny model)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda or mps if available)")
    add("--precision", choices=machine.DTYPES, help="default: bf16 where the hardware has it, fp16 "
        "on older GPUs, else fp32")
    add("--frames", type=int_in(1, 1024), help="default: the clip's, else 16; with --dmt and real "
        "weights 24")
    add("--size", type=read_size, help="pixels, WIDTHxHEIGHT (default: the clip's, else the "
        "model's; with --dmt and real weights 576x320)")
    add("--fps", type=float_in(0.01, 1000), help="frames per second (default: the clip's, else 8)")
    add("--save-merged", type=Path, help="save the merged model as a hub-layout folder or a .pth")
    add("--out", type=Path, help="a new folder (default: out/generated, out/generated-2 …)")


def add_sampling_flags(add):
    """Flags for sampling, Diffusion Motion Transfer and refining."""
    add("--noise-prior", type=float_in(0, 1), help="p in the starting latents √p·inverted + "
        "√(1-p)·noise (default: the method's: VMC 1, MotionDirector 0.5, NewMove 0)")
    add("--init-video", type=existing, help="invert this clip instead of the adapter's")
    add("--inversion-steps", type=int_in(1, 10**4), help="DDIM inversion steps (default: --steps, "
        "else the method's; with --dmt one per timestep)")
    add("--sampler", choices=tuple(sampler.SAMPLERS), help="default: the method's, else ddim")
    add("--steps", dest="sampling_steps", type=int_in(1, 10**4), help="sampling steps (default: "
        "the method's, else 50)")
    add("--guidance", type=float_in(0, 1000), help="classifier-free guidance scale (default: the "
        "method's, else 9, with --dmt 10; tiny model: 4)")
    add("--batch", type=int_in(1), default=1, help="videos per batch on a GPU (default: 1)")
    add("--dmt", type=existing, help="Diffusion Motion Transfer from this clip, without training")
    add("--checkpointing", choices=("on", "off"), help="for --dmt (default: on with --weights)")
    add("--refine", type=hub_folder, help="a model to refine each video, e.g. ZeroScope XL's "
        "folder")
    add("--refine-size", type=read_size, help="pixels, WIDTHxHEIGHT (default: the video's)")
    add("--refine-steps", type=int_in(1), help="sampling steps (default: 50)")
    add("--refine-guidance", type=float_in(0, 1000), help="default: 15; tiny model: 4")
    add("--strength", type=float_in(0, 1), help="noise level of --refine, 0 to 1 (default: 0.6)")


# Flags that have no effect without another flag
REQUIRES = {"scale": "adapter", "checkpointing": "dmt", "refine_size": "refine",
            "refine_steps": "refine", "refine_guidance": "refine", "strength": "refine"}


def check(args):
    """The prompts. Raises BadInput for conflicting flags and missing files."""
    if bool(args.prompt) == bool(args.prompts) and not (args.save_merged and not args.prompt):
        raise BadInput("give --prompt \"…\" or --prompts FILE.")
    if args.dmt and (args.noise_prior or args.init_video or args.sampler):
        raise BadInput("--dmt has its own starting latents and sampler; drop --noise-prior, "
                       "--init-video and --sampler.")
    args.scale = args.scale or [1.0]
    if len(args.scale) not in (1, len(args.adapter)):
        raise BadInput(f"--scale: {len(args.scale)} numbers for {len(args.adapter)} --adapter; "
                       "give one for each.")
    args.scale = args.scale * len(args.adapter) if len(args.scale) == 1 else args.scale
    merged = args.save_merged
    if merged and (merged.exists() or merged.suffix not in ("", ".pth")):
        raise BadInput(f"--save-merged {merged}: expected the name of a new folder, or of a .pth.")
    return data.read_prompts(args.prompts) if args.prompts else [args.prompt] * bool(args.prompt)


# --- Settings: the model's defaults, then the adapter's, then DMT's, then the flags -------------


def resolve_settings(args, pipe, loaded):
    """The Sampling, and the adapter that provides clip and settings, or None. Fills in missing
    flags. Raises BadInput if an adapter's clip is missing or does not fit."""
    tiny, factor = is_tiny(args.weights), pipe.vae.config.factor
    inverts = args.init_video or args.inversion_steps
    values = asdict(Sampling(guidance=4.0 if tiny else 9.0)) | {
        "frames": 16, "size": ((pipe.unet.config.sample_size or 32) * factor,) * 2,
        "negative_prompt": "", "checkpointing": "off" if tiny else "on"}
    source = next((a for a in loaded if a.latents is not None), next(iter(loaded), None))
    if source and "method" in source.meta:  # trained here
        values |= asdict(read_sampling(source.path, source.meta))
    if source and source.latents is not None:
        _, frames, h, w = source.latents.shape
        values |= {"frames": frames, "size": (h * factor, w * factor)}
    if args.dmt:
        values |= dmt_defaults(pipe.schedule.num_train_timesteps, tiny)
    if args.sampling_steps and not args.inversion_steps:
        args.inversion_steps = 0  # as many as sampling steps, not the adapter's
    if args.init_video and args.noise_prior is None:
        args.noise_prior = values["noise_prior"] or 1.0
    for name, default in values.items():
        value = getattr(args, name, None)
        setattr(args, name, default if value is None else value)
    s = Sampling(**{f.name: getattr(args, f.name) for f in fields(Sampling)})
    if inverts and not (s.noise_prior or args.dmt):
        raise BadInput("--init-video and --inversion-steps have no effect with a noise prior of 0; "
                       "give --noise-prior 1, or drop them.")
    if s.noise_prior and not (args.dmt or args.init_video):
        check_clip(args, source, factor)
    return s, source


def check_clip(args, source, factor):
    """Raises BadInput if sampling starts from a clip that is missing or has another shape."""
    if source is None or source.latents is None:
        raise BadInput(f"{source.path if source else '--noise-prior'}: sampling starts from a "
                       "clip, and none is given; give --init-video CLIP, or --noise-prior 0.")
    _, frames, h, w = source.latents.shape
    if (args.frames, *args.size) != (frames, h * factor, w * factor):
        raise BadInput(f"{source.path} starts from a clip of {frames} frames of "
                       f"{w * factor}x{h * factor}; drop --frames and --size, or give --init-video "
                       "or --noise-prior 0.")


def check_sampling(args, prompts, pipe, loaded, s):
    """Raises BadInput for prompts, steps and sizes that do not fit the model."""
    sampler.check_steps(pipe.schedule, s.sampling_steps)
    if s.noise_prior or args.dmt:
        sampler.check_steps(pipe.schedule, s.inversion_steps or s.sampling_steps)
    if s.noise_prior:
        sampler.check_return(pipe.schedule, s.sampler, s.sampling_steps)
    if any(side % pipe.vae.config.factor for side in args.size):
        raise BadInput(f"--size: expected multiples of {pipe.vae.config.factor} pixels.")
    if args.save_merged and any(a.more for a in loaded):
        raise BadInput("--save-merged: an adapter changes more than weights, which a merged model "
                       "cannot hold; use the adapter itself.")
    learned = {word: len(v) for a in loaded for word, v in a.words.items()}
    for prompt in (*prompts, args.negative_prompt):
        data.check_prompt(prompt, learned)
    if is_tiny(args.weights):
        known = [f"{a.meta.get('prompt', '')} {' '.join(a.words)}" for a in loaded]
        data.note_unknown_words(prompts, known)
    if loaded and all(a.meta.get("part") == "appearance" for a in loaded):
        log("note: the adapter holds appearance only; the motion is in another file")
    if torch.device(pipe.device).type == "cpu":  # batches are no faster, and change the last bits
        args.batch = 1


def starting_clip(args, pipe, s, source):
    """Clean latents (1, C, F, h, w) of the clip that sampling starts from, or None."""
    path = args.dmt or args.init_video
    if not (s.noise_prior or args.dmt):
        return None
    if not path:
        return source.latents[None].to(pipe.device).float()
    args.fps = media.frame_rate(path, args.fps)
    video = media.read_video(path, args.frames, args.size, args.fps)
    args.frames, args.caption = video.shape[1], data.find_caption(path)[0]
    # DMT's code samples the VAE's posterior.
    return pipe.encode(video[None], sampler.generator(args.seed, 5) if args.dmt else None)


# --- Refining -----------------------------------------------------------------------------------


def load_refiner(args, pipe):
    """The second model, for `refine`. Raises BadInput."""
    refiner = load(args.refine, args.device, args.precision, keep=())
    if refiner.text_encoder.config.hidden_size == pipe.text_encoder.config.hidden_size:
        refiner.text_encoder.learned = pipe.text_encoder.learned
    args.refine_size = args.refine_size or args.size
    defaults = {"refine_steps": 50, "strength": 0.6,
                "refine_guidance": 4.0 if is_tiny(args.refine) else 15.0}
    for name, value in defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    sampler.check_steps(refiner.schedule, args.refine_steps, "--refine-steps")
    return refiner


@torch.no_grad()
def refine(args, pipe, video, prompt, seed):
    """Video to video (SDEdit, Meng et al. 2021): resize, sample the VAE's posterior as diffusers
    does, add noise up to --strength, denoise. (3, F, H, W) -> (3, F, H', W')."""
    frames = F.interpolate(video.transpose(0, 1), args.refine_size, mode="bicubic",
                           antialias=True).clamp(-1, 1)
    x0 = pipe.encode(frames.transpose(0, 1)[None], sampler.generator(seed, 2))
    steps = args.refine_steps
    remaining = min(int(steps * args.strength), steps)
    if remaining == 0:
        return pipe.decode(x0)[0]
    noise = sampler.seeded_randn(x0.shape[1:], [sampler.generator(seed, 3)]).to(x0)
    start = pipe.schedule.add_noise(x0, noise, pipe.schedule.timesteps(steps)[-remaining])
    return sampler.sample(pipe, [prompt], start, [seed], steps, args.refine_guidance,
                          negative=args.negative_prompt, progress="refining",
                          skip=steps - remaining)[0]


# --- Diffusion Motion Transfer (Yatim et al. 2023): motion transfer without training ------------
# The clip is inverted. A new video starts from the low frequencies of that noise; during sampling
# its latents are optimized so that features of the UNet change over time like the clip's. Settings,
# layers and the order of steps follow the published code. Differences not in docs/methods.md:
# latents are fp32; the loss omits each frame's difference to itself, which is 0; the step up is the
# exact inverse of the step down, where that code is one timestep off.


NEGATIVE = "bad quality, distortions, unrealistic, distorted image, watermark, signature"

# In the second up block: the second resnet before its skip, the temporal convolution after it, and
# the upsampler, if there is one.
LAYERS = r"up_blocks\.1\.(resnets\.1\.conv2|temp_convs\.1|upsamplers\.0)"
GUIDED_SHARE = 0.4  # share of steps, from the first, in which latents are optimized
ADAM_STEPS, ADAM_RATES = 10, (0.007, 0.004)  # per guided step; learning rates of first and last


def dmt_defaults(timesteps, tiny):
    """Sampling settings and shape. Real models are inverted with one step per timestep; the tiny
    one with as many as sampling steps, since 700 steps take half a minute on a CPU."""
    if tiny:
        return {"guidance": 4.0}
    return {"guidance": 10.0, "inversion_steps": timesteps - 1, "negative_prompt": NEGATIVE,
            "frames": 24, "size": (320, 576)}


class StopForward(Exception):
    """Ends a forward pass after the last required layer."""


def frame_features(pipe, x, t, text):
    """Spatially averaged outputs [(B, F, C)] of LAYERS. Later layers are not computed."""
    layers = [m for name, m in pipe.unet.named_modules() if re.fullmatch(LAYERS, name)]
    if not layers:
        raise BadInput(f"--dmt needs the layers {LAYERS}, which this model does not have.")
    features = {}

    def keep(layer, inputs, out):  # out (B·F, C, h, w)
        features[layer] = out.float().mean((2, 3)).unflatten(0, (len(x), -1))
        if len(features) == len(layers):
            raise StopForward

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        pipe.predict(x, t, text)
    except StopForward:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return list(features.values())


def pairwise_differences_loss(features, target):
    """1 − cosine of the differences between all pairs of frames, for features (B, F, C).
    Components shared by all frames cancel."""
    difference = lambda f: f[:, :, None] - f[:, None]  # (B, F, F, C)
    frames = features.shape[1]
    others = 1 - torch.eye(frames, device=features.device)  # indexing would synchronize
    cosine = F.cosine_similarity(difference(features), difference(target), dim=-1)
    return ((1 - cosine) * others).sum() / (len(features) * frames * (frames - 1))


def low_frequencies(x, factor=4):
    """(B, C, F, h, w) downsampled in space by `factor`, and upsampled again."""
    h, w = x.shape[-2:]
    resize = lambda x, size: F.interpolate(x, size, mode="bilinear", align_corners=True,
                                           antialias=True)
    small = resize(x.flatten(0, 2)[None], (max(1, h // factor), max(1, w // factor)))
    return resize(small, (h, w)).view(x.shape)


def optimize_latents(pipe, x, t, text, target, rate):
    """The latents x after some Adam steps toward the target features."""
    latents = x.detach().clone().requires_grad_()
    adam = torch.optim.Adam([latents], lr=rate)
    for _ in range(ADAM_STEPS):
        with torch.enable_grad():
            features = frame_features(pipe, latents, t, text)
            loss = sum(pairwise_differences_loss(*pair) for pair in zip(features, target))
            latents.grad, = torch.autograd.grad(loss, latents)
        adam.step()
    return latents.detach()


def step_down_and_up(S, predict, x, t, steps, g):
    """One DDIM step down from t and, with new noise from g, up again (Ho et al. 2020, Eq. 2; Xu et
    al. 2023), which returns optimized latents to the network's input distribution."""
    a, b = S.alpha_bar_at(t, x), S.alpha_bar_prev(t - S.num_train_timesteps // steps)
    x0, eps = S.to_x0_eps(predict(x, t), x, a)
    below = b**0.5 * x0 + (1 - b) ** 0.5 * eps
    noise = sampler.seeded_randn(x.shape[1:], [g]).to(x)
    return (a / b) ** 0.5 * below + (1 - a / b) ** 0.5 * noise


@torch.no_grad()
def transfer_motion(args, s, pipe, loaded, jobs, clip):
    """Yields (job, video (3, F, H, W)) per job, with the motion of clip (1, C, F, h, w)."""
    pipe.unet.checkpointing = args.checkpointing == "on"
    adapters.apply_adapters(pipe, loaded, args.scale)
    S, caption, features = pipe.schedule, pipe.encode_text([args.caption]), {}
    steps, times = s.inversion_steps or s.sampling_steps, S.timesteps(s.sampling_steps)
    levels = S.timesteps(steps)
    guided = times[: max(1, int(s.sampling_steps * GUIDED_SHARE))]
    nearest = {t: min(levels, key=lambda level: abs(level - t)) for t in guided}

    def keep(level, x):
        if level in nearest.values():
            features[level] = frame_features(pipe, x, level, caption)

    inverted = sampler.invert(pipe, clip, steps, args.caption, keep, "inverting")
    a = S.alpha_bar_at(levels[0], clip)
    noise = (inverted - a**0.5 * clip) / (1 - a) ** 0.5
    inverted = S.add_noise(clip, noise, times[0])  # at the level of the first sampling step
    targets = {t: features[nearest[t]] for t in guided}
    for job in jobs:
        yield job, transfer_one(args, s, pipe, inverted, targets, *job)


def transfer_one(args, s, pipe, inverted, targets, prompt, seed):
    """A video (3, F, H, W) of the prompt. inverted (1, C, F, h, w): the clip at the first timestep;
    targets: {timestep: features of the clip} for the timesteps at which latents are optimized."""
    times = pipe.schedule.timesteps(s.sampling_steps)
    rates = dict(zip(targets, torch.linspace(*ADAM_RATES, len(targets)).tolist()))
    text, empty = pipe.encode_text([prompt]), pipe.encode_text([args.negative_prompt])
    predict = sampler.classifier_free_guidance(pipe.predict, text, empty, s.guidance)
    g = sampler.generator(seed, 4)

    def edit(x, t):
        if t in targets:
            x = optimize_latents(pipe, x, t, text, targets[t], rates[t])
        if t == times[-1]:
            return x
        return step_down_and_up(pipe.schedule, predict, x, t, s.sampling_steps, g)

    noise = sampler.seeded_randn(inverted.shape[1:], [seed]).to(inverted)
    start = noise + low_frequencies(inverted) - low_frequencies(noise)  # new high frequencies
    return sampler.sample(pipe, [prompt], start, [seed], s.sampling_steps, s.guidance,
                          negative=args.negative_prompt, progress="transferring the motion",
                          edit=edit)[0]


if __name__ == "__main__":
    machine.run(main)
