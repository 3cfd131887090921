"""train.py as a person runs it, on the tiny model, a few steps: what a run leaves, that it repeats
to the bit, faults and signals, whose files it may touch, and the mistakes that it answers."""
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import av
import pytest
import torch
from conftest import ROOT, TINY, complain, end_of, flags_of, fork, learn, prepared
from PIL import Image
from safetensors.torch import load_file

import generate
import lora
import losses
import model
import train
from sampler import Schedule
from support import adapter_file, machine, media, runs, videos
from support import flags as parsing
from support.files import BadInput
from support.recipe import METHODS, write_value
from tiny import world


def vmc(hop, out, *more):
    return flags_of("vmc", hop, out, *more)


def same_weights(a, b, name="vmc.safetensors"):
    one, two = load_file(a / name), load_file(b / name)
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses_of(out):
    return [line["loss"] for line in log_of(out)]


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def trained(hop, tmp_path_factory):
    """A run of six steps, as a command, with samples at 0, 3 and 6; and what it printed."""
    out = tmp_path_factory.mktemp("run") / "out"
    command = [sys.executable, ROOT / "train.py", "--video", hop, "--out", out, "--steps", 6,
               "--preview-every", 3, "--preview-steps", 4]
    # No network, no home, another folder: nothing but the files of the repository.
    (out.parent / "sitecustomize.py").write_text(
        "import socket\n\n\ndef connect(self, address):\n    raise SystemExit('network')\n\n\n"
        "socket.socket.connect = connect\n")
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=out.parent,
                          env={"PATH": os.environ["PATH"], "HOME": "/nowhere",
                               "PYTHONPATH": str(out.parent)})
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="session")
def five(hop, tmp_path_factory):
    """An unbroken run of five steps without samples."""
    out = tmp_path_factory.mktemp("run") / "five"
    learn("vmc", hop, out, "--steps", 5)
    return out


@pytest.fixture
def one(hop, tmp_path):
    """A run of a single step."""
    learn("vmc", hop, tmp_path / "one", "--steps", 1)
    return tmp_path / "one"


# ------------------------------------------------------------------------------------------------
# What trains, and what a run leaves


def test_all_chosen_layers_change(trained):
    base = load_file(TINY / "unet" / "diffusion_pytorch_model.safetensors")
    changed = adapter_file.read_adapter(trained[0] / "vmc.safetensors").tensors
    assert set(changed) == set(lora.select(model.load_unet(TINY), "temporal-attention-qkv"))
    assert all(not torch.equal(t, base[n].float()) for n, t in changed.items())


def test_a_run_leaves_what_it_promises(trained, hop):
    out, printed = trained
    story = json.loads((out / "run.json").read_text())
    assert story["method"] == "vmc" and story["settings"]["steps"] == 6
    assert story["flags"]["seed"] == 0 and story["flags"]["size"] == [64, 64]
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(6))
    assert all({"loss", "grad", "losses", "seen", "seconds"} <= line.keys() for line in log)
    assert all({"mse", "t", "clip", "scale", "offset"} <= line["seen"][0].keys() for line in log)
    names = sorted(p.name for p in (out / "samples").iterdir())
    assert names == [f"step-{s:06d}.mp4" for s in (0, 3, 6)]
    adapter = adapter_file.read_adapter(out / "vmc.safetensors")
    assert {"method": "vmc", "prompt": "thing 0 hopping", "step": "6", "seed": "0",
            "base": adapter_file.fingerprint(model.load_unet(TINY))}.items() <= adapter.meta.items()
    assert adapter.latents.shape == (8, 16, 8, 8)
    for words in (str(hop.with_suffix(".txt")), "parameters in", "temp_attentions attn1:",
                  "VMC, Eq. 17 and App. D", train.TINY["vmc"], "generate.py --adapter"):
        assert words in printed
    listed = set(runs.listed(out))
    assert listed == {p.relative_to(out).as_posix() for p in contents(out)} - {"lock", runs.LIST}


def test_the_first_sample_shows_the_untrained_model(trained):
    """Step 0: before and now are the same video; at the end they are not."""
    for step, same in ((0, True), (6, False)):
        with av.open(str(trained[0] / "samples" / f"step-{step:06d}.mp4")) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        side = frames[0].shape[0]
        assert len(frames) == 16 and frames[0].shape[1] == 3 * side
        _, before, now = torch.tensor(frames[8]).float().split(side, dim=1)
        assert ((before - now).abs().mean() < 2) == same


def test_bars_show_what_a_sample_takes_in_the_first_process_alone(hop, bars, tmp_path):
    run = prepared("vmc", hop, tmp_path / "out", "inversion_steps=3", "sampling_steps=2")
    run.process, run.inverted = 1, None
    train.preview(run)
    assert not bars
    run.process, run.inverted = 0, None
    train.preview(run)
    assert bars == {"inverting for a sample": 3, "a sample": 2}


