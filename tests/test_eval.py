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

import eval
import model
from scores import figures, page, samples, study
from scores.clip import (
    SSCD,
    Clip,
    copy_score,
    diversity,
    load_clip,
    pick_score,
    temporal_consistency,
    text_alignment,
)
from scores.motion import tiny_trn
from scores.tracks import motion_fidelity, track
from support import adapter_file, media, tokenizer
from support.files import BadInput
from support.hub import clip_from_hub, load_strictly
from tiny import world


@pytest.fixture(scope="module")
def clip():
    return load_clip()


def clips(n, motions=("moving left",), seed=0):
    scenes = world.sample_scenes(n, torch.Generator().manual_seed(seed), motions)
    return scenes, world.render(scenes)


# ------------------------------------------------------------------------------------------------
# CLIP


def test_consistency_and_diversity_by_hand():
    """Frames (1,0), (0,1), (1,0): cosines 0, 1, 0. Videos with means (1,0) and (0.6,0.8): 0.4."""
    frames = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert temporal_consistency(frames) == pytest.approx(1 / 3)
    videos = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])]
    assert diversity(videos) == pytest.approx(0.4)
    assert diversity(videos[:1]) is None


def test_text_alignment_falls_with_the_wrong_words(clip):
    scenes, videos = clips(12)
    right = world.captions(scenes)
    mean = lambda prompts: sum(
        text_alignment(clip, v, p) for v, p in zip(videos, prompts)) / len(videos)
    assert mean(right) > mean(right[1:] + right[:1]) + 0.02


def test_consistency_falls_when_frames_are_mixed(clip):
    _, videos = clips(6)
    features = [clip.images(v) for v in videos]
    steady = sum(map(temporal_consistency, features)) / 6
    mixed = temporal_consistency(torch.stack([f[0] for f in features]))
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
    load_strictly(net, clip_from_hub(theirs.state_dict()), "random")
    ours = Clip(net, tokenizer.tokenize, 32)
    video = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        pictures = theirs.get_image_features(video.transpose(0, 1))
        words = theirs.get_text_features(tokenizer.tokenize(["a red star", "two"]))
    pictures, words = (getattr(x, "pooler_output", x) for x in (pictures, words))
    assert torch.allclose(ours.images(video), F.normalize(pictures, dim=-1), atol=1e-5)
    assert torch.allclose(ours.texts(["a red star", "two"]), F.normalize(words, dim=-1), atol=1e-5)
    want = theirs.logit_scale.exp() * F.cosine_similarity(pictures, words[:1]).mean()
    assert pick_score(ours, video, "a red star") == pytest.approx(want.item(), abs=1e-4)


# ------------------------------------------------------------------------------------------------
# Copying


def test_copies_are_found_and_others_are_not(clip):
    _, videos = clips(4)
    features = [clip.images(v) for v in videos]
    assert copy_score(features[0], features[:1]) == pytest.approx(1, abs=1e-5)
    assert copy_score(features[0], features[1:]) < 1 - 1e-3


# ------------------------------------------------------------------------------------------------
# Tracks


