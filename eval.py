"""Score videos, and lay them out to be looked at: what they show, what they copied, how they move.

    python eval.py out/vmc                          # a folder of train.py's: base, steps, result
    python eval.py out/generated                    # a folder of generate.py's
    python eval.py out/a out/b --reference clip.mp4 # compare two, to one clip
    python eval.py some/videos --reference other/videos --size 256
    python eval.py out/a out/b --user-study         # blind pairs, for people to choose from
    python eval.py --votes votes.json               # what they chose

A run is a folder that train.py or generate.py wrote, or any folder of videos with captions. Prints
a table and writes metrics.json and page.html to --out.

Axes: N videos or pictures, F frames, P points, D feature width, H W picture.
"""
import argparse
import base64
import json
import math
import random
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import generate
import model
from model import BadInput

# ------------------------------------------------------------------------------------------------
# Runs


@dataclass
class Sample:
    """A video (3, F, H, W) in [-1, 1] with its prompt, its seed, and the rate it is measured at."""

    video: torch.Tensor
    prompt: str
    seed: int
    path: Path
    fps: float


@dataclass
class Run:
    """Samples, the clips they learned from, and the settings of the sampling and of the training
    (both dicts, empty where unknown)."""

    name: str
    path: Path
    samples: list
    references: list
    settings: dict
    training: dict


def samples_of(path, args):
    """[(name, folder of videos)] that a path stands for. For train.py's folder they are made here,
    with --prompts: the base model's, from noise; those of every kept step; and the result's."""
    path = Path(path).resolve()
    if not path.is_dir():
        raise BadInput(f"{path} is not a folder; give train.py's or generate.py's, or one of "
                       "videos.")
    if not (path / "log.jsonl").is_file():
        return [(path.name, path)]
    trained = model.read_json(path / "args.json")
    file = path / f"{trained['method']}.safetensors"
    if not file.is_file():
        raise BadInput(f"{path} holds no {file.name}: it has not been saved yet, or pictures alone "
                       "were learned from; give a folder of generate.py's.")
    jobs = [("base", file, ("--scale", 0, "--init", "noise")), (path.name, file, ())]
    for kept in sorted(path.glob(f"steps/*/{file.name}")):
        jobs.append((f"step {int(kept.parent.name)}", kept, ()))
    prompts = trained["preview_prompt"]
    if args.prompts:
        prompts = args.prompts.read_text(errors="replace")
    listed = path / "eval" / "prompts.txt"
    if not listed.is_file() or listed.read_text() != prompts:
        with data.publish(listed) as part:
            part.write_text(prompts)
    folders = []
    for number, (name, adapter, flags) in enumerate(jobs):
        out = path / "eval" / ("base" if not number else "result" if number == 1
                               else data.slug(name))
        folders.append((name, out))
        stale = not up_to_date(out, args.seeds, adapter, listed)
        if stale and generate.place(args)[0] == 0:
            for old in (*out.glob("*.mp4"), *out.glob("sheet.png")):
                old.unlink()
        if generate.agreed(stale):
            flags = ["--adapter", adapter, *flags, "--prompts", listed, "--out", out, "--seeds",
                     args.seeds, "--device", args.device]
            flags += ["--weights", trained["weights"]] if trained["weights"] else []
            generate.main([str(f) for f in flags])
    return folders


def up_to_date(out, seeds, *sources):
    """Whether a folder of samples is whole, has as many seeds, and is younger than its sources."""
    last = out / "sheet.png"
    return (last.is_file() and model.read_json(out / "settings.json")["seeds"] == seeds
            and all(last.stat().st_mtime > p.stat().st_mtime for p in sources))


def read_run(name, path, references, args):
    """A folder of videos. What generate.py wrote names its prompts, and through its adapter the
    clips that were learned from, unless `references` (paths) are given. Raises BadInput."""
    settings, training, clips = {}, {}, []
    if (path / "settings.json").is_file():
        settings = model.read_json(path / "settings.json")
    shape = args.frames or settings.get("frames") or 16, args.fps or settings.get("fps") or 8
    files = [(path / file, prompt, seed) for file, prompt, seed in settings.get("videos") or []]
    for file in () if files else data.find_clips([path]):
        files.append((file, data.find_caption(file)[0], len(files)))  # a caption may come twice
    samples = [Sample(read(file, args, *shape), p, seed, file, shape[1])
               for file, p, seed in files]
    for adapter in map(Path, settings.get("adapter") or []):
        for folder in (adapter.parent, adapter.parent.parent.parent):  # the latter from steps/…/
            if not training and (folder / "args.json").is_file():
                training = model.read_json(folder / "args.json") | {"folder": str(folder)}
    if references:
        clips = [Sample(read(f, args, *shape), "", 0, f, shape[1])
                 for f in data.find_clips(references)]
    elif training.get("video"):
        trained = (shape[0], *(training[k] for k in ("fps", "start", "height", "width")))
        for clip in map(Path, training["video"]):
            if not clip.exists():
                data.say(f"{name}: its clip {clip} is not here; give --reference")
                continue
            clips += [Sample(read(f, args, *trained), "", 0, f, trained[1])
                      for f in data.find_clips([clip])]
    return Run(name, path, samples, clips, settings, training)


