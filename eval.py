"""Score videos, and lay them out to be looked at: what they show, what they copied, how they move.

    python eval.py out/eight-vmc                    # a folder of train.py's: base, steps, result
    python eval.py out/generated                    # a folder of generate.py's
    python eval.py out/a out/b --reference clip.mp4 # compare two, to one clip
    python eval.py some/videos --reference other/videos --size 256
    python eval.py out/a out/b --user-study         # blind pairs, for people to choose from
    python eval.py --votes votes.json               # what they chose

A run is a folder that train.py or generate.py wrote, or any folder of videos with captions. Prints
a table and writes metrics.json and page.html to --out.

Axes: F frames, H W picture.
"""
import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import data
from scores import figures, page, samples, study
from support import machine, media
from support.files import (
    BadInput,
    number,
    read_fields,
    read_json,
    reading,
    say,
    slug,
    write_json,
)
from support.flags import Parser, real, whole


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
    made: object  # a Made, or None
    trained: object  # a Trained, or None
    compared: list = field(default_factory=list)


def main(argv=None):
    """Score runs; print the table; write metrics.json and page.html."""
    args = parse(argv)
    if args.votes:
        return study.count_votes(args.votes, args.key)
    machine.keep_memory()
    args.device = machine.find_device(args.device)
    scorers = figures.load_scorers(args)
    runs = read_runs(args)
    notes = figures.choose_shared(runs)
    if args.world is None:
        args.world = all(r.made and r.made.videos and not r.made.weights for r in runs)
    table = {}
    for run in runs:
        figures.score(run, args, scorers)
        table[run.name] = figures.summary(run, args, scorers)
    threshold = figures.count_copies(runs, table, args, scorers)
    notes += explain(runs)
    show(table, notes)
    write(runs, table, notes, threshold, args)


def write(runs, table, notes, threshold, args):
    """metrics.json, page.html, and the study."""
    out, videos, references = args.out or args.runs[0], [], {}
    for run in runs:
        references[run.name] = [r.path for r in run.references]
        for s in run.samples:
            about = {"run": run.name, "file": s.path, "prompt": s.prompt, "seed": s.seed}
            videos.append(about | s.figures)
    write_json(out / "metrics.json", {
        "table": table, "notes": notes, "copy threshold": threshold, "videos": videos,
        "references": references, "settings": {k: str(v) for k, v in vars(args).items() if v}})
    print(f"written: {out / 'metrics.json'}")
    page.report(out / "page.html", runs, table, notes)
    if args.user_study:
        kept = [run for run in runs if not run.name.rpartition(": ")[2].startswith("step ")]
        study.study(out, kept, args.ratings, args.question)


# ------------------------------------------------------------------------------------------------
# The flags


