"""data.py: every kind of clip a person may give, and what they are told when it will not do."""
import os
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
from model import BadInput


def counting_clip(path, frames=32, fps=16, size=(64, 64), codec="libx264", pix_fmt="yuv420p",
                  times=None, aspect=None, alpha=False):
    """A video whose frame i is grey of brightness 7·i, at i/fps or at the given times (seconds)."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            stream.codec_context.sample_aspect_ratio = Fraction(*aspect)
        for i in range(frames):
            grey = np.full((*size, 4 if alpha else 3), 7 * i % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgba" if alpha else "rgb24")
            frame.pts = round(1000 * (times[i] if times else i / fps))
            frame.time_base = Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def numbers(video):
    """Which frames of a counting clip were taken."""
    return ((video.mean((0, 2, 3)) + 1) * 127.5 / 7).round().int().tolist()


def test_frames_are_chosen_by_time(tmp_path):
    clip = counting_clip(tmp_path / "c.mp4")
    assert numbers(data.read_video(clip, 16, (64, 64), 8)) == list(range(0, 32, 2))
    assert numbers(data.read_video(clip, 8, (64, 64), 8, start=0.5)) == list(range(8, 24, 2))


def test_variable_frame_rate_keeps_time(tmp_path):
    """Twelve frames in the first half second, then four a second: at 8 fps the clock decides."""
    times = [i / 24 for i in range(12)] + [0.5 + i / 4 for i in range(8)]
    clip = counting_clip(tmp_path / "c.mkv", len(times), 24, times=times)
    want = [int(np.abs(np.array(times) - i / 8).argmin()) for i in range(12)]
    got = numbers(data.read_video(clip, 12, (64, 64), 8))
    assert all(abs(a - b) <= 1 for a, b in zip(got, want)) and got[:4] == [0, 3, 6, 9]


def test_a_short_clip_keeps_its_own_length_and_says_so(tmp_path, capsys):
    video = data.read_video(counting_clip(tmp_path / "c.mp4", 16), 16, (64, 64), 8)
    assert video.shape == (3, 8, 64, 64)
    assert "8 frames" in capsys.readouterr().err


@pytest.mark.parametrize("frames", (1, 2, 6))
def test_fewer_than_four_frames_are_refused(frames, tmp_path):
    clip = counting_clip(tmp_path / "c.mp4", frames)
    with pytest.raises(BadInput, match="at least 4.*Give a longer clip"):
        data.read_video(clip, 16, (64, 64), 8)


def test_a_still_clip_is_warned_about(tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "1.png")
    for i in range(2, 7):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{i}.png")
    data.read_video(tmp_path, 6, (64, 64), 8)
    assert "hardly moves" in capsys.readouterr().err


def test_pictures_come_in_natural_order(tmp_path):
    for i in range(12):
        Image.new("RGB", (32, 32), (7 * i,) * 3).save(tmp_path / f"{i}.png")
    assert numbers(data.read_video(tmp_path, 12, (32, 32), 8)) == list(range(12))


def test_pictures_of_two_sizes_are_refused(tmp_path):
    for i in range(6):
        Image.new("RGB", (32 + 8 * (i == 3), 32)).save(tmp_path / f"{i}.png")
    with pytest.raises(BadInput, match="32×32 and 40×32|40×32 and 32×32"):
        data.read_video(tmp_path, 6, (32, 32), 8)


def bars(height, width):
    """A picture whose left half is black and right half white."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, width // 2 :] = 255
    return picture


def test_pictures_are_cropped_and_never_stretched():
    wide = data.fit(bars(40, 120), (20, 20))  # the middle third
    assert wide.shape == (3, 20, 20) and wide[:, :, :9].max() < -0.9 and wide[:, :, 11:].min() > 0.9
    tall = np.zeros((90, 30, 3), np.uint8)
    tall[30:60] = 255
    assert data.fit(tall, (30, 30)).min() > 0.99  # only the white middle is left


