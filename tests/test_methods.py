"""The methods of train.py: numbers, trainable layers, losses and data; and the interface that they
use."""
import re
from dataclasses import replace

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    expect_error,
    flags_of,
    log_of,
    prepare_run,
    run_training,
    same_weights,
)
from safetensors.torch import load_file, save_file

import generate
import lora
import losses
import model
import sampler
import train
from scores import clip as clips
from support import adapters, fast, formats, recipe, tokenizer
from support.files import BadInput
from support.recipe import method

METHODS = train.METHODS


def losses_of(run, step, number=0):
    """Yields (ex, loss) of one training example."""
    train.set_train_mode(run.pipe.unet, run.recipe)
    ex = train.Example(run, step, number)
    for loss in run.recipe.function(ex, **run.recipe.keywords):
        yield ex, loss


def parameters_of(run, *parts):
    return [p for part in parts for one in run.trainables[part] for p in one.parameters().values()]


def clear_gradients(parameters):
    for p in parameters:
        p.grad = None


# ------------------------------------------------------------------------------------------------
# Recipes


@pytest.mark.parametrize("name,numbers", [
    ("vmc", "steps=400 motion.lr=1e-4 motion.weight_decay=.01 max_grad_norm=1 noise_prior=1 "
            "frame_stride=1 loss=residual-cosine motion.layers=temporal-attention-qkv "
            "sampler=ddpm sampling_steps=75"),
    ("motiondirector", "steps=150 appearance.rank=32 motion.rank=32 appearance.lr=5e-4 "
                       "motion.lr=5e-4 appearance.dropout=.1 motion.dropout=.1 "
                       "appearance.per_video=on motion.per_video=off noise_prior=.5 beta=1 "
                       "spatial_prob=.8 guidance=12 sampling_steps=30 max_grad_norm=inf "
                       "inversion_model=base inversion_steps=50"),
    ("newmove", "steps=3000 motion.lr=5e-6 alpha=.5 prior_loss_weight=.5 max_grad_norm=1 "
                "motion.layers=temporal-and-cross-kv unet_dropout=off sampler=dpm "
                "augment=augmented"),
    ("customize-a-video", "appearance.rank=1 appearance.scale=.5 appearance.lr=5e-5 motion.rank=4 "
                          "motion.scale=1 motion.lr=5e-4 absorber_steps=200 "
                          "appearance.layers=spatial-attention"),
    ("coupled", "steps=150 motion.rank=32 motion.lr=5e-4 motion.layers=coupled loss=mse"),
    ("dreambooth", "steps=800 motion.lr=5e-6 motion.layers=spatial prior=generated "
                   "prior_loss_weight=1 unet_dropout=off sampler=dpm"),
    ("custom-diffusion", "steps=500 motion.lr=1e-5 word.num_vectors=1 prior=folder "
                         "motion.layers=cross-attention-kv unet_dropout=off sampler=dpm"),
    ("textual-inversion", "steps=3000 word.lr=5e-3 word.num_vectors=1 unet_dropout=off "
                          "sampler=dpm"),
    ("tune-a-video", "steps=500 motion.lr=3e-5 motion.layers=tune-a-video noise_prior=1 "
                     "guidance=12.5"),
])
def test_recipes_have_the_papers_numbers(name, numbers):
    assert METHODS[name].override(numbers) == METHODS[name]
    shape = {"vmc": (8, 320, 576), "customize-a-video": (16, 256, 256)}.get(name, (16, 384, 384))
    assert METHODS[name].shape == shape and METHODS[name].fps == (24 if name in (
        "newmove", "dreambooth", "custom-diffusion", "textual-inversion") else 8)
    assert {*train.TINY, *(name for name, _ in train.BY_DATA)} <= set(METHODS)


@pytest.mark.parametrize("name,given,settings", [
    ("newmove", ("--images", "thing.png"), {"steps": 2000, "subject.layers": "spatial"}),
    ("newmove", (), {"steps": 1000}),
    ("motiondirector", (), {"steps": 150, "noise_prior": 0.5, "appearance.weight_decay": 0.01}),
    ("motiondirector", ("--video", "videos"), {
        "steps": 500, "noise_prior": 0, "appearance.weight_decay": 1e-4,
        "motion.weight_decay": 1e-4}),
    ("coupled", ("--video", "videos"), {
        "steps": 500, "noise_prior": 0, "motion.weight_decay": 1e-4}),
    ("motiondirector", ("--images", "thing.png"), {
        "steps": 300, "motion.layers": "none", "appearance.per_video": False,
        "appearance.weight_decay": 1e-4}),
    ("motiondirector", ("--images", "thing.png", "again.png"), {
        "steps": 1000, "motion.layers": "none", "appearance.per_video": False}),
])
def test_data_and_base_model_change_a_recipe(name, given, settings, hop, folder, tmp_path):
    """The settings of the data apply first, then those of the tiny model."""
    clip = None if name == "motiondirector" and "--images" in given else hop
    given = [w if w.startswith("--") else folder / w for w in given]
    _, recipe = train.parse(flags_of(name, clip, tmp_path, "--weights", TINY, *given))
    assert settings.items() <= recipe.settings(idle=True).items()
    assert METHODS[name].parts["motion"].lr == recipe.parts["motion"].lr
    flags, recipe = train.parse(flags_of(name, clip, tmp_path, *given))
    assert flags.overrides[-1] == train.TINY[name]
    assert recipe.override(train.TINY[name]).parts == recipe.parts


