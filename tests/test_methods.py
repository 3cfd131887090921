"""The nine methods of train.py: what learns, from what, beside what; and that each resumes."""
import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image
from safetensors.torch import load_file

import data
import generate
import lora
import losses
import model
import sampler
import train
from model import BadInput
from tiny import world

FAST = ("--preview-every", 0, "--preview-steps", 2)


def fast(flags):
    """The flags as strings, with previews left out and few prior clips, where they are made."""
    flags = [str(f) for f in (*FAST, *flags)]
    made = {"newmove", "custom-diffusion", "dreambooth"} & set(flags)
    made = made and not {"--prior", "--weights"} & set(flags) or "generated" in flags
    return flags + ["--prior-clips", "2"] * bool(made)


def learn(*flags):
    train.main(fast(flags))


def prepared(*flags):
    """A Run as main makes it, ready for its first step."""
    args = train.parse(fast(flags))
    method, _ = train.resolve(args)
    run, _ = train.prepare(args, method)
    run.parts.unet.train()
    return run


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two clips with captions of their own, and a picture."""
    folder = tmp_path_factory.mktemp("clips")
    scenes = world.sample_scenes(2, torch.Generator().manual_seed(5), ("hopping",))
    for i, video in enumerate(world.render(scenes)):
        data.write_video(folder / "videos" / f"{i}.mp4", video, world.FPS)
        (folder / "videos" / f"{i}.txt").write_text(f"thing {i} hopping")
    picture = data.to_pixels(world.render(scenes)[0])[0]
    Image.fromarray(picture).save(folder / "thing.png")
    return folder


@pytest.fixture(scope="session")
def clip(folder):
    return folder / "videos" / "0.mp4"


def flags_of(method, clip, out):
    more = ("--first-steps", 2) if method == "customize-a-video" else ()
    return ("--method", method, "--video", clip, "--out", out, "--steps", 3, *more)


# ------------------------------------------------------------------------------------------------
# Losses of MotionDirector, by hand


def test_debiasing_by_hand():
    """β = 1, frames 1, 2, 5, anchor 1: √2·ε − 2."""
    eps = torch.tensor([1.0, 2.0, 5.0]).view(1, 1, 3, 1, 1)
    got = losses.debias(eps, anchor=1).flatten().tolist()
    assert got == pytest.approx([2**0.5 - 2, 2 * 2**0.5 - 2, 5 * 2**0.5 - 2])


def test_appearance_debiased_loss_by_hand():
    """Errors 1, 0, 0 with the anchor on the first: φ's errors are √2 − 1, −1, −1."""
    eps = torch.zeros(1, 1, 3, 1, 1)
    pred = eps.clone()
    pred[:, :, 0] = 1
    want = ((2**0.5 - 1) ** 2 + 2) / 3
    assert losses.appearance_debiased(pred, eps, anchor=0).item() == pytest.approx(want)
    assert losses.motiondirector(pred, eps, anchor=0).item() == pytest.approx(want + 1 / 3)


def test_debiasing_pulls_out_what_all_frames_share():
    """With β large, a constant error costs next to nothing beside what MSE charges; independent
    frames keep their variance."""
    g = torch.Generator().manual_seed(0)
    eps = torch.randn(1, 4, 16, 8, 8, generator=g)
    shared = eps + torch.randn(1, 4, 1, 8, 8, generator=g)
    beta = 5.0
    share = losses.appearance_debiased(shared, eps, beta=beta) / losses.mse(shared, eps)
    assert share.item() == pytest.approx(((beta**2 + 1) ** 0.5 - beta) ** 2, rel=1e-4)
    other = losses.debias(eps, anchor=3)[:, :, torch.arange(16) != 3]
    assert other.var().item() == pytest.approx(3, rel=0.1)  # β² + 1 of the frame, β² of the anchor


# ------------------------------------------------------------------------------------------------
# Recipes


