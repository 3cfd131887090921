"""train.py and generate.py as a person runs them: on the tiny model, a few steps, from outside."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import av
import pytest
import torch
from conftest import ROOT, TINY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import generate
import lora
import model
import sampler
import train
from model import BadInput
from tiny import world


def run(script, *flags, check=True, **more):
    done = subprocess.run([sys.executable, ROOT / script, *map(str, flags)], capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, **more)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A hopping square, with its caption beside it."""
    folder = tmp_path_factory.mktemp("clips")
    scenes = world.sample_scenes(1, torch.Generator().manual_seed(3), ("hopping",))
    data.write_video(folder / "hop.mp4", world.render(scenes)[0], world.FPS)
    (folder / "hop.txt").write_text("a thing hopping")
    return folder / "hop.mp4"


QUICK = ("--method", "vmc", "--preview-every", 0)


def flags(clip, out, *more):
    return [*QUICK, "--video", clip, "--out", out, *more]


@pytest.fixture(scope="session")
def trained(clip, tmp_path_factory):
    """A run of six steps, with samples at 0, 3 and 6."""
    out = tmp_path_factory.mktemp("run") / "out"
    done = run("train.py", "--method", "vmc", "--video", clip, "--out", out, "--steps", 6,
               "--preview-every", 3, "--preview-steps", 4)
    return out, done.stdout


# ------------------------------------------------------------------------------------------------
# What trains


def test_vmc_trains_what_the_paper_says_at_full_size():
    from test_model import FULL_UNET

    with torch.device("meta"):
        unet = model.UNet(model.UNetConfig(**FULL_UNET))
    learners = {"motion": [train.Whole(unet, train.METHODS["vmc"].parts["motion"].layers)]}
    chosen = train.named(learners)
    assert len(chosen) == 96 and sum(p.numel() for p in chosen.values()) == 74_342_400
    assert not any("transformer_in" in n or "to_out" in n for n in chosen)
    for p in unet.parameters():
        p.requires_grad_(False)
    train.switch(learners, learn=("motion",))
    assert {n for n, p in unet.named_parameters() if p.requires_grad} == set(chosen)


def test_vmcs_recipe_is_the_papers():
    m = train.METHODS["vmc"]
    part, (stage,) = m.parts["motion"], m.stages
    assert (part.lr, part.weight_decay, m.clip_grad, stage.steps) == (1e-4, 0.01, 1.0, 400)
    (p,) = stage.passes
    assert (p.loss, p.timesteps, m.noise_prior, p.stride) == ("residual-cosine", "uniform", 1, 1)


def test_only_the_chosen_layers_change(trained):
    out, _ = trained
    base = load_file(TINY / "unet" / "diffusion_pytorch_model.safetensors")
    changed = lora.read_adapter(out / "vmc.safetensors").tensors
    assert set(changed) == set(lora.select(model.load_unet(TINY), "temporal"))
    assert all(not torch.equal(t, base[n].float()) for n, t in changed.items())


# ------------------------------------------------------------------------------------------------
# What a run leaves


def test_a_run_leaves_what_it_promises(trained, clip):
    out, printed = trained
    args = json.loads((out / "args.json").read_text())
    assert args["prompt"] == ["a thing hopping"] and args["steps"] == 6 and args["seed"] == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(6))
    assert all({"loss", "grad", "passes", "seconds"} <= line.keys() for line in log)
    assert all({"loss", "t", "scale", "offset"} <= line["passes"][0].keys() for line in log)
    names = sorted(p.name for p in (out / "samples").iterdir())
    assert names == [f"step-{s:06d}.mp4" for s in (0, 3, 6)]
    with av.open(str(out / "samples" / "step-000006.mp4")) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 16 and frames[0].width == 3 * frames[0].height
    with safe_open(out / "vmc.safetensors", "pt") as file:
        meta = file.metadata()
    assert (meta["method"], meta["prompt"], meta["step"], meta["seed"]) == (
        "vmc", "a thing hopping", "6", "0")
    assert meta["base"] == lora.fingerprint(model.load_unet(TINY))
    for words in (str(clip.with_suffix(".txt")), "parameters in", "temp_attentions attn1:",
                  "VMC, Eq. 17 and App. D", "tiny model's own", "generate.py --adapter"):
        assert words in printed


