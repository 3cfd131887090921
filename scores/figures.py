"""A run's figures: of each of its videos, and of all together.

Axes: F frames, D feature width.
"""
import re
from dataclasses import dataclass

import torch
from tqdm import tqdm

import model
from scores import clip as clips
from scores import motion, tracks, world


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


def choose_shared(runs):
    """Fill in which samples of each run are compared: those of the prompts that all runs have; or,
    where there are none, all of each. Returns what to say about it: notes."""
    prompts = [{s.prompt for s in run.samples} for run in runs]
    shared = set.intersection(*prompts)
    for run in runs:
        run.chosen = [i for i, s in enumerate(run.samples) if s.prompt in shared or not shared]
    if all(own == shared for own in prompts):
        return []
    if not shared:
        return ["The runs share no prompt: each column is of its own prompts, and the columns "
                "cannot be compared."]
    left = [f"{run.name} {len(run.samples) - len(run.chosen)} of {len(run.samples)} videos"
            for run in runs if len(run.chosen) < len(run.samples)]
    return [f"The prompts differ: the columns are of the {len(shared)} that all runs share. Left "
            f"out: {', '.join(left)}."]


@torch.no_grad()
def score(run, mine, args, scorers):
    """{number: ({metric: number or None}, CLIP features (F, D))} of those samples of a run."""
    learned = [r.video for r in run.references]
    goal = args.motion_class
    if goal is None and scorers.classifier:
        goal = motion.wanted_kind(scorers.classifier, learned, args.device)
    seen = [scorers.copies.images(video) for video in learned]
    sources = [tracks_of(r, args)[0] for r in run.references]
    found, accuracy = {}, f"motion accuracy ({'' if args.classifier else 'tiny '}classifier)"
    for i in tqdm(mine, desc=f"scoring {run.name}", delay=2):
        s = run.samples[i]
        pictures = scorers.clip.images(s.video)
        row = score_looks(s, pictures, args, scorers)
        if seen:
            row[copy_name(scorers)] = clips.copy_score(scorers.copies.images(s.video), seen)
            own, held = tracks_of(s, args)
            row["motion fidelity"] = max(tracks.motion_fidelity(t, own) for t in sources)
            row["tracks held (share)"] = held
        if goal is not None and scorers.classifier:
            row[accuracy] = float(motion.kind_of(scorers.classifier, s.video, args.device) == goal)
        found[i] = row, pictures
    if args.world and found:
        samples = [run.samples[i] for i in found]
        more = world.world_scores([s.video for s in samples], [s.prompt for s in samples],
                                  learned[0] if learned else None)
        for (row, _), read_off in zip(found.values(), more):
            row |= read_off
    return found


def score_looks(s, pictures, args, scorers):
    """What a sample's frames show, against its prompt and each other."""
    text = scorers.clip.texts([s.prompt])
    row = {f"text alignment ({scorers.clip.name})": clips.alignment(pictures, text),
           f"temporal consistency ({scorers.clip.name})": clips.temporal_consistency(pictures)}
    if args.motion_words:
        row["appearance score"] = None
        if model.has_word(s.prompt, args.motion_words):
            look = re.sub(model.word_pattern([args.motion_words]), " ", s.prompt)
            look = scorers.clip.texts([" ".join(look.split())])
            row["appearance score"] = clips.alignment(pictures, look)
    if scorers.pick:
        row["PickScore"] = clips.pick_score(scorers.pick, s.video, s.prompt)
    return row


def tracks_of(sample, args):
    """A sample's tracks, --tracks' where they are given, else followed here; and the share of them
    that holds, None where others followed them. Raises BadInput."""
    if args.tracks:
        path = args.tracks / sample.path.parent.name / f"{sample.path.stem}.npy"
        return tracks.read_tracks(path, sample.video.shape[1]), None
    own, held = tracks.track(sample.video)
    sample.held = held.float().mean().item() if len(held) else None
    return own, sample.held


def copy_name(scorers):
    """What the copy score is taken with."""
    features = "" if scorers.copies.name == "SSCD" else " features"
    return f"copy score ({scorers.copies.name}{features})"


def summary(run, rows, pictures, args, scorers):
    """{metric: number or None} of a run: means over its compared samples, and how these differ."""
    samples = [run.samples[i] for i in run.chosen]
    rows = [rows[i] for i in run.chosen]
    table = {}
    for metric in dict.fromkeys(metric for row in rows for metric in row):
        table[metric] = mean([row.get(metric) for row in rows])
    by_prompt, aligned = {}, f"text alignment ({scorers.clip.name})"
    for i, s in enumerate(samples):
        by_prompt.setdefault(s.prompt, []).append(i)
    if len(by_prompt) > 1:  # MotionDirector's, where the prompts ask for very different looks
        table["appearance diversity"] = mean(
            [mean([rows[i][aligned] for i in several]) for several in by_prompt.values()])
    apart, lpips = [], []  # how the samples of one prompt differ
    for several in by_prompt.values():
        apart.append(clips.diversity([pictures[run.chosen[i]] for i in several]))
        if scorers.lpips:
            lpips.append(lpips_apart([samples[i].video for i in several], args, scorers))
    for name, values in (("diversity (1 − CLIP cosine)", apart), ("diversity (LPIPS)", lpips)):
        if any(v is not None for v in values):
            table[name] = mean(values)
    return table


def mean(values):
    """Of those that are not None; None where all are."""
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


@torch.no_grad()
def lpips_apart(videos, args, scorers):
    """The mean distance of all pairs of videos (3, F, H, W), frame by frame; None without pairs."""
    distances = []
    for i, a in enumerate(videos):
        for b in videos[:i]:
            pair = [v.transpose(0, 1).to(args.device) for v in (a, b)]
            distances.append(scorers.lpips(*pair).mean().item())
    return mean(distances)


def count_copies(runs, each, table, args, scorers):
    """Put the share of copies into the table; returns the threshold, None where there is none."""
    name = copy_name(scorers)
    threshold = copy_threshold(runs, each, name, args)
    for run, rows in zip(runs, each):
        scores = [rows[i][name] for i in run.chosen if name in rows[i]]
        if scores and threshold is not None:
            table[run.name]["share of copies"] = mean([float(s > threshold) for s in scores])
    return threshold


def copy_threshold(runs, each, name, args):
    """Above which a copy score counts as one: SSCD's 0.25 (NewMove), else what one in a hundred of
    the base model's samples from noise exceeds, where a run is that; None without."""
    if args.copy_threshold is not None or args.sscd:
        return 0.25 if args.copy_threshold is None else args.copy_threshold
    base = []
    for run, rows in zip(runs, each):
        if is_base(run.settings):
            base += [row[name] for row in rows if name in row]
    return torch.tensor(base).quantile(0.99).item() if base else None


def is_base(settings):
    """Whether samples are the untrained model's, from noise: no adapter acts, and no clip leads."""
    if "adapter" not in settings or settings.get("init") in ("inverted", "dmt"):
        return False
    return not settings["adapter"] or not any(settings.get("scale") or [1.0])