def test_what_the_tiny_model_knows_nothing_of_is_told(hop, tmp_path, capsys):
    """Words of the captions and of the preview prompt, a line each, and a clip without colours."""
    grey = media.read_video(hop, 16, (64, 64), 8).mean(0, keepdim=True).expand(3, -1, -1, -1)
    media.write_video(tmp_path / "grey.mp4", grey, 8)
    texts = "--prompt", "a frog hopping sks", "--preview-prompt", "a red frog hopping on the moon"
    prepared("textual-inversion", tmp_path / "grey.mp4", tmp_path / "a", *texts)  # sks is learned
    words, preview, colour = capsys.readouterr().err.splitlines()
    assert "never met frog, hopping of the captions" in words
    assert "never met moon; it knows" in preview
    assert "grey.mp4 has no colour" in colour
    prepared("textual-inversion", hop, tmp_path / "b", "--prompt", "a thing moving left sks")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("load,threads,told", [(1e3, 4, True), (1e3, 1, False), (0, 4, False),
                                               (None, 4, False)])
def test_a_busy_machine_is_told(load, threads, told, hop, tmp_path, monkeypatch, capsys):
    if load is None:  # Windows
        monkeypatch.delattr(os, "getloadavg")
    else:
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for main in (train.main, generate.main):
        capsys.readouterr()
        wrong = ["--device", "toaster", "--out", str(tmp_path / "out")]  # found after it
        clip = ["--video", str(hop)] if main == train.main else ["--prompt", "x"]
        with pytest.raises(BadInput, match="toaster"):
            main([*clip, *wrong])
        assert ("OMP_NUM_THREADS=1" in capsys.readouterr().err) == told


# ------------------------------------------------------------------------------------------------
# Exactness


def test_run_json_alone_repeats_the_run(hop, tmp_path):
    learn("vmc", hop, tmp_path / "a", "--steps", 2, "--seed", 5, "motion.lr=3e-4", "stride=2")
    story, again = json.loads((tmp_path / "a" / "run.json").read_text()), []
    for name, value in story["flags"].items():
        if value in (None, False, []) or name in ("out", "own_lines"):
            continue
        value = "x".join(map(str, value[::-1])) if name == "size" else value
        values = value if isinstance(value, list) else [] if value is True else [value]
        again += [f"--{name.replace('_', '-')}", *map(str, values)]
    again += [f"{name}={write_value(value)}" for name, value in story["settings"].items()]
    train.main([*again, "--out", str(tmp_path / "b")])
    assert same_weights(tmp_path / "a", tmp_path / "b")
    learn("vmc", hop, tmp_path / "c", "--steps", 2, "--seed", 6, "motion.lr=3e-4", "stride=2")
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b") != losses_of(tmp_path / "c")


def test_samples_and_saves_on_the_way_change_nothing(five, hop, tmp_path):
    learn("vmc", hop, tmp_path, "--steps", 5, "--preview-every", 2, "--keep-every", 2)
    assert same_weights(five, tmp_path) and losses_of(five) == losses_of(tmp_path)
    kept = sorted(p.parent.name for p in (tmp_path / "steps").rglob("vmc.safetensors"))
    assert kept == ["000002", "000004"]


@pytest.mark.parametrize("method", ("motiondirector", "newmove"))
def test_two_processes_learn_what_one_does_from_as_many_examples(method, folder, tmp_path):
    """Two clips, so that MotionDirector's processes now and then train different appearances."""
    same = ("--prompt", "a thing hopping", "--steps", 3, "--seed", 1, "--precision", "fp32",
            *(["--prior", folder / "videos"] if method == "newmove" else []))
    args = lambda out, *more: flags_of(method, folder / "videos", tmp_path / out, *same, *more)
    train.main(args("one", "--batch", 2))
    train.main(args("alone"))  # one example a step is another thing
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free.getsockname()[1])}
    both = [fork(lambda: train.main(args("two")), tmp_path / f"says-{i}", RANK=str(i), **meet)
            for i in range(2)]
    assert [end_of(pid) for pid in both] == [0, 0], (tmp_path / "says-0").read_text()
    files = sorted(p.name for p in (tmp_path / "one").glob("*.safetensors"))
    assert files == sorted(p.name for p in (tmp_path / "two").glob("*.safetensors"))

    def apart(a, b):
        """How far what two runs learned is apart, all files together."""
        norms = []
        for name in files:
            x, y = load_file(tmp_path / a / name), load_file(tmp_path / b / name)
            norms += [(x[k] - y[k]).norm() for k in x if k != "latents"]
        return torch.stack(norms).norm().item()

    # Sums may be rounded in another order, and Adam makes that seen where a gradient is nearly 0.
    assert apart("one", "two") <= 1e-2 * apart("one", "alone")
    with pytest.raises(BadInput, match="examples a step was 2, is 1"):
        train.main(args("two", "--resume", "--steps", 4))


