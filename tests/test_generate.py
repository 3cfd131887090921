"""generate.py as a person runs it, on the tiny model in a few steps; its settings, sets on disk,
refining, Diffusion Motion Transfer; and the mistakes that it answers."""
import json
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, relative
from safetensors.torch import load_file, save_file

import generate
import lora
import model
import sampler
import train
from support import adapter_file, dmt, flags, machine, media, prompts, sets
from support.files import BadInput, check_folder_out, check_weights, read_size
from support.recipe import METHODS
from tiny import world


def run(script, *flags, check=True, **more):
    done = subprocess.run([sys.executable, ROOT / script, *map(str, flags)], capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, **more)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def make(*flags):
    generate.main([str(f) for f in flags])


def videos_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.mp4")}


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A hopping square, with its caption beside it."""
    folder = tmp_path_factory.mktemp("clips")
    scenes = world.sample_scenes(1, torch.Generator().manual_seed(3), ("hopping",))
    media.write_video(folder / "hop.mp4", world.render(scenes)[0], world.FPS)
    (folder / "hop.txt").write_text("a thing hopping")
    return folder / "hop.mp4"


FRAMES = 6  # enough to see what is said below, and fast


def write_adapter(path, clip, factor=1.05, **meta):
    """What VMC would have learned if all it trains had grown by a factor."""
    network = model.load(TINY)
    learner = lora.Whole(network.unet, "temporal-attention-qkv")
    for p in learner.chosen.values():
        p.data = p.data * factor
    latents = network.encode(media.read_video(clip, FRAMES, (64, 64), 8)[None])[0] if clip else None
    own = {"method": "vmc", "base": adapter_file.fingerprint(network.unet), "base_name": "tiny",
           "prompt": "a thing hopping", "fps": 8, "noise_prior": 1, "guidance": 3, "step": 7,
           "sampling_steps": 3, "sampler": "ddim", "inverts": "tuned", "inversion_steps": 0}
    adapter_file.save_adapter(path, [learner], latents, **own | meta)
    return path


@pytest.fixture(scope="session")
def adapter(clip, tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapter") / "vmc.safetensors", clip)


def settled(tiny, *flags):
    """The Settings of a command line, on the tiny model."""
    args = generate.parse([str(f) for f in ("--prompt", "a red star", *flags)])
    generate.check(args)
    adapters = [adapter_file.read_adapter(path, tiny.unet) for path in args.adapter]
    return generate.settle(args, tiny, adapters)[0]


# ------------------------------------------------------------------------------------------------
# The command


def test_a_set_has_a_sheet_and_settings(adapter, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("a green ring hopping\n\n../../escape <b>\n")
    printed = run("generate.py", "--adapter", adapter, "--prompts", lines, "--seeds", 2,
                  "--steps", 3, "--style", "in blue", "--out", tmp_path / "set").stdout
    names = sorted(p.name for p in (tmp_path / "set").iterdir())
    assert len([n for n in names if n.endswith(".mp4")]) == 4
    assert {"sheet.png", "settings.json"} <= set(names)
    settings = json.loads((tmp_path / "set" / "settings.json").read_text())
    assert settings["init"] == "inverted" and settings["steps_trained"] == 7
    assert [row[0] for row in settings["videos"]] == sorted(n for n in names if ".mp4" in n)
    assert settings["videos"][3][1:] == ["../../escape <b> in blue", 1]
    assert {p.name for p in tmp_path.iterdir()} == {"prompts.txt", "set"}
    layers = len(lora.select(model.load_unet(TINY), "temporal-attention-qkv"))
    assert f"{layers} layers change by ‖ΔW‖/‖W‖ = 0.05 (scale 1)" in printed


def test_other_starts_and_samplers_make_other_videos(adapter, tmp_path):
    made = set()
    for i, more in enumerate([
            "", "--init noise", "--noise-prior 0.5", "--init noise --sampler dpm", "--sampler ddpm",
            "--frames 5 --size 48x80 --init noise"]):
        make("--adapter", adapter, "--prompt", "a red star", "--steps", 2, "--out",
             tmp_path / str(i), *more.split())
        made |= set(videos_of(tmp_path / str(i)).values())
        assert len(made) == i + 1, more
    name, = videos_of(tmp_path / "5")
    _, pictures = zip(*media.decode(tmp_path / "5" / name))
    assert len(pictures) == 5 and pictures[0]().shape == (240, 144, 3)


@pytest.mark.parametrize("more,prior", [((), 1), (("--noise-prior", "0.5"), 0.5),
                                        (("--init", "noise"), 0)])
def test_samples_start_as_asked_and_show_not_what_is_negative(more, prior, adapter, tmp_path,
                                                              monkeypatch):
    """√p·inverted + √(1−p)·noise; the negative prompt stands where the empty one would."""
    inverted, seen = torch.randn(8, FRAMES, 8, 8), {}
    invert = sampler.ddim_inversion
    monkeypatch.setattr(sampler, "ddim_inversion", lambda *a, on_step, **k: invert(
        *a, on_step=lambda t, x: on_step(t, inverted[None]), **k))
    read = model.Model.read
    monkeypatch.setattr(model.Model, "read", lambda self, texts: (
        seen.setdefault("read", []).extend(texts), read(self, texts))[1])
    sample = sampler.sample
    monkeypatch.setattr(sampler, "sample", lambda whole, texts, start, *a, **k: (
        seen.update(start=start[0]), sample(whole, texts, start, *a, **k))[1])
    make("--adapter", adapter, "--prompt", "a red star", "--negative", "a blue ring", "--steps", 1,
         "--out", tmp_path, *more)
    noise = sampler.noise_like_shape((8, FRAMES, 8, 8), [0])[0]
    torch.testing.assert_close(seen["start"], prior**0.5 * inverted + (1 - prior)**0.5 * noise)
    assert seen["read"][-2:] == ["a red star", "a blue ring"]


def test_another_clip_than_the_adapters_can_start_it(adapter, clip, tmp_path):
    """Another clip, another start."""
    still = tmp_path / "still.mp4"
    frame = media.read_video(clip, 16, (64, 64), 8)[:, :1]
    media.write_video(still, frame.expand(3, 16, 64, 64), 8)
    same = ("--adapter", adapter, "--prompt", "a red star", "--steps", 2, "--precision", "fp32")
    for name, more in (("own", ()), ("other", ("--init-video", still))):
        make(*same, *more, "--out", tmp_path / name)
    own, other = (videos_of(tmp_path / name) for name in ("own", "other"))
    assert own.keys() == other.keys() and own != other


@pytest.mark.parametrize("method,alike", [("ddim", True), ("ddpm", False)])
def test_seeds_differ_from_the_inverted_start_by_ddpm_alone(method, alike, clip, tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", clip, sampler=method)
    make("--adapter", path, "--prompt", "a red star", "--seeds", 2, "--out", tmp_path / "set")
    one, two = videos_of(tmp_path / "set").values()
    assert (one == two) == alike
    settings = json.loads((tmp_path / "set" / "settings.json").read_text())
    assert (settings["sampler"], settings["steps"], settings["guidance"]) == (method, 3, 3)


def test_a_video_is_the_same_whatever_is_made_beside_it(tmp_path):
    """To the bit on a CPU at its own precision, refined or not."""
    same = ("--steps", 2, "--frames", 4, "--refine", TINY, "--refine-steps", 4, "--strength", 0.5)
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\n")
    make("--prompts", tmp_path / "prompts.txt", "--seeds", 2, "--batch", 4, *same,
         "--out", tmp_path / "many")
    make("--prompt", "a blue ring", "--seed", 1, "--batch", 1, *same, "--out", tmp_path / "one")
    many, one = videos_of(tmp_path / "many"), videos_of(tmp_path / "one")
    assert len(many) == 4 and one["000-a-blue-ring-seed1.mp4"] == many["001-a-blue-ring-seed1.mp4"]


def test_in_one_batch_a_video_is_the_same_but_for_its_last_bits(tiny):
    """What a GPU's --batch does: sums are rounded otherwise, by 1e-4 of a picture's range at most.
    """
    texts, seeds = ["a red star"] * 4, [6, 7, 8, 9]
    noise = sampler.noise_like_shape((8, 4, 8, 8), seeds)
    many = sampler.sample(tiny, texts, noise, seeds, steps=3, method="ddpm")
    one = sampler.sample(tiny, texts[:1], noise[1:2], seeds[1:2], steps=3, method="ddpm")
    assert (many[1] - one[0]).abs().max() <= 1e-4


def test_a_merged_model_is_kept_in_both_layouts(adapter, tmp_path):
    """As fp16, in which the hub keeps weights; no prompt is needed."""
    make("--adapter", adapter, "--save", tmp_path / "merged")
    make("--adapter", adapter, "--save", tmp_path / "merged.pth")
    kept = model.load(tmp_path / "merged")
    assert (tmp_path / "merged.pth").is_file() and {p.name for p in tmp_path.iterdir()} == {
        "merged", "merged.pth"}
    own, base = dict(kept.unet.named_parameters()), dict(model.load_unet(TINY).named_parameters())
    learned = adapter_file.read_adapter(adapter).tensors
    for name, p in own.items():
        want = learned.get(name, base[name])
        assert torch.allclose(p, want, rtol=1e-3, atol=1e-6), name
    assert any(not torch.equal(own[name], base[name]) for name in learned)
    with pytest.raises(BadInput, match="name of a new folder"):
        make("--adapter", adapter, "--save", tmp_path / "merged")


def test_two_processes_make_what_one_does(adapter, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\na green cross\n")
    same = ("--adapter", adapter, "--prompts", tmp_path / "prompts.txt", "--steps", 2)
    run("generate.py", *same, "--out", tmp_path / "one")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         ROOT / "generate.py", *map(str, same), "--out", tmp_path / "two"],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("settings:") == 1
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert len(names) == 5 and names == sorted(p.name for p in (tmp_path / "two").iterdir())
    for name in set(names) - {"settings.json"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_help_names_every_flag():
    printed = run("generate.py", "--help").stdout
    assert "python generate.py --prompt" in printed
    code = (ROOT / "generate.py").read_text()
    for name in vars(generate.parse([])):
        assert re.search(rf"--{name.replace('_', '-')}\b(?!-)", printed), name
        assert re.search(rf"args\.{name}\b", code) or f'"{name}":' in code, f"nothing reads {name}"


# ------------------------------------------------------------------------------------------------
# The settings


def test_settings_are_frozen_and_hold_no_more_than_json(tiny, adapter):
    s = settled(tiny, "--adapter", adapter)
    with pytest.raises(FrozenInstanceError):
        s.steps = 4
    assert json.loads(json.dumps(vars(s))) == vars(s)


def test_flags_win_over_the_adapter_and_that_over_the_defaults(tiny, adapter, clip, tmp_path):
    plain = settled(tiny)
    assert (plain.steps, plain.guidance, plain.sampler, plain.init) == (50, 4, "ddim", "noise")
    assert settled(tiny, "--adapter", adapter).frames == FRAMES
    assert (plain.frames, plain.height, plain.width, plain.fps) == (16, 64, 64, 8)
    own = settled(tiny, "--adapter", adapter)
    assert (own.steps, own.guidance, own.init, own.noise_prior) == (3, 3, "inverted", 1)
    assert (own.inversion_steps, own.steps_trained, own.clip) == (3, 7, str(adapter))
    flags = settled(tiny, "--adapter", adapter, "--steps", 5, "--guidance", 0, "--fps", 12,
                    "--noise-prior", 0.25, "--sampler", "ddpm")
    assert (flags.steps, flags.guidance, flags.fps, flags.inversion_steps) == (5, 0, 12, 5)
    assert (flags.noise_prior, flags.sampler) == (0.25, "ddpm")
    look = write_adapter(tmp_path / "look.safetensors", None)  # first, but it has no clip
    both = settled(tiny, "--adapter", look, adapter, "--scale", 0.5)
    assert both.clip == str(adapter) and both.scale == [0.5, 0.5] and both.init == "inverted"
    assert settled(tiny, "--adapter", look).init == "noise"
    assert settled(tiny, "--init-video", clip).noise_prior == 1


def test_the_inversion_has_its_own_steps_and_its_own_model(clip, tmp_path, monkeypatch):
    """MotionDirector inverts with the base in 50 steps, and samples in 30."""
    path = write_adapter(tmp_path / "md.safetensors", clip, inverts="base", inversion_steps=4,
                         factor=1.5)
    seen, invert = [], sampler.invert
    name = next(iter(adapter_file.read_adapter(path).tensors))
    original = dict(model.load_unet(TINY).named_parameters())[name]

    def spy(network, latents, steps, *more):
        weight = dict(network.unet.named_parameters())[name]
        seen.append((steps, torch.equal(weight, original)))
        return invert(network, latents, steps, *more)

    monkeypatch.setattr(sampler, "invert", spy)
    same = ("--adapter", path, "--prompt", "a red star", "--precision", "fp32")
    make(*same, "--out", tmp_path / "a")
    make(*same, "--steps", 2, "--out", tmp_path / "b")  # the steps of both
    make(*same, "--steps", 2, "--inversion-steps", 5, "--out", tmp_path / "c")
    tuned = write_adapter(tmp_path / "vmc.safetensors", clip, factor=1.5)
    make("--adapter", tuned, "--prompt", "a red star", "--precision", "fp32", "--out",
         tmp_path / "d")
    assert seen == [(4, True), (2, True), (5, True), (3, False)]


@pytest.mark.parametrize("name,text", [
    ("noise_prior", "abc"), ("noise_prior", "1.5"), ("sampling_steps", "-1"), ("guidance", "nan"),
    ("sampling_steps", "2.5"), ("fps", "0"), ("fps", "inf"), ("sampler", "magic"),
    ("inverts", "both"), ("inversion_steps", "-2"), ("step", "x"), ("sampling_steps", "700"),
    ("guidance", "1" * 5000),
])
def test_what_an_adapter_says_wrongly_is_refused_before_sampling(name, text, clip, tmp_path,
                                                                 monkeypatch, capsys):
    path = write_adapter(tmp_path / "a.safetensors", clip, **{name: text})
    monkeypatch.setattr(sampler, "sample", lambda *a, **k: pytest.fail("sampled"))
    monkeypatch.setattr(sampler, "invert", lambda *a, **k: pytest.fail("inverted"))
    says = "--steps 700: wanted" if text == "700" else f"says {name} = .*wanted"
    complain(["--adapter", path, "--prompt", "x", "--out", tmp_path / "o"], says, capsys)
    assert not (tmp_path / "o").exists()


def test_dpm_starts_from_an_inverted_clip_only_where_it_comes_back_to_it(tiny, clip):
    """The tiny model's trailing timesteps are the inversion's; ZeroScope's leading ones are not."""
    v = {"init": "inverted", "sampler": "dpm", "steps": 20, "inversion_steps": 20,
         "size": (64, 64)}
    generate.check_sampling(v, tiny)
    latents = tiny.encode(media.read_video(clip, FRAMES, (64, 64), 8)[None])
    start, apart = sampler.invert(tiny, latents, 8), []
    for method in ("ddim", "dpm"):
        back = sampler.sample(tiny, [""], start, [0], 8, 1.0, method)
        apart.append((back - tiny.decode(latents)).square().mean().item())
    assert apart[1] < 1.5 * apart[0]
    zeroscope = replace(tiny, schedule=sampler.Schedule())
    for other in ({"sampler": "ddim"}, {"sampler": "ddpm"}, {"init": "noise"}):
        generate.check_sampling(v | other, zeroscope)
    with pytest.raises(BadInput, match="would not come back"):
        generate.check_sampling(v, zeroscope)
    recipe = METHODS["vmc"].but("sampler=dpm")  # nor does a run begin whose samples would not
    train.check_recipe(recipe, tiny.schedule, 20)
    train.check_recipe(recipe.but("noise_prior=0"), zeroscope.schedule, 20)
    with pytest.raises(BadInput, match="would not come back"):
        train.check_recipe(recipe, zeroscope.schedule, 20)


