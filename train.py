"""Fine-tune the model on the motion of one or more clips.

    python train.py --method vmc --video assets/eight.mp4
    python train.py --method motiondirector --video clips/ --weights zeroscope_v2_576w
    python train.py --method newmove --video clip.mp4 --prompt "a dog doing the sks" alpha=0
    python train.py --method newmove --help                 # the method's settings, name=value

In this order: the command line, preparation, the training loop, the nine methods, the Example that
they use, previews. Writes out/<clip>-<method>/: run.json, log.jsonl, adapters, state.safetensors
(for --resume), samples/step-000000.mp4 … (reference | base model | current).

Axes: B clips, C channels, F frames, h w latent, N text tokens, D text width.
"""
import math
import re
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import lora
import model
import sampler
from lora import PlaceholderToken, Trainable
from losses import LOSSES, appearance_debiased, mse, unseen_by_cosine
from support import adapters, machine, media, runs
from support.files import BadInput, log, output_folder, slug
from support.flags import Parser, existing, float_in, hub_folder, int_in, non_empty, read_size
from support.recipe import CHOICES, METHODS, Recipe, method, split_settings

CHOICES |= {"loss": LOSSES, "sampler": sampler.SAMPLERS, "augment": data.AUGMENTATIONS}


def main(argv=None):
    """One training run."""
    flags, recipe = parse(sys.argv[1:] if argv is None else argv)
    machine.tune_malloc()
    flags.device = machine.find_device(flags.device)
    rank, world_size = machine.init_distributed(flags.device)
    folder = output_folder, flags.out, flags.default_out, flags.resume
    with machine.on_rank_zero(*folder) as flags.out:
        run = prepare(flags, recipe, rank, world_size)
        optimizer = lora.build_optimizer(run.recipe.parts, run.trainables)
        before = preview(run) if flags.preview_every else None
        folder = runs.Folder(run, optimizer)  # restores the state of --resume
        step, signal = train(run, folder, optimizer, before)
        folder.finish(step, signal)
    if signal:
        sys.exit(128 + signal)


# --- The command line: flags that all methods share, and a method's settings, name=value --------


def parse(argv):
    """The flags, and the recipe with all its settings. Raises BadInput."""
    parser = Parser(description=__doc__, add_help=False)
    add_data_flags(parser.add_argument)
    add_training_flags(parser.add_argument)
    argv, settings = split_settings(argv, parser)
    flags = parser.parse_args(argv)
    if flags.help:
        method_given = any(a.startswith("--method") for a in argv)
        page = METHODS[flags.method].parser()
        page.epilog = "\n".join(overrides(flags.method))
        print((page if method_given else parser).format_help())
        sys.exit()
    return flags, resolve_settings(flags, settings)


def add_data_flags(add):
    """Flags for the method and its data."""
    add("--method", default="vmc", choices=METHODS, metavar="NAME", help="training method: "
        f"{', '.join(METHODS)} (default: vmc)")
    add("--video", type=existing, nargs="+", default=[], help="training clips: video files, "
        "folders of numbered images, or folders of clips")
    add("--prompt", type=non_empty, nargs="+", default=[], help="one caption for all clips, or one "
        "per clip. Describe the motion, 'a bird is flying', or use the token, 'a bird doing the "
        "sks' (default: the clip's .txt file, else its name)")
    add("--images", type=existing, nargs="+", default=[], help="images of a subject (newmove), or "
        "images alone (motiondirector)")
    add("--image-prompt", type=non_empty, help="caption of the images: 'a X* dog' (default: each "
        "image's .txt file, else its name)")
    add("--prior", type=non_empty, help="regularization clips: a folder, 'generated' by the base "
        "model, 'world' (from the tiny world), or 'none' (default: the method's)")
    add("--reverse", action="store_true", help="train on the reversed clips")
    add("--frames", type=int_in(4, 1024), help="frames (default: the method's; tiny model: 16)")
    add("--size", type=read_size, help="pixels, WIDTHxHEIGHT (default: the method's; tiny model: "
        "64x64)")
    add("--fps", type=float_in(0.01, 1000), help="frames per second: every n-th frame, or by time "
        "stamp (default: the method's; tiny model: 8)")
    add("--start", type=float_in(0, 1e6), default=0.0, help="seconds to skip (default: 0)")
    add("--allow-damaged", action="store_true", help="also train on damaged frames")


def add_training_flags(add):
    """Flags for training, previews and output."""
    add("--steps", type=int_in(1, 10**7), help="training steps (default: the method's)")
    add("--seed", type=int_in(0, 2**31), default=0, help="random seed (default: 0)")
    add("--batch", type=int_in(1, 4096), help="total batch size (default: one per process)")
    add("--weights", type=hub_folder, help="base model, a hub-layout folder (default: tiny model)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda or mps if available)")
    add("--precision", choices=machine.DTYPES, help="default: bf16 where the hardware has it, fp16 "
        "on older GPUs, else fp32")
    add("--checkpointing", choices=("auto", "on", "off"), default="auto", help="gradient "
        "checkpointing: half the memory, 1.5 to 3 times the time (default: auto, on if memory "
        "runs out)")
    add("--preview-prompt", type=non_empty, help="prompt of the previews (default: the caption)")
    add("--preview-every", type=int_in(0), default=100, help="steps between previews; 0 for none "
        "(default: 100)")
    add("--preview-steps", type=int_in(1, 1000), default=30, help="sampling steps (default: 30)")
    add("--save-every", type=int_in(0), default=0, help="also save the adapter every N steps")
    add("--out", type=Path, help="a new folder (default: out/<clip>-<method>, then -2, -3 …)")
    add("--resume", action="store_true", help="continue from the last saved state in the folder")
    add("-h", "--help", action="store_true", help="print this help; with --method, its settings")


