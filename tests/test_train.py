"""train.py as a user runs it, on the tiny model with a few steps: the files of a run, exactness,
signals and faults, whose folder it is, resuming, and user errors."""
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import av
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    end_of,
    expect_error,
    flags_of,
    fork,
    log_of,
    losses_of,
    prepare_run,
    run_training,
    same_weights,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import lora
import losses
import model
import sampler
import train
from support import adapters, files, machine, media, runs
from support.files import BadInput
from support.recipe import METHODS, write_value


def vmc(hop, out, *more):
    return flags_of("vmc", hop, out, *more)


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_file_or_a_value_of_a_flag_is_no_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "assets" / "eight.mp4", "steps=2.mp4")
    flags, recipe = train.parse(["--video", "steps=2.mp4", "--out", "steps=3", "--preview-prompt",
                                 "alpha=0", "--resume", "steps=4", "--prompt", "steps=5"])
    assert (flags.video, flags.out) == ([Path("steps=2.mp4")], Path("steps=3"))
    assert flags.preview_prompt == "alpha=0" and flags.resume and recipe.steps == 4
    assert flags.prompt == ["steps=5"]


@pytest.fixture(scope="session")
def trained(hop, tmp_path_factory):
    """A run of four steps as a command, with previews at 0, 2 and 4, and its output. It has neither
    a network nor a home folder."""
    out = tmp_path_factory.mktemp("run") / "out"
    command = [sys.executable, ROOT / "train.py", "--video", hop, "--out", out, "--steps", 4,
               "--preview-every", 2, "--preview-steps", 2, "--frames", 4, "motion.lr=5e-3"]
    (out.parent / "sitecustomize.py").write_text(
        "import socket\n\n\ndef connect(self, address):\n    raise SystemExit('network')\n\n\n"
        "socket.socket.connect = connect\n")
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=out.parent,
                          env={"PATH": os.environ["PATH"], "HOME": "/nowhere",
                               "PYTHONPATH": str(out.parent)})
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="session")
def five_steps(hop, tmp_path_factory):
    """A run of five steps without previews."""
    out = tmp_path_factory.mktemp("run") / "five"
    run_training("vmc", hop, out, "--steps", 5)
    return out


@pytest.fixture(scope="session")
def first_step(hop, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "one"
    run_training("vmc", hop, out, "--steps", 1)
    return out


@pytest.fixture
def one_step(first_step, tmp_path):
    """A run of one step, for a test that changes it."""
    return shutil.copytree(first_step, tmp_path / "one")


# ------------------------------------------------------------------------------------------------
# The files of a run


def test_a_run_leaves_its_settings_log_state_adapter_and_previews(trained, hop, tiny):
    out, printed = trained
    record = json.loads((out / "run.json").read_text())
    assert record["method"] == "vmc" and record["settings"]["steps"] == 4
    assert record["flags"]["seed"] == 0 and record["flags"]["size"] == [64, 64]
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(4))
    assert all({"loss", "grad", "losses", "seen", "seconds"} <= line.keys() for line in log)
    assert all({"mse", "t", "clip", "scale", "offset"} <= line["seen"][0].keys() for line in log)
    assert sorted(p.relative_to(out).as_posix() for p in contents(out)) == [
        "log.jsonl", "run.json", *(f"samples/step-{s:06d}.mp4" for s in (0, 2, 4)),
        "state.safetensors", "vmc.safetensors"]
    for text in (str(hop.with_suffix(".txt")), "parameters in", "temp_attentions attn1:",
                 METHODS["vmc"].source, train.TINY["vmc"], "generate.py --adapter"):
        assert text in printed
    adapter = adapters.read_adapter(out / "vmc.safetensors", tiny)
    assert {"method": "vmc", "prompt": "thing 0 hopping", "step": "4", "seed": "0",
            "base": adapters.fingerprint(tiny)}.items() <= adapter.meta.items()
    assert adapter.latents.shape == (8, 4, 8, 8)
    assert sampler.read_sampling(out, adapter.meta) == sampler.Sampling(
        sampler="ddpm", sampling_steps=20, inversion_steps=0, noise_prior=1,
        inversion_model="tuned", guidance=4, fps=8)
    base = tiny.unet.state_dict()
    assert set(adapter.tensors) == set(lora.select(tiny.unet, "temporal-attention-qkv"))
    assert all(not torch.equal(t, base[n]) for n, t in adapter.tensors.items())