def test_recipes_have_the_papers_numbers():
    m = train.METHODS
    md = m["motiondirector"]
    look, motion = md.parts["look"], md.parts["motion"]
    assert (look.rank, motion.rank, look.lr, motion.lr) == (32, 32, 5e-4, 5e-4)
    assert look.per_clip and not motion.per_clip and md.noise_prior == 0.5
    nm = m["newmove"]
    clips, prior = nm.stages[0].passes
    assert (clips.timesteps, clips.alpha, prior.weight) == ("coarse", 0.5, 0.5)
    assert nm.parts["motion"].lr == 5e-6 and nm.stages[0].steps == 3000
    look, motion = (m["customize-a-video"].parts[n] for n in ("look", "motion"))
    assert (look.rank, look.scale, look.lr) == (1, 0.5, 5e-5)
    assert (motion.rank, motion.scale, motion.lr) == (4, 1.0, 5e-4)
    assert [s.passes[0].sees for s in m["customize-a-video"].stages] == ["crop", "whole"]
    assert len(m) == 9 and set(train.TINY) == set(m)


def one_pass(run, step, p, number, off=()):
    """One pass on one example, as a step makes it."""
    return train.learn(run, [train.draw(run, step, number, p, 0)], off, True)[0]


@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_teaches_what_it_says_and_nothing_else(method, clip, tmp_path):
    """After each pass's backward, gradients are where the pass learns, and nowhere else."""
    run = prepared(*flags_of(method, clip, tmp_path))
    everything = dict(run.parts.unet.named_parameters()) | train.named(run.learners)
    for stage in run.method.stages:
        for i, p in enumerate(stage.passes):
            for q in everything.values():
                q.grad = None
            one_pass(run, 0, p, i)
            mine = [q for n in p.learns for one in run.learners[n]
                    for q in one.parameters().values()]
            if p.learns == ("word",) or "word" in p.learns:
                assert any(q.grad is not None for q in mine)
            got = {n for n, q in everything.items() if q.grad is not None}
            allowed = {n for n, q in everything.items() if any(q is one for one in mine)}
            assert got and got <= allowed, sorted(got - allowed)[:5]
            if p.sees != "whole":
                assert not [n for n in got if "temp_" in n or "transformer_in" in n]


def test_motiondirectors_paths_share_noise_and_the_look_acts_but_rests(folder):
    """Two clips: each has a look of its own; in the temporal pass that clip's look acts, without a
    gradient, and no look where its own pass was left out."""
    run = prepared("--method", "motiondirector", "--video", folder / "videos")
    spatial, temporal = run.method.stages[0].passes
    assert len(run.learners["look"]) == 2 and len(run.learners["motion"]) == 1
    for one in run.learners["look"]:
        for _, B in one.pairs.values():
            B.data.normal_(0, 0.3)
    done = one_pass(run, 0, spatial, 0)
    which = [i for i, one in enumerate(run.learners["look"])
             if any(p.grad is not None for p in one.parameters().values())]
    assert len(which) == 1 and str(which[0]) in done["clip"].rpartition("/")[2]
    for one in (*run.learners["look"], *run.learners["motion"]):
        for p in one.parameters().values():
            p.grad = None
    beside = one_pass(run, 0, temporal, 1)
    assert beside["t"] == done["t"] and beside["clip"] == done["clip"]
    assert [one.on for one in run.learners["look"]] == [i == which[0] for i in range(2)]
    alone = one_pass(run, 0, temporal, 1, {"look"})
    assert not any(one.on for one in run.learners["look"]) and alone["loss"] != beside["loss"]
    assert not any(p.grad is not None for one in run.learners["look"]
                   for p in one.parameters().values())


def test_a_fifth_of_the_spatial_passes_is_left_out(clip, monkeypatch):
    run = prepared("--method", "motiondirector", "--video", clip)
    trained, counts = train.named(run.learners), {0: 0, 1: 0}
    rests = []

    def learn(run, drawn, off, last):
        motion = drawn[0].p.learns == ("motion",)
        counts[motion] += 1
        if motion:
            rests.append(off == {"look"})
        assert last == motion and len(drawn) == 1
        return [{"loss": 0.0, "weight": 1.0}]

    monkeypatch.setattr(train, "learn", learn)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    for step in range(400):
        train.advance(run, step, optimizer, trained)
    assert abs(counts[0] / 400 - 0.8) < 0.06 and counts[1] == 400
    assert rests.count(True) == 400 - counts[0]


