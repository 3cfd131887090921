"""The nine methods of train.py: their numbers, what learns, from what, beside what."""
import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, TINY, flags_of, learn, prepared
from safetensors.torch import load_file, save_file

import lora
import losses
import model
import sampler
import train
from scores import clip as clips
from support import adapter_file, fast, formats, priors, tokenizer
from support.files import BadInput

METHODS = train.METHODS


def losses_of(run, step, number=0):
    """Yields (m, loss) of one example, as a step makes them."""
    train.begin_training(run.model.unet, run.recipe)
    m = train.Example(run, step, number)
    for loss in run.recipe.function(m, **run.recipe.keywords):
        yield m, loss


def parameters_of(run, *parts):
    return [p for part in parts for one in run.learners[part] for p in one.parameters().values()]


# ------------------------------------------------------------------------------------------------
# Recipes


@pytest.mark.parametrize("method,numbers", [
    ("vmc", "steps=400 motion.lr=1e-4 motion.weight_decay=.01 clip_grad=1 noise_prior=1 stride=1 "
            "loss=residual-cosine motion.layers=temporal-attention-qkv sampler=ddpm "
            "sampling_steps=75"),
    ("motiondirector", "steps=150 look.rank=32 motion.rank=32 look.lr=5e-4 motion.lr=5e-4 "
                       "look.dropout=.1 motion.dropout=.1 look.per_clip=on motion.per_clip=off "
                       "noise_prior=.5 beta=1 spatial=.8 guidance=12 sampling_steps=30 "
                       "clip_grad=inf inverts=base inversion_steps=50"),
    ("newmove", "steps=3000 motion.lr=5e-6 alpha=.5 prior_weight=.5 clip_grad=1 "
                "motion.layers=temporal-and-cross-kv network_dropout=off sampler=dpm"),
    ("customize-a-video", "look.rank=1 look.scale=.5 look.lr=5e-5 motion.rank=4 motion.scale=1 "
                          "motion.lr=5e-4 first=200 look.layers=spatial-attention"),
    ("coupled", "steps=150 motion.rank=32 motion.lr=5e-4 motion.layers=coupled loss=mse"),
    ("dreambooth", "steps=800 motion.lr=5e-6 motion.layers=spatial prior=generated prior_weight=1"),
    ("custom-diffusion", "steps=500 motion.lr=1e-5 word.vectors=1 prior=folder "
                         "motion.layers=cross-attention-kv"),
    ("textual-inversion", "steps=3000 word.lr=5e-3 word.vectors=1"),
    ("tune-a-video", "steps=500 motion.lr=3e-5 motion.layers=tune-a-video noise_prior=1 "
                     "guidance=12.5"),
])
def test_recipes_have_the_papers_numbers(method, numbers):
    assert METHODS[method].but(numbers) == METHODS[method]
    assert len(METHODS) == 9 and set(train.TINY) == set(METHODS)
    shape = {"vmc": (8, 320, 576), "customize-a-video": (16, 256, 256)}.get(method, (16, 384, 384))
    assert METHODS[method].shape == shape and METHODS[method].fps == (24 if method in (
        "newmove", "dreambooth", "custom-diffusion", "textual-inversion") else 8)


@pytest.mark.parametrize("method,what,settings", [
    ("newmove", ("--images", "thing.png"), {"steps": 2000, "subject.layers": "spatial"}),
    ("newmove", (), {"steps": 1000}),
    ("motiondirector", (), {"steps": 150, "noise_prior": 0.5, "look.weight_decay": 0.01}),
    ("motiondirector", ("--video", "videos"), {
        "steps": 500, "noise_prior": 0, "look.weight_decay": 1e-4, "motion.weight_decay": 1e-4}),
    ("coupled", ("--video", "videos"), {
        "steps": 500, "noise_prior": 0, "motion.weight_decay": 1e-4}),
    ("motiondirector", ("--images", "thing.png"), {
        "steps": 300, "motion.layers": "none", "look.per_clip": False, "look.weight_decay": 1e-4}),
    ("motiondirector", ("--images", "thing.png", "again.png"), {
        "steps": 1000, "motion.layers": "none", "look.per_clip": False}),
])
def test_the_data_and_the_base_change_a_recipe_as_one_would_type(method, what, settings, hop,
                                                                 folder, tmp_path, capsys):
    """At full size; with the tiny model its own line comes after that of the data."""
    shutil.copy(folder / "thing.png", folder / "again.png")
    clip = None if method == "motiondirector" and "--images" in what else hop
    what = [w if w.startswith("--") else folder / w for w in what]
    flags, recipe = train.parse(flags_of(method, clip, tmp_path, "--weights", TINY, *what))
    assert settings.items() <= recipe.settings().items()
    assert train.METHODS[method].parts["motion"].lr == recipe.parts["motion"].lr
    flags, recipe = train.parse(flags_of(method, clip, tmp_path, *what))
    assert flags.own_lines[-1] == train.TINY[method]
    assert recipe.but(train.TINY[method]).parts == recipe.parts


