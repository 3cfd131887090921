"""Commands under faults: killed, stopped, without disk space, without their folder. A training run
resumes at the first try with equal files to the bit, and no command changes files of others.

    KILLS=300 SEED=1 pytest -m slow tests/test_faults.py     # the campaign

Each command runs in a fork of this process, in a folder of its own, with --out out.
"""
import contextlib
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from functools import cache, partial

import fuzz
import fuzz_stock
import pytest
from conftest import end_of, fork

import data
import eval as evaluate
import generate
import model
import sampler
import train
from support import files, media, runs

KILLS, SEED = int(os.environ.get("KILLS", 100)), int(os.environ.get("SEED", 0))
STEPS = 4  # training steps; every second one has a preview, a saved adapter and a saved state
GENERATED = ["--prior", "generated", "num_prior_clips=2"]
MORE = {  # method: flags and settings for a short run
    "vmc": [], "motiondirector": ["inversion_steps=2"], "newmove": GENERATED,
    "customize-a-video": ["absorber_steps=2"], "coupled": ["inversion_steps=2"],
    "dreambooth": GENERATED, "custom-diffusion": GENERATED, "textual-inversion": [],
    "tune-a-video": []}
PHASES = {  # phase: the function that begins it
    "reading": (data, "load_clips"), "prior clips": (data, "load_prior_clips"),
    "encoding": (model.Pipeline, "encode"), "inversion": (sampler, "invert"),
    "sampling": (sampler, "sample"), "preview": (runs.Folder, "preview"),
    "step": (train, "one_step"), "saving": (runs.Folder, "save"), "video": (media, "write_video"),
    "library": (files, "save_file")}
slow = pytest.mark.slow
few_or_all = pytest.mark.parametrize("how_many", (2, pytest.param(0, marks=slow)))


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A very small model, clips, and the results of commands that no fault interrupts."""
    place = tmp_path_factory.mktemp("small")
    fuzz_stock.make_weights(place)
    fuzz_stock.make_clips(place)
    return place


def train_flags(place, method, *more):
    return ["--method", method, "--video", place / "clips/hop.mp4", "--weights", place / "weights",
            "--size", "64x64", "--frames", 4, "--precision", "fp32", "--steps", STEPS,
            "--save-every", 2, "--preview-every", 2, "--preview-steps", 1, "--out", "out",
            "sampling_steps=2", *MORE[method], *more]


def call(script, *argv):
    """A command, to be run in a fork."""
    return partial(script.main, [str(a) for a in argv])


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(out, act):
    """From now on call act(number, name, writes) before each operation on a file in `out`, and at
    the beginning of each phase."""
    count, flush = [0], os.fsync

    def event(name, writes=True):
        count[0] += 1
        act(count[0], name, writes)

    def audited(name, args):
        known = name in ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod", "os.rmdir")
        if known and str(args[0]).startswith((str(out), out.name)):
            opened = name == "open" and args[2] & WRITES
            if opened and not str(args[0]).endswith("log.jsonl"):  # other files are renamed
                assert files.UNFINISHED in str(args[0]), f"{args[0]} is not written atomically"
            event(name, opened or name in ("os.rename", "os.mkdir", "os.chmod"))

    def fsync(handle):
        event("os.fsync")
        flush(handle)

    def begin(name, function):
        def phase(*args, **more):
            event(name, False)
            if name == "library":  # safetensors writes a temporary file of its own next to the path
                part = args[1].with_name(".tmpXyz")
                part.write_bytes(b"half")
                event("half a file", False)
                part.unlink()
            return function(*args, **more)

        return phase

    for name, (owner, function) in PHASES.items():
        setattr(owner, function, begin(name, getattr(owner, function)))
    sys.addaudithook(audited)
    os.fsync = fsync


def start(command, folder, act=None):
    """Run a command in a fork, in a folder; `act` as in `watch`. Returns the process id."""
    folder.mkdir(exist_ok=True)

    def action():
        os.chdir(folder)
        if act:
            watch(folder / "out", act)
        command()

    return fork(action, folder / "err")


def printed(folder):
    """The lines that a command printed to stderr, except progress bars."""
    lines = (folder / "err").read_text().replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and not any(
        bar in line for bar in ("it/s", "s/it", "?it"))]


def check_one_line(folder, code, message=""):
    """The command ended with exit code 2 and one line."""
    lines = printed(folder)
    assert code == 2 and lines[-1].startswith("error: ") and message in lines[-1], (code, lines)
    assert not any("Traceback" in line for line in lines), lines


def contents(folder):
    """{path: content} of all files and folders, hidden ones included. Times in the log and the
    flag --resume are left out; of a step that is logged twice, the last line counts."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            found[name] = "folder"
        elif path.name == "log.jsonl":
            rows = {}
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # cut by a kill
                    row = json.loads(line)
                    rows[row["step"]] = row | {"seconds": 0}
            found[name] = rows
        elif path.name == "run.json":
            run = json.loads(path.read_text())
            for name in ("resume", "out", "default_out"):
                run["flags"].pop(name)
            found[name] = run
        else:
            found[name] = path.read_bytes()
    return found