def test_a_preview_has_the_reference_the_base_model_and_the_current_one(trained):
    """At step 0 the second and the third are equal."""
    for step, same in ((0, True), (4, False)):
        with av.open(str(trained[0] / "samples" / f"step-{step:06d}.mp4")) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        side = frames[0].shape[0]
        assert len(frames) == 4 and frames[0].shape[1] == 3 * side
        _, before, now = torch.tensor(frames[3]).float().split(side, dim=1)
        assert ((before - now).abs().mean() < 2) == same


def test_rank_zero_alone_shows_progress_bars(hop, bars, tmp_path):
    run = prepare_run("vmc", hop, tmp_path, "inversion_steps=3", "sampling_steps=2")
    run.rank = 1
    train.preview(run)
    assert not bars
    run.rank = 0
    train.preview(run)
    assert bars == {"preview: inverting": 3, "preview": 2}


# ------------------------------------------------------------------------------------------------
# Exactness


def test_run_json_repeats_the_run(hop, tmp_path):
    changes = "--steps", 2, "motion.lr=3e-4", "frame_stride=2"
    run_training("vmc", hop, tmp_path / "a", *changes, "--seed", 5)
    record, again = json.loads((tmp_path / "a" / "run.json").read_text()), []
    for name, value in record["flags"].items():
        if value in (None, False, []) or name in ("out", "overrides", "default_out"):
            continue
        value = "x".join(map(str, value[::-1])) if name == "size" else value
        values = value if isinstance(value, list) else [value]
        again += [f"--{name.replace('_', '-')}", *map(str, values)]
    again += [f"{name}={write_value(value)}" for name, value in record["settings"].items()]
    train.main([*again, "--out", str(tmp_path / "b")])
    assert same_weights(tmp_path / "a", tmp_path / "b")
    run_training("vmc", hop, tmp_path / "c", *changes, "--seed", 6)
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b") != losses_of(tmp_path / "c")


def test_previews_and_saves_change_no_step(five_steps, hop, tmp_path):
    out = tmp_path / "o"
    run_training("vmc", hop, out, "--steps", 5, "--preview-every", 2, "--save-every", 2)
    assert same_weights(five_steps, out) and losses_of(five_steps) == losses_of(out)
    kept = sorted(p.parent.name for p in (out / "steps").rglob("vmc.safetensors"))
    assert kept == ["000002", "000004"]


@pytest.mark.parametrize("method", ("motiondirector", "newmove"))
def test_two_processes_equal_one_with_the_same_batch(method, folder, tmp_path):
    """With two clips, MotionDirector's processes sometimes train different spatial LoRAs."""
    same = ("--prompt", "a thing hopping", "--steps", 3, "--seed", 1, "--precision", "fp32",
            *(["--prior", folder / "videos"] if method == "newmove" else []))
    args = lambda out, *more: flags_of(method, folder / "videos", tmp_path / out, *same, *more)
    train.main(args("one", "--batch", 2))
    train.main(args("alone"))  # one example per step
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test",
                 "MASTER_PORT": str(free.getsockname()[1])}
    both = [fork(lambda: train.main(args("two")), tmp_path / f"stderr-{i}", RANK=str(i), **group)
            for i in range(2)]
    assert [end_of(pid) for pid in both] == [0, 0], (tmp_path / "stderr-0").read_text()
    names = sorted(p.name for p in (tmp_path / "one").glob("*.safetensors"))
    assert names == sorted(p.name for p in (tmp_path / "two").glob("*.safetensors"))

    def distance(a, b):
        norms = []
        for name in names:
            x, y = load_file(tmp_path / a / name), load_file(tmp_path / b / name)
            norms += [(x[k] - y[k]).norm() for k in x if k in y and x[k].is_floating_point()]
        return torch.stack(norms).norm().item()

    # Sums may round differently, which Adam amplifies where a gradient is almost 0.
    assert distance("one", "two") <= 1e-2 * distance("one", "alone")
    with pytest.raises(BadInput, match="--batch was 2, is 1"):
        train.main(args("two", "--resume", "--steps", 4))


def test_the_batch_must_be_a_multiple_of_the_processes(hop, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "init_distributed", lambda device: (0, 2))
    with pytest.raises(BadInput, match="a multiple of the 2 processes"):
        train.main(vmc(hop, tmp_path / "out", "--batch", 3))