def example(ex, weight=0.1):
    """A method.

    weight: a weight
    """


@pytest.mark.parametrize("settings,change,message", [
    ({"guidence": 4.0}, {}, "guidence"), ({}, {"__doc__": "A method."}, "weight"),
    ({}, {"__defaults__": None}, "weight"), ({}, {"__name__": "coupled"}, "two methods are named"),
    ({}, {"__doc__": None}, "method example: expected a docstring"),
])
def test_a_wrong_method_is_refused_when_it_is_defined(settings, change, message, monkeypatch):
    """Unknown arguments of the decorator, keywords without description or default, and a second
    method of the same name."""
    monkeypatch.setattr(recipe, "METHODS", dict(METHODS))
    with monkeypatch.context() as patched, pytest.raises(TypeError, match=message):
        for name, value in change.items():
            patched.setattr(example, name, value)
        method("a test", steps=1, **settings)(example)
    assert recipe.METHODS == METHODS
    method("a test", steps=1)(example)
    assert recipe.METHODS.keys() - METHODS.keys() == {"example"}


def test_a_method_without_a_number_of_steps_is_refused():
    with pytest.raises(TypeError, match="'steps' has no default"):
        method("a test")(example)


def test_a_method_can_start_from_the_settings_of_another(monkeypatch):
    """Settings that are not given are the other method's, and None removes one. Keywords belong to
    the function."""
    monkeypatch.setattr(recipe, "METHODS", dict(METHODS))
    part = lora.Trainable("temporal", lr=0.1)
    method("a test", like="motiondirector", steps=7, appearance=None, motion=part)(example)
    new, old = recipe.METHODS["example"], METHODS["motiondirector"]
    assert new.own == old.own | {"steps": 7} and new.parts == {"motion": part}
    assert (new.shape, new.fps, new.keywords) == (old.shape, old.fps, {"weight": 0.1})
    monkeypatch.setattr(example, "__name__", "other")
    method("a test", like="dreambooth", fps=5.0, prior=None)(example)
    new, old = recipe.METHODS["other"], METHODS["dreambooth"]
    assert "prior" not in new.own and new.parts == old.parts and new.fps == 5


@pytest.mark.parametrize("clips,message", [
    ((2, 2), "1 clips; example requires 2"), ((3, 5), "1 clips; example requires 3 to 5"),
    ((1, 1), ""), ((1, 5), ""),
])
def test_a_method_states_its_number_of_clips(clips, message, hop, tmp_path, monkeypatch, capsys):
    """Another number is refused in one line."""
    monkeypatch.setitem(METHODS, "example", replace(METHODS["coupled"], name="example",
                                                    clips=clips))
    argv = flags_of("example", hop, tmp_path / "out")
    if message:
        expect_error(argv, message, capsys)
    else:
        train.parse(argv)


def test_a_new_sampler_is_a_value_of_the_setting_and_of_the_flag(monkeypatch):
    monkeypatch.setitem(sampler.SAMPLERS, "new", sampler.SAMPLERS["ddim"])
    assert METHODS["vmc"].override("sampler=new").sampler == "new"
    assert generate.parse(["--prompt", "a red star", "--sampler", "new"]).sampler == "new"


def test_a_misspelled_setting_of_a_recipe_raises():
    assert METHODS["vmc"].sampler == "ddpm"
    with pytest.raises(AttributeError, match="samplr"):
        _ = METHODS["vmc"].samplr


# ------------------------------------------------------------------------------------------------
# Trainable parts and losses

TRAINS = {  # method: the parts that each loss trains, in order
    "vmc": [["motion"]], "motiondirector": [["appearance"], ["motion"]], "newmove": [["motion"]],
    "customize-a-video": [["appearance"], ["motion"]], "coupled": [["motion"]],
    "dreambooth": [["motion"]], "custom-diffusion": [["motion", "word"]],
    "textual-inversion": [["word"]], "tune-a-video": [["motion"]],
}


