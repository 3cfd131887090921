"""generate.py on the tiny model in a few steps: samples, settings, refining, Diffusion Motion
Transfer, export, and one-line errors."""
import json
import re
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, expect_error, relative
from safetensors.torch import load_file, save_file

import data
import generate
import lora
import model
import sampler
import train
from support import adapters, media
from support.files import BadInput
from support.flags import read_size
from support.recipe import METHODS
from tiny import world


def make(*argv):
    generate.main([str(a) for a in argv])


def videos_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.mp4")}


@pytest.fixture(scope="session")
def latents(tiny, hop):
    return tiny.encode(media.read_video(hop, FRAMES, (64, 64), 8)[None])


FRAMES = 6


def write_adapter(path, latents, factor=1.05, **meta):
    """A VMC adapter in which all trained layers have grown by a factor."""
    pipe = model.load(TINY)
    trained = lora.FullFinetune(pipe.unet, "temporal-attention-qkv")
    for p in trained.chosen.values():
        p.data = p.data * factor
    own = {"method": "vmc", "base": adapters.fingerprint(pipe), "base_name": "tiny",
           "prompt": "a thing hopping", "fps": 8, "noise_prior": 1, "guidance": 3, "step": 7,
           "sampling_steps": 3, "sampler": "ddim", "inversion_model": "tuned", "inversion_steps": 0}
    latents = None if latents is None else latents[0]
    adapters.save_adapter(path, [trained], latents, **own | meta)
    return path