def overrides(name):
    """["condition: settings"] under which a method's defaults differ from its decorator."""
    rows = [f"with {kind}: {line}" for (method, kind), line in BY_DATA.items() if method == name]
    if name in TINY:
        rows.append(f"with the tiny model (default): {TINY[name]}")
    return rows


def resolve_settings(flags, settings):
    """The recipe: the method's defaults, changed for the data, for the base model and by the user.
    Fills in the flags that depend on it. Raises BadInput."""
    if not flags.video and not flags.images:
        raise BadInput("no training data; give --video clip.mp4, or --images FOLDER.")
    recipe, clips = METHODS[flags.method], data.check_clips(flags.video, flags.prompt)
    images = media.find_images(flags.images)
    kind = data_kind(clips, images)
    by_data = BY_DATA.get((flags.method, kind))
    by_model = None if flags.weights else TINY.get(flags.method)
    flags.overrides = [line for line in (by_data, by_model) if line]
    steps = [] if flags.steps is None else [f"steps={flags.steps}"]
    recipe = recipe.override(*flags.overrides).apply_user(*settings, *steps)
    frames, *size = recipe.shape if flags.weights else (16, 64, 64)
    flags.frames, flags.size = flags.frames or frames, flags.size or tuple(size)
    fps = flags.fps or (recipe.fps if flags.weights else 8.0)
    flags.fps = min((media.frame_rate(clip, fps) for clip in clips), default=fps)
    flags.prior = flags.prior or recipe.own.get("prior")
    name = slug(data.clip_name((clips or flags.images)[0]))
    flags.default_out = Path("out") / f"{name}-{flags.method}"
    check_data(flags, recipe, kind, len(clips))
    return recipe


def data_kind(clips, images):
    """The kind of training data, as in BY_DATA."""
    if not clips:
        return "one image" if len(images) == 1 else "images"
    return ("one clip" if len(clips) == 1 else "several clips") + " and a subject" * bool(images)


def check_data(flags, recipe, kind, clips):
    """Raises BadInput for data that the method cannot use, and for settings that conflict."""
    least, most = recipe.clips
    if not least <= clips <= most:
        raise BadInput(f"--video: {clips} clips; {flags.method} requires "
                       f"{least if least == most else f'{least} to {most}'}.")
    if flags.images and (flags.method, kind) not in BY_DATA:
        raise BadInput(f"{flags.method} cannot be trained on {kind}; motiondirector trains on "
                       "images alone, newmove on images of a subject with clips of a motion.")
    if flags.images and not flags.video and len(flags.prompt) > 1:
        raise BadInput(f"--prompt: {len(flags.prompt)} captions for images; give one for all.")
    if "subject" in recipe.parts and bool(flags.images) != recipe.is_trainable("subject"):
        raise BadInput("a subject requires --images and subject.layers or "
                       "subject_word.num_vectors: give both, or neither.")
    if flags.prior not in (None, "none") and "prior" not in recipe.own:
        raise BadInput(f"--prior: {flags.method} uses no regularization clips; newmove, dreambooth "
                       "and custom-diffusion do.")
    if flags.prior not in (None, "none", "folder", "world", "generated"):
        existing(flags.prior)
    for name in ("subject_start", "absorber_steps"):
        second_stage = recipe.is_trainable("appearance", "subject")
        if second_stage and recipe.steps <= recipe.keywords.get(name, 0):
            log(f"warning: {name}={recipe.keywords[name]} with {recipe.steps} steps: the second "
                f"stage never starts; give more --steps, or a smaller {name}=")
    if recipe.own.get("appearance_stop") and not (flags.preview_prompt and flags.preview_every):
        raise BadInput("appearance_stop requires previews of another appearance: give "
                       "--preview-prompt and --preview-every.")


# --- Preparation --------------------------------------------------------------------------------


@dataclass
class Run:
    """Everything a training run needs, made once by `prepare`."""

    flags: object
    recipe: Recipe
    pipe: model.Pipeline
    clips: list
    images: list
    prior: list  # regularization clips
    sources: list  # origin of each clip's caption
    fingerprint: str  # of the base model
    trainables: dict = field(default_factory=dict)  # part -> [one trainable, or one per clip]
    trained: dict = field(default_factory=dict)  # name -> parameter, over all trainables
    base: model.Pipeline = None  # the frozen base model, loaded on first use
    inverted: torch.Tensor = None  # the first clip's inverted latents, for previews
    scorer: object = None  # the CLIP model for appearance_stop
    scaler: torch.amp.GradScaler = None  # loss scaling for fp16
    rank: int = 0
    world_size: int = 1
    batch: int = 1  # examples per step, over all processes


