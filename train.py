"""Teach the model the motion of a clip, or of several.

    python train.py --method vmc --video clip.mp4
    python train.py --method motiondirector --help          # a method and its own settings

Read it downward: the command, what it prepares, the loop, the nine methods one below the other, and
what a method may ask for. Writes out/<clip>-<method>/: run.json, log.jsonl, samples/step-000000.mp4
… (reference | before | now), the adapters, and state.pt for --resume.

Axes: B clips, C channels, F frames, h w latent, N text tokens, D text width.
"""
import math
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import lora
import model
import sampler
from lora import Part, Word
from losses import LOSSES, appearance_debiased, mse, unseen_by_cosine
from support import adapter_file, machine, media, priors, runs
from support.files import BadInput, check_weights, own_folder, read_size, say, slug
from support.flags import Parser, real, some_text, whole
from support.recipe import METHODS, SETTING, Recipe, method

EXAMPLES = """A method's own settings are written name=value after the flags; --method NAME --help
lists them.

examples:
  python train.py --method vmc --video assets/eight.mp4
  python train.py --method motiondirector --video clips/ --prompt "a person is riding a bicycle" \\
      --weights zeroscope_v2_576w
  python train.py --method newmove --video clip.mp4 --prompt "a dog doing the sks" alpha=0
"""


def main(argv=None):
    """One run of one method."""
    flags, recipe = parse(sys.argv[1:] if argv is None else argv)
    machine.keep_memory()
    flags.device = machine.find_device(flags.device)
    process, processes = machine.place(flags.device)
    with machine.first_alone(own_folder, flags.out, flags.default_out, flags.resume) as flags.out:
        run = prepare(flags, recipe, process, processes)
        optimizer = lora.make_optimizer(run.recipe.parts, run.learners)
        folder = runs.Folder(flags.out, run, optimizer)
        before = preview(run) if flags.preview_every else None
        end, signal = train(run, folder, optimizer, folder.begin(), before)
        folder.tell(end, signal)
    if signal:
        sys.exit(128 + signal)


# ------------------------------------------------------------------------------------------------
# The command: flags that all methods share, and name=value for the recipe's own settings


def parse(argv):
    """The flags, and the recipe with all its settings. Raises BadInput."""
    settings = [a for a in argv if SETTING.match(a)]
    parser = Parser(description=__doc__, epilog=EXAMPLES, add_help=False)
    add = parser.add_argument
    # what to learn
    add("--method", default="vmc", choices=METHODS, help="how to learn it: "
        f"{', '.join(METHODS)} (default: vmc)", metavar="NAME")
    add("--video", type=Path, nargs="+", default=[], help="the clips: video files, folders of "
        "numbered pictures, or folders of clips")
    add("--prompt", type=some_text, nargs="+", default=[], help="a caption for all, or one a clip, "
        "of the motion: 'a bird is flying', or with a method's word for it: 'a bird doing the sks' "
        "(default: the clip's own .txt, else its name)")
    add("--images", type=Path, nargs="+", default=[], help="a subject's pictures (newmove), or "
        "pictures alone (motiondirector)")
    add("--image-prompt", type=some_text, help="the pictures' caption: 'a X* dog' (default: beside "
        "each picture)")
    add("--prior", help="clips that keep the model from forgetting: a folder, 'generated' by the "
        "base model, the tiny 'world', or 'none' (default: the recipe's)")
    add("--reverse", action="store_true", help="learn the motion backward")
    # the clip's shape; defaults are the method's, or the tiny model's 16 frames of 64x64 at 8 fps
    add("--frames", type=whole(4, 1024), help="frames to learn from")
    add("--size", type=read_size, help="pixels, WIDTHxHEIGHT")
    add("--fps", type=real(0.01, 1000), help="frames a second, picked by time stamp "
        "(default: the method's, or fewer if a clip has fewer; tiny model: 8)")
    add("--start", type=real(0), default=0.0, help="seconds to skip (default: 0)")
    # how long, and on what
    add("--steps", type=whole(1, 10**7), help="training steps (default: the recipe's)")
    add("--seed", type=whole(0, 2**31), default=0, help="of every random draw (default: 0)")
    add("--batch", type=whole(1, 4096), help="examples a step, over all processes (default: one "
        "each)")
    add("--weights", type=Path, help="base model, a hub-layout folder (default: the tiny model)")
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 where the hardware has it")
    add("--checkpointing", choices=("auto", "on", "off"), default="auto", help="compute "
        "activations again, not keep them: less memory, a third more time (default: auto)")
    # looking at it, and keeping it
    add("--preview-prompt", type=some_text, help="what samples show (default: the caption)")
    add("--preview-every", type=whole(0), default=100, help="steps between samples, or 0 "
        "(default: 100)")
    add("--preview-steps", type=whole(1, 1000), default=30, help="sampling steps of a sample "
        "(default: 30)")
    add("--keep-every", type=whole(0), default=0, help="keep the adapter of every so many steps")
    add("--out", type=Path, help="folder (default: out/<clip>-<method>, numbered where it exists)")
    add("--resume", action="store_true", help="go on from the last saved state in the folder")
    add("-h", "--help", action="store_true", help="this page; with --method, its settings")
    flags = parser.parse_args([a for a in argv if a not in settings])
    if flags.help:
        named = any(a.startswith("--method") for a in argv)
        own = METHODS[flags.method].parser()
        own.epilog = "\n".join(f"{when}: {line}" for when, line in changes(flags.method))
        print((own if named else parser).format_help())
        sys.exit()
    return flags, settle(flags, settings)