def test_words_that_the_tiny_model_has_never_met_are_named(adapter, tiny, capsys):
    strange, known = prompts.strange_words("A red CAR zigzagging, on a Grey background!")
    assert strange == ["car", "zigzagging"] and {"red", "background", "an", "thing"} <= set(known)
    for scene in world.captions(world.sample_scenes(50, torch.Generator().manual_seed(0))):
        assert prompts.strange_words(scene)[0] == []
    settled(tiny, "--adapter", adapter, "--style", "hopping")  # the adapter was taught it
    assert "never met" not in capsys.readouterr().err
    settled(tiny, "--style", "hopping über")
    line, = capsys.readouterr().err.strip().splitlines()
    assert "never met hopping, über; it knows a, about, an" in line


# ------------------------------------------------------------------------------------------------
# Sets on disk


def test_a_set_is_never_replaced_unasked(tmp_path, capsys):
    same = ("--steps", 1, "--frames", 4, "--out", tmp_path / "set")
    make("--prompt", "a red star", *same)
    first = videos_of(tmp_path / "set")
    make("--prompt", "a blue ring", *same)
    make("--prompt", "a green cross", *same)
    assert "--overwrite" in capsys.readouterr().err
    assert videos_of(tmp_path / "set") == first
    assert list(videos_of(tmp_path / "set-3")) == ["000-a-green-cross-seed0.mp4"]
    (tmp_path / "set" / "mine.txt").write_text("mine")
    (tmp_path / "set" / "mine.mp4").write_text("mine")
    make("--prompt", "a cyan square", "--overwrite", *same)
    assert {p.name for p in (tmp_path / "set").iterdir()} == {
        "000-a-cyan-square-seed0.mp4", "settings.json", "sheet.png", "mine.txt", "mine.mp4"}


