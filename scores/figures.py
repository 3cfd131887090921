"""A run's figures: of each of its videos, and of all together.

Axes: F frames, D feature width.
"""
import re
from dataclasses import dataclass

import torch
from tqdm import tqdm

from scores import clip as clips
from scores import tracks, world
from support import tokenizer


@dataclass
class Scorers:
    """The networks that score: a Clip, what gives the copy score's features, and where given
    PickScore's Clip, a video classifier, and LPIPS."""

    clip: object
    copies: object
    pick: object = None
    classifier: object = None
    lpips: object = None


def load_scorers(args):
    """The ones that the flags ask for. Raises BadInput."""
    scripts = {}
    for name, what in (("classifier", "a video classifier"), ("lpips", "a distance of pictures"),
                       ("sscd", "its authors' sscd_disc_mixup.torchscript.pt")):
        if path := getattr(args, name):
            scripts[name] = clips.load_script(path, what, args.trust_scripts, args.device)
    clip = clips.load_clip(args.clip, args.clip_weights, args.device)
    pick = None
    if args.pick_weights:
        pick = clips.load_clip("ViT-H-14", args.pick_weights, args.device)
    copies = clips.SSCD(scripts.pop("sscd"), args.device) if args.sscd else clip
    return Scorers(clip, copies, pick, **scripts)


# ------------------------------------------------------------------------------------------------
# Of each video


@torch.no_grad()
def score(run, args, scorers):
    """Fill in the figures, {metric: number or None}, and CLIP features (F, D) of a run's samples."""
    learned = [r.video for r in run.references]
    seen = [scorers.copies.images(video) for video in learned]
    sources = [tracks_of(r, args) for r in run.references]
    goal = args.motion_class
    if goal is None and scorers.classifier:
        goal = most_common_class(scorers.classifier, learned, args.device)
    for s in tqdm(run.samples, desc=f"scoring {run.name}", delay=2):
        pictures = scorers.clip.images(s.video)
        row = score_appearance(s, pictures, args, scorers)
        if learned:
            row[copy_name(scorers)] = clips.copy_score(scorers.copies.images(s.video), seen)
            own = tracks_of(s, args)
            row["motion fidelity"] = max(tracks.motion_fidelity(t, own) for t in sources)
            row["tracks held (share)"] = s.held
        if goal is not None and scorers.classifier:
            row["motion accuracy (classifier)"] = float(
                predicted_class(scorers.classifier, s.video, args.device) == goal)
        if args.world:
            row |= world.world_scores(s.video, s.prompt, learned[0] if learned else None)
        s.figures, s.features = row, pictures


def score_appearance(s, pictures, args, scorers):
    """What a sample's frames show, against its prompt and each other."""
    text = scorers.clip.texts([s.prompt])
    row = {aligned_name(scorers): clips.alignment(pictures, text),
           f"temporal consistency ({scorers.clip.name})": clips.temporal_consistency(pictures)}
    if args.motion_words:
        row["appearance score"] = None
        if tokenizer.has_word(s.prompt, args.motion_words):
            look = re.sub(tokenizer.word_pattern([args.motion_words]), " ", s.prompt)
            look = scorers.clip.texts([" ".join(look.split())])
            row["appearance score"] = clips.alignment(pictures, look)
    if scorers.pick:
        row["PickScore"] = clips.pick_score(scorers.pick, s.video, s.prompt)
    return row


@torch.no_grad()
def predicted_class(classifier, video, device="cpu"):
    """The class that a classifier gives a video (3, F, H, W)."""
    return classifier(video[None].to(device)).argmax().item()


def most_common_class(classifier, references, device="cpu"):
    """The class that most of the references (3, F, H, W) have; None where there are none."""
    kinds = [predicted_class(classifier, video, device) for video in references]
    return max(set(kinds), key=kinds.count) if kinds else None


def tracks_of(sample, args):
    """A sample's tracks: --tracks' where they are given, else followed here, which fills in what
    share of them holds. Raises BadInput."""
    if args.tracks:
        path = args.tracks / sample.path.parent.name / f"{sample.path.stem}.npy"
        return tracks.read_tracks(path, sample.video.shape[1])
    found, held = tracks.track(sample.video)
    sample.held = held.float().mean().item() if len(held) else None
    return found


