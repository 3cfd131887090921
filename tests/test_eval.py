"""eval.py: known answers, equality with transformers, and that each figure falls when it should."""
import json
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import data
import eval
import model
from tiny import world


@pytest.fixture(scope="module")
def clip():
    return eval.load_clip()


def clips(n, motions=("moving left",), seed=0):
    scenes = world.sample_scenes(n, torch.Generator().manual_seed(seed), motions)
    return scenes, world.render(scenes)


# ------------------------------------------------------------------------------------------------
# CLIP


def test_consistency_and_diversity_by_hand():
    """Frames (1,0), (0,1), (1,0): cosines 0, 1, 0. Videos with means (1,0) and (0.6,0.8): 0.4."""
    frames = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert eval.temporal_consistency(frames) == pytest.approx(1 / 3)
    videos = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])]
    assert eval.diversity(videos) == pytest.approx(0.4)
    assert eval.diversity(videos[:1]) is None


def test_text_alignment_falls_with_the_wrong_words(clip):
    scenes, videos = clips(12)
    right = world.captions(scenes)
    mean = lambda prompts: sum(
        eval.text_alignment(clip, v, p) for v, p in zip(videos, prompts)) / len(videos)
    assert mean(right) > mean(right[1:] + right[:1]) + 0.02


def test_consistency_falls_when_frames_are_mixed(clip):
    _, videos = clips(6)
    features = [clip.images(v) for v in videos]
    steady = sum(map(eval.temporal_consistency, features)) / 6
    mixed = eval.temporal_consistency(torch.stack([f[0] for f in features]))
    assert steady > mixed + 0.05


def test_hubs_clip_equals_transformers():
    """A narrow CLIPModel with random weights: picture and text features, and PickScore."""
    transformers = pytest.importorskip("transformers")
    import open_clip

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "hidden_act": "gelu"}
    theirs = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=tower | {"vocab_size": 49408, "max_position_embeddings": 77,
                             "eos_token_id": 49407},
        vision_config=tower | {"image_size": 32, "patch_size": 8}, projection_dim=16)).eval()
    net = open_clip.model.CLIP(
        16, {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8,
             "mlp_ratio": 2.0},
        {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
         "mlp_ratio": 2.0})
    model.load_strictly(net, eval.clip_from_hub(theirs.state_dict()), "random")
    ours = eval.Clip(net, model.tokenize, 32)
    video = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        pictures = theirs.get_image_features(video.transpose(0, 1))
        words = theirs.get_text_features(model.tokenize(["a red star", "two"]))
    pictures, words = (getattr(x, "pooler_output", x) for x in (pictures, words))
    assert torch.allclose(ours.images(video), F.normalize(pictures, dim=-1), atol=1e-5)
    assert torch.allclose(ours.texts(["a red star", "two"]), F.normalize(words, dim=-1), atol=1e-5)
    want = theirs.logit_scale.exp() * F.cosine_similarity(pictures, words[:1]).mean()
    assert eval.pick_score(ours, video, "a red star") == pytest.approx(want.item(), abs=1e-4)


# ------------------------------------------------------------------------------------------------
# Copying


def test_copies_are_found_and_others_are_not(clip):
    _, videos = clips(4)
    features = [clip.images(v) for v in videos]
    assert eval.copy_score(features[0], features[:1]) == pytest.approx(1, abs=1e-5)
    assert eval.copy_score(features[0], features[1:]) < 1 - 1e-3


# ------------------------------------------------------------------------------------------------
# Tracks


def test_tracks_follow_rendered_things():
    """Points on things and on floors against the exact paths: median error at most one pixel, of
    each kind on its own."""
    scenes, videos = clips(40, ("moving left", "moving up", "hopping",
                                "standing still while the camera pans"), seed=3)
    path, errors = world.trajectory(scenes), {"things": [], "still": [], "panned": []}
    for i, video in enumerate(videos):
        tracks = eval.track(video)
        far = (tracks[:, 0] - torch.stack([path.x[i, 0], path.y[i, 0]])).norm(dim=1)
        moved = torch.stack([path.x[i] - path.x[i, 0], path.y[i] - path.y[i, 0]], 1)
        on, off = far < 0.5 * scenes.radius[i], far > 3.5 * scenes.radius[i]
        shift = tracks - tracks[:, :1]
        if path.pan[i].abs().max() == 0:
            errors["things"].append((shift[on] - moved).norm(dim=-1).flatten())
            errors["still"].append(shift[off].norm(dim=-1).flatten())
        elif scenes.background[i] in (2, 3):  # along stripes and waves nothing is seen to move
            pan = torch.stack([path.pan[i], torch.zeros(16)], 1)
            beside = (tracks[:, 0, 1] - path.y[i, 0]).abs() > 2 * scenes.radius[i]
            inside = tracks[:, :1, 0] + path.pan[i] > 6  # (P, F), still in the picture
            errors["panned"].append((shift - pan).norm(dim=-1)[beside[:, None] & inside])
    for kind, found in errors.items():
        found = torch.cat(found)
        assert len(found) >= 160 and found.median() <= 1, kind


