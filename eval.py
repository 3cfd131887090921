"""Score videos: what they show, how steady they are, what they copied, and how they move.

    python eval.py out/generated                                   # what generate.py wrote
    python eval.py out/vmc out/newmove --reference clip.mp4        # compare two, to one clip
    python eval.py some/videos --reference other/videos --size 256

A run is a folder that generate.py wrote, or any folder of videos with captions. Prints a table and
writes metrics.json to --out.

Axes: N videos or pictures, F frames, P points, D feature width, H W picture.
"""
import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import generate
import model
from model import BadInput

# ------------------------------------------------------------------------------------------------
# Runs


@dataclass
class Sample:
    """A video (3, F, H, W) in [-1, 1] with its prompt and its seed."""

    video: torch.Tensor
    prompt: str
    seed: int
    path: Path


@dataclass
class Run:
    """Samples, the clips they learned from (a list of (3, F, H, W)), and the settings."""

    name: str
    samples: list
    references: list
    settings: dict


def read_run(path, references, args):
    """A folder of videos. What generate.py wrote names its prompts, and through its adapter the
    clips that were learned from, unless `references` (paths) are given. Raises BadInput."""
    path, settings = Path(path), {}
    if not path.is_dir():
        raise BadInput(f"{path} is not a folder; give one of generate.py's, or one of videos.")
    if (path / "settings.json").is_file():
        settings = model.read_json(path / "settings.json")
    samples = []
    for file in data.find_clips([path]):
        prompts = settings.get("all_prompts")
        prompt = prompts[int(file.name[:3])] if prompts else data.find_caption(file)[0]
        seed = int(file.stem.rpartition("seed")[2]) if prompts else 0
        samples.append(Sample(read(file, args), prompt, seed, file))
    if not references:
        runs = [Path(a).parent / "args.json" for a in settings.get("adapter") or []]
        trained = [model.read_json(p) for p in runs if p.is_file()]
        references = [Path(v) for t in trained for v in t.get("video") or []]
    clips = [read(file, args) for file in data.find_clips(references)]
    return Run(path.name, samples, clips, settings)


def read(path, args):
    """A clip at the size and rate that everything is measured at."""
    return data.read_video(path, args.frames, (args.size, args.size), args.fps)


# ------------------------------------------------------------------------------------------------
# CLIP


class Clip:
    """A picture and a text tower. `images` and `texts` give unit features (N, D)."""

    def __init__(self, net, tokenize, size, mean=0.5, std=0.5):
        self.net, self.tokenize, self.size = net.eval(), tokenize, size
        self.mean, self.std = torch.as_tensor(mean), torch.as_tensor(std)

    @torch.no_grad()
    def images(self, video):
        """(3, F, H, W) in [-1, 1] -> (F, D)."""
        frames = (video.transpose(0, 1) + 1) / 2
        frames = F.interpolate(frames, (self.size, self.size), mode="bicubic", antialias=True)
        shape = lambda v: v.view(-1, 1, 1)
        frames = (frames.clamp(0, 1) - shape(self.mean)) / shape(self.std)
        return F.normalize(self.net.encode_image(frames), dim=-1)

    @torch.no_grad()
    def texts(self, prompts):
        """list of N strings -> (N, D)."""
        return F.normalize(self.net.encode_text(self.tokenize(prompts)), dim=-1)


def tiny_clip(folder=generate.TINY):
    """The tiny model's CLIP: its text encoder, and what the folder clip/ holds beside."""
    import open_clip

    config = model.read_json(folder / "clip" / "open_clip_config.json")
    net = open_clip.model.CLIP(**config)
    text = model.text_from_hub(model.read_tensors(model.find_weights(folder / "text_encoder")))
    state = text | model.read_tensors(folder / "clip" / "model.safetensors")
    model.load_strictly(net, {n: t.float() for n, t in state.items()}, folder / "clip")
    return Clip(net, model.tokenize, config["vision_cfg"]["image_size"])


