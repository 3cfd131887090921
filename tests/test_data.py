"""data.py: captions, prompts, clips and augmentations."""
import os
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_media import counting_clip

import data
from support.files import (
    BadInput,
    atomic_write,
    log,
    output_folder,
    read_json,
    read_tensors,
    slug,
    write_json,
)
from support.tokenizer import words_to_ids


def test_caption_sources(tmp_path):
    clip = tmp_path / "my_red-car.mp4"
    assert data.find_caption(clip, "a bird")[0] == "a bird"
    assert data.find_caption(clip) == ("my red car", "the file's name")
    clip.with_suffix(".txt").write_text("a car is moving\n")
    assert data.find_caption(clip) == ("a car is moving", str(clip.with_suffix(".txt")))
    clip.with_suffix(".txt").write_text("\n")
    with pytest.raises(BadInput, match="is empty"):
        data.find_caption(clip)


@pytest.mark.parametrize("prompt,tokens", [("x" * 100_000, "100000 characters"), ("鯊 " * 90, ""),
                                           ("go! " * 60, ""), ("word " * 76, "78 tokens")])
def test_prompts_with_too_many_tokens_are_refused(prompt, tokens):
    with pytest.raises(BadInput, match=f"{tokens}.*Shorten it"):
        data.check_prompt(prompt)
    data.check_prompt("word " * 75)
    assert data.check_prompt(long := "extraordinarily " * 20) == long and len(long) > 256


@pytest.mark.parametrize("written", ["sks", "SKS", "Sks"])
def test_a_trained_token_counts_one_per_vector_in_any_case(written, tiny):
    assert words_to_ids("a star !", {"!": [50000]})[-1] == 50000  # CLIP has an id for it
    assert data.has_word(f"a {written} dance", "sks") and not data.has_word("desks", "sks")
    data.check_prompt("word " * 70 + written, {"sks": 5})
    with pytest.raises(BadInput, match="78 tokens"):
        data.check_prompt("word " * 71 + written, {"sks": 5})
    encode = lambda word: tiny.encode_text([f"a {word} dance"])
    tiny.text_encoder.learned["sks"] = torch.ones(2, 64)
    try:
        trained = encode(written)
        assert torch.equal(trained, encode("sks"))
    finally:
        tiny.text_encoder.learned.clear()
    assert not torch.equal(trained, encode(written))


def test_clips_with_their_captions(tmp_path, capsys):
    first, second = (counting_clip(tmp_path / f"{n}.mp4", 16, 8) for n in ("9_00", "a ball"))
    (tmp_path / "a ball.txt").write_text("a red ball, SKS")
    load = lambda *a, **k: data.load_clips(*a, 8, (64, 64), 8, **k)
    clips, sources = load([tmp_path], None, token="sks")
    assert [c.prompt for c in clips] == ["9 00 sks", "a red ball, SKS"]
    assert sources == ["the file's name, and word.token", str(tmp_path / "a ball.txt")]
    printed = capsys.readouterr().err
    assert "9_00.mp4 is its name, '9 00', which describes nothing" in printed
    assert "'sks' was appended" in printed and "twice" not in printed
    back, _ = load([first, first], ["one", "two"], reverse=True)
    assert "given twice" in capsys.readouterr().err and back[1].prompt == "two"
    assert torch.equal(back[0].video, clips[0].video.flip(1))
    with pytest.raises(BadInput, match="3 captions for 2 clips"):
        load([first, second], ["one", "two", "three"])
    with pytest.raises(BadInput, match="9_00.mp4.*Shorten it"):
        load([first], ["word " * 74], token="sks", learned={"sks": 2})
    Image.new("RGB", (64, 64)).save(tmp_path / "cup.png")
    image, = data.load_images([tmp_path], None, (64, 64), token="X*")
    assert image.prompt == "X* cup" and image.video.shape == (3, 1, 64, 64)