def prepare(flags, recipe, rank=0, world_size=1):
    """Load model and data; precompute everything that is constant across steps. Raises BadInput."""
    flags.device = machine.find_device(flags.device)
    flags.out = flags.out or flags.default_out
    precision = flags.precision or machine.default_precision(flags.device)
    keep = lora.FinetunedNames(recipe.parts)
    pipe = model.load(flags.weights, flags.device, precision, keep)
    flags.precision = pipe.precision
    check_schedule(recipe, pipe.schedule, flags.preview_steps)
    if any(side % pipe.vae.config.factor for side in flags.size):
        raise BadInput(f"--size: expected multiples of {pipe.vae.config.factor} pixels.")
    words = {n: p for n, p in recipe.parts.items() if isinstance(p, PlaceholderToken)}
    learned = {p.token: p.num_vectors for p in words.values() if p.num_vectors}
    token = lambda name: words[name].token if name in words else None
    clips, sources = data.load_clips(flags.video, flags.prompt, flags.frames, flags.size, flags.fps,
                                     flags.start, flags.reverse, token("word"), learned,
                                     allow_damaged=flags.allow_damaged)
    caption = flags.image_prompt or (flags.prompt[0] if flags.prompt and not clips else None)
    images = data.load_images(flags.images, caption, flags.size, token("subject_word"), learned)
    run = Run(flags, recipe, pipe, clips, images, [], sources, adapters.fingerprint(pipe))
    run.rank, run.world_size, run.batch = rank, world_size, flags.batch or world_size
    if run.batch % world_size:
        raise BadInput(f"--batch {flags.batch}: expected a multiple of the {world_size} processes.")
    stride, lengths = recipe.keywords.get("frame_stride", 0), [c.video.shape[1] for c in clips]
    if stride and stride >= min(lengths):
        raise BadInput(f"frame_stride={stride}: expected less than {min(lengths)}, the number of "
                       "frames.")
    flags.preview_prompt = flags.preview_prompt or (clips or images)[0].prompt
    endings = [p.token for n, p in words.items() if n.startswith("appearance") and p.num_vectors]
    others = [recipe.own.get("class_prompt") or "", *[c.prompt for c in clips]]
    for caption in (flags.preview_prompt, *others):
        data.check_prompt(" ".join([caption, *endings]), learned)
    if recipe.own.get("appearance_stop"):
        from scores.clip import load_clip  # imported only where needed

        run.scorer = load_clip(recipe.own["clip"], recipe.own["clip_weights"], flags.device)
    runs.check_settings(run)
    prepare_training(run)
    return run


def prepare_training(run):
    """Regularization clips, latents and trainables."""
    flags, recipe, pipe = run.flags, run.recipe, run.pipe
    run.prior = data.load_prior_clips(run)
    for number, clip in enumerate((*run.clips, *run.images, *run.prior)):
        # A posterior sample, drawn once, as in the published code.
        g = sampler.generator(flags.seed, number, 0, 7)
        clip.latents = pipe.encode(clip.video[None], g)
    clips = run.clips or run.images
    run.trainables = lora.build_trainables(recipe.parts, pipe, clips, flags.seed)
    runs.adapter_groups(run.trainables)  # refuses parts that one file cannot hold
    run.trained = lora.named(run.trainables)
    pipe.unet.checkpointing = flags.checkpointing == "on"
    # All in one call, since a large text encoder leaves GPU memory after each.
    captions = [clip.prompt for clip in (*run.clips, *run.images, *run.prior)]
    appearance = recipe.own.get("appearance_prompt") or ""
    pipe.encode_text(["", flags.preview_prompt, appearance, *captions])
    device = torch.device(flags.device).type
    run.scaler = torch.amp.GradScaler(device, enabled=flags.precision == "fp16")
    if run.rank == 0:
        runs.report(run)


def check_schedule(recipe, schedule, preview_steps):
    """Raises BadInput for settings that do not fit the base model's noise schedule."""
    loss, space = recipe.keywords.get("loss"), recipe.keywords.get("loss_space", "output")
    if space == "output":
        space = schedule.prediction_type
    if loss == "residual-l2-weighted" and space != "epsilon":
        raise BadInput(f"loss={loss}: its weight is derived for ε, and the prediction is {space}; "
                       "give loss_space=epsilon where the method has it, or another loss.")
    steps = {"--preview-steps": preview_steps, "sampling_steps": recipe.sampling_steps}
    for name, count in steps.items():
        sampler.check_steps(schedule, count, name)
        if recipe.noise_prior:
            sampler.check_return(schedule, recipe.sampler, count)
    if recipe.noise_prior and recipe.inversion_steps:
        sampler.check_steps(schedule, recipe.inversion_steps, "inversion_steps")


# --- The training loop. A method yields losses, each for one backward pass ----------------------


