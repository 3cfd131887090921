"""Video, pictures and captions: in, out, and everything that can be wrong with them.

    python -c "import data; print(data.read_video('clip.mp4', 16, (64, 64), 8).shape)"

Timing is the signal here, so frames are chosen by their time stamps and never by counting.

Axes: C colours, F frames, H W picture. Videos are float32 in [-1, 1].
"""
import contextlib
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from model import BadInput, words_to_ids

VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".gif", ".avi", ".m4v")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FEWEST_FRAMES = 4  # residuals and directions mean nothing below that


def say(text):
    """A line for the person at the terminal, apart from the program's results."""
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------
# In


def natural(path):
    """Sort key by which 2.jpg comes before 10.jpg."""
    return [int(p) if p.isdigit() else p.lower() for p in re.split(r"(\d+)", Path(path).name)]


def read_video(path, frames, size, fps, start=0.0, learn=True):
    """A clip as (3, F, H, W): `frames` frames at `fps` from `start` seconds, or as many as it has.

    path: a video file, or a folder of pictures in natural order (which are taken as they are).
    size: (H, W); the picture is scaled to cover it and cropped at the centre, never stretched.
    learn: warn of what is bad in a clip to learn from.
    Raises BadInput for anything that is not a clip of at least four frames.
    """
    path = Path(path)
    if path.is_dir():
        pictures = read_folder(path)
        times = [i / fps for i in range(len(pictures))]
    else:
        times, pictures = decode(path, start + frames / fps + 1)
    chosen = choose_frames(times, frames, fps, start)
    if len(chosen) < FEWEST_FRAMES:
        raise BadInput(f"{path} has {len(chosen)} frames at {fps:g} fps from {start:g} s; wanted "
                       f"{frames}, and at least {FEWEST_FRAMES}. Give a longer clip, or a higher "
                       "--fps.")
    video = torch.stack([fit(pictures[i], size) for i in chosen], dim=1)
    if not learn:
        return video
    if len(chosen) < frames:
        say(f"{path} has {len(chosen)} frames at {fps:g} fps, wanted {frames}: "
            "going on with its own length")
    if len(set(chosen)) < len(chosen):
        say(f"warning: {path} has fewer than {fps:g} frames a second, so frames repeat; "
            "a lower --fps avoids that")
    if (video[:, 1:] - video[:, :-1]).abs().mean() < 0.002:
        say(f"warning: {path} hardly moves; there is little motion to learn from it")
    return video


def choose_frames(times, frames, fps, start=0.0):
    """Indices of the frames nearest in time to start, start + 1/fps, … while the clip lasts."""
    times = np.asarray(times) - times[0]
    spacing = np.median(np.diff(times)) if len(times) > 1 else 1 / fps
    end = times[-1] + 0.75 * spacing  # the last frame, too, is shown for a while
    wanted = start + np.arange(frames) / fps
    wanted = wanted[wanted < end]
    return [int(np.abs(times - t).argmin()) for t in wanted]


