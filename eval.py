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
from pathlib import Path

from scores import figures, page, samples, study
from scores.folders import read_runs
from support import machine
from support.files import BadInput, check_exists, output_folder, print_line, write_json, write_text
from support.flags import Parser, float_in, int_in


def main(argv=None):
    """Score runs, print the table, write metrics.json and page.html."""
    args = parse(argv)
    if args.votes:
        return study.count_votes(args.votes, args.key)
    machine.tune_malloc()
    args.device = machine.find_device(args.device)
    scorers = figures.load_scorers(args)
    with output_folder(args.out, Path("out/evaluation")) as args.out:
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
        print_table(table, notes)
        write(runs, table, notes, threshold, args)


def write(runs, table, notes, threshold, args):
    """metrics.json, page.html and the user study. All are made before any is written."""
    videos, references = [], {}
    for run in runs:
        references[run.name] = [r.path for r in run.references]
        for s in run.samples:
            about = {"run": run.name, "file": s.path, "prompt": s.prompt, "seed": s.seed}
            videos.append(about | s.figures)
    files = {"page.html": page.report(runs, table, notes)}
    if args.user_study:
        compared = [run for run in runs if not run.name.rpartition(": ")[2].startswith("step ")]
        files |= study.study(compared, args.ratings, args.question)
    for name, text in files.items():
        write_text(args.out / name, text)
    write_json(args.out / "metrics.json", {
        "table": table, "notes": notes, "copy threshold": threshold, "videos": videos,
        "references": references, "settings": {k: str(v) for k, v in vars(args).items() if v}})
    for name in (*files, "metrics.json"):
        print_line(f"written: {args.out / name}")


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
    add("--seeds", type=int_in(1, 10**6), default=1, help="and so many videos of each prompt "
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
    add("--copy-threshold", type=float_in(-1, 1), help="of the share of copies (default: 0.25 for "
        "SSCD; else the 99th percentile of the run of the base model, where there is one)")
    add("--classifier", type=Path, help="a video classifier, (1, 3, F, H, W) to logits, for motion "
        "accuracy; made by torch.jit.script(net).save(FILE)")
    add("--motion-class", type=int_in(0), help="the class wanted (default: the references')")
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
    add("--frames", type=int_in(4, 4096), help="frames of each video (default: as generated, else "
        "16)")
    add("--keyframes", nargs="+", type=int_in(0), help="measure these of them alone, by number from "
        "0")
    add("--fps", type=float_in(0.01, 1000), help="frames a second (default: as generated, else 8)")
    add("--size", type=int_in(32, 2048), default=256, help="pixels of the square everything is "
        "measured at, cropped at the centre (default: 256)")
    # people
    add("--user-study", action="store_true", help="write study.html too: blind pairs")
    add("--ratings", action="store_true", help="with 1 to 5 for motion, appearance and text")
    add("--question", type=str, help="what the study asks",
        default="Which one moves more like the reference, and shows the prompt?")
    add("--votes", nargs="+", type=Path, help="count what a study's pages saved, and nothing else")
    add("--key", type=Path, help="the study's key (default: study-key.json beside the votes)")
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    add("--out", type=Path, help="a new folder (default: out/evaluation, out/evaluation-2 …)")
    return checked(parser.parse_args(argv))


REQUIRES = {"clip": "clip_weights", "clip_weights": "clip", "motion_class": "classifier",
            "ratings": "user_study", "key": "votes"}  # flags that have no effect without another


def checked(args):
    """The flags. Raises BadInput for those that conflict, have no effect, or name missing files."""
    if bool(args.runs) == bool(args.votes):
        raise BadInput("give folders to score, or --votes FILE.")
    for name, other in REQUIRES.items():
        if getattr(args, name) not in (None, False) and not getattr(args, other):
            raise BadInput(f"--{name.replace('_', '-')} requires --{other.replace('_', '-')}.")
    if args.keyframes and len(args.keyframes) < 2:
        raise BadInput("--keyframes: expected two or more numbers from 0 up.")
    trained = [path for path in args.runs if (path / "run.json").is_file()]
    if (args.prompts or args.seeds > 1) and not trained:
        raise BadInput("--prompts and --seeds apply to folders that train.py wrote; none is given.")
    if args.prompts:
        check_exists(args.prompts, "give a text file with one prompt per line")
    for path in args.runs:
        if not path.is_dir():
            raise BadInput(f"{path} is not a folder; give a folder that train.py or generate.py "
                           "wrote, or a folder of videos.")
    return args


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


def print_table(table, notes):
    """Print one row per metric, one column per run, and the notes."""
    metrics = list(dict.fromkeys(metric for rows in table.values() for metric in rows))
    width = max(map(len, metrics)) + 2
    columns = [max(8, min(len(name), 24)) for name in table]
    print_line(" ".join([" " * width, *(f"{name[-24:]:>{w}}" for name, w in zip(table, columns))]))
    for metric in metrics:
        cells = []
        for rows, w in zip(table.values(), columns):
            value = rows.get(metric)
            cells.append(f"{'–' if value is None else f'{value:.4f}':>{w}}")
        print_line(" ".join([f"{f'{metric} {page.better(metric)}':{width}}", *cells]))
    for note in notes:
        print_line(note)


if __name__ == "__main__":
    machine.run(main)