@pytest.mark.parametrize("name", TRAINS)
def test_each_loss_trains_its_own_parts_alone(name, hop, tmp_path):
    """Gradients are in the parts of the loss and nowhere else. Appearance bypasses all temporal
    layers."""
    more = {"customize-a-video": "absorber_steps=1", "motiondirector": "spatial_prob=1",
            "dreambooth": "--prior=world"}.get(name, "--seed=0")
    run = prepare_run(name, hop, tmp_path, more)
    everything = dict(run.pipe.unet.named_parameters()) | run.trained
    expected, ran = iter(TRAINS[name]), set()
    for layer, module in run.pipe.unet.named_modules():
        if re.fullmatch(r"transformer_in|.*\.temp_(attentions|convs)\.\d+", layer):
            module.register_forward_hook(lambda *_, layer=layer: ran.add(layer))
    for step in range(2 if name == "customize-a-video" else 1):
        for _, loss in losses_of(run, step):
            loss.backward()
            parts = next(expected)
            assert not ran if parts == ["appearance"] else {"transformer_in"} < ran
            ran.clear()
            got = {n for n, p in everything.items() if p.grad is not None}
            ids = {id(p) for p in parameters_of(run, *parts)}
            assert got and got <= {n for n, p in everything.items() if id(p) in ids}
            for part in parts:
                assert any(p.grad is not None for p in parameters_of(run, part))
            clear_gradients(everything.values())
    assert next(expected, None) is None


def mean_square(x):
    return x.square().mean().item()


def debiased(x, beta, anchor=1):
    return (beta**2 + 1) ** 0.5 * x - beta * x[:, :, anchor : anchor + 1]


def cosines(pred, target):
    pairs = [(x[:, :, 2:] - x[:, :, :-2]).transpose(1, 2).flatten(2) for x in (pred, target)]
    return torch.cosine_similarity(*pairs, dim=-1).mean().item()


def error(pair):
    return mean_square(pair[0] - pair[1])


FORMULAS = {  # method: settings, and its losses as its paper writes them, from [(pred, target), …]
    "vmc": (["frame_stride=2"], lambda e: [1 - cosines(*e[0])]),
    "motiondirector": (["beta=2", "spatial_prob=1"], lambda e: [
        error(e[0]), error(e[1]) + mean_square(debiased(e[1][0] - e[1][1], 2))]),
    "newmove": (["prior_loss_weight=0.25", "alpha=0.3"],
                lambda e: [error(e[0]) + 0.25 * error(e[1])]),
    "dreambooth": (["prior_loss_weight=0.25", "--prior=world"],
                   lambda e: [error(e[0]) + 0.25 * error(e[1])]),
    "custom-diffusion": (["prior_loss_weight=3"], lambda e: [error(e[0]) + 3 * error(e[1])]),
}


@pytest.mark.parametrize("name", TRAINS)
def test_each_loss_is_the_papers(name, hop, tmp_path, spy):
    """Of random predictions, with frame 1 as the anchor. NewMove alone prefers high noise, also for
    its regularization clips."""
    settings, expected = FORMULAS.get(name, ([], lambda e: [error(e[0])]))
    run = prepare_run(name, hop, tmp_path, *settings)
    ex, pairs, alphas = train.Example(run, 0, 0), [], []
    spy(sampler, "timestep_weights", lambda T, alpha: alphas.append(alpha))

    def predict(*noisy, loss_space="output"):
        new = [torch.randn(2, *z.x.shape, generator=ex.g).unbind() for z in noisy]
        pairs.extend(new)
        ex.records.append({})  # for ex.log
        return new[0] if len(new) == 1 else new

    ex.predict, ex.random_frame = predict, lambda z: 1
    got = [loss.item() for loss in run.recipe.function(ex, **run.recipe.keywords)]
    assert got == pytest.approx(expected(pairs), rel=1e-5)
    assert set(alphas) == {0.3 if name == "newmove" else 0}


@pytest.mark.parametrize("name", losses.LOSSES)
def test_vmc_can_use_every_loss(name, hop, tmp_path):
    run = prepare_run("vmc", hop, tmp_path, f"loss={name}", "loss_space=epsilon")
    (_, loss), = losses_of(run, 0)
    assert loss.isfinite() and loss > 0


def test_the_network_predicts_from_the_noised_clip_and_its_caption(hop, tmp_path):
    """x_t = √ᾱ·x0 + √(1−ᾱ)·ε. The next example of the step has other noise. Predictions convert to
    ε̂ = √ᾱ·v̂ + √(1−ᾱ)·x and x̂0 = √ᾱ·x − √(1−ᾱ)·v̂."""
    run = prepare_run("vmc", hop, tmp_path, "--precision", "fp32")
    ex, other = (train.Example(run, 3, number) for number in (0, 1))
    z = ex.add_noise(ex.next_clip())
    assert not torch.equal(z.noise, other.add_noise(other.next_clip()).noise)
    a = ex.alpha_bar(z)
    x = a**0.5 * run.clips[0].latents + (1 - a) ** 0.5 * z.noise
    torch.testing.assert_close(z.x, x)
    ex.train("motion")
    v, target = (t.detach() for t in ex.predict(z))
    text = run.pipe.encode_text([run.clips[0].prompt])
    torch.testing.assert_close(v, run.pipe.predict(x, z.t, text))
    torch.testing.assert_close(target, a**0.5 * z.noise - (1 - a) ** 0.5 * z.x0)
    x0, eps = a**0.5 * z.x - (1 - a) ** 0.5 * v, a**0.5 * v + (1 - a) ** 0.5 * z.x
    for space, pred, target in (("epsilon", eps, z.noise), ("x0", x0, z.x0)):
        got = ex.predict(z, loss_space=space)
        torch.testing.assert_close(got[0].detach(), pred, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[1], target)
    assert ex.add_noise(ex.next_clip(), t=7).t == 7