def assert_equal(found, expected):
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.fixture(scope="session")
def unkilled(place, tmp_path_factory):
    """unkilled(method): of an uninterrupted run the contents, the events, the folder, and the
    seconds."""
    @cache
    def run(method):
        folder, started = tmp_path_factory.mktemp(method), time.time()
        note = lambda number, name, writes: append(folder / "events", name)
        code = end_of(start(call(train, *train_flags(place, method)), folder, note))
        assert code == 0, printed(folder)
        events = (folder / "events").read_text().split("\n")[:-1]
        return contents(folder / "out"), events, folder, time.time() - started

    return run


def append(path, text):
    with open(path, "a") as file:
        file.write(f"{text}\n")


@pytest.fixture
def run(place, unkilled, tmp_path):
    """run(method, act): the exit code of a run with faults, and its folder. run.resume(method)
    repeats the command, with --resume if its folder exists: the first try works and leaves the
    files of an uninterrupted run."""
    folder = tmp_path / "x"

    def begin(method="vmc", act=None):
        return end_of(start(call(train, *train_flags(place, method)), folder, act)), folder

    def resume(method="vmc"):
        more = ["--resume"] if (folder / "out").exists() else []
        code = end_of(start(call(train, *train_flags(place, method, *more)), folder))
        assert code == 0, printed(folder)
        assert_equal(contents(folder / "out"), unkilled(method)[0])
        shutil.rmtree(folder)

    begin.resume = resume
    return begin


def at_event(number, action):
    """An `act` that runs an action at one event."""
    return lambda now, name, writes: now == number and action()


def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def choose(count, how_many, seed=0):
    """Numbers of 1 … count: all if how_many is 0, else some, the last included."""
    if not how_many:
        return range(1, count + 1)
    return sorted({count, *random.Random(f"{SEED} {seed}").sample(range(1, count), how_many - 1)})


# ------------------------------------------------------------------------------------------------
# Kills and signals


@few_or_all
@pytest.mark.parametrize("method", ("vmc", "dreambooth"))
def test_a_run_killed_at_any_file_operation_resumes_to_the_bit(method, how_many, run, unkilled):
    for number in choose(len(unkilled(method)[1]), how_many, method):
        assert run(method, at_event(number, kill))[0] == -signal.SIGKILL
        run.resume(method)