def test_rotation_is_applied(tmp_path):
    """A phone's portrait clip is stored lying down, with a note of how to turn it."""
    flat = tmp_path / "flat.mp4"
    with av.open(str(flat), "w") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 128, "yuv420p"
        for _ in range(8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(bars(64, 128), format="rgb24")))
        out.mux(stream.encode())
    raw = bytearray(flat.read_bytes())
    unit, angle = (1 << 16).to_bytes(4, "big"), (-(1 << 16)).to_bytes(4, "big", signed=True)
    zero, last = bytes(4), (1 << 30).to_bytes(4, "big")
    plain = unit + zero * 3 + unit + zero * 3 + last
    quarter = zero + unit + zero + angle + zero * 4 + last  # the matrix of a quarter turn
    at = raw.index(plain, raw.index(b"tkhd"))
    raw[at : at + len(plain)] = quarter
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(raw)
    with av.open(str(turned)) as container:
        assert abs(next(container.decode(video=0)).rotation) == 90
    _, pictures = data.decode(turned)
    assert pictures[0].shape == (128, 64, 3)
    # A quarter turn clockwise puts the white right half below.
    assert pictures[0][:60].mean() < 20 and pictures[0][-60:].mean() > 235


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    clip = counting_clip(tmp_path / "c.mp4", 8, 8, (48, 64), aspect=(4, 3))
    _, pictures = data.decode(clip)
    assert pictures[0].shape == (48, 85, 3)


@pytest.mark.parametrize("name,more", [
    ("c.mov", {}), ("c.mkv", {}), ("c.webm", {"codec": "libvpx-vp9"}),
    ("c.avi", {"codec": "mpeg4"}),
    ("c.mp4", {"pix_fmt": "yuv420p10le"}),  # the depth of HDR
    ("c.mov", {"codec": "qtrle", "pix_fmt": "argb", "alpha": True}),
])
def test_other_containers_and_pixels(name, more, tmp_path):
    video = data.read_video(counting_clip(tmp_path / name, **more), 16, (64, 64), 8)
    assert video.shape == (3, 16, 64, 64)
    assert np.abs(np.array(numbers(video)) - range(0, 32, 2)).max() <= 1  # lossy, so within one


def test_gif(tmp_path):
    frames = [Image.new("RGB", (32, 32), (20 * i,) * 3) for i in range(8)]
    frames[0].save(tmp_path / "c.gif", save_all=True, append_images=frames[1:], duration=120)
    assert data.read_video(tmp_path / "c.gif", 8, (32, 32), 8).shape[1] == 8


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
    lambda p: p,  # a folder without pictures
], ids=["missing", "text", "empty", "no index", "cut", "sound", "picture", "empty folder"])
def test_what_is_not_a_clip_is_refused_in_one_line(make, tmp_path):
    path = make(tmp_path)
    with pytest.raises(BadInput) as error:
        data.read_video(path, 16, (64, 64), 8)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_caption_sources(tmp_path):
    clip = tmp_path / "my_red-car.mp4"
    assert data.find_caption(clip, "a bird")[0] == "a bird"
    assert data.find_caption(clip) == ("my red car", "the file's name")
    clip.with_suffix(".txt").write_text("a car is moving\n")
    assert data.find_caption(clip) == ("a car is moving", str(clip.with_suffix(".txt")))
    clip.with_suffix(".txt").write_text("\n")
    with pytest.raises(BadInput, match="is empty"):
        data.find_caption(clip)


@pytest.mark.parametrize("prompt", ["x" * 300, "鯊 " * 90, "word " * 100, "go! " * 60])
def test_prompts_that_would_be_cut_are_refused(prompt):
    with pytest.raises(BadInput, match="Shorten it"):
        data.check_prompt(prompt)


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "/etc/passwd", "🦈 sharks", "a\0b", "-rf x",
                                    "", "…", "<script>alert(1)</script>"])
def test_file_names_from_prompts_stay_in_their_folder(prompt):
    name = data.slug(prompt)
    assert name and name.replace("-", "").isalnum() and not name.startswith("-")


@pytest.mark.parametrize("height,width,fps", [(64, 64, 8), (63, 65, 12.5), (320, 576, 24)])
def test_a_written_video_opens_again(height, width, fps, tmp_path):
    video = torch.rand(3, 9, height, width) * 2 - 1
    path = tmp_path / "v.mp4"
    data.write_video(path, video, fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert len(frames) == 9 and float(stream.average_rate) == pytest.approx(fps, rel=1e-3)
        assert frames[0].height % 2 == 0 and frames[0].width >= width


def test_files_honour_the_umask_and_are_whole_or_not_at_all(tmp_path):
    path, old = tmp_path / "f.txt", os.umask(0o027)
    try:
        with data.publish(path) as part:
            part.write_text("first")
        assert path.stat().st_mode & 0o777 == 0o640
        with pytest.raises(RuntimeError), data.publish(path) as part:
            part.write_text("half")
            raise RuntimeError
    finally:
        os.umask(old)
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["f.txt"]