def changes(name):
    """[(when, settings)] of a method where they are others than in its decorator."""
    rows = [(f"from {kind}", line) for (method, kind), line in BY_DATA.items() if method == name]
    return rows + [("with the tiny model, the default", TINY[name])] * (name in TINY)


def settle(flags, settings):
    """The recipe of the flags: the paper's, changed by what the data and the base model ask for,
    and by the settings given. Fills in the flags that depend on the recipe. Raises BadInput."""
    if not flags.video and not flags.images:
        raise BadInput("no clip to learn from; give --video clip.mp4, or a folder of pictures.")
    check_weights(flags.weights)
    recipe, clips = METHODS[flags.method], data.check_clips(flags.video, flags.prompt)
    pictures = data.find_pictures(flags.images)
    count = len(clips or pictures)
    kind = ("one clip" if count == 1 else "several clips") if clips else (
        "one picture" if count == 1 else "pictures")
    kind += " and a subject" if clips and flags.images else ""
    lines = [BY_DATA.get((flags.method, kind), "")]
    if not flags.weights:
        lines.append(TINY.get(flags.method, ""))
    flags.own_lines = [line for line in lines if line]
    steps = [f"steps={flags.steps}"] if flags.steps is not None else []
    recipe = recipe.but(*lines).ask(*settings, *steps)
    frames, *size = recipe.shape if flags.weights else (16, 64, 64)
    flags.frames, flags.size = flags.frames or frames, flags.size or tuple(size)
    if not flags.fps:  # no frame is to be learned twice
        flags.fps = min([recipe.fps, *map(media.frame_rate, clips)]) if flags.weights else 8.0
    flags.prior = flags.prior or recipe.prior
    flags.default_out = Path("out") / f"{slug((clips or flags.images)[0].stem)}-{flags.method}"
    check_use(flags, recipe, clips, kind)
    return recipe


def check_use(flags, recipe, clips, kind):
    """Raises BadInput for what the method learns nothing from, or could not work with; warns of a
    stage that would never begin."""
    if flags.images and (flags.method, kind) not in BY_DATA:
        raise BadInput(f"{flags.method} learns nothing from pictures{'' if clips else ' alone'}; "
                       "motiondirector learns their look, newmove a subject beside a motion.")
    if "subject" in recipe.parts and bool(flags.images) != recipe.learns("subject"):
        raise BadInput("a subject is learned from --images, by subject.layers or "
                       "subject_word.vectors: give both, or neither.")
    if flags.prior not in (None, "none") and recipe.prior is None:
        raise BadInput(f"--prior: {flags.method} takes no prior clips; newmove, dreambooth and "
                       "custom-diffusion do.")
    if flags.prior not in (None, "none", "folder", "world", "generated"):
        data.check_clips([flags.prior], None)
    if recipe.learns("look", "subject") and recipe.steps <= recipe.keywords.get("first", 0):
        say(f"warning: first={recipe.keywords['first']}, and {recipe.steps} steps: what comes "
            "after the first never learns; give more --steps, or a smaller first=")
    if recipe.appearance_stop and not (flags.preview_prompt and flags.preview_every):
        raise BadInput("appearance_stop: the clip's own looks come back as it is learned; give "
                       "--preview-prompt with other ones, and --preview-every.")


# ------------------------------------------------------------------------------------------------
# Before the first step


@dataclass
class Run:
    """All that a run works with, made once in `prepare`."""

    flags: object
    recipe: Recipe
    model: model.Model
    clips: list
    images: list
    prior: list
    sources: list  # where each clip's caption is from
    fingerprint: str  # of the base model
    learners: dict = field(default_factory=dict)  # part -> its learners: one, or one a clip
    base: model.Model = None  # the untrained model, where a method asks for it
    inverted: torch.Tensor = None  # the first clip's noise, for samples
    scorer: object = None  # the CLIP of appearance_stop
    process: int = 0  # which of torchrun's processes this is, and of how many
    processes: int = 1
    batch: int = 1  # examples a step, over all processes


