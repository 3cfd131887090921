"""Score videos for text alignment, copying and motion. Writes an HTML report.

    python eval.py out/eight-vmc                    # a training run: base model, steps, result
    python eval.py out/generated                    # a folder that generate.py wrote
    python eval.py out/a out/b --reference clip.mp4 # two runs with the same reference clip
    python eval.py some/videos --reference other/videos --size 256
    python eval.py out/a out/b --user-study         # a page of blind pairs
    python eval.py --votes votes.json               # the study's result

A run is a folder that train.py or generate.py wrote, or any folder of videos with captions. Prints
a table and writes metrics.json and page.html to --out.

Axes: F frames, H W pixels.
"""
import argparse
from pathlib import Path

from scores import metrics, page, samples, study
from scores.folders import read_runs
from support import machine
from support.files import BadInput, output_folder, print_line, write_json, write_text
from support.flags import Parser, existing, float_in, int_in, non_empty


def main(argv=None):
    """Score runs, print the table, write metrics.json and page.html."""
    args = parse(argv)
    if args.votes:
        return study.count_votes(args.votes, args.key)
    machine.tune_malloc()
    args.device = machine.find_device(args.device)
    scorers = metrics.Scorers(args)
    with output_folder(args.out, Path("out/evaluation")) as args.out:
        runs = read_runs(args)
        notes = metrics.choose_shared(runs)
        if args.world is None:
            args.world = all(r.generated.videos and not r.generated.weights for r in runs)
        table = {}
        for run in runs:
            metrics.score(run, args, scorers)
            table[run.name] = metrics.summary(run, args, scorers)
        threshold = metrics.count_copies(runs, table, args, scorers)
        notes += explain(runs)
        print_table(table, notes)
        write(runs, table, notes, threshold, args)


def write(runs, table, notes, threshold, args):
    """Build page.html, metrics.json and the user study, then write them."""
    videos, references = [], {}
    for run in runs:
        references[run.name] = [r.path for r in run.references]
        for s in run.samples:
            row = {"run": run.name, "file": s.path, "prompt": s.prompt, "seed": s.seed}
            videos.append(row | s.metrics)
    files = {"page.html": page.report(runs, table, notes)}
    if args.user_study:
        compared = [run for run in runs if not run.name.rpartition(": ")[2].startswith("step ")]
        files |= study.build_study(compared, args.ratings, args.question)
    for name, text in files.items():
        write_text(args.out / name, text)
    write_json(args.out / "metrics.json", {
        "table": table, "notes": notes, "copy threshold": threshold, "videos": videos,
        "references": references, "settings": {k: str(v) for k, v in vars(args).items() if v}})
    for name in (*files, "metrics.json"):
        print_line(f"written: {args.out / name}")


# --- The flags ----------------------------------------------------------------------------------


def parse(argv=None):
    """The flags. Raises BadInput."""
    parser = Parser(REQUIRES, description=__doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="folders that train.py or generate.py wrote, or folders "
        "of videos")
    add("--reference", nargs="+", type=existing, default=[], help="reference clips (default: the "
        "training clips of the run's adapter)")
    add("--prompts", type=existing, help="a text file with one prompt per line, for training runs "
        "(default: the run's preview prompt)")
    add("--videos-per-prompt", type=int_in(1, 10**6), default=1, help="for training runs "
        "(default: 1)")
    add_scorer_flags(add)
    # input of all metrics
    add("--frames", type=int_in(4, 4096), help="frames per video (default: as generated, else 16)")
    add("--keyframes", nargs="+", type=int_in(0), help="score only these frames, numbered from 0")
    add("--fps", type=float_in(0.01, 1000), help="frame rate (default: as generated, else 8)")
    add("--size", type=int_in(32, 2048), default=256, help="height and width (default: 256)")
    # user study
    add("--user-study", action="store_true", help="also write study.html, a page of blind pairs")
    add("--ratings", action="store_true", help="also rate motion, appearance and text from 1 to 5")
    add("--question", type=str, help="the question of the study",
        default="Which video moves more like the reference and matches the prompt?")
    add("--votes", nargs="+", type=Path, help="only count the votes of a study")
    add("--key", type=Path, help="key of the study (default: study-key.json next to the votes)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda or mps if available)")
    add("--out", type=Path, help="a new folder (default: out/evaluation, out/evaluation-2 …)")
    return check(parser.parse_args(argv))


