"""Teach the model the motion of a clip, or of several.

    python train.py --method vmc --video clip.mp4

METHODS holds nine recipes as plain data: what can learn, and stages made of passes. One loop runs
them all. Writes out/<clip>-<method>/: args.json, log.jsonl, samples/step-000000.mp4 … (reference |
before | now), the adapters, and state.pt for --resume.

Axes: B clips, C channels, F frames, h w latent, N text tokens, D text width.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import data
import eval
import generate
import lora
import losses
import model
import sampler
from model import BadInput

# ------------------------------------------------------------------------------------------------
# The methods


@dataclass(frozen=True)
class Part:
    """Something that can learn: a set of layers in full (rank 0), a LoRA beside them (rank > 0), or
    a word of the prompt (`vectors` > 0)."""

    layers: str = None  # one of lora.LAYERS, or a pattern
    rank: int = 0
    scale: float = 1.0
    dropout: float = 0.0  # of the LoRA's output
    per_clip: bool = False  # a LoRA of its own for every clip
    vectors: int = 0
    lr: float = 1e-4
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Pass:
    """A part of a step: what learns, from which view of which data, by which loss."""

    learns: tuple
    sees: str = "whole"  # one of data.VIEWS; a single frame goes past all temporal layers
    of: str = "clips"  # or "images", the subject's; or "prior", what shall not be forgotten
    says: str = "prompt"  # the caption: the clip's, or "look", that of its appearance alone
    beside: tuple = ()  # parts that act, and do not learn
    loss: str = "mse"  # one of losses.LOSSES
    align: str = "output"  # what it compares: what the network says (ε, or v), "epsilon", or "x0"
    stride: int = 1  # frames between the two of a residual
    beta: float = 1.0  # of MotionDirector's debiasing
    timesteps: str = "uniform"
    alpha: float = 0.5  # of the coarse distribution
    weight: float = 1.0
    chance: float = 1.0  # of being run at all; what it teaches does not act in a step without it


@dataclass(frozen=True)
class Stage:
    """Passes that share each of `steps` steps."""

    passes: tuple
    steps: int


@dataclass(frozen=True)
class Method:
    """A recipe. `source` says where its numbers are from."""

    source: str
    parts: dict
    stages: tuple
    clip_grad: float = 1.0
    word: str = None  # stands in the caption for what is learned
    prior: str = "none"  # "folder", "generated", or the tiny "world": where prior clips come from
    noise_prior: float = 0.0  # how much of the inverted clip sampling starts from
    inverts: str = "tuned"  # the model that inverts it: as it was tuned, or the "base"
    sampling_steps: int = 50
    sampling_guidance: float = 9.0


METHODS = {
    # Only q, k, v of the temporal attentions learn, from the direction of the noise's residuals
    # between frames alone, so that what moves stays out of it (Jeong et al. 2023, Algorithm 1,
    # Eq. 17; steps, rate and decay from App. D; gradient clipping from the published code). Its
    # captions leave the appearance out (Sec. 3.2): "a bird is flying", with no forest.
    "vmc": Method(
        "VMC, Eq. 17 and App. D",
        {"motion": Part("temporal-attention-qkv", lr=1e-4)},
        (Stage((Pass(("motion",), loss="residual-cosine"),), 400),),
        noise_prior=1.0, sampling_steps=75),
    # Two paths share a step's noise and timestep. A LoRA per clip learns its look from one frame,
    # without the temporal layers; beside it, frozen, a temporal LoRA learns the motion, with the
    # look pulled out of its loss (Zhao et al. 2023, Sec. 3.2 and 3.3, Eq. 5-7). Rank, rate,
    # dropout, no clipping and the skipped fifth of the spatial passes are the published code's.
    "motiondirector": Method(
        "MotionDirector, Eq. 5-7, and its code",
        {"look": Part("spatial-self-attention-ff", 32, dropout=0.1, per_clip=True, lr=5e-4),
         "motion": Part("temporal-attention-ff", 32, dropout=0.1, lr=5e-4)},
        (Stage((Pass(("look",), sees="frame", chance=0.8),
                Pass(("motion",), beside=("look",), loss="motiondirector")), 150),),
        clip_grad=math.inf, noise_prior=0.5, inverts="base", sampling_steps=30,
        sampling_guidance=12.0),
    # A motion becomes a rare word: the temporal layers and how frames read the text are tuned in
    # full, mostly at high noise, where motion is decided (Materzyńska et al. 2023, Sec. 3, Eq. 3);
    # clips of other motions, at half the weight, keep the model from forgetting (rate, weight and
    # clipping from the published code). With --images a subject learns too (its
    # supplement, "A X* man doing the V* sign").
    "newmove": Method(
        "NewMove, Sec. 3, and its code",
        {"motion": Part("temporal-and-cross-kv", lr=5e-6)},
        (Stage((Pass(("motion",), timesteps="coarse"),
                Pass(("motion",), of="prior", timesteps="coarse", weight=0.5)), 3000),),
        word="sks", prior="folder"),
    # First an appearance absorber on patches of single frames, then, beside it, a temporal LoRA,
    # which is all that is used in the end (Ren et al. 2024; ranks, scales and rates from
    # its supplement, which gives no steps: these are ours).
    "customize-a-video": Method(
        "Customize-A-Video, supplement",
        {"look": Part("spatial-attention", 1, scale=0.5, lr=5e-5),
         "look-word": Part(vectors=4, lr=5e-5),
         "motion": Part("temporal-attention", 4, lr=5e-4)},
        (Stage((Pass(("look", "look-word"), sees="crop", says="look"),), 200),
         Stage((Pass(("motion",), beside=("look", "look-word")),), 400))),
    # MotionDirector's baseline: all in one, by the plain loss ("coupled", Table 1).
    "lora": Method(
        "MotionDirector's coupled baseline",
        {"motion": Part("coupled", 32, dropout=0.1, lr=5e-4)},
        (Stage((Pass(("motion",)),), 150),), clip_grad=math.inf),
    # As NewMove's Sec. 4.1 adapts it: all spatial layers, and prior clips made by the base model
    # (Ruiz et al. 2022; rate and steps theirs).
    "dreambooth": Method(
        "DreamBooth, as NewMove adapts it",
        {"motion": Part("spatial", lr=5e-6)},
        (Stage((Pass(("motion",)), Pass(("motion",), of="prior")), 800),),
        word="sks", prior="generated"),
    # Keys and values of the cross-attention, and a word's vector, beside real prior clips (Kumari
    # et al. 2022; rate and steps theirs).
    "custom-diffusion": Method(
        "Custom Diffusion, as NewMove adapts it",
        {"motion": Part("cross-attention-kv", lr=1e-5), "word": Part(vectors=1, lr=1e-5)},
        (Stage((Pass(("motion", "word")), Pass(("motion",), of="prior", beside=("word",))), 500),),
        word="sks", prior="folder"),
    # One word's vector and nothing else (Gal et al. 2022; rate and steps theirs).
    "textual-inversion": Method(
        "Textual Inversion, as NewMove adapts it",
        {"word": Part(vectors=1, lr=5e-3)},
        (Stage((Pass(("word",)),), 3000),), word="sks"),
    # The spatial queries and the temporal attention, from the inverted clip (Wu et al. 2022, Sec.
    # 4.2; rate and steps theirs).
    "tune-a-video": Method(
        "Tune-A-Video, as NewMove adapts it",
        {"motion": Part("tune-a-video", lr=3e-5)},
        (Stage((Pass(("motion",)),), 500),), noise_prior=1.0, sampling_guidance=12.5),
}
# Where a recipe depends on what there is to learn from.
BY_DATA = {
    ("motiondirector", "several clips"): {"steps": 500, "weight_decay": 1e-4,
                                          "look_weight_decay": 1e-4, "noise_prior": 0.0},
    ("motiondirector", "pictures"): {"steps": 300, "look_weight_decay": 1e-4},
    ("newmove", "one clip"): {"steps": 1000},  # its supplement, Sec. 3
}
# What the tiny model does otherwise. It is hundreds of times smaller, and so wants larger steps and
# fewer of them; and its temporal attentions alone learn next to no motion, so that its temporal
# convolutions learn too.
TINY = {
    "vmc": {"layers": "temporal", "loss": "residual-cosine-mse", "align": "x0", "steps": 300,
            "augment": "recoloured", "lr": 1e-3, "sampling_steps": 20},
    "motiondirector": {"layers": "temporal-linears-convs", "lr": 3e-3, "look_lr": 3e-3},
    "newmove": {"steps": 300, "lr": 1e-3, "prior": "world"},
    "customize-a-video": {"layers": "temporal-linears-convs", "steps": 200, "first_steps": 100,
                          "lr": 3e-3, "look_lr": 1e-3},
    "lora": {"layers": "coupled-convs", "steps": 200, "lr": 3e-3},
    "dreambooth": {"steps": 200, "lr": 1e-4},
    "custom-diffusion": {"steps": 200, "lr": 1e-3, "word_lr": 1e-2, "prior": "world"},
    "textual-inversion": {"steps": 300, "lr": 1e-2},
    "tune-a-video": {"steps": 200, "lr": 1e-3},
}


# ------------------------------------------------------------------------------------------------
# Flags


EXAMPLES = """examples:
  python train.py --method vmc --video assets/eight.mp4
  python train.py --method motiondirector --video clips/ --prompt "a person is riding a bicycle" \\
      --weights zeroscope_v2_576w --width 384 --height 384
  python train.py --method newmove --video clip.mp4 --loss motiondirector --rank 32 --lr 5e-4