def prepare(flags, recipe, process=0, processes=1):
    """Load the model and what there is to learn from, and compute once all that is the same at
    every step. Raises BadInput."""
    flags.device = device = machine.find_device(flags.device)
    flags.out = flags.out or flags.default_out
    precision = flags.precision or machine.default_precision(device)
    whole = model.load(flags.weights, device, precision, keep=lora.Tuned(recipe.parts))
    flags.device, flags.precision = device, whole.precision
    check_recipe(recipe, whole.schedule, flags.preview_steps)
    if any(side % whole.vae.config.factor for side in flags.size):
        raise BadInput(f"--size: wanted multiples of {whole.vae.config.factor} pixels.")
    words = {n: p for n, p in recipe.parts.items() if isinstance(p, Word)}
    learned = {p.text: p.vectors for p in words.values() if p.vectors}
    of = lambda name: words[name].text if name in words else None
    clips, sources = data.load_clips(flags.video, flags.prompt, flags.frames, flags.size, flags.fps,
                                     flags.start, flags.reverse, of("word"), learned)
    caption = flags.image_prompt or (flags.prompt[0] if flags.prompt and not clips else None)
    images = data.load_images(flags.images, caption, flags.size, of("subject_word"), learned)
    run = Run(flags, recipe, whole, clips, images, [], sources,
              adapter_file.fingerprint(whole.unet))
    run.process, run.processes = process, processes
    run.batch = flags.batch or run.processes
    if run.batch % run.processes:
        raise BadInput(f"--batch {flags.batch}: wanted a multiple of the {run.processes} "
                       "processes.")
    stride, lengths = recipe.keywords.get("stride", 0), [c.video.shape[1] for c in clips]
    if stride and stride >= min(lengths):
        raise BadInput(f"stride={stride}: wanted less than the clip's {min(lengths)} frames.")
    if recipe.own.get("appearance_stop"):
        from scores.clip import load_clip  # needed here alone

        run.scorer = load_clip(recipe.own["clip"], recipe.own["clip_weights"], device)
    run.prior = priors.load(run)
    for number, clip in enumerate((*clips, *images, *run.prior)):
        # Published codes with a VAE sample its posterior, and do so once.
        g = sampler.generator(flags.seed, number, 0, 7)
        clip.latents = whole.encode(clip.video[None], g)
    run.learners = lora.make_learners(recipe.parts, whole, len(clips or images), flags.seed)
    flags.preview_prompt = flags.preview_prompt or (clips or images)[0].prompt
    ends = [p.text for n, p in words.items() if n.startswith("look") and p.vectors]
    for caption in (flags.preview_prompt, *[c.prompt for c in clips]):
        data.check_prompt(" ".join([caption, *ends]), learned)
    whole.unet.checkpointing = flags.checkpointing == "on"
    # Encoded together, once: a large text encoder leaves memory between calls.
    frozen = [c.prompt for c in (*clips, *images, *run.prior)]
    whole.read(["", flags.preview_prompt, recipe.own.get("look_prompt") or "", *frozen])
    if not process:
        runs.report(run)
    return run


def check_recipe(recipe, schedule, preview_steps):
    """Raises BadInput for settings that the base model's noise schedule does not go with."""
    loss, compared = recipe.keywords.get("loss"), recipe.keywords.get("align", "output")
    if compared == "output":
        compared = schedule.prediction_type
    if loss == "residual-l2-weighted" and compared != "epsilon":
        raise BadInput(f"loss={loss}: its weight is of ε, and this compares another thing; give "
                       "align=epsilon where the method has it, or another loss.")
    asked = {"--preview-steps": preview_steps, "sampling_steps": recipe.sampling_steps}
    for name, steps in asked.items():
        sampler.check_steps(schedule, steps, name)
        if recipe.noise_prior:
            sampler.check_return(schedule, recipe.sampler, steps)
    if recipe.noise_prior and recipe.inversion_steps:
        sampler.check_steps(schedule, recipe.inversion_steps, "inversion_steps")


# ------------------------------------------------------------------------------------------------
# The loop. It knows none of the methods: a method yields losses, and each is one backward pass.


def train(run, folder, optimizer, first, before):
    """Steps until the recipe's last, a signal, or a look that is gone; returns the step at which it
    ended, and the signal."""
    flags, recipe, stop = run.flags, run.recipe, machine.Stop()
    parameters = list(lora.named(run.learners).values())
    every = 100 if sum(p.nbytes for p in parameters) < 2**28 else 1000  # steps between saves
    due = lambda step: step % every == 0 or flags.keep_every and step % flags.keep_every == 0
    with tqdm(initial=first, total=recipe.steps, desc=recipe.name, disable=run.process > 0) as bar:
        for step in range(first, recipe.steps + 1):
            end = step == recipe.steps
            stopped = not end and stop.agree(flags.device)  # what is done can no longer be stopped
            if flags.preview_every and (step % flags.preview_every == 0 or end) and not stopped:
                now = preview(run) if step else before
                folder.show(step, before, now)
                end = end or looks_gone(run, step, now)
            if end or stopped or step > first and due(step):
                folder.save(step)
            if end or stopped:
                return step, stop.signal
            started = time.time()
            losses, seen = step_that_fits(run, step, optimizer)
            machine.add_gradients(parameters)
            norm = nn.utils.clip_grad_norm_(parameters, recipe.clip_grad)
            # Only here does the program, if it is alone, wait for a GPU: what came before was queued.
            line = runs.log_line(step, losses, norm, seen, run, started)
            if not math.isfinite(line["loss"] + line["grad"]):
                where = "; ".join(f"timestep {z['t']}, clip {z['clip']}" for z in seen)
                raise BadInput(f"loss {line['loss']}, gradient {line['grad']} at step {step}, {where}; "
                               f"{folder.kept()}. Lower the rate (motion.lr=…), or give --precision "
                               "fp32.")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            folder.log(line)
            bar.set_postfix(loss=f"{line['loss']:.4f}")
            bar.update()


