"""Teach the model the motion of a clip.

    python train.py --method vmc --video clip.mp4

Each method is a few lines of data in METHODS: which layers learn, what is minimised, at which
timesteps, for how long. One loop runs them all. Writes out/<clip>-<method>/: args.json, log.jsonl,
samples/step-000000.mp4 … (reference | before | now), the adapter, and state.pt for --resume.

Axes: B clips, C channels, F frames, h w latent.
"""
import argparse
import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

import data
import generate
import lora
import losses
import model
import sampler
from model import BadInput

# ------------------------------------------------------------------------------------------------
# The methods


@dataclass
class Method:
    """A recipe: every field is a flag's default. `source` says where the numbers are from."""

    source: str
    layers: str  # a set of lora.LAYERS: what learns
    loss: str  # one of losses.LOSSES
    align: str = "epsilon"  # what the loss compares: the noise, or the clip ("x0")
    stride: int = 1  # frames between the two of a residual
    timesteps: str = "uniform"
    lr: float = 1e-4
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    steps: int = 400
    init: str = "inverted"  # where sampling starts
    sampling_steps: int = 75  # and inversion steps, when videos are made


METHODS = {
    # Only q, k, v of the temporal attentions learn, from the direction of the noise's residuals
    # between frames alone, so that what moves stays out of it (Jeong et al. 2023, Algorithm 1,
    # Eq. 17; steps, rate and decay from App. D; gradient clipping from the published code). Its
    # captions leave the appearance out (Sec. 3.2): "a bird is flying", with no forest.
    "vmc": Method("VMC, Eq. 17 and App. D", "temporal-attention-qkv", "residual-cosine"),
}
# What the tiny model does otherwise. It is hundreds of times smaller, and so wants larger steps and
# fewer of them; and its four temporal transformers alone cannot make a new motion, nor do errors of
# the noise say much on its schedule: see the README, "How well it works".
TINY = {"vmc": {"layers": "temporal", "align": "x0", "steps": 200, "lr": 1e-3,
                "sampling_steps": 20}}


# ------------------------------------------------------------------------------------------------
# Flags


