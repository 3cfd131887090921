"""The tiny world, its instruments, and the weights that come with the repository."""
import sys

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

import data
import sampler
from support import hub, media
from tiny import instruments, lab, measure, world


def scenes(n, motions=world.MOTIONS, seed=11):
    return world.sample_scenes(n, torch.Generator().manual_seed(seed), motions)


def test_the_world_is_as_large_as_it_says():
    assert len(world.COLOURS) >= 8 and len(world.SHAPES) >= 6 and len(world.BACKGROUNDS) >= 5
    assert len(world.BASE) >= 12 and len(world.NOVEL) >= 6
    assert not set(world.BASE) & set(world.NOVEL)


def test_the_same_seed_is_the_same_clip():
    a, b = world.render(scenes(3)), world.render(scenes(3))
    assert torch.equal(a, b) and not torch.equal(a, world.render(scenes(3, seed=12)))
    assert a.shape == (3, 3, 16, 64, 64) and a.min() >= -1 and a.max() <= 1


@pytest.mark.parametrize("name", (*world.NOVEL, "novel:3"))
def test_methods_are_measured_on_looks_that_all_differ(name):
    clips, looks = lab.scenes_of(lab.Trial("vmc", name))
    prompts = [lab.describe(looks, i, "moving") for i in range(lab.PROMPTS)]
    assert len(set(prompts)) == len(looks) == lab.PROMPTS
    for field in lab.LOOK:
        assert not (getattr(looks, field) == getattr(clips, field)).any()


def test_unnamed_motions_join_the_named_and_change_nothing_else():
    draw = lambda share: world.sample_scenes(200, torch.Generator().manual_seed(3), unnamed=share)
    named, mixed = draw(0.0), draw(0.5)
    free = mixed.motion == world.UNNAMED
    assert 70 < free.sum() < 130
    for field in ("colour", "shape", "background", "radius"):
        assert torch.equal(getattr(named, field), getattr(mixed, field))
    assert torch.equal(named.motion[~free], mixed.motion[~free])
    path = world.trajectory(mixed[free])
    assert path.x.std() > 6 and path.size.std() > 0.05 and path.angle.std() > 0.1
    texts = world.captions(mixed[free], torch.Generator().manual_seed(0))
    assert {words for words in world.UNNAMED_WORDS for t in texts if f"{words} on" in t} == {
        *world.UNNAMED_WORDS}


@pytest.mark.parametrize("seed", range(6))
def test_a_random_novel_motion_is_none_of_the_named_and_can_be_read(seed):
    g = torch.Generator().manual_seed(0)
    s, other = (world.scenes_of(f"novel:{seed + i}", 6, g) for i in range(2))
    path = world.trajectory(s)
    assert world.explained(torch.stack([path.x[0], path.y[0]])) <= 0.5
    one = world.trajectory(s[:1])
    agreed = instruments.agreement(instruments.read(world.render(s)), one)
    assert agreed.min() > 0.9
    assert instruments.agreement(instruments.read(world.render(other)), one).max() < 0.9


def test_a_posture_belongs_to_its_motion():
    s = world.scenes_of("posture:3", 2, torch.Generator().manual_seed(0))
    path = world.trajectory(s)
    for values in (path.angle, path.width):
        assert values[0].std() > 0.05
        assert torch.allclose(values[0] - values[0, 0], values[1] - values[1, 0], atol=1e-5)


def test_looks_are_read_frame_by_frame():
    s = scenes(40, world.BASE)
    video = world.render(s)
    assert instruments.steadiness(s, instruments.read(video)).mean() > 0.97
    video[:, :, 8:] = world.render(s.but(colour=(s.colour + 1) % 8))[:, :, 8:]
    assert 0.4 < instruments.steadiness(s, instruments.read(video)).mean() < 0.6


def test_captions_say_what_is_drawn_and_leave_parts_out():
    s = world.Scenes(*[torch.tensor([v]) for v in (1, 4, 2, 0, 2)],
                     *[torch.tensor([v]) for v in (32.0, 32.0, 15.0, 10.0, 0.0)])
    where = "on a green checkered background"
    assert world.captions(s) == [f"an orange ring moving left quickly {where}"]
    assert world.captions(s, motion=False) == [f"an orange ring {where}"]
    many = world.captions(scenes(400), torch.Generator().manual_seed(0))
    for part in ("", " on a ", "slowly", "quickly"):
        assert 0 < sum(part in text if part else text == "" for text in many) < 400


@pytest.mark.parametrize("motion,sign_x,sign_y", [
    ("moving left", -1, 0), ("moving right", 1, 0), ("moving up", 0, -1), ("moving down", 0, 1)])
def test_things_move_where_the_caption_says(motion, sign_x, sign_y):
    path = world.trajectory(scenes(20, (motion,)))
    for got, sign in ((path.x, sign_x), (path.y, sign_y)):
        assert torch.equal((got[:, -1] - got[:, 0]).sign(), torch.full((20,), float(sign)))


def test_measured_paths_are_the_exact_ones():
    s = scenes(60)
    reading, path = instruments.read(world.render(s)), world.trajectory(s)
    error = ((reading.x - path.x) ** 2 + (reading.y - path.y) ** 2).sqrt()
    assert error.median() < 0.3 and reading.found.float().mean() > 0.99


def test_instruments_are_right_on_rendered_clips():
    s = scenes(120)
    assert min(instruments.accuracy(s, instruments.read(world.render(s))).values()) >= 0.99