def test_one_batch_teaches_what_its_passes_teach_one_by_one(clip, monkeypatch):
    """NewMove's clip and prior clip, where they are small; MotionDirector's paths stay apart."""
    run = prepared("--method", "newmove", "--video", clip, "--precision", "fp32")
    monkeypatch.setattr(model, "dropout", lambda x, p, training: x)  # whose masks differ
    trained = train.named(run.learners)
    drawn = [train.draw(run, 0, i, p, 0) for i, p in enumerate(run.method.stages[0].passes)]
    assert train.batches(run, drawn) == [drawn]
    other = replace(drawn[1], p=replace(drawn[1].p, learns=()))
    assert train.batches(run, [drawn[0], other]) == [[drawn[0]], [other]]
    found = []
    for together in ([drawn], [[d] for d in drawn]):
        logs = [line for part in together for line in train.learn(run, part, set(), True)]
        found.append(([p.grad.clone() for p in trained.values()], [d["loss"] for d in logs]))
        for p in trained.values():
            p.grad = None
    for a, b in zip(found[0][0], found[1][0]):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9
    torch.testing.assert_close(found[0][1], found[1][1])
    assert found[0][1][0] != found[0][1][1]
    monkeypatch.setattr(model, "LARGE", 1)
    assert train.batches(run, drawn) == [[d] for d in drawn]
    run = prepared("--method", "motiondirector", "--video", clip)
    monkeypatch.undo()
    drawn = [train.draw(run, 0, i, p, 0) for i, p in enumerate(run.method.stages[0].passes)]
    assert train.batches(run, drawn) == [[d] for d in drawn]


def test_newmoves_passes_draw_apart_and_its_prior_has_its_own_captions(clip):
    run = prepared("--method", "newmove", "--video", clip, "--augment", "none")
    motion, prior = run.method.stages[0].passes
    assert (motion.of, prior.of, prior.weight) == ("clips", "prior", 0.5)
    ts = [(one_pass(run, s, motion, 0)["t"], one_pass(run, s, prior, 1)["t"])
          for s in range(3)]
    assert any(a != b for a, b in ts)
    assert len({c.prompt for c in run.prior}) > 1 and run.clips[0].prompt == "thing 0 hopping sks"


def test_customizes_absorber_is_on_in_both_stages_and_left_out_of_the_result(clip, tmp_path):
    learn(*flags_of("customize-a-video", clip, tmp_path), "--absorber", "both")
    motion = lora.read_adapter(tmp_path / "customize-a-video.safetensors")
    look = lora.read_adapter(tmp_path / "customize-a-video-look.safetensors")
    assert all("temp_" in s or "transformer_in" in s for s in motion.pairs)
    assert not motion.words and look.words["<look>"].shape == (4, 64)
    assert all(".attentions." in s for s in look.pairs)
    assert any(B.abs().max() > 0 for _, B in look.pairs.values())
    run = prepared(*flags_of("customize-a-video", clip, tmp_path), "--absorber", "lora")
    first, second = (s.passes[0] for s in run.method.stages)
    one_pass(run, 0, second, 0)
    assert run.learners["look"][0].on
    assert train.acting(run.method, run.method.stages[1]) == ["motion"]
    assert train.acting(run.method, run.method.stages[0]) == ["look"]
    assert train.caption_of(run, first, run.clips[0]) == "thing 0 hopping"


