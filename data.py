"""What there is to learn from: clips and pictures with their captions, and how a method sees them.

    python -c "import data; print(data.find_caption('assets/eight.mp4'))"

Axes: C colours, F frames, H W picture. Videos are float32 in [-1, 1].
"""
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import sampler
from support import machine
from support.files import BadInput, check_exists, log, reading, write_text
from support.media import (
    VIDEOS,
    find_images,
    fit,
    natural,
    read_image,
    read_video,
    write_video,
)
from support.tokenizer import has_word, words_to_ids

# ------------------------------------------------------------------------------------------------
# Captions


MOST_TOKENS = 77  # that the text encoder reads, with the start and the end


def check_prompt(prompt, learned=None, source=None):
    """The prompt itself; learned: {word: how many vectors it has}; source: the file it is from.
    Raises BadInput when the text encoder could not read all of it."""
    ids = {word: [0] * vectors for word, vectors in (learned or {}).items()}
    tokens = len(words_to_ids(prompt, ids)) + 2
    if tokens > MOST_TOKENS:
        where = f"{source}: " if source else ""
        raise BadInput(f"{where}prompt {prompt[:40]!r}… has {tokens} tokens; the text encoder "
                       f"reads {MOST_TOKENS} at most. Shorten it.")
    return prompt


def find_caption(video, prompt=None):
    """The caption of a clip and where it came from: the prompt, else clip.txt beside the clip (or
    inside a folder of pictures: caption.txt), else the file's name. Raises BadInput."""
    video = Path(video)
    if prompt is not None:
        return check_prompt(prompt), "--prompt"
    for path in (video.parent / f"{video.stem}.txt", video / "caption.txt"):
        if path.is_file():
            with path.open(errors="replace") as file:
                text = file.read(10_000).strip()
            if not text:
                raise BadInput(f"{path} is empty; write the caption in it, or give --prompt.")
            return check_prompt(text.splitlines()[0], source=path), str(path)
    caption = re.sub(r"[\W_]+", " ", video.stem).strip()
    if not re.search(r"[^\W\d_]{3}", caption):  # no word
        log(f"warning: the caption of {video} is its name, {caption!r}, which says nothing; give "
            "--prompt, or a text file of the same name beside it")
    return check_prompt(caption or "a video", source=video), "the file's name"


def read_prompts(path):
    """The lines of a text file that are not empty, of which it has some. Raises BadInput."""
    with reading(path, "give a text file with one prompt a line"):
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        return list(filter(None, lines)) or 1 / 0


def note_unknown_words(texts, taught=()):
    """Say in one line which words of texts the tiny model met neither in its world's captions nor
    in the texts `taught`."""
    from tiny import world  # needed here alone

    words = lambda several: set(re.findall(r"[^\W_]+", " ".join(several).lower()))
    if strange := words(texts) - words(taught) - words(world.WORDS):
        log(f"note: the tiny model has never met {', '.join(sorted(strange))}; it knows "
            f"{', '.join(sorted(words(world.WORDS)))} and what it was taught with an adapter")


# ------------------------------------------------------------------------------------------------
# Clips to learn from


@dataclass
class Clip:
    """Something to learn from, with its caption: a video (3, F, H, W), or a picture, where F is 1;
    and its latents (1, C, F, h, w), scaled, once they are made."""

    video: torch.Tensor
    prompt: str
    path: Path
    latents: torch.Tensor | None = None


def check_clips(paths, prompts):
    """The clips that the paths name, of which nothing is read. Raises BadInput for one that is not
    there, and unless there is one caption for all, one a clip, or none."""
    clips = find_clips(paths)
    for clip in clips:
        check_exists(clip, "give a video file or a folder of pictures")
    if clips and len(prompts or [None]) not in (1, len(clips)):
        raise BadInput(f"--prompt: {len(prompts)} captions for {len(clips)} clips; give one for "
                       "all, or one a clip; one caption is written in quotes: --prompt "
                       f"\"{' '.join(prompts)}\"")
    return clips