@pytest.mark.parametrize("size", (64, 256))
def test_tracks_follow_rendered_things(size):
    """Points on things and on floors against the exact paths: median error at most a 64th of the
    picture, of each kind on its own, at the world's size and enlarged; what is said to hold, does.
    """
    scenes, videos = clips(24 if size == 64 else 16, (
        "moving left", "moving up", "hopping", "standing still while the camera pans"), seed=3)
    path, errors = world.trajectory(scenes), {"things": [], "still": [], "panned": []}
    held_of = {True: [], False: []}  # of tracks that are right, and of those that went astray
    for i, video in enumerate(videos):
        large = F.interpolate(video.transpose(0, 1), (size, size), mode="bicubic")
        tracks, held = track(large.transpose(0, 1))
        tracks = tracks * 64 / size
        far = (tracks[:, 0] - torch.stack([path.x[i, 0], path.y[i, 0]])).norm(dim=1)
        moved = torch.stack([path.x[i] - path.x[i, 0], path.y[i] - path.y[i, 0]], 1)
        on, off = far < 0.5 * scenes.radius[i], far > 3.5 * scenes.radius[i]
        shift = tracks - tracks[:, :1]
        if path.pan[i].abs().max() == 0:
            errors["things"].append((shift[on] - moved).norm(dim=-1).flatten())
            errors["still"].append(shift[off].norm(dim=-1).flatten())
            truth = (shift - torch.where(on[:, None, None], moved, 0)).norm(dim=-1).amax(1) < 3
            for right in held_of:
                held_of[right].append(held[(truth == right) & (on | off)])
        elif scenes.background[i] in (2, 3):  # along stripes and waves nothing is seen to move
            pan = torch.stack([path.pan[i], torch.zeros(16)], 1)
            beside = (tracks[:, 0, 1] - path.y[i, 0]).abs() > 2 * scenes.radius[i]
            inside = tracks[:, :1, 0] + path.pan[i] > 6  # (P, F), still in the picture
            errors["panned"].append((shift - pan).norm(dim=-1)[beside[:, None] & inside])
    for kind, found in errors.items():
        found = torch.cat(found)
        assert len(found) >= 160 and found.median() <= 1, kind
    assert torch.cat(held_of[True]).float().mean() > 0.8
    assert torch.cat(held_of[False]).float().mean() < 0.5


def path(*steps):
    """One track (1, F, 2) from displacements."""
    return torch.cat([torch.zeros(1, 2), torch.tensor(steps).float().cumsum(0)])[None]


def test_motion_fidelity_by_hand():
    """Right and up against right and right: cosines 1 and 0, mean ½, both ways: 1."""
    right_up, right = path((1, 0), (0, 1)), path((1, 0), (1, 0))
    assert motion_fidelity(right_up, right_up) == pytest.approx(2)
    assert motion_fidelity(right_up, right) == pytest.approx(1)
    assert motion_fidelity(right, path((-1, 0), (-1, 0))) == pytest.approx(-2)
    # The best of several counts, each way: of two made tracks one fits and one is opposed.
    both = torch.cat([right, -right])
    assert motion_fidelity(right, both) == pytest.approx(1 + (1 - 1) / 2)
    still = path((0, 0), (0, 0))
    assert motion_fidelity(still, still) == pytest.approx(2)
    assert motion_fidelity(still, right) == pytest.approx(0)
    assert motion_fidelity(still, still[:0]) == 0


# ------------------------------------------------------------------------------------------------
# The command


def write_run(folder, videos, prompts, **settings):
    """A folder as generate.py leaves it."""
    names = [f"{i}.mp4" for i in range(len(videos))]
    for name, video in zip(names, videos):
        media.write_video(folder / name, video, world.FPS)
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
    with pytest.raises(BadInput, match="is a program"):
        measure(tmp_path / "run", *flags)
    flags += ("--trust-scripts",)
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
        net.load_state_dict(clip_from_hub(state), strict=False)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    clip = load_clip("narrow", tmp_path / "w.safetensors")
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
    row = measure(tmp_path / "run", "--lpips", tmp_path / "nothing.pt", "--trust-scripts")
    assert row["diversity (LPIPS)"] is None
    assert "NaN" not in (tmp_path / "run" / "page.html").read_text()


def test_sscd_is_fed_as_its_authors_say():
    """288 pixels, ImageNet's mean and deviation: a picture of the mean colour gives zeros."""
    class See(torch.nn.Module):
        def forward(self, x: torch.Tensor):
            return torch.cat([x.flatten(1)[:, :1] + 1.0, torch.full((len(x), 1), float(x.shape[-1]),
                                                                    dtype=x.dtype)], 1)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1).expand(3, 2, 64, 64) * 2 - 1
    got = SSCD(torch.jit.script(See())).images(mean)
    assert torch.allclose(got, F.normalize(torch.tensor([[1.0, 288.0]] * 2), dim=1), atol=1e-6)