def one_step(run, step):
    """The gradients of this process's examples of a step; their losses, and what the log says."""
    losses, seen, batch = [], [], run.batch
    begin_training(run.model.unet, run.recipe)
    for number in range(run.process, batch, run.processes):
        m = Example(run, step, number)
        for loss in run.recipe.function(m, **run.recipe.keywords):
            (loss / batch).backward()
            losses.append(loss.detach())
        seen += m.finish()
    return losses, seen


def step_that_fits(run, step, optimizer):
    """one_step; where the card has no room for it, from there on with activations computed again
    (--checkpointing auto). Its draws are its own, so it is the same step."""
    unet = run.model.unet
    try:
        return one_step(run, step)
    except torch.OutOfMemoryError:
        if run.flags.checkpointing != "auto" or unet.checkpointing:
            raise
    say("note: the card is full, so activations are computed again (--checkpointing on)")
    optimizer.zero_grad(set_to_none=True)  # of what was computed before the card was full
    torch.cuda.empty_cache()
    unet.checkpointing = True
    return one_step(run, step)


def begin_training(unet, recipe):
    """The network as it is in a step: its own dropout as the recipe has it, a LoRA's always on."""
    unet.train()
    for layer in unet.modules():
        if isinstance(layer, nn.Dropout):
            layer.train(recipe.own.get("network_dropout", True))


# ------------------------------------------------------------------------------------------------
# The methods. The decorator holds what the paper sets or, where it is silent, its code: `Part`s and
# `Word`s can learn, numbers are of training and sampling. The function's lines are the paper's
# algorithm, its keywords what the paper varies; m is one example of one step: see Example for all
# that it can be asked for.


@method("VMC, Eq. 17 and App. D; clipping and sampling from its code", shape=(8, 320, 576),
        steps=400, noise_prior=1.0, sampler="ddpm", sampling_steps=75,
        motion=Part("temporal-attention-qkv", lr=1e-4))
def vmc(m, loss="residual-cosine", align="output", stride=1):
    """Video Motion Customization (Jeong et al. 2023, Algorithm 1): only q, k, v of the temporal
    attentions learn, from the direction of the noise's residuals between frames alone,
    1 − cos(δεⁿ, δε̂ⁿ), in which what frames share cancels. Captions leave out more of the
    appearance (Sec. 3.2): "a bird is flying", with no forest. transformer_in is left out as in the
    published code, whose loss is another, blind to sign (loss=residual-cosine-official). It samples
    by DDPM from the inverted clip, with a variance that its model predicts and ZeroScope does not;
    the paper names no sampler. The paper's base, Show-1, diffuses pixels: 8 key frames of 64×40,
    which further models interpolate to 29 and enlarge. Here frames are latents, as large as
    ZeroScope's, and generate.py --refine stands for the last of these models; 8 frames a second is
    ours.

    loss: what is minimised, one of losses.LOSSES
    align: what it compares: what the network says (ε, or v), epsilon, or x0
    stride: frames between the two of a residual
    """
    z = m.noised(m.clip())  # x_t = √ᾱ·x0 + √(1−ᾱ)·ε
    m.learn("motion")
    pred, true = m.predict(z, align=align)  # ε̂ and ε, or v̂ and v
    m.note(unseen_by_cosine(pred, true))
    yield LOSSES[loss](pred, true, stride=stride, anchor=m.pick(z), a=m.alpha_bar(z))


@method("MotionDirector, Eq. 5-7, and its code", shape=(16, 384, 384), steps=150,
        clip_grad=math.inf, noise_prior=0.5, inverts="base", inversion_steps=50, sampling_steps=30,
        guidance=12.0,
        look=Part("spatial-self-attention-ff", 32, dropout=0.1, per_clip=True, lr=5e-4),
        motion=Part("temporal-attention-ff", 32, dropout=0.1, lr=5e-4))