def test_nothing_is_removed_outside_a_set_or_that_it_does_not_list(tmp_path):
    folder, outside = tmp_path / "set", tmp_path / "outside.mp4"
    folder.mkdir()
    for path in (outside, folder / "b.mp4", folder / "unet.safetensors", folder / "a.mp4"):
        path.write_text("mine")
    rows = [["../outside.mp4", "", 0], [str(outside), "", 0], ["unet.safetensors", "", 0],
            ["a.mp4", "", 0], "b.mp4", [], [None], [3]]
    (folder / "settings.json").write_text(json.dumps({"videos": rows}))
    sets.remove(folder)
    assert outside.exists() and {p.name for p in folder.iterdir()} == {"b.mp4", "unet.safetensors"}


@pytest.mark.parametrize("overwrite", (False, True))
def test_a_folder_of_other_things_is_refused(overwrite, tmp_path):
    (tmp_path / "weights.safetensors").write_text("mine")
    with pytest.raises(BadInput, match="something else than a set"):
        sets.find_folder(tmp_path, overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]
    (tmp_path / "empty").mkdir()
    assert sets.find_folder(tmp_path / "empty", overwrite) == tmp_path / "empty"


def test_two_commands_that_begin_at_once_get_two_folders(tmp_path, monkeypatch):
    """The second finds the folder empty still, but the first takes it in that moment."""
    find, taken = sets.find_folder, []

    def late(out, overwrite):
        folder = find(out, overwrite)
        if not taken:
            taken.append(folder)
            folder.mkdir()
            (folder / "settings.json").write_text("{}")
        return folder

    monkeypatch.setattr(sets, "find_folder", late)
    assert sets.begin(tmp_path / "set", False, {"videos": []}) == tmp_path / "set-2"
    assert (tmp_path / "set" / "settings.json").read_text() == "{}"