def test_the_appearance_score_reads_the_prompt_without_its_motion(tmp_path, clip):
    scenes, videos = clips(1, ("moving left",))
    look = world.captions(scenes, motion=False)[0]
    prompt = world.captions(scenes)[0]
    write_run(tmp_path / "run", [videos[0]], [prompt])
    row = measure(tmp_path / "run", "--motion-words", "moving left")
    video = media.read_video(tmp_path / "run" / "0.mp4", 16, (64, 64), 8)
    aligned = row["text alignment (tiny CLIP)"]
    assert row["appearance score"] == pytest.approx(text_alignment(clip, video, look))
    assert aligned == pytest.approx(text_alignment(clip, video, prompt))
    assert row["appearance score"] != aligned
    assert measure(tmp_path / "run", "--motion-words", "mov")["appearance score"] is None


def test_keyframes_and_given_tracks(tmp_path):
    _, videos = clips(1, ("moving left",))
    video = videos[0].clone()
    video[:, 8:] = torch.rand(3, 8, 64, 64)  # the second half is noise
    write_run(tmp_path / "run", [video], ["a thing"])
    steady = measure(tmp_path / "run", "--keyframes", 0, 2, 4)["temporal consistency (tiny CLIP)"]
    assert steady > measure(tmp_path / "run")["temporal consistency (tiny CLIP)"] + 0.05
    with pytest.raises(BadInput, match="has 16 frames"):
        measure(tmp_path / "run", "--keyframes", 0, 16)
    (tmp_path / "tracks" / "run").mkdir(parents=True)
    (tmp_path / "tracks" / "clips").mkdir()
    line = np.stack([np.linspace(0, 15, 16), np.zeros(16)], 1)[None]
    np.save(tmp_path / "tracks" / "run" / "0.npy", line)
    media.write_video(tmp_path / "clips" / "0.mp4", video, world.FPS)
    flags = "--tracks", tmp_path / "tracks", "--reference", tmp_path / "clips" / "0.mp4"
    for given, fidelity in ((line, 2), (-line, -2)):
        np.save(tmp_path / "tracks" / "clips" / "0.npy", given)
        assert measure(tmp_path / "run", *flags)["motion fidelity"] == pytest.approx(fidelity)
    np.save(tmp_path / "tracks" / "clips" / "0.npy", line[:, :5])
    with pytest.raises(BadInput, match=r"wanted \(P, 16, 2\)"):
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
        told = tiny_trn()(videos).argmax(1)
        backward = tiny_trn()(videos.flip(2)).argmax(1)
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
    media.write_video(tmp_path / "clip.mp4", videos[1], world.FPS)
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


def test_a_study_that_would_not_compare_two_trainings_is_refused(tmp_path, capsys):
    """They sampled other prompts; with the same ones they are compared, and a word that the
    tiny model has never met is told. What stands twice in the file is one prompt."""
    _, videos = clips(1, ("hopping",))
    media.write_video(tmp_path / "clip.mp4", videos[0], world.FPS)
    trained = [tmp_path / "one", tmp_path / "two"]
    for folder, prompt in zip(trained, ("a star hopping", "a ring hopping")):
        write_trained(folder, tmp_path / "clip.mp4", prompt, steps=(1,), noise_prior=0.0)
    with pytest.raises(BadInput, match="one and two .*in common.*--prompts FILE"):
        score(*trained, "--user-study")
    assert not list(tmp_path.rglob("study*"))
    (tmp_path / "prompts.txt").write_text("a frog moving left\n" * 2)
    capsys.readouterr()
    score(*trained, "--user-study", "--prompts", tmp_path / "prompts.txt")
    strange = [line for line in capsys.readouterr().err.splitlines() if "never met" in line]
    assert len(strange) == 2 and all("never met frog;" in line for line in strange)
    key = json.loads((trained[0] / "study-key.json").read_text())
    assert set(key.values()) == {"one: base, noise", "one", "two: base, noise", "two"}


VOTE = {"chosen": "1", "other": "2"}


