"""What pictures show, by CLIP: how well they fit a text, each other, and those that were learned
from.

    clip = load_clip()                                   # the tiny model's own
    text_alignment(clip, video, "a red star")

Axes: N texts or pictures, F frames, D feature width, H W picture.
"""
from pathlib import Path

import torch
import torch.nn.functional as F

import model
from support import tokenizer
from support.files import BadInput, read_json, read_tensors
from support.hub import clip_from_hub, load_strictly, read_weights, text_from_hub

# ------------------------------------------------------------------------------------------------
# Networks


class Clip:
    """A picture and a text tower. `images` and `texts` give unit features (N, D); `name` says in
    the table whose they are."""

    def __init__(self, net, tokenize, size, mean=0.5, std=0.5, device="cpu", name="tiny CLIP"):
        self.net, self.tokenize, self.size = net.eval().to(device), tokenize, size
        self.mean, self.std, self.device, self.name = mean, std, device, name

    @torch.no_grad()
    def images(self, video):
        """(3, F, H, W) in [-1, 1] -> (F, D)."""
        frames = prepare(video, self.size, self.mean, self.std)
        return F.normalize(self.net.encode_image(frames.to(self.device)), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, prompts):
        """list of N strings -> (N, D)."""
        tokens = self.tokenize(prompts).to(self.device)
        return F.normalize(self.net.encode_text(tokens), dim=-1).cpu()


def prepare(video, size, mean, std):
    """(3, F, H, W) in [-1, 1] -> frames (F, 3, size, size), as a network that was trained on
    pictures of that mean and deviation is fed."""
    frames = (video.transpose(0, 1) + 1) / 2
    frames = F.interpolate(frames, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = torch.as_tensor(mean).view(-1, 1, 1), torch.as_tensor(std).view(-1, 1, 1)
    return (frames - mean) / std


def tiny_clip(folder=model.TINY, device="cpu"):
    """The tiny model's CLIP: its text encoder, and what the folder clip/ holds beside."""
    import open_clip  # here, because it takes seconds to import

    config = read_json(folder / "clip" / "open_clip_config.json")
    net = open_clip.model.CLIP(**config)
    text = text_from_hub(read_weights(folder / "text_encoder"))
    state = text | read_tensors(folder / "clip" / "model.safetensors")
    load_strictly(net, {n: t.float() for n, t in state.items()}, folder / "clip")
    return Clip(net, tokenizer.tokenize, config["vision_cfg"]["image_size"], device=device)


def load_clip(name=None, weights=None, device="cpu"):
    """The tiny CLIP, or any of open_clip's by name with local weights; these may be in the hub's
    format, as PickScore's are. Raises BadInput."""
    if not name and not weights:
        return tiny_clip(device=device)
    if not name:
        raise BadInput(f"{weights}: whose weights? Give --clip too (train.py: clip=), such as "
                       "ViT-L-14-quickgelu.")
    import open_clip

    if not weights or not Path(weights).is_file():
        raise BadInput(f"{name} needs its weights, a local file (got {weights or None}); give "
                       "--clip-weights FILE (of train.py: clip_weights=FILE).")
    if name not in open_clip.list_models():
        raise BadInput(f"--clip {name!r} is not one of open_clip's models, such as ViT-L-14, "
                       "ViT-H-14.")
    net = open_clip.create_model(name, pretrained=None, load_weights=False)
    state = read_tensors(weights)
    if "visual_projection.weight" in state:
        state = clip_from_hub(state)
    load_strictly(net, state, weights)
    cfg = net.visual.preprocess_cfg
    return Clip(net.float(), open_clip.get_tokenizer(name), cfg["size"][0], cfg["mean"],
                cfg["std"], device, name)


def load_script(path, what, trusted, device="cpu"):
    """A TorchScript file that a flag names. Raises BadInput, also where it is not `trusted`: what
    is in it runs with the rights of whoever loads it."""
    if not Path(path).is_file():
        raise BadInput(f"{path} does not exist; give {what}.")
    if not trusted:
        raise BadInput(f"{path} is TorchScript, which is a program: it can read and write your "
                       "files. Add --trust-scripts where you know who made it.")
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["empty"])[0][:80]
        raise BadInput(f"{path} is no TorchScript ({reason}); give {what}.") from None


class SSCD:
    """The copy detector of NewMove's copy score, in TorchScript; `images` as Clip's."""

    name = "SSCD"

    def __init__(self, net, device="cpu"):
        self.net, self.device = net, device

    @torch.no_grad()
    def images(self, video):
        """(3, F, H, W) in [-1, 1] -> unit features (F, D), at 288 pixels, ImageNet's norm."""
        frames = prepare(video, 288, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        return F.normalize(self.net(frames.to(self.device)), dim=-1).cpu()


# ------------------------------------------------------------------------------------------------
# Figures, from unit features: pictures (F, D), a text (1, D)


def alignment(pictures, text):
    """Mean over frames of the cosine between picture and text (MotionDirector, NewMove, VMC). With
    the appearance alone as the text it is NewMove's appearance score; over prompts that ask for
    very different looks, MotionDirector's appearance diversity. A learned word is read as it
    stands, where NewMove writes what it means in its place."""
    return (pictures @ text[0]).mean().item()


def text_alignment(clip, video, prompt):
    """The alignment of a video (3, F, H, W) and a prompt."""
    return alignment(clip.images(video), clip.texts([prompt]))


def temporal_consistency(pictures):
    """Mean cosine over all pairs of frames (LOVEU-TGVE; VMC)."""
    return off_diagonal(pictures @ pictures.T).mean().item()


def pick_score(clip, video, prompt):
    """exp(logit_scale)·cosine, mean over frames (Kirstain et al. 2023), with PickScore's weights.
    """
    return clip.net.logit_scale.exp().item() * text_alignment(clip, video, prompt)


def diversity(videos):
    """1 − cosine between the mean features of videos [(F, D)], over all pairs; None for less than
    two."""
    if len(videos) < 2:
        return None
    means = F.normalize(torch.stack([v.mean(0) for v in videos]), dim=-1)
    return (1 - off_diagonal(means @ means.T)).mean().item()


def off_diagonal(square):
    """The values above the diagonal: each pair once."""
    return square[tuple(torch.triu_indices(*square.shape, 1))]


def copy_score(pictures, references):
    """Largest cosine between any frame of a video (F, D) and any training frame (list of (F, D)):
    NewMove's supplement, Sec. 5."""
    return max((pictures @ r.T).max().item() for r in references)