def test_a_step_is_the_mean_over_its_examples(hop, tmp_path, monkeypatch):
    """Two equal examples have the loss and the gradient of one."""
    real, steps = sampler.generator, []
    monkeypatch.setattr(sampler, "generator", lambda *key: real(*key[:2]))
    for batch in (1, 2):
        run_training("vmc", hop, tmp_path / str(batch), "--steps", 1, "--batch", batch)
        steps += log_of(tmp_path / str(batch))
    one, two = steps
    assert len(two["losses"]) == 2 and two["losses"][0] == two["losses"][1]
    assert two["loss"] == pytest.approx(one["loss"]) and one["grad"] > 0
    assert two["grad"] == pytest.approx(one["grad"], rel=1e-3)


def test_gradients_are_clipped_and_weights_decay(hop, tmp_path, spy):
    """The UNet's own dropout is on, except for NewMove and its baselines."""
    norms, modes = [], []

    def before_step(optimizer):
        squares = [p.grad.square().sum() for g in optimizer.param_groups for p in g["params"]]
        norms.append(sum(squares).sqrt().item())
        assert {g["weight_decay"] for g in optimizer.param_groups} == {0.2}

    spy(torch.optim.AdamW, "step", before_step)
    spy(model.UNet, "forward", lambda unet, *inputs, **more: modes.extend(
        m.training for m in unet.modules() if isinstance(m, torch.nn.Dropout)))
    run_training("vmc", hop, tmp_path / "v", "--steps", 2, "max_grad_norm=1e-3",
                 "motion.weight_decay=0.2")
    assert norms == pytest.approx([1e-3] * 2, rel=1e-2) and modes and all(modes)


def test_lora_dropout_is_on_where_newmove_turns_the_unets_own_off(hop, tmp_path, spy):
    seen = set()
    spy(fast, "dropout", lambda x, p, training: seen.add((p, training)))
    run_training("newmove", hop, tmp_path / "out", "--prior", "none", "--steps", 1,
                 "motion.rank=2", "motion.layers=temporal-attention", "motion.dropout=0.25")
    assert seen == {(0.1, False), (0.25, True)}


def test_learning_rates_per_layer(hop, tmp_path):
    run = prepare_run("vmc", hop, tmp_path, "motion.lr_multipliers=attn1:2,attn2:0.5",
                      "motion.lr=1e-3")
    optimizer = lora.build_optimizer(run.recipe.parts, run.trainables)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert {(re.search("attn.", n)[0], rates[id(p)]) for n, p in run.trained.items()} == {
        ("attn1", 2e-3), ("attn2", 5e-4)}
    for bad in ("conv_in:2", "attn1", "attn1:x", "(:2"):
        parts = run.recipe.override(f"motion.lr_multipliers={bad}").parts
        with pytest.raises(BadInput, match="lr_multipliers|regular expression"):
            lora.build_optimizer(parts, run.trainables)


# ------------------------------------------------------------------------------------------------
# Single methods


def test_motiondirectors_paths_share_noise_and_freeze_the_appearance(folder, tmp_path):
    """Each clip has its own spatial LoRA. It is active but frozen in the temporal path, unless the
    spatial path was skipped."""
    run = prepare_run("motiondirector", folder / "videos", tmp_path, "spatial_prob=0.5")
    spatial = run.trainables["appearance"]
    assert len(spatial) == 2 and len(run.trainables["motion"]) == 1
    for one in spatial:
        for _, B in one.pairs.values():
            B.data.normal_(0, 0.3)
    cases = {}
    for step in range(12):
        seen, active = [], []
        ex = train.Example(run, step, 0)
        ex.predict = lambda *z, seen=seen, **more: (seen.append(z[0]), z[0].noise, z[0].noise)[1:]
        for _ in run.recipe.function(ex, **run.recipe.keywords):
            active.append([one.active for one in spatial])
            trained = [any(p.requires_grad for p in one.parameters().values()) for one in spatial]
            assert trained == [i == ex.index and not seen[-1].temporal for i in range(2)]
        own = [i == ex.index for i in range(2)]
        assert ex.index == step % 2 and seen[-1].temporal
        assert active == ([own, own] if len(seen) == 2 else [[False, False]])
        if len(seen) == 2:
            frame, motion = seen
            assert frame.t == motion.t and frame.clip is motion.clip and frame.x.shape[2] == 1
            assert any(torch.equal(frame.x[:, :, 0], motion.x[:, :, f]) for f in range(4))
        cases[ex.index, len(seen)] = step
    assert len(cases) == 4
    last = lambda: [loss.item() for _, loss in losses_of(run, cases[0, 2])][-1]
    before = last()
    for _, B in spatial[0].pairs.values():
        B.data.zero_()
    assert last() != before