def test_votes_go_to_the_run_that_was_chosen(tmp_path, capsys):
    (tmp_path / "study-key.json").write_text(json.dumps({"1": "one", "2": "two"}))
    other = {"chosen": "2", "other": "1"}
    votes = [other, other, VOTE | {"ratings": {"1": {"motion": 4}}}, other]
    (tmp_path / "votes.json").write_text(json.dumps({"votes": votes}))
    eval.main(["--votes", str(tmp_path / "votes.json")])
    said = capsys.readouterr().out
    assert "one 25.0 %, two 75.0 % of 4 votes, p = 0.625" in said and "one: motion 4.00" in said


def test_what_was_learned_is_measured_as_it_was_learned(tmp_path):
    """Backward, from its start on, and the middle of the picture that training had cut: of 48 by 64
    pixels at 16 by 32, columns 0 to 64 and rows 8 to 40, of which the middle square is measured."""
    video = torch.linspace(-0.2, 0.2, 16)[:, None, None] + torch.linspace(-0.7, 0.7, 64).expand(
        16, 48, 64)
    media.write_video(tmp_path / "clip.mp4", video.expand(3, 16, 48, 64), 8)
    flags = {"video": [str(tmp_path / "clip.mp4")], "fps": 8.0, "start": 0.5, "reverse": True,
             "size": [16, 32]}
    args = SimpleNamespace(size=64, keyframes=None)
    sample, = eval.learned_from("a", tmp_path, {"flags": flags, "folder": str(tmp_path)}, 8, args)
    want = video[4:12, 8:40, 16:48].flip(0)
    want = F.interpolate(want[:, None], (64, 64), mode="bilinear")[:, 0]
    assert sample.video.shape == (3, 8, 64, 64)
    assert (sample.video - want).abs().mean() < 0.02


def test_samples_are_made_as_the_adapter_says(tmp_path, monkeypatch):
    made, make_videos = [], samples.make_videos
    monkeypatch.setattr(samples, "make_videos", lambda *jobs, **how: (
        made.append(how), make_videos(*jobs, **how))[1])
    _, clip = clips(1, ("hopping",))
    media.write_video(tmp_path / "clip.mp4", clip[0], world.FPS)
    write_trained(tmp_path / "run", tmp_path / "clip.mp4", steps=(1,), sampler="ddpm", guidance=2.5)
    (tmp_path / "prompts.txt").write_text("a star hopping")
    score(tmp_path / "run", "--prompts", tmp_path / "prompts.txt")
    assert len(made) > 2
    assert {(how["steps"], how["guidance"], how["method"]) for how in made} == {(2, 2.5, "ddpm")}


@pytest.mark.parametrize("file,says", [
    (b"", "not a JSON object"), (b'{"a": "\\ud800"}', "not a JSON object"),
    ({}, "no list of votes"), ({"votes": []}, "no votes in"),
    ({"votes": [3]}, "vote 1"), ({"votes": [VOTE, VOTE | {"other": "?"}]}, "vote 2: '\\?' is not"),
    ({"votes": [VOTE | {"other": "1"}]}, "both sides are one's"),
    ({"votes": [VOTE | {"other": "3"}]}, "both sides are one's"),
    ({"votes": [VOTE | {"ratings": {"1": {"motion": 99}}}]}, "rated 99, wanted 1 to 5"),
    ({"votes": [VOTE | {"ratings": {"1": {"motion": float("nan")}}}]}, "rated nan"),
    ({"votes": [VOTE | {"ratings": {"3": {"motion": 1}}}]}, "not shown")])
def test_votes_that_cannot_be_counted_are_refused(file, says, tmp_path):
    path, key = tmp_path / "votes.json", tmp_path / "study-key.json"
    path.write_bytes(file if isinstance(file, bytes) else json.dumps(file).encode())
    key.write_text(json.dumps({"1": "one", "2": "two", "3": "one"}))
    with pytest.raises(BadInput, match=says) as refused:
        eval.main(["--votes", str(path)])
    assert "\n" not in str(refused.value)