# ------------------------------------------------------------------------------------------------
# Refining


def test_refining_resizes_and_keeps_what_strength_leaves(tiny):
    """Strength 0 is the VAE's round trip; more strength, more change."""
    video = world.render(world.sample_scenes(1, torch.Generator().manual_seed(2)), FRAMES)[0]
    r, change = generate.Refining("", 64, 64, 0.0, 10, 1.0), []
    for strength in (0.0, 0.3, 0.9):
        out = generate.refine(replace(r, strength=strength), tiny, video, "a thing", 0)
        change.append((out - video).abs().mean().item())
    assert change[0] < 0.05 and change[0] < change[1] < change[2]
    r = replace(r, height=128, width=96, strength=0.1)
    assert generate.refine(r, tiny, video, "a thing", 0).shape == (3, FRAMES, 128, 96)


# ------------------------------------------------------------------------------------------------
# Diffusion Motion Transfer


def test_its_settings_are_the_published_ones(tiny, clip, adapter, tmp_path, monkeypatch):
    s = settled(tiny, "--dmt", clip)
    assert (s.init, s.steps, s.inversion_steps, s.guidance, s.negative) == ("dmt", 50, 50, 4, "")
    assert s.inversion_prompt == "a thing hopping" and s.clip == str(clip)
    published = dmt.defaults(1000, tiny=False)
    assert [published[n] for n in ("inversion_steps", "guidance", "steps")] == [999, 10, 50]
    assert published["negative"].startswith("bad quality, distortions")
    assert (s.height, s.width) == (64, 64)
    with monkeypatch.context() as patched:  # of other weights
        patched.setattr(generate, "is_tiny", lambda weights: False)
        args = generate.parse(["--dmt", str(clip), "--prompt", "x"])
        v = generate.choose_values(args, tiny, [], None)
        assert (v["frames"], v["size"], v["guidance"]) == (24, (320, 576), 10)
        read = adapter_file.read_adapter(adapter, tiny.unet)
        assert generate.choose_values(args, tiny, [read], read)["size"] == (64, 64)
    assert len(dmt.pulled_timesteps(s, tiny)) == 20 and dmt.PULLS == 10
    given = settled(tiny, "--dmt", clip, "--inversion-steps", 9, "--dmt-prompt", "it hops",
                    "--negative", "blue", "--steps", 6)
    assert (given.inversion_steps, given.inversion_prompt, given.negative) == (9, "it hops", "blue")
    assert not given.checkpointing and settled(
        tiny, "--dmt", clip, "--checkpointing", "on").checkpointing