def test_motiondirector_skips_a_fifth_of_the_spatial_losses(hop, tmp_path):
    run = prepare_run("motiondirector", hop, tmp_path)
    counts = []
    for step in range(400):
        ex = train.Example(run, step, 0)
        ex.predict = lambda *z, **more: (z[0].noise, z[0].noise)
        counts.append(len(list(run.recipe.function(ex))))
    assert set(counts) == {1, 2} and abs(counts.count(2) / 400 - 0.8) < 0.06


def test_motiondirector_trains_on_images_alone(folder, tmp_path):
    run_training("motiondirector", None, tmp_path / "o", "--images", folder / "thing.png",
                 "--prompt", "a star", "--steps", 2)
    path, = (tmp_path / "o").glob("*-appearance*.safetensors")
    names = [n for n in load_file(path) if n != adapters.CLIP]
    assert path.name == "motiondirector-appearance.safetensors" and len(load_file(path)) > 1
    assert all(".attentions." in n for n in names)


def test_a_batch_of_two_equals_two_calls(hop, tmp_path):
    """NewMove's clip and regularization clip: equal predictions and gradients."""
    run = prepare_run("newmove", hop, tmp_path, "--precision", "fp32", "word.num_vectors=1")
    found = []
    for together in (True, False):
        ex = train.Example(run, 0, 0)
        z, other = ex.add_noise(ex.next_clip()), ex.add_noise(ex.sample_prior())
        assert z.t != other.t and z.caption.endswith("sks") and "sks" not in other.caption
        ex.train("motion", "word")
        pairs = ex.predict(z, other) if together else (ex.predict(z), ex.predict(other))
        (new, a), (old, b) = pairs
        ((new - a).square().mean() + 0.5 * (old - b).square().mean()).backward()
        found.append([new.detach(), old.detach(), *(p.grad for p in run.trained.values())])
        clear_gradients(run.trained.values())
    for one, two in zip(*found):
        assert (one - two).norm() <= 1e-4 * two.norm() + 1e-9


def test_newmoves_subject_is_trained_on_images_after_the_motion(folder, hop, tmp_path, tiny):
    out = tmp_path / "out"
    run_training("newmove", hop, out, "--images", folder / "thing.png", "--image-prompt",
                 "a X* star", "subject_start=2", "--steps", 8, "--prior", "none")
    adapter = adapters.read_adapter(out / "newmove.safetensors", tiny)
    base = tiny.unet.state_dict()
    changed = {n for n, t in adapter.tensors.items() if not torch.equal(t, base[n])}
    assert set(adapter.words) == {"X*"}
    assert any("temp_" in n for n in changed) and any(".resnets." in n for n in changed)
    images = [line["seen"][0]["clip"].endswith("png") for line in log_of(out)]
    assert not any(images[:2]) and {True, False} == set(images[2:])


def test_customize_a_videos_absorber_is_active_in_the_second_stage_and_left_out(hop, tmp_path,
                                                                                tiny, spy):
    """A LoRA and a token together. The token's caption in the first stage is the appearance."""
    both = ("appearance_word.num_vectors=2", "absorber_steps=2", "appearance_prompt=a star")
    run_training("customize-a-video", hop, tmp_path / "o", *both, "--steps", 3)
    motion, absorber = (
        adapters.read_adapter(tmp_path / "o" / f"customize-a-video{suffix}.safetensors", tiny)
        for suffix in ("", "-appearance"))
    assert all("temp_" in s or "transformer_in" in s for s in motion.pairs) and not motion.words
    assert absorber.words["<look>"].shape == (2, 64)
    assert all(".attentions." in s for s in absorber.pairs)
    assert any(B.abs().max() > 0 for _, B in absorber.pairs.values())
    assert absorber.latents is None and motion.latents is not None
    run, prompts = prepare_run("customize-a-video", hop, tmp_path, *both), []
    spy(run.pipe, "encode_text", lambda texts: prompts.append(texts[0]))
    for step in (0, 2):
        for _ in losses_of(run, step):
            assert run.trainables["appearance"][0].active
    assert prompts == ["a star <look>", "thing 0 hopping <look>"]