"""


def parse(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # what to learn
    add("--method", default="vmc", help=f"how to learn it: {', '.join(METHODS)} (default: vmc)")
    add("--video", type=Path, nargs="+", default=[], help="the clips: video files, folders of "
        "numbered pictures, or folders of clips")
    add("--prompt", nargs="+", help="a caption for all, or one a clip; as the papers advise, about "
        "the motion: 'a bird is flying' (default: the clip's own .txt, else its name)")
    add("--look-prompt", help="what is seen, without the motion, for the appearance (default: "
        "the caption)")
    add("--images", type=Path, nargs="+", default=[], help="a subject's pictures (newmove), or "
        "pictures alone (motiondirector)")
    add("--subject-prompt", help="the pictures' caption: 'a X* dog' (default: beside each picture)")
    add("--reverse", action="store_true", help="learn the motion backward")
    # the recipe; defaults are the method's. What learns the motion:
    add("--layers", help=f"what learns: {', '.join(lora.LAYERS)}, or a pattern")
    add("--rank", type=int, help="LoRA's rank; 0 tunes the layers in full")
    add("--lora-scale", type=float, help="LoRA's scale")
    add("--dropout", type=float, help="of the LoRA's output")
    add("--lr", type=float, help="AdamW's learning rate")
    add("--weight-decay", type=float, help="AdamW's weight decay")
    # by which passes:
    add("--loss", choices=tuple(losses.LOSSES), help="what is minimised")
    add("--align", choices=("output", "epsilon", "x0"), help="compare what the network says (the "
        "noise in ZeroScope, v in the tiny model), the noise, or the denoised clip")
    add("--stride", type=int, help="frame stride c of residuals")
    add("--beta", type=float, help="strength of MotionDirector's debiasing")
    add("--timesteps", choices=("uniform", "coarse"), help="distribution of the timesteps")
    add("--alpha", type=float, help="how coarse (NewMove's α), 0 to 1")
    add("--augment", choices=("none", "augmented", "recoloured"), help="show clips enlarged and "
        "tinted (newmove's default) or in random colours (the tiny vmc's; default: none)")
    # what learns the looks, and words:
    add("--look-layers", help="what learns the appearance")
    add("--look-rank", type=int, help="its LoRA's rank")
    add("--look-lr", type=float, help="its learning rate")
    add("--look-weight-decay", type=float, help="its weight decay")
    add("--absorber", help="customize-a-video's: lora, word, both, none, a LoRA file of another "
        "program, or the weights of an image UNet (default: lora)")
    add("--word", help="the word that stands for the motion in captions; '' for none")
    add("--train-word", action=argparse.BooleanOptionalAction, default=None, help="learn the "
        "word's vector too")
    add("--word-lr", type=float, help="its learning rate")
    add("--word-vectors", type=int, help="vectors of a learned word")
    add("--word-init", help="a known word to begin from (default: the word itself where it is a "
        "single token, else 'thing')")
    add("--subject-layers", help="what learns from --images in newmove (default: spatial)")
    add("--subject-word", help="the subject's word in its captions (default: X*)")
    # what shall not be forgotten:
    add("--prior", help="prior clips: a folder, 'generated' by the base model, the tiny 'world', "
        "or none")
    add("--prior-weight", type=float, help="weight of their loss")
    add("--prior-prompt", help="the caption of generated prior clips (default: the caption "
        "without the word)")
    add("--prior-clips", type=int, help="how many are made (default: 16; of the world: 64)")
    # how long:
    add("--steps", type=int, help="training steps; of the last stage, where there are two")
    add("--first-steps", type=int, help="training steps of the first of two stages")
    add("--clip-grad", type=float, help="longest gradient")
    add("--noise-prior", type=float, help="p in the start √p·inverted + √(1-p)·noise of samples")
    add("--sampling-steps", type=int, help="steps for generate.py to take")
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
    add("--batch", type=int, help="examples a step, over all processes (default: one each)")
    # looking at it, and keeping it
    add("--preview-prompt", help="what the samples show (default: the caption)")
    add("--preview-every", type=int, default=100, help="steps between samples, or 0 (default: 100)")
    add("--preview-steps", type=int, default=30, help="sampling steps of a sample (default: 30)")
    add("--guidance", type=float, help="of a sample (default: the method's; tiny model: 4)")
    add("--save-every", type=int, help="steps between saved states, and keep the adapter of each "
        "(default: 100, and keep the last alone)")
    add("--stop-at-appearance", type=float, help="stop where a sample's CLIP score with "
        "--look-prompt, looked at with each sample, falls to this (NewMove: 0.265)")
    add("--clip", help="the open_clip model of that score (default: the tiny CLIP)")
    add("--clip-weights", type=Path, help="its weights, a local file")
    add("--out", type=Path, help="folder (default: out/<clip>-<method>)")
    add("--resume", action="store_true", help="go on from the last saved state in the folder")
    return parser.parse_args(argv)


# flag -> field, of each kind of thing that a flag can change
PART_FLAGS = {"layers": "layers", "rank": "rank", "lora_scale": "scale", "dropout": "dropout",
              "lr": "lr", "weight_decay": "weight_decay"}
LOOK_FLAGS = {"look_layers": "layers", "look_rank": "rank", "look_lr": "lr",
              "look_weight_decay": "weight_decay"}
WORD_FLAGS = {"word_lr": "lr", "word_vectors": "vectors"}
PASS_FLAGS = dict.fromkeys(("loss", "align", "stride", "beta", "timesteps", "alpha"))
METHOD_FLAGS = dict.fromkeys(("clip_grad", "word", "noise_prior", "sampling_steps", "prior"))


def given(args, flags):
    """{field: value} of those of `flags` that were given."""
    values = {field or flag: getattr(args, flag) for flag, field in flags.items()}
    return {field: value for field, value in values.items() if value is not None}


def resolve(args):
    """The method, changed as the flags, the data or the tiny model say. Raises BadInput for flags
    that do not go with it. Returns it and {flag: value} of what the tiny model changed."""
    if args.method not in METHODS:
        raise BadInput(f"--method {args.method!r} is unknown; choose from {', '.join(METHODS)}.")
    if not args.video and not args.images:
        raise BadInput("no clip to learn from; give --video clip.mp4, or a folder of pictures.")
    asked = {k for k, v in vars(args).items() if v is not None and v is not False and v != []}
    generate.require(args, {
        "steps": 1, "first_steps": 1, "frames": data.FEWEST_FRAMES, "stride": 1, "lr": 1e-12,
        "look_lr": 0, "word_lr": 0, "weight_decay": 0, "look_weight_decay": 0, "rank": 0,
        "look_rank": 1, "word_vectors": 1, "lora_scale": 0, "dropout": (0, 0.99), "beta": 0,
        "alpha": (0, 1), "prior_weight": 0, "prior_clips": 1, "noise_prior": (0, 1),
        "clip_grad": 1e-12, "fps": 0.01, "start": 0, "seed": 0, "width": 8, "height": 8,
        "batch": 1, "preview_every": 0, "preview_steps": 1, "save_every": 1, "guidance": 0,
        "stop_at_appearance": (-1, 1)})
    clips = len(data.find_clips(args.video))
    kind = "pictures" if not clips else "one clip" if clips == 1 else "several clips"
    tiny = {} if args.weights else TINY.get(args.method, {})
    defaults = BY_DATA.get((args.method, kind), {}) | tiny
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    method = replace(METHODS[args.method], **given(args, METHOD_FLAGS))
    method = choose_parts(args, method)
    method = choose_passes(args, method)
    check_flags(args, method, asked)
    if args.guidance is None:
        args.guidance = method.sampling_guidance if args.weights else 4.0
    if not args.video:
        method = replace(method, noise_prior=0.0)
    args.augment = args.augment or ("augmented" if args.method == "newmove" else "none")
    if "subject" in method.parts:
        args.subject_word = args.subject_word or "X*"
    if method.prior in ("world", "generated"):
        args.prior_clips = args.prior_clips or (64 if method.prior == "world" else 16)
    first = (args.video or args.images)[0]
    args.out = args.out or Path("out") / f"{data.slug(first.stem)}-{args.method}"
    if args.resume and not (args.out / "state.pt").is_file():
        raise BadInput(f"{args.out / 'state.pt'} does not exist, so there is nothing to resume; "
                       "leave --resume out.")
    return method, {k: v for k, v in tiny.items() if k not in asked}


def choose_parts(args, method):
    """What learns, after the flags."""
    parts = dict(method.parts)
    if "look-word" in parts:  # an absorber of one kind or another, or both
        kinds = {"none": (), "word": ("look-word",), "both": ("look", "look-word")}
        keep = kinds.get(args.absorber, ("look",))
        parts = {n: p for n, p in parts.items() if not n.startswith("look") or n in keep}
    if args.train_word and "word" not in parts:
        parts["word"] = Part(vectors=1)
    if args.train_word is False:
        parts.pop("word", None)
    main = "motion" if "motion" in parts else "word"
    for name, flags in ((main, PART_FLAGS), ("look", LOOK_FLAGS)):
        if name in parts:
            parts[name] = replace(parts[name], **given(args, flags))
    if "look" in parts and not args.video:
        parts["look"] = replace(parts["look"], per_clip=False)
    if args.images and args.method == "newmove":  # a subject beside the motion
        layers = args.subject_layers or "spatial"
        parts["subject"] = replace(parts["motion"], layers=layers)
        parts["subject-word"] = Part(vectors=1)
    for name, p in parts.items():
        if p.vectors and name != main:  # words learn at the motion's rate, unless told otherwise
            rate = parts[main].lr if name not in METHODS[args.method].parts else p.lr
            parts[name] = replace(p, lr=rate)
        if p.vectors:
            parts[name] = replace(parts[name], **given(args, WORD_FLAGS))
    if "word" in parts and not method.word:
        raise BadInput("a word that learns needs a name; give --word sks.")
    return replace(method, parts=parts)


def borrowed(args):
    """Whether the absorber is a file, and so learns nothing."""
    return args.absorber not in (None, "lora", "word", "both", "none")


def choose_passes(args, method):
    """Stages and passes, after the flags and what there is to learn from."""
    changes, stages = given(args, PASS_FLAGS), []
    gone = {"look"} if borrowed(args) else set()
    for i, stage in enumerate(method.stages):
        passes = []
        for p in stage.passes:
            p = replace(p, learns=tuple(n for n in p.learns if n in method.parts and n not in gone),
                        beside=tuple(n for n in p.beside if n in method.parts))
            if p.of == "prior":
                p = p if args.prior_weight is None else replace(p, weight=args.prior_weight)
                p = replace(p, **{k: v for k, v in changes.items() if k in ("timesteps", "alpha")})
            elif p.says == "prompt" and p.sees == "whole":
                p = replace(p, **changes)
                if args.train_word:
                    p = replace(p, learns=tuple(dict.fromkeys((*p.learns, "word"))))
            if not args.video:  # pictures alone: what they look like
                p = replace(p, of="images", chance=1.0)
            if p.learns and (args.video or p.sees != "whole") and (
                    p.of != "prior" or method.prior != "none"):
                passes.append(p)
        last = i == len(method.stages) - 1
        if passes:
            stages.append(Stage(tuple(passes), (args.steps if last else args.first_steps)
                                or stage.steps))
    if not stages or not args.video and args.method != "motiondirector":
        raise BadInput(f"{args.method} learns nothing from pictures alone; give --video.")
    if "subject" in method.parts:  # the motion first, then both (NewMove's supplement, Sec. 2)
        subject = Pass(("subject", "subject-word"), sees="frame", of="images")
        both = Stage((*stages[-1].passes, subject), stages[-1].steps)
        stages = [replace(stages[-1], steps=args.first_steps or stages[-1].steps), both]
    used = {n for s in stages for p in s.passes for n in (*p.learns, *p.beside)}
    parts = {n: p for n, p in method.parts.items() if n in used}
    return replace(method, parts=parts, stages=tuple(stages))


def check_flags(args, method, asked):
    """Raises BadInput for a flag that was asked for and does nothing with this method."""
    parts, passes = method.parts, [p for s in method.stages for p in s.passes]
    motion = parts.get("motion", Part())
    has = {
        "a prior": any(p.of == "prior" for p in passes),
        "a generated prior": method.prior == "generated",
        "prior clips that are made": method.prior in ("generated", "world"),
        "whole clips to learn from": any(p.sees == "whole" and p.of == "clips" for p in passes),
        "an appearance to stop at": args.stop_at_appearance is not None,
        "an appearance of its own": "look" in parts and not borrowed(args),
        "an absorber": "look-word" in METHODS[args.method].parts,
        "layers that learn the motion": motion.layers is not None,
        "a LoRA": motion.rank > 0,
        "a word that learns": any(p.vectors for p in parts.values()),
        "pictures": bool(args.images) and ("subject" in parts or not args.video),
        "a subject": "subject" in parts,
        "coarse timesteps": any(p.timesteps == "coarse" for p in passes),
        "a debiased loss": any(p.loss in ("motiondirector", "appearance-debiased")
                               for p in passes),
        "residuals": any("residual" in p.loss for p in passes),
        "two stages": len(method.stages) > 1,
        "a caption of the looks": any(p.says == "look" for p in passes)
        or args.stop_at_appearance is not None,
    }
    needs = {
        "prior_weight": "a prior", "prior_prompt": "a generated prior",
        "prior_clips": "prior clips that are made",
        **dict.fromkeys(("loss", "align", "timesteps"), "whole clips to learn from"),
        "clip": "an appearance to stop at", "clip_weights": "an appearance to stop at",
        "look_layers": "an appearance of its own", "look_rank": "an appearance of its own",
        "look_lr": "an appearance of its own", "look_weight_decay": "an appearance of its own",
        "absorber": "an absorber", "layers": "layers that learn the motion",
        "rank": "layers that learn the motion", "lora_scale": "a LoRA", "dropout": "a LoRA",
        "word_lr": "a word that learns", "word_vectors": "a word that learns",
        "word_init": "a word that learns", "images": "pictures", "subject_prompt": "pictures",
        "subject_layers": "a subject", "subject_word": "a subject", "alpha": "coarse timesteps",
        "beta": "a debiased loss", "stride": "residuals", "first_steps": "two stages",
        "look_prompt": "a caption of the looks"}
    if args.prior not in (None, "none"):
        needs["prior"] = "a prior"
    if args.augment not in (None, "none"):
        needs["augment"] = "whole clips to learn from"
    for flag, need in needs.items():
        if flag in asked and not has[need]:
            raise BadInput(f"--{flag.replace('_', '-')} does nothing here: {args.method}, with "
                           f"these flags, has not {need}.")
        if not has[need] and flag not in ("images", "prior"):
            setattr(args, flag, None)  # a default that does nothing is not worth keeping
    if args.stop_at_appearance is not None and not (args.look_prompt and args.preview_every):
        raise BadInput("--stop-at-appearance looks at the samples; give --look-prompt (what is "
                       "seen, without the motion) and --preview-every.")


# ------------------------------------------------------------------------------------------------
# What learns, at run time. Each learner has .parameters() and .on; what is off does not act.


class Whole:
    """Layers tuned in full. They always act: there is nothing beside them."""

    def __init__(self, unet, layers):
        self.chosen, self.on = lora.select(unet, layers), True

    def parameters(self):
        return self.chosen


class Words:
    """A learned word's vectors, in the text encoder. They act where a caption has the word."""

    def __init__(self, text, word, vectors, init, seed):
        table, ids = text.tower.token_embedding.weight, model.words_to_ids(word)
        # A word that is a single token begins as what it is; a made-up one as `init` or a thing,
        # with a little noise that tells its vectors apart.
        known = ids if len(ids) == 1 and not init else model.words_to_ids(init or "thing")[:1]
        start = table[known].detach().float().expand(vectors, -1)
        noise = sampler.noise_like_shape(start.shape, [seed])[0].to(start) * table.std() * 0.1
        self.word, self.on = word, True
        self.vectors = nn.Parameter(start + noise * (vectors > 1))
        text.learned[word] = self.vectors

    def parameters(self):
        return {f"word.{self.word}": self.vectors}