# ------------------------------------------------------------------------------------------------
# Signals and faults


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_prints_how_to_resume_exactly(number, code, five_steps, hop, tmp_path,
                                                         spy, capsys):
    out, sent = tmp_path / "my run", []
    spy(runs, "step_record", lambda *of: sent or sent.append(os.kill(os.getpid(), number)))
    with pytest.raises(SystemExit) as stop:
        run_training("vmc", hop, out, "--steps", 5)
    advice = re.search("add (.*) to the same command", capsys.readouterr().err)[1]
    assert stop.value.code == code and shlex.split(advice) == ["--resume", "--out", str(out)]
    assert len(losses_of(out)) == 1
    run_training("vmc", hop, out, "--steps", 5, "--resume")
    assert losses_of(out) == losses_of(five_steps) and same_weights(out, five_steps)


def test_torchrun_sets_all_its_variables(monkeypatch):
    """A shell below torchrun, or another launcher, sets only some."""
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR"):
        assert not machine.distributed()
        monkeypatch.setenv(name, "1")
    assert machine.distributed()


def test_a_signal_during_the_all_reduce_is_not_lost(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, action: None)
    monkeypatch.setattr(machine, "distributed", lambda: True)
    stop, sent = machine.Stop(), []

    def all_reduce(asked, op):
        if not sent:
            sent.append(stop.catch(signal.SIGTERM, None))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert stop.agree("cpu") is None and stop.agree("cpu") == signal.SIGTERM


def fail(error, *_):
    raise error


@pytest.mark.parametrize("error,message", [
    (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you"), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory"), "--checkpointing on"),
    (PermissionError(13, "Permission denied", "x.mp4"), "x.mp4: Permission denied; check its perm"),
    (MemoryError(), "out of memory"), (BadInput("two\nlines"), "two lines"),
])
def test_a_users_error_is_one_line_and_a_bug_has_a_traceback(error, message, capsys):
    expect_error([], message, capsys, main=partial(fail, error))
    with pytest.raises(RuntimeError, match="a bug"):
        machine.run(partial(fail, RuntimeError("a bug")))


def test_out_of_memory_turns_gradient_checkpointing_on_and_repeats_the_step(five_steps, hop,
                                                                            tmp_path, monkeypatch):
    attempts, one_step = [], train.one_step

    def step(run, number):
        attempts.append((number, run.pipe.unet.checkpointing))
        losses = one_step(run, number)
        if len(attempts) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    monkeypatch.setattr(train, "one_step", step)
    run_training("vmc", hop, tmp_path / "o", "--steps", 3)
    assert attempts == [(0, False), (1, False), (1, True), (2, True)]
    assert losses_of(tmp_path / "o") == pytest.approx(losses_of(five_steps)[:3], rel=1e-3)


def test_a_broken_pipe_ends_a_command_without_a_traceback(hop, tmp_path):
    """As in `train.py … | head -1`."""
    def broken():
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = os.fdopen(writer, "w", buffering=1)
        machine.run(lambda: train.main(vmc(hop, tmp_path / "b", "--steps", 1)))

    assert end_of(fork(broken, tmp_path / "stderr")) == 1
    assert (tmp_path / "stderr").read_text() == ""


def test_ctrl_c_that_also_ends_the_reader_of_the_output_saves(five_steps, hop, tmp_path, spy):
    """As in `train.py … 2>&1 | tee log.txt`."""
    out, sent = tmp_path / "out", []

    def piped():
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        sys.stderr = sys.stdout = os.fdopen(2, "w", buffering=1)
        ctrl_c = lambda: (os.close(reader), os.close(writer), os.kill(os.getpid(), signal.SIGINT))
        spy(runs, "step_record", lambda *of: sent or sent.append(ctrl_c()))
        machine.run(lambda: train.main(vmc(hop, out, "--steps", 5)))

    assert end_of(fork(piped, tmp_path / "stderr")) == 130
    assert len(losses_of(out)) == 1 and (out / "state.safetensors").exists()
    run_training("vmc", hop, out, "--steps", 5, "--resume")
    assert same_weights(out, five_steps)


def test_a_folder_that_is_deleted_during_a_run_ends_it_in_one_line(hop, tmp_path, capsys, spy):
    out = tmp_path / "out"
    spy(runs, "step_record", lambda *of: shutil.rmtree(out))
    expect_error(vmc(hop, out, "--steps", 2), "log.jsonl: No such file", capsys)
    assert not contents(tmp_path)