def train(run, folder, optimizer, before):
    """Train to the last step, a signal, or the appearance stop. Returns the step and the signal."""
    flags, recipe, stop = run.flags, run.recipe, machine.Stop()
    first, parameters = folder.first, list(run.trained.values())
    every = 100 if sum(p.nbytes for p in parameters) < 2**28 else 1000  # steps between saves
    due = lambda step: step % every == 0 or flags.save_every and step % flags.save_every == 0
    with tqdm(initial=first, total=recipe.steps, desc=recipe.name, disable=run.rank > 0) as bar:
        for step in range(first, recipe.steps + 1):
            last = step == recipe.steps
            stopped = not last and stop.agree(flags.device)
            if flags.preview_every and (step % flags.preview_every == 0 or last) and not stopped:
                now = preview(run) if step else before
                folder.preview(step, before, now)
                last = last or appearance_is_lost(run, step, now)
            if last or stopped or step > first and due(step):
                folder.save(step)
            if last or stopped:
                return step, stop.signal
            started = time.time()
            losses, seen = fitting_step(run, step, optimizer)
            machine.all_reduce_gradients(parameters)
            run.scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
            # the only GPU synchronization of a step
            record = runs.step_record(step, losses, norm, seen, run, started)
            check_finite(record, folder, run.scaler)
            run.scaler.step(optimizer)  # skips a step with overflow in fp16
            run.scaler.update()
            optimizer.zero_grad(set_to_none=True)
            folder.log(record)
            bar.set_postfix(loss=f"{record['loss']:.4f}")
            bar.update()


def one_step(run, step):
    """Accumulate the gradients of this process's examples. Returns losses and log records."""
    losses, seen, batch = [], [], run.batch
    set_train_mode(run.pipe.unet, run.recipe)
    for number in range(run.rank, batch, run.world_size):
        ex = Example(run, step, number)
        for loss in run.recipe.function(ex, **run.recipe.keywords):
            run.scaler.scale(loss / batch).backward()
            losses.append(loss.detach())
        seen += ex.close()
    return losses, seen


def fitting_step(run, step, optimizer):
    """one_step, repeated with gradient checkpointing and the same random draws if GPU memory runs
    out (--checkpointing auto)."""
    unet = run.pipe.unet
    try:
        return one_step(run, step)
    except torch.OutOfMemoryError:
        if run.flags.checkpointing != "auto" or unet.checkpointing:
            raise
    log("note: out of GPU memory; gradient checkpointing is now on")
    optimizer.zero_grad(set_to_none=True)  # partial gradients
    torch.cuda.empty_cache()
    unet.checkpointing = True
    return one_step(run, step)


def set_train_mode(unet, recipe):
    """Train mode, with the UNet's own dropout only if the recipe has it."""
    unet.train()
    for layer in unet.modules():
        if isinstance(layer, nn.Dropout):
            layer.train(recipe.own.get("unet_dropout", True))


def check_finite(record, folder, scaler):
    """Raises BadInput for a loss or gradient norm that is not finite, unless fp16 overflowed."""
    if math.isfinite(record["loss"] + record["grad"]):
        return
    if scaler.is_enabled() and scaler.get_scale() > 1:
        record["skipped"] = "overflow in fp16"
        return
    where = "; ".join(f"timestep {z['t']}, clip {z['clip']}" for z in record["seen"])
    raise BadInput(f"loss {record['loss']}, gradient norm {record['grad']} at step "
                   f"{record['step']}, {where}; {folder.kept()}. Lower the learning rate "
                   "(motion.lr=…), or give --precision fp32.")


# --- The methods --------------------------------------------------------------------------------
# The decorator has the settings of the paper or its code, or values chosen here. The function is
# the algorithm, with the settings that the paper varies as keywords; `ex` is one training example.
# docs/methods.md compares paper, published code and this code.


@method("VMC, Eq. 17 and App. D; clipping and sampling from its code", shape=(8, 320, 576),
        steps=400, noise_prior=1.0, sampler="ddpm", sampling_steps=75,
        motion=Trainable("temporal-attention-qkv", lr=1e-4))
def vmc(ex, loss="residual-cosine", loss_space="output", frame_stride=1):
    """VMC, Video Motion Customization (Jeong et al. 2023, Algorithm 1). Trains q, k and v of the
    temporal attentions with the cosine loss 1 − cos(δεⁿ, δε̂ⁿ) of frame residuals (Eqs. 15, 17), in
    which appearance shared by all frames cancels. Captions describe the motion but not the
    appearance (Sec. 3.2): "a bird is flying". Sampling starts from the inverted clip. See
    docs/tour.md, stop 9.

    loss: one of losses.LOSSES
    loss_space: the tensors that the loss compares: output (the network's ε or v), epsilon, or x0
    frame_stride: distance between the two frames of a residual
    """
    z = ex.add_noise(ex.next_clip())  # x_t = √ᾱ·x0 + √(1−ᾱ)·ε
    ex.train("motion")
    pred, target = ex.predict(z, loss_space=loss_space)  # ε̂ and ε, or v̂ and v
    ex.log(unseen_by_cosine(pred, target))
    yield LOSSES[loss](pred, target, stride=frame_stride, anchor=ex.random_frame(z),
                       alpha_bar=ex.alpha_bar(z))


@method("MotionDirector, Eq. 5-7, and its code", shape=(16, 384, 384), steps=150,
        max_grad_norm=math.inf, noise_prior=0.5, inversion_model="base", inversion_steps=50,
        sampling_steps=30, guidance=12.0,
        appearance=Trainable("spatial-self-attention-ff", 32, dropout=0.1, per_video=True, lr=5e-4),
        motion=Trainable("temporal-attention-ff", 32, dropout=0.1, lr=5e-4))