def load_clip(name=None, weights=None):
    """The tiny CLIP, or any of open_clip's by name with local weights; these may be in the hub's
    format, as PickScore's are. Raises BadInput."""
    if name is None:
        return tiny_clip()
    import open_clip

    if weights is None or not Path(weights).is_file():
        raise BadInput(f"--clip {name} needs --clip-weights, a local file (got {weights}).")
    if name not in open_clip.list_models():
        raise BadInput(f"--clip {name!r} is not one of open_clip's models, such as ViT-L-14, "
                       "ViT-H-14.")
    with torch.device("meta"):
        net = open_clip.create_model(name, pretrained=None, load_weights=False)
    state = model.read_tensors(weights)
    if "visual_projection.weight" in state:
        state = clip_from_hub(state)
    model.load_strictly(net, state, weights)
    cfg = net.visual.preprocess_cfg
    return Clip(net.float(), model.tokenize, cfg["size"][0], cfg["mean"], cfg["std"])


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
    the appearance phrase alone as the prompt it is NewMove's appearance score."""
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

    def __init__(self, path):
        try:
            self.net = torch.jit.load(path, map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            raise BadInput(f"{path} is no TorchScript ({str(error).splitlines()[0][:80]}); give "
                           "sscd_disc_mixup.torchscript.pt.") from None

    @torch.no_grad()
    def images(self, video):
        """(3, F, H, W) in [-1, 1] -> unit features (F, D), at 288 pixels, ImageNet's norm."""
        frames = F.interpolate((video.transpose(0, 1) + 1) / 2, (288, 288), mode="bicubic",
                               antialias=True).clamp(0, 1)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        frames = (frames - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        return F.normalize(self.net(frames), dim=-1)


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


def track(video, every=4, textured=0.02):
    """Tracks (P, F, 2) in pixels through (3, F, H, W): points of a grid in the first frame where
    there is something to see, followed from frame to frame."""
    grey = video.mean(0)  # (F, H, W)
    H, W = grey.shape[1:]
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


def motion_fidelity(source, made, still=0.05):
    """Yatim et al. 2023: for every track of one video the best correlation among the other's,
    averaged, both ways. A correlation is the mean over frames of the cosine between
    displacements; two that are both still (shorter than `still` pixels) agree, one that is still
    and one that moves do not. Tracks (P, F, 2) of equal F; at most 2."""
    if not len(source) or not len(made):
        return 0.0
    a, b = source.diff(dim=1), made.diff(dim=1)  # (P, F-1, 2), (Q, F-1, 2)
    la, lb = a.norm(dim=-1), b.norm(dim=-1)
    cosine = torch.einsum("pfc,qfc->pqf", F.normalize(a, dim=-1), F.normalize(b, dim=-1))
    rest_a, rest_b = (la < still)[:, None], (lb < still)[None]
    cosine = torch.where(rest_a & rest_b, 1.0, torch.where(rest_a | rest_b, 0.0, cosine))
    best = cosine.mean(-1)  # (P, Q)
    return (best.amax(0).mean() + best.amax(1).mean()).item()


# ------------------------------------------------------------------------------------------------
# A run's figures


def score(run, args, clip, copies, pick=None):
    """{metric: number or None} of a run: means over its samples."""
    made = [clip.images(s.video) for s in run.samples]
    mean = lambda values: sum(values) / len(values) if values else None
    rows = {
        "text alignment": mean([text_alignment(clip, s.video, s.prompt) for s in run.samples]),
        "temporal consistency": mean([temporal_consistency(f) for f in made]),
    }
    if args.look_prompt:
        rows["appearance score"] = mean(
            [text_alignment(clip, s.video, args.look_prompt) for s in run.samples])
    if pick:
        rows["PickScore"] = mean([pick_score(pick, s.video, s.prompt) for s in run.samples])
    by_prompt = {}
    for s, f in zip(run.samples, made):
        by_prompt.setdefault(s.prompt, []).append(f)
    spread = [d for d in map(diversity, by_prompt.values()) if d is not None]
    rows["diversity (1 − CLIP cosine)"] = mean(spread)
    if run.references:
        seen = [copies.images(v) for v in run.references]
        scores = [copy_score(copies.images(s.video), seen) for s in run.samples]
        rows[f"copy score ({args.copy_name})"] = mean(scores)
        rows[f"share above {args.copy_threshold:g}"] = mean(
            [float(x > args.copy_threshold) for x in scores])
        sources, found = [track(v) for v in run.references], []
        for s in run.samples:
            tracks = track(s.video)
            fits = [motion_fidelity(source, tracks) for source in sources
                    if source.shape[1] == tracks.shape[1]]
            found += [max(fits)] if fits else []
        rows["motion fidelity"] = mean(found)
    if args.world:
        rows |= world_scores(run)
    return rows


def world_scores(run):
    """What the tiny world's instruments read: looks as the prompt names them, and the kind of
    motion of the first reference."""
    from tiny import instruments, world

    small = lambda v: F.interpolate(v.transpose(0, 1), (64, 64), mode="area").transpose(0, 1)
    reading = instruments.read(torch.stack([small(s.video) for s in run.samples]))
    out = {}
    for field, table in (("colour", world.COLOURS), ("shape", world.SHAPES),
                         ("background", world.BACKGROUNDS)):
        names, right = list(table), []
        for s, got in zip(run.samples, getattr(reading, field).tolist()):
            wanted = [i for i, n in enumerate(names) if model.has_word(s.prompt, n)]
            right += [float(got in wanted)] if wanted else []
        out[field] = sum(right) / len(right) if right else None
    if run.references:
        goal = instruments.read(small(run.references[0])[None]).motion
        out["same kind of motion"] = (reading.motion == goal).float().mean().item()
    return out


def parse(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="folders that generate.py wrote, or folders of videos")
    add("--reference", nargs="+", type=Path, default=[], help="the clips that were learned from "
        "(default: those of the run's adapter)")
    add("--look-prompt", help="the appearance alone, for the appearance score")
    add("--clip", help="an open_clip model such as ViT-L-14 (default: the tiny CLIP)")
    add("--clip-weights", type=Path, help="its weights, a local file")
    add("--pick-weights", type=Path, help="PickScore's (CLIP ViT-H-14 in the hub's format)")
    add("--sscd", type=Path, help="sscd_disc_mixup.torchscript.pt, for the copy score (default: "
        "the CLIP's picture features)")
    add("--copy-threshold", type=float, help="of the share of copies (default: 0.25 for SSCD, 0.95 "
        "for CLIP)")
    add("--world", action="store_true", help="read the tiny world's looks and motions too")
    add("--frames", type=int, default=16, help="frames of each video (default: 16)")
    add("--fps", type=float, default=8, help="frames a second (default: 8)")
    add("--size", type=int, default=256, help="pixels of the square everything is measured at, "
        "cropped at the centre (default: 256)")
    add("--out", type=Path, help="folder (default: the first run)")
    args = parser.parse_args(argv)
    generate.require(args, {"frames": 2, "fps": 0.01, "size": 32})
    return args


def main(argv=None):
    """Score runs; print the table; write metrics.json."""
    args = parse(argv)
    clip = load_clip(args.clip, args.clip_weights)
    pick = load_clip("ViT-H-14", args.pick_weights) if args.pick_weights else None
    copies = SSCD(args.sscd) if args.sscd else clip
    args.copy_name = "SSCD" if args.sscd else f"{args.clip or 'tiny CLIP'} features"
    if args.copy_threshold is None:
        args.copy_threshold = 0.25 if args.sscd else 0.95
    runs = [read_run(path, args.reference, args) for path in args.runs]
    table = {run.name: score(run, args, clip, copies, pick) for run in runs}
    width = max(len(name) for rows in table.values() for name in rows)
    print(" " * width, *(f"{name[:14]:>14}" for name in table))
    for metric in dict.fromkeys(m for rows in table.values() for m in rows):
        values = [rows.get(metric) for rows in table.values()]
        shown = ["–" if v is None else f"{v:.4f}" for v in values]
        print(f"{metric:{width}}", *(f"{v:>14}" for v in shown))
    out = (args.out or args.runs[0]) / "metrics.json"
    with data.publish(out) as path:
        path.write_text(json.dumps(table, indent=1, ensure_ascii=False))
    print(f"written: {out}")


if __name__ == "__main__":
    generate.run(main)