def motiondirector(m, beta=1.0, spatial=0.8):
    """MotionDirector (Zhao et al. 2023, Sec. 3.2 and 3.3): two paths share a step's noise and
    timestep. A LoRA per clip learns its look from one frame, past all temporal layers; beside it,
    frozen, a temporal LoRA learns the motion, with what frames share weakened in its loss by
    φ(ε)ⁿ = √(β² + 1)·εⁿ − β·ε^anchor. All numbers but β are the published code's, and so are the
    way past all temporal layers, the skipped fifth of the spatial paths, and samples that start
    half from the inverted clip, if it is one: the paper's start from noise (Sec. 4.1). That code
    turns dropout off after its first preview, mirrors half of the pictures that it learns alone,
    lets one convolution in the middle act on single frames, stretches clips and keeps one window
    of each; we do none of it.

    beta: strength of the debiasing, β of Eq. 5; 0 counts the plain loss twice
    spatial: how often the spatial path runs; where it does not, no look acts
    """
    z = m.noised(m.clip())
    look = "look" in m.parts and (m.chance() < spatial or "motion" not in m.parts)
    if look:
        m.learn("look")
        yield mse(*m.predict(m.frame(z)))  # L_spatial, Eq. 4
    if "motion" in m.parts:
        m.learn("motion", beside=("look",) if look else ())
        pred, true = m.predict(z)
        yield mse(pred, true) + appearance_debiased(pred, true, m.pick(z), beta)  # Eq. 7


@method("NewMove, Sec. 3, and its code", shape=(16, 384, 384), fps=24.0, steps=3000,
        sampler="dpm", network_dropout=False, prior="folder", prior_clips=64, prior_prompt="",
        appearance_stop=0.0, look_prompt="", clip="", clip_weights="",
        motion=Part("temporal-and-cross-kv", lr=5e-6), word=Word("sks", lr=5e-6),
        subject=Part("none", lr=5e-6), subject_word=Word("X*", lr=5e-6))
def newmove(m, alpha=0.5, loss="mse", augment="augmented", prior_weight=0.5, first=3000):
    """NewMove (Materzyńska et al. 2023, Sec. 3): a motion becomes a rare word. The temporal layers
    and how frames read the text are tuned in full, mostly at high noise, where motion is decided
    (Sec. 3.2); clips of other motions, at half the weight, keep the model from forgetting (Eq. 3).
    Both go through the network as one batch; rate, weight, clipping, 24 frames a second and no
    dropout are the published code's, which also begins each example at a random frame and repeats
    the last of short clips, where here each begins at --start and keeps its length. Augmented clips
    are the paper's (supplement, Sec. 1), how strongly is ours; that code has none. The paper stops
    where the looks of its test prompts, in 300 videos, fall to a CLIP score of 0.265; here
    appearance_stop=0.265 looks at the one preview. With --images a subject joins after the motion,
    "a X* man doing the V* sign": each example is drawn from either (supplement, Sec. 2), for as
    many steps again, which is ours, as is the number of prior clips made.

    alpha: α of Sec. 3.2: how much likelier high noise is; 0 is uniform
    loss: what is minimised, one of losses.LOSSES
    augment: how clips are shown: augmented (enlarged and tinted), recoloured or none
    prior_weight: weight of the prior clips' loss
    first: steps in which the motion learns alone, before a subject joins
    look_prompt: of appearance_stop: the looks that --preview-prompt asks for; empty for all of it
    """
    if m.run.images and m.step >= first and m.chance() < 0.5:
        m.learn("subject", "subject_word")
        yield mse(*m.predict(m.frame(m.noised(m.image()))))
        return
    z = m.noised(m.clip(), data.VIEWS[augment], alpha)
    m.learn("motion", "word")
    if not m.run.prior:
        yield LOSSES[loss](*m.predict(z), anchor=m.pick(z), a=m.alpha_bar(z))
        return
    other = m.noised(m.prior(), alpha=alpha)
    new, old = m.predict(z, other)
    yield LOSSES[loss](*new, anchor=m.pick(z), a=m.alpha_bar(z)) + prior_weight * mse(*old)


@method("Customize-A-Video, supplement; its steps are ours", shape=(16, 256, 256), steps=600,
        look_prompt="", look=Part("spatial-attention", 1, scale=0.5, lr=5e-5),
        look_word=Word("<look>", lr=5e-5), motion=Part("temporal-attention", 4, lr=5e-4))
def customize_a_video(m, first=200):
    """Customize-A-Video (Ren et al. 2024): first an appearance absorber on patches of single
    frames, past all temporal layers; then, beside it, a temporal LoRA on whole clips, which is all
    that is used in the end. The absorber may be a LoRA (as here), a word (look.layers=none
    look_word.vectors=4), both, or another program's (look.file=…). Ranks, scales and rates are its
    supplement's; its text names q, k and v of the attentions, its counts want the output as well.
    The absorber reads the caption's part that is about looks (supplement, B.2): give look_prompt,
    since nothing here can tell that part.

    first: steps of the absorber
    look_prompt: what the absorber's frames show, without the motion; empty for the whole caption
    """
    if m.step < first and (m.learns("look") or m.learns("look_word")):
        z = m.noised(m.clip(), data.crop, caption=m.settings["look_prompt"])
        m.learn("look", "look_word")
        yield mse(*m.predict(z))
    else:
        z = m.noised(m.clip())
        m.learn("motion", beside=("look", "look_word"))
        yield mse(*m.predict(z))