def motiondirector(ex, beta=1.0, spatial_prob=0.8):
    """MotionDirector (Zhao et al. 2023, Sec. 3.2 and 3.3). Two paths share noise and timestep. A
    spatial LoRA per clip is trained on the appearance of one frame (Eq. 4), with temporal layers
    bypassed. With it frozen, a temporal LoRA is trained on the motion (Eq. 7); its second loss
    reduces appearance by φ(ε)ⁿ = √(β² + 1)·εⁿ − β·ε^anchor. See docs/tour.md, stop 11.

    beta: strength β of the debiasing (Eq. 5); 0 counts the plain loss twice
    spatial_prob: probability of the spatial path; otherwise the spatial LoRA is disabled
    """
    z = ex.add_noise(ex.next_clip())
    spatial = "appearance" in ex.trainables and (
        ex.rand() < spatial_prob or "motion" not in ex.trainables)
    if spatial:
        ex.train("appearance")
        yield mse(*ex.predict(ex.single_frame(z)))  # L_spatial, Eq. 4
    if "motion" in ex.trainables:
        ex.train("motion", frozen=("appearance",) if spatial else ())
        pred, target = ex.predict(z)
        debiased = appearance_debiased(pred, target, ex.random_frame(z), beta)
        yield mse(pred, target) + debiased  # Eq. 7


@method("NewMove, Sec. 3, and its code", shape=(16, 384, 384), fps=24.0, steps=3000,
        sampler="dpm", unet_dropout=False, prior="folder", num_prior_clips=64, class_prompt="",
        appearance_stop=0.0, appearance_prompt="", clip="", clip_weights="",
        motion=Trainable("temporal-and-cross-kv", lr=5e-6), word=PlaceholderToken("sks", lr=5e-6),
        subject=Trainable("none", lr=5e-6), subject_word=PlaceholderToken("X*", lr=5e-6))
def newmove(ex, alpha=0.5, loss="mse", augment="augmented", prior_loss_weight=0.5,
            subject_start=3000):
    """NewMove (Materzyńska et al. 2023, Sec. 3) binds a motion to a rare token. Temporal layers and
    cross-attention keys and values are fully fine-tuned (Eq. 2), mostly at high noise, which
    determines the motion (Sec. 3.2). Regularization clips, at half the weight, prevent forgetting
    (Eq. 3). With --images, a subject is trained after the motion, "a X* man doing the V* sign":
    each step then draws an example of either (supplement, Sec. 2). See docs/tour.md, stop 13.

    alpha: α of Sec. 3.2, the preference for high noise; 0 is uniform
    loss: one of losses.LOSSES
    augment: augmentation of the clips: augmented (resized crop, color jitter), recolored or none
    prior_loss_weight: weight of the regularization clips' loss
    subject_start: step at which training of the subject begins
    appearance_prompt: the appearance in --preview-prompt, for appearance_stop; empty for all of it
    """
    if ex.run.images and ex.step >= subject_start and ex.rand() < 0.5:
        ex.train("subject", "subject_word")
        yield mse(*ex.predict(ex.single_frame(ex.add_noise(ex.sample_image()))))
        return
    z = ex.add_noise(ex.next_clip(), data.AUGMENTATIONS[augment], alpha)
    ex.train("motion", "word")
    if ex.run.prior:  # both clips form one batch
        (pred, target), prior = ex.predict(z, ex.add_noise(ex.sample_prior(), alpha=alpha))
    else:
        pred, target = ex.predict(z)
    new = LOSSES[loss](pred, target, anchor=ex.random_frame(z), alpha_bar=ex.alpha_bar(z))
    yield new + prior_loss_weight * mse(*prior) if ex.run.prior else new


@method("Customize-A-Video, supplement; steps chosen here", shape=(16, 256, 256), steps=600,
        appearance_prompt="", appearance=Trainable("spatial-attention", 1, scale=0.5, lr=5e-5),
        appearance_word=PlaceholderToken("<look>", lr=5e-5),
        motion=Trainable("temporal-attention", 4, lr=5e-4))
def customize_a_video(ex, absorber_steps=200):
    """Customize-A-Video (Ren et al. 2024). First an appearance absorber, a spatial LoRA, is trained
    on patches of single frames, with temporal layers bypassed (Eq. 3). Then, with it frozen, a
    temporal LoRA is trained on whole clips (Eq. 5); only the temporal one is used for sampling. The
    absorber may also be a token (Eq. 4: appearance.layers=none appearance_word.num_vectors=4),
    both, or weights of another program (appearance.layers=none appearance.load_from=…). See
    docs/tour.md, stop 12.

    absorber_steps: steps of the first stage
    appearance_prompt: caption of the absorber's frames, without the motion; empty for the caption
    """
    has_absorber = ex.is_trainable("appearance") or ex.is_trainable("appearance_word")
    if ex.step < absorber_steps and has_absorber:
        caption = ex.settings["appearance_prompt"] or None
        z = ex.add_noise(ex.next_clip(), data.random_patch, caption=caption)
        ex.train("appearance", "appearance_word")
        yield mse(*ex.predict(z))
    else:
        z = ex.add_noise(ex.next_clip())
        ex.train("motion", frozen=("appearance", "appearance_word"))
        yield mse(*ex.predict(z))


@method("MotionDirector's coupled baseline", like="motiondirector", appearance=None,
        motion=Trainable("coupled", 32, dropout=0.1, lr=5e-4))
