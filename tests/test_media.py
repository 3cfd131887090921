"""support/media.py: every kind of video and image that users have, against its true content."""
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import unicodedata
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, encode
from PIL import Image

import data
from support import media, tokenizer
from support.files import BadInput, read_text


@pytest.fixture(autouse=True)
def forget():
    """Messages that are printed once per process are printed once per test."""
    media.log_once.cache_clear()


def counting_clip(path, frames=32, fps=16, size=(64, 64), times=None, channels=3, **more):
    """A video whose frame i is grey of brightness 7·i, at i/fps or at the given times (seconds)."""
    grey = (7 * np.arange(frames) % 256).astype(np.uint8)
    pixels = np.empty((frames, *size, channels), np.uint8)
    pixels[:] = grey[:, None, None, None]
    return encode(path, pixels, fps, times=times or [i / fps for i in range(frames)], **more)


def numbers(video):
    """Which frames of a counting clip were taken."""
    return ((video.mean((0, 2, 3)) + 1) * 127.5 / 7).round().int().tolist()


@pytest.mark.parametrize("name,text", [
    ("notes.txt", "a secret\n" * 2000), ("list.mp4", "ffconcat version 1.0\nfile c.mp4\n"),
    ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nc.mp4\n#EXT-X-ENDLIST\n")])
def test_text_files_and_playlists_are_no_videos(name, text, tmp_path):
    """FFmpeg would render the text, and read the files in the playlist."""
    counting_clip(tmp_path / "c.mp4")
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=f"{name} cannot be used"):
        media.read_video(tmp_path / name, 8, (64, 64), 8)


def test_frames_are_chosen_by_time(tmp_path):
    clip = counting_clip(tmp_path / "c.mp4")
    assert numbers(media.read_video(clip, 16, (64, 64), 8)) == list(range(0, 32, 2))
    assert numbers(media.read_video(clip, 8, (64, 64), 8, start=0.5)) == list(range(8, 24, 2))


def test_only_the_chosen_frames_are_made_into_images(tmp_path, monkeypatch):
    clip, made, upright = counting_clip(tmp_path / "c.mkv", 320, 8), [], media.upright
    monkeypatch.setattr(media, "upright", lambda *a: made.append(1) or upright(*a))
    video = media.read_video(clip, 8, (64, 64), 4, start=30)
    want = [7 * i % 256 for i in range(240, 256, 2)]
    assert np.abs((video.mean((0, 2, 3)) + 1).numpy() * 127.5 - want).max() < 8 == len(made)
    with pytest.raises(BadInput, match="has 0 frames at 8 fps from 50 s"):
        media.read_video(clip, 8, (64, 64), 8, start=50)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux for the memory")
def test_memory_holds_the_chosen_frames_and_no_more(tmp_path):
    """10 s of 960×540, 190 MB as images, read from the beginning and from the eighth second on."""
    clip = counting_clip(tmp_path / "c.mp4", 120, 12, (540, 960))
    script = ("from support import media; import re; from pathlib import Path\n"
              "peak = lambda: int(re.search("
              "r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) // 1024\n"
              f"read = lambda start: media.read_video({str(clip)!r}, 8, (64, 64), 4, start)\n"
              "before = peak(); read(0); read(8); print(peak() - before)")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 100, done.stderr


def test_variable_frame_rate_keeps_time(tmp_path):
    """Twelve frames in the first half second, then four a second: at 8 fps time decides."""
    times = [i / 24 for i in range(12)] + [0.5 + i / 4 for i in range(8)]
    clip = counting_clip(tmp_path / "c.mkv", len(times), 24, times=times)
    want = [int(np.abs(np.array(times) - i / 8).argmin()) for i in range(12)]
    got = numbers(media.read_video(clip, 12, (64, 64), 8))
    assert all(abs(a - b) <= 1 for a, b in zip(got, want)) and got[:4] == [0, 3, 6, 9]


def test_a_short_clip_keeps_its_own_length_and_says_so(tmp_path, capsys):
    video = media.read_video(counting_clip(tmp_path / "c.mp4", 16), 16, (64, 64), 8)
    assert video.shape == (3, 8, 64, 64)
    assert "8 frames" in capsys.readouterr().err


@pytest.mark.parametrize("frames", (1, 2, 6))
def test_fewer_than_four_frames_are_refused(frames, tmp_path):
    clip = counting_clip(tmp_path / "c.mp4", frames)
    with pytest.raises(BadInput, match="at least 4.*Give a longer clip"):
        media.read_video(clip, 16, (64, 64), 8)


def test_images_that_do_not_move_or_differ_in_size(tmp_path, capsys):
    for i in range(6):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{i}.png")
    media.read_video(tmp_path, 6, (64, 64), 8)
    assert "hardly moves" in capsys.readouterr().err
    data.load_clips([tmp_path], None, 6, (64, 64), 8, learn=False)  # a prior clip may stand still
    assert "hardly moves" not in capsys.readouterr().err
    Image.new("RGB", (72, 64)).save(tmp_path / "3.png")
    with pytest.raises(BadInput, match="several sizes"):
        media.read_video(tmp_path, 6, (64, 64), 8)


def bars(height, width):
    """An image whose left half is black and right half white."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, width // 2 :] = 255
    return picture


def test_pictures_are_cropped_and_never_stretched():
    wide = media.fit(bars(40, 120), (20, 20))  # the middle third
    assert wide.shape == (3, 20, 20) and wide[:, :, :9].max() < -0.9 and wide[:, :, 11:].min() > 0.9
    tall = np.zeros((90, 30, 3), np.uint8)
    tall[30:60] = 255
    assert media.fit(tall, (30, 30)).min() > 0.99  # only the white middle is left


@pytest.mark.parametrize("height,width,message", [
    (64, 112, "43% of the width"), (112, 64, "43% of the height"), (64, 76, None)])
def test_a_crop_of_more_than_a_fifth_is_told_once(height, width, message, tmp_path, capsys):
    clip = counting_clip(tmp_path / "c.mp4", size=(height, width))
    media.read_video(clip, 16, (64, 64), 8, learn=False)
    assert not capsys.readouterr().err
    media.read_video(clip, 16, (64, 64), 8)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(message)
    assert not message or message in lines[0] and "--size" in lines[0]
    media.read_video(clip, 16, (height, width // 8 * 8), 8)
    assert not capsys.readouterr().err


def first_picture(path):
    return next(make for _, make in media.decode(path))()


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    clip = counting_clip(tmp_path / "c.mp4", 8, 8, (48, 64), sample_aspect_ratio=Fraction(4, 3))
    assert first_picture(clip).shape == (36, 64, 3)


@pytest.mark.parametrize("name,more", [
    ("c.mov", {}), ("c.mkv", {}), ("c.webm", {"codec": "libvpx-vp9"}),
    ("c.avi", {"codec": "mpeg4"}),
    ("c.mp4", {"pix_fmt": "yuv420p10le"}),  # the depth of HDR
    ("c.mkv", {"codec": "ffv1", "pix_fmt": "bgr0", "size": (47, 63)}),
    ("c.mkv", {"codec": "ffv1", "pix_fmt": "gray"}),
])
def test_other_containers_and_pixels(name, more, tmp_path):
    video = media.read_video(counting_clip(tmp_path / name, **more), 16, (64, 64), 8)
    assert video.shape == (3, 16, 64, 64)
    assert np.abs(np.array(numbers(video)) - range(0, 32, 2)).max() <= 1  # lossy, so within one


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    return path


def sound_only(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize("make", [
    lambda p: p / "missing.mp4",
    lambda p: (p / "text.mp4", (p / "text.mp4").write_text("hello"))[0],
    lambda p: (p / "empty.mp4", (p / "empty.mp4").touch())[0],
    lambda p: cut(counting_clip(p / "cut.mp4", size=(256, 256)), 1500),  # the index is at the end
    lambda p: cut(counting_clip(p / "cut.mkv", size=(256, 256)), 900),
    lambda p: sound_only(p / "sound.mp4"),
    lambda p: (p / "one.png", Image.new("RGB", (8, 8)).save(p / "one.png"))[0],
    lambda p: p,  # a folder without images
], ids=["missing", "text", "empty", "no index", "cut", "sound", "picture", "empty folder"])
def test_what_is_not_a_clip_is_refused_in_one_line(make, tmp_path):
    path = make(tmp_path)
    with pytest.raises(BadInput) as error:
        media.read_video(path, 16, (64, 64), 8)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def huge_png(path):
    """An image of a few bytes that claims 20,000 × 20,000 pixels."""
    chunk = lambda kind, body: (struct.pack(">I", len(body)) + kind + body
                                + struct.pack(">I", zlib.crc32(kind + body)))
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"")
                     + chunk(b"IEND", b""))
    return path


def test_pictures_that_claim_too_much_or_are_none_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    Image.new("RGB", (8, 8)).save(tmp_path / "program.png", "EPS")  # Pillow would run Ghostscript
    big, edge = huge_png(tmp_path / "huge.png"), tmp_path / "edge.png"
    for path, reason in ((big, "exceeds limit"), (tmp_path / "text.png", "Unidentified"),
                         (tmp_path / "program.png", "Unidentified")):
        with pytest.raises(BadInput, match=reason) as error:
            data.load_images([path], "a ball", (64, 64))
        assert path.name in str(error.value) and "\n" not in str(error.value)
    Image.new("1", (9_000, 9_000)).save(edge)  # PIL would only warn of it
    with pytest.raises(BadInput, match="81000000 pixels"):
        media.read_image(edge)
    frames = [Image.new("RGB", (8, 8), (i,) * 3) for i in range(2)]
    frames[0].save(edge, save_all=True, append_images=frames[1:])
    with pytest.raises(BadInput, match="it is animated"):
        media.read_image(edge)


@pytest.mark.parametrize("height,width,fps", [(64, 64, 8), (63, 65, 12.5), (320, 576, 24)])
def test_a_written_video_opens_again(height, width, fps, tmp_path):
    video = torch.rand(3, 9, height, width) * 2 - 1
    path = tmp_path / "v.mp4"
    media.write_video(path, video, fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert len(frames) == 9 and float(stream.average_rate) == pytest.approx(fps, rel=1e-3)
        assert frames[0].height % 2 == 0 and frames[0].width >= width


def test_a_contact_sheet_has_a_row_a_video_and_eight_frames_from_first_to_last(tmp_path):
    levels = torch.linspace(-1, 1, 16)
    up = levels.view(1, 16, 1, 1).expand(3, -1, 48, 64)  # brighter from frame to frame
    short = -up[:, [15, 0]]
    media.contact_sheet(tmp_path / "sheet.png", [up, short])
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 96, 8 * 128, 3)  # each frame twice as large
    tiles = sheet.reshape(2, 96, 8, 128, 3)
    assert (tiles == tiles[:, :1, :, :1]).all()  # each of one grey
    grey = lambda frames: ((levels[frames] + 1) * 127.5).round().tolist()
    assert tiles[0, 0, :, 0, 0].tolist() == grey([0, 2, 4, 6, 9, 11, 13, 15])
    assert tiles[1, 0, :, 0, 0].tolist() == [0, 255, *[0] * 6]  # the rest stays black


COLORS = [(255, 105, 180), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (20, 200, 90)]
LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}


def encode_yuv(rgb, matrix, full):
    """Y, Cb, Cr of a color, by the definition in H.273."""
    red, blue = LUMA.get(matrix, LUMA[5])
    r, g, b = (value / 255 for value in rgb)
    y = red * r + (1 - red - blue) * g + blue * b
    scale = (255, 255) if full else (219, 224)
    cb, cr = (b - y) / 2 / (1 - blue), (r - y) / 2 / (1 - red)
    yuv = np.array([scale[0] * y + 16 * (not full), 128 + scale[1] * cb, 128 + scale[1] * cr])
    return yuv.round().clip(0, 255)


def tagged_clip(path, matrix, full, pix_fmt="yuv444p", transfer=2):
    """A lossless video of columns of COLORS, marked with a color matrix and a range."""
    columns = np.stack([encode_yuv(color, matrix, full) for color in COLORS], axis=1)
    planes = columns.repeat(32, 1)[:, None].repeat(64, 1).astype(np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=8, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *planes.shape[1:], pix_fmt
        context = stream.codec_context
        context.colorspace, context.color_range, context.color_trc = matrix, 1 + full, transfer
        for i in range(6):
            frame = av.VideoFrame(planes.shape[2], planes.shape[1], pix_fmt)
            for plane, values in zip(frame.planes, planes):
                step = planes.shape[2] // plane.width
                rows = np.zeros((plane.height, plane.line_size), np.uint8)
                rows[:, : plane.width] = values[::step, ::step]
                plane.update(rows)
            frame.pts, frame.colorspace, frame.color_range = i, matrix, 1 + full
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [*LUMA, 2])  # 2: not specified, which ffmpeg reads as BT.601
def test_colors_follow_the_matrix_and_the_range_of_the_file(matrix, full, pix_fmt, tmp_path):
    image = first_picture(tagged_clip(tmp_path / "c.mp4", matrix, full, pix_fmt))
    centers = image[32, 16::32].astype(int)
    assert np.abs(centers - COLORS).max() <= (1 if pix_fmt == "yuv444p" else 2)


@pytest.mark.parametrize("transfer,hdr", [(16, 1), (18, 1), (1, 0)])
def test_hdr_is_reported_once_with_a_command_that_converts_it(transfer, hdr, tmp_path, capsys):
    path = tagged_clip(tmp_path / "a clip.mp4", 9, False, transfer=transfer)
    for _ in range(2):
        media.read_video(path, 4, (64, 64), 8, learn=False)
    printed = capsys.readouterr().err
    assert printed.count("is HDR") == hdr == printed.count(f"ffmpeg -i '{path}' -vf zscale")


ORIENTATIONS = {  # the matrix (a, b, c, d), and the same change of an array
    "as it is": ((1, 0, 0, 1), lambda x: x), "hflip": ((-1, 0, 0, 1), np.fliplr),
    "vflip": ((1, 0, 0, -1), np.flipud), "180": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "90": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "270": ((0, -1, 1, 0), lambda x: np.rot90(x)),
    "90, hflip": ((0, 1, 1, 0), lambda x: np.fliplr(np.rot90(x, -1))),
    "270, hflip": ((0, -1, -1, 0), lambda x: np.fliplr(np.rot90(x)))}


def oriented_clip(path, matrix):
    """A clip of four quadrants whose header holds a display matrix; and the stored image."""
    image = np.zeros((64, 128, 3), np.uint8)
    image[:32, :64], image[:32, 64:], image[32:, :64] = 250, 170, 90
    encode(path, np.stack([image] * 8))
    raw, unit = bytearray(path.read_bytes()), 1 << 16
    pack = lambda a, b, c, d: struct.pack(
        ">9i", a * unit, b * unit, 0, c * unit, d * unit, 0, 0, 0, 1 << 30)
    at = raw.index(pack(1, 0, 0, 1), raw.index(b"tkhd"))
    raw[at : at + 36] = pack(*matrix)
    path.write_bytes(raw)
    return image


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_the_display_matrix_rotates_and_mirrors(name, tmp_path):
    matrix, change = ORIENTATIONS[name]
    image = oriented_clip(tmp_path / "c.mp4", matrix)
    got, want = first_picture(tmp_path / "c.mp4").astype(int), change(image)
    assert got.shape == want.shape and np.abs(got - want).mean() < 5


def two_streams(path, *streams):
    """A video file of several streams: (codec, disposition, gray value, number of frames)."""
    with av.open(str(path), "w") as out:
        made = [out.add_stream(codec, rate=8) for codec, *_ in streams]
        for stream, (codec, disposition, _, _) in zip(made, streams):
            stream.height = stream.width = 64
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = disposition
        for stream, (_, _, value, frames) in zip(made, streams):
            for i in range(frames):
                image = np.full((64, 64, 3), value + i, np.uint8)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            out.mux(stream.encode())
    return path


@pytest.mark.parametrize("first", [
    ("libx264", 0, 100, 8),  # another track, which is not the default
    ("mjpeg", 1024, 100, 1), ("mjpeg", 0, 100, 1)])  # a cover, marked as such or not
@pytest.mark.parametrize("name", ["c.mkv", "c.mp4"])
def test_the_stream_that_ffmpeg_shows_is_read(first, name, tmp_path):
    path = two_streams(tmp_path / name, first, ("libx264", 1, 200, 8))
    assert media.read_video(path, 8, (64, 64), 8)[:, 0].mean() > 0.4


@pytest.mark.parametrize("name", ["clip-12:30.mp4", "crypto:base.mp4", "http:x.mp4", "50%d.mp4",
                                  "-x.mp4", "UPPER.MP4", "a clip, é 中 'x'.mp4"])
def test_a_name_is_never_a_protocol_nor_a_flag(name, tmp_path, monkeypatch):
    counting_clip(tmp_path / "c.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert numbers(media.read_video(name, 16, (64, 64), 8)) == list(range(0, 32, 2))
    media.write_video(Path(name).with_suffix("") / "x.mp4", torch.zeros(3, 8, 64, 64), 8)


@pytest.mark.parametrize("suffix", [".ts", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".ogv", ".mts",
                                    ".m2ts", ".m4v"])
def test_a_folder_of_clips_has_all_kinds_of_video(suffix, tmp_path):
    codec = {".mpg": "mpeg1video", ".mpeg": "mpeg1video", ".wmv": "wmv2", ".flv": "flv",
             ".ogv": "libvpx"}.get(suffix, "libx264")
    grey = np.stack([np.full((64, 64, 3), 7 * i, np.uint8) for i in range(32)])
    encode(tmp_path / f"c{suffix}", grey, 24, codec, bit_rate=10**6)
    path, = data.find_clips([tmp_path])
    assert media.frame_rate(path, 8) == pytest.approx(8, rel=1e-3)
    taken = numbers(media.read_video(path, 9, (64, 64), 8))
    assert np.abs(np.diff(taken) - 3).max() <= 1  # lossy, so within one
    assert len(taken) == 9


def test_folders_hold_files_of_the_system_and_others(tmp_path, capsys):
    clip = counting_clip(tmp_path / "a.mp4")
    for name in ("._a.mp4", ".DS_Store", "Thumbs.db", "desktop.ini", "a.txt"):
        (tmp_path / name).write_bytes(b"\0")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    shutil.copy(clip, tmp_path / ".ipynb_checkpoints" / "a-checkpoint.mp4")
    (tmp_path / "__MACOSX").mkdir()
    assert data.find_clips([tmp_path]) == [clip] and not capsys.readouterr().err
    (tmp_path / "notes.docx").touch()
    assert data.find_clips([tmp_path, tmp_path]) == [clip, clip]
    assert capsys.readouterr().err.count("not clips: notes.docx") == 1
    frames = tmp_path / "frames"
    (frames / ".ipynb_checkpoints").mkdir(parents=True)
    for i in range(12):
        Image.new("RGB", (32, 32), (7 * i,) * 3).save(frames / f"{i}.png")
        (frames / f"._{i}.png").write_bytes(b"\0")
    (tmp_path / "out" / "a-vmc" / "samples").mkdir(parents=True)  # is not a clip
    assert data.find_clips([frames]) == [frames] and data.find_clips([tmp_path]) == [clip, frames]
    assert numbers(media.read_video(frames, 12, (32, 32), 8)) == list(range(12))


@pytest.mark.parametrize("rate,asked,step", [
    (30, 24, 1), (50, 24, 2), (30, 8, 4), (25, 8, 3), (Fraction(30000, 1001), 8, 4), (8, 24, 1)])
@pytest.mark.parametrize("name", ["c.mp4", "c.mkv"])
def test_frames_of_a_constant_rate_are_equally_far_apart(name, rate, asked, step, tmp_path, capsys):
    """As in the published code: every max(1, round(rate / fps))-th frame."""
    clip = counting_clip(tmp_path / name, 36, rate)
    for start in (0, 0.05):
        taken = numbers(media.read_video(clip, 8, (64, 64), asked, start))
        assert np.diff(taken).tolist() == [step] * 7
    assert media.frame_rate(clip, asked) == pytest.approx(float(rate) / step, rel=2e-3)
    assert "apart" not in capsys.readouterr().err


def test_a_pause_does_not_change_the_rate(tmp_path):
    times = [i / 25 + 3 * (i > 5) for i in range(12)]
    clip = counting_clip(tmp_path / "c.mkv", 12, 25, times=times)
    assert media.frame_rate(clip, 24) == 25


def test_uneven_frames_are_reported(tmp_path, capsys):
    times = [i / 30 for i in range(64) if i % 8 not in (4, 5)]
    media.read_video(counting_clip(tmp_path / "c.mkv", 48, 30, times=times), 9, (64, 64), 8)
    assert "variable frame rate: the chosen frames are 0.1" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", [5, 40, 200])  # bytes after the start of the fourth packet
def test_a_damaged_video_is_refused_or_reported_once(damaged, tmp_path, capsys):
    clip = tmp_path / "c.mp4"
    image = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    media.write_video(clip, torch.cat([image.roll(i, 3) for i in range(24)], 1), 8)
    raw = bytearray(clip.read_bytes())
    with av.open(str(clip)) as container:
        packet = [p for p in container.demux(video=0) if p.size][3]
    for i in range(16):  # one byte is not always noticed
        raw[packet.pos + damaged + i] ^= 0x55
    clip.write_bytes(raw)
    with pytest.raises(BadInput, match=r"c.mp4 is damaged at 0\.\d+ s; .*--allow-damaged") as error:
        media.read_video(clip, 16, (64, 64), 8)
    assert "\n" not in str(error.value)
    video = media.read_video(clip, 16, (64, 64), 8, allow_damaged=True)
    assert video.shape[1] >= 15 and capsys.readouterr().err.count("is damaged") == 1


def test_images_of_every_depth_and_with_transparency(tmp_path, capsys):
    path, ramp = tmp_path / "x.png", np.arange(256)
    Image.fromarray((ramp * 257).astype(np.uint16)[None].repeat(4, 0)).save(path)
    assert (media.read_image(path) == ramp[None, :, None]).all()  # 16-bit gray
    palette = Image.fromarray(ramp.astype(np.uint8)[None].repeat(4, 0), "L").convert("P")
    palette.putpalette([v for i in range(256) for v in (i, 255 - i, 7)])
    palette.save(path)
    assert (media.read_image(path)[0] == np.stack([ramp, 255 - ramp, 0 * ramp + 7], 1)).all()
    assert not capsys.readouterr().err
    rgba = np.zeros((4, 256, 4), np.uint8)
    rgba[..., 1], rgba[..., 3] = 255, ramp
    Image.fromarray(rgba).save(path)
    assert (media.read_image(path)[..., 1] == 255).all()
    assert (media.read_image(path)[0, :, 0] == 255 - ramp).all()
    palette.save(path, transparency=5)
    assert media.read_image(path)[0, 5].tolist() == [255] * 3
    assert capsys.readouterr().err.count("composited on white") == 1
    turned = Image.fromarray(bars(20, 40))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn clockwise
    turned.save(path, exif=exif)
    image = media.read_image(path)
    assert image.shape == (40, 20, 3) and image[:20].max() == 0 and image[20:].min() == 255


def test_transparent_video_is_composited_on_white(tmp_path):
    clip = counting_clip(tmp_path / "c.mov", codec="qtrle", pix_fmt="argb", channels=4)
    with av.open(str(clip)) as container:
        assert next(container.decode(video=0)).format.name == "argb"
    want = [255 - v + round(v * v / 255) for v in range(0, 224, 14)]  # gray v with alpha v
    shown = (media.read_video(clip, 16, (64, 64), 8).mean((0, 2, 3)) + 1) * 127.5
    assert np.abs(shown.numpy() - want).max() <= 1


def test_transparency_that_the_decoder_drops_is_reported(tmp_path, capsys):
    clip = counting_clip(tmp_path / "c.webm", codec="libvpx-vp9", pix_fmt="yuva420p", channels=4)
    media.read_video(clip, 16, (64, 64), 8)
    assert "transparent pixels, which are read as opaque" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["c.webp", "c.png", "c.gif"])
def test_animated_images_are_videos(name, tmp_path, capsys):
    frames = [Image.new("RGB", (32, 32), (7 * i,) * 3) for i in range(12)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=50,
                   lossless=True)
    assert media.frame_rate(tmp_path / name, 8) == 10  # every second frame of 20 per second
    assert numbers(media.read_video(tmp_path / name, 6, (32, 32), 8)) == [0, 2, 4, 6, 8, 10]
    if name != "c.gif":  # without durations, as browsers show it
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=0,
                       lossless=True)
        assert numbers(media.read_video(tmp_path / name, 6, (32, 32), 10)) == [0, 1, 2, 3, 4, 5]
    frames[0].save(tmp_path / name)
    with pytest.raises(BadInput, match="has 1 frames"):
        media.read_video(tmp_path / name, 6, (32, 32), 8)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_in_unicode_are_read(encoding, tmp_path):
    (tmp_path / "c.txt").write_bytes("ein café 鯊魚\r\n".encode(encoding))
    assert data.find_caption(tmp_path / "c.mp4")[0] == "ein café 鯊魚"


@pytest.mark.parametrize("raw", ["café".encode("latin-1"), "a".encode("utf-16-le"),
                                 "a".encode("utf-32"), b"\xff\xfea", b"a" * 2**21])
def test_other_text_is_refused(raw, tmp_path):
    (tmp_path / "c.txt").write_bytes(raw)
    with pytest.raises(BadInput, match="c.txt cannot be used .*save it as UTF-8"):
        read_text(tmp_path / "c.txt")


ODD = ["’s “x”", "&amp;", "ﬁ", "ＡＢ１", "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>?", "<|",
       "|>", "!", "!!", "'s", "'LL", " ", "\t\n", "\0", "\x1f", "\x85", "\u3000", "🦈", "é",
       "e\u0301", "\u200d", "ΑΣ", "İ", "ß", "Shark", "123", "½", "鯊魚", "ไทย", "<start_of_text>",
       "</w>"]
PROMPTS = ["a person is riding a bicycle", "Two SHARKS, swimming in the sea.", "word " * 100,
           "wow! it's a 4K video!!", "a person doing the sks dance", "naïve café 鯊魚", ""]


def test_tokens_equal_those_of_transformers_for_all_strings(transformers, tmp_path):
    """3,000 random strings of odd pieces and of characters that all versions of Unicode have."""
    clip = tokenizer.load_vocabulary()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in clip.encoder.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    merges = sorted(clip.bpe_ranks, key=clip.bpe_ranks.get)
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
    hub = transformers.CLIPTokenizer(*map(str, sorted(tmp_path.iterdir(), reverse=True)),
                                     pad_token="!")
    known = [c for c in map(chr, range(0x20000)) if unicodedata.ucd_3_2_0.category(c) not in
             ("Cn", "Cs")]
    draw, texts = random.Random(0), list(PROMPTS)
    for _ in range(3000):
        pieces = [draw.choice(ODD if draw.random() < 0.7 else known) for _ in range(12)]
        texts.append("".join(pieces[: draw.randint(0, 12)]))
    for text in texts:
        want = hub(text, padding="max_length", truncation=True, max_length=77).input_ids
        assert tokenizer.tokenize([text])[0].tolist() == want, ascii(text)
    with pytest.raises(UnicodeEncodeError):
        tokenizer.tokenize(["\ud800"])