def test_pairwise_differences_by_hand():
    """Features that differ by a constant, or by scale, move alike: 0; reversed ones: 2."""
    g = torch.Generator().manual_seed(0)
    f = torch.randn(1, 5, 8, generator=g)
    loss = dmt.pairwise_differences_loss
    assert loss(f + torch.randn(1, 1, 8, generator=g), f).item() == pytest.approx(0, abs=1e-6)
    assert loss(3 * f, f).item() == pytest.approx(0, abs=1e-6)
    assert loss(-f, f).item() == pytest.approx(2, abs=1e-6)


def test_the_network_stops_at_the_last_layer_that_is_read(tiny):
    """The features are those of a whole pass; what comes after them is not computed."""
    x, text, after = sampler.noise_like_shape((8, 4, 8, 8), [0]), tiny.read(["a star"]), []
    hooks = [tiny.unet.conv_out.register_forward_pre_hook(lambda *_: after.append(1)),
             tiny.unet.conv_norm_out.register_forward_pre_hook(lambda *_: after.append(1))]
    got, whole = dmt.frame_features(tiny, x, 100, text), []
    assert not after and [tuple(f.shape) for f in got] == [(1, 4, 64)] * 2
    layers = [m for n, m in tiny.unet.named_modules() if re.fullmatch(dmt.LAYERS, n)]
    hooks += [m.register_forward_hook(lambda m, i, out: whole.append(out)) for m in layers]
    tiny.predict(x, 100, text)
    for hook in hooks:
        hook.remove()
    for mine, theirs in zip(got, whole):
        assert torch.equal(mine[0], theirs.mean((2, 3)))


def test_it_reads_zeroscopes_layers_that_the_published_code_reads():
    from test_model import FULL_UNET

    with torch.device("meta"):
        unet = model.UNet(model.UNetConfig(**FULL_UNET))
    names = [n for n, _ in unet.named_modules() if re.fullmatch(dmt.LAYERS, n)]
    assert sorted(names) == ["up_blocks.1.resnets.1.conv2", "up_blocks.1.temp_convs.1",
                             "up_blocks.1.upsamplers.0"]


@pytest.mark.parametrize("checkpointing", (False, True))
def test_it_pulls_features_towards_the_reference(checkpointing, tiny, clip):
    """Adam's steps lower the loss that they minimise, with activations kept or computed again; the
    network's own weights get no gradient."""
    latents = tiny.encode(media.read_video(clip, FRAMES, (64, 64), 8)[None])
    x, text = sampler.noise_like_shape(latents.shape[1:], [0]), tiny.read(["a red star"])
    want = dmt.frame_features(tiny, latents, 100, text)

    def loss(x):
        got = dmt.frame_features(tiny, x, 100, text)
        return sum(dmt.pairwise_differences_loss(*pair) for pair in zip(got, want)).item()

    tiny.unet.checkpointing = checkpointing
    try:
        pulled = dmt.pull(tiny, x, 100, text, want, 0.007)
    finally:
        tiny.unet.checkpointing = False
    assert loss(pulled) < 0.99 * loss(x) and 0 < (pulled - x).abs().max() <= 0.08
    assert all(p.grad is None for p in tiny.unet.parameters())