@method("MotionDirector's coupled baseline", shape=(16, 384, 384), steps=150, clip_grad=math.inf,
        noise_prior=0.5, inverts="base", inversion_steps=50, sampling_steps=30, guidance=12.0,
        motion=Part("coupled", 32, dropout=0.1, lr=5e-4))
def coupled(m, loss="mse"):
    """What MotionDirector compares itself with (Table 1): one LoRA beside spatial and temporal
    layers, all by the plain loss. Its layers, rank and steps are not published; all that is not the
    coupling is MotionDirector's own here.

    loss: what is minimised, one of losses.LOSSES
    """
    z = m.noised(m.clip())
    m.learn("motion")
    yield LOSSES[loss](*m.predict(z), anchor=m.pick(z), a=m.alpha_bar(z))


@method("DreamBooth (Ruiz et al. 2022), as NewMove adapts it", shape=(16, 384, 384), fps=24.0,
        steps=800, prior="generated", prior_clips=16, prior_prompt="",
        motion=Part("spatial", lr=5e-6), word=Word("sks", lr=5e-6))
def dreambooth(m, prior_weight=1.0):
    """All spatial layers, and prior clips made by the base model (NewMove, Sec. 4.1; rate and steps
    are the original's, the number of prior clips is ours).

    prior_weight: weight of the prior clips' loss
    """
    z = m.noised(m.clip())
    m.learn("motion", "word")
    if m.run.prior:
        new, old = m.predict(z, m.noised(m.prior()))
        yield mse(*new) + prior_weight * mse(*old)
    else:
        yield mse(*m.predict(z))


@method("Custom Diffusion (Kumari et al. 2022), as NewMove adapts it", shape=(16, 384, 384),
        fps=24.0, steps=500, prior="folder", prior_clips=64, prior_prompt="",
        motion=Part("cross-attention-kv", lr=1e-5), word=Word("sks", 1, lr=1e-5))
def custom_diffusion(m, prior_weight=1.0):
    """Keys and values of the cross-attention, and a word's vector, beside real prior clips (rate
    and steps are the original's; how many are made is ours).

    prior_weight: weight of the prior clips' loss
    """
    yield from dreambooth(m, prior_weight)  # its step; what learns, and from what, is another


@method("Textual Inversion (Gal et al. 2022), as NewMove adapts it", shape=(16, 384, 384),
        fps=24.0, steps=3000, word=Word("sks", 1, lr=5e-3))
def textual_inversion(m):
    """One word's vector and nothing else (rate and steps are the original's)."""
    z = m.noised(m.clip())
    m.learn("word")
    yield mse(*m.predict(z))


@method("Tune-A-Video (Wu et al. 2022, Sec. 4.2)", shape=(16, 384, 384), steps=500,
        noise_prior=1.0, guidance=12.5, motion=Part("tune-a-video", lr=3e-5))
def tune_a_video(m):
    """The spatial queries and the temporal attention learn; samples start from the inverted clip
    (rate and steps are the original's). The original inflates an image model: attention over frames
    begins from nothing, and pictures look at the first and the one before. Here the base knows
    videos already, an easier start."""
    z = m.noised(m.clip())
    m.learn("motion")
    yield mse(*m.predict(z))


# Where a recipe depends on what there is to learn from: settings, as one would type them.
BY_DATA = {
    ("motiondirector", "several clips"): "steps=500 motion.weight_decay=1e-4 "
                                         "look.weight_decay=1e-4 noise_prior=0",
    ("coupled", "several clips"): "steps=500 motion.weight_decay=1e-4 noise_prior=0",
    ("motiondirector", "one picture"): "steps=300 motion.layers=none look.per_clip=off "
                                       "look.weight_decay=1e-4 noise_prior=0",
    ("motiondirector", "pictures"): "steps=1000 motion.layers=none look.per_clip=off "
                                    "look.weight_decay=1e-4 noise_prior=0",
    ("newmove", "one clip"): "steps=1000",  # its supplement, Sec. 3
    ("newmove", "one clip and a subject"): "steps=2000 first=1000 subject.layers=spatial "
                                           "subject_word.vectors=1",
    ("newmove", "several clips and a subject"): "steps=6000 subject.layers=spatial "
                                                "subject_word.vectors=1",
}
# What the tiny model does otherwise: it is hundreds of times smaller, and so wants larger steps and
# fewer of them.
TINY = {
    "vmc": "steps=300 motion.lr=1e-3 sampling_steps=20 guidance=4",
    "motiondirector": "motion.lr=3e-3 look.lr=3e-3 inversion_steps=0 guidance=4",
    "newmove": "steps=200 motion.lr=1e-3 word.lr=1e-3 subject.lr=1e-3 subject_word.lr=1e-3 "
               "first=100 sampler=ddim prior=world prior_clips=16 guidance=4",
    "customize-a-video": "steps=300 first=100 motion.lr=3e-3 look.lr=1e-3 look_word.lr=1e-3 "
                         "guidance=4",
    "coupled": "motion.lr=3e-3 inversion_steps=0 guidance=4",
    "dreambooth": "steps=200 motion.lr=1e-4 word.lr=1e-4 guidance=4",
    "custom-diffusion": "steps=200 motion.lr=1e-3 word.lr=1e-2 prior=world guidance=4",
    "textual-inversion": "steps=300 word.lr=1e-2 guidance=4",
    "tune-a-video": "steps=200 motion.lr=1e-3 guidance=4",
}