def test_examples_must_divide_among_processes(hop, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "place", lambda device: (0, 2))
    with pytest.raises(BadInput, match="wanted a multiple of the 2 processes"):
        train.main(vmc(hop, tmp_path / "out", "--batch", 3))


# ------------------------------------------------------------------------------------------------
# Signals, kills and faults


def wait_for_steps(out, count, pid):
    for _ in range(1200):
        time.sleep(0.05)
        log = out / "log.jsonl"
        if log.is_file() and len(log.read_text().splitlines()) >= count:
            return
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    raise AssertionError("the run did not start")


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_go_on_and_resumes_exactly(number, code, hop, tmp_path):
    out = tmp_path / "s"
    pid = fork(lambda: train.main(vmc(hop, out, "--steps", 400)), tmp_path / "says")
    wait_for_steps(out, 2, pid)
    os.kill(pid, number)
    assert end_of(pid) == code and "--resume" in (tmp_path / "says").read_text()
    done = len(losses_of(out))
    learn("vmc", hop, out, "--steps", done + 2, "--resume")
    learn("vmc", hop, tmp_path / "whole", "--steps", done + 2)
    assert losses_of(out) == losses_of(tmp_path / "whole")
    assert same_weights(out, tmp_path / "whole")


def test_a_numbered_run_that_is_stopped_says_how_to_go_on_there(hop, tmp_path, capsys,
                                                                 monkeypatch):
    """What it says leads to the folder that it went to, not to the finished run's; and a shell
    reads the paths of what is said."""
    one = tmp_path / "my run"
    learn("vmc", hop, one, "--steps", 1)
    command = shlex.split(re.search("next: (.*)", capsys.readouterr().out)[1])
    assert command[command.index("--adapter") + 1] == str(one / "vmc.safetensors")
    before, step = contents(one), runs.log_line
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(runs, "log_line", lambda *args: (
            os.kill(os.getpid(), signal.SIGINT), step(*args))[1])
        learn("vmc", hop, one, "--steps", 3)
    more = re.search("add (.*) to the same command", capsys.readouterr().err)[1]
    learn("vmc", hop, one, "--steps", 3, *shlex.split(more))
    assert len(losses_of(tmp_path / "my run-2")) == 3 and contents(one) == before


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_first_step_ends_in_one_line(number, code, hop, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "report", lambda run: os.kill(os.getpid(), number))
    pid = fork(lambda: train.main(vmc(hop, tmp_path / "s")), tmp_path / "says")
    assert end_of(pid) == code and (tmp_path / "says").read_text() == "stopped\n"


@pytest.mark.parametrize("target", ("os.fsync", "os.replace", "shutil.disk_usage", "limit",
                                    "state"))