def aligned_name(scorers):
    """What the text alignment is called."""
    return f"text alignment ({scorers.clip.name})"


def copy_name(scorers):
    """What the copy score is called, by the features that it is taken with."""
    features = "" if scorers.copies.name == "SSCD" else " features"
    return f"copy score ({scorers.copies.name}{features})"


# ------------------------------------------------------------------------------------------------
# Of a run


def choose_shared(runs):
    """Fill in which samples of each run are compared: those of the prompts that all runs have; or,
    where there are none, all of each. Returns what to say about it: notes."""
    prompts = [{s.prompt for s in run.samples} for run in runs]
    shared, left = set.intersection(*prompts), []
    for run in runs:
        run.compared = [s for s in run.samples if s.prompt in shared or not shared]
        if len(run.compared) < len(run.samples):
            out = len(run.samples) - len(run.compared)
            left.append(f"{run.name} {out} of {len(run.samples)} videos")
    if left:
        return [f"The prompts differ: the columns are of the {len(shared)} that all runs share. "
                f"Left out: {', '.join(left)}."]
    if not shared:
        return ["The runs share no prompt: each column is of its own prompts, and the columns "
                "cannot be compared."]
    return []


def summary(run, args, scorers):
    """{metric: number or None} of a run: means over its compared samples, and how these differ."""
    figures, by_prompt = {}, {}
    for s in run.compared:
        by_prompt.setdefault(s.prompt, []).append(s)
        for metric, value in s.figures.items():
            figures.setdefault(metric, []).append(value)
    table = {metric: mean(values) for metric, values in figures.items()}
    aligned, apart, lpips = [], [], []
    for samples in by_prompt.values():
        aligned.append(mean([s.figures[aligned_name(scorers)] for s in samples]))
        apart.append(clips.diversity([s.features for s in samples]))
        if scorers.lpips:
            lpips.append(lpips_apart(samples, args, scorers))
    if len(by_prompt) > 1:  # MotionDirector's, where the prompts ask for very different looks
        table["appearance diversity"] = mean(aligned)
    for name, values in (("diversity (1 − CLIP cosine)", apart), ("diversity (LPIPS)", lpips)):
        if set(values) - {None}:
            table[name] = mean(values)
    return table


def mean(values):
    """Of those that are not None; None where all are."""
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


@torch.no_grad()
def lpips_apart(samples, args, scorers):
    """The mean distance of all pairs of videos, frame by frame; None without pairs."""
    distances, before = [], []
    for s in samples:
        frames = s.video.transpose(0, 1).to(args.device)
        for other in before:
            distances.append(scorers.lpips(frames, other).mean().item())
        before.append(frames)
    return mean(distances)


# ------------------------------------------------------------------------------------------------
# Copies


def count_copies(runs, table, args, scorers):
    """Put the share of copies into the table; returns the threshold, None where there is none."""
    name = copy_name(scorers)
    threshold = copy_threshold(runs, name, args)
    for run in runs:
        scores = [s.figures[name] for s in run.compared if name in s.figures]
        if scores and threshold is not None:
            copies = sum(score > threshold for score in scores)
            table[run.name]["share of copies"] = copies / len(scores)
    return threshold


def copy_threshold(runs, name, args):
    """Above which a copy score counts as one: SSCD's 0.25 (NewMove), else what one in a hundred of
    the base model's samples from noise exceeds, where a run is that; None without."""
    if args.copy_threshold is not None or args.sscd:
        return 0.25 if args.copy_threshold is None else args.copy_threshold
    base = []
    for run in runs:
        if is_base(run.made):
            base += [s.figures[name] for s in run.samples if name in s.figures]
    return torch.tensor(base).quantile(0.99).item() if base else None


def is_base(made):
    """Whether samples are the untrained model's, from noise: no adapter acts, and no clip leads."""
    return made is not None and bool(made.videos) and not made.noise_prior and (
        not made.adapter or not any(made.scale))