def load_clips(paths, prompts, frames, size, fps, start=0.0, reverse=False, word=None,
               learned=None, learn=True):
    """The clips that the paths name, with their captions, and where each caption is from.

    prompts: one caption for all, or one a clip, or None; word: put at the end of a caption that
    lacks it; learned: {word: vectors}, for the captions' length; else as `read_video`. Raises
    BadInput.
    """
    paths, prompts = check_clips(paths, prompts), prompts or [None]
    clips, sources, seen = [], [], set()
    for i, path in enumerate(paths):
        if path.resolve() in seen:
            log(f"warning: {path} is given twice, and counts twice")
        seen.add(path.resolve())
        caption, source = find_caption(path, prompts[i % len(prompts)])
        if word and not has_word(caption, word):
            caption, source = f"{caption} {word}", f"{source}, and word.text"
        check_prompt(caption, learned, path)
        video = read_video(path, frames, size, fps, start, learn)
        clips.append(Clip(video.flip(1) if reverse else video, caption, path))
        sources.append(source)
    if any(source.endswith("word.text") for source in sources):
        log(f"note: {word!r} was put at the end of a caption; the papers have it in the motion's "
            f"place: --prompt \"a … doing the {word}\"")
    return clips, sources


def load_images(paths, prompt, size, word=None, learned=None):
    """The pictures that the paths name, as clips of one frame; word: put before a caption that
    lacks it. Raises BadInput."""
    images = []
    for path in find_images(paths):
        caption, _ = find_caption(path, prompt)
        if word and not has_word(caption, word):
            caption = f"{word} {caption}"
        check_prompt(caption, learned, path)
        images.append(Clip(fit(read_image(path), size)[:, None], caption, path))
    return images


def load_prior(folder, frames, size, fps):
    """The clips of a folder that is kept beside the clip to learn from, with their captions.
    Raises BadInput."""
    return load_clips([folder], None, frames, size, fps, learn=False)[0]


def find_clips(paths):
    """The clips that the paths name: video files, folders of numbered pictures (a clip each), and
    folders of such files and folders; of one that holds none, the folder itself."""
    found = []
    for path in map(Path, paths):
        inside = sorted(path.iterdir(), key=natural) if path.is_dir() else []
        clips = [p for p in inside if p.suffix.lower() in VIDEOS or p.is_dir()]
        found += clips or [path]
    return found


# ------------------------------------------------------------------------------------------------
# Regularization clips


def load_prior_clips(run):
    """The prior clips of a run, as its flags and recipe say; [] for none."""
    flags, made = run.flags, {"world": of_the_world, "generated": by_the_base}
    if flags.prior in (None, "none"):
        return []
    if flags.prior == "folder":  # none was named
        log(f"warning: no prior clips: {run.recipe.name} forgets more without; give --prior FOLDER,"
            " best of real clips of similar scenes, or --prior generated")
        return []
    folder = flags.out / "prior" if flags.prior in made else flags.prior
    if flags.prior in made and not run.rank:
        for number in range(run.recipe.num_prior_clips):
            path = folder / f"{number:03d}.mp4"
            if not path.exists():  # it is written last, and whole
                video, caption = made[flags.prior](run, number)
                write_text(path.with_suffix(".txt"), caption + "\n")
                write_video(path, video, flags.fps)
    machine.broadcast(None)  # the other processes wait for the first
    return load_prior(folder, flags.frames, flags.size, flags.fps)