def path(*steps):
    """One track (1, F, 2) from displacements."""
    return torch.cat([torch.zeros(1, 2), torch.tensor(steps).float().cumsum(0)])[None]


def test_motion_fidelity_by_hand():
    """Right and up against right and right: cosines 1 and 0, mean ½, both ways: 1."""
    right_up, right = path((1, 0), (0, 1)), path((1, 0), (1, 0))
    assert eval.motion_fidelity(right_up, right_up) == pytest.approx(2)
    assert eval.motion_fidelity(right_up, right) == pytest.approx(1)
    assert eval.motion_fidelity(right, path((-1, 0), (-1, 0))) == pytest.approx(-2)
    # The best of several counts, each way: of two made tracks one fits and one is opposed.
    both = torch.cat([right, -right])
    assert eval.motion_fidelity(right, both) == pytest.approx(1 + (1 - 1) / 2)
    still = path((0, 0), (0, 0))
    assert eval.motion_fidelity(still, still) == pytest.approx(2)
    assert eval.motion_fidelity(still, right) == pytest.approx(0)
    assert eval.motion_fidelity(still, still[:0]) == 0


# ------------------------------------------------------------------------------------------------
# The command


def write_run(folder, videos, prompts, **settings):
    """A folder as generate.py leaves it."""
    names = [f"{i}.mp4" for i in range(len(videos))]
    for name, video in zip(names, videos):
        data.write_video(folder / name, video, world.FPS)
    listed = [(name, prompt, 0) for name, prompt in zip(names, prompts)]
    (folder / "settings.json").write_text(json.dumps({"videos": listed} | settings))


def score(*runs_and_flags):
    """{run: {metric: number}}, as the command writes it into the first run's folder."""
    eval.main([*map(str, runs_and_flags), "--size", "64"])
    return json.loads((runs_and_flags[0] / "metrics.json").read_text())["table"]


def measure(folder, *flags):
    return score(folder, "--no-world", *flags)[folder.name]


class Brightness(torch.nn.Module):
    """A stand-in for a scorer in TorchScript: (B, 3, …) -> (B, 2), or a distance of two."""

    def forward(self, a: torch.Tensor):
        m = a.flatten(1).mean(1, keepdim=True)
        return torch.cat([m, -m], 1)


class Apart(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor):
        return (a - b).abs().flatten(1).mean(1)


def test_scorers_given_in_torchscript(tmp_path):
    """The class is 0 for bright videos, 1 for dark ones; the distance of grey 0.5 and −0.5 is 1."""
    bright, dark = torch.full((3, 16, 64, 64), 0.5), torch.full((3, 16, 64, 64), -0.5)
    write_run(tmp_path / "run", [bright, dark], ["a", "a"])
    write_run(tmp_path / "clips", [bright], ["a"])
    torch.jit.script(Brightness()).save(tmp_path / "bright.pt")
    torch.jit.script(Apart()).save(tmp_path / "apart.pt")
    flags = "--classifier", tmp_path / "bright.pt", "--lpips", tmp_path / "apart.pt"
    row = measure(tmp_path / "run", *flags, "--reference", tmp_path / "clips" / "0.mp4")
    assert row["motion accuracy (classifier)"] == 0.5
    assert row["diversity (LPIPS)"] == pytest.approx(1, abs=0.02)
    assert measure(tmp_path / "run", *flags, "--motion-class", 1)[
        "motion accuracy (classifier)"] == 0.5
    same = measure(tmp_path / "clips", *flags)
    assert "diversity (LPIPS)" not in same  # one video differs from nothing
    dark_only = measure(tmp_path / "clips", *flags, "--motion-class", 1)
    assert dark_only["motion accuracy (classifier)"] == 0