def coupled(ex, loss="mse"):
    """One LoRA on spatial and temporal layers, trained with the plain loss (Table 1). See
    docs/tour.md, stop 8.

    loss: one of losses.LOSSES
    """
    z = ex.add_noise(ex.next_clip())
    ex.train("motion")
    pred, target = ex.predict(z)
    yield LOSSES[loss](pred, target, anchor=ex.random_frame(z), alpha_bar=ex.alpha_bar(z))


@method("DreamBooth (Ruiz et al. 2022), as NewMove adapts it", shape=(16, 384, 384), fps=24.0,
        steps=800, sampler="dpm", unet_dropout=False, prior="generated", num_prior_clips=16,
        class_prompt="",
        motion=Trainable("spatial", lr=5e-6), word=PlaceholderToken("sks", lr=5e-6))
def dreambooth(ex, prior_loss_weight=1.0):
    """Full fine-tuning of all spatial layers, with regularization clips generated by the base model
    (NewMove, Sec. 4.1). See docs/tour.md, stop 13.

    prior_loss_weight: weight of the regularization clips' loss
    """
    z = ex.add_noise(ex.next_clip())
    ex.train("motion", "word")
    if ex.run.prior:
        new, prior = ex.predict(z, ex.add_noise(ex.sample_prior()))
        yield mse(*new) + prior_loss_weight * mse(*prior)
    else:
        yield mse(*ex.predict(z))


@method("Custom Diffusion (Kumari et al. 2022), as NewMove adapts it", like="dreambooth", steps=500,
        prior="folder", num_prior_clips=64,
        motion=Trainable("cross-attention-kv", lr=1e-5), word=PlaceholderToken("sks", 1, lr=1e-5))
def custom_diffusion(ex, prior_loss_weight=1.0):
    """DreamBooth's loss on cross-attention keys and values and one token vector. See docs/tour.md,
    stop 13.

    prior_loss_weight: weight of the regularization clips' loss
    """
    yield from dreambooth(ex, prior_loss_weight)


@method("Textual Inversion (Gal et al. 2022), as NewMove adapts it", shape=(16, 384, 384),
        fps=24.0, steps=3000, sampler="dpm", unet_dropout=False,
        word=PlaceholderToken("sks", 1, lr=5e-3))
def textual_inversion(ex):
    """Trains one token vector and nothing else. See docs/tour.md, stop 13."""
    z = ex.add_noise(ex.next_clip())
    ex.train("word")
    yield mse(*ex.predict(z))


@method("Tune-A-Video (Wu et al. 2022, Sec. 4.2)", shape=(16, 384, 384), steps=500,
        noise_prior=1.0, guidance=12.5, motion=Trainable("tune-a-video", lr=3e-5))
def tune_a_video(ex):
    """Trains spatial queries and temporal attention. Sampling starts from the inverted clip. See
    docs/tour.md, stop 14."""
    z = ex.add_noise(ex.next_clip())
    ex.train("motion")
    yield mse(*ex.predict(z))


# Settings that depend on the training data.
BY_DATA = {
    ("motiondirector", "several clips"): "steps=500 motion.weight_decay=1e-4 "
                                         "appearance.weight_decay=1e-4 noise_prior=0",
    ("coupled", "several clips"): "steps=500 motion.weight_decay=1e-4 noise_prior=0",
    ("motiondirector", "one image"): "steps=300 motion.layers=none appearance.per_video=off "
                                     "appearance.weight_decay=1e-4 noise_prior=0",
    ("motiondirector", "images"): "steps=1000 motion.layers=none appearance.per_video=off "
                                  "appearance.weight_decay=1e-4 noise_prior=0",
    ("newmove", "one clip"): "steps=1000",  # supplement, Sec. 3
    ("newmove", "one clip and a subject"): "steps=2000 subject_start=1000 subject.layers=spatial "
                                           "subject_word.num_vectors=1",
    ("newmove", "several clips and a subject"): "steps=6000 subject.layers=spatial "
                                                "subject_word.num_vectors=1",
}
# Settings for the tiny model, which needs higher learning rates and fewer steps.
TINY = {
    "vmc": "steps=300 motion.lr=1e-3 sampling_steps=20 guidance=4",
    "motiondirector": "motion.lr=3e-3 appearance.lr=3e-3 inversion_steps=0 guidance=4",
    "newmove": "steps=200 motion.lr=1e-3 word.lr=1e-3 subject.lr=1e-3 subject_word.lr=1e-3 "
               "subject_start=100 sampler=ddim prior=world num_prior_clips=16 guidance=4",
    "customize-a-video": "steps=300 absorber_steps=100 motion.lr=3e-3 appearance.lr=1e-3 "
                         "appearance_word.lr=1e-3 guidance=4",
    "coupled": "motion.lr=3e-3 inversion_steps=0 guidance=4",
    "dreambooth": "steps=200 motion.lr=1e-4 word.lr=1e-4 sampler=ddim guidance=4",
    "custom-diffusion": "steps=200 motion.lr=1e-3 word.lr=1e-2 sampler=ddim prior=world guidance=4",
    "textual-inversion": "steps=300 word.lr=1e-2 sampler=ddim guidance=4",
    "tune-a-video": "steps=200 motion.lr=1e-3 guidance=4",
}


# --- The interface of the methods ---------------------------------------------------------------


