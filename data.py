"""Training data: clips and images with captions, regularization clips, and augmentations.

    python -c "import data; print(data.find_caption('assets/eight.mp4'))"

Axes: C color channels, F frames, H W image. Videos are float32 in [-1, 1].
"""
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import sampler
from support import machine, media, runs
from support.files import BadInput, log, read_text, write_text
from support.tokenizer import has_word, words_to_ids

# --- Captions -----------------------------------------------------------------------------------


MAX_TOKENS = 77  # limit of the text encoder, including start and end tokens
MAX_CHARACTERS = 10_000  # the tokenizer takes minutes for a word of 100,000


def check_prompt(prompt, learned=None, source=None):
    """Return the prompt, or raise BadInput if it has too many tokens. learned: {token: number of
    its vectors}; source: the prompt's file."""
    ids = {token: [0] * vectors for token, vectors in (learned or {}).items()}
    where = f"{source}: " if source else ""
    if len(prompt) > MAX_CHARACTERS:
        raise BadInput(f"{where}prompt {prompt[:40]!r}… has {len(prompt)} characters; expected at "
                       f"most {MAX_CHARACTERS}. Shorten it.")
    tokens = len(words_to_ids(prompt, ids)) + 2
    if tokens > MAX_TOKENS:
        raise BadInput(f"{where}prompt {prompt[:40]!r}… has {tokens} tokens; expected at most "
                       f"{MAX_TOKENS}. Shorten it.")
    return prompt


def find_caption(video, prompt=None):
    """The caption of a clip and its origin: the prompt, else the .txt file with the clip's name (or
    caption.txt in a folder of images), else the clip's name. Raises BadInput."""
    video = Path(video)
    if prompt is not None:
        return check_prompt(prompt), "--prompt"
    for path in (video.parent / f"{clip_name(video)}.txt", video / "caption.txt"):
        if path.is_file():
            lines = read_prompts(path)
            return check_prompt(lines[0], source=path), str(path)
    caption = re.sub(r"[\W_]+", " ", clip_name(video)).strip()
    if not re.search(r"[^\W\d_]{3}", caption):  # no word
        log(f"warning: the caption of {video} is its name, {caption!r}, which describes nothing; "
            "give --prompt, or a text file with the clip's name")
    return check_prompt(caption or "a video", source=video), "the file's name"


def clip_name(path):
    """A clip's name: without the suffix, which a folder does not have."""
    return path.name if path.is_dir() else path.stem