def test_a_run_against_itself_and_against_another(tmp_path, capsys):
    scenes, videos = clips(2, ("hopping",))
    for i, name in enumerate(("hop", "other")):
        write_run(tmp_path / name, videos[i : i + 1], world.captions(scenes)[i : i + 1])
    table = score(tmp_path / "hop", tmp_path / "other", "--reference", tmp_path / "hop" / "0.mp4",
                  "--world")
    own, other = table["hop"], table["other"]
    assert own["copy score (tiny CLIP features)"] == pytest.approx(1, abs=1e-4)
    assert own["motion fidelity"] == pytest.approx(2, abs=1e-3)
    assert other["motion fidelity"] < own["motion fidelity"]
    assert own["same kind of motion"] == other["same kind of motion"] == 1
    assert own["motion accuracy (tiny classifier)"] == 1
    assert own["trajectory correlation"] == pytest.approx(1, abs=1e-3)
    assert own["background"] == 1 and "motion fidelity" in capsys.readouterr().out


def test_the_worlds_figures_fall_when_time_runs_backward_or_the_prompt_is_another(tmp_path):
    """The words of a background or of a motion ("in a circle", "blue striped") name no thing."""
    scenes, videos = clips(40, ("moving in a circle", "moving left"), seed=5)
    one = next(i for i, (c, b, s) in enumerate(zip(scenes.colour, scenes.background, scenes.shape))
               if b == 1 and c not in (5,) and s not in (0,) and scenes.motion[i] == 7)
    left = (scenes.motion == 0).nonzero()[0, 0]
    circle, blue = (scenes.shape == 0).nonzero()[0, 0], (scenes.colour == 5).nonzero()[0, 0]
    for name, video, prompt in (
            ("right", videos[one], world.captions(scenes)[one]),
            ("wrong", videos[one], "a blue circle moving in a circle on a grey background"),
            ("circle", videos[circle], "a star moving in a circle"),
            ("blue", videos[blue], "a red thing on a blue striped background"),
            ("left", videos[left], "a thing"), ("back", videos[left].flip(1), "a thing")):
        write_run(tmp_path / name, [video], [prompt])
    write_run(tmp_path / "clip", [videos[left]], [""])
    table = score(*(tmp_path / n for n in ("right", "wrong", "left", "back", "circle", "blue")),
                  "--world",
                  "--reference", tmp_path / "clip" / "0.mp4")
    assert [table["right"][k] for k in ("colour", "shape", "background")] == [1, 1, 1]
    assert [table["wrong"][k] for k in ("colour", "shape", "background")] == [0, 0, 0]
    assert table["circle"]["shape"] == table["blue"]["colour"] == 0
    assert table["left"]["colour"] is None and table["left"]["trajectory correlation"] > 0.99
    assert table["back"]["trajectory correlation"] < -0.99
    assert table["back"]["motion fidelity"] < table["left"]["motion fidelity"] - 0.5
    for metric in ("same kind of motion", "motion accuracy (tiny classifier)"):
        assert table["left"][metric] == 1 and table["back"][metric] == 0


def test_pick_score_falls_with_the_wrong_words(clip):
    scenes, videos = clips(8)
    right = world.captions(scenes)
    mean = lambda prompts: sum(eval.pick_score(clip, v, p) for v, p in zip(videos, prompts)) / 8
    assert mean(right) > mean(right[1:] + right[:1])


@pytest.mark.parametrize("hub", (True, False))
def test_any_clip_of_open_clips_with_local_weights(hub, tmp_path):
    """A narrow model under a name of its own, its file in either format: the same features."""
    import open_clip

    tower = {"layers": 2, "width": 32}
    config = {"embed_dim": 16, "vision_cfg": tower | {"image_size": 32, "patch_size": 8,
                                                      "head_width": 16},
              "text_cfg": tower | {"context_length": 77, "vocab_size": 49408, "heads": 2}}
    (tmp_path / "narrow.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "narrow.json")
    net = open_clip.create_model("narrow", pretrained=None, load_weights=False).eval()
    state = dict(net.state_dict())
    if hub:
        transformers = pytest.importorskip("transformers")
        like = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
                "num_attention_heads": 2, "hidden_act": "gelu"}
        theirs = transformers.CLIPModel(transformers.CLIPConfig(
            text_config=like | {"vocab_size": 49408, "max_position_embeddings": 77},
            vision_config=like | {"image_size": 32, "patch_size": 8}, projection_dim=16))
        state = theirs.state_dict()
        net.load_state_dict(eval.clip_from_hub(state), strict=False)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    clip = eval.load_clip("narrow", tmp_path / "w.safetensors")
    _, videos = clips(1)
    with torch.no_grad():
        frames = F.interpolate((videos[0].transpose(0, 1) + 1) / 2, (32, 32), mode="bicubic",
                               antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN,
                                                              open_clip.OPENAI_DATASET_STD))
        want = F.normalize(net.encode_image((frames - mean) / std), dim=-1)
    assert torch.allclose(clip.images(videos[0]), want, atol=1e-5)


