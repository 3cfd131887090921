"""data.py: every kind of clip a person may give, and what they are told when it will not do."""
import os
import struct
import subprocess
import sys
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
from support import media
from support.files import BadInput, publish, slug


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
    assert numbers(media.read_video(clip, 16, (64, 64), 8)) == list(range(0, 32, 2))
    assert numbers(media.read_video(clip, 8, (64, 64), 8, start=0.5)) == list(range(8, 24, 2))


@pytest.mark.parametrize("name,codec", [("c.mp4", "libx264"), ("c.mkv", "libx264"),
                                        ("c.avi", "mpeg4"), ("c.webm", "libvpx-vp9")])
def test_a_late_start_seeks_to_the_same_frames(name, codec, tmp_path, monkeypatch):
    """Forty seconds of a second's loop: the seconds from 30 on, whether sought or read up to."""
    times = [i / 8 for i in range(320)]
    clip = counting_clip(tmp_path / name, 320, 8, codec=codec)
    read = []
    upright = media.upright
    monkeypatch.setattr(media, "upright", lambda *a: read.append(1) or upright(*a))
    sought = media.read_video(clip, 8, (64, 64), 4, start=30)
    assert len(read) == 8
    assert torch.equal(sought, media.read_video(clip, 8, (64, 64), 4, start=30))
    want = [7 * times.index(30 + i / 4) % 256 for i in range(8)]
    assert np.abs((sought.mean((0, 2, 3)) + 1).numpy() * 127.5 - want).max() < 8
    with pytest.raises(BadInput, match="has 0 frames at 8 fps from 50 s"):
        media.read_video(clip, 8, (64, 64), 8, start=50)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux for the memory")
def test_memory_holds_the_chosen_frames_and_no_more(tmp_path):
    """10 s of 960×540, 190 MB as pictures, from the beginning and from the eighth second on."""
    clip = counting_clip(tmp_path / "c.mp4", 120, 12, (540, 960))
    script = ("from support import media; import re; from pathlib import Path\n"
              "peak = lambda: int(re.search("
              "r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) // 1024\n"
              f"read = lambda start: media.read_video({str(clip)!r}, 8, (64, 64), 4, start)\n"
              "before = peak(); read(0); read(8); print(peak() - before)")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 100, done.stderr


def test_variable_frame_rate_keeps_time(tmp_path):
    """Twelve frames in the first half second, then four a second: at 8 fps the clock decides."""
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


def test_a_still_clip_is_warned_about(tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "1.png")
    for i in range(2, 7):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{i}.png")
    media.read_video(tmp_path, 6, (64, 64), 8)
    assert "hardly moves" in capsys.readouterr().err
    data.load_prior(tmp_path, 6, (64, 64), 8)  # a prior clip may stand still
    assert "hardly moves" not in capsys.readouterr().err


def test_pictures_come_in_natural_order(tmp_path):
    for i in range(12):
        Image.new("RGB", (32, 32), (7 * i,) * 3).save(tmp_path / f"{i}.png")
    assert numbers(media.read_video(tmp_path, 12, (32, 32), 8)) == list(range(12))


def test_pictures_of_two_sizes_are_refused(tmp_path):
    for i in range(6):
        Image.new("RGB", (32 + 8 * (i == 3), 32)).save(tmp_path / f"{i}.png")
    with pytest.raises(BadInput, match="32×32 and 40×32|40×32 and 32×32"):
        media.read_video(tmp_path, 6, (32, 32), 8)


