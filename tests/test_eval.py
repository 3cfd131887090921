"""eval.py: known answers, equality with transformers, and that each figure falls when it should."""
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
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
    """Points on things and floors against the exact paths: median error at most one pixel."""
    scenes, videos = clips(6, ("moving left", "moving up", "hopping",
                               "standing still while the camera pans"), seed=3)
    path, errors = world.trajectory(scenes), []
    for i, video in enumerate(videos):
        tracks = eval.track(video)
        far = (tracks[:, 0] - torch.stack([path.x[i, 0], path.y[i, 0]])).norm(dim=1)
        moved = torch.stack([path.x[i] - path.x[i, 0], path.y[i] - path.y[i, 0]], 1)
        on = far < 0.5 * scenes.radius[i]
        errors.append((tracks[on] - tracks[on][:, :1] - moved).norm(dim=-1).flatten())
        if path.pan[i].abs().max() == 0:
            off = far > 3.5 * scenes.radius[i]
            errors.append((tracks[off] - tracks[off][:, :1]).norm(dim=-1).flatten())
    errors = torch.cat(errors)
    assert len(errors) > 300 and errors.median() <= 1


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


def test_a_run_against_itself_and_against_another(tmp_path, capsys):
    scenes, videos = clips(2, ("hopping",))
    for i, name in enumerate(("hop", "other")):
        data.write_video(tmp_path / name / "0.mp4", videos[i], world.FPS)
        (tmp_path / name / "0.txt").write_text(world.captions(scenes)[i])
    eval.main([str(tmp_path / "hop"), str(tmp_path / "other"), "--reference",
               str(tmp_path / "hop"), "--world", "--size", "64", "--out", str(tmp_path)])
    table = json.loads((tmp_path / "metrics.json").read_text())
    own, other = table["hop"], table["other"]
    assert own["copy score (tiny CLIP features)"] == pytest.approx(1, abs=1e-4)
    assert own["motion fidelity"] == pytest.approx(2, abs=1e-3)
    assert other["motion fidelity"] < own["motion fidelity"]
    assert own["same kind of motion"] == other["same kind of motion"] == 1
    assert own["background"] == 1 and "motion fidelity" in capsys.readouterr().out


def write_run(folder, videos, prompts):
    """A folder as generate.py leaves it."""
    for i, video in enumerate(videos):
        data.write_video(folder / f"{i:03d}-x-seed0.mp4", video, world.FPS)
    (folder / "settings.json").write_text(json.dumps({"all_prompts": prompts, "seed": 0}))


def measure(folder, *flags):
    eval.main([str(folder), "--size", "64", "--no-world", *map(str, flags)])
    return json.loads((folder / "metrics.json").read_text())[folder.name]


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
    shutil.copytree(tmp_path / "run", tmp_path / "clips")
    (tmp_path / "clips" / "001-x-seed0.mp4").unlink()
    torch.jit.script(Brightness()).save(tmp_path / "bright.pt")
    torch.jit.script(Apart()).save(tmp_path / "apart.pt")
    flags = "--classifier", tmp_path / "bright.pt", "--lpips", tmp_path / "apart.pt"
    (tmp_path / "run" / "settings.json").write_text(json.dumps({"all_prompts": ["a", "a"]}))
    row = measure(tmp_path / "run", *flags, "--reference", tmp_path / "clips")
    assert row["motion accuracy (classifier)"] == 0.5
    assert row["diversity (LPIPS)"] == pytest.approx(1, abs=0.02)
    assert measure(tmp_path / "run", *flags, "--motion-class", 1)[
        "motion accuracy (classifier)"] == 0.5
    dark_only = measure(tmp_path / "clips", *flags, "--motion-class", 1)
    assert dark_only["motion accuracy (classifier)"] == 0


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