def test_another_programs_lora_or_image_unet_can_be_the_absorber(hop, tmp_path):
    unet = model.load_unet(TINY)
    layer = next(iter(lora.lora_targets(unet, "spatial-attention")))
    A, B = torch.randn(2, 64), torch.randn(64, 2)
    save_file(formats.to_peft({layer: (A, B)}), tmp_path / "lora.safetensors")
    image_unet = {n: p * 0.9 for n, p in lora.select(unet, "spatial").items()}
    save_file(image_unet, tmp_path / "unet.safetensors")
    plain = unet.get_submodule(layer).weight.detach().clone()
    prepare = lambda name: prepare_run("customize-a-video", hop, tmp_path, "--precision", "fp32",
                                       "appearance.layers=none",
                                       f"appearance.load_from={tmp_path / name}.safetensors")
    for name, want in (("lora", plain + B @ A), ("unet", plain * 0.9)):
        run = prepare(name)
        weight = run.pipe.unet.get_submodule(layer).weight
        (_, loss), = losses_of(run, 0)  # the first stage has no trainable parameters
        loss.backward()
        assert run.trainables["appearance"][0].active and torch.allclose(weight, want, atol=1e-6)
        assert all(p.grad is not None for p in parameters_of(run, "motion")[:2])
        lora.set_trainable(run.trainables, (), ["motion"])
        assert torch.equal(weight, plain)
    token = formats.to_peft({layer: (A, B)}) | {"word.X*": torch.ones(1, 64)}
    save_file(token, tmp_path / "word.safetensors", {"format": adapters.FORMAT})
    with pytest.raises(BadInput, match="holds learned tokens"):
        prepare("word")


def test_textual_inversion_changes_one_vector(hop, tmp_path, tiny):
    run_training("textual-inversion", hop, tmp_path / "o", "--steps", 2)
    adapter = adapters.read_adapter(tmp_path / "o" / "textual-inversion.safetensors", tiny)
    table = tiny.text_encoder.tower.token_embedding.weight
    assert not adapter.tensors and not adapter.pairs and set(adapter.words) == {"sks"}
    assert not torch.equal(adapter.words["sks"][0], table[tokenizer.words_to_ids("sks")[0]])


def test_a_tokens_vectors_start_from_a_known_word(hop, tmp_path, tiny):
    table = tiny.text_encoder.tower.token_embedding.weight
    start = lambda *more: prepare_run("textual-inversion", hop, tmp_path, *more).trainables[
        "word"][0].vectors
    row = lambda word: table[tokenizer.words_to_ids(word)[0]]
    assert torch.equal(start()[0], row("sks"))
    assert torch.equal(start("word.initializer_token=star")[0], row("star"))
    several = start("word.initializer_token=star", "word.num_vectors=3")
    assert 0 < (several - row("star")).std() < 0.2 * table.std()
    assert torch.cdist(several, several)[0, 1:].min() > 0  # no two are equal


def test_a_setting_turns_full_fine_tuning_into_a_lora_and_back(hop, tmp_path):
    """NewMove's ablation: a LoRA on its layers, temporal convolutions included."""
    run = prepare_run("newmove", hop, tmp_path, "--prior", "none", "motion.rank=4")
    one, = run.trainables["motion"]
    assert isinstance(one, lora.LoRA) and any("temp_convs" in s for s in one.pairs)
    run = prepare_run("motiondirector", hop, tmp_path, "motion.rank=0", "motion.lr=1e-4")
    assert isinstance(run.trainables["motion"][0], lora.FullFinetune)
    assert run.recipe.parts["motion"].lr == 1e-4 and run.recipe.parts["appearance"].lr == 3e-3


def test_each_method_sees_its_own_augmentation(hop, tmp_path, spy):
    """NewMove augments its clips, not its regularization clips. The absorber sees patches of one
    frame, and the motion whole clips."""
    frames = []
    spy(model.Pipeline, "encode", lambda pipe, video, g: frames.append(video.shape[2]))
    for name, more, step, want in (
            ("newmove", (), 0, [4]), ("newmove", ["augment=none"], 0, []),
            ("customize-a-video", (), 0, [1]), ("customize-a-video", (), 150, [])):
        run = prepare_run(name, hop, tmp_path, *more)
        frames.clear()
        list(losses_of(run, step))
        assert frames == want


# ------------------------------------------------------------------------------------------------
# Regularization clips


def test_dreambooths_clips_are_generated_once(hop, tmp_path):
    out = tmp_path / "out"
    run_training("dreambooth", hop, out, "--steps", 1)
    files = sorted((out / "prior").glob("*.mp4"))
    assert [p.with_suffix(".txt").read_text() for p in files] == ["thing 0 hopping\n"] * 2
    assert files[0].read_bytes() != files[1].read_bytes()
    times = [p.stat().st_mtime_ns for p in files]
    run_training("dreambooth", hop, out, "--steps", 2, "--resume")
    assert [p.stat().st_mtime_ns for p in files] == times
    files[0].write_bytes(files[1].read_bytes())
    with pytest.raises(BadInput, match="regularization clips .* have changed"):
        run_training("dreambooth", hop, out, "--steps", 3, "--resume")