@dataclass
class NoisySample:
    """A noised clip. Tensors are (1, C, F, h, w)."""

    x0: torch.Tensor
    noise: torch.Tensor
    t: int
    x: torch.Tensor  # x_t
    caption: str
    clip: data.Clip
    temporal: bool = True  # False bypasses the temporal layers


class Example:
    """One training example of one step, `ex` in the methods. trainables: {part: trainables}.

    All random draws come from one generator seeded by (seed, step, example), in the order of the
    method's calls, so --resume and several processes give the same numbers.
    """

    def __init__(self, run, step, number):
        self.run, self.pipe, self.step, self.number = run, run.pipe, step, number
        self.g = sampler.generator(run.flags.seed, step, number)
        self.trainables, self.settings, self.index = run.trainables, run.recipe.own, None
        self.T = run.pipe.schedule.num_train_timesteps
        self.words, self.records, self.dropout_seed = None, [], 0
        self.pattern, self.hooked, self.hooks = None, [], []
        self.captured, self.capturing = {}, False

    # Data

    def next_clip(self):
        """The next clip, in rotation; the next image where there are only images."""
        clips = self.run.clips or self.run.images
        self.index = (self.step * self.run.batch + self.number) % len(clips)
        return clips[self.index]

    def sample_image(self):
        """A random image of the subject."""
        return self.run.images[torch.randint(len(self.run.images), (), generator=self.g)]

    def sample_prior(self):
        """A random regularization clip."""
        return self.run.prior[torch.randint(len(self.run.prior), (), generator=self.g)]

    def rand(self):
        """A random number in [0, 1)."""
        return float(torch.rand((), generator=self.g))

    def random_frame(self, z):
        """The index of a random frame."""
        return int(torch.randint(z.x0.shape[2], (), generator=self.g))

    def add_noise(self, clip, augment=None, alpha=0.0, caption=None, t=None):
        """x_t = √ᾱ·x0 + √(1−ᾱ)·ε, a NoisySample, at a random timestep unless t is given. augment: a
        function of data.py; alpha: NewMove's preference for high noise; caption: the clip's own
        unless given."""
        S, x0 = self.pipe.schedule, clip.latents
        if augment:
            x0 = self.pipe.encode(augment(clip.video, self.g)[None], self.g)
        if t is None:
            weights = sampler.timestep_weights(self.T, alpha)
            t = int(torch.multinomial(weights, 1, True, generator=self.g))
        noise = torch.randn(x0.shape, generator=self.g)
        noise = machine.to_device(noise, self.pipe.device)
        x = S.add_noise(x0, noise, t)
        caption = clip.prompt if caption is None else caption
        return NoisySample(x0, noise, t, x, caption, clip, x0.shape[2] > 1)

    def single_frame(self, z):
        """A random frame with the same noise and timestep. It bypasses all temporal layers."""
        f = self.random_frame(z)
        x0, noise, x = (v[:, :, f : f + 1] for v in (z.x0, z.noise, z.x))
        return NoisySample(x0, noise, z.t, x, z.caption, z.clip, temporal=False)

    def alpha_bar(self, z):
        """ᾱ at the timestep of z."""
        return self.pipe.schedule.alpha_bar[z.t].item()

    # Training and prediction

    def is_trainable(self, part):
        """True if a part has trainable parameters."""
        return any(one.parameters() for one in self.trainables.get(part, ()))

    def train(self, *parts, frozen=()):
        """From now on, train `parts`, keep `frozen` active but fixed, disable the rest. If each
        clip has its own LoRA, this selects the LoRA of the last next_clip()."""
        if isinstance(frozen, str):
            raise BadInput(f"train: frozen={frozen!r}; expected a tuple, ({frozen!r},).")
        if not any(map(self.is_trainable, parts)):
            raise BadInput(f"{' and '.join(parts)}: no trainable parameters with these settings, "
                           f"but step {self.step} trains them; choose layers.")
        per_video = [p for p in (*parts, *frozen) if len(self.trainables.get(p, ())) > 1]
        if per_video and self.index is None:
            raise BadInput(f"train: {per_video[0]} has one LoRA per clip; call next_clip first.")
        self.words = lora.set_trainable(self.trainables, parts, frozen, self.index or 0)

    def predict(self, *noisy, loss_space="output"):
        """(prediction, target) per NoisySample, each (1, C, F, h, w) in fp32: the network's output
        (ε or v), or `epsilon` or `x0` derived from it. Several samples form one batch."""
        self.dropout_seed = int(torch.randint(2**62, (), generator=self.g))
        pairs, S = [], self.pipe.schedule
        for z, output in zip(noisy, self.forward(self.pipe, noisy)):
            target = S.target(z.x0, z.noise, z.t)
            # Logged for all losses, so that they can be compared.
            error = F.mse_loss(output.detach(), target)
            self.records.append({"t": z.t, "clip": str(z.clip.path), "mse": error})
            if loss_space != "output":
                x0, eps = S.to_x0_eps(output, z.x, self.alpha_bar(z))
                output, target = (eps, z.noise) if loss_space == "epsilon" else (x0, z.x0)
            pairs.append((output, target))
        return pairs[0] if len(pairs) == 1 else pairs

    def base(self, *noisy):
        """The frozen base model's output per NoisySample, with gradients only for the inputs.
        Called after predict, it uses the same dropout masks."""
        run = self.run
        if run.base is None:
            run.base = model.load(run.flags.weights, run.flags.device, run.flags.precision, keep=())
        set_train_mode(run.base.unet, run.recipe)
        outputs = self.forward(run.base, noisy)
        return outputs[0] if len(outputs) == 1 else outputs

    def forward(self, pipe, noisy):
        """A list of a model's outputs for noisy samples. Fills `captured`."""
        if len({z.temporal for z in noisy}) > 1:
            raise BadInput("predict: a single frame and a clip in one call; call it once for each.")
        if self.pattern and pipe.unet not in self.hooked:
            self.add_hooks(pipe.unet)
        if self.words is None:
            raise BadInput("predict: call train first, to choose the trainable parts.")
        torch.manual_seed(self.dropout_seed)
        # Active appearance tokens are appended to captions.
        text = pipe.encode_text([" ".join([z.caption, *self.words]) for z in noisy])
        t = torch.cat([torch.full((1,), z.t, device=pipe.device) for z in noisy])
        latents = [z.x for z in noisy]
        # One at a time if memory is short or lengths differ. Captured features require a batch.
        lengths = {x.shape for x in latents}
        if pipe.unet.checkpointing and not self.pattern or len(lengths) > 1:
            batches = zip(latents, t.split(1), text.split(1))
        else:
            batches = [(torch.cat(latents), t, text)]
        self.captured, self.capturing, outputs = {}, True, []
        for batch in batches:
            self.clips, self.frames = len(batch[0]), batch[0].shape[2]
            outputs += pipe.predict(*batch, temporal=noisy[0].temporal).split(1)
        self.capturing = False
        return outputs

    # Inspection

    def capture(self, pattern):
        """From now on, each prediction sets `captured`, {name: output in fp32} of the modules whose
        full name matches: maps (B, heads, N, M) of attentions, features of other modules,
        (B, C, F, h, w) if their output is an image."""
        self.pattern, self.hooked = pattern, []

    def add_hooks(self, unet):
        """Add the forward hooks of `capture`. They are kept for the backward pass, since gradient
        checkpointing repeats the forward pass."""
        self.hooked.append(unet)
        found = {n: m for n, m in unet.named_modules() if re.fullmatch(self.pattern, n)}
        if not found:
            raise BadInput(f"capture: no module is called {self.pattern!r}.")
        for name, module in found.items():
            self.hooks.append(module.register_forward_hook(partial(self.hook, name)))

    def hook(self, name, module, inputs, out):
        """Fill `captured` during predictions."""
        if not self.capturing:
            return
        if isinstance(module, model.Attention):
            out = module.maps(*inputs)
        elif out.dim() == 4 and len(out) == self.clips * self.frames:
            out = model.unfold_frames(out.float(), self.frames)
        self.captured[name] = out.float()

    def log(self, values):
        """Add {name: number or scalar tensor} to the record of the last prediction."""
        if not self.records:
            raise BadInput("log: call predict first.")
        self.records[-1] |= values

    def close(self):
        """Remove the hooks, after the last backward pass. Returns one record per prediction."""
        for hook in self.hooks:
            hook.remove()
        return self.records