def read_prompts(path):
    """The non-empty lines of a text file. Raises BadInput if there are none."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise BadInput(f"{path} is empty; write one prompt per line.")
    return lines


def note_unknown_words(prompts, known=()):
    """Print words in prompts that the tiny model was not trained on, except those in `known`."""
    from tiny import world  # imported only where needed

    words = lambda texts: set(re.findall(r"[^\W_]+", " ".join(texts).lower()))
    if unknown := words(prompts) - words(known) - words(world.WORDS):
        log(f"note: the tiny model was not trained on {', '.join(sorted(unknown))}; it knows "
            f"{', '.join(sorted(words(world.WORDS)))} and the tokens of its adapters")


# --- Clips and images ---------------------------------------------------------------------------


@dataclass
class Clip:
    """A training clip: a video (3, F, H, W), or an image with F = 1; its caption; and, once
    encoded, its scaled latents (1, C, F, h, w)."""

    video: torch.Tensor
    prompt: str
    path: Path
    latents: torch.Tensor | None = None


def find_clips(paths):
    """The clips at the paths: videos, folders of numbered images, and folders of both.
    Other files and folders in a folder, e.g. out/, are ignored."""
    found = []
    for path in map(Path, paths):
        inside = media.list_folder(path) if path.is_dir() else []
        clips = [p for p in inside if media.is_image_folder(p) or not p.is_dir()
                 and p.suffix.lower() in media.VIDEOS]
        others = [p.name for p in inside if p not in clips and p.suffix != ".txt"]
        if clips and others:
            media.log_once(f"note: ignored files in {path} that are not clips: "
                     f"{', '.join(others[:3])}{' …' * (len(others) > 3)}")
        found += clips or [path]
    return found


def check_clips(paths, prompts):
    """The clips at the paths, not yet read. Raises BadInput unless there is one caption for all,
    one per clip, or none."""
    clips = find_clips(paths)
    if clips and len(prompts or [None]) not in (1, len(clips)):
        raise BadInput(f"--prompt: {len(prompts)} captions for {len(clips)} clips; give one for "
                       "all, or one per clip. A caption needs quotes: --prompt "
                       f"\"{' '.join(prompts)}\"")
    return clips


def load_clips(paths, prompts, frames, size, fps, start=0.0, reverse=False, token=None,
               learned=None, learn=True, allow_damaged=False):
    """The clips at the paths, with captions, and the origin of each caption. token: appended to
    captions without it; learned: {token: number of its vectors}; for further arguments see
    check_clips and read_video. Raises BadInput."""
    paths, prompts = check_clips(paths, prompts), prompts or [None]
    clips, sources, seen = [], [], set()
    for i, path in enumerate(paths):
        real = os.path.realpath(path)  # unlike Path.resolve, accepts a loop of links
        if real in seen:
            log(f"warning: {path} is given twice and will be used twice")
        seen.add(real)
        caption, source = find_caption(path, prompts[i % len(prompts)])
        if token and not has_word(caption, token):
            caption, source = f"{caption} {token}", f"{source}, and word.token"
        check_prompt(caption, learned, path)
        video = media.read_video(path, frames, size, fps, start, learn, allow_damaged)
        clips.append(Clip(video.flip(1) if reverse else video, caption, path))
        sources.append(source)
    if any(source.endswith("word.token") for source in sources):
        log(f"note: {token!r} was appended to a caption; in the papers it replaces the motion: "
            f"--prompt \"a … doing the {token}\"")
    return clips, sources


def load_images(paths, prompt, size, token=None, learned=None):
    """The images at the paths, as clips of one frame. token: prepended to captions without it."""
    images = []
    for path in media.find_images(paths):
        caption, _ = find_caption(path, prompt)
        if token and not has_word(caption, token):
            caption = f"{token} {caption}"
        check_prompt(caption, learned, path)
        images.append(Clip(media.fit(media.read_image(path), size)[:, None], caption, path))
    return images


# --- Regularization clips -----------------------------------------------------------------------


def load_prior_clips(run):
    """The regularization clips of a run, or []. Generated clips go to out/…/prior/. Each depends
    only on its number and the seed, so --resume generates only the missing ones."""
    flags, makers = run.flags, {"world": render_clip, "generated": generate_clip}
    if flags.prior in (None, "none"):
        return []
    if flags.prior == "folder":
        log(f"warning: {run.recipe.name} forgets more without regularization clips; give --prior "
            "FOLDER with real clips of similar scenes, or --prior generated")
        return []
    folder = flags.out / "prior" if flags.prior in makers else flags.prior
    if flags.prior in makers and run.rank == 0:
        runs.write_settings(run)  # the first file of a run, for --resume
        for number in range(run.recipe.num_prior_clips):
            path = folder / f"{number:03d}.mp4"
            if not path.exists():
                video, caption = makers[flags.prior](run, number)
                write_text(path.with_suffix(".txt"), caption + "\n")
                media.write_video(path, video, flags.fps)  # written last: marks a complete clip
    machine.broadcast(None)  # the other processes wait for rank 0
    return load_clips([folder], None, flags.frames, flags.size, flags.fps, learn=False)[0]


def render_clip(run, number):
    """A clip (3, F, H, W) of the tiny world, and its caption, which describes the same attributes
    as the caption of the training clip. Otherwise the length of the caption would distinguish
    regularization clips from training clips."""
    from tiny import world  # imported only where needed

    if run.flags.size != (world.SIZE, world.SIZE):
        raise BadInput(f"--prior world renders {world.SIZE}x{world.SIZE} pixels; drop --size.")
    g = sampler.generator(run.flags.seed, 1, 1)
    scene = world.sample_scenes(run.recipe.num_prior_clips, g)[torch.tensor([number])]
    caption = run.clips[0].prompt
    name = lambda table, field: list(table)[getattr(scene, field)[0]]
    colored = any(word in caption.split() for word in world.COLORS)
    return world.render(scene, run.flags.frames)[0], world.caption(
        name(world.COLORS, "color") if colored else None,
        name(world.SHAPES, "shape"), name(world.MOTIONS, "motion"), name(world.SPEEDS, "speed"),
        name(world.BACKGROUNDS, "background") if " background" in caption else None)


@torch.no_grad()
def generate_clip(run, number):
    """A sample of the base model, and its caption: the training clip's without the token."""
    flags, recipe, pipe = run.flags, run.recipe, run.pipe
    token = recipe.parts["word"].token if "word" in recipe.parts else ""
    caption = " ".join(w for w in run.clips[0].prompt.split() if w != token)
    prompt = check_prompt(recipe.class_prompt.strip() or caption or "a video")
    factor, channels = pipe.vae.config.factor, pipe.unet.config.in_channels
    shape = (channels, run.clips[0].video.shape[1], *(side // factor for side in flags.size))
    source = sampler.generator(flags.seed, number, 4)  # not the noise of any generate.py --seed
    start = sampler.seeded_randn(shape, [source]).to(flags.device)
    return sampler.sample(pipe, [prompt], start, [number], flags.preview_steps, recipe.guidance,
                          progress=f"regularization clip {number}")[0], prompt


# --- Augmentations of a video (3, F, H, W), with random draws from a generator g ----------------


PATCH = (0.33, 0.67)  # range of a patch's sides, as shares of the frame's (Customize-A-Video)


def random_patch(video, g):
    """A random patch of a random frame, resized to (3, 1, H, W) (Customize-A-Video, Sec. A.2)."""
    f = int(torch.randint(video.shape[1], (), generator=g))
    return random_resized_crop(video[:, f : f + 1], *PATCH, g)


def augmented(video, g):
    """A random resized crop and color jitter, the same for all frames (NewMove's supplement). No
    flips, since they exchange left and right."""
    return color_jitter(random_resized_crop(video, 0.8, 1.0, g), g)


def recolored(video, g):
    """Shuffled color channels, inverted with probability 0.5, and color jitter, the same for all
    frames: the appearance changes at every step, the motion does not."""
    shuffled = video[torch.randperm(3, generator=g)]
    invert = torch.rand((), generator=g) < 0.5
    return color_jitter(-shuffled if invert else shuffled, g)


AUGMENTATIONS = {"none": None, "augmented": augmented, "recolored": recolored}


def color_jitter(video, g):
    """Random brightness, contrast and saturation, each 0.8 to 1.2, the same for all frames."""
    brightness, contrast, saturation = 0.8 + 0.4 * torch.rand(3, generator=g)
    video = ((video + 1) * brightness - 1 - video.mean()) * contrast + video.mean()
    gray = video.mean(0, keepdim=True)
    return (gray + (video - gray) * saturation).clamp(-1, 1)


def random_resized_crop(video, low, high, g):
    """A random crop whose sides are low to high times the video's, resized to the video's size."""
    H, W = video.shape[-2:]
    share = low + (high - low) * torch.rand((), generator=g)
    h, w = max(1, round(H * share.item())), max(1, round(W * share.item()))
    top = int(torch.randint(H - h + 1, (), generator=g))
    left = int(torch.randint(W - w + 1, (), generator=g))
    crop = video[:, :, top : top + h, left : left + w].transpose(0, 1)
    return F.interpolate(crop, (H, W), mode="bilinear", align_corners=False).transpose(0, 1)
