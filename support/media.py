"""Reading and writing videos and images, and the order of files in a folder.

    python -c "from support.media import frame_rate; print(frame_rate('assets/eight.mp4', 8))"

Frames are chosen by time stamp. Only the chosen frames are kept in memory, at the requested size.

Axes: C colors, F frames, H W image. Videos are float32 in [-1, 1].
"""
import contextlib
import re
import shlex
import statistics
from fractions import Fraction
from functools import cache, partial
from itertools import chain, islice, pairwise
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageSequence

from support.files import BadInput, atomic_write, log, reading

VIDEOS = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".gif", ".avi", ".mpg", ".mpeg", ".ts", ".mts",
          ".m2ts", ".flv", ".wmv", ".3gp", ".ogv")
# FFmpeg's formats for these. Others show a text file as video, or read the files in a playlist.
FORMATS = "mov,matroska,gif,avi,mpeg,mpegvideo,mpegts,flv,asf,ogg"
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SYSTEM_FILES = ("__macosx", "icon\r", "thumbs.db", "desktop.ini", "$recycle.bin", "@eadir")
HDR = (16, 18)  # PQ and HLG, as numbered in H.273
TONE_MAP = "zscale=t=linear:npl=203,tonemap=mobius,zscale=p=bt709:t=bt709:m=bt709,format=yuv420p"
MIN_FRAMES = 4  # residuals are meaningless for fewer
MAX_PIXELS = 2**26  # per image, twice 8K: a damaged header can contain any size
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow raises at twice this number
# Only the formats of IMAGES: Pillow reads an EPS file by running Ghostscript, whatever its name.
open_image = partial(Image.open, formats=("PNG", "JPEG", "WEBP", "BMP"))
log_once = cache(log)


# --- Reading ------------------------------------------------------------------------------------


def natural(path):
    """A sort key that puts 2.jpg before 10.jpg."""
    name = Path(path).name
    return [int(p) if p.isdecimal() else p.lower() for p in re.split(r"(\d+)", name)], name


def list_folder(folder):
    """The paths in a folder, in natural order, without hidden files and SYSTEM_FILES."""
    with reading(folder):
        inside = sorted(Path(folder).iterdir(), key=natural)
    return [p for p in inside if p.name[0] != "." and p.name.lower() not in SYSTEM_FILES]


def read_video(path, frames, size, fps, start=0.0, learn=True, allow_damaged=False):
    """A clip (3, F, H, W) that starts at `start` seconds: `frames` frames, or fewer if it ends.

    path: a video, an animated WebP or PNG, or a folder of images (one frame per image).
    size: (H, W); frames are scaled to cover it and center-cropped, never stretched.
    fps: requested rate; the actual rate is `frame_rate(path, fps)`.
    learn: warn about clips that are poor training data.
    allow_damaged: warn about damaged frames instead of refusing the file.
    Raises BadInput for anything that is not a clip of at least four frames.
    """
    path, fps = Path(path), frame_rate(path, fps)
    images = path.is_dir() or path.suffix.lower() in IMAGES
    with reading(path, f"give one of {', '.join(VIDEOS)}, or a folder of images"):
        source = read_images(path, fps) if images else decode(path, allow_damaged, start)
        chosen, times, (h, w) = choose_frames(source, frames, fps, start, size)
    if len(chosen) < MIN_FRAMES:
        raise BadInput(f"{path} has {len(chosen)} frames at {fps:g} fps from {start:g} s; expected "
                       f"at least {MIN_FRAMES}. Give a longer clip, an earlier --start, or "
                       "a higher --fps or --frames.")
    video, shape = torch.stack(chosen, dim=1), w / h * size[0] / size[1]
    if learn and len(chosen) < frames:
        log(f"{path} has {len(chosen)} frames at {fps:g} fps, expected {frames}: "
            f"it is trained with {len(chosen)} frames")
    if learn and np.ptp(steps := np.diff(times)) > 0.015:  # more than rounded time stamps
        log(f"warning: {path} has a variable frame rate: the chosen frames are {min(steps):.3g} to "
            f"{max(steps):.3g} s apart, expected {1 / fps:.3g} s; a lower --fps may help")
    if learn and (cut := 1 - min(shape, 1 / shape)) > 0.2:
        log(f"warning: {cut:.0%} of the {'width' if shape > 1 else 'height'} of {path} is cut off; "
            "a --size with its aspect ratio avoids that")
    if learn and (video[:, 1:] - video[:, :-1]).abs().mean() < 0.002:
        log(f"warning: {path} hardly moves, so there is little motion to train on")
    return video