def parse(argv=None):
    """The flags."""
    examples = """examples:
  python train.py --method vmc --video assets/hopping.mp4
  python train.py --method vmc --video clip.mp4 --prompt "a bird is flying" \\
      --weights zeroscope_v2_576w --width 576 --height 320 --frames 24
  python train.py --method vmc --video clip.mp4 --loss residual-l2 --stride 2 --steps 100
"""
    parser = argparse.ArgumentParser(description=__doc__, epilog=examples,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # what to learn
    add("--method", default="vmc", help=f"how to learn it: {', '.join(METHODS)} (default: vmc)")
    add("--video", type=Path, help="the clip: a video file, or a folder of numbered pictures")
    add("--prompt", help="its caption, without looks or place, as VMC advises: 'a bird is flying' "
        "(default: clip.txt beside it, else the file's name)")
    # the recipe; defaults are the method's
    add("--layers", help=f"what learns: {', '.join(lora.LAYERS)}, or a pattern (default: method's)")
    add("--loss", choices=tuple(losses.LOSSES), help="what is minimised (default: the method's)")
    add("--align", choices=("epsilon", "x0"),
        help="compare the noise or the denoised clip (default: the method's)")
    add("--stride", type=int, help="frame stride c of residuals (default: 1)")
    add("--timesteps", choices=("uniform", "coarse"), help="distribution (default: the method's)")
    add("--steps", type=int, help="training steps (default: the method's)")
    add("--lr", type=float, help="AdamW's learning rate (default: the method's)")
    add("--weight-decay", type=float, help="AdamW's weight decay (default: 0.01)")
    add("--clip-grad", type=float, help="longest gradient (default: 1)")
    add("--sampling-steps", type=int, help="steps for generate.py to take (default: the method's)")
    add("--seed", type=int, default=0, help="of every random draw (default: 0)")
    # the clip's shape
    add("--frames", type=int, default=16, help="frames to learn from (default: 16)")
    add("--width", type=int, help="pixels (default: sample_size of the model's config.json)")
    add("--height", type=int, help="pixels (default: the same)")
    add("--fps", type=float, default=8, help="frames a second, picked by time stamp (default: 8)")
    add("--start", type=float, default=0.0, help="seconds to skip (default: 0)")
    # the machine
    add("--weights", type=Path, help="base model, a hub-layout folder (default: the tiny model)")
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 where the hardware has it")
    add("--checkpointing", action="store_true", help="less memory for a third more time")
    # looking at it, and keeping it
    add("--preview-prompt", help="what the samples show (default: the caption)")
    add("--preview-every", type=int, default=100, help="steps between samples, or 0 (default: 100)")
    add("--preview-steps", type=int, default=30, help="sampling steps of a sample (default: 30)")
    add("--guidance", type=float, help="guidance of a sample (default: 9; tiny model: 4)")
    add("--save-every", type=int, default=100, help="steps between saved states (default: 100)")
    add("--out", type=Path, help="folder (default: out/<clip>-<method>)")
    add("--resume", action="store_true", help="go on from the last saved state in the folder")
    return parser.parse_args(argv)


def resolve(args):
    """Fill in the method's defaults; an explicit flag wins. Returns where each value came from."""
    if args.method not in METHODS:
        raise BadInput(f"--method {args.method!r} is unknown; choose from {', '.join(METHODS)}.")
    if args.video is None:
        raise BadInput("no clip to learn from; give --video clip.mp4, or a folder of pictures.")
    method, tiny = METHODS[args.method], TINY[args.method] if args.weights is None else {}
    source = {}
    for name in [f.name for f in fields(Method) if hasattr(args, f.name)]:
        if getattr(args, name) is not None:
            source[name] = "flag"
        else:
            source[name] = "tiny model's default" if name in tiny else method.source
            setattr(args, name, tiny.get(name, getattr(method, name)))
    if args.guidance is None:
        args.guidance = 4.0 if args.weights is None else 9.0
    generate.require(args, {
        "steps": 1, "frames": data.FEWEST_FRAMES, "stride": 1, "lr": 1e-12, "weight_decay": 0,
        "clip_grad": 1e-12, "fps": 0.01, "start": 0, "seed": 0, "width": 8, "height": 8,
        "preview_every": 0, "preview_steps": 1, "save_every": 1, "guidance": 0})
    args.out = args.out or Path("out") / f"{data.slug(args.video.stem)}-{args.method}"
    if args.resume and not (args.out / "state.pt").is_file():
        raise BadInput(f"{args.out / 'state.pt'} does not exist, so there is nothing to resume; "
                       "leave --resume out.")
    return source


# ------------------------------------------------------------------------------------------------
# One step


def draw(seed, step, shape, weights):
    """A step's timestep (1,) and noise (1, *shape), from (seed, step) alone: this is why a resumed
    run is the same run. Also seeds the temporal convolutions' dropout."""
    g = sampler.generator(seed, step)
    torch.manual_seed(int(torch.randint(2**62, (1,), generator=sampler.generator(seed, step, 1))))
    return sampler.draw_timesteps(weights, 1, g), torch.randn(1, *shape, generator=g)


def loss_at(parts, args, latents, text, step, weights):
    """The method's loss for one clip: (loss, timestep, what the loss does not see)."""
    S = parts.schedule
    t, noise = draw(args.seed, step, latents.shape[1:], weights)
    noise = noise.to(latents)
    x = S.add_noise(latents, noise, t)
    with generate.autocast(args.device, args.precision):
        prediction = parts.unet(x, t.to(args.device), text)
    a = S.at(t, x)
    x0, eps = S.split(prediction.float(), x, a)
    pair = (eps, noise) if args.align == "epsilon" else (x0, latents)
    loss = losses.LOSSES[args.loss](*pair, a.to(x), args.stride)
    return loss, t.item(), losses.unseen_by_cosine(eps, noise)


# ------------------------------------------------------------------------------------------------
# Saving, resuming, stopping


class Stop:
    """The first SIGINT or SIGTERM asks for a stop after the step; the second stops at once."""

    def __init__(self):
        self.signal = None
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.catch)

    def catch(self, number, frame):
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        data.say("\nstopping after this step; once more to stop at once")


