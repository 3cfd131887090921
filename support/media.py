"""Videos and pictures: read with everything that can be wrong with them, and written.

    python -c "from support.media import decode; print(next(decode('clip.mp4'))[0])"

Timing is the signal here, so frames are chosen by their time stamps and never by counting; no more
than the chosen frames, at the size wanted, is ever held.

Axes: C colours, F frames, H W picture. Videos are float32 in [-1, 1].
"""
import contextlib
import math
import re
import statistics
from fractions import Fraction
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from support.files import BadInput, atomic_write, check_exists, log, reading

VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".gif", ".avi", ".m4v")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FEWEST_FRAMES = 4  # residuals and directions mean nothing below that
MOST_PIXELS = 2**26  # of a picture, twice 8K's: a file may claim any size, and is asked before
Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow raises at twice as many


# ------------------------------------------------------------------------------------------------
# In


def natural(path):
    """Sort key by which 2.jpg comes before 10.jpg."""
    return [int(p) if p.isdecimal() else p.lower() for p in re.split(r"(\d+)", Path(path).name)]


def read_video(path, frames, size, fps, start=0.0, learn=True):
    """A clip as (3, F, H, W): `frames` frames at `fps` from `start` seconds, or as many as it has.

    path: a video file, or a folder of pictures in natural order (which are taken as they are).
    size: (H, W); the picture is scaled to cover it and cropped at the centre, never stretched.
    learn: warn of what is bad in a clip to learn from.
    Raises BadInput for anything that is not a clip of at least four frames.
    """
    path = Path(path)
    with reading(path, f"give one of {', '.join(VIDEOS)}, or a folder of pictures"):
        source = read_folder(path, fps) if path.is_dir() else decode(path, start)
        chosen, times, (h, w) = choose_frames(source, frames, fps, start, size)
    if len(chosen) < FEWEST_FRAMES:
        raise BadInput(f"{path} has {len(chosen)} frames at {fps:g} fps from {start:g} s; wanted "
                       f"{frames}, and at least {FEWEST_FRAMES}. Give a longer clip, or a higher "
                       "--fps.")
    video, shape = torch.stack(chosen, dim=1), w / h * size[0] / size[1]
    if learn and len(chosen) < frames:
        log(f"{path} has {len(chosen)} frames at {fps:g} fps, wanted {frames}: "
            "going on with its own length")
    if learn and len(set(times)) < len(times):
        log(f"warning: {path} has fewer than {fps:g} frames a second, so frames repeat; "
            "a lower --fps avoids that")
    if learn and (cut := 1 - min(shape, 1 / shape)) > 0.2:
        log(f"warning: {cut:.0%} of the {'width' if shape > 1 else 'height'} of {path} is cut off; "
            "a --size of its shape keeps it")
    if learn and (video[:, 1:] - video[:, :-1]).abs().mean() < 0.002:
        log(f"warning: {path} hardly moves; there is little motion to learn from it")
    return video


def choose_frames(source, frames, fps, start, size):
    """The pictures (3, *size) nearest in time to start, start + 1/fps, … while the clip lasts,
    their times, and the shape (H, W) that they had, from a source of (seconds, function that makes
    the picture, uint8). Nothing is held of what is not chosen, and nothing read after the last."""
    wanted = start + np.arange(frames) / fps
    chosen, times, seen, shape = [], [], [], None

    def take(time, make):
        nonlocal shape
        if not times or times[-1] != time:
            picture = make()
            shape, last = picture.shape[:2], fit(picture, size)
        else:
            last = chosen[-1]
        chosen.append(last)
        times.append(time)

    before = None
    for now in source:
        seen.append(now[0])
        while len(chosen) < frames and wanted[len(chosen)] <= now[0]:
            goal = wanted[len(chosen)]
            take(*(before if before and goal - before[0] <= now[0] - goal else now))
        if len(chosen) == frames:
            return chosen, times, shape
        before = now
    spacing = np.median(np.diff(seen)) if len(seen) > 1 else 1 / fps
    while before and len(chosen) < frames and wanted[len(chosen)] < seen[-1] + 0.75 * spacing:
        take(*before)  # the last frame, too, is shown for a while
    return chosen, times, shape or (1, 1)