def choose_frames(source, frames, fps, start, size):
    """Choose the frames nearest to start, start + 1/fps, … until the clip ends. Times count from
    the first chosen frame, so that steps stay equal for a `start` between two frames.

    source: (seconds, function that returns the image) per frame, called for chosen frames only.
    Returns the images (3, *size), their times, and the original shape (H, W).
    """
    chosen, times, shape, duration = [], [], None, 1 / fps
    for (time, make), after in pairwise(chain(source, [None])):
        duration = after[0] - time if after else duration
        end = time + duration * (0.5 if after else 0.75)
        while len(chosen) < frames and (times[0] if times else start) + len(chosen) / fps <= end:
            if not times or times[-1] != time:
                original = make()
                if shape not in (None, original.shape[:2]):
                    raise ValueError("its frames have several sizes")
                shape, image = original.shape[:2], fit(original, size)
            chosen.append(image)
            times.append(time)
        if len(chosen) == frames:
            break
    return chosen, times, shape or (1, 1)


def open_video(path):
    """An open video file, with FFmpeg's formats restricted to FORMATS."""
    # Without "file:", "a:b.mp4" names a protocol.
    return av.open(f"file:{path}", options={"format_whitelist": FORMATS})


def decode(path, allow_damaged=False, start=0.0):
    """Yields (seconds since the first frame, function that returns the image) per frame of a video
    file, beginning with the key frame before `start` seconds. Images (H, W, 3) uint8 are upright,
    with square pixels. Raises BadInput for corrupt frames unless `allow_damaged`."""
    count, first = 0, None
    with open_video(path) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise BadInput(f"{path} has no video stream; give a video file.")
        if stream.codec_context.color_trc in HDR:
            log_once(f"warning: {path} is HDR, which is read with dark, pale colors; convert "
                     f"it: ffmpeg -i {shlex.quote(str(path))} -vf {TONE_MAP} sdr.mp4")
        if stream.metadata.get("alpha_mode") == "1":  # VP8 and VP9, whose decoders drop it
            log_once(f"warning: {path} has transparent pixels, which are read as opaque")
        rate, aspect = float(stream.average_rate or 25), float(stream.sample_aspect_ratio or 1)
        # With several threads, corrupt frames are not marked.
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS), "threads": "1"}
        if start and stream.start_time is not None:
            first = float(stream.start_time * stream.time_base)
            with contextlib.suppress(av.error.FFmpegError):
                container.seek(int((first + start) / stream.time_base), stream=stream)
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                frames = None
            if frames is None or any(frame.is_corrupt for frame in frames):
                if not allow_damaged:
                    raise BadInput(f"{path} is damaged at {count / rate:.2f} s; give an intact "
                                   "copy, or --allow-damaged to use the damaged frames.")
                log_once(f"warning: {path} is damaged, and its damaged frames are used")
            for frame in frames or []:
                if start and count == 0 and (frame.time or 0) - (first or 0) > start:
                    yield from decode(path, allow_damaged)  # the file has no usable index
                    return
                first = frame.time if first is None else first
                time = count / rate if frame.time is None else frame.time - first
                yield time, partial(upright, frame, aspect)
                count += 1


def frame_rate(path, fps):
    """The clip's own rate divided by the integer that brings it closest to `fps`, so that chosen
    frames are equally far apart. `fps` itself for a folder, or if the rate is unknown."""
    with contextlib.suppress(Exception), reading(path):  # read_video reports its errors
        if Path(path).suffix.lower() in IMAGES:
            (first, _), (second, _) = islice(read_images(Path(path), fps), 2)
            spacing = second - first
        else:
            with open_video(path) as container:
                stream = container.streams.best("video")
                packets = islice(container.demux(stream), 64)
                ticks = [p.dts if p.pts is None else p.pts for p in packets if p.size]
                steps = [b - a for a, b in pairwise(sorted(ticks))]
                usual = statistics.median(steps)
                steps = [s for s in steps if abs(s / usual - 1) <= 0.25]  # without pauses
                spacing = statistics.mean(steps) * stream.time_base
        rate = max(0.01, round(float(1 / spacing), 2))
        return rate / max(1, round(rate / fps))
    return fps