def add_scorer_flags(add):
    """Flags for the networks and files that the metrics use."""
    add("--clip", help="an open_clip model, e.g. ViT-H-14, or ViT-L-14-quickgelu for OpenAI's "
        "weights (default: the tiny CLIP)")
    add("--clip-weights", type=Path, help="the local weights file of --clip")
    add("--motion-words", type=non_empty, help="the motion in the prompts, e.g. 'moving left'; the "
        "rest of each prompt is its appearance, for the appearance score")
    add("--pick-weights", type=Path, help="PickScore's weights (CLIP ViT-H-14 in the hub's format)")
    add("--sscd", type=Path, help="sscd_disc_mixup.torchscript.pt from facebookresearch/"
        "sscd-copy-detection, for the copy score (default: CLIP image features)")
    add("--copy-threshold", type=float_in(-1, 1), help="copy score above which a video counts as a "
        "copy (default: 0.25 with SSCD, else the base model's 99th percentile)")
    add("--classifier", type=Path, help="a video classifier, (1, 3, F, H, W) to logits, for motion "
        "accuracy, saved by torch.jit.script(net).save(FILE)")
    add("--motion-class", type=int_in(0), help="the correct class (default: the references')")
    add("--lpips", type=Path, help="LPIPS, for diversity and temporal consistency, saved by import "
        "torch, lpips; a = torch.zeros(16, 3, 256, 256); "
        "torch.jit.trace(lpips.LPIPS(), (a, a)).save(FILE)")
    add("--trust-scripts", action="store_true", help="allow --sscd, --classifier and --lpips: they "
        "are TorchScript, i.e. programs that run with your permissions")
    add("--tracks", type=Path, help="tracks from another program, (P, F, 2) pixels per video, in "
        "FOLDER/<video's folder>/<video's name>.npy (default: computed here)")
    add("--world", action=argparse.BooleanOptionalAction, help="also measure the tiny world's "
        "appearance and motions (default: for videos of the tiny model)")


# Flags that have no effect without another flag
REQUIRES = {"clip": "clip_weights", "clip_weights": "clip", "motion_class": "classifier",
            "ratings": "user_study", "key": "votes"}


def check(args):
    """The flags. Raises BadInput for conflicts and missing files."""
    if bool(args.runs) == bool(args.votes):
        raise BadInput("expected folders to score, or --votes FILE alone.")
    if args.keyframes and len(set(args.keyframes)) < 2:
        raise BadInput("--keyframes: expected two or more frame numbers.")
    trained = [path for path in args.runs if (path / "run.json").is_file()]
    if (args.prompts or args.videos_per_prompt > 1) and not trained:
        raise BadInput("--prompts and --videos-per-prompt apply to folders of train.py; none is "
                       "given.")
    for path in args.runs:
        if not path.is_dir():
            raise BadInput(f"{path} is not a folder; give a folder that train.py or generate.py "
                           "wrote, or a folder of videos.")
    return args


# --- The table ----------------------------------------------------------------------------------


def explain(runs):
    """Notes below the table."""
    notes = ["↑: higher is better, ↓: lower is better. Papers print cosines × 100. Do not judge by "
             "one metric: a broken video, or a copy of the clip, can have the best motion."]
    names = [run.name.rpartition(": ")[2] for run in runs]
    notes += [f"“{name}”: {text}." for name, text in samples.BASES.items() if name in names]
    references = {r.path: r for run in runs for r in run.references}
    for path, r in references.items():
        if r.reliable is not None:
            notes.append(f"{path}: {r.reliable:.0%} of the tracks are reliable, i.e. tracking "
                         "backward returns to the start. Motion fidelity uses all tracks.")
    return notes


def print_table(table, notes):
    """Print one row per metric, one column per run, and the notes."""
    names = list(dict.fromkeys(name for column in table.values() for name in column))
    width = max(map(len, names)) + 2
    columns = [max(8, min(len(run), 24)) for run in table]
    print_line(" ".join([" " * width, *(f"{run[-24:]:>{w}}" for run, w in zip(table, columns))]))
    for name in names:
        cells = []
        for column, w in zip(table.values(), columns):
            value = column.get(name)
            cells.append(f"{'–' if value is None else f'{value:.4f}':>{w}}")
        print_line(" ".join([f"{f'{name} {page.direction(name)}':{width}}", *cells]))
    for note in notes:
        print_line(note)


if __name__ == "__main__":
    machine.run(main)
