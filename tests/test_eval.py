"""eval.py: known answers, equality with transformers, and that each figure falls when it should."""
import json

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


@pytest.mark.parametrize("flags,says", [
    (("nowhere",), "is not a folder"), ((".", "--clip", "ViT-H-14"), "needs --clip-weights"),
])
def test_mistakes_are_told(flags, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(model.BadInput, match=says):
        eval.main(list(flags))