class Borrowed:
    """An appearance that was not learned here: a LoRA file, or the weights of an image UNet, which
    take the place of the model's own while on."""

    def __init__(self, parts, path):
        adapter = lora.read_adapter(path, parts.unet)
        lora.check_fit(parts.unet, adapter)
        if adapter.words:
            raise BadInput(f"{path} holds words ({', '.join(adapter.words)}), which no caption "
                           "here has; learn the absorber here, or give a LoRA.")
        self.own, self._on = dict(parts.unet.named_parameters()), False
        self.swapped = {n: t.float() for n, t in adapter.tensors.items()}
        for site, (A, B) in adapter.pairs.items():
            name = f"{site}.weight"
            W = self.swapped.get(name, self.own[name].data)
            self.swapped[name] = W + lora.product(A, B, W)

    @property
    def on(self):
        return self._on

    @on.setter
    def on(self, on):
        if on != self._on:
            for name, tensor in self.swapped.items():
                p = self.own[name]
                p.data, self.swapped[name] = tensor.to(p), p.data
        self._on = on

    def parameters(self):
        return {}


def make_learners(args, method, parts, clips):
    """{part: its learners}: one each, or one a clip."""
    learners = {}
    for number, (name, p) in enumerate(method.parts.items()):
        seed = args.seed * 100 + number
        if name == "look" and borrowed(args):
            learners[name] = [Borrowed(parts, args.absorber)]
        elif p.vectors:
            word = {"word": method.word, "subject-word": args.subject_word}.get(name, "<look>")
            learners[name] = [Words(parts.text, word, p.vectors, args.word_init, seed)]
        elif p.rank:
            count = len(clips) if p.per_clip else 1
            learners[name] = [lora.LoRA(parts.unet, p.layers, p.rank, p.scale, p.dropout,
                                        seed + 1000 * i) for i in range(count)]
        else:
            learners[name] = [Whole(parts.unet, p.layers)]
    return learners