def test_another_programs_lora_can_absorb_the_looks(clip, tmp_path):
    unet = model.load_unet(TINY)
    site = next(iter(lora.sites(unet, "spatial-attention")))
    A, B = torch.randn(2, 64), torch.randn(64, 2)
    lora.save_file(lora.to_peft({site: (A, B)}), tmp_path / "look.safetensors")
    whole = {n: p * 0.9 for n, p in lora.select(unet, "spatial").items()}
    lora.save_file(whole, tmp_path / "unet.safetensors")
    plain = unet.get_submodule(site).weight.detach().clone()
    for name, swapped in (("look.safetensors", False), ("unet.safetensors", True)):
        run = prepared("--method", "customize-a-video", "--video", clip, "--absorber",
                       tmp_path / name)
        assert len(run.method.stages) == 1  # nothing to learn about the look
        p = run.method.stages[0].passes[0]
        one_pass(run, 0, p, 0)
        assert run.learners["look"][0].on
        weight = run.parts.unet.get_submodule(site).weight
        assert torch.allclose(weight, plain * 0.9 if swapped else plain + B @ A, atol=1e-6)
        train.switch(run.learners, act=["motion"])
        assert torch.equal(run.parts.unet.get_submodule(site).weight, plain)


def test_newmove_learns_a_subject_beside_the_motion(folder, clip, tmp_path):
    learn("--method", "newmove", "--video", clip, "--images", folder / "thing.png", "--out",
          tmp_path, "--subject-prompt", "a X* star", "--first-steps", 2, "--steps", 3)
    adapter = lora.read_adapter(tmp_path / "newmove.safetensors")
    base = model.load_unet(TINY).state_dict()
    assert set(adapter.words) == {"X*"}
    changed = {n for n, t in adapter.tensors.items() if not torch.equal(t, base[n])}
    assert any("temp_" in n for n in changed) and any(".resnets." in n for n in changed)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [len(line["passes"]) for line in log] == [2, 2, 3, 3, 3]


def test_motiondirector_learns_a_picture_alone(folder, tmp_path):
    learn("--method", "motiondirector", "--images", folder / "thing.png", "--out", tmp_path,
          "--prompt", "a star", "--steps", 3)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["motiondirector-look.safetensors"]
    look = lora.read_adapter(tmp_path / "motiondirector-look.safetensors")
    assert all(".attentions." in s for s in look.pairs)
    assert json.loads((tmp_path / "args.json").read_text())["layers"] is None  # no motion learns


def test_dreambooth_makes_its_own_prior_and_keeps_it(clip, tmp_path):
    learn(*flags_of("dreambooth", clip, tmp_path))
    kept = load_file(tmp_path / "prior.safetensors")
    assert len(kept) == 2 and kept["0"].shape == (1, 8, 16, 8, 8)
    assert not torch.equal(kept["0"], kept["1"])


def test_prior_clips_from_a_folder(folder, clip):
    run = prepared("--method", "custom-diffusion", "--video", clip, "--prior", folder / "videos")
    assert [c.prompt for c in run.prior] == ["thing 0 hopping", "thing 1 hopping"]


def test_a_prior_that_is_missing_is_told(clip, capsys):
    run = prepared("--method", "newmove", "--video", clip, "--weights", TINY)
    assert "forgets" in capsys.readouterr().err
    assert [p.of for p in run.method.stages[0].passes] == ["clips"]


def test_textual_inversion_changes_one_vector(clip, tmp_path):
    learn(*flags_of("textual-inversion", clip, tmp_path))
    adapter = lora.read_adapter(tmp_path / "textual-inversion.safetensors")
    table = model.load_text(TINY).tower.token_embedding.weight
    assert not adapter.tensors and not adapter.pairs and set(adapter.words) == {"sks"}
    assert not torch.equal(adapter.words["sks"][0], table[model.words_to_ids("sks")[0]])


def test_full_tuning_becomes_lora_and_back_by_a_flag(clip):
    """NewMove's ablation: LoRA on its own layers, temporal convolutions included."""
    run = prepared("--method", "newmove", "--video", clip, "--rank", 4)
    (one,) = run.learners["motion"]
    assert isinstance(one, lora.LoRA) and any("temp_convs" in s for s in one.pairs)
    run = prepared("--method", "motiondirector", "--video", clip, "--rank", 0)
    assert isinstance(run.learners["motion"][0], train.Whole)