def test_regularization_clips_from_a_folder_from_the_world_or_none(folder, hop, tmp_path, capsys):
    run = prepare_run("custom-diffusion", hop, tmp_path, "--prior", folder / "videos")
    assert [c.prompt for c in run.prior] == ["thing 0 hopping", "thing 1 hopping"]
    run = prepare_run("newmove", hop, tmp_path, "--weights", TINY)
    assert "--prior" in capsys.readouterr().err and run.prior == []
    run = prepare_run("newmove", hop, tmp_path)
    assert len({c.prompt for c in run.prior}) == 2 and run.clips[0].prompt == "thing 0 hopping sks"
    drawn = {str(train.Example(run, step, 0).sample_prior().path) for step in range(20)}
    assert len(drawn) == 2


def test_regularization_clips_may_be_longer_than_the_clip(tmp_path):
    """The bundled clip from 0.5 s on has 12 frames, its regularization clip 16."""
    run = prepare_run("newmove", ROOT / "assets" / "eight.mp4", tmp_path, "--start", 0.5,
                      "--frames", 16)
    (ex, loss), = losses_of(run, 0)
    assert [c.latents.shape[2] for c in (*run.clips, *run.prior)] == [12, 16, 16]
    assert len(ex.records) == 2 and loss > 0


# ------------------------------------------------------------------------------------------------
# The interface of the methods


@pytest.fixture
def run(hop, tmp_path):
    """VMC, ready for its first step."""
    return prepare_run("vmc", hop, tmp_path, "--precision", "fp32")


def noisy_example(run, step=0):
    train.set_train_mode(run.pipe.unet, run.recipe)
    ex = train.Example(run, step, 0)
    return ex, ex.add_noise(ex.next_clip())


def test_attention_maps_are_captured_from_the_tuned_and_from_the_base_model(run):
    ex, z = noisy_example(run)
    run.pipe.unet.eval()
    ex.capture(r"mid_block\.temp_attentions\..*attn1|conv_out")
    ex.train("motion")
    output, _ = ex.predict(z)
    maps = ex.captured
    name, = (n for n in maps if "attn1" in n)
    assert maps[name].shape[-2:] == (4, 4) and maps[name].requires_grad
    torch.testing.assert_close(maps[name].sum(-1), torch.ones(maps[name].shape[:-1]))
    assert torch.equal(maps["conv_out"], output)
    ex.base(z)
    assert ex.captured is not maps and ex.captured[name].shape == maps[name].shape
    ex.close()
    assert not any(module._forward_hooks for module in run.pipe.unet.modules())
    ex = train.Example(run, 0, 0)
    ex.capture("nothing")
    ex.train("motion")
    with pytest.raises(BadInput, match="no module"):
        ex.predict(z)


def test_captured_features_are_fp32_and_have_all_five_axes(hop, tmp_path):
    """(B, C, F, h, w) where the output is an image, although the UNet works in bf16 and folds
    frames into the batch. Other features keep their shape."""
    run = prepare_run("newmove", hop, tmp_path, "--precision", "bf16")
    ex, z = noisy_example(run)
    ex.capture(r"down_blocks\.0\.((resnets|temp_attentions)\.0|attentions\.0\..*attn1\.to_q)")
    ex.train("motion")
    ex.predict(z, ex.add_noise(ex.sample_prior()))
    queries = [ex.captured.pop(name) for name in list(ex.captured) if "to_q" in name]
    assert [q.dtype for q in queries] == [torch.float32] and len(ex.captured) == 2
    for features in ex.captured.values():
        assert features.dtype == torch.float32 and features.shape == (2, 64, 4, 8, 8)
    ex.predict(z)
    assert {len(features) for features in ex.captured.values()} == {1, 4}  # 4 frames of queries


def test_the_base_model_has_the_same_dropout_as_the_tuned_one(run):
    """With full fine-tuning their difference is 0 before the first step, with dropout on."""
    ex, z = noisy_example(run)
    ex.train("motion")
    first, _ = ex.predict(z)
    base = ex.base(z)
    assert torch.equal(first, base) and not base.requires_grad
    assert not torch.equal(ex.predict(z)[0], base)  # another dropout mask
    for p in parameters_of(run, "motion"):
        p.data.mul_(1.5)
    tuned, _ = ex.predict(z)
    assert not torch.equal(tuned, ex.base(z))


def test_gradients_pass_through_the_frozen_base_model(run):
    """A loss on the base model's features of a prediction trains the prediction."""
    ex, z = noisy_example(run)
    ex.train("motion")
    pred, _ = ex.predict(z)
    ex.base(replace(z, x=pred)).square().mean().backward()
    assert all(p.grad is not None for p in parameters_of(run, "motion"))
    assert all(p.grad is None for p in run.base.unet.parameters())


def test_an_empty_caption_is_not_the_clips_own(run):
    ex = train.Example(run, 0, 0)
    clip = ex.next_clip()
    assert ex.add_noise(clip).caption == clip.prompt
    assert ex.add_noise(clip, caption="").caption == ""