def test_low_frequencies_keep_what_is_coarse_and_drop_what_is_fine():
    fine = torch.ones(16, 16)
    fine[::2] = -1
    coarse = torch.linspace(-1, 1, 16).expand(16, 16)
    low = dmt.low_frequencies((coarse + fine).expand(1, 2, 3, 16, 16))
    assert (low[..., 2:-2, 2:-2] - coarse[2:-2, 2:-2]).abs().max() < 0.2
    x = torch.randn(1, 2, 3, 16, 16)
    two = torch.nn.functional.interpolate
    more = {"mode": "bilinear", "align_corners": True, "antialias": True}
    published = two(two(x[0], (4, 4), **more), (16, 16), **more)  # align_corners=True, as its code
    assert torch.allclose(dmt.low_frequencies(x)[0], published, atol=1e-6)
    assert relative(two(two(x[0], (4, 4), **more | {"align_corners": False}), (16, 16),
                        **more | {"align_corners": False}), published) > 0.2


def test_a_restart_comes_back_to_its_level():
    """With the true noise as prediction, √ᾱ·x0 is what it was, and the noise's variance."""
    S, steps, t = sampler.Schedule(), 50, 501
    x0 = torch.full((1, 4, 8, 32, 32), 2.0)
    eps = sampler.noise_like_shape(x0.shape[1:], [1])
    x = S.add_noise(x0, eps, t)
    back = dmt.restart(S, lambda x, t: eps, x, t, steps, sampler.generator(0, 4))
    a = S.at(t, x)
    noise = (back - a**0.5 * x0) / (1 - a) ** 0.5
    assert noise.mean().abs() < 0.02 and noise.std().item() == pytest.approx(1, abs=0.02)
    assert 0 < (noise * eps).mean() < 0.999  # some of it is fresh


def test_an_inverted_clip_is_kept_at_every_level(tiny, adapter, clip):
    """What samples start from is the noisiest, which is what an inversion gives."""
    s = settled(tiny, "--adapter", adapter)
    latents = tiny.encode(media.read_video(clip, FRAMES, (64, 64), 8)[None])
    path = generate.invert_clip(s, tiny, latents)
    assert torch.equal(path[max(path)], sampler.invert(tiny, latents, s.inversion_steps))


def test_a_size_that_is_not_square_is_the_clips(tiny, tmp_path):
    path, learner = tmp_path / "wide.safetensors", lora.Whole(tiny.unet, "temporal-attention-qkv")
    adapter_file.save_adapter(path, [learner], torch.zeros(8, 4, 5, 9), noise_prior=1,
                              base=adapter_file.fingerprint(tiny.unet))
    s = settled(tiny, "--adapter", path)
    assert (s.height, s.width, s.frames) == (40, 72, 4)


def test_refining_goes_over_the_last_steps_with_the_second_model(tiny, monkeypatch):
    seen, predict = [], model.Model.predict
    monkeypatch.setattr(model.Model, "predict", lambda self, x, t, *more: (
        seen.append((self, t)), predict(self, x, t, *more))[1])
    second = replace(tiny)
    video = world.render(world.sample_scenes(1, torch.Generator().manual_seed(2)), 4)[0]
    generate.refine(generate.Refining("", 64, 64, 0.3, 10, 1.0), second, video, "a thing", 0)
    assert [t for _, t in seen] == tiny.schedule.timesteps(10)[-3:]
    assert all(model is second for model, _ in seen)


def test_the_first_steps_are_pulled_to_what_the_clip_is_there(tiny, clip, monkeypatch):
    s, pulls = settled(tiny, "--dmt", clip, "--steps", 5, "--frames", FRAMES), []
    latents = tiny.encode(media.read_video(clip, FRAMES, (64, 64), 8)[None])
    path, source = generate.invert_clip(s, tiny, latents), tiny.read([s.inversion_prompt])
    monkeypatch.setattr(dmt, "pull", lambda model, x, t, text, want, rate: (
        pulls.append((t, want)), x)[1])
    dmt.transfer_motion(s, tiny, latents, path, "a star", 0)
    assert [t for t, _ in pulls] == tiny.schedule.timesteps(5)[:2]
    for t, want in pulls:
        assert torch.equal(want[0], dmt.frame_features(tiny, path[t], t, source)[0])


def test_the_command_transfers_a_motion(clip, bars, tmp_path):
    make("--dmt", clip, "--prompt", "a red star", "--steps", 4, "--inversion-steps", 8, "--out",
         tmp_path, "--frames", FRAMES)
    assert len(videos_of(tmp_path)) == 1
    assert bars == {"inverting": 8, "moving as the clip": 4}