def test_augmentations_are_functions_of_a_video_and_a_generator():
    video = torch.rand(3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    draw = lambda augment, seed: augment(video, torch.Generator().manual_seed(seed))
    assert list(data.AUGMENTATIONS) == ["none", "augmented", "recolored"]
    assert data.AUGMENTATIONS["none"] is None
    for augment, frames in ((data.augmented, 5), (data.recolored, 5), (data.random_patch, 1)):
        first = draw(augment, 1)
        assert first.shape == (3, frames, 32, 32) and first.abs().max() <= 1
        assert torch.equal(first, draw(augment, 1)) and not torch.equal(first, draw(augment, 2))


@pytest.mark.parametrize("seed", range(20))
def test_augmentations_are_the_same_for_all_frames_and_never_flip(seed):
    draw = lambda augment, video: augment(video, torch.Generator().manual_seed(seed))
    still = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for augment in (data.augmented, data.recolored):
        out = draw(augment, still.expand(3, 5, 32, 32))
        assert torch.allclose(out, out[:, :1].expand_as(out))
    slope = torch.linspace(-0.5, 0.5, 32).expand(3, 5, 32, 32)
    out = draw(data.augmented, slope)
    assert (out.diff(dim=3) >= 0).all() and out[..., -1].mean() > out[..., 0].mean()
    assert draw(data.random_patch, slope).diff(dim=3).amax() < 0.7 / 31


def test_recolored_shuffles_and_inverts_the_channels():
    """On three uniform channels: all six orders occur, and both signs of the differences."""
    video = torch.tensor([-0.3, 0.0, 0.2]).view(3, 1, 1, 1).expand(3, 2, 4, 4)
    drawn = [data.recolored(video, torch.Generator().manual_seed(i))[:, 0, 0, 0]
             for i in range(40)]
    assert len({tuple(c.argsort().tolist()) for c in drawn}) == 6
    gaps = {bool(c.sort().values.diff()[0] > c.sort().values.diff()[1]) for c in drawn}
    assert gaps == {True, False}  # −0.3, 0, 0.2 and its negative


def test_color_jitter_changes_brightness_by_at_most_a_fifth():
    video = torch.tensor([-0.3, 0.0, 0.2]).view(3, 1, 1, 1).expand(3, 2, 4, 4)
    drawn = [data.color_jitter(video, torch.Generator().manual_seed(i)) for i in range(200)]
    change = torch.stack([d.mean() - video.mean() for d in drawn]) / (1 + video.mean())
    assert change.abs().max() < 0.25 and change.max() > 0.15 and change.min() < -0.15


def test_a_folder_of_images_contains_its_caption(tmp_path):
    (tmp_path / "caption.txt").write_text("a star hopping\n")
    assert data.find_caption(tmp_path) == ("a star hopping", str(tmp_path / "caption.txt"))
    (tmp_path / "shot.v2").mkdir()
    (tmp_path / "shot.txt").write_text("another clip")
    assert data.find_caption(tmp_path / "shot.v2")[0] == "shot v2"


@pytest.mark.parametrize("name,warns", [("9_00", True), ("a1b2-x", True), ("vid_3", False),
                                        ("ein Ball rollt", False), ("мяч", False)])
def test_a_name_without_a_word_gives_a_warning(name, warns, tmp_path, capsys):
    data.find_caption(tmp_path / f"{name}.mp4")
    assert ("which describes nothing" in capsys.readouterr().err) == warns


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "/etc/passwd", "🦈 sharks", "a\0b", "-rf x",
                                    "", "…", "<script>alert(1)</script>"])
def test_file_names_from_prompts_stay_in_their_folder(prompt):
    name = slug(prompt)
    assert name and name.replace("-", "").isalnum() and not name.startswith("-")


def test_files_follow_the_umask_and_appear_complete_or_not_at_all(tmp_path):
    path, old = tmp_path / "f.txt", os.umask(0o027)
    try:
        with atomic_write(path) as part:
            part.write_text("first")
        assert path.stat().st_mode & 0o777 == 0o640
        with pytest.raises(RuntimeError), atomic_write(path) as part:
            part.write_text("half")
            raise RuntimeError
    finally:
        os.umask(old)
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["f.txt"]


def test_files_outside_the_output_folder_are_made_inside_it(tmp_path):
    """A kill then leaves nothing next to them, e.g. of generate.py --save-merged."""
    with output_folder(tmp_path / "out", None), atomic_write(tmp_path / "model.pth") as part:
        part.write_text("")
        assert part.parents[2] == tmp_path / "out"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


def test_paths_in_json_are_absolute_and_messages_are_one_line(tmp_path, capsys):
    write_json(tmp_path / "a.json", {"clip": Path("hop.mp4")})
    assert read_json(tmp_path / "a.json") == {"clip": str(Path.cwd() / "hop.mp4")}
    log("a clip\nof two lines")
    assert capsys.readouterr().err == "a clip\\nof two lines\n"


def test_archives_that_unpack_to_more_are_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**20))
    with pytest.raises(BadInput, match="it is compressed"):
        read_tensors(tmp_path / "a.pt")


def test_a_loop_of_links_is_refused_in_one_line(tmp_path):
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    with pytest.raises(BadInput, match="loop.mp4 cannot be used"):
        data.load_clips([tmp_path / "loop.mp4"], [], 8, (64, 64), 8)