def decode(path, start=0.0):
    """Yields (seconds since the first frame, function that makes the picture) of a video file, from
    the key frame before `start` seconds on. The pictures (H, W, 3) uint8 are upright, with square
    pixels."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        rate, first = float(stream.average_rate or 25), None
        if start and stream.start_time is not None:
            first = float(stream.start_time * stream.time_base)
            with contextlib.suppress(av.error.FFmpegError):
                container.seek(int((first + start) / stream.time_base), stream=stream)
        for count, frame in enumerate(container.decode(stream)):
            if start and count == 0 and (frame.time or 0) - (first or 0) > start:
                yield from decode(path)  # seeking does not lead there
                return
            first = frame.time if first is None else first
            time = count / rate if frame.time is None else frame.time - first
            yield time, partial(upright, frame, float(stream.sample_aspect_ratio or 1))


def frame_rate(path):
    """Frames a second of a video file, by the median spacing of its first time stamps, in [0.01,
    1000]; inf where none says so, as of a folder of pictures."""
    with contextlib.suppress(Exception), av.open(str(path)) as container:  # `decode` tells
        packets = islice(container.demux(video=0), 64)
        times = sorted(float(p.pts * p.time_base) for p in packets if p.pts is not None)
        return min(max(1 / statistics.median(b - a for a, b in pairwise(times)), 0.01), 1000.0)
    return math.inf


def upright(frame, aspect):
    """A decoded frame as (H, W, 3) uint8, turned as the file says and with square pixels, of which
    there are never more than were decoded."""
    picture = frame.to_ndarray(format="rgb24")
    if aspect != 1:
        square = frame.width * min(aspect, 1), frame.height * min(1 / aspect, 1)
        picture = np.asarray(Image.fromarray(picture).resize([max(1, round(s)) for s in square]))
    return np.ascontiguousarray(np.rot90(picture, k=frame.rotation // 90))


def find_images(paths):
    """The picture files that the paths name: files, or folders of them. Raises BadInput."""
    found = []
    for path in map(Path, paths):
        check_exists(path, "give a picture, or a folder of pictures")
        inside = sorted(path.iterdir(), key=natural) if path.is_dir() else [path]
        pictures = [p for p in inside if p.suffix.lower() in IMAGES]
        if not pictures:
            raise BadInput(f"{path} holds no pictures ({', '.join(IMAGES)}).")
        found += pictures
    return found


def read_folder(path, fps):
    """Yields (seconds, function that makes the picture) of a folder of pictures, one each 1/fps, in
    natural order. Raises BadInput."""
    for i, file in enumerate(find_images([path])):
        yield i / fps, partial(read_image, file)


def read_image(path):
    """(H, W, 3) uint8, turned as its EXIF says. Raises BadInput."""
    with reading(path, "save it again"), Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


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


# ------------------------------------------------------------------------------------------------
# Out


def to_pixels(video):
    """(3, F, H, W) in [-1, 1] -> (F, H, W, 3) uint8."""
    pixels = ((video.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(1, 2, 3, 0).numpy()


def enlarged(pixels, least):
    """(F, H, W, 3) pixels repeated as often as makes them about `least` high or more."""
    scale = max(1, round(least / pixels.shape[1]))
    return pixels.repeat(scale, 1).repeat(scale, 2)


def write_video(path, video, fps):
    """(3, F, H, W) -> an H.264 mp4 that every player opens: yuv420p, even sides, about 256 high or
    more (small pictures are enlarged by a whole number)."""
    pixels = enlarged(to_pixels(video), 256)
    odd = pixels.shape[1] % 2, pixels.shape[2] % 2
    pixels = np.pad(pixels, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), "edge")
    with atomic_write(path) as part, av.open(str(part), "w") as container:
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
    rows = [np.concatenate(list(enlarged(to_pixels(every_nth(v)), 96)), axis=1) for v in videos]
    width = max(r.shape[1] for r in rows)
    rows = [np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0))) for r in rows]
    with atomic_write(path) as part:
        Image.fromarray(np.concatenate(rows)).save(part)