def test_the_first_sample_shows_the_untrained_model(trained):
    """Step 0: before and now are the same video; at the end they are not."""
    out, _ = trained
    for step, same in ((0, True), (6, False)):
        _, pictures = data.decode(out / "samples" / f"step-{step:06d}.mp4")
        side = pictures[0].shape[0]
        third = lambda i, p=pictures[8], s=side: torch.tensor(p[:, s * i : s * (i + 1)]).float()
        before, now = third(1), third(2)
        assert ((before - now).abs().mean() < 2) == same


def test_the_saved_arguments_alone_repeat_the_run(clip, tmp_path):
    run("train.py", *flags(clip, tmp_path / "a", "--steps", 3, "--seed", 5))
    args = json.loads((tmp_path / "a" / "args.json").read_text())
    again = []
    for name, value in args.items():
        if value in (None, False, []) or name == "out":
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        again += [f"--{name.replace('_', '-')}", *values]
    run("train.py", *again, "--out", tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")


# ------------------------------------------------------------------------------------------------
# Exactness


def same_weights(a, b, name="vmc.safetensors"):
    one, two = load_file(a / name), load_file(b / name)
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def losses_of(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_resumed_is_the_same_run_to_the_bit(clip, tmp_path):
    """With dropout on, and previews drawn in between, which must not matter."""
    run("train.py", *flags(clip, tmp_path / "whole", "--steps", 5))
    run("train.py", *flags(clip, tmp_path / "parts", "--steps", 2))
    run("train.py", *flags(clip, tmp_path / "parts", "--steps", 5, "--resume"),
        "--preview-every", 2, "--preview-steps", 2)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_another_seed_is_another_run(clip, tmp_path):
    run("train.py", *flags(clip, tmp_path / "a", "--steps", 2))
    run("train.py", *flags(clip, tmp_path / "b", "--steps", 2, "--seed", 1))
    assert losses_of(tmp_path / "a") != losses_of(tmp_path / "b")


def start_and_wait_for(step, clip, out, *more):
    more = map(str, flags(clip, out, "--steps", 400, *more))
    command = [sys.executable, ROOT / "train.py", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        time.sleep(0.1)
        log = out / "log.jsonl"
        if log.is_file() and len(log.read_text().splitlines()) > step:
            return process
        assert process.poll() is None, process.communicate()
    raise AssertionError("the run did not start")


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_go_on_and_resumes_exactly(number, code, clip, tmp_path):
    process = start_and_wait_for(1, clip, tmp_path / "s")
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == code and "--resume" in printed
    done = len(losses_of(tmp_path / "s"))
    run("train.py", *flags(clip, tmp_path / "s", "--steps", done + 2, "--resume"))
    run("train.py", *flags(clip, tmp_path / "whole", "--steps", done + 2))
    assert losses_of(tmp_path / "s") == losses_of(tmp_path / "whole")
    assert same_weights(tmp_path / "s", tmp_path / "whole")


def test_a_killed_run_resumes_from_its_last_state(clip, tmp_path):
    process = start_and_wait_for(4, clip, tmp_path / "k", "--save-every", 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert torch.load(tmp_path / "k" / "state.pt", weights_only=True)["step"] >= 2
    done = len(losses_of(tmp_path / "k"))
    more = ("--steps", done + 1, "--resume", "--save-every", 2)
    run("train.py", *flags(clip, tmp_path / "k", *more))
    run("train.py", *flags(clip, tmp_path / "whole", "--steps", done + 1))
    assert losses_of(tmp_path / "k") == losses_of(tmp_path / "whole")
    assert same_weights(tmp_path / "k", tmp_path / "whole")


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_a_fault_while_saving_leaves_the_last_state(clip, tmp_path, monkeypatch):
    out = tmp_path / "o"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    train.main([str(f) for f in flags(clip, out, "--steps", 1)])
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    for target in ("os.fsync", "os.replace"):
        with monkeypatch.context() as m:
            m.setattr(target, full_disk)
            with pytest.raises((OSError, BadInput)):
                with data.publish(out / "state.pt") as part:
                    part.write_text("half")
        assert (out / "state.pt").read_bytes() == before["state.pt"]
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_loads_exactly(trained, tiny, tmp_path):
    """What was in memory and what is read back make the same video, to the bit."""
    noise = sampler.noise_like_shape((8, 16, 8, 8), [0])
    video = lambda: generate.sample(tiny, ["a red star"], noise, [0], steps=2, guidance=2)
    plain, fresh = video(), lora.select(tiny.unet, "temporal-attention-qkv")
    originals = {n: p.detach().clone() for n, p in fresh.items()}
    meta = {"method": "vmc", "fps": 8, "base": lora.fingerprint(tiny.unet)}
    save = lambda name: lora.save_adapter(tmp_path / name, fresh, latents=noise[0], **meta)
    load = lambda name: lora.apply_adapters(tiny, [lora.read_adapter(tmp_path / name)])
    save("fresh.safetensors")
    try:
        load("fresh.safetensors")
        assert torch.equal(video(), plain)
        for p in fresh.values():
            p.data = p.data * 1.1
        in_memory = video()
        save("t.safetensors")
        for n, p in fresh.items():
            p.data = originals[n].clone()
        load("t.safetensors")
        assert torch.equal(video(), in_memory) and not torch.equal(in_memory, plain)
    finally:
        for n, p in fresh.items():
            p.data = originals[n]


# ------------------------------------------------------------------------------------------------
# generate.py


def test_generate_makes_a_set_with_a_sheet_and_settings(trained, tmp_path):
    out, _ = trained
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a green ring hopping\n\n../../escape <b>\n")
    run("generate.py", "--adapter", out / "vmc.safetensors", "--prompts", prompts, "--seeds", 2,
        "--steps", 3, "--out", tmp_path / "set")
    names = sorted(p.name for p in (tmp_path / "set").iterdir())
    assert len([n for n in names if n.endswith(".mp4")]) == 4
    assert {"sheet.png", "settings.json"} <= set(names)
    settings = json.loads((tmp_path / "set" / "settings.json").read_text())
    assert settings["init"] == "inverted" and len(settings["videos"]) == 4
    assert {p.name for p in tmp_path.iterdir()} == {"prompts.txt", "set"}


def test_a_sample_does_not_depend_on_its_batch(tiny):
    """The same noise for seed 7 alone and among four; sums differ only in the last bits."""
    prompts, seeds = ["a red star"] * 4, [6, 7, 8, 9]
    noise = sampler.noise_like_shape((8, 4, 8, 8), seeds)
    many = generate.sample(tiny, prompts, noise, seeds, steps=3, method="ddpm")
    one = generate.sample(tiny, prompts[:1], noise[1:2], seeds[1:2], steps=3, method="ddpm")
    assert (many[1] - one[0]).abs().max() < 1e-3


@pytest.mark.parametrize("more", [
    ("--init", "noise"), ("--noise-prior", "0.5"), ("--init", "noise", "--sampler", "dpm"),
    ("--sampler", "ddpm"), ("--frames", "5", "--width", "48", "--height", "80", "--init", "noise"),
])
def test_generate_with_other_starts_and_samplers(more, trained, tmp_path):
    out, _ = trained
    run("generate.py", "--adapter", out / "vmc.safetensors", "--prompt", "a red star", "--steps", 3,
        "--out", tmp_path / "g", *more)
    assert len(list((tmp_path / "g").glob("*.mp4"))) == 1


def test_generate_from_another_clip(trained, clip, tmp_path):
    out, _ = trained
    run("generate.py", "--adapter", out / "vmc.safetensors", "--prompt", "a red star", "--steps", 2,
        "--init-video", clip, "--out", tmp_path / "g")


# ------------------------------------------------------------------------------------------------
# Mistakes


def complain(main, flags, says, capsys):
    """The command ends with exit code 2 and one line of complaint that says `says`."""
    with pytest.raises(SystemExit) as stop:
        generate.run(lambda: main([str(f) for f in flags]))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and re.search(says, lines[-1]), lines
    assert len([line for line in lines if "error:" in line]) == 1


def test_a_mistake_leaves_no_traceback(tmp_path):
    done = run("train.py", "--video", tmp_path / "none.mp4", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("make,says", [
    (lambda p, c: ["--video", p / "none.mp4"], "does not exist"),
    (lambda p, c: [], "--video"),
    (lambda p, c: ["--video", c, "--method", "magic"], "choose from"),
    (lambda p, c: ["--video", c, "--weights", p], "is missing"),
    (lambda p, c: ["--video", c, "--weights", p / "no"], "is not a folder"),
    (lambda p, c: ["--video", c, "--prompt", "x" * 300], "Shorten it"),
    (lambda p, c: ["--video", p / "text.mp4"], "not a video"),
    (lambda p, c: ["--video", c, "--resume"], "nothing to resume"),
    (lambda p, c: ["--video", c, "--steps", "0"], "wanted 1 or more"),
    (lambda p, c: ["--video", c, "--layers", "nothing"], "known sets"),
    (lambda p, c: ["--video", c, "--width", "60"], "multiples of 8"),
    (lambda p, c: ["--video", c, "--stride", "16"], "wanted less than"),
    (lambda p, c: ["--video", c, "--wrong"], "unrecognized"),
    (lambda p, c: ["--video", c, "--clip-grad", "-1"], "wanted"),
    (lambda p, c: ["--video", c, "--lr", "nan"], "wanted"),
    (lambda p, c: ["--video", c, "--width", "-8"], "wanted"),
    (lambda p, c: ["--video", c, "--start", "-2"], "wanted"),
    (lambda p, c: ["--video", c, "--device", "toaster"], "cannot be used"),
    (lambda p, c: ["--video", c, "--layers", "("], "no pattern"),
    (lambda p, c: ["--video", c, "--preview-steps", "2000"], "wanted 1 to"),
])
def test_mistakes_in_training_end_in_one_line_and_two(make, says, clip, tmp_path, capsys):
    (tmp_path / "text.mp4").write_text("this is no video")
    out = tmp_path / "out"
    complain(train.main, [*make(tmp_path, clip), "--out", out], says, capsys)
    assert not out.exists()


VAE_FILE = TINY / "vae" / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("make,says", [
    (lambda p, a: [], "--prompt"),
    (lambda p, a: ["--prompt", "x" * 300], "Shorten it"),
    (lambda p, a: ["--prompts", p / "none.txt"], "does not exist"),
    (lambda p, a: ["--prompt", "x", "--adapter", p / "none.safetensors"], "does not exist"),
    (lambda p, a: ["--prompt", "x", "--adapter", p / "broken.safetensors"], "cannot be read"),
    (lambda p, a: ["--prompt", "x", "--adapter", VAE_FILE], "does not fit"),
    (lambda p, a: ["--prompt", "x", "--adapter", p / "other.safetensors"], "was trained on"),
    (lambda p, a: ["--prompt", "x", "--adapter", a, "--width", "128"], "leave --frames, --width"),
    (lambda p, a: ["--prompt", "x", "--init", "inverted"], "no clip to invert"),
    (lambda p, a: ["--prompt", "x", "--noise-prior", "0.5"], "noise-prior has no clip to invert"),
    (lambda p, a: ["--prompt", "x", "--noise-prior", "2"], "wanted 0"),
    (lambda p, a: ["--prompt", "x", "--steps", "2000"], "wanted 1 to"),
    (lambda p, a: ["--prompt", "x", "--frames", "0"], "wanted 1"),
    (lambda p, a: ["--prompt", "x", "--adapter", a, "--frames", "9"], "leave --frames"),
    (lambda p, a: ["--prompt", "x", "--negative", "x" * 300], "Shorten it"),
    (lambda p, a: ["--prompt", "x", "--weights", p], "is missing"),
])
def test_mistakes_in_generating_end_in_one_line_and_two(make, says, trained, tmp_path, capsys):
    adapter = trained[0] / "vmc.safetensors"
    (tmp_path / "broken.safetensors").write_bytes(adapter.read_bytes()[:-50])
    with safe_open(adapter, "pt") as file:
        meta = file.metadata() | {"base": "0" * 12}
    save_file(load_file(adapter), tmp_path / "other.safetensors", meta)
    out = tmp_path / "out"
    complain(generate.main, [*make(tmp_path, adapter), "--out", out], says, capsys)
    assert not out.exists()


def test_resuming_with_other_settings_is_refused(trained, clip):
    out, _ = trained
    done = run("train.py", *flags(clip, out, "--steps", 8, "--resume", "--lr", "0.5"), check=False)
    assert done.returncode == 2 and "lr was 0.001, is 0.5" in done.stderr


def test_resuming_with_another_clip_at_the_same_path_is_refused(clip, tmp_path, capsys):
    mine = tmp_path / "c.mp4"
    mine.write_bytes(clip.read_bytes())
    train.main([str(f) for f in flags(mine, tmp_path / "o", "--steps", 1)])
    scenes = world.sample_scenes(1, torch.Generator().manual_seed(4), ("zigzagging",))
    data.write_video(mine, world.render(scenes)[0], world.FPS)
    complain(train.main, flags(mine, tmp_path / "o", "--steps", 2, "--resume"), "clip was", capsys)


@pytest.mark.parametrize("ruin,says", [
    (lambda out: (out / "state.pt").write_bytes(b"half"), "cannot be read"),
    (lambda out: (out / "state.pt").unlink(), "nothing to resume"),
    (lambda out: None, "already at step 1"),
])
def test_resuming_what_cannot_be_resumed_is_refused(ruin, says, clip, tmp_path, capsys):
    train.main([str(f) for f in flags(clip, tmp_path, "--steps", 1)])
    ruin(tmp_path)
    complain(train.main, flags(clip, tmp_path, "--steps", 1, "--resume"), says, capsys)


def test_a_new_run_in_an_old_folder_forgets_the_old_one(clip, tmp_path):
    train.main([str(f) for f in flags(clip, tmp_path, "--steps", 3)])
    (tmp_path / ".part-left.pt").touch()
    train.main([str(f) for f in flags(clip, tmp_path, "--steps", 1)])
    assert len(losses_of(tmp_path)) == 1 and not list(tmp_path.glob(".part-*"))
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 1


def test_a_full_disk_keeps_the_old_state(clip, tmp_path, monkeypatch, capsys):
    train.main([str(f) for f in flags(clip, tmp_path, "--steps", 1)])
    before = (tmp_path / "state.pt").read_bytes()
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    more = ("--steps", 2, "--resume")
    complain(train.main, flags(clip, tmp_path, *more), "needs [0-9,]+ bytes", capsys)
    assert (tmp_path / "state.pt").read_bytes() == before


def test_a_loss_that_is_not_a_number_stops_the_run(clip, tmp_path, monkeypatch):
    """Before the optimiser steps; the message names step, timestep and clip; the state is kept."""
    monkeypatch.setitem(train.losses.LOSSES, "residual-cosine-mse",
                        lambda pred, eps, **_: pred.mean() * float("nan"))
    with pytest.raises(SystemExit) as stop:
        train.main([str(f) for f in flags(clip, tmp_path / "n", "--steps", 3)])
    message = str(stop.value.code)  # a message is exit code 1
    assert re.search(r"nan.*step 0, timestep \d+, clip .*hop.mp4", message)
    assert not (tmp_path / "n" / "vmc.safetensors").exists()


@pytest.mark.parametrize("script", ("train.py", "generate.py"))
def test_help_names_every_flag(script):
    started = time.time()
    printed = run(script, "--help").stdout
    assert "examples" in printed or "python generate.py" in printed
    assert time.time() - started < 20  # about two on an idle machine, most of it torch's import
    everywhere = (ROOT / "train.py").read_text() + (ROOT / "generate.py").read_text()
    module = {"train.py": train, "generate.py": generate}[script]
    for name in vars(module.parse([])):
        assert f"--{name.replace('_', '-')}" in printed
        read = f"args.{name}" in everywhere or f'"{name}"' in everywhere
        assert read, f"nothing reads --{name}"


def test_the_environment_is_not_needed(clip, tmp_path):
    """No network, no home, another folder: nothing but the files of the repository."""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run("train.py", *flags(clip, "run", "--steps", 1), cwd=tmp_path, env=env)
    assert (tmp_path / "run" / "vmc.safetensors").is_file()


# ------------------------------------------------------------------------------------------------
# Several processes


def together(script, *flags):
    """The script under torchrun, in two processes that meet on this machine."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         ROOT / script, *map(str, flags)],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("method", ("motiondirector", "newmove"))
def test_two_processes_learn_what_one_does_from_as_many_examples(method, clip, tmp_path):
    """Two clips, so that MotionDirector's processes now and then train different appearances."""
    clips = tmp_path / "clips"
    clips.mkdir()
    video = data.read_video(clip, 16, (64, 64), 8)
    for i in range(2):
        data.write_video(clips / f"{i}.mp4", video if i else video.flip(1), 8)
    same = ("--method", method, "--video", clips, "--prompt", "a thing hopping", "--steps", 3,
            "--preview-every", 0, "--seed", 1)
    run("train.py", *same, "--batch", 2, "--out", tmp_path / "one")
    together("train.py", *same, "--out", tmp_path / "two")
    files = sorted(p.name for p in (tmp_path / "one").glob("*.safetensors"))
    assert files == sorted(p.name for p in (tmp_path / "two").glob("*.safetensors"))
    run("train.py", *same, "--out", tmp_path / "alone")  # one example a step is another thing

    def apart(a, b):
        """Largest difference of what two runs learned, all files together, by norm."""
        norms = []
        for name in files:
            x, y = load_file(tmp_path / a / name), load_file(tmp_path / b / name)
            norms += [(x[k] - y[k]).norm() for k in x if "clip" not in k]
        return torch.stack(norms).norm().item()

    # Sums of more than two gradients may be rounded in another order, and Adam makes that seen
    # where a gradient is nearly zero.
    assert apart("one", "two") <= 1e-2 * apart("one", "alone")
    if method == "motiondirector":
        assert apart("one", "two") == 0


def test_two_processes_generate_and_score_what_one_does(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\na green cross\n")
    same = ("--prompts", tmp_path / "prompts.txt", "--steps", 2, "--batch", 1)
    run("generate.py", *same, "--out", tmp_path / "one")
    together("generate.py", *same, "--out", tmp_path / "two")
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert len(names) == 5 and names == sorted(p.name for p in (tmp_path / "two").iterdir())
    for name in set(names) - {"settings.json"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    scoring = (tmp_path / "two", "--reference", tmp_path / "one", "--size", 64)
    run("eval.py", *scoring, "--out", tmp_path / "a")
    together("eval.py", *scoring, "--out", tmp_path / "b")
    read = lambda folder: json.loads((tmp_path / folder / "metrics.json").read_text())
    assert read("a")["table"] == read("b")["table"]


def test_examples_must_divide_among_processes(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(BadInput, match="wanted a multiple of the 2 processes"):
        train.main([*map(str, flags(clip, tmp_path / "out", "--batch", 3))])
