"""eval.py: scores with known answers, equality with transformers, pages, studies, and errors."""
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import expect_error
from safetensors.torch import save_file
from torch.nn import functional as F

import eval
import model
import sampler
from scores import folders, metrics, page, samples, study
from scores.clip import (
    SSCD,
    diversity,
    load_clip,
    pick_score,
    temporal_consistency,
    text_alignment,
)
from scores.tracks import motion_fidelity, track
from support import adapters, media, tokenizer
from support.files import BadInput
from support.hub import clip_from_hub
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
    features = [clip.frame_features(v) for v in videos]
    steady = sum(map(temporal_consistency, features)) / 6
    mixed = temporal_consistency(torch.stack([f[0] for f in features]))
    assert steady > mixed + 0.05


@pytest.mark.parametrize("hub", (True, False))
def test_any_model_of_open_clip_equals_transformers(hub, transformers, tmp_path):
    """A narrow model with random weights, its file in either format: image and text features, and
    PickScore."""
    import open_clip

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 2, "hidden_act": "gelu"}
    theirs = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=tower | {"vocab_size": 49408, "max_position_embeddings": 77,
                             "eos_token_id": 49407},
        vision_config=tower | {"image_size": 32, "patch_size": 8}, projection_dim=16)).eval()
    own = {"layers": 2, "width": 32}
    (tmp_path / "narrow.json").write_text(json.dumps({
        "embed_dim": 16, "vision_cfg": own | {"image_size": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": own | {"context_length": 77, "vocab_size": 49408, "heads": 2}}))
    open_clip.add_model_config(tmp_path / "narrow.json")
    state = theirs.state_dict() if hub else clip_from_hub(theirs.state_dict())
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    ours = load_clip("narrow", tmp_path / "w.safetensors")
    video = clips(1)[1][0]
    frames = F.interpolate((video.transpose(0, 1) + 1) / 2, (32, 32), mode="bicubic",
                           antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN,
                                                          open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        pictures = theirs.get_image_features((frames - mean) / std)
        words = theirs.get_text_features(tokenizer.tokenize(["a red star", "two"]))
    pictures, words = (getattr(x, "pooler_output", x) for x in (pictures, words))
    assert torch.allclose(ours.frame_features(video), F.normalize(pictures, dim=-1), atol=1e-5)
    texts = ours.text_features(["a red star", "two"])
    assert torch.allclose(texts, F.normalize(words, dim=-1), atol=1e-5)
    expected = theirs.logit_scale.exp() * F.cosine_similarity(pictures, words[:1]).mean()
    assert pick_score(ours, video, "a red star") == pytest.approx(expected.item(), abs=1e-4)


# ------------------------------------------------------------------------------------------------
# Tracks


@pytest.mark.parametrize("size", (64, 256))
def test_tracks_follow_rendered_objects(size):
    """Points on objects and backgrounds against the exact paths. The median error of each kind is
    at most a 64th of the image, at the world's size and enlarged. Tracks marked as held are right.
    """
    scenes, videos = clips(24 if size == 64 else 16, (
        "moving left", "moving up", "hopping", "standing still while the camera pans"), seed=3)
    path, errors = world.trajectory(scenes), {"objects": [], "still": [], "panned": []}
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
            errors["objects"].append((shift[on] - moved).norm(dim=-1).flatten())
            errors["still"].append(shift[off].norm(dim=-1).flatten())
            truth = (shift - torch.where(on[:, None, None], moved, 0)).norm(dim=-1).amax(1) < 3
            for right in held_of:
                held_of[right].append(held[(truth == right) & (on | off)])
        elif scenes.background[i] in (2, 3):  # along stripes and waves nothing is seen to move
            pan = torch.stack([path.pan[i], torch.zeros(16)], 1)
            beside = (tracks[:, 0, 1] - path.y[i, 0]).abs() > 2 * scenes.radius[i]
            inside = tracks[:, :1, 0] + path.pan[i] > 6  # (P, F), still in the image
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


def score(*argv):
    """{run: {metric: number}}, from the metrics.json that the command writes to a new folder."""
    argv = [str(a) for a in argv]
    folder = Path(tempfile.mkdtemp(dir=Path(argv[0]).resolve().parent)) / "out"
    eval.main([*argv, "--size", "64", "--out", str(folder)])
    score.page = folder / "page.html"
    return json.loads((folder / "metrics.json").read_text())["table"]


def measure(folder, *flags):
    return score(folder, "--no-world", *flags)[folder.name]


class Brightness(torch.nn.Module):
    """A classifier in TorchScript: (B, 3, …) -> (B, 2)."""

    def forward(self, a: torch.Tensor):
        m = a.flatten(1).mean(1, keepdim=True)
        return torch.cat([m, -m], 1)


class Apart(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor):
        return (a - b).abs().flatten(1).mean(1)


def test_scorers_in_torchscript(tmp_path):
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
    assert own["trajectory correlation"] == pytest.approx(1, abs=1e-3)
    assert own["background"] == 1 and "motion fidelity" in capsys.readouterr().out


def test_metrics_of_the_tiny_world_fall_for_reversed_videos_and_other_prompts(tmp_path):
    """The words of a background or a motion ("in a circle", "blue striped") name no object."""
    scenes, videos = clips(40, ("moving in a circle", "moving left"), seed=5)
    one = next(i for i, (c, b, s) in enumerate(zip(scenes.color, scenes.background, scenes.shape))
               if b == 1 and c not in (5,) and s not in (0,) and scenes.motion[i] == 7)
    left = (scenes.motion == 0).nonzero()[0, 0]
    circle, blue = (scenes.shape == 0).nonzero()[0, 0], (scenes.color == 5).nonzero()[0, 0]
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
    assert [table["right"][k] for k in ("color", "shape", "background")] == [1, 1, 1]
    assert [table["wrong"][k] for k in ("color", "shape", "background")] == [0, 0, 0]
    assert table["circle"]["shape"] == table["blue"]["color"] == 0
    assert table["left"]["color"] is None and table["left"]["trajectory correlation"] > 0.99
    assert table["back"]["trajectory correlation"] < -0.99
    assert table["back"]["motion fidelity"] < table["left"]["motion fidelity"] - 0.5
    assert table["left"]["same kind of motion"] == 1 and table["back"]["same kind of motion"] == 0


def test_metrics_that_are_nan_are_left_empty(tmp_path):
    class Nothing(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor):
            return (a - b).abs().flatten(1).mean(1) * float("nan")
    _, videos = clips(2)
    write_run(tmp_path / "run", videos, ["a", "a"])
    torch.jit.script(Nothing()).save(tmp_path / "nothing.pt")
    row = measure(tmp_path / "run", "--lpips", tmp_path / "nothing.pt", "--trust-scripts")
    assert row["diversity (LPIPS)"] is None
    assert "NaN" not in score.page.read_text()


def test_sscd_gets_the_input_that_its_authors_specify():
    """288 pixels, ImageNet's mean and deviation: an image of the mean color gives zeros."""
    class See(torch.nn.Module):
        def forward(self, x: torch.Tensor):
            return torch.cat([x.flatten(1)[:, :1] + 1.0, torch.full((len(x), 1), float(x.shape[-1]),
                                                                    dtype=x.dtype)], 1)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1).expand(3, 2, 64, 64) * 2 - 1
    got = SSCD(torch.jit.script(See())).frame_features(mean)
    assert torch.allclose(got, F.normalize(torch.tensor([[1.0, 288.0]] * 2), dim=1), atol=1e-6)


def test_the_appearance_score_uses_the_prompt_without_its_motion(tmp_path, clip):
    scenes, videos = clips(1, ("moving left",))
    appearance = world.captions(scenes, motion=False)[0]
    prompt = world.captions(scenes)[0]
    write_run(tmp_path / "run", [videos[0]], [prompt])
    row = measure(tmp_path / "run", "--motion-words", "moving left")
    video = media.read_video(tmp_path / "run" / "0.mp4", 16, (64, 64), 8)
    aligned = row["text alignment (tiny CLIP)"]
    assert row["appearance score"] == pytest.approx(text_alignment(clip, video, appearance))
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
    with pytest.raises(BadInput, match=r"\(P, 16, 2\)"):
        measure(tmp_path / "run", *flags)


def test_copies_are_counted_above_the_threshold_of_the_base_model(tmp_path):
    _, videos = clips(4)
    write_run(tmp_path / "base", videos[:3], ["a"] * 3, adapter=[])
    write_run(tmp_path / "copies", videos[3:], ["a"])
    table = score(tmp_path / "base", tmp_path / "copies", "--no-world", "--reference",
                  tmp_path / "copies" / "0.mp4")
    assert table["base"]["share of copies"] < 0.5 and table["copies"]["share of copies"] == 1


# ------------------------------------------------------------------------------------------------
# Pages


def browse(page, *scripts):
    """The page's DOM in headless Chromium after its scripts and these."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("Chromium is not installed")
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


def test_the_page_plays_videos_and_runs_no_foreign_script(tmp_path):
    _, videos = clips(2, ("hopping",))
    media.write_video(tmp_path / "clip.mp4", videos[1], world.FPS)
    write_run(tmp_path / "one", videos, [NASTY, "two"])
    write_run(tmp_path / "two", videos, [NASTY, "two"])
    score(tmp_path / "one", tmp_path / "two", "--no-world", "--reference", tmp_path / "clip.mp4")
    page = score.page
    text = page.read_text()
    assert "src=\"http" not in text and "href=\"http" not in text  # self-contained
    assert NASTY not in text
    dom = browse(page, "setTimeout(() => document.body.dataset.loaded = [...document."
                 "querySelectorAll('video')].filter(v => v.readyState > 1).length, 3000)")
    assert dom.count("<video") == 6 and 'data-loaded="6"' in dom
    assert "<title>Video evaluation</title>" in dom and "<img src=" not in dom
    assert "&lt;script&gt;document.title" in dom and "motion fidelity" in dom


def test_a_study_is_blind_and_its_votes_are_counted(tmp_path, capsys):
    """A visitor who always chooses the video of run two, on either side."""
    _, videos = clips(8, ("hopping",))
    for name in ("one", "two"):
        write_run(tmp_path / name, videos[:4] if name == "one" else videos[4:], list("abcd"))
    write_run(tmp_path / "reference", videos[:1], [""])
    score(tmp_path / "one", tmp_path / "two", "--no-world", "--user-study", "--ratings",
          "--reference", tmp_path / "reference" / "0.mp4")
    page, key = score.page.with_name("study.html"), score.page.with_name("study-key.json")
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
    printed = capsys.readouterr().out
    assert "one 0.0 %, two 100.0 % of 4 votes, p = 0.125" in printed
    assert "one: motion 1.00 of 5 (4 ratings)" in printed and "two: text 4.00 of 5" in printed


def test_a_study_of_runs_without_a_common_prompt_is_refused(tmp_path, capsys):
    """With --prompts both sample the same prompts. A prompt that the file repeats counts once."""
    write_clip(tmp_path)
    trained = [tmp_path / "one", tmp_path / "two"]
    for folder, prompt in zip(trained, ("a star hopping", "a ring hopping")):
        write_trained(folder, tmp_path / "clip.mp4", prompt, steps=(1,), noise_prior=0.0)
    with pytest.raises(BadInput, match="one and two .*in common.*--prompts FILE"):
        score(*trained, "--user-study")
    assert not [p for p in tmp_path.rglob("*") if p.name in ("page.html", "metrics.json")]
    assert not list(tmp_path.rglob("study*"))
    (tmp_path / "prompts.txt").write_text("a frog moving left\n" * 2)
    capsys.readouterr()
    score(*trained, "--user-study", "--prompts", tmp_path / "prompts.txt")
    key = json.loads(score.page.with_name("study-key.json").read_text())
    assert set(key.values()) == {"one: base, noise", "one", "two: base, noise", "two"}


VOTE = {"chosen": "1", "other": "2"}


def test_votes_count_for_the_chosen_run(tmp_path, capsys):
    (tmp_path / "study-key.json").write_text(json.dumps({"1": "one", "2": "two"}))
    other = {"chosen": "2", "other": "1"}
    votes = [other, other, VOTE | {"ratings": {"1": {"motion": 4}}}, other]
    (tmp_path / "votes.json").write_text(json.dumps({"votes": votes}))
    eval.main(["--votes", str(tmp_path / "votes.json")])
    printed = capsys.readouterr().out
    assert "one 25.0 %, two 75.0 % of 4 votes, p = 0.625" in printed
    assert "one: motion 4.00" in printed


def test_training_clips_are_measured_as_training_read_them(tmp_path):
    """Backward, from its start on, and the center that training cropped: of 48x64 pixels at 16x32,
    columns 0 to 64 and rows 8 to 40, and the central square of these is measured."""
    video = torch.linspace(-0.2, 0.2, 16)[:, None, None] + torch.linspace(-0.7, 0.7, 64).expand(
        16, 48, 64)
    media.write_video(tmp_path / "clip.mp4", video.expand(3, 16, 48, 64), 8)
    trained = folders.TrainingInfo(
        folder="", method="vmc", video=[str(tmp_path / "clip.mp4")], size=[16, 32], frames=8,
        fps=8.0, start=0.5, weights=None, preview_prompt="", reverse=True)
    args = SimpleNamespace(size=64, keyframes=None)
    sample, = folders.read_training_clips("a", trained, 8, args)
    expected = video[4:12, 8:40, 16:48].flip(0)
    expected = F.interpolate(expected[:, None], (64, 64), mode="bilinear")[:, 0]
    assert sample.video.shape == (3, 8, 64, 64)
    assert (sample.video - expected).abs().mean() < 0.02


def test_samples_have_the_settings_of_the_adapter(tmp_path, spy, bars):
    """The title of a progress bar has no control characters of the run's name."""
    made, run = [], tmp_path / "run \x1b[2J"
    spy(sampler, "sample", lambda *inputs, **more: made.append(inputs[4:7]))
    write_trained(run, write_clip(tmp_path), steps=(1,), sampler="ddpm", guidance=2.5)
    (tmp_path / "prompts.txt").write_text("a star hopping")
    score(run, "--prompts", tmp_path / "prompts.txt")
    assert len(made) > 2 and set(made) == {(2, 2.5, "ddpm")}
    assert bars["sampling result"] == 2 and "\x1b" not in "".join(bars)


@pytest.mark.parametrize("file,message", [
    (b"", "JSONDecodeError"), (b'{"a": "\\ud800"}', "surrogates"), ({}, "votes"),
    ({"votes": []}, "no votes found"), ({"votes": [3]}, "TypeError"),
    ({"votes": [VOTE, VOTE | {"other": "?"}]}, r"'\?'"),
    ({"votes": [VOTE | {"other": "1"}]}, "belong to one"),
    ({"votes": [VOTE | {"other": "3"}]}, "belong to one"),
    ({"votes": [VOTE | {"ratings": {"1": {"motion": 99}}}]}, "99"),
    ({"votes": [VOTE | {"ratings": {"1": {"motion": float("nan")}}}]}, "nan"),
    ({"votes": [VOTE | {"ratings": {"9": {"motion": 1}}}]}, "'9'")])
def test_votes_that_cannot_be_counted_are_refused(file, message, tmp_path, capsys):
    path, key = tmp_path / "votes.json", tmp_path / "study-key.json"
    path.write_bytes(file if isinstance(file, bytes) else json.dumps(file).encode())
    key.write_text(json.dumps({"1": "one", "2": "two", "3": "one"}))
    expect_error(["--votes", path], message, capsys, eval.main)


def test_binomial_by_hand():
    """8 of 10: 2·(45 + 10 + 1)/1024; 5 of 10 is what a fair coin does."""
    assert study.binomial_p(8, 10) == pytest.approx(112 / 1024)
    assert study.binomial_p(2, 10) == pytest.approx(112 / 1024)
    assert study.binomial_p(5, 10) == 1


def write_clip(folder):
    """A clip of something that hops; its path."""
    media.write_video(folder / "clip.mp4", clips(1, ("hopping",))[1][0], world.FPS)
    return folder / "clip.mp4"


def write_trained(folder, clip, prompt="a star hopping", steps=(1, 2), latents=True, **meta):
    """A folder as train.py leaves it, with adapters of some steps."""
    name = "down_blocks.0.temp_attentions.0.transformer_blocks.0.attn1.to_q.weight"
    base = dict(model.load_unet(model.TINY).named_parameters())[name].detach()
    video = media.read_video(clip, 16, (64, 64), 8)
    latents = model.load().encode(video[None])[0] if latents else None
    meta = {"method": "vmc", "fps": 8.0, "sampler": "ddim", "sampling_steps": 2, "noise_prior": 1.0,
            "inversion_model": "tuned", "guidance": 4.0} | meta
    for step in steps:
        one = SimpleNamespace(tensors=lambda tensor=base + step: {f"unet.{name}": tensor})
        for place in (folder / "steps" / f"{step:06d}", folder):
            adapters.save_adapter(place / "vmc.safetensors", [one], latents, step=step, **meta)
    flags = {"video": [str(clip)], "size": [64, 64], "frames": 16, "fps": 8.0, "start": 0.0,
             "weights": None, "preview_prompt": prompt}
    (folder / "run.json").write_text(json.dumps({"method": "vmc", "settings": {}, "flags": flags}))
    seen = [{"t": 10, "clip": "a", "mse": 0.5}, {"t": 600, "clip": "a", "mse": 0.1}]
    lines = [{"step": i, "loss": 1 / (i + 1), "seen": seen} for i in range(3)]
    (folder / "log.jsonl").write_text("".join(f"\n{json.dumps(line)}" for line in lines) + '\n{"st')


def content(page):
    """The content of a page, from its JSON."""
    return json.loads(page.read_text().split('id="content">')[1].split("</script>")[0])


def files_of(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_training_runs_are_sampled_and_plotted_over_steps(tmp_path):
    write_trained(tmp_path / "run", write_clip(tmp_path))
    before = files_of(tmp_path / "run")
    table = score(tmp_path / "run")
    assert files_of(tmp_path / "run") == before  # only --out is written
    assert list(table) == ["base, noise", "base, start", "run", "step 1", "step 2"]
    assert table["run"] == table["step 2"] != table["base, start"] != table["base, noise"]
    shown = content(score.page)
    curve = next(iter(shown["curves"].values()))["text alignment (tiny CLIP)"]
    assert curve["0"] == table["base, start"]["text alignment (tiny CLIP)"]
    assert curve.keys() == {"0", "1", "2"}
    losses = shown["runs"][2]["losses"]
    assert losses["loss"]["all steps"] == [[0, 1], [1, 0.5], [2, pytest.approx(1 / 3)]]
    error = losses["squared error of the prediction, by timestep"]
    assert error["t 0–150"][0] == [0, 0.5] and error["t 453–603"][2] == [2, 0.1]
    assert len(shown["references"]) == 1 and any("base, start" in note for note in shown["notes"])
    assert {p.name for p in (score.page.parent / "samples" / "run").iterdir()} == {
        "base-noise", "base-start", "result", "step-1", "step-2"}
    dom = browse(score.page)
    assert dom.count("<polyline") > 8 and "<figcaption>temporal consistency (tiny CLIP) ↑" in dom


@pytest.mark.parametrize("inversion,prior,same", [("base", 1.0, True), ("tuned", 1.0, False),
                                                  ("tuned", 0.0, True)])
def test_the_method_names_the_model_that_inverts(inversion, prior, same, tmp_path, monkeypatch):
    """With the base model, result and base start alike. A method that samples from noise has one
    base and no starting latents."""
    write_trained(tmp_path, write_clip(tmp_path), steps=(2,), inversion_model=inversion,
                  noise_prior=prior)
    found, invert = [], sampler.invert
    monkeypatch.setattr(sampler, "invert", lambda *a, **k: (
        found.append(invert(*a, **k)), found[-1])[1])
    args = SimpleNamespace(prompts=None, videos_per_prompt=1, device="cpu")
    trained = folders.read_training(tmp_path)
    made = samples.sample_folder(tmp_path, trained, tmp_path / "to", args)
    names = ["base, noise", *["base, start"] * bool(prior), tmp_path.name, "step 2"]
    assert list(made) == names and len(found) == (3 if prior else 0)
    if prior:
        assert torch.equal(found[0], found[1]) == same


def test_only_common_prompts_are_compared(tmp_path, capsys):
    _, videos = clips(3)
    write_run(tmp_path / "one", videos[:2], ["a star", "a ring"])
    write_run(tmp_path / "two", [videos[0], videos[2]], ["a star", "a cross"])
    table = score(tmp_path / "one", tmp_path / "two", "--no-world")
    assert table["one"] == table["two"]  # of the star alone, which is the same video
    printed = capsys.readouterr().out
    assert "Left out: one 1 of 2 videos, two 1 of 2" in printed
    assert "text alignment (tiny CLIP) ↑" in printed
    write_run(tmp_path / "two", videos[:1], ["a cross"])
    table = score(tmp_path / "one", tmp_path / "two", "--no-world")
    assert "cannot be compared" in capsys.readouterr().out and table["one"] != table["two"]


def test_a_page_holds_no_file_from_outside_a_folder(tmp_path):
    """A settings.json that names a file elsewhere, or a link, is refused."""
    private, _ = write_clip(tmp_path), write_run(tmp_path / "run", clips(1)[1], ["a"])
    (tmp_path / "run" / "link.mp4").symlink_to(private)
    (tmp_path / "run" / "folder").symlink_to(tmp_path, target_is_directory=True)
    for name in ("../clip.mp4", str(private), "link.mp4", "folder", "folder/clip.mp4"):
        (tmp_path / "run" / "settings.json").write_text(json.dumps({"videos": [[name, "a", 0]]}))
        with pytest.raises(BadInput, match="not a file in its folder"):
            measure(tmp_path / "run")


@pytest.mark.parametrize("name,text,message", [
    ("settings.json", "[]", "settings.json"), ("settings.json", '{"fps": NaN}', "fps is nan"),
    ("settings.json", '{"videos": [["a.mp4", 3]]}', "settings.json"),
    ("settings.json", '{"videos": [["gone.mp4", "a", 0]]}', "not a file in its folder"),
    ("settings.json", '{"videos": [["a\\u0000.mp4", "a", 0]]}', "settings.json"),
    ("settings.json", '{"adapter": "x"}', "adapter is 'x'"),
    ("run.json", "{", "run.json"), ("run.json", "{}", "run.json"),
    ("run.json", '{"method": "../vmc", "flags": {}}', "run.json"),
    ("run.json", '{"method": "vmc", "flags": {"video": ["c"], "size": [4]}}', "size is")])
def test_damaged_files_of_a_run_are_refused(name, text, message, tmp_path, capsys):
    write_trained(tmp_path / "run", write_clip(tmp_path), steps=(1,))
    write_run(tmp_path / "made", clips(1)[1], ["a"],
              adapter=[str(tmp_path / "run" / "vmc.safetensors")])
    (tmp_path / ("made" if name == "settings.json" else "run") / name).write_text(text)
    expect_error([tmp_path / "made", "--out", tmp_path / "out"], message, capsys, eval.main)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text,rows", [
    ("", []), ("x\n\x00\n[]\n", []),
    ('{"step": 1, "loss": 1, "seen": []}\n{"step": 1, "loss": 3, "seen": []}', [(1, 3, [])]),
    ('\n{"step": "x", "loss": 1, "seen": []}\n{"step": 2, "loss": 1, "seen": []}\n{"st',
     [(2, 1, [])]),
    ('{"step": 3, "loss": NaN, "seen": []}\n{"step": 4, "loss": 1, "seen": [3]}', []),
    ('{"step": 5, "loss": 1, "seen": [{"t": 1e999, "mse": 1}]}', [])])
def test_lines_that_are_no_step_are_left_out_of_the_loss_curve(text, rows, tmp_path):
    """The last line of a step counts."""
    (tmp_path / "log.jsonl").write_text(text)
    found = page.read_log(tmp_path / "log.jsonl")
    assert found == rows and page.read_log(tmp_path / "none") == []
    assert page.loss_curves(found)["loss"]["all steps"] == [row[:2] for row in rows]


def test_a_run_without_its_clip_or_its_adapter_is_refused(tmp_path):
    write_trained(tmp_path / "run", write_clip(tmp_path), steps=(2,), latents=False)
    with pytest.raises(BadInput, match="clip"):
        measure(tmp_path / "run")
    (tmp_path / "run" / "vmc.safetensors").unlink()
    with pytest.raises(BadInput, match="has not saved yet"):
        measure(tmp_path / "run")


@pytest.mark.parametrize("argv,message", [
    (("nowhere",), "is not a folder"), ((".", "--clip", "ViT-H-14"), "requires --clip-weights"),
    ((".",), "has no videos"), ((".", "--classifier", "none.pt"), "none.pt does not exist"),
    ((".", "--out", "file/x"), "file"), ((".", "--clip-weights", "x"), "requires --clip"),
    ((), "expected folders to score"), (("--votes", "none.json"), "none.json|study-key.json"),
    (("--votes", "."), "study-key.json"), ((".", "--keyframes", "3"), "two or more"),
    ((".", "--prompts", "file"), "--prompts and --videos-per-prompt apply to"),
    ((".", "--motion-class", "0"), "requires --classifier"),
    ((".", "--keyframes", "0", "0"), "two or more"), ((".", "--motion-words", ""), "is empty"),
    ((".", "--out", "."), "is not empty")])
def test_errors_in_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    expect_error(argv, message, capsys, eval.main)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["file"]


@pytest.mark.parametrize("generated,base", [
    ({"adapter": []}, True), ({"adapter": ["a"], "scale": [0.0]}, True),
    ({"adapter": ["a"]}, False), ({"adapter": [], "noise_prior": 0.5}, False),
    ({"videos": []}, False)])
def test_the_threshold_of_copies_is_the_base_models_own_score(generated, base):
    """The base model: samples from noise without an adapter, or at scale 0."""
    args = SimpleNamespace(copy_threshold=None, sscd=None)
    generated = folders.GeneratedInfo(**{"videos": [["a.mp4", "a", 0]]} | generated)
    scored = [SimpleNamespace(metrics={"copies": i / 200}) for i in range(101)]
    run = SimpleNamespace(generated=generated, samples=scored)
    found = metrics.copy_threshold([run], "copies", args)
    assert found == pytest.approx(99 / 200) if base else found is None
    for given, sscd, threshold in ((None, "x", 0.25), (0.4, None, 0.4), (0.4, "x", 0.4)):
        args = SimpleNamespace(copy_threshold=given, sscd=sscd)
        assert metrics.copy_threshold([run], "copies", args) == threshold