def test_its_start_is_the_inversions_noise_at_the_first_steps_level(tiny, clip, monkeypatch):
    """Coarse detail is the clip's inverted noise, wherever the inversion ended."""
    s = settled(tiny, "--dmt", clip, "--steps", 2)
    S, g = tiny.schedule, sampler.generator(3)
    latents = tiny.encode(media.read_video(clip, 16, (64, 64), 8)[None])
    eps = sampler.noise_like_shape(latents.shape[1:], [g])
    starts = []
    monkeypatch.setattr(sampler, "sample", lambda m, p, start, *a, **k: starts.append(start) or [0])
    for top in (S.timesteps(2)[0], 699):
        dmt.transfer_motion(s, tiny, latents, {top: S.add_noise(latents, eps, top)}, "a star", 0)
    want = dmt.low_frequencies(S.add_noise(latents, eps, S.timesteps(2)[0]))
    noise = sampler.noise_like_shape(latents.shape[1:], [0])
    for start in starts:
        assert relative(start, noise - dmt.low_frequencies(noise) + want) < 1e-4


# ------------------------------------------------------------------------------------------------
# Mistakes


def complain(argv, says, capsys):
    """The command ends with exit code 2 and one line of complaint that says `says`."""
    with pytest.raises(SystemExit) as stop:
        machine.run(lambda: generate.main([str(f) for f in argv]))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and re.search(says, lines[-1]), lines
    assert len([line for line in lines if "error:" in line]) == 1
    assert "usage" not in "".join(lines)


