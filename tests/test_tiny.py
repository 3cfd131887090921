"""The tiny world, its measurements, its training, and the committed weights."""
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY
from safetensors.torch import load_file

import data
import sampler
from support import hub, media
from tiny import benchmark, measure, measurements, world
from tiny import train as tiny_train


def scenes(n, motions=world.MOTIONS, seed=11):
    return world.sample_scenes(n, torch.Generator().manual_seed(seed), motions)


# ------------------------------------------------------------------------------------------------
# The world


def test_the_same_seed_gives_the_same_clip():
    a, b = world.render(scenes(3)), world.render(scenes(3))
    assert torch.equal(a, b) and not torch.equal(a, world.render(scenes(3, seed=12)))
    assert a.shape == (3, 3, 16, 64, 64) and a.min() >= -1 and a.max() <= 1


@pytest.mark.parametrize("name", (*world.NOVEL, "novel:3"))
def test_test_prompts_share_no_appearance_with_the_clip(name):
    clips, others = benchmark.scenes_of(benchmark.Trial("vmc", name))
    prompts = [benchmark.describe(others, i, "moving") for i in range(benchmark.PROMPTS)]
    assert len(set(prompts)) == len(others) == benchmark.PROMPTS
    for field in benchmark.APPEARANCE:
        assert not (getattr(others, field) == getattr(clips, field)).any()


def test_unnamed_motions_change_nothing_else():
    draw = lambda share: world.sample_scenes(200, torch.Generator().manual_seed(3), unnamed=share)
    named, mixed = draw(0.0), draw(0.5)
    unnamed = mixed.motion == world.UNNAMED
    assert 70 < unnamed.sum() < 130
    for field in ("color", "shape", "background", "radius"):
        assert torch.equal(getattr(named, field), getattr(mixed, field))
    assert torch.equal(named.motion[~unnamed], mixed.motion[~unnamed])
    path = world.trajectory(mixed[unnamed])
    assert path.x.std() > 6 and path.size.std() > 0.05 and path.angle.std() > 0.1
    texts = world.captions(mixed[unnamed], torch.Generator().manual_seed(0))
    assert all(any(f"{words} on" in t for t in texts) for words in world.UNNAMED_WORDS)


def test_brisk_paths_turn_more_sharply_and_defaults_do_not_change():
    def curvature(**more):
        paths = [world.random_path(torch.Generator().manual_seed(i), **more) for i in range(300)]
        return torch.stack(paths).diff(n=2).norm(dim=1).mean()

    assert curvature(brisk=True) > 1.2 * curvature()
    assert curvature(brisk=False) == curvature()
    draw = lambda **more: world.sample_scenes(20, torch.Generator().manual_seed(4), **more)
    assert torch.equal(draw(brisk=True).color, draw().color)  # only unnamed motions can be brisk
    assert not torch.equal(draw(unnamed=1.0, brisk=True).keyframes, draw(unnamed=1.0).keyframes)


@pytest.mark.parametrize("seed", range(6))
def test_a_random_motion_is_novel_and_measurable(seed):
    g = torch.Generator().manual_seed(0)
    s, other = (world.scenes_of(f"novel:{seed + i}", 6, g) for i in range(2))
    path = world.trajectory(s)
    assert world.explained_variance(torch.stack([path.x[0], path.y[0]])) <= 0.5
    reference = world.trajectory(s[:1])
    agreement = lambda x: measurements.agreement(measurements.read(world.render(x)), reference)
    assert agreement(s).min() > 0.9 and agreement(other).max() < 0.9


def test_a_posture_is_a_function_of_the_trajectory():
    path = world.trajectory(world.scenes_of("posture:3", 2, torch.Generator().manual_seed(0)))
    for values in (path.angle, path.width):
        assert values[0].std() > 0.05
        assert torch.allclose(values[0] - values[0, 0], values[1] - values[1, 0], atol=1e-5)


def test_captions_name_the_scene_and_drop_parts():
    s = world.Scenes(*[torch.tensor([v]) for v in (1, 4, 2, 0, 2)],
                     *[torch.tensor([v]) for v in (32.0, 32.0, 15.0, 10.0, 0.0)])
    background = "on a green checkered background"
    assert world.captions(s) == [f"an orange ring moving left quickly {background}"]
    assert world.captions(s, motion=False) == [f"an orange ring {background}"]
    many = world.captions(scenes(400), torch.Generator().manual_seed(0))
    for part in ("", " on a ", "slowly", "quickly"):
        assert 0 < sum(part in text if part else text == "" for text in many) < 400


@pytest.mark.parametrize("motion,sign_x,sign_y", [
    ("moving left", -1, 0), ("moving right", 1, 0), ("moving up", 0, -1), ("moving down", 0, 1)])
def test_objects_move_in_the_direction_of_the_caption(motion, sign_x, sign_y):
    path = world.trajectory(scenes(20, (motion,)))
    for values, sign in ((path.x, sign_x), (path.y, sign_y)):
        assert torch.equal((values[:, -1] - values[:, 0]).sign(), torch.full((20,), float(sign)))