def of_the_world(run, number):
    """A clip (3, F, H, W) of the tiny world's own motions, and its caption."""
    from tiny import world  # imported only where needed

    if run.flags.size != (world.SIZE, world.SIZE):
        raise BadInput(f"--prior world is of {world.SIZE}x{world.SIZE} pixels; leave --size out.")
    g = sampler.generator(run.flags.seed, 1, 1)
    scene = world.sample_scenes(run.recipe.num_prior_clips, g)[torch.tensor([number])]
    # As the clip's caption speaks, so does this: or what tells the two apart were its length.
    said = run.clips[0].prompt
    name = lambda table, field: list(table)[getattr(scene, field)[0]]
    return world.render(scene, run.flags.frames)[0], world.caption(
        name(world.COLOURS, "colour") if any(w in said.split() for w in world.COLOURS) else None,
        name(world.SHAPES, "shape"), name(world.MOTIONS, "motion"), name(world.SPEEDS, "speed"),
        name(world.BACKGROUNDS, "background") if " background" in said else None)


@torch.no_grad()
def by_the_base(run, number):
    """A clip of the caption without its word, sampled from the untrained model (DreamBooth)."""
    flags, recipe, model = run.flags, run.recipe, run.pipe
    word = recipe.parts["word"].token if "word" in recipe.parts else ""
    caption = " ".join(w for w in run.clips[0].prompt.split() if w != word)
    prompt = check_prompt(recipe.class_prompt or caption or "a video")
    factor, channels = model.vae.config.factor, model.unet.config.in_channels
    shape = (channels, run.clips[0].video.shape[1], *(side // factor for side in flags.size))
    source = sampler.generator(flags.seed, number, 4)  # no start that --seed could name
    start = sampler.seeded_randn(shape, [source]).to(flags.device)
    return sampler.sample(model, [prompt], start, [number], flags.preview_steps, recipe.guidance,
                          progress=f"prior clip {number}")[0], prompt


# ------------------------------------------------------------------------------------------------
# Views: what of a video (3, F, H, W) a method sees, drawn from a generator


PATCH = (0.33, 0.67)  # of the sides: Customize-A-Video's


def random_patch(video, g):
    """A random part of one random frame, a third to two thirds as wide and high, enlarged, (3, 1,
    H, W): what things look like, without where they are (Customize-A-Video)."""
    f = int(torch.randint(video.shape[1], (), generator=g))
    return random_resized_crop(video[:, f : f + 1], *PATCH, g)


def augmented(video, g):
    """All frames, all alike a little enlarged, shifted, and changed in brightness, contrast and
    saturation (NewMove's supplement names spatial and colour augmentation, with no figures).
    Never flipped: a flip turns left into right."""
    return color_jitter(random_resized_crop(video, 0.8, 1.0, g), g)


def recolored(video, g):
    """All frames, all alike with red, green and blue shuffled, half of the time as a negative, and
    tinted: another look at each step, and what the looks share is the motion."""
    shuffled = video[torch.randperm(3, generator=g)]
    negative = torch.rand((), generator=g) < 0.5
    return color_jitter(-shuffled if negative else shuffled, g)


AUGMENTATIONS = {"none": None, "augmented": augmented, "recolored": recolored}


def color_jitter(video, g):
    """Brightness, contrast and saturation up to a fifth more or less, the same in all frames."""
    light, contrast, colour = 0.8 + 0.4 * torch.rand(3, generator=g)
    video = ((video + 1) * light - 1 - video.mean()) * contrast + video.mean()
    grey = video.mean(0, keepdim=True)
    return (grey + (video - grey) * colour).clamp(-1, 1)


def random_resized_crop(video, least, most, g):
    """A random part of (3, F, H, W), least … most of its sides, at the video's own size."""
    H, W = video.shape[-2:]
    share = least + (most - least) * torch.rand((), generator=g)
    h, w = max(1, round(H * share.item())), max(1, round(W * share.item()))
    top = int(torch.randint(H - h + 1, (), generator=g))
    left = int(torch.randint(W - w + 1, (), generator=g))
    part = video[:, :, top : top + h, left : left + w].transpose(0, 1)
    return F.interpolate(part, (H, W), mode="bilinear", align_corners=False).transpose(0, 1)