def test_a_fault_while_saving_keeps_the_last_state(target, one, hop, monkeypatch, capfd):
    """A full disk, told at any point; a limit on the size of files, at the adapter and at the
    state, of which torch's writer tells in several lines."""
    before, fails = (one / "state.pt").read_bytes(), (runs.Folder, "save")
    if target == "state":
        monkeypatch.setattr(adapter_file, "save_adapter", lambda *args, **more: [args[0]])
        fails = (torch, "save")
    real = getattr(*fails)

    def fault(*args):
        if target in ("limit", "state"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        elif target == "shutil.disk_usage":
            monkeypatch.setattr(target, lambda path: SimpleNamespace(free=1000))
        else:
            monkeypatch.setattr(target, lambda *_: fail(OSError(28, "No space left on device")))
        real(*args)

    monkeypatch.setattr(*fails, fault)
    try:
        complain(vmc(hop, one, "--steps", 2, "--resume"), "[Ff]ree some", capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert (one / "state.pt").read_bytes() == before and not list(one.rglob(".part-*"))


def fail(error, *_):
    raise error


@pytest.mark.parametrize("error,says", [
    (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you"), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory"), "--checkpointing on"),
    (MemoryError(), "out of memory"), (BadInput("two\nlines"), "two lines"),
])
def test_what_is_not_our_fault_is_one_line(error, says, capsys):
    complain([], says, capsys, main=partial(fail, error))
    with pytest.raises(RuntimeError, match="a bug"):
        machine.run(partial(fail, RuntimeError("a bug")))


def test_a_reader_that_leaves_does_not_end_the_training(hop, tmp_path):
    """As in `train.py … 2>&1 | head -1`: both streams break at the first line."""
    def broken():
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = os.fdopen(writer, "w", buffering=1)
        sys.stderr = os.fdopen(os.dup(writer), "w", buffering=1)
        machine.run(lambda: train.main(vmc(hop, tmp_path / "b", "--steps", 1)))

    assert end_of(fork(broken)) == 0
    assert (tmp_path / "b" / "vmc.safetensors").is_file()


@pytest.mark.parametrize("replaced", (False, True))
def test_a_folder_that_is_deleted_while_running_ends_in_one_line(replaced, hop, tmp_path, capsys,
                                                                 monkeypatch):
    out, step = tmp_path / "out", runs.log_line

    def vanish(*args):
        shutil.rmtree(out)
        if replaced:  # by another run
            out.mkdir()
            (out / "lock").touch()
        return step(*args)

    monkeypatch.setattr(runs, "log_line", vanish)
    complain(vmc(hop, out, "--steps", 2), "deleted, moved or replaced", capsys)
    assert not contents(tmp_path) or [p.name for p in contents(tmp_path)] == ["lock"]


def test_a_loss_that_is_not_a_number_stops_the_run(hop, tmp_path, monkeypatch, capsys):
    """Before the optimiser steps; the message names step, timestep and clip."""
    monkeypatch.setitem(losses.LOSSES, "mse", lambda pred, eps, **_: pred.mean() * float("nan"))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: pytest.fail("stepped"))
    complain(vmc(hop, tmp_path / "n", "--steps", 3, "loss=mse"),
             r"nan.*step 0, timestep \d+, clip .*0.mp4.*no saved state", capsys)
    assert not (tmp_path / "n" / "vmc.safetensors").exists()


def test_infinity_that_comes_with_the_last_step_is_not_saved(hop, tmp_path, monkeypatch, capsys):
    complain(vmc(hop, tmp_path / "a", "--steps", 1, "motion.lr=1e38"), "wanted 0 to", capsys)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: self.param_groups[0]["params"][
        0].data.fill_(float("inf")))
    complain(vmc(hop, tmp_path / "b", "--steps", 1),
             "is not finite at step 1; there is no saved state", capsys)
    assert not list(tmp_path.rglob("*.safetensors"))


# ------------------------------------------------------------------------------------------------
# Whose folder it is


def test_a_run_is_never_replaced_unasked_and_deletes_its_own_alone(one, hop, capsys):
    before = contents(one)
    (one / "mine.txt").write_text("of a person")
    (one / "mine.safetensors").write_text("of a person, too")
    learn("vmc", hop, one, "--steps", 1)
    assert contents(one).items() >= before.items() and "goes to" in capsys.readouterr().err
    assert (one.parent / "one-2" / "vmc.safetensors").is_file()
    (one / "samples").mkdir()
    (one / "samples" / "step-000000.mp4").write_text("of a person")
    with (one / runs.LIST).open("a") as file:
        file.write("../one-2/run.json\n/etc/hostname\n\nlock\ngone.mp4\nbad\0name\n")
    learn("textual-inversion", hop, one, "--steps", 1, "--overwrite")
    assert {p.name for p in contents(one)} == {
        "mine.txt", "mine.safetensors", "step-000000.mp4", "lock", runs.LIST, "run.json",
        "log.jsonl", "state.pt", "textual-inversion.safetensors",
        "textual-inversion.clip.safetensors"}
    assert (one.parent / "one-2" / "run.json").is_file()