def named(learners):
    """{unique name: parameter} of all learners, in a fixed order. Layers that two parts tune in
    full are one and the same parameter."""
    out = {}
    for part, several in learners.items():
        for i, one in enumerate(several):
            prefix = "" if isinstance(one, (Whole, Words)) else f"{part}.{i}."
            out |= {prefix + n: p for n, p in one.parameters().items()}
    return out


def make_optimizer(method, learners):
    """AdamW with each part's own rate and decay."""
    seen, rows = set(), []
    for part, several in learners.items():
        mine = [p for one in several for p in one.parameters().values() if id(p) not in seen]
        seen |= {id(p) for p in mine}
        if mine:
            p = method.parts[part]
            rows.append({"params": mine, "lr": p.lr, "weight_decay": p.weight_decay})
    return torch.optim.AdamW(rows, betas=(0.9, 0.999), eps=1e-8, fused=True)


def switch(learners, learn=(), act=(), clip=0):
    """Let the parts in `learn` learn and act, those in `act` act, and all others rest."""
    for one in (one for several in learners.values() for one in several):
        one.on = False
        for p in one.parameters().values():
            p.requires_grad_(False)
    for name in (*act, *learn):
        several = learners.get(name, ())
        for one in several[clip : clip + 1] if len(several) > 1 else several:
            one.on = True
            for p in one.parameters().values():
                p.requires_grad_(name in learn)


