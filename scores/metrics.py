"""The metrics of each video, and their summary per run.

Axes: F frames, D feature width.
"""
import re
import statistics

import torch
from tqdm import tqdm

from scores import clip as clips
from scores import tracks, world
from support import tokenizer
from support.files import escaped


class Scorers:
    """The networks that score videos: a CLIP, the network of the copy score, and optionally
    PickScore, a video classifier and LPIPS. Raises BadInput."""

    def __init__(self, args):
        load = lambda path, expected: path and clips.load_script(
            path, expected, args.trust_scripts, args.device)
        self.classifier = load(args.classifier, "a video classifier")
        self.lpips = load(args.lpips, "an image distance")
        sscd = load(args.sscd, "sscd_disc_mixup.torchscript.pt")
        self.clip = clips.load_clip(args.clip, args.clip_weights, args.device)
        self.pick = args.pick_weights and clips.load_clip(
            "ViT-H-14", args.pick_weights, args.device)
        self.copies = clips.SSCD(sscd, args.device) if sscd else self.clip
        # names in the table
        self.alignment = f"text alignment ({self.clip.name})"
        self.copy_score = f"copy score ({'SSCD' if sscd else self.clip.name + ' features'})"


# --- Metrics of one video -----------------------------------------------------------------------


@torch.no_grad()
def score(run, args, scorers):
    """Fill in the metrics, {name: number or None}, and the CLIP features (F, D) of a run's samples.
    """
    references = [r.video for r in run.references]
    reference_features = [scorers.copies.frame_features(video) for video in references]
    reference_tracks = [find_tracks(r, args) for r in run.references]
    classify = lambda video: scorers.classifier(video[None].to(args.device)).argmax().item()
    motion_class = args.motion_class
    if motion_class is None and scorers.classifier and references:
        motion_class = statistics.mode(map(classify, references))
    for s in tqdm(run.samples, desc=escaped(f"scoring {run.name}"), delay=2):
        s.features = scorers.clip.frame_features(s.video)
        s.metrics = score_frames(s, args, scorers)
        if references:
            frames = scorers.copies.frame_features(s.video)
            s.metrics[scorers.copy_score] = clips.copy_score(frames, reference_features)
            found = find_tracks(s, args)
            s.metrics["motion fidelity"] = max(
                tracks.motion_fidelity(r, found) for r in reference_tracks)
            s.metrics["reliable tracks (share)"] = s.reliable
        if motion_class is not None and scorers.classifier:
            s.metrics["motion accuracy (classifier)"] = float(classify(s.video) == motion_class)
        if args.world:
            s.metrics |= world.world_scores(s.video, s.prompt, *references[:1])


def score_frames(s, args, scorers):
    """Metrics of a sample's frames: match with the prompt, and temporal consistency."""
    text = scorers.clip.text_features([s.prompt])
    row = {scorers.alignment: clips.alignment(s.features, text),
           f"temporal consistency ({scorers.clip.name})": clips.temporal_consistency(s.features)}
    if scorers.lpips:  # distance of neighboring frames (Customize-A-Video, Table 1)
        frames = s.video.transpose(0, 1).to(args.device)
        row["temporal consistency (LPIPS)"] = scorers.lpips(frames[:-1], frames[1:]).mean().item()
    if args.motion_words:
        row["appearance score"] = None
        if tokenizer.has_word(s.prompt, args.motion_words):
            appearance = re.sub(tokenizer.word_pattern([args.motion_words]), " ", s.prompt)
            text = scorers.clip.text_features([" ".join(appearance.split())])
            row["appearance score"] = clips.alignment(s.features, text)
    if scorers.pick:
        row["PickScore"] = clips.pick_score(scorers.pick, s.video, s.prompt)
    return row