@pytest.mark.parametrize("out", ("w/unet", ".", "", "w", "lists"))
@pytest.mark.parametrize("overwrite", ((), ("--overwrite",)))
def test_other_peoples_folders_are_refused_and_untouched(out, overwrite, hop, tmp_path, capsys,
                                                         monkeypatch):
    shutil.copytree(TINY, tmp_path / "w")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "files.txt").write_text("video.mp4\nrun.json\n")  # of a data set
    for name in ("video.mp4", "run.json"):
        (tmp_path / "lists" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    complain(vmc(hop, out, "--steps", 1, "--weights", "w", *overwrite), "holds other files", capsys)
    assert contents(tmp_path) == before


def test_two_runs_never_share_a_folder(one, hop, capsys):
    with machine.lock(one / "lock"):
        before = contents(one)
        for more in ("--resume", "--overwrite"):
            complain(vmc(hop, one, "--steps", 2, more), "in use by another run", capsys)
        assert contents(one) == before


# ------------------------------------------------------------------------------------------------
# Resuming what is damaged


def change(path, act):
    state = torch.load(path, weights_only=True)
    act(state, next(iter(state["moments"].values())))
    torch.save(state, path)


SMALL = torch.zeros(3)
RUINED = {
    "another shape": lambda s, m: m.update(exp_avg=SMALL),
    "one number expanded": lambda s, m: m.update(exp_avg=SMALL[:1].expand(m["exp_avg"].shape)),
    "whole numbers": lambda s, m: m.update(exp_avg=m["exp_avg"].long()),
    "sparse": lambda s, m: m.update(exp_avg=m["exp_avg"].to_sparse()),
    "NaN": lambda s, m: m["exp_avg"].fill_(float("nan")),
    "below zero": lambda s, m: m["exp_avg_sq"].fill_(-1),
    "steps to come": lambda s, m: m["step"].fill_(99),
    "no moment of one kind": lambda s, m: m.pop("exp_avg_sq"),
    "no moments of one": lambda s, m: s["moments"].popitem(),
    "moments that are none": lambda s, m: s["moments"].update(dict.fromkeys(s["moments"], 3)),
    "an empty one": lambda s, m: s["moments"].update(dict.fromkeys(s["moments"], {})),
    "no tensor": lambda s, m: s["trained"].popitem(),
    "one too many": lambda s, m: s["trained"].update(x=SMALL),
    "a tensor of NaN": lambda s, m: next(iter(s["trained"].values())).fill_(float("nan")),
    "a number for a tensor": lambda s, m: s["trained"].update(dict.fromkeys(s["trained"], 1.0)),
    "no step": lambda s, m: s.pop("step"),
    "a step below zero": lambda s, m: s.update(step=-5),
    "more steps than asked for": lambda s, m: s.update(step=5),
    "a step that is none": lambda s, m: s.update(step="one"),
    "tensors for flags": lambda s, m: s["flags"].update(seed=SMALL),
}


@pytest.mark.parametrize("ruin", [*RUINED, "half", "text", "a flipped bit", "removed"])
def test_a_state_that_cannot_be_trusted_is_refused(ruin, one, hop, capsys):
    path = one / "state.pt"
    raw = bytearray(path.read_bytes())
    if ruin in RUINED:
        change(path, RUINED[ruin])
    elif ruin == "half":
        path.write_bytes(raw[: len(raw) // 2])
    elif ruin == "text":
        path.write_bytes(b"half")
    elif ruin == "a flipped bit":  # in the middle of the numbers, where torch.load sees nothing
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)
    elif ruin == "removed":
        path.unlink()
    before = contents(one)
    complain(vmc(hop, one, "--steps", 2, "--resume"), "cannot be read|does not fit|nothing to "
             "resume|already at step 5|was begun with other", capsys)
    assert contents(one) == before


@pytest.mark.parametrize("ruin,lines", [
    (lambda raw: b"", [2]), (lambda raw: None, [2]), (lambda raw: b"\xff\x00\n" * 9, [2]),
    (lambda raw: raw.splitlines(True)[1], [1, 2]), (lambda raw: raw[:-20], [0, 2]),
    (lambda raw: raw + b'{"step": 2, "loss": 9}\n{"step', [0, 1, 2]),
    (lambda raw: raw + raw, [0, 1, 2]), (lambda raw: b"[[[[" * 9999 + b"\n" + raw, [0, 1, 2]),
])
def test_a_damaged_log_is_mended_and_told(ruin, lines, hop, tmp_path, capsys):
    learn("vmc", hop, tmp_path, "--steps", 2)
    log = tmp_path / "log.jsonl"
    raw = ruin(log.read_bytes())
    log.unlink() if raw is None else log.write_bytes(raw)
    learn("vmc", hop, tmp_path, "--steps", 3, "--resume")
    assert [line["step"] for line in log_of(tmp_path)] == lines
    assert ("has a gap" in capsys.readouterr().err) == (len(lines) < 3)


def test_resuming_with_other_settings_or_another_clip_is_refused(one, hop, tmp_path, capsys):
    complain(vmc(hop, one, "--steps", 2, "--resume", "motion.lr=0.5"),
             "motion.lr was 0.001, is 0.5", capsys)
    mine = tmp_path / "c.mp4"
    mine.write_bytes(hop.read_bytes())
    again = vmc(mine, tmp_path / "o", "--prompt", "x")
    train.main([*again, "--steps", "1"])
    scenes = world.sample_scenes(1, torch.Generator().manual_seed(4), ("zigzagging",))
    media.write_video(mine, world.render(scenes)[0], world.FPS)
    complain([*again, "--steps", "2", "--resume"], "clip was", capsys)


# ------------------------------------------------------------------------------------------------
# Mistakes, and help

VIDEO = "VIDEO"  # stands for the clip below, as FOLDER does for a folder with a text and a picture


@pytest.mark.parametrize("argv,says", [
    ("", "--video"),
    ("--video VIDEO --method magic", "Choose from"),
    ("--video VIDEO --weights FOLDER", "is missing"),
    ("--video VIDEO --weights FOLDER/no", "is not a folder"),
    ("--video VIDEO --prompt " + "x1" * 150, "Shorten it"),
    ("--video FOLDER/text.mp4", "not a video"),
    ("--video VIDEO --resume", "nothing to resume"),
    ("--video VIDEO --steps 0", "1 to"),
    ("--video VIDEO --size 64x60", "multiples of 8"),
    ("--video VIDEO --wrong", "there is no --wrong"),
    ("--video VIDEO --start -2", "wanted"),
    ("--video VIDEO --batch -2", "wanted"),
    ("--video VIDEO --device toaster", "cannot be used"),
    ("--video VIDEO --preview-steps 2000", "1 to 1000"),
    ("--video VIDEO --prior none --prior FOLDER", "takes no prior"),
    ("--video VIDEO --image-prompt x", "no --images"),
    ("--video VIDEO --images FOLDER/p.png", "vmc learns nothing from pictures"),
    ("--images FOLDER/p.png", "from pictures alone"),
    ("--video VIDEO --method motiondirector --images FOLDER/p.png", "nothing from pictures"),
    ("--method customize-a-video --images FOLDER/p.png", "from pictures alone"),
    # settings: what a recipe lacks, another kind, out of range
    ("--video VIDEO look.rank=4", "look.rank: vmc has no such setting; it has steps, .*stride"),
    ("--video VIDEO motion.lrr=4", "Did you mean motion.lr?"),
    ("--video VIDEO lr=4", "Did you mean motion.lr?"),
    ("--video VIDEO --method motiondirector lr=4", "Did you mean look.lr or motion.lr?"),
    ("--video VIDEO --method newmove prior-weight=1", "Did you mean prior_weight?"),
    ("--video VIDEO stride=1.5", "wanted a whole number"),
    ("--video VIDEO motion.lr=fast", "wanted a number"),
    ("--video VIDEO motion.lr=nan", "wanted 0 to"),
    ("--video VIDEO clip_grad=-1", "wanted"),
    ("--video VIDEO noise_prior=1.5", "wanted 0 to 1"),
    ("--video VIDEO loss=magic", "wanted mse or residual-cosine"),
    ("--video VIDEO sampler=magic", "wanted ddim or"),
    ("--video VIDEO stride=4", "wanted less than the clip's 4 frames"),
    ("--video VIDEO --method motiondirector look.per_clip=maybe", "wanted on or off"),
    ("--video VIDEO --method newmove alpha=2", "wanted 0 to 1"),
    ("--video VIDEO motion.layers=nothing", "known sets"),
    ("--video VIDEO motion.layers=(", "no pattern"),
    ("--video VIDEO motion.layers=(.*)*x", "repeats too much"),
    ("--video VIDEO motion.layers=(.|.)*x", "repeats too much"),
    ("--video VIDEO motion.rates=.?.?.?.?.?x:2", "repeats too much"),
    ("--video VIDEO motion.layers=none", "nothing learns"),
    ("--video VIDEO motion.rank=2 motion.layers=.*norm.*", "no linear layer"),
    ("--video VIDEO motion.rates=nowhere:2", "no layer that learns has nowhere"),
    ("--video VIDEO motion.file=FOLDER/text.mp4", "cannot be read|not a file"),
    ("--video VIDEO --method textual-inversion word.text=", "needs a text"),
    # what would do nothing
    ("--video VIDEO motion.scale=0.5", "does nothing here: it is of a LoRA"),
    ("--video VIDEO motion.dropout=0.5", "does nothing here"),
    ("--video VIDEO noise_prior=0 inverts=base", "does nothing here: noise_prior is 0"),
    ("--video VIDEO --method newmove clip=ViT-L-14", "does nothing here: appearance_stop"),
    ("--video VIDEO --method newmove word.lr=1", "does nothing here: none of its vectors"),
    ("--video VIDEO --method newmove subject.layers=spatial", "learned from --images"),
    ("--video VIDEO --method customize-a-video look_word.init=x", "does nothing here"),
    ("--video VIDEO --method newmove look_prompt=star", "does nothing here: appearance_stop"),
    ("--video VIDEO --method newmove appearance_stop=0.2 --preview-every 0", "previews look at it"),
    ("--video VIDEO --method newmove appearance_stop=0.2", "give --preview-prompt"),
    ("--video VIDEO --method newmove appearance_stop=0.2 --preview-prompt x --weights FOLDER",
     "give clip="),
    ("--video VIDEO --method newmove appearance_stop=0.2 --preview-prompt x clip=ViT-L-14",
     "clip_weights=FILE"),
    ("--video VIDEO --method newmove first=7", "first does nothing here"),
    ("--video VIDEO --method newmove --prior none prior_weight=1", "there are no prior clips"),
    ("--video VIDEO --method newmove --prior folder prior_weight=1", "there are no prior clips"),
    ("--video VIDEO --method dreambooth --prior world prior_prompt=x", "is not made with it"),
    ("--images FOLDER/p.png --method motiondirector --prompt one two", "one caption for all"),
    ("--video VIDEO inversion_steps=5000", "inversion_steps 5000: wanted 1 to 699"),
    # a weight of ε on what is not ε
    ("--video VIDEO loss=residual-l2-weighted", "its weight is of ε"),
    ("--video VIDEO loss=residual-l2-weighted align=x0", "its weight is of ε"),
    ("--video VIDEO --method coupled loss=residual-l2-weighted", "its weight is of ε"),
])
def test_mistakes_end_in_one_line_and_two_and_leave_nothing(argv, says, folder, hop, tmp_path,
                                                            capsys):
    (tmp_path / "text.mp4").write_text("this is no video")
    shutil.copy(folder / "thing.png", tmp_path / "p.png")
    argv = argv.replace("FOLDER", str(tmp_path)).replace("VIDEO", str(hop)).split()
    complain([*argv, "--frames", 4, "--out", tmp_path / "out"], says, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("align", ["output", "epsilon", "x0"])
def test_the_weighted_loss_is_of_what_is_compared(prediction, align):
    """The network's own output is ε on ZeroScope and v on the tiny model; x₀ is neither."""
    recipe = METHODS["vmc"].but("loss=residual-l2-weighted", f"align={align}")
    schedule = Schedule(prediction_type=prediction)
    if align == "epsilon" or (align, prediction) == ("output", "epsilon"):
        train.check_recipe(recipe, schedule, 20)
    else:
        with pytest.raises(BadInput, match="its weight is of ε"):
            train.check_recipe(recipe, schedule, 20)


def test_an_adapter_says_how_its_method_samples(hop, tmp_path):
    learn("vmc", hop, tmp_path, "--steps", 1)
    adapter = adapter_file.read_adapter(tmp_path / "vmc.safetensors")
    assert videos.read_story(adapter) == {
        "sampler": "ddpm", "sampling_steps": 20, "inversion_steps": 20, "noise_prior": 1,
        "inverts": "tuned", "guidance": 4, "fps": 8, "step": 1}


def test_other_weights_bring_the_methods_own_shape(hop, folder, tmp_path):
    """Height before width, as everywhere; its frame rate too, unless a clip has less. A
    picture that is held says nothing of the rate."""
    fast, held, pictures = tmp_path / "fast.mp4", tmp_path / "held.gif", tmp_path / "pictures"
    media.write_video(fast, torch.zeros(3, 30, 64, 64), 30)
    shots = [Image.new("RGB", (64, 64), (9 * i, 0, 0)) for i in range(10)]
    shots[0].save(held, save_all=True, append_images=shots[1:],
                  duration=[40] * 4 + [3000] + [40] * 5)
    pictures.mkdir()
    for i in range(4):
        shutil.copy(folder / "thing.png", pictures / f"{i}.png")
    big, small = (16, (384, 384)), (8, (320, 576))
    for method, clips, shape, fps in (
            ("vmc", [fast], small, 8), ("newmove", [fast], big, 24), ("newmove", [hop], big, 8),
            ("newmove", [fast, hop], big, 8), ("newmove", [pictures], big, 24),
            ("newmove", [held], big, 24)):
        argv = ["--method", method, "--weights", str(TINY), "--video", *map(str, clips)]
        flags, _ = train.parse(argv)
        assert ((flags.frames, flags.size), flags.fps) == (shape, fps)
        assert train.parse([*argv, "--fps", "12"])[0].fps == 12


def test_a_subject_joins_when_the_motion_has_had_its_steps(hop, folder):
    """NewMove's motion has 1,000 steps from one clip and 3,000 from several, and the subject as
    many."""
    subject = ["--images", str(folder / "thing.png"), "--image-prompt", "X*"]
    for clips, steps in (([hop], 1000), ([hop, folder / "videos"], 3000)):
        argv = ["--method", "newmove", "--weights", str(TINY), "--video", *map(str, clips)]
        assert train.parse(argv)[1].steps == steps
        recipe = train.parse([*argv, *subject])[1]
        assert (recipe.steps, recipe.keywords["first"]) == (2 * steps, steps)


def test_a_word_is_put_where_the_caption_lacks_it_and_that_is_told(hop, tmp_path, capsys):
    for prompt, told in (("a star hopping", True), ("a star doing the sks", False)):
        run = prepared("newmove", hop, tmp_path, "--prior", "none", "--prompt", prompt)
        assert run.clips[0].prompt == prompt + " sks" * told
        assert ("in the motion's" in capsys.readouterr().err) == told


@pytest.mark.parametrize("argv,warns", [
    ("--method customize-a-video --steps 100", True), ("--method customize-a-video", False),
    ("--method customize-a-video look.layers=none --steps 100", False),
    ("--method newmove --images PICTURE --image-prompt X* --steps 100", True),
    ("--method newmove --images PICTURE --image-prompt X* --steps 101", False),
    ("--method newmove --steps 100", False)])
def test_a_stage_that_never_begins_is_told(argv, warns, hop, folder, capsys):
    argv = argv.replace("PICTURE", str(folder / "thing.png")).split()
    train.parse(["--video", str(hop), *argv])
    assert ("never learns" in capsys.readouterr().err) == warns


def test_a_signal_that_comes_while_processes_agree_is_not_lost(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, action: None)  # this process keeps its own
    monkeypatch.setenv("WORLD_SIZE", "2")
    stop, sent = machine.Stop(), []

    def all_reduce(asked, op):
        if not sent:
            sent.append(stop.catch(signal.SIGTERM, None))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert stop.agree("cpu") is None and stop.agree("cpu") == signal.SIGTERM


@pytest.mark.parametrize("argv,says", [
    ("--video FOLDER/none.mp4", "none.mp4 does not exist"),
    ("--video https://example.com/hop.mp4", "hop.mp4 is an address; download it"),
    ("--video VIDEO --method newmove --images FOLDER/no.png", "no.png does not exist; give a pict"),
    ("--video VIDEO --method newmove --prior FOLDER/no", "no does not exist; give a video file or"),
    ("--video VIDEO --prompt a b", '2 captions for 1 clips.* in quotes: --prompt "a b"$'),
    ("--video VIDEO --method vmc motiondirector", "'motiondirector' .*; --method takes one value"),
    ("--video VIDEO --reverse yes", "'yes' belongs to no flag; --reverse takes no value"),
    ("--video VIDEO --width 64", "no --width; give --size WIDTHxHEIGHT"),
    ("--video VIDEO --lr 1e-4", "no --lr; settings are name=value: motion.lr=…"),
    ("--video VIDEO --rank=4", "no --rank; settings are name=value: motion.rank=…"),
    ("--video VIDEO --config x.yaml", "no --config; settings are name=value"),
    ("--video VIDEO --motion.lr 1e-4", "no --motion.lr; settings are name=value: motion.lr=…"),
    ("--video VIDEO --hepl", r"there is no --hepl\. --help lists all"),
])
def test_what_flags_alone_tell_is_answered_before_anything_is_loaded(argv, says, hop, tmp_path,
                                                                     monkeypatch, capsys):
    monkeypatch.setattr(model, "load", lambda *args, **more: pytest.fail("loaded"))
    argv = argv.replace("FOLDER", str(tmp_path)).replace("VIDEO", str(hop)).split()
    complain([*argv, "--out", tmp_path / "out"], says, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_help_lists_its_settings_with_defaults_and_meanings(method, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", method, "--help"])
    printed = capsys.readouterr().out
    assert not stop.value.code and METHODS[method].source in printed
    rows = dict(re.findall(r"^  (\S+?)=(.*)$", printed.partition("settings,")[2], re.MULTILINE))
    assert rows.keys() == METHODS[method].settings().keys()
    for name, row in rows.items():
        default, _, meaning = row.partition(" ")
        assert default == write_value(METHODS[method].settings()[name])
        assert len(meaning.strip()) > 3 and "docstring" not in meaning
    # What runs when nothing is said is on the page too: the tiny model's settings.
    clip = str(ROOT / "assets" / "eight.mp4")
    _, recipe = train.parse(["--method", method, "--video", clip, "--prompt", "moving"])
    last = re.findall(r"^(?:from one clip|with the tiny model.*?): (.*)$", printed, re.MULTILINE)
    assert METHODS[method].but(*last).settings() == recipe.settings()


def test_every_flag_has_help_and_is_read(capsys, monkeypatch):
    parsers, init = [], parsing.Parser.__init__
    monkeypatch.setattr(parsing.Parser, "__init__", lambda self, **more: (
        parsers.append(self), init(self, **more))[1])
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = capsys.readouterr().out
    code = "".join(p.read_text() for p in (*ROOT.glob("*.py"), *ROOT.glob("support/*.py")))
    for action in parsers[0]._actions:
        assert action.option_strings[-1] in printed and len(action.help) > 3
        assert f"flags.{action.dest}" in code, action.dest
    assert "examples" in printed and "name=value" in printed