@pytest.mark.parametrize("score,steps", ((1, 1), (-1, 3)))
def test_training_stops_where_the_looks_score_falls(score, steps, clip, tmp_path):
    """A cosine is never over 1, so the first sample ends the run; and hardly ever −1."""
    train.main([*map(str, ("--video", clip, "--out", tmp_path, "--steps", 3, "--preview-every", 1,
                           "--preview-steps", 2, "--look-prompt", "a star",
                           "--stop-at-appearance", score))])
    assert lora.read_adapter(tmp_path / "vmc.safetensors").meta["step"] == str(steps)


def test_flags_reach_the_pass_that_learns_the_motion(clip):
    run = prepared("--method", "motiondirector", "--video", clip, "--loss", "residual-l2",
                   "--stride", 2, "--timesteps", "coarse", "--alpha", 0.9,
                   "--look-rank", 8, "--train-word", "--word", "V*", "--noise-prior", 0.25)
    spatial, temporal = run.method.stages[0].passes
    assert (spatial.loss, temporal.loss, temporal.stride) == ("mse", "residual-l2", 2)
    assert (temporal.timesteps, temporal.alpha) == ("coarse", 0.9)
    assert run.method.parts["look"].rank == 8 and run.method.noise_prior == 0.25
    assert "word" in temporal.learns and run.clips[0].prompt.endswith("V*")


def test_reverse_learns_the_clip_backward(clip):
    there, back = (prepared("--video", clip, *more).clips[0] for more in ((), ("--reverse",)))
    assert torch.equal(there.video.flip(1), back.video)


# ------------------------------------------------------------------------------------------------
# Views


def test_views_show_what_they_say(tiny):
    scenes = world.sample_scenes(1, torch.Generator().manual_seed(0))
    clip = data.Clip(world.render(scenes)[0], "a thing", None)
    encode = lambda video: tiny.vae.encode_video(video[None])
    clip.latents = encode(clip.video)
    g = torch.Generator().manual_seed(0)
    assert data.whole(clip, g, encode)[0] is clip.latents
    one, frames = data.frame(clip, g, encode)
    assert torch.equal(one, clip.latents[:, :, frames]) and one.shape[2] == 1
    part, frames = data.crop(clip, g, encode)
    assert part.shape == one.shape and not torch.equal(part, clip.latents[:, :, frames])
    changed, frames = data.augmented(clip, g, encode)
    assert changed.shape == clip.latents.shape and frames == slice(None)


def test_recoloured_clips_change_their_look_and_nothing_else():
    """Three channels, far apart, come out in any order, as they are or as negatives; pixels that
    were alike, in one frame or in all, still are, and those that were not are not."""
    tiles = torch.randint(2, (1, 4, 8, 8)) * 0.1
    video = torch.cat([tiles + shift for shift in (-0.4, -0.1, 0.2)])
    clip, g, ways = SimpleNamespace(video=video), torch.Generator().manual_seed(0), set()
    for _ in range(150):
        seen, frames = data.recoloured(clip, g, lambda v: v)
        dark, bright = (torch.stack([c[tiles[0] == x] for c in seen]) for x in tiles.unique())
        assert frames == slice(None) and dark.std(1).max() < 1e-6 and bright.std(1).max() < 1e-6
        negative = (bright.mean() < dark.mean()).item()
        ways.add((*seen.mean((1, 2, 3)).argsort().tolist(), negative))
    assert len(ways) == 12


def test_crops_are_a_third_to_two_thirds_wide():
    """On a ramp from left to right, a crop's width is its range of values."""
    ramp = torch.linspace(-1, 1, 300).view(1, 1, 1, -1).expand(3, 1, 300, 300)
    g, widths = torch.Generator().manual_seed(1), []
    for _ in range(60):
        part = data.zoom(ramp, *data.CROP, g)
        widths.append(((part.max() - part.min()) / 2).item())
    assert 0.32 < min(widths) < 0.4 and 0.6 < max(widths) < 0.68


