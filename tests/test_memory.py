"""What a GPU would have to hold and where it would be waited for, emulated; and that what saves
memory changes nothing."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import memory  # noqa: E402

import lora  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from support import fast, machine  # noqa: E402

RESULTS = json.loads((ROOT / "docs" / "speed.json").read_text())["memory"]
ROWS = RESULTS["rows"]
TRAINING = [row for row in ROWS if "checkpointing" in row]


@pytest.fixture
def narrow(monkeypatch, tmp_path):
    """The emulation's model, narrow; its folder, with a clip."""
    monkeypatch.setattr(memory, "UNET", {
        "block_out_channels": [64, 128], "cross_attention_dim": 64,
        "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
        "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"]})
    monkeypatch.setattr(memory, "VAE", {"block_out_channels": [32] * 4})
    monkeypatch.setattr(memory, "TEXT", {"hidden_size": 64, "intermediate_size": 64,
                                         "num_hidden_layers": 1, "num_attention_heads": 1})
    (tmp_path / "clips").mkdir()
    return tmp_path


@pytest.mark.parametrize("method,settings", [
    ("vmc", ()), ("motiondirector", ("spatial=1",)), ("newmove", ("word.vectors=1",)),
    ("customize-a-video", ("first=10", "look_word.vectors=1"))])
def test_a_step_waits_for_the_card_once(narrow, method, settings, capsys):
    """For the figures of the log; noise, tokens and pictures are sent without waiting."""
    with memory.Card() as card:
        row = memory.training(card, method, (4, 64, 64), narrow, *settings)
    assert row["waits"] == ["_to_copy"]


def test_checkpointing_holds_less(narrow, capsys):
    steps = {}
    for way in ("off", "on"):
        with memory.Card() as card:
            steps[way] = memory.training(card, "vmc", (4, 64, 64), narrow, "--checkpointing",
                                         way)["step"]
    assert steps["on"] < 0.9 * steps["off"]


def test_the_emulation_counts_waits_and_bytes():
    with memory.Card() as card:
        x = torch.zeros(1000).to("meta")  # from memory that is not pinned
        y = x * 2
        assert card.now == card.peak == 8000 and len(card.waits) == 1
        del x
        assert card.now == 4000 and y.sum().item() == 1 and len(card.waits) == 2
        machine.send(torch.zeros(10), "meta")
        assert len(card.waits) == 2


@pytest.mark.parametrize("name", ["vmc", "motiondirector", "newmove"])
def test_computing_again_changes_no_gradient(name, monkeypatch):
    """With the network's and a LoRA's dropout on, and hooks that watch a layer; and whatever is
    computed again where tensors are large (support/fast.py)."""
    recipe = train.METHODS[name].but("spatial=1" if name == "motiondirector" else "")
    gradients = {}
    for again in (False, True):
        monkeypatch.setattr(fast, "LARGE", 1 if again else 2**40)
        torch.manual_seed(0)
        whole = model.load()
        run = make_run(whole, recipe)
        whole.unet.checkpointing = again
        train.begin_training(whole.unet, recipe)
        m = train.Example(run, 0, 0)
        m.watch(r"mid_block\.attentions\.0")
        for loss in recipe.function(m, **recipe.keywords):
            seen, = m.seen.values()
            (loss + 1e-3 * seen.square().mean()).backward()
        m.finish()
        gradients[again] = {n: p.grad for n, p in lora.named(run.learners).items()}
    learned = [n for n, g in gradients[False].items() if g is not None]
    assert len(learned) > 10 and any(gradients[False][n].abs().max() > 0 for n in learned)
    for n in learned:
        torch.testing.assert_close(gradients[True][n], gradients[False][n], rtol=1e-4, atol=1e-7)


def make_run(whole, recipe):
    """A run on clips of noise, that were never pictures."""
    clips = []
    for number in range(2):
        g = torch.Generator().manual_seed(number)
        latents = torch.randn(1, whole.unet.config.in_channels, 4, 8, 8, generator=g)
        video = torch.rand(3, 4, 64, 64, generator=g) * 2 - 1
        clips.append(SimpleNamespace(latents=latents, video=video, prompt="a ball", path="clip"))
    learners = lora.make_learners(recipe.parts, whole, 1, 0)
    for one in (one for several in learners.values() for one in several):
        for n, p in one.parameters().items():
            if n.endswith("lora_B.weight"):  # at zero A would have no gradient
                p.data.normal_(0, 0.02)
    prior = clips[1:] if recipe.prior else []
    return SimpleNamespace(recipe=recipe, model=whole, clips=clips[:1], images=[], prior=prior,
                           learners=learners, base=None, batch=1, process=0, processes=1,
                           flags=SimpleNamespace(seed=0, weights=None, device="cpu",
                                                 precision="fp32"))


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['command']} {r['shape']}")
def test_every_command_has_room_on_a_card_of_24_gb(row):
    """By the figures of docs/speed.json, as `--checkpointing auto` settles it there; and on 12 GB,
    VMC, MotionDirector and sampling at their own shapes."""
    assert memory.fits(row, ROWS, 24)
    small = {"train.py --method vmc": [8, 320, 576], "generate.py": [24, 320, 576],
             "train.py --method motiondirector": [16, 384, 384]}
    if small.get(row["command"]) == row["shape"]:
        assert memory.fits(row, ROWS, 12)


def test_the_page_shows_the_figures():
    assert memory.render(RESULTS) in (ROOT / "docs" / "speed.md").read_text()


@pytest.mark.parametrize("row", [r for r in TRAINING if r["checkpointing"] == "off"],
                         ids=lambda r: f"{r['command']} {r['shape']}")
def test_the_estimate_of_a_step_is_enough_and_not_far_off(row):
    """machine.step_memory, by which `--checkpointing auto` decides, against the emulation."""
    frames, height, width = row["shape"]
    pixels = row["clips"] * frames * height * width // 64
    estimate = machine.step_memory(pixels, row["learning"])
    needed = row["step"] - row["between"] + 2 * row["learning"]
    assert needed <= estimate * 1.02 and estimate < 2 * needed