def test_wrong_calls_of_the_interface_are_refused(run):
    ex, z = noisy_example(run)
    with pytest.raises(BadInput, match="call train first"):
        ex.predict(z)
    with pytest.raises(BadInput, match="call predict first"):
        ex.log({"a": 1})
    ex.train("motion")
    with pytest.raises(BadInput, match="a single frame and a clip in one call"):
        ex.predict(z, ex.single_frame(z))
    with pytest.raises(BadInput, match="appearance: no trainable parameters"):
        ex.train("appearance")


def test_one_lora_per_clip_requires_next_clip_before_train(folder, tmp_path):
    """Otherwise the first clip's LoRA would be trained on every clip."""
    run = prepare_run("motiondirector", folder / "videos", tmp_path)
    ex = train.Example(run, 1, 0)
    ex.train("motion")
    for parts, frozen in ((["appearance"], ()), (["motion"], ["appearance"])):
        with pytest.raises(BadInput, match="call next_clip first"):
            ex.train(*parts, frozen=frozen)
    ex.next_clip()
    ex.train("appearance")
    assert [one.active for one in run.trainables["appearance"]] == [False, True]


# ------------------------------------------------------------------------------------------------
# Previews and resuming


def test_previews_start_as_the_method_does_and_leave_appearance_out(hop, tmp_path, monkeypatch):
    """MotionDirector blends noise with an inversion by the base model. The base model inverts once,
    the tuned model at each preview."""
    run = prepare_run("motiondirector", hop, tmp_path, "noise_prior=0.3", "sampler=ddpm",
                      "guidance=5", "--preview-steps", 7)
    seen, inverted = {"inversions": 0}, torch.randn(8, 4, 8, 8)
    active = lambda: {n for n, built in run.trainables.items() if any(o.active for o in built)}

    def invert(pipe, latents, steps, **more):
        seen.update(inverting=active(), inversions=seen["inversions"] + 1)
        return inverted

    def sample(pipe, prompts, start, seeds, *how, **rest):
        seen.update(sampling=active(), start=start, how=how)
        return torch.zeros(1, 3, 4, 64, 64)

    monkeypatch.setattr(sampler, "invert", invert)
    monkeypatch.setattr(sampler, "sample", sample)
    train.preview(run)
    noise = sampler.seeded_randn((8, 4, 8, 8), [0])
    torch.testing.assert_close(seen["start"], 0.3**0.5 * inverted + 0.7**0.5 * noise)
    assert seen["inverting"] == set() and seen["sampling"] == {"motion"}
    assert seen["how"] == (7, 5, "ddpm")
    for inversion_model, count in (("base", 1), ("tuned", 3)):
        run.recipe = run.recipe.override(f"inversion_model={inversion_model}")
        train.preview(run), train.preview(run)
        assert seen["inversions"] == count
    assert seen["inverting"] == {"motion"}


def test_an_appearance_score_stops_the_run(hop, tmp_path, spy, tiny):
    """A cosine is at most 1, so the first preview stops the run, and hardly ever −1. The score uses
    appearance_prompt or, without it, the preview prompt."""
    read = []
    spy(clips.CLIP, "text_features", lambda clip, prompts: read.append(prompts))
    train_until = lambda score, *more: run_training(
        "newmove", hop, tmp_path / str(score), "--prior", "none", "--preview-every", 1, "--steps",
        2, "--preview-prompt", "a red star hopping", f"appearance_stop={score}", *more)
    for score, steps in ((1, 1), (-1, 2)):
        train_until(score, "appearance_prompt=a red star")
        adapter = adapters.read_adapter(tmp_path / str(score) / "newmove.safetensors", tiny)
        assert adapter.meta["step"] == str(steps)
    assert read == [["a red star"]] * 2
    train_until(0.99)
    assert read[2] == ["a red star hopping"]


@pytest.mark.parametrize("name", TRAINS)
def test_every_method_resumes_to_the_bit(name, hop, tmp_path):
    """Stopped within each stage and between them: equal weights and losses."""
    more = {"customize-a-video": ["absorber_steps=2", "appearance_word.num_vectors=2"],
            "newmove": ["word.num_vectors=1"],
            "dreambooth": ["--prior", "world", "num_prior_clips=2"]}.get(name, [])
    for out, steps in (("whole", (4,)), ("parts", (1, 2, 4))):
        for n in steps:
            resume = ["--resume"] * (n != steps[0])
            run_training(name, hop, tmp_path / out, *more, "--steps", n, *resume)
    files = sorted(p.name for p in (tmp_path / "whole").glob("*.safetensors"))
    assert files == sorted(p.name for p in (tmp_path / "parts").glob("*.safetensors"))
    for file in files:
        assert same_weights(tmp_path / "whole", tmp_path / "parts", file), file
    whole, parts = ([r["losses"] for r in log_of(tmp_path / out)] for out in ("whole", "parts"))
    assert whole == parts and len(whole) == 4