def test_keyframes_and_given_tracks(tmp_path):
    _, videos = clips(1, ("moving left",))
    video = videos[0].clone()
    video[:, 8:] = torch.rand(3, 8, 64, 64)  # the second half is noise
    write_run(tmp_path / "run", [video], ["a thing"])
    steady = measure(tmp_path / "run", "--keyframes", 0, 2, 4)["temporal consistency"]
    assert steady > measure(tmp_path / "run")["temporal consistency"] + 0.05
    with pytest.raises(model.BadInput, match="has 16 frames"):
        measure(tmp_path / "run", "--keyframes", 0, 16)
    (tmp_path / "tracks").mkdir()
    line = np.stack([np.linspace(0, 15, 16), np.zeros(16)], 1)[None]
    np.save(tmp_path / "tracks" / "000-x-seed0.npy", line)
    data.write_video(tmp_path / "clip.mp4", video, world.FPS)
    flags = "--tracks", tmp_path / "tracks", "--reference", tmp_path / "clip.mp4"
    for track, fidelity in ((line, 2), (-line, -2)):
        np.save(tmp_path / "tracks" / "clip.npy", track)
        assert measure(tmp_path / "run", *flags)["motion fidelity"] == pytest.approx(fidelity)
    np.save(tmp_path / "tracks" / "clip.npy", line[:, :5])
    with pytest.raises(model.BadInput, match=r"wanted \(P, 16, 2\)"):
        measure(tmp_path / "run", *flags)


def test_copies_are_counted_above_what_the_base_model_reaches(tmp_path):
    _, videos = clips(4)
    write_run(tmp_path / "base", videos[:3], ["a"] * 3)
    write_run(tmp_path / "copies", videos[3:], ["a"])
    (tmp_path / "base" / "settings.json").write_text(
        json.dumps({"all_prompts": ["a"] * 3, "adapter": []}))
    eval.main([*map(str, (tmp_path / "base", tmp_path / "copies", "--no-world", "--size", 64,
                          "--reference", tmp_path / "copies"))])
    table = json.loads((tmp_path / "base" / "metrics.json").read_text())
    share = [next(v for k, v in rows.items() if "share of copies" in k) for rows in table.values()]
    assert share[0] < 0.5 and share[1] == 1


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
    eval.main([*map(str, (tmp_path / "one", tmp_path / "two", "--no-world", "--size", 64,
                          "--reference", tmp_path / "clip.mp4"))])
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
    eval.main([*map(str, (tmp_path / "one", tmp_path / "two", "--no-world", "--size", 64,
                          "--user-study", "--ratings"))])
    dom = browse(tmp_path / "one" / "study.html", """
        while (votes.length < content.pairs.length) {
          const side = content.pairs[votes.length].sides.findIndex(s => s.run === "two");
          document.querySelectorAll("select").forEach((s, i) => s.value = 1 + (i < 3 ? 0 : 3));
          document.querySelectorAll("button.choose")[side].click();
        }
        document.body.append(Object.assign(document.createElement("code"),
                             {textContent: JSON.stringify({votes})}));""")
    shown = dom[dom.index("<body") :].split("<script")[0]
    assert "one" not in shown.replace("one moves", "").replace("this one", "").replace("none", "")
    votes = json.loads(dom.split("<code>")[1].split("</code>")[0])
    assert len(votes["votes"]) == 4
    (tmp_path / "votes.json").write_text(json.dumps(votes))
    capsys.readouterr()
    eval.main(["--votes", str(tmp_path / "votes.json")])
    said = capsys.readouterr().out
    assert "one 0.0 %, two 100.0 % of 4 votes, p = 0.125" in said
    assert "two: motion" in said and "(4 ratings)" in said


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
    table = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(table) == ["base", "run", "step 1", "step 2"]
    assert table["run"] == table["step 2"] != table["base"]
    text = (tmp_path / "run" / "page.html").read_text()
    page = json.loads(text.split('id="content">')[1].split("</script>")[0])
    curve = next(iter(page["curves"].values()))["text alignment"]
    assert [step for step, _ in curve] == [0, 1, 2]
    assert len(page["runs"][1]["losses"]) == 2
    before = (tmp_path / "run" / "eval" / "step-1" / "sheet.png").stat().st_mtime
    eval.main([str(tmp_path / "run"), "--size", "64"])  # nothing changed, nothing is made again
    assert (tmp_path / "run" / "eval" / "step-1" / "sheet.png").stat().st_mtime == before


@pytest.mark.parametrize("flags,says", [
    (("nowhere",), "is not a folder"), ((".", "--clip", "ViT-H-14"), "needs --clip-weights"),
    ((), "give folders to score"), (("--votes", "none.json"), "none.json"),
    ((".", "--keyframes", "3"), "two or more"), ((".", "--prompts", "none.txt"), "does not exist"),
])
def test_mistakes_are_told(flags, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(model.BadInput, match=says):
        eval.main(list(flags))
