"""Reading folders of videos: those that train.py and generate.py wrote, and others.

Axes: F frames, H W pixels.
"""
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import data
from scores import samples
from support import media
from support.files import BadInput, escaped, log, number, read_fields, read_json, reading, slug


@dataclass
class Sample:
    """A video (3, F, H, W) in [-1, 1] with its prompt, seed and frame rate. Scoring fills in the
    last three fields."""

    video: torch.Tensor
    prompt: str
    seed: int
    path: Path
    fps: float
    metrics: dict = field(default_factory=dict)  # {name: number or None}
    features: torch.Tensor | None = None  # of the frames, from CLIP, (F, D)
    reliable: float | None = None  # the share of reliable tracks


@dataclass
class Run:
    """One column of the table: samples, and the training clips as references."""

    name: str
    path: Path
    samples: list
    references: list
    generated: object  # a GeneratedInfo
    training: object  # a TrainingInfo, or None
    compared: list = field(default_factory=list)  # the samples with prompts that all runs share


# --- Files that train.py and generate.py wrote --------------------------------------------------


@dataclass
class TrainingInfo:
    """The training data of a run.json, with the run's folder and method."""

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
    """A settings.json of generate.py. A folder without one has the defaults."""

    videos: list[list] = field(default_factory=list)  # [file, prompt, seed] each
    frames: int = 16
    fps: float = number(0.01, 1000, 8.0)
    adapter: list[str] = field(default_factory=list)
    scale: list[float] = field(default_factory=lambda: [1.0])
    steps_trained: int | None = None
    weights: str | None = None
    noise_prior: float = 0.0


def read_training(folder):
    """The TrainingInfo of a run's folder. Raises BadInput."""
    path = folder / "run.json"
    with reading(path, "train again"):
        run = read_json(path)
        values = run["flags"] | {"folder": str(folder), "method": slug(run["method"])}
        return read_fields(TrainingInfo, values, path)


def read_generated(folder):
    """The GeneratedInfo of a folder. Raises BadInput, also for videos outside the folder, since the
    videos are embedded in the HTML report."""
    path = folder / "settings.json"
    if not path.is_file():
        return GeneratedInfo()
    with reading(path, "generate the folder again"):
        info = read_fields(GeneratedInfo, read_json(path), path)
        info.videos = [(str(file), str(prompt), int(seed)) for file, prompt, seed in info.videos]
        for file, _, _ in info.videos:
            video = folder / file
            if Path(file).name != file or video.is_symlink() or not video.is_file():
                raise BadInput(f"{path} names {file[:80]!r}, which is not a file in its folder; "
                               "generate the folder again.")
        return info


def find_training(generated):
    """The TrainingInfo of the first adapter that is still in its run's folder, or None."""
    for adapter in map(Path, generated.adapter):
        for folder in (adapter.parent, adapter.parent.parent.parent):  # the latter from steps/N/
            if (folder / "run.json").is_file():
                return read_training(folder)
    return None


# --- Reading runs -------------------------------------------------------------------------------


def read_runs(args):
    """All runs, named by their path below their common folder. Folders of train.py are sampled
    first. Raises BadInput."""
    paths = list(dict.fromkeys(path.resolve() for path in args.runs))
    common, folders = os.path.commonpath([path.parent for path in paths]), {}
    several = sum((path / "run.json").is_file() for path in paths) > 1
    for path in paths:
        name = str(path.relative_to(common))
        if not (path / "run.json").is_file():
            folders[name] = path
            continue
        out = args.out / "samples" / name
        for part, folder in samples.sample_folder(path, read_training(path), out, args).items():
            other = f"{name}: {part}" if several else part
            folders[name if part == path.name else other] = folder
    runs = [read_run(name, folder, args) for name, folder in folders.items()]
    shared = next((run.references for run in runs if run.references), [])
    for run in runs:  # e.g. samples of the base model have no training clips
        run.references = run.references or shared
    return runs


def read_run(name, folder, args):
    """The Run of a folder of videos. Its references are --reference, else the training clips of its
    adapter. Raises BadInput."""
    generated = read_generated(folder)
    frames, fps = args.frames or generated.frames, args.fps or generated.fps
    listed = generated.videos or [(file, data.find_caption(file)[0], number)  # captions may repeat
                                  for number, file in enumerate(list_videos(folder))]
    videos = []
    for file, prompt, seed in tqdm(listed, desc=escaped(f"reading {name}"), delay=2):
        video = read(folder / file, args, frames, fps)
        videos.append(Sample(video, prompt, seed, folder / file, fps))
    references = [Sample(read(file, args, frames, fps), "", 0, file, fps)
                  for file in data.find_clips(args.reference)]
    training = find_training(generated)
    if training and not references:
        references = read_training_clips(name, training, frames, args)
    return Run(name, folder, videos, references, generated, training)


def list_videos(folder):
    """The video files and the folders of numbered images in a folder; the folder itself if it has
    only images. Raises BadInput."""
    found = []
    for path in media.list_folder(folder):
        if path.suffix.lower() in media.VIDEOS or media.is_image_folder(path):
            found.append(path)
    if not found and not media.is_image_folder(folder):
        raise BadInput(f"{folder} has no videos; give a folder that train.py or generate.py wrote, "
                       f"or a folder of {', '.join(media.VIDEOS)}.")
    return found or [folder]


def read_training_clips(name, training, frames, args):
    """The training clips of a run as training used them: start, frame rate, crop and direction."""
    found = []
    for clip in map(Path, training.video):
        if not clip.exists():
            log(f"{name}: the training clip {clip} does not exist; give --reference")
            continue
        for path in data.find_clips([clip]):
            video = read(path, args, frames, training.fps, training.start, *training.size)
            video = video.flip(1) if training.reverse else video
            found.append(Sample(video, "", 0, path, training.fps))
    return found


def read(path, args, frames, fps, start=0.0, height=1, width=1):
    """A clip at the size and frame rate of the evaluation: cropped to height : width, then to the
    center square."""
    scale = args.size / min(height, width)
    size = round(height * scale), round(width * scale)
    video = media.read_video(path, frames, size, fps, start, learn=False)
    top, left = (size[0] - args.size) // 2, (size[1] - args.size) // 2
    video = video[..., top : top + args.size, left : left + args.size]
    if args.keyframes:
        if max(args.keyframes) >= video.shape[1]:
            raise BadInput(f"--keyframes {max(args.keyframes)}: {path} has {video.shape[1]} frames "
                           f"at {fps:g} fps; give smaller numbers.")
        video = video[:, args.keyframes]
    return video