def test_figures_that_are_no_number_are_left_empty(tmp_path):
    class Nothing(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor):
            return (a - b).abs().flatten(1).mean(1) * float("nan")
    _, videos = clips(2)
    write_run(tmp_path / "run", videos, ["a", "a"])
    torch.jit.script(Nothing()).save(tmp_path / "nothing.pt")
    row = measure(tmp_path / "run", "--lpips", tmp_path / "nothing.pt")
    assert row["diversity (LPIPS)"] is None
    assert "NaN" not in (tmp_path / "run" / "page.html").read_text()


def test_sscd_is_fed_as_its_authors_say(tmp_path):
    """288 pixels, ImageNet's mean and deviation: a picture of the mean colour gives zeros."""
    class See(torch.nn.Module):
        def forward(self, x: torch.Tensor):
            return torch.cat([x.flatten(1)[:, :1] + 1.0, torch.full((len(x), 1), float(x.shape[-1]),
                                                                    dtype=x.dtype)], 1)
    torch.jit.script(See()).save(tmp_path / "sscd.pt")
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1).expand(3, 2, 64, 64) * 2 - 1
    got = eval.SSCD(tmp_path / "sscd.pt").images(mean)
    assert torch.allclose(got, F.normalize(torch.tensor([[1.0, 288.0]] * 2), dim=1), atol=1e-6)


def test_the_appearance_score_reads_the_prompt_without_its_motion(tmp_path, clip):
    scenes, videos = clips(1, ("moving left",))
    look = world.captions(scenes, motion=False)[0]
    prompt = world.captions(scenes)[0]
    write_run(tmp_path / "run", [videos[0]], [prompt])
    row = measure(tmp_path / "run", "--motion-words", "moving left")
    video = data.read_video(tmp_path / "run" / "0.mp4", 16, (64, 64), 8)
    aligned = row["text alignment (tiny CLIP)"]
    assert row["appearance score"] == pytest.approx(eval.text_alignment(clip, video, look))
    assert aligned == pytest.approx(eval.text_alignment(clip, video, prompt))
    assert row["appearance score"] != aligned
    assert measure(tmp_path / "run", "--motion-words", "mov")["appearance score"] is None


def test_keyframes_and_given_tracks(tmp_path):
    _, videos = clips(1, ("moving left",))
    video = videos[0].clone()
    video[:, 8:] = torch.rand(3, 8, 64, 64)  # the second half is noise
    write_run(tmp_path / "run", [video], ["a thing"])
    steady = measure(tmp_path / "run", "--keyframes", 0, 2, 4)["temporal consistency (tiny CLIP)"]
    assert steady > measure(tmp_path / "run")["temporal consistency (tiny CLIP)"] + 0.05
    with pytest.raises(model.BadInput, match="has 16 frames"):
        measure(tmp_path / "run", "--keyframes", 0, 16)
    (tmp_path / "tracks" / "run").mkdir(parents=True)
    (tmp_path / "tracks" / "clips").mkdir()
    line = np.stack([np.linspace(0, 15, 16), np.zeros(16)], 1)[None]
    np.save(tmp_path / "tracks" / "run" / "0.npy", line)
    data.write_video(tmp_path / "clips" / "0.mp4", video, world.FPS)
    flags = "--tracks", tmp_path / "tracks", "--reference", tmp_path / "clips" / "0.mp4"
    for track, fidelity in ((line, 2), (-line, -2)):
        np.save(tmp_path / "tracks" / "clips" / "0.npy", track)
        assert measure(tmp_path / "run", *flags)["motion fidelity"] == pytest.approx(fidelity)
    np.save(tmp_path / "tracks" / "clips" / "0.npy", line[:, :5])
    with pytest.raises(model.BadInput, match=r"wanted \(P, 16, 2\)"):
        measure(tmp_path / "run", *flags)