def find_tracks(sample, args):
    """The tracks of a sample, from --tracks or by `tracks.track`, which also fills in the share of
    reliable tracks. Raises BadInput."""
    if args.tracks:
        path = args.tracks / sample.path.parent.name / f"{sample.path.stem}.npy"
        return tracks.read_tracks(path, sample.video.shape[1])
    found, reliable = tracks.track(sample.video)
    sample.reliable = reliable.float().mean().item() if len(reliable) else None
    return found


# --- Summary of a run ---------------------------------------------------------------------------


def choose_shared(runs):
    """Fill in the compared samples of each run: those of the prompts that all runs share, or all
    samples if the runs share no prompt. Returns notes for the table."""
    prompts = [{s.prompt for s in run.samples} for run in runs]
    shared, excluded = set.intersection(*prompts), []
    for run in runs:
        run.compared = [s for s in run.samples if s.prompt in shared or not shared]
        if count := len(run.samples) - len(run.compared):
            excluded.append(f"{run.name} {count} of {len(run.samples)} videos")
    if excluded:
        return [f"The prompts differ. The columns cover the {len(shared)} prompts that all runs "
                f"share. Left out: {', '.join(excluded)}."]
    if not shared:
        return ["The runs share no prompt. Each column covers different prompts, so the columns "
                "cannot be compared."]
    return []


def summary(run, args, scorers):
    """{metric: number or None} of a run: means over the compared samples, and diversity."""
    by_prompt, rows = {}, []
    for s in run.compared:
        by_prompt.setdefault(s.prompt, []).append(s)
    for samples in by_prompt.values():
        row = {}
        if len(by_prompt) > 1:  # MotionDirector's metric, for prompts of very different appearance
            row["appearance diversity"] = means([s.metrics for s in samples])[scorers.alignment]
        if len(samples) > 1:
            row["diversity (1 − CLIP cosine)"] = clips.diversity([s.features for s in samples])
        if len(samples) > 1 and scorers.lpips:
            row["diversity (LPIPS)"] = lpips_distance(samples, args, scorers)
        rows.append(row)
    return means([s.metrics for s in run.compared]) | means(rows)


def means(rows):
    """{name: mean of the values that are not None, or None without any} of several
    {name: number or None}."""
    values, out = {}, {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, [])
            if value is not None:
                values[name].append(value)
    for name, found in values.items():
        out[name] = sum(found) / len(found) if found else None
    return out


@torch.no_grad()
def lpips_distance(samples, args, scorers):
    """The mean frame-by-frame distance over all pairs of videos."""
    frames, distances = [s.video.transpose(0, 1).to(args.device) for s in samples], []
    for i, a in enumerate(frames):
        for b in frames[:i]:
            distances.append(scorers.lpips(a, b).mean().item())
    return sum(distances) / len(distances)


# --- Copies -------------------------------------------------------------------------------------


def count_copies(runs, table, args, scorers):
    """Add the share of copies to the table. Returns the threshold, or None without one."""
    name = scorers.copy_score
    threshold = copy_threshold(runs, name, args)
    for run in runs:
        scores = [s.metrics[name] for s in run.compared if name in s.metrics]
        if scores and threshold is not None:
            above = torch.tensor(scores, dtype=torch.float64) > threshold
            table[run.name]["share of copies"] = above.double().mean().item()
    return threshold


def copy_threshold(runs, name, args):
    """The copy score above which a video counts as a copy: 0.25 for SSCD (NewMove), else the 99th
    percentile over a run of the base model, or None without such a run."""
    if args.copy_threshold is not None or args.sscd:
        return 0.25 if args.copy_threshold is None else args.copy_threshold
    base = []
    for run in filter(is_base, runs):
        base += [s.metrics[name] for s in run.samples if name in s.metrics]
    return torch.tensor(base).quantile(0.99).item() if base else None


def is_base(run):
    """True for samples of the base model from noise: no adapter with a scale except 0, and no
    inverted clip."""
    made = run.generated
    return bool(made.videos) and not made.noise_prior and not (made.adapter and any(made.scale))
