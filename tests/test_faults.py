"""Training under faults: killed, stopped, out of space or out of its folder at any moment, a run
goes on at the first try, to the bit, with every sample; and what happened is told in one line."""
import contextlib
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import fuzz_stock
import pytest
import torch
from conftest import ROOT, end_of, fork
from safetensors.torch import load_file

import generate
import train
from support import runs
from support.files import PART

STEPS = 4  # of a run that shows and keeps every second one


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A very small model and a clip."""
    place = tmp_path_factory.mktemp("small")
    fuzz_stock.make_weights(place)
    fuzz_stock.make_clips(place)
    return place


def flags(place, out, *more):
    argv = ["--video", place / "clips/hop.mp4", "--weights", place / "weights", "--size", "64x64",
            "--frames", 4, "--precision", "fp32", "--steps", STEPS, "--keep-every", 2,
            "--preview-every", 2, "--preview-steps", 1, "--out", out, *more]
    return [str(a) for a in argv]


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(out, act):
    """From now on, act(number, writes) is called before every operation on a file or folder in
    `out`: making, opening, flushing, renaming and removing it."""
    count, flush = [0], os.fsync

    def seen(event, args):
        known = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod")
        if known and str(out) in f"{args[0]}":
            count[0] += 1
            act(count[0], event != "os.remove" and (event != "open" or args[2] & WRITES))

    def fsync(handle):
        count[0] += 1
        act(count[0], True)
        flush(handle)

    sys.addaudithook(seen)  # stays until the process ends
    os.fsync = fsync


def start(place, out, act=lambda number, writes: None, *more):
    """A run in a copy of this process, which calls `act` as `watch` says; its id."""
    def command():
        watch(out, act)
        train.main(flags(place, out, *more))

    return fork(command, out.parent / f"{out.name}.says")


def said(out):
    """The lines that a run said, without its bars."""
    lines = (out.parent / f"{out.name}.says").read_text().replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and "it/s" not in line and "s/it" not in line
            and "?it" not in line]


@pytest.fixture(scope="session")
def whole(place, tmp_path_factory):
    """A run that nothing happened to; and the number of its operations on files."""
    out = tmp_path_factory.mktemp("whole") / "out"
    report = out.parent / "count"
    act = lambda number, writes: report.write_text(str(number))
    assert end_of(start(place, out, act)) == 0, said(out)
    return out, int(report.read_text())


def go_on(place, out, whole):
    """What a person does after a fault: the same command again, with --resume where it had begun.
    It works at the first try, and leaves what a run leaves that nothing happened to."""
    more = ["--resume"] if (out / "lock").exists() else []
    assert end_of(start(place, out, lambda *_: None, *more)) == 0, said(out)
    check(out, whole)


def check(out, whole):
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert names == {p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file()}
    assert set(runs.listed(out)) == set(runs.listed(whole)) and not list(out.rglob(PART + "*"))
    for name in names:
        if name.endswith(".safetensors"):
            one, two = load_file(out / name), load_file(whole / name)
            assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one), name
        elif name.endswith(".mp4"):
            assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    logs = [[json.loads(line) | {"seconds": 0} for line in (o / "log.jsonl").read_text().split("\n")
             if line] for o in (out, whole)]
    assert logs[0] == logs[1]


def some(count, how_many, seed=0):
    """Numbers out of 1 … count: all where how_many is 0, else some, the last among them."""
    if not how_many:
        return range(1, count + 1)
    return sorted({count, *random.Random(seed).sample(range(1, count), how_many - 1)})


def like_windows():
    """From now on, Windows' rules for files: nobody renames, replaces or removes a file that is
    open or mapped, nor flushes one that is open for reading alone."""
    flush = os.fsync

    def is_open(path):
        path, handles = os.path.realpath(path), "/proc/self/fd"
        mapped = {line.split(maxsplit=5)[-1].rstrip("\n") for line in open("/proc/self/maps")}
        for handle in os.listdir(handles):
            with contextlib.suppress(OSError):
                mapped.add(os.readlink(f"{handles}/{handle}"))
        return path in mapped

    def seen(event, args):
        if event in ("os.rename", "os.remove"):
            for path in args[:2] if event == "os.rename" else args[:1]:
                if os.path.isfile(path) and is_open(path):
                    raise PermissionError(13, "used by another process", str(path))

    def fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        flush(handle)

    sys.addaudithook(seen)
    os.fsync, os.link = fsync, None


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="asks Linux what is open")
def test_windows_rules_for_files(place, whole, tmp_path):
    """Stopped, gone on with, sampled from and run again, with files that were read before."""
    out, adapter = tmp_path / "out", tmp_path / "out" / "vmc.safetensors"

    def command():
        like_windows()
        train.main(flags(place, out, "--steps", 2))
        train.main(flags(place, out, "--resume"))
        for _ in range(2):
            generate.main([str(a) for a in (
                "--adapter", adapter, "--weights", place / "weights", "--prompt", "a star",
                "--steps", 1, "--out", tmp_path / "videos", "--overwrite")])
        train.main(flags(place, out, "--overwrite"))

    assert end_of(fork(command, tmp_path / "out.says")) == 0, said(out)
    check(out, whole[0])


def test_windows_rules_are_those(tmp_path):
    def command():
        like_windows()
        path = tmp_path / "a"
        for forbidden in (lambda f: path.unlink(), lambda f: os.replace(path, tmp_path / "b"),
                          lambda f: os.fsync(f.fileno())):
            path.touch()
            with open(path) as file, pytest.raises(OSError):
                forbidden(file)
        path.unlink()

    assert end_of(fork(command)) == 0


slow = pytest.mark.slow
few_or_all = pytest.mark.parametrize("how_many", (3, pytest.param(0, marks=slow)))
few_or_many = pytest.mark.parametrize("how_many", (2, pytest.param(200, marks=slow)))


@few_or_all
def test_killed_at_any_operation_on_a_file(how_many, place, whole, tmp_path):
    for number in some(whole[1], how_many):
        out = tmp_path / str(number)
        act = lambda at, _, number=number: at == number and os.kill(os.getpid(), signal.SIGKILL)
        assert end_of(start(place, out, act)) == -signal.SIGKILL
        go_on(place, out, whole[0])
        shutil.rmtree(out)


@few_or_many
def test_killed_at_any_moment(how_many, place, whole, tmp_path):
    r, longest = random.Random(how_many), 2.0
    for number in range(how_many):
        out, started = tmp_path / str(number), time.time()
        pid = start(place, out)
        time.sleep(r.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        if end_of(pid) == 0:  # it had ended
            longest = time.time() - started
            check(out, whole[0])
        else:
            go_on(place, out, whole[0])
        shutil.rmtree(out, ignore_errors=True)


@few_or_all
@pytest.mark.parametrize("name,code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_stopped_at_any_operation_on_a_file(name, code, how_many, place, whole, tmp_path):
    """It ends with the signal's code, whatever it was doing; and a sample that was due is not
    forgotten."""
    for at in some(whole[1], how_many, code):
        out = tmp_path / str(at)
        act = lambda n, _, at=at: n == at and os.kill(os.getpid(), getattr(signal, name))
        assert end_of(start(place, out, act)) == code, said(out)
        assert not any("Traceback" in line for line in said(out)), said(out)
        if any("all is done" in line for line in said(out)):
            check(out, whole[0])
        else:
            assert said(out)[-1].startswith("stopped"), said(out)
            go_on(place, out, whole[0])
        shutil.rmtree(out, ignore_errors=True)


@few_or_all
@pytest.mark.parametrize("error", (28, pytest.param(5, marks=slow), pytest.param(30, marks=slow)),
                         ids=("full", "broken", "read-only"))
def test_no_room_from_any_operation_on(error, how_many, place, whole, tmp_path):
    """A disk that is full, broken, or read-only from then on."""
    for at in some(whole[1], how_many, error):
        out = tmp_path / str(at)

        def act(number, writes, at=at):
            if number >= at and writes:
                raise OSError(error, os.strerror(error), "the disk")

        code = end_of(start(place, out, act))
        if at == whole[1] and code == 0:  # the last one, where nothing was written any more
            continue
        assert (code, said(out)[-1][:7]) == (2, "error: "), said(out)
        assert not any("Traceback" in line for line in said(out)), said(out)
        go_on(place, out, whole[0])


@pytest.mark.parametrize("how_many", (3, pytest.param(60, marks=slow)))
def test_a_limit_on_the_size_of_files(how_many, place, whole, tmp_path):
    largest = (whole[0] / "state.pt").stat().st_size
    for number in range(how_many):
        limit, out = int(largest * (number / how_many) ** 3), tmp_path / str(number)

        def command(limit=limit, out=out):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            train.main(flags(place, out))

        told = out.parent / f"{number}.says"
        reader, writer = os.pipe()  # the limit is for what it says, too
        pid = fork(command, f"/dev/fd/{writer}")
        os.close(writer)
        with open(reader) as file:
            told.write_text(file.read())
        assert end_of(pid) == 2 and said(out)[-1].startswith("error: "), said(out)
        assert not any("Traceback" in line for line in said(out)), said(out)
        go_on(place, out, whole[0])


@few_or_all
def test_its_folder_deleted_at_any_operation(how_many, place, whole, tmp_path):
    for at in some(whole[1], how_many, 7):
        out = tmp_path / str(at)

        def act(number, _, at=at, out=out):
            if number == at and out.exists():
                os.rename(out, out.with_name("gone"))  # and what was deleted is whole
                shutil.rmtree(out.with_name("gone"))

        code = end_of(start(place, out, act))
        assert (code, said(out)[-1][:7]) == (2, "error: "), (at, said(out))
        assert not any("Traceback" in line for line in said(out)), said(out)


@pytest.mark.skipif(os.name != "posix", reason="users are Unix's")
def test_a_folder_that_may_only_be_read(place, whole, tmp_path):
    """Also for the superuser, who may write anywhere: the command is another user's."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    for path in (out, *out.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for more in (["--resume", "--steps", "6"], ["--overwrite"], []):
        def command(more=more):
            if os.getuid() == 0:
                os.setuid(65534)
            train.main(flags(place, out, *more))

        assert end_of(fork(command, tmp_path / "out.says")) == 2
        assert len(said(out)) == 1 and said(out)[0].startswith("error: "), said(out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux what is caught")
@pytest.mark.parametrize("how_many", (1, pytest.param(12, marks=slow)))
@pytest.mark.parametrize("script", ("train.py", "generate.py", "eval.py"))
def test_stopped_while_it_is_imported(script, how_many):
    """From the first of our own lines on, until --help is printed: 130 or 143, and one line."""
    r, text = random.Random(script), (ROOT / script).read_text()
    assert 0 < text.index("import torch")
    for _ in range(how_many):
        number = r.choice((signal.SIGINT, signal.SIGTERM))
        process = subprocess.Popen([sys.executable, ROOT / script, "--help"], text=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while "_signal" not in (caught := handlers(process.pid)) and process.poll() is None:
            time.sleep(0.005)
        time.sleep(r.uniform(0, 1) ** 2)
        process.send_signal(number)
        told, code = process.communicate()[1], process.returncode
        assert (told, code) in (("stopped\n", 128 + number), ("", 0)), (caught, told)


def handlers(pid):
    """"_signal" once the process answers SIGTERM itself, as Linux tells it."""
    status = open(f"/proc/{pid}/status").read()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return "_signal" if caught & 1 << (signal.SIGTERM - 1) else ""