# ------------------------------------------------------------------------------------------------
# What learns

TEACHES = {  # method: parts that each loss teaches, in their order
    "vmc": [["motion"]], "motiondirector": [["look"], ["motion"]], "newmove": [["motion"]],
    "customize-a-video": [["look"], ["motion"]], "coupled": [["motion"]],
    "dreambooth": [["motion"]], "custom-diffusion": [["motion", "word"]],
    "textual-inversion": [["word"]], "tune-a-video": [["motion"]],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_teaches_what_it_says_and_nothing_else(method, hop, tmp_path):
    """After each loss's backward pass, gradients are where it teaches, and nowhere else."""
    more = {"customize-a-video": "first=1", "motiondirector": "spatial=1",
            "dreambooth": "--prior=world"}.get(method, "--seed=0")
    run = prepared(method, hop, tmp_path, more)
    everything = dict(run.model.unet.named_parameters()) | lora.named(run.learners)
    taught, ran = iter(TEACHES[method]), set()
    for name, module in run.model.unet.named_modules():
        if re.fullmatch(r"transformer_in|.*\.temp_(attentions|convs)\.\d+", name):
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
    for step in range(2 if method == "customize-a-video" else 1):
        for _, loss in losses_of(run, step):
            loss.backward()
            parts = next(taught)
            # Looks are learned past all temporal layers.
            assert not ran if parts == ["look"] else {"transformer_in"} < ran
            ran.clear()
            got = {n for n, p in everything.items() if p.grad is not None}
            ids = {id(p) for p in parameters_of(run, *parts)}
            assert got and got <= {n for n, p in everything.items() if id(p) in ids}
            for part in parts:
                assert any(p.grad is not None for p in parameters_of(run, part))
            for p in everything.values():
                p.grad = None
    assert next(taught, None) is None


def mean_square(x):
    return x.square().mean().item()


def debiased(x, beta, anchor=1):
    return (beta**2 + 1) ** 0.5 * x - beta * x[:, :, anchor : anchor + 1]


def cosines(pred, true):
    apart = [(x[:, :, 2:] - x[:, :, :-2]).transpose(1, 2).flatten(2) for x in (pred, true)]
    return torch.cosine_similarity(*apart, dim=-1).mean().item()


FORMULAS = {  # method: settings, and its losses of (pred, true), … in words of its paper
    "vmc": (["stride=2"], lambda e: [1 - cosines(*e[0])]),
    "motiondirector": (["beta=2", "spatial=1"], lambda e: [
        mean_square(e[0][0] - e[0][1]),
        mean_square(e[1][0] - e[1][1]) + mean_square(debiased(e[1][0] - e[1][1], 2))]),
    "newmove": (["prior_weight=0.25", "alpha=0.3"], lambda e: [
        mean_square(e[0][0] - e[0][1]) + 0.25 * mean_square(e[1][0] - e[1][1])]),
    "dreambooth": (["prior_weight=0.25", "--prior=world"], lambda e: [
        mean_square(e[0][0] - e[0][1]) + 0.25 * mean_square(e[1][0] - e[1][1])]),
    "custom-diffusion": (["prior_weight=3"], lambda e: [
        mean_square(e[0][0] - e[0][1]) + 3 * mean_square(e[1][0] - e[1][1])]),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_loss_is_what_the_paper_writes(method, hop, tmp_path, monkeypatch):
    """Of predictions that are not true; the anchor is frame 1. NewMove's timesteps alone are
    coarse, those of its prior clips too."""
    plain = [], lambda e: [mean_square(e[0][0] - e[0][1])]
    settings, wanted = FORMULAS.get(method, plain)
    run = prepared(method, hop, tmp_path, *settings)
    m, said, alphas, weights = train.Example(run, 0, 0), [], [], sampler.timestep_weights
    monkeypatch.setattr(sampler, "timestep_weights", lambda T, alpha: (
        alphas.append(alpha), weights(T, alpha))[1])

    def predict(*noised, align="output"):
        pairs = [torch.randn(2, *z.x.shape, generator=m.g).unbind() for z in noised]
        said.extend(pairs)
        m.log.append({})  # what is noted of a prediction
        return pairs[0] if len(pairs) == 1 else pairs

    m.predict, m.pick = predict, lambda z: 1
    got = [loss.item() for loss in run.recipe.function(m, **run.recipe.keywords)]
    assert got == pytest.approx(wanted(said), rel=1e-5)
    assert set(alphas) == {0.3 if method == "newmove" else 0}


def test_the_network_sees_the_clip_with_noise(hop, tmp_path):
    """x_t = √ᾱ·x0 + √(1−ᾱ)·ε at the example's timestep, with its caption; the next example of the
    step has other noise."""
    run = prepared("vmc", hop, tmp_path, "--precision", "fp32")
    m, other = (train.Example(run, 3, number) for number in (0, 1))
    z, beside = m.noised(m.clip()), other.noised(other.clip())
    assert not torch.equal(z.noise, beside.noise)
    a = run.model.schedule.alpha_bar[z.t].item()
    x = a**0.5 * run.clips[0].latents + (1 - a) ** 0.5 * z.noise
    torch.testing.assert_close(z.x, x)
    m.learn("motion")
    text = run.model.read([run.clips[0].prompt])
    torch.testing.assert_close(m.predict(z)[0], run.model.predict(x, z.t, text))


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_can_be_asked_for(name, hop, tmp_path):
    assert losses.LOSSES[name].__name__ == name.replace("-", "_")
    run = prepared("vmc", hop, tmp_path, f"loss={name}", "align=epsilon")
    (_, loss), = losses_of(run, 0)
    assert loss.isfinite() and loss > 0


def test_a_step_is_the_mean_of_its_examples(hop, tmp_path, monkeypatch):
    """Two examples that are alike teach what one of them does."""
    real, steps = sampler.generator, []
    monkeypatch.setattr(sampler, "generator", lambda *key: real(*key[:2]))
    for batch in (1, 2):
        learn("vmc", hop, tmp_path / str(batch), "--steps", 1, "--batch", batch)
        steps.append(json.loads((tmp_path / str(batch) / "log.jsonl").read_text()))
    one, two = steps
    assert len(two["losses"]) == 2 and two["losses"][0] == two["losses"][1]
    assert two["loss"] == pytest.approx(one["loss"]) and one["grad"] > 0
    assert two["grad"] == pytest.approx(one["grad"], rel=1e-3)


def test_a_learned_word_begins_as_what_it_is_or_as_it_is_told(hop, tmp_path):
    table = model.load_text(TINY).tower.token_embedding.weight
    start = lambda *more: prepared("textual-inversion", hop, tmp_path, *more).learners["word"][0]
    row = lambda word: table[tokenizer.words_to_ids(word)[0]]
    assert torch.equal(start().vectors[0], row("sks"))
    assert torch.equal(start("word.init=star").vectors[0], row("star"))
    several = start("word.init=star", "word.vectors=3").vectors
    assert 0 < (several - row("star")).std() < 0.2 * table.std()
    assert torch.cdist(several, several)[0, 1:].min() > 0  # or none could be told from another


def test_predictions_are_compared_as_asked(hop, tmp_path):
    """ε̂ = √ᾱ·v̂ + √(1−ᾱ)·x and x̂0 = √ᾱ·x − √(1−ᾱ)·v̂, against the noise and the clip."""
    run = prepared("vmc", hop, tmp_path, "--precision", "fp32")
    m = train.Example(run, 0, 0)
    z = m.noised(m.clip())
    m.learn("motion")
    a = run.model.schedule.alpha_bar[z.t].item()
    v, true = (x.detach() for x in m.predict(z))
    x0, eps = a**0.5 * z.x - (1 - a) ** 0.5 * v, a**0.5 * v + (1 - a) ** 0.5 * z.x
    torch.testing.assert_close(true, a**0.5 * z.noise - (1 - a) ** 0.5 * z.x0)
    for align, pred, true in (("epsilon", eps, z.noise), ("x0", x0, z.x0)):
        got = m.predict(z, align=align)
        torch.testing.assert_close(got[0].detach(), pred, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[1], true)


def test_a_sample_starts_where_the_method_says_and_leaves_looks_out(hop, tmp_path, monkeypatch):
    """MotionDirector's: from the base's inversion, with nothing that was learned, and noise; by the
    recipe's sampler and guidance. The base is inverted once, what learns each time."""
    run, seen = prepared("motiondirector", hop, tmp_path, "noise_prior=0.3", "sampler=ddpm",
                         "guidance=5", "--preview-steps", 7), {"inversions": 0}
    acting = lambda: {n for n, several in run.learners.items() if any(one.on for one in several)}
    inverted = torch.randn(8, 4, 8, 8)

    def invert(whole, latents, steps, **more):
        seen.update(inverting=acting(), inversions=seen["inversions"] + 1)
        return inverted

    def sample(whole, prompts, start, seeds, *how, **rest):
        seen.update(sampling=acting(), start=start, how=how)
        return torch.zeros(1, 3, 4, 64, 64)

    monkeypatch.setattr(sampler, "invert", invert)
    monkeypatch.setattr(sampler, "sample", sample)
    train.preview(run)
    noise = sampler.noise_like_shape((8, 4, 8, 8), [0])
    want = 0.3**0.5 * inverted + 0.7**0.5 * noise
    torch.testing.assert_close(seen["start"], want)
    assert seen["inverting"] == set() and seen["sampling"] == {"motion"}
    assert seen["how"] == (7, 5, "ddpm")
    for inverts, wanted in (("base", 1), ("tuned", 3)):
        run.recipe = run.recipe.set("inverts", inverts)
        train.preview(run), train.preview(run)
        assert seen["inversions"] == wanted
    assert seen["inverting"] == {"motion"}


def test_the_loop_clips_and_decays_as_the_recipe_says(hop, tmp_path, monkeypatch):
    norms, modes, step = [], [], torch.optim.AdamW.step

    def watched(self):
        everything = [p.grad.square().sum() for g in self.param_groups for p in g["params"]]
        norms.append(sum(everything).sqrt().item())
        assert {g["weight_decay"] for g in self.param_groups} == {0.2}
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    unet = model.UNet.forward
    monkeypatch.setattr(model.UNet, "forward", lambda self, *a, **k: (
        modes.extend(m.training for m in self.modules() if isinstance(m, torch.nn.Dropout)),
        unet(self, *a, **k))[1])
    learn("vmc", hop, tmp_path, "--steps", 2, "clip_grad=1e-3", "motion.weight_decay=0.2")
    assert norms == pytest.approx([1e-3] * 2, rel=1e-2) and modes and all(modes)
    modes.clear()
    learn("newmove", hop, tmp_path / "n", "--steps", 1, "--prior", "none",
          "motion.weight_decay=0.2", "clip_grad=1e9")
    assert norms[-1] > 1e-3 and modes and not any(modes)


def test_motiondirectors_paths_share_noise_and_the_look_acts_but_rests(folder, tmp_path):
    """Two clips: each has a look of its own; beside the motion that clip's look acts, without a
    gradient, and none where its own loss was left out."""
    run = prepared("motiondirector", folder / "videos", tmp_path, "spatial=0.5")
    looks = run.learners["look"]
    assert len(looks) == 2 and len(run.learners["motion"]) == 1
    for one in looks:
        for _, B in one.pairs.values():
            B.data.normal_(0, 0.3)
    ways, step_of_both = set(), None
    for step in range(12):
        seen, acting = [], []
        m = train.Example(run, step, 0)
        m.predict = lambda *z, seen=seen, **more: (seen.append(z[0]), z[0].noise, z[0].noise)[1:]
        for _ in run.recipe.function(m, **run.recipe.keywords):
            acting.append([one.on for one in looks])
            learning = [any(p.requires_grad for p in one.parameters().values()) for one in looks]
            assert learning == ([i == m.index for i in range(2)] if not seen[-1].temporal
                                else [False, False])
        mine = [i == m.index for i in range(2)]
        assert m.index == step % 2 and seen[-1].temporal
        assert acting == ([mine, mine] if len(seen) == 2 else [[False, False]])
        if len(seen) == 2:
            look, motion = seen
            assert look.t == motion.t and look.clip is motion.clip and look.x.shape[2] == 1
            assert any(torch.equal(look.x[:, :, 0], motion.x[:, :, f]) for f in range(4))
        ways.add((m.index, len(seen)))
        step_of_both = step if (m.index, len(seen)) == (0, 2) else step_of_both
    assert len(ways) == 4
    plain = [loss.item() for _, loss in losses_of(run, step_of_both)]
    for _, B in looks[0].pairs.values():
        B.data.zero_()
    assert [loss.item() for _, loss in losses_of(run, step_of_both)][-1] != plain[-1]


def test_a_fifth_of_the_spatial_losses_is_left_out(hop, tmp_path):
    run = prepared("motiondirector", hop, tmp_path)
    counts = []
    for step in range(400):
        m = train.Example(run, step, 0)
        m.predict = lambda *z, **more: (z[0].noise, z[0].noise)
        counts.append(len(list(run.recipe.function(m))))
    assert set(counts) == {1, 2} and abs(counts.count(2) / 400 - 0.8) < 0.06


def test_one_batch_teaches_what_its_clips_teach_one_by_one(hop, tmp_path):
    """NewMove's clip and prior clip: the same predictions and gradients as apart."""
    run = prepared("newmove", hop, tmp_path, "--precision", "fp32", "word.vectors=1")
    trained, found = lora.named(run.learners), []
    for together in (True, False):
        m = train.Example(run, 0, 0)
        z, other = m.noised(m.clip()), m.noised(m.prior())
        assert z.t != other.t and z.caption.endswith("sks") and "sks" not in other.caption
        m.learn("motion", "word")
        (new, a), (old, b) = m.predict(z, other) if together else (m.predict(z), m.predict(other))
        ((new - a).square().mean() + 0.5 * (old - b).square().mean()).backward()
        found.append([new.detach(), old.detach(), *(p.grad for p in trained.values())])
        for p in trained.values():
            p.grad = None
    for one, two in zip(*found):
        assert (one - two).norm() <= 1e-4 * two.norm() + 1e-9


def test_a_subject_and_its_word_learn_from_pictures_after_the_motion(folder, hop, tmp_path):
    learn("newmove", hop, tmp_path, "--images", folder / "thing.png", "--image-prompt", "a X* star",
          "first=2", "--steps", 8, "--prior", "none")
    adapter = adapter_file.read_adapter(tmp_path / "newmove.safetensors")
    base = model.load_unet(TINY).state_dict()
    changed = {n for n, t in adapter.tensors.items() if not torch.equal(t, base[n])}
    assert set(adapter.words) == {"X*"}
    assert any("temp_" in n for n in changed) and any(".resnets." in n for n in changed)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    pictures = [line["seen"][0]["clip"].endswith("png") for line in log]
    assert not any(pictures[:2]) and {True, False} == set(pictures[2:])


def test_motiondirector_learns_pictures_alone(folder, tmp_path):
    learn("motiondirector", None, tmp_path, "--images", folder / "thing.png", "--prompt", "a star",
          "--steps", 2)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["motiondirector-look.safetensors"]
    look = adapter_file.read_adapter(tmp_path / "motiondirector-look.safetensors")
    assert look.pairs and all(".attentions." in s for s in look.pairs)


def test_customizes_absorber_acts_beside_the_motion_and_is_left_out_of_it(hop, tmp_path):
    """A LoRA and a word together; the word's captions are of the look alone while it learns."""
    both = ("look_word.vectors=2", "first=2", "look_prompt=a star")
    learn("customize-a-video", hop, tmp_path, *both, "--steps", 3)
    motion = adapter_file.read_adapter(tmp_path / "customize-a-video.safetensors")
    look = adapter_file.read_adapter(tmp_path / "customize-a-video-look.safetensors")
    assert all("temp_" in s or "transformer_in" in s for s in motion.pairs) and not motion.words
    assert look.words["<look>"].shape == (2, 64) and all(".attentions." in s for s in look.pairs)
    assert any(B.abs().max() > 0 for _, B in look.pairs.values())
    assert look.latents is None and motion.latents is not None
    run, read = prepared("customize-a-video", hop, tmp_path, *both, "--overwrite"), []
    run.model.read = lambda prompts: (read.append(prompts[0]), type(run.model).read(
        run.model, prompts))[1]
    for step in (0, 2):
        for _ in losses_of(run, step):
            assert run.learners["look"][0].on
    assert read == ["a star <look>", "thing 0 hopping <look>"]


def test_another_programs_lora_or_image_unet_can_absorb_the_looks(hop, tmp_path):
    unet = model.load_unet(TINY)
    site = next(iter(lora.sites(unet, "spatial-attention")))
    A, B = torch.randn(2, 64), torch.randn(64, 2)
    save_file(formats.to_peft({site: (A, B)}), tmp_path / "look.safetensors")
    whole = {n: p * 0.9 for n, p in lora.select(unet, "spatial").items()}
    save_file(whole, tmp_path / "unet.safetensors")
    plain = unet.get_submodule(site).weight.detach().clone()
    for name, want in (("look", plain + B @ A), ("unet", plain * 0.9)):
        run = prepared("customize-a-video", hop, tmp_path / "o", "--precision", "fp32",
                       f"look.file={tmp_path / name}.safetensors")
        weight = run.model.unet.get_submodule(site).weight
        (_, loss), = losses_of(run, 0)  # nothing to learn about the look
        loss.backward()
        assert run.learners["look"][0].on and torch.allclose(weight, want, atol=1e-6)
        assert all(p.grad is not None for p in parameters_of(run, "motion")[:2])
        lora.switch(run.learners, (), ["motion"])
        assert torch.equal(weight, plain)
    adapter = {f"unet.{site}.lora_A.weight": A, f"unet.{site}.lora_B.weight": B,
               "word.X*": torch.ones(1, 64)}
    save_file(adapter, tmp_path / "word.safetensors", {"format": adapter_file.FORMAT})
    with pytest.raises(BadInput, match="holds words"):
        prepared("customize-a-video", hop, tmp_path / "o",
                 f"look.file={tmp_path / 'word.safetensors'}")


def test_textual_inversion_changes_one_vector(hop, tmp_path):
    learn("textual-inversion", hop, tmp_path, "--steps", 2)
    adapter = adapter_file.read_adapter(tmp_path / "textual-inversion.safetensors")
    table = model.load_text(TINY).tower.token_embedding.weight
    assert not adapter.tensors and not adapter.pairs and set(adapter.words) == {"sks"}
    assert not torch.equal(adapter.words["sks"][0], table[tokenizer.words_to_ids("sks")[0]])


def test_full_tuning_becomes_lora_and_back_by_a_setting(hop, tmp_path):
    """NewMove's ablation: LoRA on its own layers, temporal convolutions included."""
    run = prepared("newmove", hop, tmp_path, "--prior", "none", "motion.rank=4")
    one, = run.learners["motion"]
    assert isinstance(one, lora.LoRA) and any("temp_convs" in s for s in one.pairs)
    run = prepared("motiondirector", hop, tmp_path, "motion.rank=0", "motion.lr=1e-4")
    assert isinstance(run.learners["motion"][0], lora.Whole)
    assert run.recipe.parts["motion"].lr == 1e-4 and run.recipe.parts["look"].lr == 3e-3


def test_reverse_learns_the_clip_backward(hop, tmp_path):
    there, back = (prepared("vmc", hop, tmp_path, *more).clips[0] for more in ((), ("--reverse",)))
    assert torch.equal(there.video.flip(1), back.video)


# ------------------------------------------------------------------------------------------------
# Prior clips


def test_dreambooths_prior_is_made_once_and_kept(hop, tmp_path, monkeypatch):
    learn("dreambooth", hop, tmp_path, "--steps", 1)
    clips = sorted((tmp_path / "prior").glob("*.mp4"))
    assert [p.with_suffix(".txt").read_text() for p in clips] == ["thing 0 hopping\n"] * 2
    assert clips[0].read_bytes() != clips[1].read_bytes()
    with monkeypatch.context() as m:
        m.setattr(priors, "by_the_base", None)  # what is there is not made again
        learn("dreambooth", hop, tmp_path, "--steps", 2, "--resume", "--preview-steps", 3)
    before = clips[0].read_bytes()
    (tmp_path / "prior" / "mine.txt").write_text("of a person")
    learn("dreambooth", hop, tmp_path, "--steps", 1, "--overwrite", "--seed", 1)
    assert clips[0].read_bytes() != before and (tmp_path / "prior" / "mine.txt").is_file()


def test_prior_clips_from_a_folder_or_none_at_all(folder, hop, tmp_path, capsys):
    run = prepared("custom-diffusion", hop, tmp_path, "--prior", folder / "videos")
    assert [c.prompt for c in run.prior] == ["thing 0 hopping", "thing 1 hopping"]
    run = prepared("newmove", hop, tmp_path, "--weights", TINY)
    assert "forgets" in capsys.readouterr().err and run.prior == []
    run = prepared("newmove", hop, tmp_path)
    assert len({c.prompt for c in run.prior}) == 2 and run.clips[0].prompt == "thing 0 hopping sks"
    drawn = {str(train.Example(run, step, 0).prior().path) for step in range(20)}
    assert len(drawn) == 2


# ------------------------------------------------------------------------------------------------
# Resuming, for all


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_to_the_bit(method, hop, tmp_path):
    """Stopped within each stage, and between them where there are two: weights and losses."""
    more = {"customize-a-video": ["first=2", "look_word.vectors=2"], "newmove": ["word.vectors=1"],
            "dreambooth": ["--prior", "world", "prior_clips=2"]}.get(method, [])
    for out, steps in (("whole", (4,)), ("parts", (1, 2, 4))):
        for n in steps:
            resume = ["--resume"] * (n != steps[0])
            learn(method, hop, tmp_path / out, *more, "--steps", n, *resume)
    files = sorted(p.name for p in (tmp_path / "whole").glob("*.safetensors"))
    assert files == sorted(p.name for p in (tmp_path / "parts").glob("*.safetensors"))
    for name in files:
        one, two = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
        assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one), name
    logs = [[json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
            for out in ("whole", "parts")]
    assert [r["losses"] for r in logs[0]] == [r["losses"] for r in logs[1]] and len(logs[0]) == 4


# ------------------------------------------------------------------------------------------------
# What a method may ask for


def test_a_method_sees_maps_and_the_base_on_the_same_noisy_clip(hop, tmp_path):
    run = prepared("vmc", hop, tmp_path, "--precision", "fp32")
    m = train.Example(run, 0, 0)
    m.watch(r"mid_block\.temp_attentions\..*attn1|conv_out")
    z = m.noised(m.clip())
    m.learn("motion")
    said, _ = m.predict(z)
    maps = m.seen
    name, = (n for n in maps if "attn1" in n)
    assert maps[name].shape[-2:] == (4, 4) and maps[name].requires_grad
    torch.testing.assert_close(maps[name].sum(-1), torch.ones(maps[name].shape[:-1]))
    assert torch.equal(maps["conv_out"].detach().unflatten(0, (1, 4)).transpose(1, 2), said)
    again = m.base(z)
    assert torch.equal(again, said) and not again.requires_grad  # nothing has learned yet
    assert m.seen is not maps and torch.equal(m.seen[name], maps[name])
    for p in parameters_of(run, "motion"):
        p.data.mul_(1.5)
    assert torch.equal(m.base(z), said) and not torch.equal(m.predict(z)[0], said)
    m.finish()
    assert not any(module._forward_hooks for module in run.model.unet.modules())
    m = train.Example(run, 0, 0)
    m.watch("nothing")
    with pytest.raises(BadInput, match="no module"):
        m.predict(z)


def test_layers_have_rates_of_their_own(hop, tmp_path):
    run = prepared("vmc", hop, tmp_path, "motion.rates=attn1:2,attn2:0.5", "motion.lr=1e-3")
    optimizer = lora.make_optimizer(run.recipe.parts, run.learners)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    named = lora.named(run.learners)
    assert {(re.search("attn.", n)[0], rates[id(p)]) for n, p in named.items()} == {
        ("attn1", 2e-3), ("attn2", 5e-4)}
    for bad in ("conv_in:2", "attn1", "attn1:x", "attn1:-1", "attn1:nan", ":2", "(:2", "(a*)*:2"):
        parts = run.recipe.set("motion.rates", bad).parts
        with pytest.raises(BadInput, match="rates|pattern"):
            lora.make_optimizer(parts, run.learners)


def test_a_loras_dropout_acts_where_the_networks_own_is_off(hop, tmp_path, monkeypatch):
    asked = set()
    real = fast.dropout
    monkeypatch.setattr(fast, "dropout", lambda x, p, training: (
        asked.add((p, training)), real(x, p, training))[1])
    learn("newmove", hop, tmp_path / "out", "--prior", "none", "--steps", 1, "motion.rank=2",
          "motion.layers=temporal-attention", "motion.dropout=0.25")
    assert asked == {(0.1, False), (0.25, True)}


def test_a_scorer_is_not_changed_under_a_resumed_runs_feet(hop, tmp_path):
    """The setting `clip` is told from the clip that a run learns from."""
    how = "newmove", hop, tmp_path / "out", "--prior", "none", "--steps"
    learn(*how, 1)
    state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
    assert state["settings"]["clip"] == ""
    torch.save(state | {"settings": state["settings"] | {"clip": "ViT-L-14"}},
               tmp_path / "out" / "state.pt")
    with pytest.raises(BadInput, match="clip was ViT-L-14, is ;|clip was ViT-L-14, is [.]"):
        learn(*how, 2, "--resume")


def test_prior_clips_may_be_longer_than_the_clip(tmp_path):
    """The rest of the bundled clip, 12 frames, beside one of 16."""
    learn("newmove", ROOT / "assets" / "eight.mp4", tmp_path / "out", "--start", 0.5, "--frames",
          16, "--steps", 1, "prior_clips=1")
    log = json.loads((tmp_path / "out" / "log.jsonl").read_text())
    assert len(log["seen"]) == 2 and log["loss"] > 0


def test_a_score_of_the_looks_can_end_a_run(hop, tmp_path, monkeypatch):
    """A cosine is never over 1, so the first sample ends the run; and hardly ever −1. The score is
    of the looks that the preview asks for, not of the clip's."""
    read, texts = [], clips.Clip.texts
    monkeypatch.setattr(clips.Clip, "texts", lambda self, words: read.append(words) or texts(
        self, words))
    for score, steps in ((1, 1), (-1, 2)):
        learn("newmove", hop, tmp_path / str(score), "--prior", "none", "--preview-every", 1,
              "--steps", 2, "--preview-prompt", "a red star hopping", "look_prompt=a red star",
              f"appearance_stop={score}")
        adapter = adapter_file.read_adapter(tmp_path / str(score) / "newmove.safetensors")
        assert adapter.meta["step"] == str(steps)
    assert read == [["a red star"]] * 2
    learn("newmove", hop, tmp_path / "all", "--prior", "none", "--preview-every", 1, "--steps", 2,
          "--preview-prompt", "a blue ring hopping", "appearance_stop=1")
    assert read[2:] == [["a blue ring hopping"]]


def test_views_are_what_the_methods_say(hop, tmp_path, monkeypatch):
    """NewMove's clips are augmented unless it is told otherwise, its prior never; the absorber sees
    patches of one frame, and the motion whole clips."""
    seen = []
    encode = model.Model.encode
    monkeypatch.setattr(model.Model, "encode", lambda self, video, g=None: (
        seen.append(video.shape[2]), encode(self, video, g))[1])
    cases = [("newmove", (), 0, [4]), ("newmove", ["augment=none"], 0, []),
             ("customize-a-video", (), 0, [1]), ("customize-a-video", (), 150, [])]
    for method, more, step, frames in cases:
        run = prepared(method, hop, tmp_path, *more)
        seen.clear()
        list(losses_of(run, step))
        assert seen == frames
    assert METHODS["newmove"].keywords["augment"] == "augmented"