def test_binomial_by_hand():
    """8 of 10: 2·(45 + 10 + 1)/1024; 5 of 10 is what a fair coin does."""
    assert study.binomial_p(8, 10) == pytest.approx(112 / 1024)
    assert study.binomial_p(2, 10) == pytest.approx(112 / 1024)
    assert study.binomial_p(5, 10) == 1


def write_trained(folder, clip, prompt="a star hopping", steps=(1, 2), **meta):
    """A folder as train.py leaves it, its adapter kept at some steps."""
    name = "down_blocks.0.temp_attentions.0.transformer_blocks.0.attn1.to_q.weight"
    base = dict(model.load_unet(model.TINY).named_parameters())[name].detach()
    video = media.read_video(clip, 16, (64, 64), 8)
    latents = model.load().encode(video[None])[0]
    meta = {"method": "vmc", "fps": 8.0, "sampler": "ddim", "sampling_steps": 2, "noise_prior": 1.0,
            "inverts": "tuned", "guidance": 4.0} | meta
    for step in steps:
        one = SimpleNamespace(tensors=lambda tensor=base + step: {f"unet.{name}": tensor})
        for where in (folder / "steps" / f"{step:06d}", folder):
            adapter_file.save_adapter(where / "vmc.safetensors", [one], latents, step=step, **meta)
    flags = {"video": [str(clip)], "size": [64, 64], "frames": 16, "fps": 8.0, "start": 0.0,
             "weights": None, "preview_prompt": prompt}
    (folder / "run.json").write_text(json.dumps({"method": "vmc", "settings": {}, "flags": flags}))
    seen = [{"t": 10, "clip": "a", "mse": 0.5}, {"t": 600, "clip": "a", "mse": 0.1}]
    lines = [{"step": i, "loss": 1 / (i + 1), "seen": seen} for i in range(3)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')


def content(page):
    """What a page holds."""
    return json.loads(page.read_text().split('id="content">')[1].split("</script>")[0])


def files_of(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_train_folders_are_sampled_and_drawn_against_steps(tmp_path, monkeypatch):
    _, videos = clips(1, ("hopping",))
    monkeypatch.chdir(tmp_path)
    media.write_video(tmp_path / "clip.mp4", videos[0], world.FPS)
    write_trained(tmp_path / "run", tmp_path / "clip.mp4")
    before = files_of(tmp_path / "run")
    eval.main(["run", "--size", "64", "--out", "out"])
    assert files_of(tmp_path / "run") == before  # nothing is written but in --out
    table = json.loads((tmp_path / "out" / "metrics.json").read_text())["table"]
    assert list(table) == ["base, noise", "base, start", "run", "step 1", "step 2"]
    assert table["run"] == table["step 2"] != table["base, start"] != table["base, noise"]
    page = content(tmp_path / "out" / "page.html")
    curve = next(iter(page["curves"].values()))["text alignment (tiny CLIP)"]
    assert curve[0] == [0, table["base, start"]["text alignment (tiny CLIP)"]]
    assert [step for step, _ in curve] == [0, 1, 2]
    losses = page["runs"][2]["losses"]
    assert losses["loss"]["all steps"] == [[0, 1], [1, 0.5], [2, pytest.approx(1 / 3)]]
    error = losses["squared error of the prediction, by timestep"]
    assert error["t 0–150"][0] == [0, 0.5] and error["t 453–603"][2] == [2, 0.1]
    assert len(page["references"]) == 1 and any("base, start" in note for note in page["notes"])
    made = files_of(tmp_path / "out" / "samples")
    eval.main(["run", "--size", "64", "--out", "out"])  # nothing changed, nothing is made again
    assert files_of(tmp_path / "out" / "samples") == made
    write_trained(tmp_path / "run", tmp_path / "clip.mp4", steps=(2,))
    eval.main(["run", "--size", "64", "--out", "out"])
    changed = files_of(tmp_path / "out" / "samples")
    assert {p.parent.name for p in made if made[p] != changed.get(p) and p.suffix == ".mp4"} == {
        "base-noise", "base-start", "result", "step-2"}


@pytest.mark.parametrize("inverts,prior,same", [("base", 1.0, True), ("tuned", 1.0, False),
                                                ("tuned", 0.0, True)])
def test_the_start_is_inverted_by_the_model_that_the_method_names(inverts, prior, same, tmp_path,
                                                                  monkeypatch):
    """Where the base inverts, the result starts as the base does; a method that starts from noise
    has one base alone, and no start of its own."""
    _, videos = clips(1, ("hopping",))
    media.write_video(tmp_path / "clip.mp4", videos[0], world.FPS)
    write_trained(tmp_path, tmp_path / "clip.mp4", steps=(2,), inverts=inverts, noise_prior=prior)
    starts, own = [], samples.starts
    monkeypatch.setattr(samples, "starts", lambda *given: starts.append(given[1]) or own(*given))
    args = SimpleNamespace(prompts=None, seeds=1, device="cpu")
    made = samples.sample_folder(tmp_path, eval.read_run_json(tmp_path), tmp_path / "to", args)
    if not prior:
        assert starts == [None] * 3 and list(made) == ["base, noise", tmp_path.name, "step 2"]
    else:
        assert starts[0] is None and len(starts) == len(made) == 4
        assert torch.equal(starts[1], starts[2]) == same


def test_prompts_that_differ_are_not_averaged_together(tmp_path, capsys):
    _, videos = clips(3)
    write_run(tmp_path / "one", videos[:2], ["a star", "a ring"])
    write_run(tmp_path / "two", [videos[0], videos[2]], ["a star", "a cross"])
    table = score(tmp_path / "one", tmp_path / "two", "--no-world")
    assert table["one"] == table["two"]  # of the star alone, which is the same video
    said = capsys.readouterr().out
    assert "Left out: one 1 of 2 videos, two 1 of 2" in said
    assert "text alignment (tiny CLIP) ↑" in said
    write_run(tmp_path / "two", videos[:1], ["a cross"])
    table = score(tmp_path / "one", tmp_path / "two", "--no-world")
    assert "cannot be compared" in capsys.readouterr().out and table["one"] != table["two"]


def test_nothing_from_outside_a_folder_gets_into_the_page(tmp_path, capsys, monkeypatch):
    """A settings.json that names a file elsewhere is refused; the clip that a run.json names is
    shown where it lies below the current folder, or is named."""
    _, videos = clips(1)
    media.write_video(tmp_path / "private" / "clip.mp4", videos[0], world.FPS)
    write_run(tmp_path / "run", videos, ["a"])
    (tmp_path / "run" / "link.mp4").symlink_to(tmp_path / "private" / "clip.mp4")
    for name in ("../private/clip.mp4", str(tmp_path / "private" / "clip.mp4"), "link.mp4"):
        (tmp_path / "run" / "settings.json").write_text(json.dumps({"videos": [[name, "a", 0]]}))
        with pytest.raises(BadInput, match="not in its folder"):
            measure(tmp_path / "run")
    write_trained(tmp_path / "learned", tmp_path / "private" / "clip.mp4")
    write_run(tmp_path / "run", videos, ["a"],
              adapter=[str(tmp_path / "learned" / "vmc.safetensors")])
    assert measure(tmp_path / "run")["motion fidelity"] > 1.9  # measured, and not shown
    assert content(tmp_path / "run" / "page.html")["references"] == []
    assert "is not shown" in capsys.readouterr().out
    measure(tmp_path / "run", "--reference", tmp_path / "private" / "clip.mp4")
    assert len(content(tmp_path / "run" / "page.html")["references"]) == 1


@pytest.mark.parametrize("name,text,says", [
    ("settings.json", "[]", "not a JSON object"), ("settings.json", '{"fps": NaN}', "fps is 'nan'"),
    ("settings.json", '{"videos": [["a.mp4", 3, 0]]}', "videos is"),
    ("settings.json", '{"videos": [["gone.mp4", "a", 0]]}', "is not there"),
    ("settings.json", '{"adapter": "x"}', "adapter is 'x'"),
    ("run.json", "{", "not a JSON object"), ("run.json", "{}", "method is 'None'"),
    ("run.json", '{"method": "../vmc", "flags": {}}', "method is"),
    ("run.json", '{"method": "vmc", "flags": {"video": ["c"], "size": [64]}}', "size is"),
    ("log.jsonl", 'x\n{"step": 1}\n', "line 1 is not a step"), ("log.jsonl", "\x00\n\n", "line 1")])
def test_files_of_a_run_that_are_broken_are_refused(name, text, says, tmp_path):
    _, videos = clips(1)
    media.write_video(tmp_path / "clip.mp4", videos[0], world.FPS)
    write_trained(tmp_path / "run", tmp_path / "clip.mp4")
    write_run(tmp_path / "made", videos, ["a"], adapter=[str(tmp_path / "run" / "vmc.safetensors")])
    (tmp_path / ("made" if name == "settings.json" else "run") / name).write_text(text)
    with pytest.raises(BadInput, match=says) as refused:
        measure(tmp_path / "made")
    assert "\n" not in str(refused.value)


def test_an_empty_log_has_no_curve_and_a_run_that_was_not_saved_is_told(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    assert page.read_log(tmp_path / "log.jsonl") == page.read_log(tmp_path / "none") == []
    assert page.loss_curves([]) == {"loss": {"all steps": []}}
    nothing = page.loss_curves([{"step": 0, "loss": None, "seen": [{"t": None}, 3]}])
    assert nothing == {"loss": {"all steps": []}}
    _, videos = clips(1)
    media.write_video(tmp_path / "clip.mp4", videos[0], world.FPS)
    write_trained(tmp_path / "run", tmp_path / "clip.mp4", steps=(2,))
    (tmp_path / "run" / "vmc.clip.safetensors").unlink()
    with pytest.raises(BadInput, match="clip.safetensors is missing"):
        measure(tmp_path / "run")
    (tmp_path / "run" / "vmc.safetensors").unlink()
    with pytest.raises(BadInput, match="has not been saved yet"):
        measure(tmp_path / "run")


@pytest.mark.parametrize("flags,says", [
    (("nowhere",), "is not a folder"), ((".", "--clip", "ViT-H-14"), "needs its weights"),
    ((".",), "holds no videos"), ((".", "--classifier", "none.pt"), "none.pt does not exist"),
    ((".", "--out", "file/x"), "is a file"),
    ((".", "--clip-weights", "x"), "Give --clip too"),
    ((), "give folders to score"), (("--votes", "none.json"), "none.json does not exist"),
    (("--votes", "."), "does not exist, or is no file"),
    ((".", "--keyframes", "3"), "two or more"), ((".", "--prompts", "none.txt"), "does not exist"),
])
def test_mistakes_are_told(flags, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=says):
        eval.main(list(flags))


@pytest.mark.parametrize("settings,base", [
    ({"adapter": []}, True), ({"adapter": ["a"], "scale": [0.0]}, True), ({}, False),
    ({"adapter": ["a"], "scale": None}, False), ({"adapter": [], "init": "dmt"}, False),
    ({"adapter": ["a"], "scale": [0.0], "init": "inverted"}, False)])
def test_copies_are_counted_from_the_base_models_own_score(settings, base):
    """Of no adapter, or none that acts, and not led by a clip either."""
    args = SimpleNamespace(copy_threshold=None, sscd=None)
    samples = [SimpleNamespace(figures={"copies": i / 200}) for i in range(101)]
    run = SimpleNamespace(settings=settings, samples=samples)
    found = figures.copy_threshold([run], "copies", args)
    assert found == pytest.approx(99 / 200) if base else found is None
    for given, sscd, want in ((None, "x", 0.25), (0.4, None, 0.4), (0.4, "x", 0.4)):
        args = SimpleNamespace(copy_threshold=given, sscd=sscd)
        assert figures.copy_threshold([run], "copies", args) == want