def parse(argv=None):
    """The flags. Raises BadInput."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="folders that train.py or generate.py wrote, or of "
        "videos")
    add("--reference", nargs="+", type=Path, default=[], help="the clips that were learned from "
        "(default: those of the run's adapter)")
    add("--prompts", type=Path, help="for train.py's folders: what to sample, one prompt a line "
        "(default: the run's preview prompt)")
    add("--seeds", type=whole(1, 10**6), default=1, help="and so many videos of each prompt "
        "(default: 1)")
    # the scorers
    add("--clip", help="an open_clip model such as ViT-H-14, or ViT-L-14-quickgelu for OpenAI's "
        "weights (default: the tiny CLIP)")
    add("--clip-weights", type=Path, help="its weights, a local file")
    add("--motion-words", type=str, help="the words of the prompts that name the motion: the rest "
        "of each is its appearance, for the appearance score")
    add("--pick-weights", type=Path, help="PickScore's (CLIP ViT-H-14 in the hub's format)")
    add("--sscd", type=Path, help="sscd_disc_mixup.torchscript.pt of its authors' "
        "facebookresearch/sscd-copy-detection, for the copy score (default: the CLIP's picture "
        "features)")
    add("--copy-threshold", type=real(-1, 1), help="of the share of copies (default: 0.25 for "
        "SSCD; else the 99th percentile of the run of the base model, where there is one)")
    add("--classifier", type=Path, help="a video classifier, (1, 3, F, H, W) to logits, for motion "
        "accuracy; made by torch.jit.script(net).save(FILE)")
    add("--motion-class", type=whole(0), help="the class wanted (default: the references')")
    add("--lpips", type=Path, help="a distance of two batches of pictures, for diversity; made by "
        "import torch, lpips; a = torch.zeros(16, 3, 256, 256); "
        "torch.jit.trace(lpips.LPIPS(), (a, a)).save(FILE)")
    add("--trust-scripts", action="store_true", help="load --sscd, --classifier and --lpips: they "
        "are TorchScript, which is a program and runs with your rights (torch calls the format "
        "deprecated, and still reads it)")
    add("--tracks", type=Path, help="tracks of other programs: FOLDER/video's folder/its name.npy, "
        "(P, F, 2) pixels (default: followed here)")
    add("--world", action=argparse.BooleanOptionalAction, help="read the tiny world's looks and "
        "motions too (default: for the tiny model's videos)")
    # what is measured
    add("--frames", type=whole(4, 4096), help="frames of each video (default: as generated, else "
        "16)")
    add("--keyframes", nargs="+", type=whole(0), help="measure these of them alone, by number from "
        "0")
    add("--fps", type=real(0.01, 1000), help="frames a second (default: as generated, else 8)")
    add("--size", type=whole(32, 2048), default=256, help="pixels of the square everything is "
        "measured at, cropped at the centre (default: 256)")
    # people
    add("--user-study", action="store_true", help="write study.html too: blind pairs")
    add("--ratings", action="store_true", help="with 1 to 5 for motion, appearance and text")
    add("--question", type=str, help="what the study asks",
        default="Which one moves more like the reference, and shows the prompt?")
    add("--votes", nargs="+", type=Path, help="count what a study's pages saved, and nothing else")
    add("--key", type=Path, help="the study's key (default: study-key.json beside the votes)")
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    add("--out", type=Path, help="folder of all that is written (default: the first run)")
    return checked(parser.parse_args(argv))


def checked(args):
    """The flags. Raises BadInput for those that make no sense together, and for what is missing."""
    if bool(args.runs) == bool(args.votes):
        raise BadInput("give folders to score, or --votes FILE.")
    if args.keyframes and len(args.keyframes) < 2:
        raise BadInput("--keyframes: wanted two or more numbers from 0 up.")
    if args.prompts and not args.prompts.is_file():
        raise BadInput(f"{args.prompts} does not exist; give a text file with one prompt a line.")
    for path in args.runs:
        if not path.is_dir():
            raise BadInput(f"{path} is not a folder; give train.py's or generate.py's, or one of "
                           "videos.")
    return args


# ------------------------------------------------------------------------------------------------
# Files that train.py and generate.py wrote. Each is read here alone, and checked: what stands
# behind may trust what it gets.


@dataclass
class Trained:
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
class Made:
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
        return read_fields(Trained, run["flags"] | {"folder": str(folder), "method": slug(
            run["method"])}, path)


def read_made(folder):
    """What generate.py wrote beside its videos; None where nothing is. Raises BadInput, above all
    for a file that is not in the folder: what is read here ends up in a page."""
    path = folder / "settings.json"
    if not path.is_file():
        return None
    with reading(path, "make the folder again"):
        made = read_fields(Made, read_json(path), path)
        made.videos = [(str(file), str(prompt), int(seed)) for file, prompt, seed in made.videos]
        for file, _, _ in made.videos:
            if Path(file).name != file or (folder / file).resolve(strict=True).parent != (
                    folder.resolve()):
                raise BadInput(f"{path} names {file[:80]!r}, which is not in its folder; make the "
                               "folder again.")
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
        own = slug(str(path), 999)[-60:] if same else path.name
        place = args.out / "samples" / own if args.out else path / "eval"
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
    made = read_made(folder)
    shape = args.frames or (made or Made()).frames, args.fps or (made or Made()).fps
    files = [(folder / file, prompt, seed) for file, prompt, seed in (made or Made()).videos]
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
    pictures = lambda p: any(f.suffix.lower() in media.PICTURES for f in p.iterdir())
    found = []
    for path in sorted(folder.iterdir(), key=media.natural):
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
            say(f"{name}: its clip {clip} is not here; give --reference")
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


# ------------------------------------------------------------------------------------------------
# Showing


def explain(runs):
    """What a reader of the table has to know: notes."""
    notes = ["↑: more is better, ↓: less is. One figure alone says little: a video that broke, or "
             "that copies the clip, can move best."]
    names = [run.name.rpartition(": ")[2] for run in runs]
    notes += [f"“{name}”: {what}." for name, what in samples.BASES.items()
              if name in names]
    clips_seen = {r.path: r for run in runs for r in run.references}
    for path, r in clips_seen.items():
        if r.held is not None:
            notes.append(f"Of the tracks through {path} {r.held:.0%} hold: followed backward, they "
                         "come back. Motion fidelity counts the others too.")
    return notes


def show(table, notes):
    """Print metrics down, runs across, and the notes."""
    metrics = list(dict.fromkeys(metric for rows in table.values() for metric in rows))
    width = max(map(len, metrics)) + 2
    columns = [max(8, min(len(name), 24)) for name in table]
    print(" " * width, *(f"{name[-24:]:>{w}}" for name, w in zip(table, columns)))
    for metric in metrics:
        cells = []
        for rows, w in zip(table.values(), columns):
            value = rows.get(metric)
            cells.append(f"{'–' if value is None else f'{value:.4f}':>{w}}")
        print(f"{f'{metric} {page.better(metric)}':{width}}", *cells)
    for note in notes:
        print(note)


if __name__ == "__main__":
    machine.run(main)