def test_nan_and_infinity_stop_the_run_and_are_not_saved(hop, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(losses.LOSSES, "mse", lambda pred, target, **_: pred.mean() * float("nan"))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: pytest.fail("stepped"))
    expect_error(vmc(hop, tmp_path / "n", "--steps", 3, "loss=mse"),
                 r"nan.*step 0, timestep \d+, clip .*0.mp4.*no state has been saved", capsys)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: self.param_groups[0]["params"][
        0].data.fill_(float("inf")))
    expect_error(vmc(hop, tmp_path / "b", "--steps", 1),
                 "is not finite at step 1; no state has been saved", capsys)
    assert not list(tmp_path.rglob("*.safetensors"))


# ------------------------------------------------------------------------------------------------
# Output folders


def test_a_run_is_never_replaced(hop, tmp_path, monkeypatch, capsys):
    """Without --out a new run gets a number. --resume requires --out where two runs match."""
    monkeypatch.chdir(tmp_path)
    argv = ["--video", str(hop), "--frames", "4", "--preview-every", "0", "--steps", "1"]
    train.main(argv)
    first = tmp_path / "out" / "0-vmc"
    before = contents(first)
    train.main([*argv, "--resume"])  # nothing is left to train
    train.main(argv)
    assert (tmp_path / "out" / "0-vmc-2" / "vmc.safetensors").is_file()
    expect_error([*argv, "--out", first], "is not empty; .* or --resume", capsys)
    expect_error([*argv, "--resume"], "2 runs match", capsys)
    assert contents(first).keys() == before.keys() and same_weights(first, tmp_path / "out/0-vmc-2")


def test_two_runs_never_share_a_folder(one_step, hop, capsys):
    with files.locked(one_step):
        before = contents(one_step)
        expect_error(vmc(hop, one_step, "--steps", 2, "--resume"), "in use by another", capsys)
        assert contents(one_step) == before


# ------------------------------------------------------------------------------------------------
# Resuming


def flip(raw):
    """The bytes with one changed bit in the middle."""
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 4]) + raw[middle + 1 :]


@pytest.mark.parametrize("damage", [
    lambda raw: raw[: len(raw) // 2], lambda raw: b"half", flip,
    lambda raw: raw.replace(b'"step":"1"', b'"step":"5"')], ids=("half", "text", "bit", "step"))
def test_a_damaged_state_is_refused(damage, one_step, hop, capsys):
    path = one_step / "state.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    before = contents(one_step)
    expect_error(vmc(hop, one_step, "--steps", 2, "--resume"), "cannot be used", capsys)
    assert contents(one_step) == before


def test_fewer_steps_than_were_trained_are_refused(five_steps, hop, capsys):
    expect_error(vmc(hop, five_steps, "--steps", 2, "--resume"), "already at step 5", capsys)


def test_a_run_that_was_killed_before_its_first_save_starts_again(one_step, hop):
    (one_step / "state.safetensors").unlink()
    (one_step / files.UNFINISHED / ".tmp-x").mkdir(parents=True)  # left by the kill
    run_training("vmc", hop, one_step, "--steps", 1, "--resume")
    assert (one_step / "state.safetensors").is_file()
    assert not (one_step / files.UNFINISHED).exists()
    assert [line["step"] for line in log_of(one_step)] == [0, 0]


def test_a_log_line_that_a_kill_cut_off_leaves_the_next_one_whole(one_step, hop):
    with (one_step / "log.jsonl").open("a") as file:
        file.write('\n{"step": 1, "lo')
    run_training("vmc", hop, one_step, "--steps", 2, "--resume")
    lines = (one_step / "log.jsonl").read_text().split("\n")
    assert json.loads(lines[-1])["step"] == 1 and len(lines) == 4


def test_resuming_with_other_settings_or_another_clip_is_refused(one_step, hop, capsys):
    resume = "--steps", 2, "--resume"
    for more, message in ((["motion.lr=0.5"], "motion.lr was 0.001, is 0.5"),
                          (["--seed", 3], "--seed was 0, is 3"), (["--reverse"], "clips was"),
                          (["--prompt", "a frog"], "clips was")):
        expect_error(vmc(hop, one_step, *resume, *more), message, capsys)


@pytest.mark.parametrize("part", ("unet", "vae", "text_encoder", "scheduler"))
def test_resuming_on_another_base_model_is_refused(part, one_step, hop, tmp_path, capsys,
                                                   monkeypatch):
    """Any changed tensor of a layer counts, not only those of the last layer."""
    weights = shutil.copytree(TINY, tmp_path / "weights")
    if part == "scheduler":
        path, message = weights / part / "scheduler_config.json", "noise schedule: beta_end was"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.013}))
    else:
        path, = (weights / part).glob("*.safetensors")
        state, message = load_file(path), "base model was"
        name = next(n for n in sorted(state) if state[n].dim() > 1)
        save_file(state | {name: state[name] * 1.5}, path)
    monkeypatch.setattr(model, "TINY", weights)
    expect_error(vmc(hop, one_step, "--steps", 2, "--resume"), message, capsys)