# --- Previews -----------------------------------------------------------------------------------


def appearance_is_lost(run, step, video):
    """True if the score of a preview and its appearance_prompt has fallen to appearance_stop, i.e.
    the model begins to memorize the clip (NewMove's supplement, Sec. 4)."""
    if not run.scorer or not step:
        return False
    from scores.clip import text_alignment

    own = run.recipe.own
    prompt = own["appearance_prompt"] or run.flags.preview_prompt
    score = text_alignment(run.scorer, video, prompt)
    log(f"step {step}: appearance score {score:.3f}")
    return machine.broadcast(score <= own["appearance_stop"])


@torch.no_grad()
def preview(run):
    """A sample (3, F, H, W) of the preview prompt, from the method's starting latents. Appearance
    parts are active only if nothing else is trained."""
    flags, recipe, pipe = run.flags, run.recipe, run.pipe
    pipe.unet.eval()
    progress = lambda text: None if run.rank else text
    names = [n for n in run.trainables if not n.startswith("appearance")] or list(run.trainables)
    latents = (run.clips or run.images)[0].latents
    channels, frames, *size = latents.shape[1:]
    shape = channels, frames if run.clips else flags.frames, *size
    start = sampler.seeded_randn(shape, [flags.seed]).to(flags.device)
    tuned = recipe.inversion_model == "tuned"
    if recipe.noise_prior and run.clips and (run.inverted is None or tuned):
        # The base model inverts once, before the first step.
        lora.set_trainable(run.trainables, (), names if tuned else ())
        steps = recipe.inversion_steps or flags.preview_steps
        run.inverted = sampler.invert(pipe, latents, steps, progress=progress("preview: inverting"))
    if run.inverted is not None:
        start = sampler.blend_noise(run.inverted, start, recipe.noise_prior)
    words = lora.set_trainable(run.trainables, (), names)
    prompt = " ".join([flags.preview_prompt, *words])
    return sampler.sample(pipe, [prompt], start, [flags.seed], flags.preview_steps, recipe.guidance,
                          recipe.sampler, progress=progress("preview"))[0]


if __name__ == "__main__":
    machine.run(main)