def upright(frame, aspect):
    """A decoded frame (H, W, 3) uint8 as players show it, with square pixels, rotated, mirrored."""
    alpha = any(component.is_alpha for component in frame.format.components)
    image = Image.fromarray(frame.to_ndarray(format="rgba" if alpha else "rgb24"))
    square = frame.width * min(aspect, 1), frame.height * min(1 / aspect, 1)
    pixels = to_rgb(image.resize([max(1, round(side)) for side in square]))
    if matrix := frame.side_data.get("DISPLAYMATRIX"):  # x' = a·x + c·y, y' = b·x + d·y
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
        if abs(b) > abs(a):
            pixels, a, d = pixels.swapaxes(0, 1), c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(pixels)


def find_images(paths):
    """The image files that the paths name: files, or folders of them. Raises BadInput."""
    found = []
    for path in map(Path, paths):
        inside = list_folder(path) if path.is_dir() else [path]
        images = [p for p in inside if p.suffix.lower() in IMAGES]
        if not images:
            raise BadInput(f"{path} has no images ({', '.join(IMAGES)}).")
        found += images
    return found


def is_image_folder(path):
    """True for a folder of images, without videos."""
    suffixes = {p.suffix.lower() for p in list_folder(path)} if path.is_dir() else set()
    return bool(suffixes & set(IMAGES)) and not suffixes & set(VIDEOS)


def read_images(path, fps):
    """Yields (seconds, function that returns the image) per frame of an animated image, or per
    image of a folder, 1/fps apart. Raises BadInput."""
    if path.is_dir():
        for i, file in enumerate(find_images([path])):
            yield i / fps, partial(read_image, file)
        return
    time = 0.0
    with open_image(path) as animation:
        for image in ImageSequence.Iterator(animation):
            yield time, partial(np.asarray, to_rgb(image))
            time += (image.info.get("duration") or 100) / 1000  # 0: as browsers show it


def read_image(path):
    """An image file as (H, W, 3) uint8. Raises BadInput."""
    with reading(path, "save the image again"), open_image(path) as image:
        if getattr(image, "is_animated", False):
            raise ValueError("it is animated: give it alone, as a clip")
        return to_rgb(image)


def to_rgb(image):
    """A Pillow image as opaque (H, W, 3) uint8, with its EXIF orientation applied."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        log_once("note: transparent pixels are composited on white")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def fit(pixels, size):
    """(H, W, 3) uint8 -> (3, *size) in [-1, 1]: scaled to cover, then center-cropped."""
    H, W = size
    h, w = pixels.shape[:2]
    scale = max(H / h, W / w)
    h, w = max(H, round(h * scale)), max(W, round(w * scale))
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
    if x.shape[-2:] != (h, w):
        x = F.interpolate(x, (h, w), mode="bicubic", antialias=True).clamp(0, 255)
    top, left = (h - H) // 2, (w - W) // 2
    return x[0, :, top : top + H, left : left + W] / 127.5 - 1


# --- Writing ------------------------------------------------------------------------------------


def to_pixels(video):
    """(3, F, H, W) in [-1, 1] -> (F, H, W, 3) uint8."""
    pixels = ((video.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(1, 2, 3, 0).numpy()


def enlarge(pixels, height):
    """(F, H, W, 3) pixels, enlarged by an integer factor to about `height` or more."""
    scale = max(1, round(height / pixels.shape[1]))
    return pixels.repeat(scale, 1).repeat(scale, 2)


def write_video(path, video, fps):
    """Write a video (3, F, H, W) as an mp4."""
    with atomic_write(path) as part:
        encode_mp4(f"file:{part}", video, fps)  # for "file:", see open_video


def encode_mp4(file, video, fps):
    """Encode a video (3, F, H, W) into a file object or path, as an H.264 mp4 for all players:
    yuv420p, with even sides, and small videos enlarged to a height of about 256."""
    pixels = enlarge(to_pixels(video), 256)
    odd = pixels.shape[1] % 2, pixels.shape[2] % 2
    pixels = np.pad(pixels, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), "edge")
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "14"}
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def every_nth(video, columns=8):
    """At most `columns` frames of a video (3, F, H, W), evenly spaced, first and last included."""
    count = min(columns, video.shape[1])
    return video[:, np.linspace(0, video.shape[1] - 1, count).round().astype(int)]


def contact_sheet(path, videos):
    """Write a PNG with one row of eight frames per video (3, F, H, W)."""
    rows = [np.concatenate(list(enlarge(to_pixels(every_nth(v)), 96)), axis=1) for v in videos]
    width = max(r.shape[1] for r in rows)
    rows = [np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0))) for r in rows]
    with atomic_write(path) as part:
        Image.fromarray(np.concatenate(rows)).save(part)