@pytest.mark.parametrize("everything", (False, pytest.param(True, marks=slow)))
@pytest.mark.parametrize("method", MORE)
def test_a_run_of_any_method_killed_in_any_phase_resumes_to_the_bit(method, everything, run,
                                                                    unkilled):
    """At the first, a middle and the last event of each phase; in CI at one of these."""
    points = {}
    for number, name in enumerate(unkilled(method)[1], 1):
        if name in PHASES:
            points.setdefault(name, []).append(number)
    assert {"reading", "encoding", "preview", "step", "saving"} <= set(points)
    numbers = sorted({at for p in points.values() for at in (p[0], p[len(p) // 2], p[-1])})
    if not everything:
        numbers = [random.Random(f"{method} {SEED}").choice(numbers)]
    for number in numbers:
        assert run(method, at_event(number, kill))[0] == -signal.SIGKILL
        run.resume(method)


@pytest.mark.parametrize("how_many", (1, pytest.param(KILLS, marks=slow)))
def test_runs_killed_at_random_moments_resume_to_the_bit(how_many, run, place, unkilled, tmp_path):
    r = random.Random(SEED)
    for _ in range(how_many):
        method = r.choice(list(MORE))
        seconds = unkilled(method)[3]
        pid = start(call(train, *train_flags(place, method)), tmp_path / "x")
        time.sleep(r.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        end_of(pid)
        run.resume(method)


@few_or_all
@pytest.mark.parametrize("name,code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_run_stopped_by_a_signal_prints_one_line_and_resumes(name, code, how_many, run, unkilled):
    events = unkilled("vmc")[1]
    finished = max(i for i, event in enumerate(events, 1) if event == "os.rename")
    for number in {1, *choose(len(events), how_many, name)}:
        found, folder = run("vmc", at_event(number, partial(kill, getattr(signal, name))))
        lines = printed(folder)
        assert found == code or number > finished, (number, lines)
        assert not any("Traceback" in line for line in lines) and "stop" in "".join(lines), lines
        assert number > 1 or lines == ["stopped"]  # before the first step
        run.resume()


@pytest.fixture(scope="session")
def commands(place, unkilled):
    """{name: (command, default folder)} of commands that read a finished run."""
    run = unkilled("vmc")[2] / "out"
    adapter = ["--adapter", run / "vmc.safetensors", "--weights", place / "weights"]
    few = ["--steps", 2, "--precision", "fp32", "--device", "cpu"]
    return {
        "generate": (call(generate, *adapter, "--prompt", "a star", "--videos-per-prompt", 2, *few,
                          "--guidance", 1), "generated"),
        "eval": (call(evaluate, run, "--size", 32, "--frames", 4, "--device", "cpu", "--no-world"),
                 "evaluation")}


@few_or_all
@pytest.mark.parametrize("name", ("generate", "eval"))
def test_killed_generate_and_eval_leave_whole_files(name, how_many, commands, unkilled, tmp_path):
    """A killed command leaves finished files and .unfinished; the next one gets a folder of its
    own. The training run that they read stays as it was."""
    command, default = commands[name]
    run, whole = unkilled("vmc")[2], tmp_path / "whole"
    before = contents(run)
    note = lambda number, name, writes: append(whole / "events", name)
    assert end_of(start(command, whole, note)) == 0, printed(whole)
    expected = contents(whole / "out" / default)
    for number in choose(len((whole / "events").read_text().split()), how_many, name):
        folder = tmp_path / str(number)
        assert end_of(start(command, folder, at_event(number, kill))) == -signal.SIGKILL
        for path, content in contents(folder / "out" / default).items() if (
                folder / "out" / default).exists() else ():
            if not path.startswith(files.UNFINISHED):
                assert content == expected[path] or name == "eval" and path.endswith(".json")
        again = f"{default}-2" if (folder / "out" / default).exists() else default
        assert end_of(start(command, folder)) == 0, printed(folder)
        found = contents(folder / "out" / again)
        assert sorted(found) == sorted(expected)
        videos = [path for path in found if path.endswith((".mp4", ".png"))]
        assert videos and all(found[path] == expected[path] for path in videos)
    assert_equal(contents(run), before)


# ------------------------------------------------------------------------------------------------
# Disks


@few_or_all
@pytest.mark.parametrize("error", (28, pytest.param(5, marks=slow), pytest.param(30, marks=slow)),
                         ids=("full", "broken", "read-only"))
def test_a_disk_that_fails_from_any_operation_on(error, how_many, run, unkilled):
    for at in choose(len(unkilled("vmc")[1]), how_many, error):
        def act(number, name, writes, at=at):
            if number >= at and writes:
                raise OSError(error, os.strerror(error), "the disk")

        code, folder = run("vmc", act)
        if code:  # else nothing was written any more
            check_one_line(folder, code, "free disk space")
            assert not (folder / "out" / files.UNFINISHED).exists()
        run.resume()


@pytest.mark.parametrize("how_many", (3, pytest.param(40, marks=slow)))
def test_a_limit_on_the_size_of_files(how_many, run, place, unkilled, tmp_path):
    """It also stops writes inside libraries. stderr is a pipe, since the limit applies to files."""
    largest, folder = len(unkilled("vmc")[0]["state.safetensors"]), tmp_path / "x"
    for number in range(how_many):
        def command(limit=int(largest * (number / how_many) ** 3)):
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            call(train, *train_flags(place, "vmc"))()

        folder.mkdir()
        reader, writer = os.pipe()
        pid = fork(command, f"/dev/fd/{writer}")
        os.close(writer)
        with open(reader) as file:
            (folder / "err").write_text(file.read())
        check_one_line(folder, end_of(pid), "free disk space")
        run.resume()


@few_or_all
def test_a_folder_deleted_at_any_operation(how_many, run, unkilled, tmp_path):
    for at in choose(len(unkilled("vmc")[1]), how_many, 7):
        def delete():
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(tmp_path / "x" / "out")

        code, folder = run("vmc", at_event(at, delete))
        if code:
            check_one_line(folder, code)
        shutil.rmtree(folder)


@pytest.mark.skipif(os.name != "posix", reason="users of Unix")
def test_a_folder_without_write_permission(place, unkilled, tmp_path):
    """The command runs as another user, since root may write anywhere."""
    shutil.copytree(unkilled("vmc")[2] / "out", tmp_path / "x" / "out")
    for path in (tmp_path / "x").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = contents(tmp_path / "x" / "out")

    def command(*more):
        if os.getuid() == 0:
            os.setuid(65534)
        call(train, *train_flags(place, "vmc", *more))()

    for more in (["--resume", "--steps", 6], []):
        check_one_line(tmp_path / "x", end_of(start(partial(command, *more), tmp_path / "x")))
    assert_equal(contents(tmp_path / "x" / "out"), before)


def like_windows():
    """From now on the rules of Windows: open or mapped files cannot be renamed, replaced, removed,
    nor flushed if open for reading alone."""
    flush = os.fsync

    def is_open(path):
        handles = "/proc/self/fd"
        found = {line.split(maxsplit=5)[-1].rstrip("\n") for line in open("/proc/self/maps")}
        for handle in os.listdir(handles):
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"{handles}/{handle}"))
        return os.path.realpath(path) in found

    def audited(event, args):
        if event in ("os.rename", "os.remove"):
            for path in args[:2] if event == "os.rename" else args[:1]:
                if os.path.isfile(path) and is_open(path):
                    raise PermissionError(13, "used by another process", str(path))

    def fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        flush(handle)

    sys.addaudithook(audited)
    os.fsync, os.link = fsync, None


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads open files from Linux")
def test_windows_rules_for_files(place, unkilled, commands, tmp_path):
    """Train, resume, and sample with files that were read before."""
    def command():
        like_windows()
        path = tmp_path / "a"
        for forbidden in (lambda f: path.unlink(), lambda f: os.replace(path, tmp_path / "b"),
                          lambda f: os.fsync(f.fileno())):
            path.touch()
            with open(path) as file, pytest.raises(OSError):
                forbidden(file)
        call(train, *train_flags(place, "vmc", "--steps", 2))()
        call(train, *train_flags(place, "vmc", "--resume"))()
        commands["generate"][0]()

    assert end_of(start(command, tmp_path / "x")) == 0, printed(tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "out" / "generated")
    assert_equal(contents(tmp_path / "x" / "out"), unkilled("vmc")[0])


# ------------------------------------------------------------------------------------------------
# Two commands, and folders of others


def test_of_two_runs_into_one_folder_one_is_refused(place, unkilled, tmp_path):
    """Together from the start, and one after the other."""
    expected = unkilled("vmc")[0]
    pids = []
    for name in ("a", "b"):
        action = lambda: (os.chdir(tmp_path), call(train, *train_flags(place, "vmc"))())
        pids.append(fork(action, tmp_path / name))
    codes = [end_of(pid) for pid in pids]
    assert sorted(codes) == [0, 2]
    refused = (tmp_path / "ab"[codes.index(2)]).read_text().splitlines()
    assert len(refused) == 1 and ("is in use" in refused[0] or "is not empty" in refused[0])
    assert_equal(contents(tmp_path / "out"), expected)
    folder = tmp_path
    check_one_line(folder, end_of(start(call(train, *train_flags(place, "vmc")), folder)))
    assert_equal(contents(tmp_path / "out"), expected)


OUR_NAMES = ("run.json", "settings.json", "metrics.json", "page.html", "study-key.json",
             "sheet.png", "log.jsonl", "state.safetensors", "vmc.safetensors",
             "samples/step-000000.mp4", ".tmp-abc/vmc.safetensors", ".part-vmc.safetensors",
             f"{files.UNFINISHED}/mine")
FOREIGN = {
    "all names": OUR_NAMES, "a hidden file": [".hidden"],
    "an adapter": ["vmc.safetensors"],
    "a state": ["state.safetensors"],
    "a private folder": [f"{files.UNFINISHED}/mine"], "a link": OUR_NAMES,
    "settings": ["run.json", f"{files.UNFINISHED}/mine", f"{files.UNFINISHED}/.tmp-x/mine"]}


def occupy(out, kind):
    """Put a file, a pipe, a link or a folder of files in place of an output folder."""
    elsewhere = out.with_name("elsewhere")
    folder = elsewhere if kind == "a link" else out
    for name in FOREIGN.get(kind, ()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"mine": 1, "flags": {"resume": true}}\n')
    if kind == "a file":
        out.write_text("mine")
    elif kind == "a pipe":
        os.mkfifo(out)
    elif "link" in kind:
        out.symlink_to(elsewhere)


@pytest.mark.parametrize("kind", (*FOREIGN, "a file", "a pipe", "a dangling link"))
def test_files_of_others_are_never_changed(kind, place, commands, tmp_path):
    """Train, resume, generate and eval in a folder whose files have the names of ours."""
    occupy(tmp_path / "out", kind)
    state = lambda: {p: (p.lstat().st_mtime_ns, p.is_file() and p.read_bytes())
                     for p in tmp_path.rglob("*") if p.name != "err"}
    before = state()
    scripts = {"train": call(train, *train_flags(place, "vmc")),
               "resume": call(train, *train_flags(place, "vmc", "--resume"))}
    for name, (command, _) in commands.items():
        scripts[name] = partial(command.func, [*command.args[0], "--out", "out"])
    for name, command in scripts.items():
        message = "holds no run" if name == "resume" else "is not empty"
        code = end_of(start(command, tmp_path))
        check_one_line(tmp_path, code, message if kind in FOREIGN else "")
        assert state() == before, name


@pytest.mark.parametrize("kind", ("a link", "a pipe", "a folder"))
@pytest.mark.parametrize("name", ("log.jsonl", "run.json", "state.safetensors", "vmc.safetensors",
                                  "samples/step-000004.mp4", files.UNFINISHED, "samples"))
def test_links_pipes_and_folders_in_place_of_files(name, kind, place, unkilled, tmp_path):
    """A resumed run never writes through a link, and never waits for a pipe."""
    shutil.copytree(unkilled("vmc")[2] / "out", tmp_path / "out")
    path, outside = tmp_path / "out" / name, tmp_path / "outside"
    if path.exists():
        (shutil.rmtree if path.is_dir() else os.remove)(path)
    if kind == "a link":
        outside.mkdir()
        (outside / "mine").write_text("mine")
        folder = name in (files.UNFINISHED, "samples")
        path.symlink_to(outside if folder else outside / "mine")
    else:
        os.mkfifo(path) if kind == "a pipe" else path.mkdir()
    pid = start(call(train, *train_flags(place, "vmc", "--resume", "--steps", 6)), tmp_path)
    if code := fuzz.wait(pid, 120):
        check_one_line(tmp_path, code)
    if kind == "a link":
        assert [p.name for p in outside.iterdir()] == ["mine"] or name == "samples"
        assert (outside / "mine").read_text() == "mine"
