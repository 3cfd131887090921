"""Folders of videos: reading what train.py and generate.py wrote, and folders of other videos.

Axes: F frames, H W image.
"""
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import data
from scores import samples
from support import media
from support.files import BadInput, log, number, read_fields, read_json, reading, slug


@dataclass
class Sample:
    """A video (3, F, H, W) in [-1, 1] with its prompt, its seed, and the rate it is measured at.
    `figures` and `features` are filled in when it is scored."""

    video: torch.Tensor
    prompt: str
    seed: int
    path: Path
    fps: float
    figures: dict = field(default_factory=dict)  # {metric: number or None}
    features: torch.Tensor | None = None  # CLIP's of its frames, (F, D)
    held: float | None = None  # the share of its tracks that can be trusted


@dataclass
class Run:
    """Samples, those of them that are compared with the other runs', the clips they learned from,
    and what is known of the sampling and of the training."""

    name: str
    path: Path
    samples: list
    references: list
    made: object  # a GeneratedInfo, or None
    trained: object  # a TrainingInfo, or None
    compared: list = field(default_factory=list)


# ------------------------------------------------------------------------------------------------
# Files that train.py and generate.py wrote, checked here once


@dataclass
class TrainingInfo:
    """Of a run.json, what a run learned from, as its flags say it; and its folder and method."""

    folder: str
    method: str
    video: list[str]
    size: list[int] = number(8, 4096)  # H, W
    frames: int
    fps: float = number(0.01, 1000)
    start: float = number(0, 1e6)
    weights: str | None
    preview_prompt: str
    reverse: bool = False


@dataclass
class GeneratedInfo:
    """A settings.json: how generate.py made the videos beside it; all may be missing."""

    videos: list[list] = field(default_factory=list)  # [file, prompt, seed] each
    frames: int = 16
    fps: float = number(0.01, 1000, 8.0)
    adapter: list[str] = field(default_factory=list)
    scale: list[float] = field(default_factory=lambda: [1.0])
    steps_trained: int | None = None
    weights: str | None = None
    noise_prior: float = 0.0


def read_trained(folder):
    """What train.py wrote of a run. Raises BadInput."""
    path = folder / "run.json"
    with reading(path, "train again"):
        run = read_json(path)
        return read_fields(TrainingInfo, run["flags"] | {"folder": str(folder), "method": slug(
            run["method"])}, path)


def read_generated(folder):
    """What generate.py wrote beside its videos; None where nothing is. Raises BadInput, above all
    for a file that is not in the folder: what is read here ends up in a page."""
    path = folder / "settings.json"
    if not path.is_file():
        return None
    with reading(path, "make the folder again"):
        made = read_fields(GeneratedInfo, read_json(path), path)
        made.videos = [(str(file), str(prompt), int(seed)) for file, prompt, seed in made.videos]
        for file, _, _ in made.videos:
            video = folder / file  # its content ends up in a page
            if Path(file).name != file or video.is_symlink() or not video.is_file():
                raise BadInput(f"{path} names {file[:80]!r}, which is not a file in its folder; "
                               "make the folder again.")
        return made


# ------------------------------------------------------------------------------------------------
# Reading runs


def read_runs(args):
    """All runs, of which train.py's are sampled first. Raises BadInput."""
    folders, paths = [], list(dict.fromkeys(path.resolve() for path in args.runs))
    trained = [path for path in paths if (path / "run.json").is_file()]
    for path in paths:
        if path not in trained:
            folders.append((path.name, path))
            continue
        same = sum(other.name == path.name for other in trained) > 1
        place = args.out / "samples" / (slug(str(path), 999)[-60:] if same else path.name)
        for name, folder in samples.sample_folder(path, read_trained(path), place, args).items():
            whose = f"{path.name}: " if len(trained) > 1 and name != path.name else ""
            folders.append((whose + name, folder))
    names, runs = [name for name, _ in folders], []
    for name, folder in folders:
        runs.append(read_run(name if names.count(name) == 1 else str(folder), folder, args))
    shared = next((run.references for run in runs if run.references), [])
    for run in runs:  # the base model's videos, say, which know of no clip
        run.references = run.references or shared
    return runs


def read_run(name, folder, args):
    """A folder of videos. What generate.py wrote names its prompts, and through its adapter the
    clips that were learned from, unless --reference gives them. Raises BadInput."""
    made = read_generated(folder)
    shape = args.frames or (made or GeneratedInfo()).frames, args.fps or (made or GeneratedInfo()).fps
    files = [(folder / file, prompt, seed) for file, prompt, seed in (made or GeneratedInfo()).videos]
    for file in [] if files else list_clips(folder):
        files.append((file, data.find_caption(file)[0], len(files)))  # a caption may come twice
    videos = []
    for file, prompt, seed in tqdm(files, desc=f"reading {name}", delay=2):
        videos.append(Sample(read(file, args, *shape), prompt, seed, file, shape[1]))
    trained = find_trained(made) if made else None
    references = [Sample(read(file, args, *shape), "", 0, file, shape[1])
                  for file in data.find_clips(args.reference)]
    if trained and not references:
        references = learned_from(name, trained, shape[0], args)
    return Run(name, folder, videos, references, made, trained)


def list_clips(folder):
    """The videos of a folder, and the folders in it of numbered pictures; or itself, where it is
    one. Raises BadInput."""
    pictures = lambda p: any(f.suffix.lower() in media.IMAGES for f in media.list_folder(p))
    found = []
    for path in media.list_folder(folder):
        if path.suffix.lower() in media.VIDEOS or path.is_dir() and pictures(path):
            found.append(path)
    if not found and not pictures(folder):
        raise BadInput(f"{folder} holds no videos; give a folder of train.py's or generate.py's, "
                       f"or of {', '.join(media.VIDEOS)}.")
    return found or [folder]


def find_trained(made):
    """What the first adapter that lies in a run's folder was trained on; None where none does."""
    for adapter in map(Path, made.adapter):
        for folder in (adapter.parent, adapter.parent.parent.parent):  # the latter from steps/…/
            if (folder / "run.json").is_file():
                return read_trained(folder)
    return None


def learned_from(name, t, frames, args):
    """The clips that a run learned from, as they were learned: their part of the time, the shape,
    and the direction."""
    found = []
    for clip in map(Path, t.video):
        if not clip.exists():
            log(f"{name}: its clip {clip} is not here; give --reference")
            continue
        for path in data.find_clips([clip]):
            video = read(path, args, frames, t.fps, t.start, *t.size)
            found.append(Sample(video.flip(1) if t.reverse else video, "", 0, path, t.fps))
    return found


def read(path, args, frames, fps, start=0.0, height=1, width=1):
    """A clip at the size and rate that everything is measured at: the square in the middle of the
    picture, of a picture of height : width where training had cut it to that."""
    scale = args.size / min(height, width)
    size = round(height * scale), round(width * scale)
    video = media.read_video(path, frames, size, fps, start, learn=False)
    top, left = (size[0] - args.size) // 2, (size[1] - args.size) // 2
    video = video[..., top : top + args.size, left : left + args.size]
    if args.keyframes:
        if max(args.keyframes) >= video.shape[1]:
            raise BadInput(f"--keyframes {max(args.keyframes)}: {path} has {video.shape[1]} frames "
                           "at this rate.")
        video = video[:, args.keyframes]
    return video