# ------------------------------------------------------------------------------------------------
# One step


@dataclass
class Run:
    """All that a run works with, made once in `prepare`."""

    args: argparse.Namespace
    method: Method
    parts: model.Model
    clips: list
    images: list
    prior: list
    keep: bool = False  # the adapters of every saved step, not of the last alone
    learners: dict = field(default_factory=dict)
    states: dict = field(default_factory=dict)  # caption -> its states, while no word learns
    process: int = 0  # which of torchrun's processes this is, and of how many
    processes: int = 1
    through: Callable = lambda loss: loss()  # a loss's way: through DistributedDataParallel


def encode(run, video):
    """(3, F, H, W) -> scaled latents (1, C, F, h, w)."""
    with torch.no_grad():
        return run.parts.vae.encode_video(video[None].to(run.args.device)).float()


def read_caption(run, caption):
    """A caption's states (1, N, D), made once unless it holds a word that is learning."""
    learned = [v for w, v in run.parts.text.learned.items() if model.has_word(caption, w)]
    if any(v.requires_grad for v in learned):
        return run.parts.text([caption])
    if learned or caption not in run.states:
        with torch.no_grad():
            run.states[caption] = run.parts.text([caption]).float()
    return run.states[caption]


@dataclass
class Drawn:
    """What a pass took of one example: clean and noisy latents (1, C, F, h, w), and what belongs to
    them."""

    p: Pass
    example: int  # of the step
    clip: data.Clip
    index: int  # of the clip
    latents: torch.Tensor
    noise: torch.Tensor
    x: torch.Tensor
    t: torch.Tensor
    anchor: int  # frame
    seed: int  # of dropout, which draws from the global generator; in a batch, the first's


def draw(run, step, number, p, example):
    """The clip, timestep, noise and view of one pass on one example of a step."""
    args, S = run.args, run.parts.schedule
    # Passes over the same data share a step's clip, timestep and noise (MotionDirector's two paths
    # do); what else is random is the pass's own.
    source = {"clips": run.clips, "images": run.images, "prior": run.prior}[p.of]
    shared = sampler.generator(
        args.seed, step, example, ("clips", "images", "prior").index(p.of))
    own = sampler.generator(args.seed, step, example, 10 + number)
    seed = int(torch.randint(2**62, (), generator=own))
    index = int(torch.randint(len(source), (), generator=shared))
    clip = source[index]
    weights = sampler.timestep_weights(p.timesteps, S.num_train_timesteps, p.alpha)
    t = sampler.draw_timesteps(weights, 1, shared)
    noise = torch.randn(clip.latents.shape, generator=shared)
    altered = args.augment != "none" and p.sees == "whole" and p.of == "clips"
    view = args.augment if altered else p.sees
    latents, frames = data.VIEWS[view](clip, own, lambda video: encode(run, video))
    noise = noise[:, :, frames].to(latents)
    anchor = int(torch.randint(latents.shape[2], (), generator=own))
    x = S.add_noise(latents, noise, t)
    return Drawn(p, example, clip, index, latents, noise, x, t, anchor, seed)


def batches(run, drawn):
    """Lists of what was drawn, each to go through the network at once: an example's passes that
    teach the same parts, where the network's activations are small (NewMove's clip and its prior
    clip); where they are large, one by one."""
    config, parts = run.parts.unet.config, run.method.parts.values()

    def alike(d):
        if config.block_out_channels[0] * d.x[0, 0].numel() >= model.LARGE:
            return id(d)  # like nothing else
        look = d.index if any(p.per_clip for p in parts) else None
        return d.example, d.p.learns, d.p.beside, d.p.sees, d.x.shape, look

    return [list(group) for _, group in itertools.groupby(drawn, alike)]


def learn(run, drawn, off, last):
    """Forward and backward on what was drawn; gradients are exchanged between processes in the
    `last` of a step. Returns what the log says of each."""
    args, S, first = run.args, run.parts.schedule, drawn[0]
    torch.manual_seed(first.seed)
    switch(run.learners, first.p.learns, [n for n in first.p.beside if n not in off], first.index)
    seen = [{} for _ in drawn]

    def each_loss():
        text = torch.cat([read_caption(run, caption_of(run, d.p, d.clip)) for d in drawn])
        x, t = torch.cat([d.x for d in drawn]), torch.cat([d.t for d in drawn]).to(args.device)
        temporal = first.p.sees == "whole"  # single frames go past every temporal layer
        with generate.autocast(args.device, args.precision):
            predictions = run.parts.unet(x, t, text, temporal=temporal).float()
        return [loss_of(S, d, pred, more) for d, pred, more
                in zip(drawn, predictions.split(1), seen)]

    alone = run.processes == 1 or last
    with contextlib.nullcontext() if alone else run.through.no_sync():
        found = run.through(each_loss)
        share = run.processes / args.batch  # gradients are averaged over processes
        sum(share * d.p.weight * one for d, one in zip(drawn, found)).backward()
    return [{"loss": one.detach(), "weight": d.p.weight, "t": d.t.item(), "clip": str(d.clip.path)}
            | more for d, one, more in zip(drawn, found, seen)]


def loss_of(S, d, prediction, seen):
    """A pass's loss of what the network says, (1, C, F, h, w); `seen` takes what the log shows."""
    p, a = d.p, S.at(d.t, d.latents)
    x0, eps = S.split(prediction, d.x, a)
    pair = {"output": (prediction, S.target(d.latents, d.noise, d.t)), "epsilon": (eps, d.noise),
            "x0": (x0, d.latents)}[p.align]
    if "cosine" in p.loss:
        seen.update(losses.unseen_by_cosine(eps, d.noise))
    return losses.LOSSES[p.loss](
        *pair, a=a.to(d.x), stride=p.stride, anchor=d.anchor, beta=p.beta)