def read(path, args, frames, fps, start=0.0, height=1, width=1):
    """A clip at the size and rate that everything is measured at: the square in the middle of the
    picture, of a picture of height : width where training had cut it to that."""
    scale = args.size / min(height, width)
    size = round(height * scale), round(width * scale)
    video = data.read_video(path, frames, size, fps, start, learn=False)
    top, left = (size[0] - args.size) // 2, (size[1] - args.size) // 2
    video = video[..., top : top + args.size, left : left + args.size]
    if args.keyframes:
        if max(args.keyframes) >= video.shape[1]:
            raise BadInput(f"--keyframes {max(args.keyframes)}: {path} has {video.shape[1]} frames "
                           "at this rate.")
        video = video[:, args.keyframes]
    return video


# ------------------------------------------------------------------------------------------------
# CLIP


class Clip:
    """A picture and a text tower. `images` and `texts` give unit features (N, D)."""

    def __init__(self, net, tokenize, size, mean=0.5, std=0.5, device="cpu"):
        self.net, self.tokenize, self.size = net.eval().to(device), tokenize, size
        self.mean, self.std, self.device = torch.as_tensor(mean), torch.as_tensor(std), device

    @torch.no_grad()
    def images(self, video):
        """(3, F, H, W) in [-1, 1] -> (F, D)."""
        frames = (video.transpose(0, 1) + 1) / 2
        frames = F.interpolate(frames, (self.size, self.size), mode="bicubic", antialias=True)
        shape = lambda v: v.view(-1, 1, 1)
        frames = (frames.clamp(0, 1) - shape(self.mean)) / shape(self.std)
        return F.normalize(self.net.encode_image(frames.to(self.device)), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, prompts):
        """list of N strings -> (N, D)."""
        tokens = self.tokenize(prompts).to(self.device)
        return F.normalize(self.net.encode_text(tokens), dim=-1).cpu()


def tiny_clip(folder=generate.TINY, device="cpu"):
    """The tiny model's CLIP: its text encoder, and what the folder clip/ holds beside."""
    import open_clip

    config = model.read_json(folder / "clip" / "open_clip_config.json")
    net = open_clip.model.CLIP(**config)
    text = model.text_from_hub(model.read_tensors(model.find_weights(folder / "text_encoder")))
    state = text | model.read_tensors(folder / "clip" / "model.safetensors")
    model.load_strictly(net, {n: t.float() for n, t in state.items()}, folder / "clip")
    return Clip(net, model.tokenize, config["vision_cfg"]["image_size"], device=device)


def load_clip(name=None, weights=None, device="cpu"):
    """The tiny CLIP, or any of open_clip's by name with local weights; these may be in the hub's
    format, as PickScore's are. Raises BadInput."""
    if name is None and weights is None:
        return tiny_clip(device=device)
    if name is None:
        raise BadInput(f"{weights}: whose weights? Give --clip too, such as ViT-L-14-quickgelu.")
    import open_clip

    if weights is None or not Path(weights).is_file():
        raise BadInput(f"{name} needs its weights, a local file (got {weights}); give "
                       "--clip-weights FILE.")
    if name not in open_clip.list_models():
        raise BadInput(f"--clip {name!r} is not one of open_clip's models, such as ViT-L-14, "
                       "ViT-H-14.")
    net = open_clip.create_model(name, pretrained=None, load_weights=False)
    state = model.read_tensors(weights)
    if "visual_projection.weight" in state:
        state = clip_from_hub(state)
    model.load_strictly(net, state, weights)
    cfg = net.visual.preprocess_cfg
    return Clip(net.float(), open_clip.get_tokenizer(name), cfg["size"][0], cfg["mean"],
                cfg["std"], device)


CLIP_NAMES = [  # the hub's CLIPModel -> open_clip's, the picture tower's
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
]


def clip_from_hub(state):
    """The tensors of the hub's CLIPModel by open_clip's names; projections are transposed there."""
    out, parts = {}, {}
    for name, tensor in state.items():
        if name.endswith("position_ids"):
            continue
        if name == "text_projection.weight":
            out["text_projection"] = tensor.T.contiguous()
        elif name == "visual_projection.weight":
            out["visual.proj"] = tensor.T.contiguous()
        elif name == "logit_scale":
            out[name] = tensor
        else:
            for hub, ours in CLIP_NAMES:
                name = name.replace(hub, ours)
            parts[name] = tensor
    return out | model.text_from_hub(parts)  # q, k, v and the inner names are alike in both towers