def bars(height, width):
    """A picture whose left half is black and right half white."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, width // 2 :] = 255
    return picture


def test_pictures_are_cropped_and_never_stretched():
    wide = media.fit(bars(40, 120), (20, 20))  # the middle third
    assert wide.shape == (3, 20, 20) and wide[:, :, :9].max() < -0.9 and wide[:, :, 11:].min() > 0.9
    tall = np.zeros((90, 30, 3), np.uint8)
    tall[30:60] = 255
    assert media.fit(tall, (30, 30)).min() > 0.99  # only the white middle is left


@pytest.mark.parametrize("height,width,says", [
    (64, 112, "43% of the width"), (112, 64, "43% of the height"), (64, 76, None)])
def test_a_crop_of_more_than_a_fifth_is_told_once(height, width, says, tmp_path, capsys):
    clip = counting_clip(tmp_path / "c.mp4", size=(height, width))
    media.read_video(clip, 16, (64, 64), 8, learn=False)
    assert not capsys.readouterr().err
    media.read_video(clip, 16, (64, 64), 8)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == bool(says) and (not says or says in said[0] and "--size" in said[0])
    media.read_video(clip, 16, (height, width // 8 * 8), 8)
    assert not capsys.readouterr().err


def first_picture(path):
    return next(make for _, make in media.decode(path))()


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
    picture = first_picture(turned)
    assert picture.shape == (128, 64, 3)
    # A quarter turn clockwise puts the white right half below.
    assert picture[:60].mean() < 20 and picture[-60:].mean() > 235


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    clip = counting_clip(tmp_path / "c.mp4", 8, 8, (48, 64), aspect=(4, 3))
    assert first_picture(clip).shape == (48, 85, 3)


@pytest.mark.parametrize("name,more", [
    ("c.mov", {}), ("c.mkv", {}), ("c.webm", {"codec": "libvpx-vp9"}),
    ("c.avi", {"codec": "mpeg4"}),
    ("c.mp4", {"pix_fmt": "yuv420p10le"}),  # the depth of HDR
    ("c.mov", {"codec": "qtrle", "pix_fmt": "argb", "alpha": True}),
])
def test_other_containers_and_pixels(name, more, tmp_path):
    video = media.read_video(counting_clip(tmp_path / name, **more), 16, (64, 64), 8)
    assert video.shape == (3, 16, 64, 64)
    assert np.abs(np.array(numbers(video)) - range(0, 32, 2)).max() <= 1  # lossy, so within one


def test_gif(tmp_path):
    frames = [Image.new("RGB", (32, 32), (20 * i,) * 3) for i in range(8)]
    frames[0].save(tmp_path / "c.gif", save_all=True, append_images=frames[1:], duration=120)
    video = media.read_video(tmp_path / "c.gif", 8, (32, 32), 8)
    shown = (video.mean((0, 2, 3)) + 1) * 127.5
    assert (shown / 20).round().tolist() == list(range(8))


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
        media.read_video(path, 16, (64, 64), 8)
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


def huge_png(path):
    """A picture of a few bytes that claims 20,000 × 20,000 pixels."""
    chunk = lambda kind, body: (struct.pack(">I", len(body)) + kind + body
                                + struct.pack(">I", zlib.crc32(kind + body)))
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"")
                     + chunk(b"IEND", b""))
    return path


def test_pictures_that_claim_too_much_or_are_none_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    big, edge = huge_png(tmp_path / "huge.png"), tmp_path / "edge.png"
    for path, says in ((big, "claims"), (tmp_path / "text.png", "not a picture")):
        with pytest.raises(BadInput, match=says) as error:
            data.load_images([path], "a ball", (64, 64))
        assert path.name in str(error.value) and "\n" not in str(error.value)
    Image.new("1", (9_000, 9_000)).save(edge)  # PIL would only warn of it
    with pytest.raises(BadInput, match="9000×9000"):
        media.read_picture(edge)


@pytest.mark.parametrize("prompt", ["鯊 " * 90, "word " * 100, "go! " * 60])
def test_prompts_that_would_be_cut_are_refused(prompt):
    with pytest.raises(BadInput, match="Shorten it"):
        data.check_prompt(prompt)


def test_tokens_and_not_characters_decide():
    assert data.check_prompt(long := "extraordinarily " * 20) == long and len(long) > 256
    data.check_prompt("word " * 75)
    with pytest.raises(BadInput, match="78 tokens"):
        data.check_prompt("word " * 76)


@pytest.mark.parametrize("written", ["sks", "SKS", "Sks"])
def test_a_learned_word_counts_as_many_tokens_as_it_has_vectors(written, tiny):
    assert data.has_word(f"a {written} dance", "sks") and not data.has_word("desks", "sks")
    data.check_prompt("word " * 70 + written, {"sks": 5})
    with pytest.raises(BadInput, match="78 tokens"):
        data.check_prompt("word " * 71 + written, {"sks": 5})
    tiny.text.learned["sks"] = torch.ones(2, 64)  # and in whatever case, it is read
    try:
        assert torch.equal(tiny.read([f"a {written} dance"]), tiny.read(["a sks dance"]))
        learned = tiny.read([f"a {written} dance"])
    finally:
        tiny.text.learned.clear()
    assert not torch.equal(learned, tiny.read([f"a {written} dance"]))


def test_clips_with_their_captions(tmp_path, capsys):
    first, second = (counting_clip(tmp_path / f"{n}.mp4", 16, 8) for n in ("9_00", "a ball"))
    (tmp_path / "a ball.txt").write_text("a red ball, SKS")
    load = lambda *a, **k: data.load_clips(*a, 8, (64, 64), 8, **k)
    clips, sources = load([tmp_path], None, word="sks")
    assert [c.prompt for c in clips] == ["9 00 sks", "a red ball, SKS"]
    assert sources == ["the file's name, and word.text", str(tmp_path / "a ball.txt")]
    said = capsys.readouterr().err
    assert "9_00.mp4 is its name, '9 00', which says nothing" in said and "twice" not in said
    back, _ = load([first, first], ["one", "two"], reverse=True)
    assert "given twice" in capsys.readouterr().err and back[1].prompt == "two"
    assert torch.equal(back[0].video, clips[0].video.flip(1))
    with pytest.raises(BadInput, match="3 captions for 2 clips"):
        load([first, second], ["one", "two", "three"])
    with pytest.raises(BadInput, match="9_00.mp4.*Shorten it"):
        load([first], ["word " * 74], word="sks", learned={"sks": 2})
    prior = data.load_prior(tmp_path, 8, (64, 64), 8)
    assert [c.prompt for c in prior] == ["9 00", "a red ball, SKS"]
    Image.new("RGB", (64, 64)).save(tmp_path / "cup.png")
    image, = data.load_images([tmp_path], None, (64, 64), word="X*")
    assert image.prompt == "X* cup" and image.video.shape == (3, 1, 64, 64)


def test_views_are_functions_of_a_video_and_a_generator():
    video = torch.rand(3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    draw = lambda view, seed: view(video, torch.Generator().manual_seed(seed))
    assert list(data.VIEWS) == ["none", "augmented", "recoloured"] and data.VIEWS["none"] is None
    for view, frames in ((data.augmented, 5), (data.recoloured, 5), (data.crop, 1)):
        seen = draw(view, 1)
        assert seen.shape == (3, frames, 32, 32) and seen.abs().max() <= 1
        assert torch.equal(seen, draw(view, 1)) and not torch.equal(seen, draw(view, 2))
    still = video[:, :1].expand(3, 5, 32, 32)
    slope = torch.linspace(-0.5, 0.5, 32).expand(3, 5, 32, 32)
    for seed in range(20):
        for view in (data.augmented, data.recoloured):  # all frames alike
            seen = draw(lambda _, g, view=view: view(still, g), seed)
            assert torch.allclose(seen, seen[:, :1].expand_as(seen))
        seen = draw(lambda _, g: data.augmented(slope, g), seed)
        assert (seen.diff(dim=3) >= 0).all() and seen[..., -1].mean() > seen[..., 0].mean()
        assert draw(lambda _, g: data.crop(slope, g), seed).diff(dim=3).amax() < 0.7 / 31


def test_recolouring_shuffles_and_turns_colours_and_tints_stay_in_a_fifth():
    """A clip of three even colours: which of them is brightest changes, and so does their order
    from dark to light, though what moves stays where it is."""
    video = torch.tensor([-0.3, 0.0, 0.2]).view(3, 1, 1, 1).expand(3, 2, 4, 4)
    drawn = [data.recoloured(video, torch.Generator().manual_seed(i))[:, 0, 0, 0]
             for i in range(40)]
    assert len({tuple(c.argsort().tolist()) for c in drawn}) == 6
    gaps = {bool(c.sort().values.diff()[0] > c.sort().values.diff()[1]) for c in drawn}
    assert gaps == {True, False}  # −0.3, 0, 0.2 and its negative
    tinted = [data.tint(video, torch.Generator().manual_seed(i)) for i in range(200)]
    light = torch.stack([t.mean() - video.mean() for t in tinted]) / (1 + video.mean())
    assert light.abs().max() < 0.25 and light.max() > 0.15 and light.min() < -0.15


def test_a_folder_of_pictures_has_its_caption_inside(tmp_path):
    (tmp_path / "caption.txt").write_text("a star hopping\n")
    assert data.find_caption(tmp_path) == ("a star hopping", str(tmp_path / "caption.txt"))


@pytest.mark.parametrize("name,warns", [("9_00", True), ("a1b2-x", True), ("vid_3", False),
                                        ("ein Ball rollt", False), ("мяч", False)])
def test_a_name_without_a_word_is_no_caption(name, warns, tmp_path, capsys):
    data.find_caption(tmp_path / f"{name}.mp4")
    assert ("which says nothing" in capsys.readouterr().err) == warns


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "/etc/passwd", "🦈 sharks", "a\0b", "-rf x",
                                    "", "…", "<script>alert(1)</script>"])
def test_file_names_from_prompts_stay_in_their_folder(prompt):
    name = slug(prompt)
    assert name and name.replace("-", "").isalnum() and not name.startswith("-")


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


def test_files_honour_the_umask_and_are_whole_or_not_at_all(tmp_path):
    path, old = tmp_path / "f.txt", os.umask(0o027)
    try:
        with publish(path) as part:
            part.write_text("first")
        assert path.stat().st_mode & 0o777 == 0o640
        with pytest.raises(RuntimeError), publish(path) as part:
            part.write_text("half")
            raise RuntimeError
    finally:
        os.umask(old)
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["f.txt"]


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