# A change of these changes no step, or changes the clips, of which a checksum is compared.
HARMLESS = {"steps", "device", "checkpointing", "preview_prompt", "preview_every", "preview_steps",
            "save_every", "out", "resume", "help", "default_out", "overrides"}
IN_THE_CHECKSUM = {"video", "prompt", "images", "image_prompt", "reverse", "frames", "size", "fps",
                   "start", "allow_damaged", "weights"}  # weights: of the base model


@pytest.mark.parametrize("method", ("vmc", "newmove", "dreambooth"))
def test_every_flag_and_setting_is_fixed_or_harmless(method, hop, tmp_path):
    """A new one fails here until it is in runs.fixed_settings or in a set above."""
    run = prepare_run(method, hop, tmp_path)
    fixed = runs.fixed_settings(run)
    assert {"base model", "clips"} < fixed.keys()
    flags = {name for name in vars(run.flags) if f"--{name.replace('_', '-')}" not in fixed}
    assert flags - {"preview_steps"} == (HARMLESS | IN_THE_CHECKSUM) - {"preview_steps"}
    assert ("preview_steps" in flags) == (run.flags.prior != "generated")
    assert run.recipe.settings().keys() - fixed.keys() == {"steps"} | (
        {"appearance_stop"} & run.recipe.own.keys())


# ------------------------------------------------------------------------------------------------
# User errors, and help