def advance(run, step, optimizer, trained):
    """One step of training: all passes of its stage, then the optimiser. Returns the log's line.
    Stops the program at a NaN, before it reaches the weights."""
    started, off, method = time.time(), set(), run.method
    run.parts.unet.train()
    passes = method.stages[stage_at(method, step)].passes
    mine = range(run.process, run.args.batch, run.processes)
    chances = [torch.rand((), generator=sampler.generator(run.args.seed, step, i))
               for i in range(len(passes))]
    for p, chance in zip(passes, chances):
        if chance >= p.chance:
            off.update(p.learns)  # left out, and what it teaches does not act in this step
    todo = batches(run, [draw(run, step, number, p, example) for example in mine
                         for number, (p, chance) in enumerate(zip(passes, chances))
                         if chance < p.chance])
    logs = [line for drawn in todo for line in learn(run, drawn, off, drawn is todo[-1])]
    norm = nn.utils.clip_grad_norm_(trained.values(), method.clip_grad).item()
    # Only here does the program wait for a GPU: the passes were queued one after the other.
    logs = [{k: v.item() if torch.is_tensor(v) else v for k, v in line.items()} for line in logs]
    loss = sum(line["weight"] * line["loss"] for line in logs) / len(mine)
    if not math.isfinite(loss + norm):
        where = "; ".join(f"timestep {line['t']}, clip {line['clip']}" for line in logs)
        sys.exit(f"error: loss {loss}, gradient {norm} at step {step}, {where}; the last saved "
                 "state is kept. Lower --lr, or give --precision fp32.")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"step": step, "loss": loss, "grad": norm, "passes": logs,
            "seconds": round(time.time() - started, 4)}


def caption_of(run, p, clip):
    """What a pass reads: the clip's caption, or its appearance's; with the absorber's word."""
    args = run.args
    caption = args.look_prompt if p.says == "look" and args.look_prompt else clip.prompt
    return f"{caption} <look>" if "look-word" in (*p.learns, *p.beside) else caption


def stage_at(method, step):
    """The index of the stage that a step belongs to."""
    for i, stage in enumerate(method.stages):
        if step < stage.steps:
            return i
        step -= stage.steps
    return i


# ------------------------------------------------------------------------------------------------
# Saving, resuming, stopping


class Shared(nn.Module):
    """What DistributedDataParallel wraps: the trained parameters, whose gradients it averages over
    torchrun's processes, with any passes' losses as the forward."""

    def __init__(self, trained):
        super().__init__()
        self.trained = nn.ParameterList(trained.values())

    def forward(self, loss):
        return loss()


def share(run, trained):
    """Under torchrun, learn together: each process has its own examples of a step."""
    if run.processes > 1:
        for p in trained.values():
            p.requires_grad_(True)
        run.through = nn.parallel.DistributedDataParallel(
            Shared(trained), find_unused_parameters=True)