def decode(path, until=float("inf")):
    """Time stamps in seconds and pictures (H, W, 3) uint8 of a video file, upright and with square
    pixels, for its first `until` seconds. Raises BadInput."""
    if not path.is_file():
        raise BadInput(f"{path} does not exist; give a video file or a folder of pictures.")
    if path.suffix.lower() in PICTURES:
        raise BadInput(f"{path} is one picture; a motion needs a video, or a folder of pictures.")
    times, pictures = [], []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadInput(f"{path} has no picture, only sound; give a video.")
            stream = container.streams.video[0]
            aspect = float(stream.sample_aspect_ratio or 1)
            rate = float(stream.average_rate or 25)
            for frame in container.decode(stream):
                times.append(len(times) / rate if frame.time is None else frame.time)
                if times[-1] - times[0] > until:
                    times.pop()
                    break
                picture = frame.to_ndarray(format="rgb24")
                if aspect != 1:
                    wide = round(picture.shape[1] * aspect), picture.shape[0]
                    picture = np.asarray(Image.fromarray(picture).resize(wide))
                pictures.append(np.ascontiguousarray(np.rot90(picture, k=frame.rotation // 90)))
    except (av.error.FFmpegError, ValueError, EOFError) as error:
        if isinstance(error, BadInput):
            raise
        reason = "no video inside" if not pictures else f"broken after frame {len(pictures)}"
        raise BadInput(f"{path} is not a video that can be read ({reason}); wanted one of "
                       f"{', '.join(VIDEOS)}. Convert it, or save it again.") from None
    if not pictures:
        raise BadInput(f"{path} holds no frames; save it again.")
    order = np.argsort(times, kind="stable")
    return [times[i] for i in order], [pictures[i] for i in order]


def read_folder(path):
    """The pictures (H, W, 3) uint8 of a folder, in natural order. Raises BadInput."""
    files = sorted((p for p in path.iterdir() if p.suffix.lower() in PICTURES), key=natural)
    if not files:
        raise BadInput(f"{path} holds no pictures ({', '.join(PICTURES)}); give a video, or a "
                       "folder of numbered pictures.")
    pictures = [read_picture(p) for p in files]
    sizes = sorted({p.shape[:2] for p in pictures})
    if len(sizes) > 1:
        examples = " and ".join(f"{w}×{h}" for h, w in sizes[:2])
        raise BadInput(f"{path} mixes pictures of {len(sizes)} sizes, such as {examples}; "
                       "make them one size.")
    return pictures


def read_picture(path):
    """(H, W, 3) uint8, turned as its EXIF says. Raises BadInput."""
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError):
        raise BadInput(f"{path} is not a picture that can be read; save it again.") from None


def fit(picture, size):
    """(H, W, 3) uint8 -> (3, *size) in [-1, 1]: scaled to cover, then cropped at the centre."""
    H, W = size
    h, w = picture.shape[:2]
    scale = max(H / h, W / w)
    h, w = max(H, round(h * scale)), max(W, round(w * scale))
    x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()
    if x.shape[-2:] != (h, w):
        x = F.interpolate(x, (h, w), mode="bicubic", antialias=True).clamp(0, 255)
    top, left = (h - H) // 2, (w - W) // 2
    return x[0, :, top : top + H, left : left + W] / 127.5 - 1


MOST_CHARACTERS = 256  # about what 77 tokens hold of English; the rest would be cut unseen


def check_prompt(prompt):
    """The prompt itself. Raises BadInput when the text encoder could not read all of it."""
    tokens = len(words_to_ids(prompt)) + 2  # and the start and the end
    if len(prompt) > MOST_CHARACTERS or tokens > 77:
        raise BadInput(f"prompt {prompt[:40]!r}… has {len(prompt)} characters, {tokens} tokens; "
                       f"the text encoder reads {MOST_CHARACTERS} and 77 at most. Shorten it.")
    return prompt


def find_caption(video, prompt=None):
    """The caption of a clip and where it came from: the prompt, else clip.txt beside the clip (or
    inside a folder of pictures: caption.txt), else the file's name."""
    video = Path(video)
    if prompt is not None:
        return check_prompt(prompt), "--prompt"
    for path in (video.parent / f"{video.stem}.txt", video / "caption.txt"):
        if path.is_file():
            text = path.read_text(errors="replace").strip()
            if not text:
                raise BadInput(f"{path} is empty; write the caption in it, or give --prompt.")
            return check_prompt(text.splitlines()[0]), str(path)
    return check_prompt(re.sub(r"[\W_]+", " ", video.stem).strip() or "a video"), "the file's name"


# ------------------------------------------------------------------------------------------------
# Clips to learn from, and what of one a pass sees


@dataclass
class Clip:
    """Something to learn from, with its caption: a video (3, F, H, W), or a picture, where F is 1;
    and its latents (1, C, F, h, w), scaled, once they are made."""

    video: torch.Tensor
    prompt: str
    path: Path
    latents: torch.Tensor = None


def find_clips(paths):
    """The clips that the paths name: video files, folders of numbered pictures (a clip each), and
    folders of such files and folders; of one that holds none, the folder itself."""
    found = []
    for path in map(Path, paths):
        inside = sorted(path.iterdir(), key=natural) if path.is_dir() else []
        clips = [p for p in inside if p.suffix.lower() in VIDEOS or p.is_dir()]
        found += clips or [path]
    return found


def find_pictures(paths):
    """The picture files that the paths name: files, or folders of them. Raises BadInput."""
    found = []
    for path in map(Path, paths):
        inside = sorted(path.iterdir(), key=natural) if path.is_dir() else [path]
        pictures = [p for p in inside if p.suffix.lower() in PICTURES]
        if not pictures:
            raise BadInput(f"{path} holds no pictures ({', '.join(PICTURES)}).")
        found += pictures
    return found


# Each view takes a clip, a source of randomness and encode(video) -> latents, and gives the latents
# (1, C, F', h, w) that the pass sees and which of the clip's frames they are, as a slice.


def whole(clip, g, encode):
    """All frames."""
    return clip.latents, slice(None)


def frame(clip, g, encode):
    """One random frame (MotionDirector's spatial path)."""
    f = int(torch.randint(clip.video.shape[1], (), generator=g))
    return clip.latents[:, :, f : f + 1], slice(f, f + 1)


CROP = (0.33, 0.67)  # of the sides: Customize-A-Video's patches


def crop(clip, g, encode):
    """A random part of one random frame, a third to two thirds as wide and high, enlarged: what
    things look like, without where they are (Customize-A-Video)."""
    f = int(torch.randint(clip.video.shape[1], (), generator=g))
    part = zoom(clip.video[:, f : f + 1], *CROP, g)
    return encode(part), slice(f, f + 1)


def augmented(clip, g, encode):
    """All frames, all alike a little enlarged, shifted, and changed in brightness, contrast and
    saturation (NewMove's supplement names spatial and colour augmentation, with no figures).
    Never flipped: a flip turns left into right."""
    return encode(tint(zoom(clip.video, 0.8, 1.0, g), g)), slice(None)


def recoloured(clip, g, encode):
    """All frames, all alike with red, green and blue shuffled, half of the time as a negative, and
    tinted: another look at each step, and what the looks share is the motion."""
    shuffled = clip.video[torch.randperm(3, generator=g)]
    negative = torch.rand((), generator=g) < 0.5
    return encode(tint(-shuffled if negative else shuffled, g)), slice(None)


def tint(video, g):
    """Brightness, contrast and saturation up to a fifth more or less, the same in all frames."""
    light, contrast, colour = 0.8 + 0.4 * torch.rand(3, generator=g)
    video = ((video + 1) * light - 1 - video.mean()) * contrast + video.mean()
    grey = video.mean(0, keepdim=True)
    return (grey + (video - grey) * colour).clamp(-1, 1)


VIEWS = {"whole": whole, "frame": frame, "crop": crop, "augmented": augmented,
         "recoloured": recoloured}


def zoom(video, least, most, g):
    """A random part of (3, F, H, W), least … most of its sides, at the video's own size."""
    H, W = video.shape[-2:]
    share = least + (most - least) * torch.rand((), generator=g)
    h, w = max(1, round(H * share.item())), max(1, round(W * share.item()))
    top = int(torch.randint(H - h + 1, (), generator=g))
    left = int(torch.randint(W - w + 1, (), generator=g))
    part = video[:, :, top : top + h, left : left + w].transpose(0, 1)
    return F.interpolate(part, (H, W), mode="bilinear", align_corners=False).transpose(0, 1)


# ------------------------------------------------------------------------------------------------
# Out


PART = ".part-"  # files that are being written


def room_for(path, size):
    """Raises BadInput when the disk of `path` cannot take `size` more bytes."""
    free = shutil.disk_usage(Path(path).parent).free
    if free < size:
        raise BadInput(f"{path} needs {size:,} bytes, the disk has {free:,} left; nothing was "
                       "changed. Free some, or give another --out.")


@contextlib.contextmanager
def publish(path):
    """A temporary path beside `path`; when the block ends well it is flushed to disk and takes the
    name, so a reader meets the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=PART, suffix=path.suffix)
    os.close(handle)
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~umask)  # temporary files, and safetensors', are private
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def to_pixels(video):
    """(3, F, H, W) in [-1, 1] -> (F, H, W, 3) uint8."""
    pixels = ((video.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(1, 2, 3, 0).numpy()


def write_video(path, video, fps):
    """(3, F, H, W) -> an H.264 mp4 that every player opens: yuv420p, even sides, about 256 high or
    more (small pictures are enlarged by a whole number)."""
    pixels = to_pixels(video)
    scale = max(1, round(256 / pixels.shape[1]))
    pixels = pixels.repeat(scale, 1).repeat(scale, 2)
    odd = pixels.shape[1] % 2, pixels.shape[2] % 2
    pixels = np.pad(pixels, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), "edge")
    with publish(path) as part, av.open(str(part), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "14"}
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def every_nth(video, columns=8):
    """At most `columns` frames of a video (3, F, H, W), evenly spaced, first and last included."""
    count = min(columns, video.shape[1])
    return video[:, np.linspace(0, video.shape[1] - 1, count).round().astype(int)]


def contact_sheet(path, videos):
    """One row a video (3, F, H, W), eight frames of each, as a PNG."""
    rows = []
    for video in videos:
        frames = to_pixels(every_nth(video))
        scale = max(1, round(96 / frames.shape[1]))
        frames = frames.repeat(scale, 1).repeat(scale, 2)
        rows.append(np.concatenate(list(frames), axis=1))
    width = max(r.shape[1] for r in rows)
    rows = [np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0))) for r in rows]
    with publish(path) as part:
        Image.fromarray(np.concatenate(rows)).save(part)


def slug(text, longest=48):
    """A file name from a text: letters, digits and dashes alone, so it stays in its folder."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:longest].strip("-") or "untitled"