@pytest.mark.parametrize("loads,argv,message", [
    (False, "", "no training data; give --video"),
    (False, "--video VIDEO --method magic", "--method.*magic"),
    (False, "--video VIDEO --weights FOLDER/no", "not a local folder"),
    (True, "--video VIDEO --weights FOLDER", "unet"),
    (True, "--video VIDEO --prompt " + "x1" * 150, "tokens"),
    (True, "--video FOLDER/text.mp4", "text.mp4"),
    (False, "--video FOLDER/none.mp4", "none.mp4 does not exist"),
    (False, "--video https://example.com/hop.mp4", "hop.mp4"),
    (False, "--video VIDEO --method newmove --images FOLDER/no.png", "no.png does not exist"),
    (False, "--video VIDEO --method newmove --prior FOLDER/no", "no does not exist"),
    (False, "--video VIDEO --prompt a b", "2 captions for 1 clips"),
    (False, "--video VIDEO --resume", "nothing to resume"),
    (False, "--video VIDEO --steps 0", "--steps.*0.*1 to"),
    (False, "--video VIDEO --size 64x60", "multiples of 8"),
    (False, "--video VIDEO --hepl", "'--hepl'.*did you mean --help"),
    (False, "--video VIDEO --start -2", "--start.*-2"),
    (True, "--video VIDEO --start 99", "an earlier --start"),
    (False, "--video VIDEO --batch -2", "--batch.*-2"),
    (False, "--video VIDEO --device toaster", "toaster cannot be used"),
    (False, "--video VIDEO --preview-steps 2000", "1 to 1000"),
    (False, "--video VIDEO --method vmc motiondirector", "'motiondirector'"),
    (False, "--video VIDEO --reverse yes", "'yes'"),
    (False, "--video VIDEO --lr 1e-4", "'--lr'"),
    (False, "--video VIDEO --method newmove --prior=", "--prior: the text is empty"),
    (False, "--video VIDEO --prior FOLDER", "uses no regularization clips"),
    (False, "--video VIDEO --images FOLDER/p.png", "vmc cannot be trained on one clip and a subj"),
    (False, "--images FOLDER/p.png", "vmc cannot be trained on one image"),
    (False, "--video VIDEO --method motiondirector --images FOLDER/p.png", "cannot be trained on"),
    (False, "--images FOLDER/p.png --method motiondirector --prompt a b", "2 captions for images"),
    # settings: unknown names, types, ranges
    (False, "--video VIDEO appearance.rank=4", "appearance.rank"),
    (False, "--video VIDEO loss=--", "'--' is not a value"),
    (False, "--video VIDEO --size=--", "'--' is not a value"),
    (False, "--video VIDEO motion.lrr=4", "did you mean motion.lr?"),
    (False, "--video VIDEO lr=4", "lr=4"),
    (False, "--video VIDEO clip_grad=2", "renamed to max_grad_norm"),
    (False, "--video VIDEO look.lr=1", "renamed to appearance.lr"),
    (False, "--video VIDEO motion.rates=attn1:2", "renamed to motion.lr_multipliers"),
    (False, "--video VIDEO --keep-every 5", "renamed to --save-every"),
    (False, "--video VIDEO --method newmove prior-weight=1", "prior-weight=1"),
    (False, "--video VIDEO frame_stride=1.5", "frame_stride.*1.5"),
    (False, "--video VIDEO motion.lr=fast", "motion.lr.*fast"),
    (False, "--video VIDEO motion.lr=nan", "motion.lr.*nan"),
    (False, "--video VIDEO --method motiondirector beta=nan", "beta.*nan"),
    (False, "--video VIDEO --method motiondirector spatial_prob=2", "spatial_prob.*0 to 1"),
    (True, "--video VIDEO motion.lr_multipliers=attn1:nan", "attn1:nan"),
    (False, "--video VIDEO motion.lr=1e38", "motion.lr.*1e38"),
    (False, "--video VIDEO max_grad_norm=-1", "max_grad_norm.*-1"),
    (False, "--video VIDEO noise_prior=1.5", "noise_prior.*0 to 1"),
    (False, "--video VIDEO loss=magic", "loss.*mse or residual-cosine"),
    (False, "--video VIDEO sampler=magic", "sampler.*ddim or"),
    (False, "--video VIDEO --method motiondirector appearance.per_video=maybe", "on or off"),
    (False, "--video VIDEO --method newmove alpha=2", "alpha.*0 to 1"),
    (True, "--video VIDEO frame_stride=4", "frame_stride=4: expected less than 4"),
    (True, "--video VIDEO motion.layers=nothing", "matches no parameter"),
    (True, "--video VIDEO motion.layers=(", "not a regular expression"),
    (True, "--video VIDEO motion.layers=none", "no trainable parameters"),
    (True, "--video VIDEO motion.rank=2 motion.layers=.*norm.*", "no linear layer"),
    (True, "--video VIDEO motion.lr_multipliers=nowhere:2", "no trainable layer matches nowhere"),
    (True, "--video VIDEO motion.load_from=FOLDER/text.mp4", "text.mp4"),
    (True, "--video VIDEO --method textual-inversion word.token=", "must not be empty"),
    (True, "--video VIDEO inversion_steps=5000", "inversion_steps 5000: expected 1 to 699"),
    # settings without effect
    (False, "--video VIDEO motion.scale=0.5", "motion.scale has no effect"),
    (False, "--video VIDEO motion.dropout=0.5", "motion.dropout has no effect"),
    (False, "--video VIDEO --method newmove word.lr=1", "word.lr has no effect"),
    (False, "--video VIDEO --method newmove subject.layers=spatial", "requires --images"),
    (False, "--video VIDEO --method newmove appearance_stop=0.2", "--preview-prompt"),
    # a loss for ε alone
    (True, "--video VIDEO loss=residual-l2-weighted", "derived for ε"),
    (True, "--video VIDEO --method coupled loss=residual-l2-weighted", "derived for ε"),
])
def test_a_user_error_is_one_line_and_leaves_nothing(loads, argv, message, folder, hop, tmp_path,
                                                     capsys, monkeypatch):
    """Errors in the flags alone are found before the model is loaded."""
    if not loads:
        monkeypatch.setattr(model, "load", lambda *args, **more: pytest.fail("loaded"))
    (tmp_path / "text.mp4").write_text("not a video")
    shutil.copy(folder / "thing.png", tmp_path / "p.png")
    argv = argv.replace("FOLDER", str(tmp_path)).replace("VIDEO", str(hop)).split()
    expect_error([*argv, "--frames", 4, "--out", tmp_path / "out"], message, capsys)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    if not loads:
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("space", ["output", "epsilon", "x0"])
def test_the_weighted_loss_requires_epsilon(prediction, space):
    recipe = METHODS["vmc"].override(f"loss=residual-l2-weighted loss_space={space}")
    check = partial(train.check_schedule, recipe, sampler.NoiseSchedule(prediction_type=prediction))
    if space == "epsilon" or (space, prediction) == ("output", "epsilon"):
        check(20)
    else:
        with pytest.raises(BadInput, match="derived for ε"):
            check(20)