def save(args, step, trained, optimizer, latents, meta):
    """The adapter for use and the state for --resume. Either is there whole or not at all."""
    path = args.out / f"{args.method}.safetensors"
    lora.save_adapter(path, trained, latents[0], **meta, step=step)
    data.room_for(args.out / "state.pt", 3 * sum(p.nbytes for p in trained.values()))
    with data.publish(args.out / "state.pt") as part:
        torch.save({"step": step, "run": identity(args, latents, meta), "args": saved_args(args),
                    "trained": {n: p.detach().cpu() for n, p in trained.items()},
                    "optimizer": optimizer.state_dict()}, part)


def identity(args, latents, meta):
    """What must not change under a resumed run's feet: the base model and the clip itself."""
    clip = hashlib.sha256(latents.cpu().numpy().tobytes()).hexdigest()[:12]
    return {"base model": meta["base"], "clip": clip}


def resume(args, trained, optimizer, latents, meta):
    """Put the last saved state back and return its step. BadInput when anything has changed."""
    path = args.out / "state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["args"] | state["run"]
    except Exception as error:  # pickle raises whatever a damaged file leads it to
        raise BadInput(f"{path} cannot be read ({type(error).__name__}); leave --resume out to "
                       "begin again.") from None
    free = {"steps", "resume", "preview_every", "preview_steps", "preview_prompt", "guidance",
            "save_every", "device", "out", "checkpointing"}
    now = saved_args(args) | identity(args, latents, meta)
    changed = [f"{k.replace('_', '-')} was {before.get(k)}, is {v}"
               for k, v in now.items() if k not in free and before.get(k) != v]
    if changed:
        raise BadInput(f"{args.out} was begun with other settings: {'; '.join(changed[:3])}. "
                       "Give the same ones, or another --out.")
    if state["step"] >= args.steps:
        raise BadInput(f"{args.out} is already at step {state['step']}; give more --steps.")
    for name, tensor in state["trained"].items():
        trained[name].data.copy_(tensor)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def saved_args(args):
    """The flags as JSON can hold them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def open_log(out, step):
    """The log, without lines that a resumed run will write again (the last may be cut short)."""
    path = out / "log.jsonl"
    lines = path.read_text().splitlines()[:step] if path.is_file() else []
    with data.publish(path) as part:
        part.write_text("".join(line + "\n" for line in lines))
    return path.open("a", buffering=1)


def clear(out):
    """Forget an earlier run in the folder, and what a killed one was writing."""
    for path in [*out.glob("*.safetensors"), *out.glob("state.pt"), *out.glob("log.jsonl"),
                 *out.glob("samples/step-*.mp4"), *out.rglob(data.PART + "*")]:
        path.unlink()


# ------------------------------------------------------------------------------------------------
# Looking


def preview(parts, args, latents):
    """One sample (3, F, H, W) of the preview prompt, from where the method starts sampling."""
    parts.unet.eval()
    if METHODS[args.method].init == "inverted":
        start = generate.invert(parts, latents, args.preview_steps, args.precision)
    else:
        start = sampler.noise_like_shape(latents.shape[1:], [args.seed])
    return generate.sample(parts, [args.preview_prompt], start, [args.seed], args.preview_steps,
                           args.guidance, precision=args.precision)[0]


# ------------------------------------------------------------------------------------------------
# The run


def prepare(args):
    """Load the model and the clip, and compute once all that is the same at every step.

    Returns the model's parts, the video (3, F, H, W), its latents (1, C, F, h, w), the caption's
    states (1, N, D) and where the caption is from.
    """
    caption, caption_source = data.find_caption(args.video, args.prompt)
    args.prompt = caption
    args.preview_prompt = data.check_prompt(args.preview_prompt or caption)
    parts = generate.load_base(args)
    generate.check_steps(parts.schedule, args.preview_steps, "preview-steps")
    generate.check_steps(parts.schedule, args.sampling_steps, "sampling-steps")
    factor = parts.vae.config.factor
    side = parts.unet.config.sample_size * factor
    args.width, args.height = args.width or side, args.height or side
    if args.width % factor or args.height % factor:
        raise BadInput(f"{args.width}×{args.height} pixels: wanted multiples of {factor}.")
    size = (args.height, args.width)
    video = data.read_video(args.video, args.frames, size, args.fps, args.start)
    if video.shape[1] <= args.stride:
        raise BadInput(f"--stride {args.stride}: wanted less than the clip's "
                       f"{video.shape[1]} frames.")
    with torch.no_grad():
        latents = parts.vae.encode_video(video[None].to(args.device))
        text = parts.text([caption]).float()
    return parts, video, latents, text, caption_source


def report(args, source, caption_source, parts, trained):
    """Say what trains, with which settings, and where each of them came from."""
    count = sum(p.numel() for p in trained.values())
    whole = sum(p.numel() for p in parts.unet.parameters())
    print(f"caption: {args.prompt!r} (from {caption_source})")
    print(f"training: {count:,} of {whole:,} parameters in {len(trained)} tensors")
    for kind, (tensors, numbers) in lora.groups(trained).items():
        print(f"  {kind}: {numbers:,} in {tensors}")
    for origin in dict.fromkeys(source.values()):
        mine = ", ".join(f"{k} {getattr(args, k)}" for k, v in source.items() if v == origin)
        print(f"settings ({origin}): {mine}")
    print(f"on: {args.width}×{args.height}, up to {args.frames} frames at {args.fps:g} fps, "
          f"{args.device}, {args.precision}, seed {args.seed}")


def main(argv=None):
    """One run of one method on one clip."""
    args = parse(argv)
    source = resolve(args)
    model.keep_memory()
    parts, video, latents, text, caption_source = prepare(args)
    meta = {"method": args.method, "base": lora.fingerprint(parts.unet), "prompt": args.prompt,
            "base_name": (args.weights or Path("tiny")).name, "seed": args.seed, "fps": args.fps,
            "layers": args.layers, "sampling_steps": args.sampling_steps}
    trained = lora.train_only(parts.unet, args.layers)
    generate.on_gpu(args, parts.unet, trained)
    parts.unet.checkpointing = args.checkpointing
    report(args, source, caption_source, parts, trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=args.weight_decay,
                                  betas=(0.9, 0.999), eps=1e-8, foreach=True)
    stop = Stop()
    # The untrained model's sample, drawn before a resumed run's weights are put back.
    before = preview(parts, args, latents) if args.preview_every else None
    first = resume(args, trained, optimizer, latents, meta) if args.resume else 0
    if not args.resume:
        clear(args.out)
    with data.publish(args.out / "args.json") as path:
        path.write_text(json.dumps(saved_args(args), indent=1))
    log = open_log(args.out, first)
    weights = sampler.timestep_weights(args.timesteps, parts.schedule.num_train_timesteps)
    bar = tqdm(initial=first, total=args.steps, desc=args.method)
    for step in range(first, args.steps + 1):
        # save, and look
        end = step == args.steps or stop.signal
        if end or (step % args.save_every == 0 and step > first):
            save(args, step, trained, optimizer, latents, meta)
        if args.preview_every and (step % args.preview_every == 0 or end) and not stop.signal:
            now = preview(parts, args, latents) if step else before
            row = torch.cat([video, before, now], dim=3)  # (3, F, H, 3·W)
            data.write_video(args.out / "samples" / f"step-{step:06d}.mp4", row, args.fps)
        if end:
            break
        # learn
        parts.unet.train()
        started = time.time()
        loss, t, unseen = loss_at(parts, args, latents, text, step, weights)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.clip_grad)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            sys.exit(f"error: loss {loss.item()}, gradient {norm.item()} at step {step}, timestep "
                     f"{t}, clip {args.video}; the last saved state is kept. Lower --lr, or give "
                     "--precision fp32.")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # log
        line = {"step": step, "loss": loss.item(), "t": t, "grad": norm.item()} | unseen
        log.write(json.dumps(line | {"seconds": round(time.time() - started, 4)}) + "\n")
        bar.set_postfix(loss=f"{line['loss']:.4f}")
        bar.update()
    bar.close()
    adapter = args.out / f"{args.method}.safetensors"
    if stop.signal and step < args.steps:
        print(f"stopped and saved at step {step}; add --resume to the same command to go on")
        sys.exit(128 + stop.signal)
    print(f"adapter: {adapter}\nsamples: {args.out / 'samples'}\n"
          f"next: python generate.py --adapter {adapter} --prompt \"…\"")


if __name__ == "__main__":
    generate.run(main)