VAE_FILE = TINY / "vae" / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("flags,says", [
    ([], "--prompt"),
    (["--prompts", "{p}/none.txt"], "does not exist"),
    (["--prompts", "{p}/empty.txt"], "holds no prompts"),
    (["--prompts", "{p}/latin.txt"], "not UTF-8"),
    (["--prompt", "x", "--prompts", "{p}/empty.txt"], "--prompt and --prompts exclude"),
    (["--prompt", " "], "--prompt: is empty"),
    (["--prompt", "\udcff"], "not UTF-8"),
    (["--prompt", "a", "bird", "flies"], 'in quotes: --prompt "a bird flies"'),
    (["--promt", "x"], "no --promt; did you mean --prompt"),
    (["--prompt", "x", "--width", "64"], "no --width; give --size WIDTHxHEIGHT"),
    (["--prompt", "x", "--lr", "1"], r"there is no --lr\. --help lists"),  # nothing learns here
    (["--prompt", "x", "--seed", "1", "2"], "'2' belongs to no flag; --seed takes one value"),
    (["--prompt", "x", "--style=in", "thin", "oil"], 'in quotes: --style "in thin oil"'),
    (["--prompt", "x", "--size", "100000x64"], "8 to 4096"),
    (["--prompt", "x", "--size", "60x64"], "multiples of 8"),
    (["--prompt", "x", "--size", "64"], "WIDTHxHEIGHT"),
    (["--prompt", "x", "--frames", "0"], "wanted a whole number, 1"),
    (["--prompt", "x", "--steps", "9" * 400], "wanted a whole number, 1 to 2"),
    (["--prompt", "x", "--guidance", "nan"], "--guidance: nan: wanted"),
    (["--prompt", "x", "--seed", "-1"], "--seed: -1: wanted"),
    (["--prompt", "x", "--noise-prior", "2"], "wanted a number, 0 to 1"),
    (["--prompt", "x", "--sampler", "ddmi"], "--sampler ddmi; did you mean ddpm"),
    (["--prompt", "x", "--strength", "0"], "--strength needs --refine"),
    (["--prompt", "x", "--dmt-prompt", "y"], "--dmt-prompt needs --dmt"),
    (["--prompt", "x", "--checkpointing", "on"], "--checkpointing needs --dmt"),
    (["--prompt", "x", "--scale", "1"], "--scale needs --adapter"),
    (["--prompt", "x", "--save", "{p}/m"], "--save needs --adapter"),
    (["--adapter", "{a}", "--save", "{p}/m.safetensors"], "a new folder, or of a .pth"),
    (["--prompts", "{p}"], "is no file"),
    (["--prompt", "x", "--dmt", "{p}/c.mp4", "--init", "noise"], "--dmt and --init exclude"),
    (["--prompt", "x", "--init", "noise", "--init-video", "{p}/c.mp4"], "uses no clip"),
    (["--prompt", "x", "--noise-prior", "0", "--init", "inverted"], "starts from noise"),
    (["--prompt", "x", "--adapter", "{a}", "--scale", "1", "2"], "2 numbers for 1"),
    (["--prompt", "x", "--weights", "cerspense/zeroscope_v2_576w"],
     "hf download cerspense/zeroscope_v2_576w --local-dir zeroscope_v2_576w"),
    (["--prompt", "x", "--refine", "https://example.com/x"], "--refine .* is an address"),
    (["--prompt", "x", "--refine", "zeroscope_v2_XL"],
     "hf download cerspense/zeroscope_v2_XL --local-dir zeroscope_v2_XL"),
    (["--prompt", "x", "--weights", "{p}/empty.txt"], "is a file"),
    (["--prompt", "x", "--adapter", "{p}/none.safetensors"], "none.safetensors does not exist"),
    (["--prompt", "x", "--adapter", "{p}/none.pt#2"], "none.pt does not exist"),
    (["--prompt", "x", "--adapter", "https://example.com/a.pt"], "is an address; download it"),
    (["--prompt", "x", "--dmt", "{p}/none.mp4"], "none.mp4 does not exist"),
    (["--prompt", "x", "--out", "{p}/empty.txt"], "is a file"),
    (["--prompt", "x", "--out", "{p}"], "something else than a set"),
    (["--prompt", "x", "--device", "toaster"], "cannot be used"),
])
def test_mistakes_are_told_before_anything_is_loaded(flags, says, tmp_path, adapter, monkeypatch,
                                                     capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes("ein Stück".encode("latin-1"))
    monkeypatch.setattr(generate, "load", lambda *a, **k: pytest.fail("loaded"))
    argv = [f.format(p=tmp_path, a=adapter) for f in flags]
    complain(argv if "--out" in argv else [*argv, "--out", tmp_path / "o"], says, capsys)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("flags,says", [
    (["--prompt", "x " * 100], "Shorten it"),
    (["--prompt", "x", "--negative", "x " * 100], "Shorten it"),
    (["--prompt", "x", "--adapter", "{p}/broken.safetensors"], "cannot be read|is not"),
    (["--prompt", "x", "--adapter", "{p}/other.safetensors"], "was trained on"),
    (["--prompt", "x", "--adapter", str(VAE_FILE)], "no place in this UNet"),
    (["--prompt", "x", "--adapter", "{a}", "--size", "128x64"], "leave --frames and --size"),
    (["--prompt", "x", "--adapter", "{a}", "--frames", "9"], "leave --frames and --size"),
    (["--prompt", "x", "--init", "inverted"], "--init inverted has no clip to invert"),
    (["--prompt", "x", "--noise-prior", "0.5"], "--noise-prior has no clip to invert"),
    (["--prompt", "x", "--inversion-steps", "5"], "nothing is inverted"),
    (["--prompt", "x", "--steps", "2000"], "wanted 1 to 699"),
    (["--prompt", "x", "--adapter", "{a}", "--inversion-steps", "2000"], "inversion-steps 2000"),
    (["--prompt", "x", "--refine", str(TINY), "--refine-steps", "2000"], "refine-steps 2000"),
    (["--prompt", "x", "--weights", "{p}"], "is missing"),
])
def test_mistakes_are_told_before_anything_is_sampled(flags, says, adapter, tmp_path, monkeypatch,
                                                      capsys):
    (tmp_path / "broken.safetensors").write_bytes(adapter.read_bytes()[:-50])
    meta = {"format": adapter_file.FORMAT, "base": "0" * 12}
    save_file(load_file(adapter), tmp_path / "other.safetensors", meta)
    monkeypatch.setattr(sampler, "sample", lambda *a, **k: pytest.fail("sampled"))
    monkeypatch.setattr(sampler, "invert", lambda *a, **k: pytest.fail("inverted"))
    argv = [f.format(p=tmp_path, a=adapter) for f in flags]
    complain([*argv, "--out", tmp_path / "o"], says, capsys)
    assert not (tmp_path / "o").exists()


def test_a_mistake_leaves_no_traceback(tmp_path):
    for argv in (("--prompts", tmp_path / "none.txt"), ("--promt", "x")):
        done = run("generate.py", *argv, check=False)
        assert done.returncode == 2 and done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("path,says", [
    ("org/name", "hf download org/name --local-dir name"),
    ("https://huggingface.co/org/name/tree/main", "hf download org/name --local-dir name"),
    ("hf.co/org/name", "hf download org/name"), ("https://x.org/a.zip", "is an address"),
    ("zeroscope_v2_576w", "hf download cerspense/zeroscope_v2_576w --local-dir zeroscope_v2_576w"),
    ("nothing", "is not a folder"), ("/nowhere/at/all", "is not a folder"), (__file__, "is a file"),
])
def test_weights_that_are_not_here_are_answered_with_the_way_to_them(path, says):
    with pytest.raises(BadInput, match=says):
        check_weights(path)
    check_weights(TINY)
    check_weights(None)


def test_sizes_and_folders_are_judged_as_text(tmp_path):
    assert read_size("576x320") == read_size("576×320") == (320, 576)
    for text in ("576", "x", "576x320x3", "0x64", "-8x64", "4104x64", "９６x９６"):
        with pytest.raises(BadInput, match="wanted"):
            read_size(text)
    check_folder_out(tmp_path / "not" / "yet")
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="is a file"):
        check_folder_out(tmp_path / "file" / "below")


def test_flags_are_answered_in_one_line(capsys):
    parser = flags.Parser(description="x")
    parser.add_argument("--steps", type=flags.whole(1, 9))
    parser.add_argument("--text", nargs="+")
    for argv, says in ((["--steps", "0"], "error: --steps: 0: wanted a whole number, 1 to 9."),
                       (["--steps"], "error: --steps: expected one argument"),
                       (["--steps", "--text"], "error: --steps: expected one argument\n"),
                       (["--steps", "-x"], "error: --steps: expected one argument; a value that "
                        "begins with a dash is written --steps=-…"),
                       (["--step", "3"], "error: there is no --step; did you mean --steps?"),
                       (["lost"], "error: 'lost' belongs to no flag")):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(argv)
        line, = capsys.readouterr().err.splitlines(keepends=True)
        assert stop.value.code == 2 and line.startswith(says)
    assert parser.parse_args(["--steps", "9"]).steps == 9
