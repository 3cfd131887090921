"""CLIP metrics: text alignment, temporal consistency, diversity, PickScore and copy score.

    clip = load_clip()                                   # the tiny CLIP
    text_alignment(clip, video, "a red star")

Axes: N texts, F frames, D feature width, H W pixels.
"""
from pathlib import Path

import torch
import torch.nn.functional as F

import model
from support import tokenizer
from support.files import BadInput, read_json, read_tensors
from support.hub import clip_from_hub, load_strictly, read_weights, text_from_hub


class CLIP:
    """An image tower and a text tower with unit features. `name` labels its rows in the table."""

    def __init__(self, net, tokenize, size, mean=0.5, std=0.5, device="cpu", name="tiny CLIP"):
        self.net, self.tokenize, self.size = net.eval().to(device), tokenize, size
        self.mean, self.std, self.device, self.name = mean, std, device, name

    @torch.no_grad()
    def frame_features(self, video):
        """(3, F, H, W) in [-1, 1] -> (F, D)."""
        frames = preprocess(video, self.size, self.mean, self.std)
        return F.normalize(self.net.encode_image(frames.to(self.device)), dim=-1).cpu()

    @torch.no_grad()
    def text_features(self, prompts):
        """List of N strings -> (N, D)."""
        tokens = self.tokenize(prompts).to(self.device)
        return F.normalize(self.net.encode_text(tokens), dim=-1).cpu()


def preprocess(video, size, mean, std):
    """(3, F, H, W) in [-1, 1] -> frames (F, 3, size, size), normalized by mean and std."""
    frames = (video.transpose(0, 1) + 1) / 2
    frames = F.interpolate(frames, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = torch.as_tensor(mean).view(-1, 1, 1), torch.as_tensor(std).view(-1, 1, 1)
    return (frames - mean) / std


def tiny_clip(folder=model.TINY, device="cpu"):
    """The tiny CLIP: the tiny model's text encoder, and the image tower in the folder clip/."""
    import open_clip  # here, since the import takes seconds

    config = read_json(folder / "clip" / "open_clip_config.json")
    net = open_clip.model.CLIP(**config)
    text = text_from_hub(read_weights(folder / "text_encoder"))
    state = text | read_tensors(folder / "clip" / "model.safetensors")
    load_strictly(net, {n: t.float() for n, t in state.items()}, folder / "clip")
    return CLIP(net, tokenizer.tokenize, config["vision_cfg"]["image_size"], device=device)


def load_clip(name=None, weights=None, device="cpu"):
    """An open_clip model with local weights, in open_clip's or the hub's format; without arguments,
    the tiny CLIP. Raises BadInput."""
    if not name and not weights:
        return tiny_clip(device=device)
    import open_clip

    if not (name and weights and Path(weights).is_file()):
        raise BadInput(f"--clip {name}, --clip-weights {weights}: expected a model of open_clip, "
                       "e.g. ViT-L-14-quickgelu, and its local weights file (train.py: clip=, "
                       "clip_weights=).")
    if name not in open_clip.list_models():
        raise BadInput(f"--clip {name!r}: expected an open_clip model, e.g. ViT-L-14 or ViT-H-14.")
    net = open_clip.create_model(name, pretrained=None, load_weights=False)
    state = read_tensors(weights)
    if "visual_projection.weight" in state:
        state = clip_from_hub(state)
    load_strictly(net, state, weights)
    config = net.visual.preprocess_cfg
    return CLIP(net.float(), open_clip.get_tokenizer(name), config["size"][0], config["mean"],
                config["std"], device, name)


def load_script(path, expected, trusted, device="cpu"):
    """Load a TorchScript file. Raises BadInput, also for files that are not `trusted`, since
    TorchScript can run any code."""
    if not Path(path).is_file():
        raise BadInput(f"{path} does not exist; give {expected}.")
    if not trusted:
        raise BadInput(f"{path} is TorchScript, which is a program that can read and write your "
                       "files; add --trust-scripts if you trust its author.")
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["empty"])[0][:80]
        raise BadInput(f"{path} is not TorchScript ({reason}); give {expected}.") from None


class SSCD:
    """The copy detector of NewMove's copy score, in TorchScript."""

    name = "SSCD"

    def __init__(self, net, device="cpu"):
        self.net, self.device = net, device

    @torch.no_grad()
    def frame_features(self, video):
        """(3, F, H, W) in [-1, 1] -> unit features (F, D), at 288 pixels, with ImageNet's mean and
        standard deviation."""
        frames = preprocess(video, 288, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        return F.normalize(self.net(frames.to(self.device)), dim=-1).cpu()


def alignment(frames, text):
    """Cosine of frame and text, averaged over frames (MotionDirector, NewMove, VMC).

    With the appearance words of the prompt as the text, it is NewMove's appearance score. Averaged
    over prompts with very different appearance, it is MotionDirector's appearance diversity.
    Learned tokens are encoded as plain text; NewMove replaces them with a description.
    """
    return (frames @ text[0]).mean().item()


def text_alignment(clip, video, prompt):
    """The alignment of a video (3, F, H, W) and a prompt."""
    return alignment(clip.frame_features(video), clip.text_features([prompt]))


def temporal_consistency(frames):
    """Mean cosine over all pairs of frames (LOVEU-TGVE; VMC)."""
    return off_diagonal(frames @ frames.T).mean().item()


def pick_score(clip, video, prompt):
    """exp(logit_scale)·cosine, averaged over frames (Kirstain et al. 2023)."""
    return clip.net.logit_scale.exp().item() * text_alignment(clip, video, prompt)


def diversity(videos):
    """1 − cosine of the mean features of two videos, averaged over all pairs of [(F, D)]; None for
    fewer than two videos."""
    if len(videos) < 2:
        return None
    means = F.normalize(torch.stack([v.mean(0) for v in videos]), dim=-1)
    return (1 - off_diagonal(means @ means.T)).mean().item()


def off_diagonal(square):
    """The values above the diagonal, one per pair."""
    return square[tuple(torch.triu_indices(*square.shape, 1))]


def copy_score(frames, references):
    """Largest cosine between a frame of the video (F, D) and a frame of the training clips, a list
    of (F, D) (NewMove's supplement, Sec. 5)."""
    return max((frames @ r.T).max().item() for r in references)
