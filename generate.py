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
import support.signals  # isort: skip  # noqa: F401
import itertools
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import sampler
from model import TINY, is_tiny, load
from support import adapter_file, dmt, machine, media, prompts, sets, videos
from support.files import (
    BadInput,
    check_folder_out,
    check_there,
    check_weights,
    read_size,
    say,
)
from support.flags import Parser, real, some_text, whole

# ------------------------------------------------------------------------------------------------
# The command


def main(argv=None):
    """Prompts to videos, a contact sheet and the settings, in --out."""
    args = parse(argv)
    check(args)
    machine.keep_memory()
    machine.explain_load()
    device = machine.find_device(args.device)
    process, processes = machine.place(device)
    model = load(args.weights, device, args.precision or machine.default_precision(device))
    adapters = [adapter_file.read_adapter(path, model.unet) for path in args.adapter]
    s, clip = settle(args, model, adapters)
    second = load_refiner(s, model) if s.refine else None
    first = process == 0
    if first:
        print("settings:", json.dumps(asdict(s), ensure_ascii=False), flush=True)

    # The base inverts before the motion is in the weights.
    path = invert_clip(s, model, clip) if s.inverts == "base" else None
    for scale, change in zip(s.scale, adapter_file.apply_adapters(model, adapters, s.scale)):
        if first:
            print("{}: {} layers change by ‖ΔW‖/‖W‖ = {:.3g}".format(*change), f"(scale {scale:g})")
    if args.save and first:
        save_merged(args.save, model, s.weights)
    model.store_frozen({name for adapter in adapters for name in adapter.tensors})
    path = invert_clip(s, model, clip) if path is None else path

    jobs, sheet = s.jobs(), {}
    names = [sets.video_name(i // s.seeds, *job) for i, job in enumerate(jobs)]
    listed = asdict(s) | {"videos": [(name, *job) for name, job in zip(names, jobs)]}
    out = machine.agreed(sets.begin(args.out, args.overwrite, listed) if jobs and first else None)
    mine = range(process, len(jobs), processes)
    for number, video in zip(mine, sample(s, model, clip, path, [jobs[n] for n in mine])):
        if second:  # one by one: its pictures are large
            video = refine(s.refine, second, video, *jobs[number], s.negative)
        sets.check(out)
        media.write_video(out / names[number], video, s.fps)
        sheet[number] = media.every_nth(video)
        print(f"{out / names[number]}: {jobs[number][0]}", flush=True)
    if sheet := machine.gather(sheet):
        media.contact_sheet(out / "sheet.png", [sheet[number] for number in sorted(sheet)])
        print(f"contact sheet: {out / 'sheet.png'}")


def invert_clip(s, model, clip):
    """{timestep: latents (1, C, F, h, w)} of the inverted clip: at the last, where samples start
    from, and, for DMT, at those where its features are read. {} where they start from noise."""
    if s.init == "noise" or not s.prompts:
        return {}
    path, last = {}, model.schedule.timesteps(s.inversion_steps)[0]
    keep = dmt.inversion_levels(s, model) if s.init == "dmt" else {last}

    def on_step(t, x):
        if t in keep:
            path[t] = x

    sampler.invert(model, clip, s.inversion_steps, s.inversion_prompt, on_step, "inverting")
    return path


def sample(s, model, clip, path, jobs):
    """Yields the video (3, F, H, W) of every job, (prompt, seed)."""
    if s.init == "dmt":
        model.unet.checkpointing = s.checkpointing
        for prompt, seed in jobs:
            yield dmt.transfer_motion(s, model, clip, path, prompt, seed)
        return
    factor = model.vae.config.factor
    shape = model.unet.config.in_channels, s.frames, s.height // factor, s.width // factor
    start = videos.starts(shape, path[max(path)] if path else None, s.noise_prior)
    made = videos.make_videos(model, jobs, start, steps=s.steps, guidance=s.guidance,
                              method=s.sampler, negative=s.negative, batch=s.batch)
    for _, video in made:
        yield video


def save_merged(path, model, weights):
    """Keep a merged model: as a folder in the hub's layout, or as ModelScope's own .pth."""
    from support import formats  # needed here alone

    if path.suffix == ".pth":
        formats.save_pth(model.unet, path)
    else:
        formats.save_hub(model, path, weights or TINY)
    print(f"merged model: {path}")


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
    add("--style", type=str, help="words to end every prompt with: 'in watercolour'")
    add("--seed", type=whole(0, 2**63), default=0, help="first seed (default: 0)")
    add("--seeds", type=whole(1, 10**6), default=1, help="videos a prompt, from --seed on "
        "(default: 1)")
    # the model
    add("--adapter", type=Path, nargs="+", default=[], help="what was learned: files that train.py "
        "wrote, or other programs' LoRAs; of several, the first gives the clip")
    add("--scale", type=real(-100, 100), nargs="+", help="strength of each adapter; 0 is the base "
        "model (default: 1)")
    add("--weights", type=Path, help="base model, a hub-layout folder (default: the tiny model)")
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 where the hardware has it")
    # the shape
    add("--frames", type=whole(1, 1024), help="frames (default: the clip's, else 16; "
        "with --dmt 24)")
    add("--size", type=read_size, help="pixels, WIDTHxHEIGHT (default: the clip's, else the "
        "model's; with --dmt 576x320)")
    add("--fps", type=real(0.01, 1000), help="frames a second (default: the clip's, else 8)")
    # the start
    add("--init", choices=("inverted", "noise"),
        help="start from the inverted clip, or from noise (default: as the adapter's method)")
    add("--init-video", type=Path, help="invert this clip instead of the adapter's")
    add("--noise-prior", type=real(0, 1), help="p in the start √p·inverted + √(1-p)·noise "
        "(default: the method's: VMC 1, MotionDirector 0.5, NewMove 0)")
    add("--inversion-steps", type=whole(1), help="steps of the inversion (default: --steps, else "
        "the method's; with --dmt one a timestep, and with the tiny model as many as --steps)")
    # sampling
    add("--sampler", choices=tuple(sampler.SAMPLERS), help="default: the method's, else ddim")
    add("--steps", type=whole(1), help="sampling steps (default: the method's, else 50)")
    add("--guidance", type=real(0, 1000), help="classifier-free guidance (default: the method's, "
        "else 9, with --dmt 10; tiny model: 4)")
    add("--batch", type=whole(1), help="videos at a time on a GPU (default: 1); a CPU makes one by "
        "one, which costs it nothing")
    # Diffusion Motion Transfer
    add("--dmt", type=Path, help="move as this clip does, by guidance, without training")
    add("--dmt-prompt", type=some_text, help="its caption (default: its own .txt, else its name)")
    add("--checkpointing", choices=("on", "off"), help="compute activations again instead of "
        "keeping them: less memory, a third more time (default: on with --weights)")
    # a second model over the first one's videos, as ZeroScope XL
    add("--refine", type=Path, help="its hub-layout folder")
    add("--refine-size", type=read_size, help="pixels, WIDTHxHEIGHT (default: as made)")
    add("--refine-steps", type=whole(1), help="its sampling steps (default: 50)")
    add("--refine-guidance", type=real(0, 1000), help="default: 15; tiny model: 4")
    add("--strength", type=real(0, 1), help="how much it may change, 0 to 1 (default: 0.6)")
    # what is kept
    add("--save", type=Path, help="keep the merged model: a folder in the hub's layout, or a .pth "
        "in ModelScope's")
    add("--out", type=Path, default=Path("out/generated"), help="folder (default: out/generated; "
        "numbered where a set is there)")
    add("--overwrite", action="store_true", help="replace the set in --out")
    return parser.parse_args(argv)


# Flags that mean something beside another one alone, and flags that exclude each other.
NEEDS = {"adapter": ("scale", "save"), "dmt": ("dmt_prompt", "checkpointing"),
         "refine": ("refine_size", "refine_steps", "refine_guidance", "strength")}
EXCLUDES = {"dmt": ("init", "init_video", "noise_prior", "sampler"), "prompt": ("prompts",)}


def check(args):
    """Raises BadInput for flags that do not go together, and for what is not where they say."""
    flag = lambda name: "--" + name.replace("_", "-")
    given = {name for name, value in vars(args).items() if value not in (None, [], False)}
    given |= {name for name in ("strength", "noise_prior") if getattr(args, name) == 0}
    for one, others in NEEDS.items():
        for other in others:
            if other in given and one not in given:
                raise BadInput(f"{flag(other)} needs {flag(one)}.")
    for one, others in EXCLUDES.items():
        for other in others:
            if one in given and other in given:
                raise BadInput(f"{flag(one)} and {flag(other)} exclude each other.")
    if args.init == "noise" and given & {"noise_prior", "init_video"}:
        raise BadInput("--init noise uses no clip; leave --noise-prior and --init-video out.")
    if args.noise_prior == 0 and (args.init or args.init_video):
        raise BadInput("--noise-prior 0 starts from noise; leave --init and --init-video out.")
    if args.scale and len(args.scale) not in (1, len(args.adapter)):
        raise BadInput(f"--scale: {len(args.scale)} numbers for {len(args.adapter)} --adapter; "
                       "give one for each.")
    check_weights(args.weights)
    check_weights(args.refine, "--refine")
    for path in args.adapter:
        check_there(re.sub(r"#\d+$", "", str(path)), "give a file that train.py wrote, or a LoRA")
    for clip in filter(None, (args.dmt, args.init_video)):
        check_there(clip, "give a video file or a folder of pictures")
    if args.save:
        check_folder_out(args.save.parent, "--save")
        if args.save.exists() or args.save.suffix in (".safetensors", ".pt", ".bin", ".ckpt"):
            raise BadInput(f"--save {args.save}: wanted the name of a new folder, or of a .pth.")
    if not (args.prompt or args.prompts or args.save):
        raise BadInput("give --prompt \"…\" or --prompts FILE.")
    prompts.read_prompts(args.prompt, args.prompts, args.style)
    sets.find_folder(args.out, args.overwrite)


# ------------------------------------------------------------------------------------------------
# The settings


@dataclass(frozen=True)
class Refining:
    """What the second model does: `strength` of the way to noise, and back."""

    weights: str
    height: int
    width: int
    strength: float
    steps: int
    guidance: float


@dataclass(frozen=True)
class Settings:
    """All that a set of videos depends on: worked out once, printed, and saved as settings.json."""

    prompts: list
    negative: str
    seed: int
    seeds: int
    adapter: list
    scale: list
    weights: str | None  # None: the tiny model
    device: str
    precision: str
    frames: int
    height: int
    width: int
    fps: float
    init: str  # where sampling starts: at noise, at the inverted clip, or as DMT does
    clip: str | None  # what is inverted
    noise_prior: float
    inverts: str  # the model that inverts: the base, or as it was tuned
    inversion_steps: int
    inversion_prompt: str
    sampler: str
    steps: int
    guidance: float
    steps_trained: int | None  # of the adapter
    batch: int
    checkpointing: bool
    refine: Refining | None

    def jobs(self):
        """(prompt, seed) of every video."""
        seeds = range(self.seed, self.seed + self.seeds)
        return list(itertools.product(self.prompts, seeds))


def settle(args, model, adapters):
    """The Settings, and the clip that gives the start or the motion as clean latents
    (1, C, F, h, w), or None. Raises BadInput for what the model or the adapters cannot do."""
    for adapter in adapters:
        adapter_file.check_fit(model, adapter)
    tiny, source = is_tiny(args.weights), next((a for a in adapters if a.latents is not None), None)
    v = choose_values(args, model, adapters, source)
    v["init"], v["noise_prior"] = choose_start(args, v["noise_prior"], source)
    check_sampling(v, model)
    clip, v["clip"] = read_clip(args, v, model, source)
    v["frames"] = v["frames"] if clip is None else clip.shape[2]
    v["height"], v["width"] = v.pop("size")
    scale = args.scale or [1.0]
    # On a CPU several at a time take as long as one by one, and each would depend on the others in
    # its last bits.
    on_cpu = torch.device(model.device).type == "cpu"
    if on_cpu and args.batch and args.batch > 1:
        say(f"note: --batch {args.batch}: a CPU makes one by one, which takes it no longer")
    recompute = (args.checkpointing or ("off" if tiny else "on")) == "on"
    s = Settings(
        prompts=prompts.read_prompts(args.prompt, args.prompts, args.style), seed=args.seed,
        seeds=args.seeds, adapter=[str(path) for path in args.adapter],
        scale=scale * len(adapters) if len(scale) == 1 else scale,
        weights=str(args.weights) if args.weights else None, device=model.device,
        precision=model.precision, batch=1 if on_cpu else args.batch or 1,
        inversion_prompt=data.find_caption(args.dmt, args.dmt_prompt)[0] if args.dmt else "",
        checkpointing=bool(args.dmt) and recompute, refine=settle_refining(args, v), **v)
    check_prompts(s, adapters, tiny)
    return s, clip


def check_prompts(s, adapters, tiny):
    """Raises BadInput for a prompt that is too long; says what the tiny model cannot read."""
    learned, taught = {}, []
    for adapter in adapters:
        learned |= {word: len(vectors) for word, vectors in adapter.words.items()}
        taught += [adapter.meta.get("prompt", ""), *adapter.words]
    for prompt in (*s.prompts, s.negative):
        data.check_prompt(prompt, learned)
    if tiny:
        prompts.explain_strange_words(" ".join(s.prompts), " ".join(taught))


def choose_values(args, model, adapters, source):
    """{name of a setting: its value}: of the flags, else of the first adapter that has a clip (or
    the first), else the default."""
    tiny, factor = is_tiny(args.weights), model.vae.config.factor
    side = model.unet.config.sample_size * factor
    v = {"negative": "", "frames": 16, "size": (side, side), "fps": 8.0, "noise_prior": 0.0,
         "inverts": "tuned", "inversion_steps": 0, "sampler": "ddim", "steps": 50,
         "steps_trained": None, "guidance": 4.0 if tiny else 9.0}
    first = source or next(iter(adapters), None)
    if first and first.meta.get("format") == adapter_file.FORMAT:  # others may mean something else
        story = videos.read_story(first)
        story |= {"steps": story["sampling_steps"], "steps_trained": story["step"]}
        v |= {name: value for name, value in story.items() if name in v}
    if args.dmt:
        v |= dmt.defaults(model.schedule.num_train_timesteps, tiny)
    elif args.steps:  # the method's steps of inversion belong to its steps of sampling
        v["inversion_steps"] = 0
    if source:
        _, frames, h, w = source.latents.shape
        v |= {"frames": frames, "size": (h * factor, w * factor)}
    else:
        v["noise_prior"] = 0.0
    for name in v:
        given = getattr(args, name, None)
        v[name] = v[name] if given is None else given
    v["inversion_steps"] = v["inversion_steps"] or v["steps"]
    return v


def choose_start(args, noise_prior, source):
    """Where samples start, and p in √p·inverted + √(1−p)·noise. Raises BadInput for what has no
    clip."""
    if args.dmt:
        return "dmt", 0.0
    asked = args.init == "inverted" or args.init_video
    noise_prior = noise_prior or (1.0 if asked else 0.0)
    init = args.init or ("inverted" if noise_prior else "noise")
    if init == "noise" and args.inversion_steps:
        raise BadInput("--inversion-steps: nothing is inverted here; leave it out.")
    if init == "inverted" and not (source or args.init_video):
        flag = "--noise-prior" if args.noise_prior else "--init inverted"
        raise BadInput(f"{flag} has no clip to invert; give --adapter or --init-video.")
    return init, noise_prior if init == "inverted" else 0.0


def check_sampling(v, model):
    """Raises BadInput for steps and sizes that the model does not have, and for a sampler that
    would not come back to the clip."""
    S, factor = model.schedule, model.vae.config.factor
    sampler.check_steps(S, v["steps"])
    if v["init"] != "noise" and v["inversion_steps"] != v["steps"]:
        sampler.check_steps(S, v["inversion_steps"], "--inversion-steps")
    if any(side % factor for side in v["size"]):
        raise BadInput(f"--size {v['size'][1]}x{v['size'][0]}: wanted multiples of {factor}.")
    if v["init"] == "inverted":
        sampler.check_return(S, v["sampler"], v["steps"])


def read_clip(args, v, model, source):
    """The clip to invert as clean latents (1, C, F, h, w), and where it is from; or None, None."""
    if v["init"] == "noise":
        return None, None
    if path := args.dmt or args.init_video:
        video = media.read_video(path, v["frames"], v["size"], v["fps"])
        # DMT's code takes a sample of the VAE's posterior.
        g = sampler.generator(args.seed, 5) if args.dmt else None
        return model.encode(video[None], g), str(path)
    factor, (_, frames, h, w) = model.vae.config.factor, source.latents.shape
    if (frames, (h * factor, w * factor)) != (v["frames"], tuple(v["size"])):
        raise BadInput(f"{source.path} has a clip of {frames} frames of {w * factor}x{h * factor}, "
                       "which cannot start others; leave --frames and --size out, or give "
                       "--init-video or --init noise.")
    return source.latents[None].to(model.device).float(), str(source.path)


def settle_refining(args, v):
    """The second model's settings, or None."""
    if not args.refine:
        return None
    height, width = args.refine_size or (v["height"], v["width"])
    guidance = 4.0 if is_tiny(args.refine) else 15.0
    return Refining(str(args.refine), height, width,
                    0.6 if args.strength is None else args.strength, args.refine_steps or 50,
                    guidance if args.refine_guidance is None else args.refine_guidance)


# ------------------------------------------------------------------------------------------------
# Refining


def load_refiner(s, first):
    """The second model, for `refine`. Raises BadInput when its numbers make no sense."""
    r = s.refine
    model = load(r.weights, s.device, s.precision, keep=())
    if model.text.config.hidden_size == first.text.config.hidden_size:
        model.text.learned = first.text.learned
    sampler.check_steps(model.schedule, r.steps, "--refine-steps")
    factor = model.vae.config.factor
    if r.height % factor or r.width % factor:
        raise BadInput(f"--refine-size {r.width}x{r.height}: wanted multiples of {factor}.")
    return model


@torch.no_grad()
def refine(r, model, video, prompt, seed, negative=""):
    """Video to video (SDEdit, Meng et al. 2021, as ZeroScope XL is used): resize, encode (a sample
    of the posterior, as the public pipeline takes), noise to `strength` of the way, and denoise
    with the same prompt. (3, F, H, W) -> (3, F, H', W')."""
    pictures = F.interpolate(video.transpose(0, 1), (r.height, r.width), mode="bicubic",
                             antialias=True).clamp(-1, 1)
    x0 = model.encode(pictures.transpose(0, 1)[None], sampler.generator(seed, 2))
    run = min(int(r.steps * r.strength), r.steps)  # of the steps, the last so many
    if run == 0:
        return model.decode(x0)[0]
    noise = sampler.noise_like_shape(x0.shape[1:], [sampler.generator(seed, 3)]).to(x0)
    start = model.schedule.add_noise(x0, noise, model.schedule.timesteps(r.steps)[-run])
    return sampler.sample(model, [prompt], start, [seed], r.steps, r.guidance, negative=negative,
                          progress="refining", skip=r.steps - run)[0]


if __name__ == "__main__":
    machine.run(main)