# ------------------------------------------------------------------------------------------------
# Resuming


@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_resumes_to_the_bit(method, clip, tmp_path):
    """Stopped inside each stage, and between them where there are two."""
    base = ("--method", method, "--video", clip, "--train-word", "--word", "sks")
    base = base if method != "vmc" else base[:4]
    two = ("--first-steps", 2) if method == "customize-a-video" else ()
    learn(*base, *two, "--out", tmp_path / "whole", "--steps", 4)
    learn(*base, *two, "--out", tmp_path / "parts", "--steps", 1)
    learn(*base, *two, "--out", tmp_path / "parts", "--steps", 4, "--resume")
    files = sorted(p.name for p in (tmp_path / "whole").glob("*.safetensors"))
    assert files
    for name in files:
        one, two_ = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
        assert one.keys() == two_.keys()
        assert all(torch.equal(one[n], two_[n]) for n in one), name


def test_stages_follow_each_other():
    m = train.METHODS["customize-a-video"]
    steps = [s.steps for s in m.stages]
    assert [train.stage_at(m, s) for s in (0, steps[0] - 1, steps[0], sum(steps))] == [0, 0, 1, 1]


def test_save_every_keeps_the_adapters_on_the_way(clip, tmp_path):
    learn("--video", clip, "--out", tmp_path, "--steps", 4, "--save-every", 2)
    kept = sorted(p.parent.name for p in (tmp_path / "steps").rglob("vmc.safetensors"))
    assert kept == ["000002", "000004"]


@pytest.mark.parametrize("more,says", [
    (("--look-rank", 4), "does nothing here"),
    (("--absorber", "lora"), "does nothing here"),
    (("--first-steps", 4), "does nothing here"),
    (("--prior-weight", 1), "does nothing here"),
    (("--alpha", 0.2), "does nothing here"),
    (("--beta", 0.2), "does nothing here"),
    (("--method", "motiondirector", "--stride", 2), "does nothing here"),
    (("--method", "newmove", "--dropout", 0.2), "does nothing here"),
    (("--method", "textual-inversion", "--rank", 2), "does nothing here"),
    (("--look-prompt", "x"), "does nothing here"),
    (("--images", "x.png"), "does nothing here"),
    (("--method", "motiondirector", "--images", "x.png"), "does nothing here"),
    (("--noise-prior", 1.5), "wanted 0 to 1"),
    (("--method", "lora", "--dropout", 1.5), "wanted 0 to"),
    (("--batch", -2), "wanted 1 or more"),
    (("--method", "newmove", "--alpha", 2), "wanted 0 to 1"),
    (("--rank", 2, "--layers", ".*norm.*"), "no linear layer"),
    (("--stop-at-appearance", 0.2), "give --look-prompt"),
    (("--method", "newmove", "--prompt", "a", "b"), "captions for 1 clips"),
    (("--method", "textual-inversion", "--word", ""), "needs a name"),
    (("--method", "newmove", "--prior", "/nowhere"), "does not exist"),
    (("--method", "newmove", "--prior", "folder"), "folder does not exist"),
    (("--prior-clips", 3), "has not prior clips"),
    (("--stop-at-appearance", 0.2, "--look-prompt", "x", "--preview-every", 1, "--clip", "ViT-L-14",
      "--clip-weights", "/nowhere"), "ViT-L-14 needs its weights"),
])
def test_flags_that_do_not_go_together_are_refused(more, says, clip, tmp_path):
    """Before anything is written."""
    with pytest.raises(BadInput, match=says):
        learn("--video", clip, "--out", tmp_path / "o", *more)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("flag,value", [("--loss", "mse"), ("--augment", "recoloured")])
def test_pictures_alone_refuse_what_is_for_clips(flag, value, folder, tmp_path):
    with pytest.raises(BadInput, match="whole clips"):
        learn("--method", "motiondirector", "--images", folder / "thing.png", "--out", tmp_path,
              flag, value)


# ------------------------------------------------------------------------------------------------
# Uses: refining, Diffusion Motion Transfer