def test_the_command_writes_a_clip_and_its_caption(tmp_path, monkeypatch):
    clip = tmp_path / "c.mp4"
    monkeypatch.setattr(sys, "argv", ["world.py", "--clip", str(clip), "--motion", "moving left",
                                      "--seed", "3"])
    world.main()
    video = media.read_video(clip, 16, (64, 64), 8)
    drawn = world.scenes_of("moving left", 1, torch.Generator().manual_seed(3))
    assert (video - world.render(drawn)[0]).abs().mean() < 0.03
    assert data.find_caption(clip)[0] == f"a {world.SHAPES[drawn.shape]} moving left"


@pytest.mark.parametrize("clip, advice", [
    ("/dev/null/c.mp4", "/dev/null"), ("ü.mp4", "PYTHONUTF8=1")])
def test_an_error_of_the_command_is_one_line(clip, advice, tmp_path):
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, ROOT / "tiny" / "world.py", "--clip", clip]
    done = subprocess.run(command, env=ascii_only, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert advice in done.stderr and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------
# Measurements


def accuracy(scenes, reading):
    """{attribute: share of clips in which it was measured correctly}."""
    names = ("color", "shape", "background", "motion")
    return {n: (getattr(scenes, n) == getattr(reading, n)).float().mean().item() for n in names}


def test_rendered_clips_are_measured_correctly():
    """Trajectories within a third of a pixel, and the attributes."""
    s = scenes(120)
    reading, path = measurements.read(world.render(s)), world.trajectory(s)
    error = ((reading.x - path.x) ** 2 + (reading.y - path.y) ** 2).sqrt()
    assert error.median() < 0.3 and reading.found.float().mean() > 0.99
    assert min(accuracy(s, reading).values()) >= 0.99


def test_decoded_clips_are_measured_correctly(tiny):
    s = scenes(60)
    video = tiny.decode(tiny.encode(world.render(s)))
    assert min(accuracy(s, measurements.read(video)).values()) >= 0.96


def test_appearance_is_measured_in_each_frame():
    s = scenes(40, world.BASE)
    stability = lambda v: measurements.appearance_stability(s, measurements.read(v)).mean()
    video = world.render(s)
    assert stability(video) > 0.97
    video[:, :, 8:] = world.render(replace(s, color=(s.color + 1) % 8))[:, :, 8:]
    assert 0.4 < stability(video) < 0.6


def test_none_of_these():
    """Noise has no background, an empty background no object, shuffled frames no motion."""
    noise = torch.rand(1, 3, 16, 64, 64) * 2 - 1
    assert measurements.read(noise).background.item() == -1
    s = scenes(4, ("standing still",))
    reading = measurements.read(world.backgrounds(s.background, torch.zeros(4, 16)) * 2 - 1)
    assert (reading.shape == -1).all() and (reading.motion == -1).all()
    assert torch.equal(reading.background, s.background) and not reading.found.any()
    video = world.render(scenes(4, ("moving left",)))
    shuffled = video[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    assert (measurements.read(shuffled).motion == -1).all()


def test_a_reversed_clip_has_the_opposite_motion():
    video = world.render(scenes(12, ("moving left", "growing", "moving up")))
    forward, backward = measurements.read(video), measurements.read(video.flip(2))
    swap = {0: 1, 2: 3, 4: 5}
    assert backward.motion.tolist() == [swap[m] for m in forward.motion.tolist()]


def test_agreement_by_hand():
    s = scenes(1, ("moving right",))
    path, reading = world.trajectory(s), measurements.read(world.render(s))
    assert measurements.agreement(reading, path).item() == pytest.approx(1, abs=0.01)
    reading.x = -reading.x
    assert measurements.agreement(reading, path).item() == pytest.approx(-1, abs=0.01)
    reading.x = reading.x * -0.4  # the right direction, but not far enough
    assert measurements.agreement(reading, path).item() == 0
    reading.x, reading.found = path.x, torch.arange(16)[None] < 13
    assert measurements.agreement(reading, path).item() == 0


# ------------------------------------------------------------------------------------------------
# The weights


def test_the_weights_are_small_half_precision_complete_and_stored_once():
    files = list(TINY.rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) <= 24e6
    assert {f.parent.name for f in files} == {"unet", "vae", "text_encoder", "clip"}
    assert all(t.dtype == torch.float16 for f in files for t in load_file(f).values())
    text, clip = (load_file(TINY / name / "model.safetensors") for name in ("text_encoder", "clip"))
    assert set(hub.text_from_hub(text)).isdisjoint(clip)  # token_embedding included


def test_rare_tokens_have_distinct_embeddings(tiny):
    ids = torch.cat([torch.tensor([48136, 25266]), torch.arange(40000, 40200)])  # sks, pll, others
    rows = torch.nn.functional.normalize(tiny.text_encoder.tower.token_embedding.weight[ids], dim=1)
    similarity = rows @ rows.T - 2 * torch.eye(len(rows))
    assert similarity.max() < 0.8
    left, right = tiny.text_encoder(["a star moving left", "a star moving right"])
    assert torch.nn.functional.cosine_similarity(left.flatten(), right.flatten(), dim=0) < 0.9


def test_the_tiny_model_draws_the_prompt(tiny):
    """A lower bound, well under the measured numbers of docs/base.md."""
    s = world.sample_scenes(8, torch.Generator().manual_seed(77))
    noise = sampler.seeded_randn((8, 16, 8, 8), list(range(8)))
    videos = sampler.sample(tiny, world.captions(s), noise, list(range(8)), steps=20, guidance=4)
    right = accuracy(s, measurements.read(videos))
    print("eight prompts:", right)
    assert right["color"] >= 0.75 and right["background"] >= 0.6 and right["motion"] >= 0.6


def test_the_loss_shows_the_effect_of_motion_words(tiny, monkeypatch):
    effect = measure.measure_words(tiny, clips=4)
    assert len(effect) == 6 and min(effect.values()) > 20
    encode = tiny.encode_text
    monkeypatch.setattr(tiny, "encode_text", lambda prompts: encode(["a thing"] * len(prompts)))
    assert set(measure.measure_words(tiny, frames=4, clips=2).values()) == {0.0}


# ------------------------------------------------------------------------------------------------
# Training


def test_plainer_adds_white_objects_on_grey_but_hides_no_camera_pan():
    s = scenes(2000, world.BASE)
    plain = tiny_train.plainer(s, torch.Generator().manual_seed(0))
    white, grey = list(world.COLORS).index("white"), list(world.BACKGROUNDS).index("grey")
    share = lambda x: ((x.color == white) & (x.background == grey)).float().mean().item()
    assert share(plain) - share(s) == pytest.approx(tiny_train.PLAIN, abs=0.02)
    pans = world.is_motion(s.motion, "standing still while the camera pans")
    assert not (plain.background[pans] == grey).any()
    for field in ("shape", "motion", "x", "radius"):
        assert torch.equal(getattr(plain, field), getattr(s, field))


def test_the_curriculum_introduces_all_motions_step_by_step():
    ends, frames, _, motions, unnamed, _ = zip(*tiny_train.CURRICULUM)
    assert list(ends) == sorted(ends) and list(frames) == sorted(frames)
    assert list(unnamed) == sorted(unnamed) and unnamed[0] == 0
    for earlier, later in zip(motions, motions[1:]):
        assert set(earlier) <= set(later)
    assert set(motions[-1]) == set(world.BASE) and frames[-1] == world.FRAMES
    assert set(tiny_train.HINTS) <= set(ends)


def small_stage(monkeypatch, folder, stage, steps):
    """Run a stage of tiny/train.py with small batches and pools, from the committed weights."""
    make_pool = tiny_train.LatentPool.__init__
    monkeypatch.setattr(tiny_train.LatentPool, "__init__", lambda self, key, size, batch, *more:
                        make_pool(self, key, 24, 2, *more))
    monkeypatch.setattr(tiny_train, "BATCH", {"vae": 2, "clip": 4, "images": 2})
    if not (folder / "weights").exists():
        (folder / "weights").mkdir()
        for name in ("vae", "text_encoder"):
            (folder / "weights" / name).symlink_to(TINY / name)
    monkeypatch.setattr(sys, "argv", ["train.py", stage, "--steps", str(steps), "--device", "cpu",
                                      "--out", str(folder / "weights"), "--work", str(folder)])
    tiny_train.main()


def test_images_then_clips_resume_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_train, "learning_rate", lambda step, steps, peak: peak)
    for name, ends in (("once", [8]), ("resumed", [7, 8])):
        (tmp_path / name).mkdir()
        small_stage(monkeypatch, tmp_path / name, "images", 2)
        for end in ends:
            small_stage(monkeypatch, tmp_path / name, "clips", end)
    file = "unet/diffusion_pytorch_model.safetensors"
    once, resumed = (load_file(tmp_path / name / "weights" / file) for name in ("once", "resumed"))
    assert once.keys() == load_file(TINY / file).keys()
    assert all(torch.equal(once[n], resumed[n]) for n in once)


@pytest.mark.parametrize("stage, folders", [("vae", ["vae"]), ("clip", ["clip", "text_encoder"])])
def test_a_stage_writes_weights_that_load(tmp_path, monkeypatch, stage, folders):
    (tmp_path / "weights").mkdir()
    small_stage(monkeypatch, tmp_path, stage, 1)
    for folder in folders:
        name, = (p.name for p in (TINY / folder).glob("*.safetensors"))
        shapes = lambda root, path=f"{folder}/{name}": {
            n: t.shape for n, t in load_file(root / path).items()}
        assert shapes(tmp_path / "weights") == shapes(TINY)