def test_copies_are_counted_above_what_the_base_model_reaches(tmp_path):
    _, videos = clips(4)
    write_run(tmp_path / "base", videos[:3], ["a"] * 3, adapter=[])
    write_run(tmp_path / "copies", videos[3:], ["a"])
    table = score(tmp_path / "base", tmp_path / "copies", "--no-world", "--reference",
                  tmp_path / "copies" / "0.mp4")
    assert table["base"]["share of copies"] < 0.5 and table["copies"]["share of copies"] == 1


# ------------------------------------------------------------------------------------------------
# The classifier of motions


def test_motions_are_told_and_falls_when_time_runs_backward():
    scenes, videos = clips(60, world.MOTIONS, seed=11)
    with torch.no_grad():
        told = eval.tiny_trn()(videos).argmax(1)
        backward = eval.tiny_trn()(videos.flip(2)).argmax(1)
    assert (told == scenes.motion).float().mean() >= 0.95
    turned = world.is_motion(scenes.motion, "moving left", "moving up", "growing", "shrinking")
    assert (backward == scenes.motion)[turned].float().mean() <= 0.1


# ------------------------------------------------------------------------------------------------
# Pages


def browse(page, *scripts):
    """The page's DOM after its scripts, and these, have run in headless Chromium."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium here")
    html = page.read_text()
    for script in scripts:
        html = html.replace("</html>", f"<script>{script}</script></html>")
    copy = page.with_name("driven.html")
    copy.write_text(html)
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--autoplay-policy=no-user-gesture-required", f"--user-data-dir={page.parent}/browser",
         "--virtual-time-budget=4000", "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=120)
    return done.stdout


NASTY = "a star</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"


def test_the_page_plays_and_nothing_in_it_acts(tmp_path):
    _, videos = clips(2, ("hopping",))
    data.write_video(tmp_path / "clip.mp4", videos[1], world.FPS)
    write_run(tmp_path / "one", videos, [NASTY, "two"])
    write_run(tmp_path / "two", videos, [NASTY, "two"])
    score(tmp_path / "one", tmp_path / "two", "--no-world", "--reference", tmp_path / "clip.mp4")
    page = tmp_path / "one" / "page.html"
    text = page.read_text()
    assert "src=\"http" not in text and "href=\"http" not in text  # self-contained
    assert NASTY not in text
    dom = browse(page, "setTimeout(() => document.body.dataset.loaded = [...document."
                 "querySelectorAll('video')].filter(v => v.readyState > 1).length, 3000)")
    assert dom.count("<video") == 6 and 'data-loaded="6"' in dom
    assert "<title>Videos and figures</title>" in dom and "<img src=" not in dom
    assert "&lt;script&gt;document.title" in dom and "motion fidelity" in dom


def test_a_study_is_blind_and_its_votes_are_counted(tmp_path, capsys):
    """Somebody who always takes run two's video, whichever side it is on."""
    _, videos = clips(8, ("hopping",))
    for name in ("one", "two"):
        write_run(tmp_path / name, videos[:4] if name == "one" else videos[4:], list("abcd"))
    write_run(tmp_path / "reference", videos[:1], [""])
    score(tmp_path / "one", tmp_path / "two", "--no-world", "--user-study", "--ratings",
          "--reference", tmp_path / "reference" / "0.mp4")
    page, key = tmp_path / "one" / "study.html", tmp_path / "one" / "study-key.json"
    names = json.loads(key.read_text())
    assert sorted(names.values()) == ["one"] * 4 + ["two"] * 4
    seen = json.loads(page.read_text().split('id="content">')[1].split("</script>")[0])
    assert '"one"' not in json.dumps(seen) and '"two"' not in json.dumps(seen)
    assert browse(page).count("<video") == 3  # reference, A and B
    dom = browse(page, f"const names = {key.read_text()};", """
        document.querySelectorAll("button.choose")[0].click();  // not before both are rated
        const early = votes.length;
        while (votes.length < content.pairs.length) {
          const side = content.pairs[votes.length].sides.findIndex(s => names[s.id] === "two");
          document.querySelectorAll("select").forEach(
            (s, i) => s.value = (i < 3) === (side === 0) ? 4 : 1);
          document.querySelectorAll("button.choose")[side].click();
        }
        document.body.append(Object.assign(document.createElement("code"),
                             {textContent: JSON.stringify({session, votes, early})}));""")
    votes = json.loads(dom.split("<code>")[1].split("</code>")[0])
    assert len(votes["votes"]) == 4 and votes["early"] == 0
    (tmp_path / "votes.json").write_text(json.dumps(votes))
    (tmp_path / "again.json").write_text(json.dumps(votes))  # the same visit
    capsys.readouterr()
    eval.main(["--votes", str(tmp_path / "votes.json"), str(tmp_path / "again.json"), "--key",
               str(key)])
    said = capsys.readouterr().out
    assert "one 0.0 %, two 100.0 % of 4 votes, p = 0.125" in said
    assert "one: motion 1.00 of 5 (4 ratings)" in said and "two: text 4.00 of 5" in said
    (tmp_path / "votes.json").write_text(json.dumps({"votes": [{"chosen": "?", "other": "?"}]}))
    with pytest.raises(model.BadInput, match="study's key"):
        eval.main(["--votes", str(tmp_path / "votes.json"), "--key", str(key)])