def text_alignment(clip, video, prompt):
    """Mean over frames of the cosine between picture and text (MotionDirector, NewMove, VMC). With
    the appearance alone as the prompt it is NewMove's appearance score; over prompts that ask for
    very different looks, MotionDirector's appearance diversity."""
    return (clip.images(video) @ clip.texts([prompt])[0]).mean().item()


def temporal_consistency(features):
    """Mean cosine over all pairs of frames (LOVEU-TGVE; VMC). features (F, D), unit."""
    pairs = (features @ features.T)[tuple(torch.triu_indices(len(features), len(features), 1))]
    return pairs.mean().item()


def pick_score(clip, video, prompt):
    """exp(logit_scale)·cosine, mean over frames (Kirstain et al. 2023), with PickScore's weights.
    """
    return clip.net.logit_scale.exp().item() * text_alignment(clip, video, prompt)


def diversity(features):
    """1 − cosine between the videos' mean features, over all pairs; None for less than two."""
    if len(features) < 2:
        return None
    means = F.normalize(torch.stack([f.mean(0) for f in features]), dim=-1)
    pairs = (means @ means.T)[tuple(torch.triu_indices(len(means), len(means), 1))]
    return (1 - pairs).mean().item()


# ------------------------------------------------------------------------------------------------
# Copying