# ------------------------------------------------------------------------------------------------
# What a method may ask for


@dataclass
class Noised:
    """A clip as the network sees it: x0, its noise and x_t, all (1, C, F, h, w), at timestep t;
    what caption is read beside it, and whether the temporal layers take part."""

    x0: torch.Tensor
    noise: torch.Tensor
    t: int
    x: torch.Tensor
    caption: str
    clip: data.Clip
    temporal: bool = True


class Example:
    """One example of one step: m in the methods. It owns every random draw, in the order of the
    method's lines, from (seed, step, example); so resume and several processes repeat them. `parts`
    holds the learners of each part that has any."""

    def __init__(self, run, step, number):
        self.run, self.model, self.step, self.number = run, run.model, step, number
        self.g = sampler.generator(run.flags.seed, step, number)
        self.parts, self.settings, self.index = run.learners, run.recipe.own, 0
        self.words, self.log = [], []
        self.pattern, self.watched, self.hooks, self.seen = None, [], [], {}

    def clip(self):
        """The clip whose turn it is; of pictures alone, the picture."""
        clips = self.run.clips or self.run.images
        self.index = (self.step * self.run.batch + self.number) % len(clips)
        return clips[self.index]

    def image(self):
        """One of the subject's pictures."""
        return self.run.images[torch.randint(len(self.run.images), (), generator=self.g)]

    def prior(self):
        """One of the prior clips; None where there are none."""
        clips = self.run.prior
        return clips[torch.randint(len(clips), (), generator=self.g)] if clips else None

    def chance(self):
        """A number in [0, 1)."""
        return float(torch.rand((), generator=self.g))

    def pick(self, z):
        """One of a clip's frames."""
        return int(torch.randint(z.x0.shape[2], (), generator=self.g))

    def noised(self, clip, view=None, alpha=0.0, caption=""):
        """The clip with noise, x_t = √ᾱ·x0 + √(1−ᾱ)·ε, at a timestep that is uniform or, with an
        alpha, favours high noise (NewMove Sec. 3.2); view: a view of data.py, drawn anew."""
        S, device, x0 = self.model.schedule, self.model.device, clip.latents
        if view:
            video = view(clip.video, self.g)
            x0 = self.model.encode(video[None], self.g)
        weights = sampler.timestep_weights(S.num_train_timesteps, alpha)
        t = int(sampler.draw_timesteps(weights, 1, self.g))
        noise = torch.randn(x0.shape, generator=self.g)
        noise = machine.send(noise, device)
        x = S.add_noise(x0, noise, t)
        return Noised(x0, noise, t, x, caption or clip.prompt, clip, x0.shape[2] > 1)

    def frame(self, z):
        """One frame of what was noised, with the same noise and timestep; as a single picture it
        goes past every temporal layer."""
        f = self.pick(z)
        one = [v[:, :, f : f + 1] for v in (z.x0, z.noise, z.x)]
        return Noised(one[0], one[1], z.t, one[2], z.caption, z.clip, temporal=False)

    def alpha_bar(self, z):
        """ᾱ at the timestep of z, a number."""
        return self.model.schedule.alpha_bar[z.t].item()

    def learns(self, part):
        """Whether there is a learner of this part that has something to learn."""
        return any(one.parameters() for one in self.parts.get(part, ()))

    def learn(self, *parts, beside=()):
        """Let these parts learn and act, those `beside` them act, and all others rest, until the
        next call: a statement, since layers that are computed again in the backward pass must find
        things as they were. Of learners that each clip has, this clip's."""
        if not any(map(self.learns, parts)):
            raise BadInput(f"{' and '.join(parts)}: nothing to learn with these settings, and step "
                           f"{self.step} would teach it; choose its layers.")
        self.words = lora.switch(self.run.learners, parts, beside, self.index)

    def predict(self, *noised, align="output"):
        """What the network says of each, and what it should say, a pair (1, C, F, h, w) each: its
        output (ε, or v), or from it `epsilon` or `x0`. Several go through it as one batch."""
        torch.manual_seed(int(torch.randint(2**62, (), generator=self.g)))  # dropout's
        pairs, said = [], self.say(self.model, noised)
        for z, one in zip(noised, said):
            true = self.model.schedule.target(z.x0, z.noise, z.t)
            # The plain error, which can be compared between losses, for the log.
            error = F.mse_loss(one.detach(), true)
            self.log.append({"t": z.t, "clip": str(z.clip.path), "mse": error})
            if align != "output":
                x0, eps = self.model.schedule.split(one, z.x, self.alpha_bar(z))
                one, true = (eps, z.noise) if align == "epsilon" else (x0, z.x0)
            pairs.append((one, true))
        return pairs[0] if len(pairs) == 1 else pairs

    def say(self, whole, noised):
        """A model's raw predictions of what was noised, a list; what is watched comes to `seen`."""
        if self.pattern and whole.unet not in self.watched:
            self.attach(whole.unet)
        # The words of a look stand at the end of captions while they act.
        text = whole.read([" ".join([z.caption, *self.words]) for z in noised])
        t = torch.cat([torch.full((1,), z.t, device=whole.device) for z in noised])
        self.seen, self.seeing, said = {}, True, []
        # Where memory is short, one by one, but what is watched is of all as one batch; and where
        # clips differ in length.
        several = [z.x for z in noised]
        if whole.unet.checkpointing and not self.pattern or len({x.shape for x in several}) > 1:
            parts = zip(several, t.split(1), text.split(1))
        else:
            parts = [(torch.cat(several), t, text)]
        for part in parts:
            said += whole.predict(*part, temporal=noised[0].temporal).split(1)
        self.seeing = False
        return said

    @torch.no_grad()
    def base(self, *noised):
        """What the base model, as it was before anything learned, says of each; no gradient. It is
        loaded beside the one that learns when it is first asked for."""
        if self.run.base is None:
            flags = self.run.flags
            self.run.base = model.load(flags.weights, flags.device, flags.precision, keep=())
        said = self.say(self.run.base, noised)
        return said[0] if len(said) == 1 else said

    def watch(self, pattern):
        """From now on `seen` holds, after each prediction, {name: what it gave} of the modules
        whose whole name matches: of an attention its maps (B, heads, N, M), of others their output.
        Of clips that differ in length it is the last's."""
        self.pattern, self.watched = pattern, []

    def attach(self, unet):
        """Hooks for `watch`. They stay until the last backward pass, since layers that are computed
        again there must do what they did the first time."""
        def keeper(name):
            def keep(module, inputs, out):
                got = module.maps(*inputs) if isinstance(module, model.Attention) else out
                if self.seeing:
                    self.seen[name] = got
            return keep

        self.watched.append(unet)
        found = {n: m for n, m in unet.named_modules() if re.fullmatch(self.pattern, n)}
        if not found:
            raise BadInput(f"watch: no module is called {self.pattern!r}.")
        for name, module in found.items():
            self.hooks.append(module.register_forward_hook(keeper(name)))

    def note(self, figures):
        """Figures for the log, beside the last prediction's."""
        self.log[-1] |= figures

    def finish(self):
        """After the last backward pass: stop watching; the log's figures, one dict a prediction."""
        for hook in self.hooks:
            hook.remove()
        return self.log