def test_binomial_by_hand():
    """8 of 10: 2·(45 + 10 + 1)/1024; 5 of 10 is what a fair coin does."""
    assert eval.binomial_p(8, 10) == pytest.approx(112 / 1024)
    assert eval.binomial_p(2, 10) == pytest.approx(112 / 1024)
    assert eval.binomial_p(5, 10) == 1


def test_train_folders_are_sampled_and_drawn_against_steps(tmp_path, capsys):
    import train

    _, videos = clips(1, ("hopping",))
    data.write_video(tmp_path / "clip.mp4", videos[0], world.FPS)
    train.main([*map(str, ("--method", "vmc", "--video", tmp_path / "clip.mp4", "--steps", 2,
                           "--save-every", 1, "--preview-every", 0, "--prompt", "a star hopping",
                           "--sampling-steps", 2, "--out", tmp_path / "run"))])
    eval.main([str(tmp_path / "run"), "--size", "64"])
    table = json.loads((tmp_path / "run" / "metrics.json").read_text())["table"]
    assert list(table) == ["base", "run", "step 1", "step 2"]
    assert table["run"] == table["step 2"] != table["base"]
    text = (tmp_path / "run" / "page.html").read_text()
    page = json.loads(text.split('id="content">')[1].split("</script>")[0])
    curve = next(iter(page["curves"].values()))["text alignment (tiny CLIP)"]
    assert [step for step, _ in curve] == [0, 1, 2]
    assert len(page["runs"][1]["losses"]) == 2
    before = (tmp_path / "run" / "eval" / "step-1" / "sheet.png").stat().st_mtime
    eval.main([str(tmp_path / "run"), "--size", "64"])  # nothing changed, nothing is made again
    assert (tmp_path / "run" / "eval" / "step-1" / "sheet.png").stat().st_mtime == before


@pytest.mark.parametrize("flags,says", [
    (("nowhere",), "is not a folder"), ((".", "--clip", "ViT-H-14"), "needs its weights"),
    ((".", "--clip-weights", "x"), "Give --clip too"),
    ((), "give folders to score"), (("--votes", "none.json"), "study-key.json does not exist"),
    ((".", "--keyframes", "3"), "two or more"), ((".", "--prompts", "none.txt"), "does not exist"),
])
def test_mistakes_are_told(flags, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(model.BadInput, match=says):
        eval.main(list(flags))


@pytest.mark.parametrize("settings,base", [
    ({"adapter": []}, True), ({"adapter": ["a"], "scale": [0.0]}, True), ({}, False),
    ({"adapter": ["a"], "scale": None}, False), ({"adapter": [], "dmt": "clip.mp4"}, False)])
def test_copies_are_counted_from_the_base_models_own_score(settings, base):
    """Of no adapter, or none that acts, and not led by a clip either."""
    args = SimpleNamespace(copy_threshold=None, sscd=None, clip=None)
    each = [[{eval.copy_name(args): 0.25}]]
    threshold = eval.copy_threshold(args, [SimpleNamespace(settings=settings)], each)
    assert threshold == (0.25 if base else None)