@pytest.fixture(scope="session")
def adapter(latents, tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapter") / "vmc.safetensors", latents)


def resolved(tiny, *argv):
    """The flags and the Sampling of a command line, in one namespace."""
    args = generate.parse([str(a) for a in ("--prompt", "a red star", *argv)])
    prompts = generate.check(args)
    loaded = [adapters.read_adapter(path, tiny) for path in args.adapter]
    s, source = generate.resolve_settings(args, tiny, loaded)
    generate.check_sampling(args, prompts, tiny, loaded, s)
    return SimpleNamespace(**vars(args) | vars(s) | {"s": s, "args": args, "source": source})


# ------------------------------------------------------------------------------------------------
# The command


def test_a_folder_has_videos_a_contact_sheet_and_settings(adapter, tmp_path, capsys):
    lines = tmp_path / "prompts.txt"
    lines.write_text("a green ring hopping\n\n../../escape <b>\n")
    make("--adapter", adapter, "--prompts", lines, "--videos-per-prompt", 2, "--steps", 3, "--out",
         tmp_path / "set")
    names = sorted(p.name for p in (tmp_path / "set").iterdir())
    videos = [n for n in names if n.endswith(".mp4")]
    assert len(videos) == 4 and set(names) - set(videos) == {"sheet.png", "settings.json"}
    settings = json.loads((tmp_path / "set" / "settings.json").read_text())
    assert settings["noise_prior"] == 1 and settings["sampling_steps"] == 3
    assert [row[0] for row in settings["videos"]] == videos
    assert settings["videos"][3][1:] == ["../../escape <b>", 1]
    assert {p.name for p in tmp_path.iterdir()} == {"prompts.txt", "set"}
    layers = len(lora.select(model.load_unet(TINY), "temporal-attention-qkv"))
    assert f"{layers} layers changed, ‖ΔW‖/‖W‖ = 0.05" in capsys.readouterr().out


def test_other_starts_and_samplers_give_other_videos(adapter, tmp_path):
    made = set()
    for i, more in enumerate(["", "--noise-prior 0", "--noise-prior 0.5", "--sampler ddpm",
                              "--noise-prior 0 --sampler dpm",
                              "--frames 5 --size 48x80 --noise-prior 0"]):
        make("--adapter", adapter, "--prompt", "a red star", "--steps", 2, "--out",
             tmp_path / str(i), *more.split())
        made |= set(videos_of(tmp_path / str(i)).values())
        assert len(made) == i + 1, more
    name, = videos_of(tmp_path / "5")
    _, frames = zip(*media.decode(tmp_path / "5" / name))
    assert len(frames) == 5 and frames[0]().shape == (240, 144, 3)


@pytest.mark.parametrize("more,prior", [((), 1), (("--noise-prior", "0.5"), 0.5),
                                        (("--noise-prior", "0"), 0)])
def test_starting_latents_and_negative_prompt(more, prior, adapter, tmp_path, monkeypatch, spy):
    """√p·inverted + √(1−p)·noise; the negative prompt replaces the empty one."""
    inverted, seen = torch.randn(1, 8, FRAMES, 8, 8), {"texts": []}
    monkeypatch.setattr(sampler, "invert", lambda *a, **k: inverted)
    spy(model.Pipeline, "encode_text", lambda pipe, texts: seen["texts"].extend(texts))
    spy(sampler, "sample", lambda pipe, texts, start, *rest, **more: seen.update(start=start))
    make("--adapter", adapter, "--prompt", "a red star", "--negative-prompt", "a blue ring",
         "--steps", 1, "--out", tmp_path, *more)
    noise = sampler.seeded_randn((8, FRAMES, 8, 8), [0])
    torch.testing.assert_close(seen["start"], prior**0.5 * inverted + (1 - prior)**0.5 * noise)
    assert set(seen["texts"]) >= {"a red star", "a blue ring"} and "" not in seen["texts"][-2:]


def test_another_clip_than_the_adapters_is_inverted(adapter, hop, tmp_path):
    still = tmp_path / "still.mp4"
    frame = media.read_video(hop, 16, (64, 64), 8)[:, :1]
    media.write_video(still, frame.expand(3, 16, 64, 64), 8)
    same = ("--adapter", adapter, "--prompt", "a red star", "--steps", 2, "--precision", "fp32")
    for name, more in (("own", ()), ("other", ("--init-video", still))):
        make(*same, *more, "--out", tmp_path / name)
    own, other = (videos_of(tmp_path / name) for name in ("own", "other"))
    assert own.keys() == other.keys() and own != other


def test_a_video_does_not_depend_on_the_others(tmp_path):
    """To the bit on a CPU in its own precision, also refined."""
    same = ("--steps", 2, "--frames", 4, "--refine", TINY, "--refine-steps", 4, "--strength", 0.5)
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\n")
    make("--prompts", tmp_path / "prompts.txt", "--videos-per-prompt", 2, "--batch", 4, *same,
         "--out", tmp_path / "many")
    make("--prompt", "a blue ring", "--seed", 1, "--batch", 1, *same, "--out", tmp_path / "one")
    many, one = videos_of(tmp_path / "many"), videos_of(tmp_path / "one")
    assert len(many) == 4 and one["000-a-blue-ring-seed1.mp4"] == many["001-a-blue-ring-seed1.mp4"]


def test_a_video_in_a_batch_differs_in_its_last_bits_only(tiny):
    texts, seeds = ["a red star"] * 4, [6, 7, 8, 9]
    noise = sampler.seeded_randn((8, 4, 8, 8), seeds)
    many = sampler.sample(tiny, texts, noise, seeds, steps=3, method="ddpm")
    one = sampler.sample(tiny, texts[:1], noise[1:2], seeds[1:2], steps=3, method="ddpm")
    assert (many[1] - one[0]).abs().max() <= 1e-4


def test_the_merged_model_is_saved_in_both_layouts(adapter, tiny, tmp_path, capsys):
    """In fp16, the hub's precision, and without a prompt."""
    make("--adapter", adapter, "--save-merged", tmp_path / "merged", "--out", tmp_path / "out")
    make("--adapter", adapter, "--save-merged", tmp_path / "merged.pth", "--out",
         tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"merged", "merged.pth"}
    kept = dict(model.load(tmp_path / "merged").unet.named_parameters())
    base = dict(model.load_unet(TINY).named_parameters())
    learned = adapters.read_adapter(adapter, tiny).tensors
    for name, p in kept.items():
        assert torch.allclose(p, learned.get(name, base[name]), rtol=1e-3, atol=1e-6), name
    assert any(not torch.equal(kept[name], base[name]) for name in learned)
    expect_error(["--adapter", adapter, "--save-merged", tmp_path / "merged"],
                 "name of a new folder", capsys, generate.main)
    expect_error(["--adapter", adapter, "--weights", tmp_path / "merged", *X], "was trained on",
                 capsys, generate.main)  # it would be applied twice
    make("--weights", tmp_path / "merged", "--save-merged", tmp_path / "merged" / "again")
    assert ({p.name for p in (tmp_path / "merged" / "again").iterdir()} ==
            {p.name for p in TINY.iterdir()})


def test_the_help_page_has_every_flag_and_the_code_reads_it(capsys):
    with pytest.raises(SystemExit):
        make("--help")
    printed = capsys.readouterr().out
    assert "python generate.py --prompt" in printed
    code, shared = (ROOT / "generate.py").read_text(), {f.name for f in fields(sampler.Sampling)}
    for name in vars(generate.parse([])):
        flag = {"sampling_steps": "steps"}.get(name, name).replace("_", "-")
        assert re.search(rf"--{flag}\b(?!-)", printed), name
        used = re.search(rf"args\.{name}\b", code) or f'"{name}":' in code or name in shared
        assert used, f"nothing reads {name}"


# ------------------------------------------------------------------------------------------------
# Settings


def test_flags_override_the_adapter_which_overrides_the_defaults(tiny, adapter, hop, tmp_path):
    plain = resolved(tiny)
    assert (plain.sampling_steps, plain.guidance, plain.sampler) == (50, 4, "ddim")
    assert (plain.frames, plain.size, plain.fps, plain.noise_prior) == (16, (64, 64), 8, 0)
    own = resolved(tiny, "--adapter", adapter)
    assert (own.sampling_steps, own.guidance, own.noise_prior, own.frames) == (3, 3, 1, FRAMES)
    assert own.source.path == adapter and own.source.meta["step"] == "7"
    given = resolved(tiny, "--adapter", adapter, "--steps", 5, "--guidance", 0, "--fps", 12,
                     "--noise-prior", 0.25, "--sampler", "ddpm")
    assert (given.sampling_steps, given.guidance, given.fps, given.inversion_steps) == (5, 0, 12, 0)
    assert (given.noise_prior, given.sampler) == (0.25, "ddpm")
    absorber = write_adapter(tmp_path / "a.safetensors", None, noise_prior=0)  # first, without clip
    both = resolved(tiny, "--adapter", absorber, adapter, "--scale", 0.5)
    assert both.source.path == adapter and both.scale == [0.5, 0.5] and both.noise_prior == 1
    assert resolved(tiny, "--adapter", absorber).noise_prior == 0
    assert resolved(tiny, "--init-video", hop).noise_prior == 1
    wide, trained = tmp_path / "wide.safetensors", lora.FullFinetune(
        tiny.unet, "temporal-attention")
    adapters.save_adapter(wide, [trained], torch.zeros(8, 4, 5, 9), noise_prior=1, method="vmc")
    s = resolved(tiny, "--adapter", wide)
    assert (s.size, s.frames) == ((40, 72), 4)


def test_weights_without_a_sample_size_have_the_default_one(tiny, monkeypatch):
    """Null in unet/config.json: 32 latents of 8 pixels, as if the key were missing."""
    monkeypatch.setattr(tiny.unet.config, "sample_size", None)
    assert resolved(tiny).size == (256, 256)


def test_an_adapter_without_its_clip_is_refused(tmp_path, capsys):
    path = write_adapter(tmp_path / "a.safetensors", None)
    expect_error(["--adapter", path, "--prompt", "x", "--out", tmp_path / "o"],
             "starts from a clip, and none is given; give --init-video", capsys, generate.main)


def test_the_inversion_has_its_own_steps_and_model(latents, tmp_path, spy):
    """MotionDirector inverts with the base model in 50 steps and samples in 30."""
    path = write_adapter(tmp_path / "md.safetensors", latents, inversion_model="base",
                         inversion_steps=4, factor=1.5)
    seen = []
    name = "down_blocks.0.temp_attentions.0.transformer_blocks.0.attn1.to_q.weight"
    original = dict(model.load_unet(TINY).named_parameters())[name]

    spy(sampler, "invert", lambda pipe, latents, steps, *rest, **more: seen.append(
        (steps, torch.equal(dict(pipe.unet.named_parameters())[name], original))))
    same = ("--adapter", path, "--prompt", "a red star", "--precision", "fp32")
    make(*same, "--out", tmp_path / "a")
    make(*same, "--steps", 2, "--out", tmp_path / "b")  # the steps of both
    make(*same, "--steps", 2, "--inversion-steps", 5, "--out", tmp_path / "c")
    tuned = write_adapter(tmp_path / "vmc.safetensors", latents, factor=1.5)
    make("--adapter", tuned, *same[2:], "--out", tmp_path / "d")
    assert seen == [(4, True), (2, True), (5, True), (3, False)]


@pytest.mark.parametrize("name,text", [
    ("noise_prior", "abc"), ("noise_prior", "1.5"), ("sampling_steps", "-1"), ("guidance", "nan"),
    ("sampling_steps", "2.5"), ("fps", "0"), ("fps", "inf"), ("sampler", "magic"),
    ("inversion_model", "both"), ("inversion_steps", "-2"), ("sampling_steps", "700"),
    ("guidance", "1" * 5000)])
def test_wrong_metadata_is_refused_before_sampling(name, text, latents, tmp_path, monkeypatch,
                                                   capsys):
    path = write_adapter(tmp_path / "a.safetensors", latents, **{name: text})
    monkeypatch.setattr(sampler, "sample", lambda *a, **k: pytest.fail("sampled"))
    monkeypatch.setattr(sampler, "invert", lambda *a, **k: pytest.fail("inverted"))
    expected = "--steps 700" if text == "700" else f"a.safetensors.*({name}|convert|literal|digits)"
    expect_error(["--adapter", path, "--prompt", "x", "--out", tmp_path / "o"], expected, capsys,
             generate.main)
    assert not (tmp_path / "o").exists()


def test_dpm_starts_from_an_inverted_clip_only_if_it_returns_to_it(tiny, latents):
    """The tiny model's trailing timesteps are those of the inversion; ZeroScope's leading ones are
    not."""
    zeroscope = sampler.NoiseSchedule()
    sampler.check_return(tiny.schedule, "dpm", 20)
    start, apart = sampler.invert(tiny, latents, 8), []
    for method in ("ddim", "dpm"):
        back = sampler.sample(tiny, [""], start, [0], 8, 1.0, method)
        apart.append((back - tiny.decode(latents)).square().mean().item())
    assert apart[1] < 1.5 * apart[0]
    for method in ("ddim", "ddpm"):
        sampler.check_return(zeroscope, method, 20)
    recipe = METHODS["vmc"].override("sampler=dpm")
    train.check_schedule(recipe, tiny.schedule, 20)
    train.check_schedule(recipe.override("noise_prior=0"), zeroscope, 20)
    for check in (lambda: sampler.check_return(zeroscope, "dpm", 20),
                  lambda: train.check_schedule(recipe, zeroscope, 20)):
        with pytest.raises(BadInput, match="reconstructed"):
            check()


def test_words_unknown_to_the_tiny_model_are_named(adapter, tiny, capsys):
    scenes = world.sample_scenes(50, torch.Generator().manual_seed(0))
    data.note_unknown_words([*world.captions(scenes), "A red star, on a Grey background!"])
    data.note_unknown_words(["a red star sksing"], ["sksing"])  # an adapter's own word
    assert capsys.readouterr().err == ""
    resolved(tiny, "--adapter", adapter, "--prompt", "a CAR über")
    line, = capsys.readouterr().err.strip().splitlines()
    assert re.search(r"car, über; it knows a, about, an", line)


# ------------------------------------------------------------------------------------------------
# Refining


def refine(tiny, video, second=None, **more):
    args = SimpleNamespace(refine_size=(64, 64), refine_steps=10, refine_guidance=1.0, strength=0.5,
                           negative_prompt="")
    vars(args).update(more)
    return generate.refine(args, second or tiny, video, "a thing", 0)


def test_refining_resizes_and_changes_more_with_more_strength(tiny):
    """Strength 0 is the VAE's round trip."""
    scenes, change = world.sample_scenes(1, torch.Generator().manual_seed(2)), []
    video = world.render(scenes, FRAMES)[0]
    for strength in (0.0, 0.3, 0.9):
        change.append((refine(tiny, video, strength=strength) - video).abs().mean().item())
    assert change[0] < 0.05 and change[0] < change[1] < change[2]
    out = refine(tiny, video, refine_size=(128, 96), strength=0.1)
    assert out.shape == (3, FRAMES, 128, 96)


@pytest.mark.parametrize("given,used", [([], 4), (["--refine-guidance", "0"], 0)])
def test_the_default_guidance_of_refining_replaces_no_given_one(given, used, tiny, monkeypatch):
    monkeypatch.setattr(generate, "load", lambda *args, **more: tiny)
    args = generate.parse([*X, "--refine", str(TINY), *given])
    generate.load_refiner(args, tiny)
    assert (args.refine_guidance, args.refine_steps, args.strength) == (used, 50, 0.6)


def test_refining_takes_the_last_steps_of_the_second_model(tiny, spy):
    seen = []
    spy(model.Pipeline, "predict", lambda pipe, x, t, *more: seen.append((pipe, t)))
    second = replace(tiny)
    video = world.render(world.sample_scenes(1, torch.Generator().manual_seed(2)), 4)[0]
    refine(tiny, video, second, strength=0.3)
    assert [t for _, t in seen] == tiny.schedule.timesteps(10)[-3:]
    assert all(pipe is second for pipe, _ in seen)


# ------------------------------------------------------------------------------------------------
# Diffusion Motion Transfer


def test_dmt_has_the_published_settings(tiny, hop, adapter, monkeypatch):
    s = resolved(tiny, "--dmt", hop)
    assert (s.sampling_steps, s.inversion_steps, s.guidance, s.negative_prompt) == (50, 0, 4, "")
    assert s.size == (64, 64) and s.checkpointing == "off"
    real = generate.dmt_defaults(1000, tiny=False)
    assert (real["guidance"], real["inversion_steps"]) == (10.0, 999)
    assert real["negative_prompt"].startswith("bad quality, distortions")
    assert generate.GUIDED_SHARE == 0.4 and generate.ADAM_STEPS == 10
    with monkeypatch.context() as patched:  # other weights
        patched.setattr(generate, "is_tiny", lambda weights: False)
        for more in ([], ["--adapter", adapter]):
            v = resolved(tiny, "--dmt", hop, *more)
            assert (v.frames, v.size, v.guidance, v.checkpointing) == (24, (320, 576), 10, "on")
    given = resolved(tiny, "--dmt", hop, "--inversion-steps", 9, "--negative-prompt", "blue",
                     "--steps", 6)
    assert (given.inversion_steps, given.negative_prompt, given.sampling_steps) == (9, "blue", 6)


def test_pairwise_differences_by_hand():
    """Features that differ by a constant or a scale: 0; negated ones: 2."""
    g = torch.Generator().manual_seed(0)
    f = torch.randn(1, 5, 8, generator=g)
    loss = generate.pairwise_differences_loss
    assert loss(f + torch.randn(1, 1, 8, generator=g), f).item() == pytest.approx(0, abs=1e-6)
    assert loss(3 * f, f).item() == pytest.approx(0, abs=1e-6)
    assert loss(-f, f).item() == pytest.approx(2, abs=1e-6)


def test_dmt_features_are_those_of_a_whole_pass_which_stops_after_them(tiny):
    x, text, after = sampler.seeded_randn((8, 4, 8, 8), [0]), tiny.encode_text(["a star"]), []
    hook = tiny.unet.conv_norm_out.register_forward_pre_hook(lambda *_: after.append(1))
    got, expected = generate.frame_features(tiny, x, 100, text), []
    assert not after and [tuple(f.shape) for f in got] == [(1, 4, 64)] * 2
    layers = [m for n, m in tiny.unet.named_modules() if re.fullmatch(generate.LAYERS, n)]
    hooks = [m.register_forward_hook(lambda m, i, out: expected.append(out)) for m in layers]
    tiny.predict(x, 100, text)
    for one in (hook, *hooks):
        one.remove()
    assert after and all(torch.equal(a[0], b.mean((2, 3))) for a, b in zip(got, expected))


def test_dmt_reads_the_layers_of_the_published_code(full):
    names = [n for n, _ in full.named_modules() if re.fullmatch(generate.LAYERS, n)]
    assert sorted(names) == ["up_blocks.1.resnets.1.conv2", "up_blocks.1.temp_convs.1",
                             "up_blocks.1.upsamplers.0"]


@pytest.mark.parametrize("checkpointing", (False, True))
def test_dmt_optimizes_latents_towards_the_features_of_the_clip(checkpointing, tiny, latents):
    """Adam's steps lower their loss, with and without gradient checkpointing; the network's weights
    get no gradient."""
    x, text = sampler.seeded_randn(latents.shape[1:], [0]), tiny.encode_text(["a red star"])
    target = generate.frame_features(tiny, latents, 100, text)

    def loss(x):
        got = generate.frame_features(tiny, x, 100, text)
        return sum(generate.pairwise_differences_loss(*pair) for pair in zip(got, target)).item()

    tiny.unet.checkpointing = checkpointing
    try:
        moved = generate.optimize_latents(tiny, x, 100, text, target, 0.007)
    finally:
        tiny.unet.checkpointing = False
    assert loss(moved) < 0.99 * loss(x) and 0 < (moved - x).abs().max() <= 0.08
    assert all(p.grad is None for p in tiny.unet.parameters())


def test_low_frequencies_keep_coarse_detail_and_drop_fine_detail():
    fine = torch.ones(16, 16)
    fine[::2] = -1
    coarse = torch.linspace(-1, 1, 16).expand(16, 16)
    low = generate.low_frequencies((coarse + fine).expand(1, 2, 3, 16, 16))
    assert (low[..., 2:-2, 2:-2] - coarse[2:-2, 2:-2]).abs().max() < 0.2
    x = torch.randn(1, 2, 3, 16, 16)

    def twice(aligned):  # the published code has align_corners=True
        to = lambda x, size: torch.nn.functional.interpolate(
            x, size, mode="bilinear", align_corners=aligned, antialias=True)
        return to(to(x[0], (4, 4)), (16, 16))

    assert torch.allclose(generate.low_frequencies(x)[0], twice(True), atol=1e-6)
    assert relative(twice(False), twice(True)) > 0.2


def test_a_step_down_and_up_returns_to_its_noise_level():
    """With the true noise as prediction, √ᾱ·x0 and the noise's variance stay."""
    S, t = sampler.NoiseSchedule(), 501
    x0 = torch.full((1, 4, 8, 32, 32), 2.0)
    eps = sampler.seeded_randn(x0.shape[1:], [1])
    x = S.add_noise(x0, eps, t)
    back = generate.step_down_and_up(S, lambda x, t: eps, x, t, 50, sampler.generator(0, 4))
    a = S.alpha_bar_at(t, x)
    noise = (back - a**0.5 * x0) / (1 - a) ** 0.5
    assert noise.mean().abs() < 0.02 and noise.std().item() == pytest.approx(1, abs=0.02)
    assert 0 < (noise * eps).mean() < 0.999  # part of it is fresh


def transfer(tiny, latents, s):
    s.args.caption = "a thing hopping"
    list(generate.transfer_motion(s.args, s.s, tiny, [], [("a star", 0)], latents))


def test_the_first_steps_are_optimized_towards_the_clip_at_their_timestep(tiny, hop, latents,
                                                                         monkeypatch):
    s, calls = resolved(tiny, "--dmt", hop, "--steps", 5, "--frames", FRAMES), []
    monkeypatch.setattr(generate, "optimize_latents", lambda pipe, x, t, text, target, rate: (
        calls.append((t, target)), x)[1])
    transfer(tiny, latents, s)
    inverted, source = {}, tiny.encode_text(["a thing hopping"])
    sampler.invert(tiny, latents, 5, "a thing hopping", lambda t, x: inverted.update({t: x}))
    assert [t for t, _ in calls] == tiny.schedule.timesteps(5)[:2]
    for t, target in calls:
        assert torch.equal(target[0], generate.frame_features(tiny, inverted[t], t, source)[0])


def test_dmt_starts_from_the_noise_of_the_inversion_at_the_first_timestep(tiny, hop, latents,
                                                                         monkeypatch):
    """Coarse detail is that of the clip's inverted noise, wherever the inversion ended."""
    s = resolved(tiny, "--dmt", hop, "--steps", 2, "--inversion-steps", 5, "--negative-prompt", "x")
    S, starts = replace(tiny.schedule, timestep_spacing="leading"), []
    first, top = S.timesteps(2)[0], S.timesteps(5)[0]
    eps = sampler.seeded_randn(latents.shape[1:], [sampler.generator(3)])
    monkeypatch.setattr(tiny, "schedule", S)
    monkeypatch.setattr(sampler, "sample", lambda m, p, start, *a, negative, **k: (
        starts.append((start, negative)), [0])[1])

    def invert(pipe, clip, steps, prompt, on_step, progress):
        for t in S.timesteps(steps):
            on_step(t, clip)
        return S.add_noise(clip, eps, top)

    monkeypatch.setattr(sampler, "invert", invert)
    transfer(tiny, latents, s)
    expected = generate.low_frequencies(S.add_noise(latents, eps, first))
    noise = sampler.seeded_randn(latents.shape[1:], [0])
    assert first < top
    (start, negative), = starts
    assert relative(start, noise - generate.low_frequencies(noise) + expected) < 1e-4
    assert negative == "x"


def test_the_command_transfers_a_motion(hop, bars, tmp_path):
    make("--dmt", hop, "--prompt", "a red star", "--steps", 4, "--inversion-steps", 8, "--out",
         tmp_path, "--frames", FRAMES)
    assert len(videos_of(tmp_path)) == 1
    assert bars == {"inverting": 8, "transferring the motion": 4}


# ------------------------------------------------------------------------------------------------
# Errors


VAE_FILE = TINY / "vae" / "diffusion_pytorch_model.safetensors"
EIGHT = str(ROOT / "assets" / "eight.mp4")
X = ["--prompt", "x"]


@pytest.mark.parametrize("argv,message", [
    ([], "--prompt"),
    (["--prompts", "{p}/none.txt"], "none.txt"),
    (["--prompts", "{p}/empty.txt"], "empty.txt"),
    (["--prompts", "{p}/latin.txt"], "latin.txt"),
    (["--prompts", "{p}"], "cannot be used"),
    ([*X, "--prompts", "{p}/empty.txt"], "--prompt"),
    (["--prompt", " "], "--prompt: the text is empty"),
    (["--prompt", "a", "bird", "flies"], "'bird' belongs to no flag"),
    (["--promt", "x"], "belongs to no flag; did you mean --prompt"),
    ([*X, "--size", "100000x64"], "WIDTHxHEIGHT"),
    ([*X, "--size", "60x64"], "multiples of 8"),
    ([*X, "--frames", "0"], "1 to 1024"),
    ([*X, "--steps", "9" * 400], "1 to 10000"),
    ([*X, "--guidance", "nan"], "--guidance: nan"),
    ([*X, "--seed", "-1"], "--seed: -1"),
    ([*X, "--steps"], "--steps: expected one argument"),
    ([*X, "--noise-prior", "2"], "0 to 1"),
    ([*X, "--sampler", "ddmi"], "--sampler: invalid choice"),
    ([*X, "--save-merged", "{p}/m.safetensors"], "a new folder, or of a .pth"),
    ([*X, "--dmt", "{a}", "--noise-prior", "1"], "--dmt has its own start"),
    ([*X, "--adapter", "{a}", "--scale", "1", "2"], "2 numbers for 1"),
    ([*X, "--scale", "2"], "--scale requires --adapter"),
    ([*X, "--strength", "0"], "--strength requires --refine"),
    ([*X, "--weights", "org/name"], "hf download org/name --local-dir name"),
    ([*X, "--weights", "https://huggingface.co/org/name"], "hf download org/name --local-dir name"),
    ([*X, "--weights", "hf.co/org/name"], "hf download org/name"),
    ([*X, "--weights", "zeroscope_v2_576w"],
     "hf download cerspense/zeroscope_v2_576w --local-dir zeroscope_v2_576w"),
    ([*X, "--weights", "/nowhere/at/all"], "is not a local folder"),
    ([*X, "--refine", "https://example.com/x"], "--refine: .* is not a local folder"),
    ([*X, "--weights", "{p}/empty.txt"], "is not a local folder"),
    ([*X, "--dmt", "{p}/none.mp4"], "none.mp4 does not exist"),
    ([*X, "--out", "{p}/empty.txt"], "empty.txt"),
    ([*X, "--out", "{p}"], "is not empty; give a new folder"),
    ([*X, "--device", "toaster"], "cannot be used"),
    ([*X, "--device", "meta"], "cannot be used"),
    ([*X, "--device", "privateuseone"], "cannot be used")])
def test_errors_before_anything_is_loaded(argv, message, tmp_path, adapter, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes("ein Stück".encode("latin-1"))
    monkeypatch.setattr(generate, "load", lambda *a, **k: pytest.fail("loaded"))
    argv = [a.format(p=tmp_path, a=adapter) for a in argv]
    argv += [] if "--out" in argv else ["--out", tmp_path / "o"]
    expect_error(argv, message, capsys, generate.main)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("argv,message", [
    (["--prompt", "x " * 100], "Shorten it"),
    ([*X, "--negative-prompt", "x " * 100], "Shorten it"),
    ([*X, "--adapter", "{p}/none.safetensors"], "none.safetensors"),
    ([*X, "--adapter", "{p}"], "cannot be used"),
    ([*X, "--adapter", "{p}/broken.safetensors"], "cannot be used"),
    ([*X, "--adapter", "{p}/changed.safetensors"], "checksum is wrong"),
    ([*X, "--adapter", "{p}/other.safetensors"], "was trained on"),
    ([*X, "--adapter", str(VAE_FILE)], "match no layer"),
    ([*X, "--adapter", "{a}", "--size", "128x64"], "drop --frames and --size"),
    ([*X, "--adapter", "{a}", "--frames", "9"], "drop --frames and --size"),
    ([*X, "--noise-prior", "0.5"], "--noise-prior: sampling starts from a clip"),
    ([*X, "--steps", "2000"], "1 to 699"),
    ([*X, "--adapter", "{a}", "--inversion-steps", "2000"], "1 to 699"),
    ([*X, "--dmt", EIGHT, "--inversion-steps", "2000"], "1 to 699"),
    ([*X, "--dmt", EIGHT, "--frames", "2"], "a higher --fps or --frames"),
    ([*X, "--inversion-steps", "20"], "no effect with a noise prior of 0"),
    ([*X, "--adapter", "{a}", "--init-video", EIGHT, "--noise-prior", "0"], "no effect"),
    ([*X, "--adapter", "{a}#²"], "cannot be used"),
    ([*X, "--refine", str(TINY), "--refine-steps", "2000"], "refine-steps 2000"),
    ([*X, "--weights", "{p}"], "{p}")])
def test_errors_before_anything_is_sampled(argv, message, adapter, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.safetensors").write_bytes(adapter.read_bytes()[:-50])
    (tmp_path / "changed.safetensors").write_bytes(adapter.read_bytes()[:-50] + bytes(50))
    save_file(load_file(adapter), tmp_path / "other.safetensors",
              {"format": adapters.FORMAT, "base": "0" * 12})
    monkeypatch.setattr(sampler, "sample", lambda *a, **k: pytest.fail("sampled"))
    monkeypatch.setattr(sampler, "invert", lambda *a, **k: pytest.fail("inverted"))
    argv = [a.format(p=tmp_path, a=adapter) for a in argv]
    argv += ["--out", tmp_path / "o"]
    expect_error(argv, message.format(p=tmp_path), capsys, generate.main)
    assert not (tmp_path / "o").exists()


def test_sizes_are_read_from_text():
    assert read_size("576x320") == read_size("576×320") == (320, 576)
    for text in ("576", "x", "576x320x3", "0x64", "-8x64", "4104x64", "９６x９６"):
        with pytest.raises(BadInput, match="WIDTHxHEIGHT"):
            read_size(text)