def test_real_weights_use_the_methods_shape_and_frame_rate(hop, folder, tmp_path):
    """A clip's rate is divided by a whole number. Several clips share the lowest rate. A folder of
    images has none, and a long frame in a GIF does not count."""
    fast, held, images = tmp_path / "fast.mp4", tmp_path / "held.gif", tmp_path / "images"
    media.write_video(fast, torch.zeros(3, 30, 64, 64), 30)
    shots = [Image.new("RGB", (64, 64), (9 * i, 0, 0)) for i in range(10)]
    shots[0].save(held, save_all=True, append_images=shots[1:],
                  duration=[40] * 4 + [3000] + [40] * 5)
    images.mkdir()
    for i in range(4):
        shutil.copy(folder / "thing.png", images / f"{i}.png")
    big, small = (16, (384, 384)), (8, (320, 576))
    for method, clips, shape, fps in (
            ("vmc", [fast], small, 30 / 4), ("newmove", [fast], big, 30),
            ("newmove", [hop], big, 8), ("newmove", [fast, hop], big, 8),
            ("newmove", [images], big, 24), ("newmove", [held], big, 25)):
        argv = ["--method", method, "--weights", str(TINY), "--video", *map(str, clips)]
        flags, _ = train.parse(argv)
        assert ((flags.frames, flags.size), flags.fps) == (shape, pytest.approx(fps))
    assert train.parse([*argv[:4], "--video", str(fast), "--fps", "10"])[0].fps == 10


@pytest.mark.parametrize("argv,warns", [
    ("--method customize-a-video --steps 100", True), ("--method customize-a-video", False),
    ("--method customize-a-video appearance.layers=none --steps 100", False),
    ("--method newmove --images IMAGE --image-prompt X* --steps 100", True),
    ("--method newmove --images IMAGE --image-prompt X* --steps 101", False),
    ("--method newmove --steps 100", False)])
def test_a_second_stage_that_never_starts_is_warned_about(argv, warns, hop, folder, capsys):
    argv = argv.replace("IMAGE", str(folder / "thing.png")).split()
    train.parse(["--video", str(hop), *argv])
    assert ("never starts" in capsys.readouterr().err) == warns


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_help_lists_its_settings_with_defaults_and_meanings(method, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", method, "--help"])
    printed, settings = capsys.readouterr().out, METHODS[method].settings()
    assert not stop.value.code and METHODS[method].source in printed
    for name, value in settings.items():
        row, = re.findall(rf"^ +--{re.escape(name)} [^-]*$", printed, re.MULTILINE) or [""]
        assert f"--{name}" in printed, name
        assert write_value(value) in printed, (name, row)
    # The defaults that apply to the tiny model are on the page too.
    clip = str(ROOT / "assets" / "eight.mp4")
    _, recipe = train.parse(["--method", method, "--video", clip, "--prompt", "moving"])
    last = re.findall(r"^(?:with one clip|with the tiny model.*?): (.*)$", printed, re.MULTILINE)
    assert METHODS[method].override(*last).settings() == recipe.settings()


def test_every_flag_has_help_and_is_used(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = capsys.readouterr().out
    code = "".join(p.read_text() for p in (*ROOT.glob("*.py"), *ROOT.glob("support/*.py")))
    parser = train.Parser(add_help=False)
    train.add_data_flags(parser.add_argument)
    train.add_training_flags(parser.add_argument)
    for action in parser._actions:
        assert action.option_strings[-1] in printed and len(action.help) > 3
        assert f"flags.{action.dest}" in code, action.dest
    assert "name=value" in printed