def test_refining_resizes_and_keeps_what_strength_leaves(tiny, tmp_path):
    """Strength 0 is the VAE's round trip; more strength, more change."""
    scenes = world.sample_scenes(1, torch.Generator().manual_seed(2))
    video = world.render(scenes)
    args = generate.parse(["--prompt", "a red star", "--refine", str(TINY)])
    args.refine_width = args.refine_height = 64
    args.device, args.precision, args.refine_guidance = "cpu", "fp32", 1.0
    args.refine_steps, change = 10, []
    for strength in (0.0, 0.3, 0.9):
        args.strength = strength
        out = generate.refine(tiny, video, ["a thing"], [0], args)
        change.append((out - video).abs().mean().item())
    assert change[0] < 0.05 and change[0] < change[1] < change[2]
    args.refine_width, args.refine_height = 96, 128
    assert generate.refine(tiny, video, ["a thing"], [0], args).shape == (1, 3, 16, 128, 96)


def test_pairwise_differences_by_hand():
    """Features that differ by a constant, or by scale, move alike: 0; reversed ones: 2."""
    g = torch.Generator().manual_seed(0)
    f = torch.randn(1, 5, 8, generator=g)
    loss = generate.pairwise_differences_loss
    assert loss(f + torch.randn(1, 1, 8, generator=g), f).item() == pytest.approx(0, abs=1e-6)
    assert loss(3 * f, f).item() == pytest.approx(0, abs=1e-6)
    assert loss(-f, f).item() == pytest.approx(2, abs=1e-6)


def test_dmt_pulls_features_towards_the_reference(tiny, clip, tmp_path):
    """Ten of Adam's steps lower the loss that it minimises; the command runs."""
    video = data.read_video(clip, 16, (64, 64), 8)
    latents = tiny.vae.encode_video(video[None])
    x = sampler.noise_like_shape(latents.shape[1:], [0]).requires_grad_()
    text = tiny.text(["a red star"])
    with torch.no_grad():
        want = generate.frame_features(tiny.unet, latents, 100, text)
    adam, values = torch.optim.Adam([x], lr=0.007), []
    for _ in range(4):
        got = generate.frame_features(tiny.unet, x, 100, text)
        loss = generate.pairwise_differences_loss(got, want)
        x.grad, = torch.autograd.grad(loss, x)
        adam.step()
        values.append(loss.item())
    assert values[-1] < values[0]
    generate.main(["--dmt", str(clip), "--prompt", "a red star", "--steps", "4", "--out",
                   str(tmp_path), "--frames", "8"])
    assert len(list(tmp_path.glob("*.mp4"))) == 1


def test_low_frequencies_keep_what_is_coarse_and_drop_what_is_fine():
    fine = torch.ones(16, 16)
    fine[::2] = -1
    coarse = torch.linspace(-1, 1, 16).expand(16, 16)
    low = generate.low_frequencies((coarse + fine).expand(1, 2, 3, 16, 16))
    assert (low[..., 2:-2, 2:-2] - coarse[2:-2, 2:-2]).abs().max() < 0.2


# ------------------------------------------------------------------------------------------------
# Adding a method


def test_the_readmes_own_methods_apply_and_run(clip, tmp_path):
    """The two diffs of "Add your own", each at most 30 lines in at most 2 files."""
    diffs = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(diffs) == 2
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in ROOT.glob("*.py"):
        (copy / path.name).write_text(path.read_text())
    (copy / "tiny").symlink_to(ROOT / "tiny")
    for diff in diffs:
        assert len(diff.splitlines()) <= 30 and diff.count("diff --git") <= 2
        subprocess.run(["git", "apply", "-"], cwd=copy, input=diff, text=True, check=True)
    for more in (("--method", "tap"), ("--loss", "spectral", "--align", "x0")):
        flags = ("--video", clip, "--out", tmp_path / "out", "--steps", 2, *more, *FAST)
        done = subprocess.run([sys.executable, copy / "train.py", *map(str, flags)],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    line = (tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["loss"] > 0