def test_instruments_are_right_on_clips_through_the_vae(tiny):
    s = scenes(60)
    with torch.no_grad():
        video = tiny.vae.decode_video(tiny.vae.encode_video(world.render(s)))
    assert min(instruments.accuracy(s, instruments.read(video)).values()) >= 0.96


def test_instruments_say_none():
    """Noise shows nothing; an empty background no thing; a thing that jumps about no motion."""
    noise = torch.rand(1, 3, 16, 64, 64) * 2 - 1
    assert instruments.read(noise).background.item() == -1
    s = scenes(4, ("standing still",))
    empty = world.backgrounds(s.background, torch.zeros(4, 16)) * 2 - 1
    got = instruments.read(empty)
    assert (got.shape == -1).all() and (got.motion == -1).all() and not got.found.any()
    assert torch.equal(got.background, s.background)
    video = world.render(scenes(4, ("moving left",)))
    jumpy = video[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    assert (instruments.read(jumpy).motion == -1).all()


def test_a_clip_played_backwards_moves_the_other_way():
    s = scenes(12, ("moving left", "growing", "moving up"))
    there, back = instruments.read(world.render(s)), instruments.read(world.render(s).flip(2))
    swap = {0: 1, 2: 3, 4: 5}
    assert back.motion.tolist() == [swap[m] for m in there.motion.tolist()]


def test_agreement_by_hand():
    s = scenes(1, ("moving right",))
    path, reading = world.trajectory(s), instruments.read(world.render(s))
    assert instruments.agreement(reading, path).item() == pytest.approx(1, abs=0.01)
    reading.x = -reading.x
    assert instruments.agreement(reading, path).item() == pytest.approx(-1, abs=0.01)
    reading.x = reading.x * -0.4  # right again, but not far enough
    assert instruments.agreement(reading, path).item() == 0
    reading.x, reading.found = path.x, torch.arange(16)[None] < 13
    assert instruments.agreement(reading, path).item() == 0


def test_a_clip_with_its_caption_and_a_sheet_are_written(tmp_path, monkeypatch):
    clip, sheet = tmp_path / "c.mp4", tmp_path / "sheet.png"
    monkeypatch.setattr(sys, "argv", ["world.py", "--clip", str(clip), "--motion", "moving left",
                                      "--seed", "3", "--sheet", str(sheet)])
    world.main()
    video = media.read_video(clip, 16, (64, 64), 8)
    drawn = world.scenes_of("moving left", 1, torch.Generator().manual_seed(3))
    assert (video - world.render(drawn)[0]).abs().mean() < 0.03
    caption = f"a {world.SHAPES[drawn.shape]} moving left"
    assert data.find_caption(clip)[0] == caption
    assert media.read_picture(sheet).shape[0] > 64 * len(world.MOTIONS)


def test_two_things_can_be_drawn():
    a, b = scenes(2, ("moving up",)), scenes(2, ("moving down",), seed=5)
    both, one = world.render(a, also=[b]), world.render(a)
    assert (both - one).abs().amax((1, 2, 3, 4)).min() > 0.3


def test_the_weights_are_small_half_precision_and_complete():
    files = list(TINY.rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) <= 24e6
    assert {f.parent.name for f in files} == {"unet", "vae", "text_encoder", "clip", "motion"}
    assert all(t.dtype == torch.float16 for f in files for t in load_file(f).values())


def test_rare_tokens_keep_distinct_embeddings(tiny):
    ids = torch.cat([torch.tensor([48136, 25266]), torch.arange(40000, 40200)])  # sks, pll, others
    rows = torch.nn.functional.normalize(tiny.text.tower.token_embedding.weight[ids], dim=1)
    likeness = rows @ rows.T - 2 * torch.eye(len(rows))
    assert likeness.max() < 0.8
    left, right = tiny.text(["a star moving left", "a star moving right"])
    assert torch.nn.functional.cosine_similarity(left.flatten(), right.flatten(), dim=0) < 0.9


def test_the_tiny_model_draws_what_is_asked(tiny):
    """A floor well under its measured figures: see docs/base.md for those."""
    s = world.sample_scenes(8, torch.Generator().manual_seed(77))
    from sampler import noise_like_shape

    noise = noise_like_shape((8, 16, 8, 8), list(range(8)))
    videos = sampler.sample(tiny, world.captions(s), noise, list(range(8)), steps=20, guidance=4)
    right = instruments.accuracy(s, instruments.read(videos))
    print("on eight prompts:", right)
    assert right["colour"] >= 0.75 and right["background"] >= 0.6 and right["motion"] >= 0.6


def test_the_loss_tells_whether_words_of_motions_are_read(tiny, monkeypatch):
    found = measure.measure_words(tiny, clips=4)
    assert len(found) == 6 and min(found.values()) > 20
    read = tiny.read
    monkeypatch.setattr(tiny, "read", lambda prompts: read(["a thing"] * len(prompts)))
    assert set(measure.measure_words(tiny, frames=4, clips=2).values()) == {0.0}


def test_the_tiny_clip_has_no_part_twice():
    text = load_file(TINY / "text_encoder" / "model.safetensors")
    rest = load_file(TINY / "clip" / "model.safetensors")
    assert not any("token_embedding" in n for n in rest)
    assert set(hub.text_from_hub(text)).isdisjoint(rest)