# ------------------------------------------------------------------------------------------------
# Looking


def looks_gone(run, step, video):
    """Whether the appearance score of a preview, whose looks are not the clip's, has fallen to
    appearance_stop (NewMove's supplement, Sec. 4): from there on, what is learned is the clip
    itself. The paper's score is the mean of 300 videos."""
    own = run.recipe.own
    if not run.scorer or not step:
        return False
    from scores.clip import text_alignment

    score = text_alignment(run.scorer, video, own["look_prompt"] or run.flags.preview_prompt)
    say(f"step {step}: appearance score {score:.3f}")
    return machine.agreed(score <= own["appearance_stop"])


@torch.no_grad()
def preview(run):
    """One sample (3, F, H, W) of the preview prompt, from where the method starts sampling. What is
    learned acts in it but for looks, which were there to be left out, unless nothing else is
    learned."""
    flags, recipe, whole = run.flags, run.recipe, run.model
    whole.unet.eval()
    bar = lambda text: None if run.process else text
    acting = [n for n in run.learners if not n.startswith("look")] or list(run.learners)
    like = (run.clips or run.images)[0].latents
    shape = (like.shape[1], like.shape[2] if run.clips else flags.frames, *like.shape[3:])
    start = sampler.noise_like_shape(shape, [flags.seed]).to(flags.device)
    if recipe.noise_prior and run.clips and (run.inverted is None or recipe.inverts == "tuned"):
        # The base's inversion is made once, before anything has learned.
        lora.switch(run.learners, (), acting if recipe.inverts == "tuned" else ())
        steps = recipe.inversion_steps or flags.preview_steps
        run.inverted = sampler.invert(whole, like, steps, progress=bar("inverting for a sample"))
    if run.inverted is not None:
        start = sampler.blend_noise(run.inverted, start, recipe.noise_prior)
    words = lora.switch(run.learners, (), acting)
    prompt = " ".join([flags.preview_prompt, *words])
    return sampler.sample(whole, [prompt], start, [flags.seed], flags.preview_steps,
                          recipe.guidance, recipe.sampler, progress=bar("a sample"))[0]


if __name__ == "__main__":
    machine.run(main)