class Stop:
    """The first SIGINT or SIGTERM asks for a stop after the step, in all processes; the second
    stops at once."""

    def __init__(self):
        self.signal = self.caught = None  # what all agree on, and what came here
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.catch)

    def catch(self, number, frame):
        if self.caught and "WORLD_SIZE" not in os.environ:  # torchrun passes signals on twice
            os._exit(128 + number)
        self.signal = self.caught = number
        data.say("\nstopping after this step; once more to stop at once")

    def agree(self, run):
        """Before a step: if one process was asked to stop, all were."""
        if run.processes > 1:
            asked = torch.tensor(self.signal or 0, device=run.args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.signal = asked.item() or None
        return self.signal


def save_adapters(run, folder, step, meta):
    """What was learned, in files for use: the motion in <method>.safetensors, and what is apart
    from it, an appearance, in <method>-look.safetensors (-look-2 … for more clips)."""
    args, learners, paths = run.args, run.learners, []
    of = lambda kind, looks: [one for part, several in learners.items() for one in several
                              if isinstance(one, kind) and part.startswith("look") == looks]
    whole = {n: p for one in of(Whole, False) for n, p in one.parameters().items()}
    clip = run.clips[0].latents[0] if run.clips else None
    files = [("", whole, of(lora.LoRA, False), of(Words, False), clip, meta)]
    looks, words = of(lora.LoRA, True), of(Words, True)
    for i in range(max(len(looks), len(words[:1]))):  # a look has no motion, and so no clip
        own = {"prompt": (run.clips or run.images)[i].prompt, "noise_prior": 0.0}
        suffix = f"-look-{i + 1}" if i else "-look"
        files.append((suffix, {}, looks[i : i + 1], words, None, meta | own))
    for suffix, tensors, loras, words, clip, meta in files:
        if loras or words or tensors:
            path = folder / f"{args.method}{suffix}.safetensors"
            rank = {"rank": next(iter(loras[0].pairs.values()))[0].shape[0]} if loras else {}
            lora.save_adapter(path, tensors, loras, {w.word: w.vectors for w in words}, clip,
                              **meta, **rank, step=step)
            paths.append(path)
    return paths


def save(run, step, optimizer, meta):
    """The adapters for use and the state for --resume. Either is there whole or not at all."""
    args, trained = run.args, named(run.learners)
    paths = save_adapters(run, args.out, step, meta)
    if run.keep:
        save_adapters(run, args.out / "steps" / f"{step:06d}", step, meta)
    data.room_for(args.out / "state.pt", 3 * sum(p.nbytes for p in trained.values()))
    with data.publish(args.out / "state.pt") as part:
        torch.save({"step": step, "run": identity(run, meta), "args": generate.plain(args),
                    "trained": {n: p.detach().cpu() for n, p in trained.items()},
                    "optimizer": optimizer.state_dict()}, part)
    return paths


def identity(run, meta):
    """What must not change under a resumed run's feet: base model, clips and captions."""
    digest = hashlib.sha256()
    for clip in (*run.clips, *run.images, *run.prior):
        digest.update(clip.video.numpy().tobytes() + clip.prompt.encode())
    return {"base model": meta["base"], "clip": digest.hexdigest()[:12]}


def resume(run, optimizer, meta):
    """Put the last saved state back and return its step. BadInput when anything has changed."""
    args, path = run.args, run.args.out / "state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["args"] | state["run"]
    except Exception as error:  # pickle raises whatever a damaged file leads it to
        raise BadInput(f"{path} cannot be read ({type(error).__name__}); leave --resume out to "
                       "begin again.") from None
    free = {"steps", "resume", "preview_every", "preview_steps", "preview_prompt", "guidance",
            "save_every", "device", "out", "checkpointing"}
    if "subject" in run.method.parts and args.first_steps is None:
        free.remove("steps")  # it would move the border between the stages
    now = generate.plain(args) | identity(run, meta)
    changed = [f"{k.replace('_', '-')} was {before.get(k)}, is {v}"
               for k, v in now.items() if k not in free and before.get(k) != v]
    if changed:
        raise BadInput(f"{args.out} was begun with other settings: {'; '.join(changed[:3])}. "
                       "Give the same ones, or another --out.")
    if state["step"] >= total_steps(run.method):
        raise BadInput(f"{args.out} is already at step {state['step']}; give more --steps.")
    trained = named(run.learners)
    for name, tensor in state["trained"].items():
        trained[name].data.copy_(tensor)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def total_steps(method):
    """Steps of all stages together."""
    return sum(stage.steps for stage in method.stages)


def open_log(out, step):
    """The log, without lines that a resumed run will write again (the last may be cut short)."""
    if out == Path(os.devnull):
        return out.open("w")
    path = out / "log.jsonl"
    lines = path.read_text().splitlines()[:step] if path.is_file() else []
    with data.publish(path) as part:
        part.write_text("".join(line + "\n" for line in lines))
    return path.open("a", buffering=1)


def clear(out):
    """Forget an earlier run in the folder, and what a killed one was writing."""
    if (out / "state.pt").is_file():
        data.say(f"replacing the earlier run in {out}; --out keeps both")
    adapters = [p for p in out.glob("*.safetensors") if p.name != "prior.safetensors"]
    for path in [*adapters, *out.glob("steps/*/*.safetensors"),
                 *out.glob("state.pt"), *out.glob("log.jsonl"), *out.glob("samples/step-*.mp4"),
                 *out.rglob(data.PART + "*")]:
        path.unlink()


# ------------------------------------------------------------------------------------------------
# Looking


def acting(method, stage):
    """The parts that act in a sample: all that is learned but appearances, which were there to be
    left out; they act where a stage, or the whole run, learns nothing else."""
    learned = {n for p in stage.passes for n in p.learns}
    motions = [n for n in method.parts if not n.startswith("look")]
    return motions if any(n in learned for n in motions) else list(learned)


@torch.no_grad()
def preview(run, stage):
    """One sample (3, F, H, W) of the preview prompt, from where the method starts sampling."""
    args, parts, act = run.args, run.parts, acting(run.method, stage)
    parts.unet.eval()
    prompt = args.preview_prompt + (" <look>" if "look-word" in act else "")
    like = (run.clips or run.images)[0].latents
    shape = like.shape[1], like.shape[2] if run.clips else args.frames, *like.shape[3:]
    start = sampler.noise_like_shape(shape, [args.seed]).to(args.device)
    switch(run.learners, act=act if run.method.inverts == "tuned" else ())
    if run.method.noise_prior:
        inverted = generate.invert(parts, like, args.preview_steps, args.precision)
        start = sampler.blend_noise(inverted, start, run.method.noise_prior)
    switch(run.learners, act=act)
    return generate.sample(parts, [prompt], start, [args.seed], args.preview_steps,
                           args.guidance, precision=args.precision)[0]


def looks_gone(args, video, step):
    """Whether a sample's appearance score has fallen to --stop-at-appearance (NewMove's supplement,
    Sec. 4): from there on, what is learned is the clip itself."""
    if args.stop_at_appearance is None or not step:
        return False
    score = eval.text_alignment(eval.load_clip(args.clip, args.clip_weights), video,
                                args.look_prompt)
    data.say(f"step {step}: appearance score {score:.3f}")
    return generate.agreed(score <= args.stop_at_appearance)


# ------------------------------------------------------------------------------------------------
# The run


def prepare(args, method):
    """Load the model and what there is to learn from, and compute once all that is the same at
    every step. Returns the Run, and where each clip's caption is from."""
    parts = generate.load_base(args)
    generate.check_steps(parts.schedule, args.preview_steps, "preview-steps")
    generate.check_steps(parts.schedule, method.sampling_steps, "sampling-steps")
    factor = parts.vae.config.factor
    side = parts.unet.config.sample_size * factor
    args.width, args.height = args.width or side, args.height or side
    generate.check_size(parts, args.width, args.height)
    if args.stop_at_appearance is not None:
        eval.load_clip(args.clip, args.clip_weights)  # is it there, and whole?
    clips, sources = read_clips(args, method)
    images = read_images(args)
    prompts = [c.prompt for c in clips or images]
    args.prompt = prompts if len(set(prompts)) > 1 else prompts[:1]
    args.preview_prompt = data.check_prompt(args.preview_prompt or args.prompt[0])
    run = Run(args, method, parts, clips, images, [], keep=args.save_every is not None)
    run.process, run.processes = generate.place(args)
    args.batch = args.batch or run.processes
    if args.batch % run.processes:
        raise BadInput(f"--batch {args.batch}: wanted a multiple of the {run.processes} processes.")
    for clip in (*clips, *images):
        clip.latents = encode(run, clip.video)
    run.prior = read_prior(run)
    if method.prior != "none" and not run.prior:
        data.say(f"warning: no prior clips: {args.method} forgets more without; give --prior "
                 "FOLDER, or --prior generated")
        stages = tuple(replace(s, passes=tuple(p for p in s.passes if p.of != "prior"))
                       for s in method.stages)
        run.method = replace(method, prior="none", stages=stages)
    args.save_every = args.save_every or 100
    run.learners = make_learners(args, run.method, parts, clips or images)
    return run, sources


def read_clips(args, method):
    """The clips with their captions, and where these are from. Raises BadInput."""
    paths, size = data.find_clips(args.video), (args.height, args.width)
    prompts = args.prompt or [None]
    if len(prompts) not in (1, len(paths)) and paths:
        raise BadInput(f"--prompt: {len(prompts)} captions for {len(paths)} clips; give one for "
                       "all, or one a clip.")
    clips, sources = [], []
    for i, path in enumerate(paths):
        caption, source = data.find_caption(path, prompts[i % len(prompts)])
        if method.word and not model.has_word(caption, method.word):
            caption, source = data.check_prompt(f"{caption} {method.word}"), f"{source}, and --word"
        video = data.read_video(path, args.frames, size, args.fps, args.start)
        stride = max((p.stride for s in method.stages for p in s.passes), default=1)
        if video.shape[1] <= stride:
            raise BadInput(f"--stride {stride}: wanted less than {path}'s {video.shape[1]} frames.")
        clips.append(data.Clip(video.flip(1) if args.reverse else video, caption, path))
        sources.append(source)
    return clips, sources


def read_images(args):
    """The subject's pictures (F = 1) with their captions."""
    images = []
    for path in data.find_pictures(args.images):
        prompt = args.subject_prompt or (args.prompt[0] if args.prompt and not args.video else None)
        caption, _ = data.find_caption(path, prompt)
        if args.method == "newmove" and not model.has_word(caption, args.subject_word):
            caption = data.check_prompt(f"{args.subject_word} {caption}")
        picture = data.fit(data.read_picture(path), (args.height, args.width))
        images.append(data.Clip(picture[:, None], caption, path))
    return images


def read_prior(run):
    """The prior clips, encoded: of a folder, of the tiny world, or made by the base model, which
    are kept beside the run, so that a resumed one need not make them again."""
    args, kind = run.args, run.method.prior
    if kind == "none" or kind == "folder" and args.prior is None:
        return []
    if kind == "world":
        from tiny import world  # only where it is asked for

        scenes = world.sample_scenes(args.prior_clips, sampler.generator(args.seed, 1, 1))
        videos = world.render(scenes, args.frames)
        made = zip(videos, world.captions(scenes))
        prior = [data.Clip(video, caption, Path("world")) for video, caption in made]
        if videos.shape[-2:] != (args.height, args.width):
            raise BadInput("--prior world is 64×64 pixels; leave --width and --height out.")
    elif kind == "generated":
        return generate_prior(run)
    else:
        prior = []
        for path in data.find_clips([Path(kind)]):
            video = data.read_video(path, args.frames, (args.height, args.width), args.fps)
            prior.append(data.Clip(video, data.find_caption(path)[0], path))
    for clip in prior:
        clip.latents = encode(run, clip.video)
    return prior


def generate_prior(run):
    """Clips of the caption without its word, by the untrained model (DreamBooth)."""
    args, path = run.args, run.args.out / "prior.safetensors"
    word = run.method.word or ""
    prompt = args.prior_prompt or " ".join(w for w in args.prompt[0].split() if w != word)
    prompt = data.check_prompt(prompt or "a video")
    if run.process == 0 and not (args.resume and path.is_file()):
        F, h, w = run.clips[0].latents.shape[2:]
        shape, made = (run.clips[0].latents.shape[1], F, h, w), []
        for seed in tqdm(range(args.prior_clips), desc="prior clips"):
            source = sampler.generator(args.seed, seed, 4)  # no start that --seed could name
            start = sampler.noise_like_shape(shape, [source]).to(args.device)
            video = generate.sample(run.parts, [prompt], start, [seed], args.preview_steps,
                                    args.guidance, precision=args.precision)[0]
            made.append(encode(run, video))
        with data.publish(path) as part:
            lora.save_file({f"{i}": x.cpu().contiguous() for i, x in enumerate(made)}, part)
    generate.agreed(path)  # the other processes wait for the first
    latents = model.read_tensors(path)
    return [data.Clip(torch.zeros(3, x.shape[2], 1, 1), prompt, path, x.to(args.device))
            for x in latents.values()]


def report(run, sources, tiny):
    """Say what trains, from what, with which settings, and where they came from."""
    args, method = run.args, run.method
    for clip, source in zip(run.clips, sources):
        print(f"clip: {clip.path}, {clip.video.shape[1]} frames, {clip.prompt!r} (from {source})")
    for clip in run.images:
        print(f"picture: {clip.path}, {clip.prompt!r}")
    if run.prior:
        print(f"prior: {len(run.prior)} clips ({method.prior}), such as {run.prior[0].prompt!r}")
    trained = named(run.learners)
    whole = sum(p.numel() for p in run.parts.unet.parameters())
    count = sum(p.numel() for p in trained.values())
    print(f"training: {count:,} parameters in {len(trained)} tensors (the UNet has {whole:,})")
    for part, several in run.learners.items():
        mine = {n: p for one in several for n, p in one.parameters().items()}
        numbers = sum(p.numel() for one in several for p in one.parameters().values())
        plain = {k: v for k, v in asdict(method.parts.get(part, Part())).items() if v}
        print(f"  {part}: {numbers:,} in {len(mine) * len(several)}: "
              + ", ".join(f"{k} {v}" for k, v in plain.items()))
        for kind, (tensors, count) in lora.groups(mine).items():
            print(f"    {kind}: {count:,} in {tensors}")
    for i, stage in enumerate(method.stages):
        print(f"stage {i + 1} of {len(method.stages)}: {stage.steps} steps of")
        for p in stage.passes:
            print(f"  {' and '.join(p.learns)} from {p.of} ({p.sees}): {p.loss} of {p.align}, "
                  f"timesteps {p.timesteps}, weight {p.weight:g}, chance {p.chance:g}"
                  + (f", beside {', '.join(p.beside)}" if p.beside else ""))
    print(f"settings: {method.source}"
          + (f"; tiny model's own: {', '.join(f'{k} {v}' for k, v in tiny.items())}" if tiny
             else ""))
    print(f"on: {args.width}×{args.height}, up to {args.frames} frames at {args.fps:g} fps, "
          f"{args.device}, {args.precision}, seed {args.seed}", flush=True)


def main(argv=None):
    """One run of one method."""
    args = parse(argv)
    method, tiny = resolve(args)
    model.keep_memory()
    run, sources = prepare(args, method)
    method, parts = run.method, run.parts
    meta = {"method": args.method, "base": lora.fingerprint(parts.unet), "prompt": args.prompt[0],
            "base_name": (args.weights or Path("tiny")).name, "seed": args.seed, "fps": args.fps,
            "sampling_steps": method.sampling_steps, "noise_prior": method.noise_prior,
            "inverts": method.inverts, "guidance": method.sampling_guidance}
    trained = named(run.learners)
    generate.store_frozen(args, parts.unet, trained)
    parts.unet.checkpointing = args.checkpointing
    if run.process == 0:
        report(run, sources, tiny)
    optimizer = make_optimizer(method, run.learners)
    share(run, trained)
    stop, last, writes = Stop(), total_steps(method), run.process == 0
    # The untrained model's sample, drawn before a resumed run's weights are put back.
    before = preview(run, method.stages[-1]) if args.preview_every else None
    first = resume(run, optimizer, meta) if args.resume else 0
    if writes:
        clear(args.out) if not args.resume else None
        with data.publish(args.out / "args.json") as path:
            path.write_text(json.dumps(generate.plain(args), indent=1))
    log = open_log(args.out if writes else Path(os.devnull), first)
    bar = tqdm(initial=first, total=last, desc=args.method, disable=not writes)
    for step in range(first, last + 1):
        stage = method.stages[stage_at(method, step)]
        # save, and look
        end = step == last or stop.agree(run)
        if writes and (end or (step % args.save_every == 0 and step > first)):
            paths = save(run, step, optimizer, meta)
        if args.preview_every and (step % args.preview_every == 0 or end) and not stop.signal:
            now = preview(run, stage) if step else before
            reference = (run.clips or run.images)[0].video.expand_as(now)
            row = torch.cat([reference, before, now], dim=3)  # (3, F, H, 3·W)
            if writes:
                data.write_video(args.out / "samples" / f"step-{step:06d}.mp4", row, args.fps)
            if looks_gone(args, now, step):
                paths, end = save(run, step, optimizer, meta) if writes else None, True
        if end:
            break
        line = advance(run, step, optimizer, trained)
        log.write(json.dumps(line) + "\n")
        bar.set_postfix(loss=f"{line['loss']:.4f}")
        bar.update()
    bar.close()
    if stop.signal and step < last:
        print(f"stopped and saved at step {step}; add --resume to the same command to go on")
        sys.exit(128 + stop.signal)
    if not writes:
        return
    for path in paths:
        print(f"adapter: {path}")
    if args.preview_every:
        print(f"samples: {args.out / 'samples'}")
    print(f"next: python generate.py --adapter {paths[0]} --prompt \"…\"")


if __name__ == "__main__":
    generate.run(main)