class SSCD:
    """The TorchScript copy detector of NewMove's copy score; `images` as Clip's."""

    def __init__(self, path, device="cpu"):
        self.net = load_script(path, "sscd_disc_mixup.torchscript.pt", device)
        self.device = device

    @torch.no_grad()
    def images(self, video):
        """(3, F, H, W) in [-1, 1] -> unit features (F, D), at 288 pixels, ImageNet's norm."""
        frames = F.interpolate((video.transpose(0, 1) + 1) / 2, (288, 288), mode="bicubic",
                               antialias=True).clamp(0, 1)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        frames = (frames - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        return F.normalize(self.net(frames.to(self.device)), dim=-1).cpu()


def copy_score(features, references):
    """Largest cosine between any frame of a video (F, D) and any training frame (list of (F, D)):
    NewMove's supplement, Sec. 5."""
    return max((features @ r.T).max().item() for r in references)


# ------------------------------------------------------------------------------------------------
# Tracks and motion fidelity


def gradients(picture):
    """Central differences along x and y of (N, H, W), edges repeated."""
    p = F.pad(picture[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    return (p[:, 1:-1, 2:] - p[:, 1:-1, :-2]) / 2, (p[:, 2:, 1:-1] - p[:, :-2, 1:-1]) / 2


def at(picture, points, radius):
    """Windows (P, (2r+1)²) of a picture (H, W) around points (P, 2) in pixels, interpolated."""
    H, W = picture.shape
    offsets = torch.arange(-radius, radius + 1.0)
    dy, dx = torch.meshgrid(offsets, offsets, indexing="ij")
    where = points[:, None] + torch.stack([dx.flatten(), dy.flatten()], 1)  # (P, window, 2)
    grid = (where + 0.5) / torch.tensor([W, H]) * 2 - 1
    out = F.grid_sample(picture[None, None], grid[None], padding_mode="border",
                        align_corners=False)
    return out[0, 0]


def lucas_kanade(a, b, points, levels=3, radius=5, rounds=8):
    """Where points (P, 2) of picture a (H, W) are in picture b: pyramidal, iterated least squares
    of the brightness change in a window (Lucas & Kanade 1981; Bouguet 2001)."""
    pyramid = [(a, b)]
    for _ in range(levels - 1):
        pyramid.append(tuple(F.avg_pool2d(p[None, None], 2)[0, 0] for p in pyramid[-1]))
    moved = torch.zeros_like(points)
    for level in reversed(range(levels)):
        a, b = pyramid[level]
        here = (points + 0.5) / 2**level - 0.5
        moved = moved * (2 if level < levels - 1 else 1)
        gx, gy = (at(g[0], here, radius) for g in gradients(a[None]))
        patch = at(a, here, radius)
        A = torch.stack([torch.stack([(gx * gx).sum(1), (gx * gy).sum(1)], 1),
                         torch.stack([(gx * gy).sum(1), (gy * gy).sum(1)], 1)], 1)
        A = A + 1e-4 * torch.eye(2)  # flat windows stay where they are
        for _ in range(rounds):
            change = patch - at(b, here + moved, radius)
            right = torch.stack([(gx * change).sum(1), (gy * change).sum(1)], 1)
            moved = moved + torch.linalg.solve(A, right).clamp(-2, 2)
    return points + moved


def track(video, textured=0.02):
    """Tracks (P, F, 2) in pixels through (3, F, H, W): points of a 16×16 grid in the first frame
    where there is something to see, followed from frame to frame."""
    grey = video.mean(0)  # (F, H, W)
    H, W = grey.shape[1:]
    every = max(4, H // 16)
    y, x = torch.meshgrid(torch.arange(every // 2, H, every), torch.arange(every // 2, W, every),
                          indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], 1).float()
    gx, gy = gradients(grey[:1])
    strength = F.avg_pool2d((gx**2 + gy**2)[None], 5, 1, 2)[0, 0]
    seen = strength[points[:, 1].long(), points[:, 0].long()]
    points = points[seen > textured * strength.max().clamp(min=1e-6)]
    tracks = [points]
    for a, b in zip(grey[:-1], grey[1:]):
        tracks.append(lucas_kanade(a, b, tracks[-1]))
    return torch.stack(tracks, 1)


def tracks_of(sample, args):
    """A sample's tracks: --tracks' where they are given, else followed here. Raises BadInput."""
    if args.tracks is None:
        return track(sample.video)
    path = args.tracks / sample.path.parent.name / f"{sample.path.stem}.npy"
    try:
        tracks = torch.from_numpy(np.load(path, allow_pickle=False)).float()
        P, frames, two = tracks.shape
    except (OSError, ValueError, TypeError):
        raise BadInput(f"{path} holds no tracks; wanted an array of (P, F, 2).") from None
    wanted = sample.video.shape[1]
    if (frames, two) != (wanted, 2) or not tracks.isfinite().all():
        raise BadInput(f"{path} is {tuple(tracks.shape)}, wanted (P, {wanted}, 2), all finite.")
    return tracks


@torch.no_grad()
def motion_fidelity(source, made, still=0.05):
    """Yatim et al. 2023: for every track of one video the best correlation among the other's,
    averaged, both ways. A correlation is the mean over frames of the cosine between
    displacements; two that are both still (shorter than `still` pixels) agree, one that is still
    and one that moves do not. Tracks (P, F, 2), compared as long as both
    last; at most 2."""
    if not len(source) or not len(made):
        return 0.0
    last = min(source.shape[1], made.shape[1])
    source, made = source[:, :last], made[:, :last]
    a, b = source.diff(dim=1), made.diff(dim=1)  # (P, F-1, 2), (Q, F-1, 2)
    la, lb = a.norm(dim=-1), b.norm(dim=-1)
    cosine = torch.einsum("pfc,qfc->pqf", F.normalize(a, dim=-1), F.normalize(b, dim=-1))
    rest_a, rest_b = (la < still)[:, None], (lb < still)[None]
    cosine = torch.where(rest_a & rest_b, 1.0, torch.where(rest_a | rest_b, 0.0, cosine))
    best = cosine.mean(-1)  # (P, Q)
    return (best.amax(0).mean() + best.amax(1).mean()).item()


# ------------------------------------------------------------------------------------------------
# Kinds of motion


class TRN(nn.Module):
    """Temporal relation network, multi-scale (Zhou et al. 2018, Eq. 3): for each number k of frames
    an MLP reads the features of k ordered ones. Here the k frames are evenly spaced, from every
    start; the features of a frame keep their place, for a path is what is asked for; and a frame
    comes with its change since the one before, or what spins looks as if it stood still.

    (B, 3, F, H, W) in [-1, 1] -> logits (B, classes)."""

    SIZE, FRAMES, SCALES, WIDTH = 64, 16, (2, 3, 4, 8, 16), 64

    def __init__(self, classes):
        super().__init__()
        self.none = classes - 1  # the last class is "none of these"
        conv = lambda a, b: (nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())
        self.features = nn.Sequential(
            *conv(6, 16), *conv(16, 32), *conv(32, 32), nn.Conv2d(32, 8, 1), nn.Flatten(),
            nn.Linear(8 * (self.SIZE // 8) ** 2, self.WIDTH))
        self.relations = nn.ModuleList(nn.Sequential(
            nn.ReLU(), nn.Linear(k * self.WIDTH, 128), nn.ReLU(), nn.Linear(128, classes))
            for k in self.SCALES)

    def forward(self, video):
        B, _, frames, H, _ = video.shape
        video = video[:, :, torch.linspace(0, frames - 1, self.FRAMES).round().long()]
        change = 3 * (video - video[:, :, [0, *range(self.FRAMES - 1)]])
        flat = model.fold_frames(torch.cat([video, change], 1))
        if H != self.SIZE:
            flat = F.interpolate(flat, (self.SIZE, self.SIZE), mode="area")
        x = self.features(flat).reshape(B, self.FRAMES, self.WIDTH)
        logits = 0
        for k, relation in zip(self.SCALES, self.relations):
            stride = self.FRAMES // k
            groups = torch.stack([x[:, i : i + stride * k : stride] for i in range(stride)], 1)
            logits = logits + relation(groups.flatten(2)).mean(1)  # groups (B, stride, k, WIDTH)
        return logits


def tiny_trn(folder=generate.TINY, device="cpu"):
    """The TRN that tiny/train.py trained on the tiny world's motions and "none of these"."""
    state = model.read_tensors(folder / "motion" / "model.safetensors")
    net = TRN(len(state["relations.0.3.bias"]))
    model.load_strictly(net, {n: t.float() for n, t in state.items()}, folder / "motion")
    return net.eval().to(device)


def load_script(path, what, device="cpu"):
    """A TorchScript file that a flag names. Raises BadInput."""
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"{path} is no TorchScript ({str(error).splitlines()[0][:80]}); give "
                       f"{what}.") from None


# ------------------------------------------------------------------------------------------------
# A run's figures


@dataclass
class Scorers:
    """The networks that score: a Clip, what gives the copy score's features, and where given
    PickScore's Clip, a video classifier, and LPIPS."""

    clip: Clip
    copies: object
    pick: Clip = None
    classifier: nn.Module = None
    lpips: nn.Module = None


def load_scorers(args):
    """The ones that the flags ask for. Raises BadInput."""
    clip = load_clip(args.clip, args.clip_weights, args.device)
    pick = None
    if args.pick_weights:
        pick = load_clip("ViT-H-14", args.pick_weights, args.device)
    script = lambda path, what: load_script(path, what, args.device) if path else None
    classifier = script(args.classifier, "a video classifier")
    lpips = script(args.lpips, "a distance of two pictures")
    copies = SSCD(args.sscd, args.device) if args.sscd else clip
    return Scorers(clip, copies, pick, classifier, lpips)


@torch.no_grad()
def score(run, args, scorers):
    """{metric: number or None} of each of a run's samples, and their CLIP features (F, D)."""
    each, features = [], [scorers.clip.images(s.video) for s in run.samples]
    seen = [scorers.copies.images(r.video) for r in run.references]
    sources = [tracks_of(r, args) for r in run.references]
    goal = args.motion_class
    if goal is None and run.references and scorers.classifier:
        classes = [kind_of(scorers, r.video, args) for r in run.references]
        goal = max(set(classes), key=classes.count)
        if goal == getattr(scorers.classifier, "none", None):
            goal = None  # the TRN sees none of its motions in the references
    for s, f in zip(run.samples, features):
        by = args.clip or "tiny CLIP"
        row = {f"text alignment ({by})": text_alignment(scorers.clip, s.video, s.prompt),
               f"temporal consistency ({by})": temporal_consistency(f)}
        if args.motion_words:
            row["appearance score"] = None
            if model.has_word(s.prompt, args.motion_words):
                look = re.sub(model.word_pattern([args.motion_words]), " ", s.prompt)
                look = " ".join(look.split())
                row["appearance score"] = text_alignment(scorers.clip, s.video, look)
        if scorers.pick:
            row["PickScore"] = pick_score(scorers.pick, s.video, s.prompt)
        if seen:
            row[copy_name(args)] = copy_score(scorers.copies.images(s.video), seen)
            tracks = tracks_of(s, args)
            row["motion fidelity"] = max(motion_fidelity(t, tracks) for t in sources)
        if goal is not None and scorers.classifier:
            name = f"motion accuracy ({'' if args.classifier else 'tiny '}classifier)"
            row[name] = float(kind_of(scorers, s.video, args) == goal)
        each.append(row)
    if args.world:
        for row, more in zip(each, world_scores(run)):
            row |= more
    return each, features


def kind_of(scorers, video, args):
    """The class of a video's motion."""
    return scorers.classifier(video[None].to(args.device)).argmax().item()


def summary(run, each, features, args, scorers):
    """{metric: number or None} of a run: means over its samples, and how these differ."""
    rows = {}
    for metric in dict.fromkeys(m for row in each for m in row):
        values = [row[metric] for row in each if row.get(metric) is not None]
        rows[metric] = sum(values) / len(values) if values else None
    aligned, by_prompt = next(iter(rows)), {}
    for s, row in zip(run.samples, each):
        by_prompt.setdefault(s.prompt, []).append(row[aligned])
    if len(by_prompt) > 1:  # MotionDirector's, where the prompts ask for very different looks
        means = [sum(v) / len(v) for v in by_prompt.values()]
        rows["appearance diversity"] = sum(means) / len(means)
    return rows | spread(run, features, args, scorers)


def copy_name(args):
    """What the copy score is taken with."""
    return f"copy score ({'SSCD' if args.sscd else (args.clip or 'tiny CLIP') + ' features'})"


@torch.no_grad()
def spread(run, features, args, scorers):
    """How the samples of one prompt differ, averaged over prompts."""
    kinds = {"diversity (1 − CLIP cosine)": [], "diversity (LPIPS)": []}
    for prompt in dict.fromkeys(s.prompt for s in run.samples):
        rows = [i for i, s in enumerate(run.samples) if s.prompt == prompt]
        kinds["diversity (1 − CLIP cosine)"].append(diversity([features[i] for i in rows]))
        if scorers.lpips:
            videos = [run.samples[i].video.transpose(0, 1) for i in rows]
            pairs = [(a, b) for i, a in enumerate(videos) for b in videos[:i]]
            apart = [scorers.lpips(*(v.to(args.device) for v in pair)).mean().item()
                     for pair in pairs]
            kinds["diversity (LPIPS)"].append(sum(apart) / len(apart) if apart else None)
    kinds = {name: [v for v in values if v is not None] for name, values in kinds.items()}
    return {name: sum(values) / len(values) for name, values in kinds.items() if values}


def world_scores(run):
    """What the tiny world's instruments read, a dict a sample: looks as the prompt names them; and
    the kind of motion of the first reference, and the correlation with its path."""
    from tiny import instruments, world

    small = lambda v: F.interpolate(v.transpose(0, 1), (64, 64), mode="area").transpose(0, 1)
    each = [{} for _ in run.samples]
    if not each:
        return each
    last = min(v.video.shape[1] for v in (*run.samples, *run.references[:1]))
    reading = instruments.read(torch.stack([small(s.video[:, :last]) for s in run.samples]))
    for field, table in (("colour", world.COLOURS), ("shape", world.SHAPES),
                         ("background", world.BACKGROUNDS)):
        for row, s, got in zip(each, run.samples, getattr(reading, field).tolist()):
            # "an orange star moving in a circle on a blue striped background" is of neither a
            # circle nor anything blue.
            thing, _, ground = s.prompt.partition(" on a ")
            thing = re.sub(model.word_pattern(world.MOTIONS), " ", thing)
            text = ground if field == "background" else thing
            wanted = [i for i, n in enumerate(table) if model.has_word(text, n)]
            row[field] = float(got in wanted) if wanted else None
    if run.references:
        goal = instruments.read(small(run.references[0].video[:, :last])[None])
        agrees = instruments.agreement(reading, goal)
        for row, kind, r in zip(each, reading.motion, agrees.tolist()):
            row["same kind of motion"] = float(kind == goal.motion) if goal.motion >= 0 else None
            row["trajectory correlation"] = None if math.isnan(r) else r
    return each


def copy_threshold(args, runs, each):
    """Above which a copy score counts as one: SSCD's 0.25 (NewMove), else what one in a hundred of
    the base model's samples exceeds, where a run is that; None without."""
    if args.copy_threshold is not None or args.sscd:
        return 0.25 if args.copy_threshold is None else args.copy_threshold
    base = [row.get(copy_name(args)) for run, rows in zip(runs, each) for row in rows
            if "adapter" in run.settings and not run.settings.get("dmt")
            and not any(run.settings.get("scale") or [1.0] if run.settings["adapter"] else [])]
    base = [v for v in base if v is not None]
    return torch.tensor(base).quantile(0.99).item() if base else None


# ------------------------------------------------------------------------------------------------
# Pages

ASSETS = Path(__file__).resolve().parent / "assets"


def finite(value):
    """The same with None for what JSON cannot hold: NaN and infinity."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, content):
    """Write a JSON file."""
    with data.publish(path) as part:
        part.write_text(json.dumps(finite(content), indent=1, ensure_ascii=False))
    print(f"written: {path}")


def write_page(path, template, content):
    """Fill a template of assets/ with JSON that cannot end its script, whatever prompts hold."""
    text = json.dumps(finite(content), ensure_ascii=True).replace("<", "\\u003c")
    html = (ASSETS / template).read_text().replace("__CONTENT__", text)
    with data.publish(path) as part:
        part.write_text(html)
    print(f"written: {path}")


def embed(sample):
    """A sample as it was measured, as an address that holds the whole video."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        data.write_video(path, sample.video, sample.fps)
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def losses_of(run, most=150):
    """The loss curve of the training behind a run: at most `most` points (step, mean loss)."""
    path = Path(run.training.get("folder", "")) / "log.jsonl"
    if not run.training or not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    wide = math.ceil(len(rows) / most)
    parts = [rows[i : i + wide] for i in range(0, len(rows), wide)]
    return [(p[0]["step"], sum(r["loss"] for r in p) / len(p)) for p in parts]


def against_steps(runs, table):
    """{training folder: {metric: [(step, value)]}} where intermediate adapters were scored."""
    curves = {}
    for run in runs:
        if run.settings.get("steps_trained") is not None:
            scale = (run.settings.get("scale") or [1])[0]
            step = run.settings["steps_trained"] if scale else 0
            for metric, value in table[run.name].items():
                if value is not None:
                    curve = curves.setdefault(run.training.get("folder", ""), {})
                    curve.setdefault(metric, {})[step] = value
    return {folder: {m: sorted(points.items()) for m, points in metrics.items()}
            for folder, metrics in curves.items() if max(map(len, metrics.values())) > 2}


def report(path, runs, table, each):
    """The page: references, runs side by side, prompts down; figures, curves, settings."""
    references = {str(r.path): r for run in runs for r in run.references}
    references = {path: embed(r) for path, r in references.items()}
    write_page(path, "page.html", {
        "table": table, "references": references, "curves": against_steps(runs, table),
        "runs": [{
            "name": run.name, "settings": run.settings, "training": run.training,
            "losses": losses_of(run),
            "samples": [{"prompt": s.prompt, "seed": s.seed, "figures": row,
                         "video": embed(s)} for s, row in zip(run.samples, rows)],
        } for run, rows in zip(runs, each)]})


def study(out, runs, args):
    """study.html, a page of blind pairs: every two runs' videos of one prompt and seed. Which is
    which stands in study-key.json alone; the page shuffles pairs and sides for each visitor."""
    chance, pairs, key = random.Random(), [], {}
    runs = [run for run in runs if not run.name.startswith("step ")]
    for i, a in enumerate(runs):
        for b in runs[:i]:
            other = {(s.prompt, s.seed): s for s in b.samples}
            for s in a.samples:
                if (s.prompt, s.seed) not in other:
                    continue
                sides = {f"{chance.getrandbits(48):x}": one for one in
                         ((a.name, s), (b.name, other[s.prompt, s.seed]))}
                key |= {side: name for side, (name, _) in sides.items()}
                pairs.append({"prompt": s.prompt, "sides": [
                    {"id": side, "video": embed(one)} for side, (_, one) in
                    sorted(sides.items())]})
    if not pairs:
        raise BadInput("--user-study needs two runs with videos of the same prompts and seeds.")
    reference = next((embed(r) for run in runs for r in run.references), None)
    write_page(out / "study.html", "study.html", {
        "pairs": pairs, "ratings": args.ratings, "question": args.question, "reference": reference})
    write_json(out / "study-key.json", key)


def binomial_p(wins, n):
    """Two-sided exact binomial test against a fair coin: the probability of a count at least as far
    from n/2 as `wins`."""
    far = abs(wins - n / 2)
    return min(1.0, sum(math.comb(n, k) for k in range(n + 1) if abs(k - n / 2) >= far) / 2**n)


def count_votes(paths, key):
    """Preference shares of every two runs with a p-value (NewMove), and mean ratings (VMC,
    Customize-A-Video), over all votes.json given. Raises BadInput."""
    choices, ratings, sessions = {}, {}, set()
    key = key or paths[0].parent / "study-key.json"
    for path in (key, *paths):
        if not path.is_file():
            raise BadInput(f"{path} does not exist; give what the study's page saved, and --key "
                           "the study-key.json that was written with the page.")
    key = model.read_json(key)
    for path in paths:
        file = model.read_json(path)
        if file.get("session") in sessions:
            data.say(f"{path} is the same visit as another file, and not counted twice")
            continue
        sessions.add(file.get("session"))
        try:
            for vote in file["votes"]:
                chosen, other = key[vote["chosen"]], key[vote["other"]]
                choices.setdefault(tuple(sorted((chosen, other))), []).append(chosen)
                for side, rates in (vote.get("ratings") or {}).items():
                    for kind, value in rates.items():
                        ratings.setdefault((key[side], kind), []).append(value)
        except (KeyError, TypeError) as error:
            raise BadInput(f"{path} does not fit the study's key ({error!r}); give --key the "
                           "study-key.json that was written with the page.") from None
    if not choices:
        raise BadInput(f"no votes in {', '.join(map(str, paths))}; give what the study page saved.")
    for (a, b), votes in choices.items():
        wins, n = votes.count(a), len(votes)
        print(f"{a} {100 * wins / n:.1f} %, {b} {100 - 100 * wins / n:.1f} % of {n} votes, "
              f"p = {binomial_p(wins, n):.3g}")
    for (run, kind), values in sorted(ratings.items()):
        print(f"{run}: {kind} {sum(values) / len(values):.2f} of 5 ({len(values)} ratings)")


# ------------------------------------------------------------------------------------------------
# The command


def parse(argv=None):
    """The flags. Raises BadInput for numbers that make no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="folders that train.py or generate.py wrote, or of "
        "videos")
    add("--reference", nargs="+", type=Path, default=[], help="the clips that were learned from "
        "(default: those of the run's adapter)")
    add("--prompts", type=Path, help="for train.py's folders: what to sample, one prompt a line "
        "(default: the run's preview prompt)")
    add("--seeds", type=int, default=1, help="and so many videos of each prompt (default: 1)")
    # the scorers
    add("--clip", help="an open_clip model such as ViT-H-14, or ViT-L-14-quickgelu for OpenAI's "
        "weights (default: the tiny CLIP)")
    add("--clip-weights", type=Path, help="its weights, a local file")
    add("--motion-words", help="the words of the prompts that name the motion: the rest of each is "
        "its appearance, for the appearance score")
    add("--pick-weights", type=Path, help="PickScore's (CLIP ViT-H-14 in the hub's format)")
    add("--sscd", type=Path, help="sscd_disc_mixup.torchscript.pt, for the copy score (default: "
        "the CLIP's picture features)")
    add("--copy-threshold", type=float, help="of the share of copies (default: 0.25 for SSCD; else "
        "the 99th percentile of the run of the base model, where there is one)")
    add("--classifier", type=Path, help="a video classifier in TorchScript, (1, 3, F, H, W) to "
        "logits, for motion accuracy (default: the tiny world's)")
    add("--motion-class", type=int, help="the class wanted (default: the references')")
    add("--lpips", type=Path, help="a distance of two batches of pictures in TorchScript, for "
        "diversity")
    add("--tracks", type=Path, help="tracks of other programs: FOLDER/video's folder/its name.npy, "
        "(P, F, 2) pixels (default: followed here)")
    add("--world", action=argparse.BooleanOptionalAction, help="read the tiny world's looks and "
        "motions too (default: for the tiny model's videos)")
    # what is measured
    add("--frames", type=int, help="frames of each video (default: as generated, else 16)")
    add("--keyframes", nargs="+", type=int, help="measure these of them alone, by number from 0")
    add("--fps", type=float, help="frames a second (default: as generated, else 8)")
    add("--size", type=int, default=256, help="pixels of the square everything is measured at, "
        "cropped at the centre (default: 256)")
    # people
    add("--user-study", action="store_true", help="write study.html too: blind pairs")
    add("--ratings", action="store_true", help="with 1 to 5 for motion, appearance and text")
    add("--question", default="Which one moves more like the reference, and shows the prompt?",
        help="what the study asks")
    add("--votes", nargs="+", type=Path, help="count what a study's pages saved, and nothing else")
    add("--key", type=Path, help="the study's key (default: study-key.json beside the votes)")
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    add("--out", type=Path, help="folder (default: the first run)")
    args = parser.parse_args(argv)
    generate.require(args, {"frames": 4, "fps": 0.01, "size": 32, "seeds": 1})
    if bool(args.runs) == bool(args.votes):
        raise BadInput("give folders to score, or --votes FILE.")
    if args.keyframes and (len(args.keyframes) < 2 or min(args.keyframes) < 0):
        raise BadInput("--keyframes: wanted two or more numbers from 0 up.")
    if args.prompts and not args.prompts.is_file():
        raise BadInput(f"{args.prompts} does not exist; give a text file with one prompt a line.")
    return args


def main(argv=None):
    """Score runs; print the table; write metrics.json and page.html."""
    args = parse(argv)
    if args.votes:
        return count_votes(args.votes, args.key)
    args.device = generate.find_device(args.device)
    process, processes = generate.place(args)
    scorers = load_scorers(args)
    folders = list(dict.fromkeys(pair for path in args.runs for pair in samples_of(path, args)))
    names = [name for name, _ in folders]
    runs = [read_run(name if names.count(name) == 1 else str(path), path, args.reference, args)
            for name, path in folders]
    shared = next((run.references for run in runs if run.references), [])
    for run in runs:  # the base model's videos, say, which know of no clip
        run.references = run.references or shared
    if args.world is None:
        args.world = all(r.settings and not r.settings.get("weights") for r in runs)
    if args.world and not scorers.classifier:
        scorers.classifier = tiny_trn(device=args.device)
    table, each = {}, []
    for run in runs:
        found = dict(enumerate(zip(*score(mine(run, process, processes), args, scorers))))
        found = generate.gather({process + i * processes: v for i, v in found.items()}, processes,
                                process)
        if process == 0:
            rows, features = zip(*(found[i] for i in range(len(run.samples))))
            table[run.name] = summary(run, rows, features, args, scorers)
            each.append(rows)
    if process:
        return
    threshold = copy_threshold(args, runs, each)
    for run, rows in zip(runs, each):
        scores = [row[copy_name(args)] for row in rows if copy_name(args) in row]
        if scores and threshold is not None:
            table[run.name]["share of copies"] = sum(
                s > threshold for s in scores) / len(scores)
    show(table)
    out = args.out or args.runs[0]
    videos = [{"run": run.name, "file": str(s.path), "prompt": s.prompt, "seed": s.seed} | row
              for run, rows in zip(runs, each) for s, row in zip(run.samples, rows)]
    settings = {k: str(v) for k, v in vars(args).items() if v}
    references = {run.name: [str(r.path) for r in run.references] for run in runs}
    write_json(out / "metrics.json", {"table": table, "copy threshold": threshold, "videos": videos,
                                      "references": references, "settings": settings})
    report(out / "page.html", runs, table, each)
    if args.user_study:
        study(out, runs, args)


def mine(run, process, processes):
    """Of a run, the samples that one of torchrun's processes scores."""
    return replace(run, samples=run.samples[process::processes])


def show(table):
    """Print metrics down, runs across."""
    metrics = list(dict.fromkeys(m for rows in table.values() for m in rows))
    width = max(map(len, metrics))
    print(" " * width, *(f"{name[-14:]:>14}" for name in table))
    for metric in metrics:
        values = [rows.get(metric) for rows in table.values()]
        shown = ["–" if v is None else f"{v:.4f}" for v in values]
        print(f"{metric:{width}}", *(f"{v:>14}" for v in shown))


if __name__ == "__main__":
    generate.run(main)
