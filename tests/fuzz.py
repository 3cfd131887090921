"""A campaign of broken inputs. Whatever a file, a flag, a text or the environment holds, a command
works, or prints one line and ends with exit code 2. It leaves no traceback, never hangs, changes no
file except its output, and never accepts input that it then uses wrongly.

Each case is a fork of this process, which imports torch once, with a copy of files of a very small
model. fuzz_stock.py has these files and the ways to damage them; test_fuzz.py runs the campaign.
"""
import contextlib
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import fuzz_stock as stock
from safetensors.torch import load_file

import eval as evaluate
import generate
import scores.clip
import train
from support import machine, media, recipe, tokenizer
from support.files import UNFINISHED, read_meta

LIMIT = 30  # seconds on an idle machine until a case is asked to stop; later it counts as a hang
MEMORY = 6 * 2**30  # bytes that a case may allocate
CAPTION = ["--prompt", "a thing hopping", "sampling_steps=2"]  # of the run in the stock
SHORT = "--steps 1 --frames 4 --preview-every 0 --preview-steps 2 --device cpu --out out".split()
QUICK = "--steps 1 --frames 4 --device cpu --out out".split()
SCORE = "--size 32 --frames 4 --device cpu --no-world --out out".split()


class Case:
    """One input: a folder with its files, and the command that reads it. `must` is "refuse" or
    "work" if that is known; `what` describes the input; `truth` returns texts on output that
    contradicts the input."""

    def __init__(self, place, folder, kind="", number=0, seed=0):
        self.r = random.Random(f"{kind} {number} {seed}")
        self.place, self.folder, self.number = place, folder, number
        self.must, self.what, self.command, self.argv = "", "", None, []
        self.environment, self.encoding = {}, "utf-8"
        self.truth = lambda: []

    def take(self, name, to=None):
        """A copy of a file or folder of the stock in the case's folder; its path."""
        source, target = self.place / name, self.folder / (to or Path(name).name)
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, target)
        return target

    def spoil(self, path, *ways):
        """Damage a file in one of the ways, by default those for its type."""
        own = {".safetensors": stock.retensor, ".json": stock.rejson}.get(path.suffix, stock.ruin)
        how = self.r.choice(ways or (stock.ruin, own, own, own, own))(self.r, path)
        self.must = "refuse" * (how in stock.OTHER_CONTENT or how in stock.INSTEAD)
        self.what = f"{path.relative_to(self.folder)}: {how}"

    def call(self, command, *argv):
        self.command, self.argv = command, [str(a) for a in argv]

    def train(self, *argv):
        """A short training run, whose outputs are compared with the flags."""
        self.call(train.main, *argv, *SHORT)
        self.truth = lambda: trained_otherwise(self)

    def resume(self, steps=3):
        """Resume the run in out/."""
        self.call(train.main, "--video", self.place / "clips/hop.mp4", *SHORT, *CAPTION,
                  "--resume", "--steps", steps)

    def generate(self, *argv):
        self.call(generate.main, *argv, *QUICK)
        self.truth = lambda: generated_otherwise(self)

    def score(self, path):
        self.call(evaluate.main, path, *SCORE)


# ------------------------------------------------------------------------------------------------
# The truth: outputs that contradict the input


SETTINGS = {name for method in recipe.METHODS.values() for name in method.settings(idle=True)}


def given(argv):
    """{flag: its last value}, and {setting: value}, of a command line."""
    flags = {flag: value for flag, value in zip(argv, argv[1:]) if flag.startswith("--")}
    settings = [text.partition("=") for text in argv if text.partition("=")[0] in SETTINGS]
    return flags, {name: value for name, _, value in settings}


def differs(name, found, value):
    """[text] where a value in an output is not the one on the command line."""
    if found is None:  # JSON has no infinity
        same = value == "inf"
    elif isinstance(found, bool):
        same = value == ("on" if found else "off")
    elif isinstance(found, (int, float)):
        same = float(value) == found
    else:
        same = str(found) == value
    return [] if same else [f"{name} is {found!r}, given {value!r}"]


def trained_otherwise(case):
    """Contradictions between a run's files and its command line."""
    flags, settings = given(case.argv)
    run = json.loads((case.folder / "out/run.json").read_text())
    wrong = differs("frames", run["flags"]["frames"], flags["--frames"])
    wrong += differs("method", run["method"], flags.get("--method", "vmc"))
    for name, value in settings.items():
        if name != "steps":
            wrong += differs(name, run["settings"][name], value)
    rows = [json.loads(line) for line in (case.folder / "out/log.jsonl").read_text().split("\n")
            if line]
    if [row["step"] for row in rows] != list(range(run["settings"]["steps"])):
        wrong.append(f"the log has steps {[row['step'] for row in rows]}")
    return wrong


def generated_otherwise(case):
    """Contradictions between a folder of videos and its command line."""
    flags, _ = given(case.argv)
    made = json.loads((case.folder / "out/settings.json").read_text())
    if "--prompt" in flags:
        prompts = [flags["--prompt"]]
    else:
        raw = Path(case.folder, flags["--prompts"]).read_bytes()
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = []
    if [row[1] for row in made["videos"]] != prompts:
        wrong.append(f"the prompts are {[row[1] for row in made['videos']]}")
    for file, _, _ in made["videos"]:
        frames = [make() for _, make in media.decode(case.folder / "out" / file)]
        wrong += differs("frames", len(frames), str(made["frames"]))
    return wrong + differs("steps", made["sampling_steps"], flags["--steps"])


def same_adapter(case, path):
    """Contradictions of a damaged adapter, which was accepted, to the whole one."""
    whole = case.place / "adapters" / path.name
    tensors, saved = load_file(path), load_file(whole)
    equal = read_meta(path) == read_meta(whole) and tensors.keys() == saved.keys() and all(
        tensors[n].equal(t) for n, t in saved.items())
    return [] if equal else ["other numbers than were saved"]


# ------------------------------------------------------------------------------------------------
# Kinds of input. Each function damages its files and names a command.


def videos(case):
    """A training clip, or a clip to start from."""
    path = case.take(f"clips/{case.r.choice(stock.CLIPS)}")
    case.spoil(case.r.choice(sorted(path.iterdir())) if path.is_dir() else path)
    case.must = ""  # a decodable part of a file is a clip
    if case.r.random() < 0.5:
        case.train("--video", path)
    else:
        case.generate("--init-video", path, "--prompt", "a star")


def weights(case):
    """A base model's folder: tensors, configurations, files."""
    path = case.take("weights")
    case.spoil(case.r.choice(sorted(p for p in path.rglob("*") if p.is_file())))
    case.generate("--weights", path, "--prompt", "a star", "--size", "64x64")


def adapters(case):
    """One of our adapters: its tensors, its metadata, its bytes."""
    method = case.r.choice(("vmc", "motiondirector", "newmove"))
    path = case.take(f"adapters/{method}.safetensors")
    case.generate("--adapter", path, "--prompt", "a star")
    if case.r.random() < 0.3:
        case.spoil(path, stock.restory)
        case.must = "refuse" * case.what.endswith("checksum")
    else:
        case.spoil(path)
        case.truth = lambda: same_adapter(case, path)


def foreign(case):
    """Another program's LoRA."""
    path = case.take("foreign")
    name = case.r.choice(stock.FOREIGN)
    case.spoil(path / name if case.r.random() < 0.8 else path / "peft/adapter_config.json")
    if "adapter_config" in case.what:
        name = "peft/adapter_model.safetensors"
    case.generate("--adapter", path / name, "--prompt", "a star")


def states(case):
    """The state that a run resumes from. Its checksum detects every change."""
    state = case.take("run", "out") / "state.safetensors"
    before = state.read_bytes()
    case.spoil(state, stock.ruin, stock.retensor, stock.retensor, stock.retensor)
    if case.what.endswith(": gone"):
        case.must = ""  # then the run begins again
    elif state.is_file() and not case.what.endswith(("flip", "flips")):
        case.must = "refuse" * (state.read_bytes() != before)
    case.resume()


def run_files(case):
    """A run's settings, for a resumed run and for eval.py."""
    resumed = case.number % 3 == 0
    out = case.take("run", "out" if resumed else "run")
    case.spoil(out / "run.json")
    case.must *= (out / "run.json").is_file()
    if resumed:
        case.resume()
    elif case.number % 3 == 1:
        settings = case.take("set") / "settings.json"  # of this run
        settings.write_text(settings.read_text().replace(str(case.place / "run"), str(out)))
        case.score(settings.parent)
    else:
        case.score(out)


def set_files(case):
    """The settings.json of generate.py."""
    path = case.take("set")
    case.spoil(path / "settings.json")
    case.must *= (path / "settings.json").is_file()  # else it is a folder of videos
    case.score(path)


def texts(case):
    """Prompts and captions."""
    text = stock.odd_text(case.r)
    case.what = repr(text[:60])
    if case.r.random() < 0.4:
        case.generate("--prompt", text)
        return
    raw = text.encode("utf-8", "surrogateescape")
    raw = case.r.choice((raw, raw, b"\xef\xbb\xbf" + raw, text.encode("utf-16", "replace")))
    path = case.folder / "text.txt"
    path.write_bytes(raw)
    if case.r.random() < 0.5:
        case.generate("--prompts", path)
    else:
        case.train("--video", case.take("clips/hop.mp4", "text.mp4"))


def flags(case):
    """One or two flags with odd values."""
    prompt = ["--prompt", "a star", *QUICK]
    command, base = case.r.choice((
        (train, ["--video", case.place / "clips/hop.mp4", *SHORT]), (generate, prompt),
        (generate, ["--adapter", case.place / "adapters/vmc.safetensors", *prompt]),
        (evaluate, [case.place / "set", *SCORE])))
    argv = []
    for _ in range(case.r.choice((1, 1, 2))):
        argv.append(case.r.choice(stock.flags_of(command)))
        for _ in range(case.r.choice((1, 1, 1, 1, 0, 2))):
            argv.append(stock.odd_value(case.r, case.place))
    case.what = " ".join(a[:60] for a in argv)
    case.call(command.main, *base, *argv)


def settings(case):
    """Settings of a method, name=value, with control characters and surrogates."""
    method = case.r.choice(list(recipe.METHODS))
    known, argv = recipe.METHODS[method].settings(), []
    for _ in range(case.r.choice((1, 1, 2))):
        name, value = case.r.choice(list(known)), stock.odd_value(case.r, case.place)
        if type(known[name]) in (int, float) and case.r.random() < 0.7:
            value = case.r.choice(("0", "1", "2", "3", "0.5", "1e-9", "99", "1e5", "-1", "inf"))
        elif case.r.random() < 0.5:
            value = case.r.choice(stock.PATTERNS)
        argv.append(f"{name}={value}")
    case.what = f"{method} {' '.join(a[:60] for a in argv)}"
    case.train(*hop_of(case.place, method), *argv)


def hop_of(place, method):
    """The flags of a method, a clip and, where the method uses them, regularization clips."""
    prior = ["--prior", place / "prior"] if "prior" in recipe.METHODS[method].own else []
    return ["--method", method, "--video", place / "clips/hop.mp4", *prior]


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
             "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "LC_ALL", "LANG", "COLUMNS", "TERM", "HOME")


def environments(case):
    """Variables that other launchers set, and encodings of the streams."""
    names = case.r.sample(VARIABLES, case.r.choice((1, 2, 3)))
    case.environment = {name: case.r.choice(("", "0", "1", "2", "-1", "x", "C")) for name in names}
    case.encoding = case.r.choice(("utf-8", "ascii", "latin-1", "cp1252"))
    case.what, case.must = f"{case.environment} {case.encoding}", "work"
    if case.r.random() < 0.5:
        (case.folder / "prompts.txt").write_text("ein grüner Stern\n中文 E=mc2\n", "utf-8")
        case.generate("--prompts", case.folder / "prompts.txt")
    else:
        clip = case.take("clips/hop.mp4", "é 中.mp4")
        clip.with_suffix(".txt").write_text("é 中 hopping", "utf-8")
        case.train("--video", clip)


LEFT_BY_SYSTEMS = ("._a.mp4", ".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", "notes.txt")


def priors(case):
    """A folder of regularization clips."""
    method = case.r.choice(("newmove", "dreambooth", "custom-diffusion"))
    folder = case.take("prior")
    if case.r.random() < 0.3:
        case.what, case.must = case.r.choice(LEFT_BY_SYSTEMS), "work"
        (folder / case.what).write_bytes(b"\0\5\26\7\0\2")
    elif case.r.random() < 0.3:
        (folder / "empty").mkdir()
        case.what = "an empty folder"
    else:
        case.spoil(case.r.choice(sorted(p for p in folder.iterdir() if p.suffix == ".mp4")))
        case.must = ""
    case.train(*hop_of(case.place, method), "--prior", folder)


KINDS = {"videos": videos, "weights": weights, "adapters": adapters, "foreign": foreign,
         "states": states, "run files": run_files, "set files": set_files, "texts": texts,
         "flags": flags, "settings": settings, "environment": environments, "priors": priors}


# ------------------------------------------------------------------------------------------------
# One case: run it and judge it


def run(case):
    """Run a case in a fork; returns its outcomes and its stderr."""
    for name in ("tmp", "out"):
        (case.folder / name).mkdir(exist_ok=True)
    before = files_of(case.folder)
    pid = os.fork()
    if not pid:
        act(case)
    code = wait(pid)
    text = (case.folder / "err").read_bytes().decode("utf-8", "replace").strip()
    outcomes = [judge(code, text, case.must)]
    if strange := changed(case, before, files_of(case.folder)):
        outcomes.append("stray")
        text += f" (stray: {strange[0]})"
    if outcomes[0] == "worked" and (wrong := (case.folder / "wrong").read_text()):
        outcomes[0] = "nonsense"
        text += f" (nonsense: {wrong})"
    return outcomes, text


def changed(case, before, after):
    """Files that a command should not have changed, or left."""
    outputs = [os.path.normpath(value) for flag, value in zip(case.argv, case.argv[1:])
               if flag in ("--out", "--save-merged")] + ["err", "wrong"]
    parents = {str(p) for name in outputs for p in Path(name).parents}
    found = []
    for name in after.keys() | before.keys():
        left = (UNFINISHED in name or "/.tmp" in name) and name not in before
        other = after.get(name) != before.get(name) and name not in parents and not any(
            name == out or name.startswith(f"{out}/") for out in outputs)
        if other or left:
            found.append(name)
    return found


def act(case):
    """Run the command as a script would, with the case's folder as the current one."""
    os.chdir(case.folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tempfile.tempdir = str(case.folder / "tmp")
    os.environ.update(case.environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open("err", os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout = open(1, "w", closefd=False, encoding=case.encoding)
    sys.stderr = open(2, "w", closefd=False, encoding=case.encoding, errors="backslashreplace")
    sys.argv, code = ["script", *case.argv], 0
    try:
        machine.run(lambda: case.command(case.argv))
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if not code:  # in the fork, since a decoder's threads in this process would block later forks
        try:
            wrong = case.truth()
        except Exception as error:
            wrong = [repr(error)]
        (case.folder / "wrong").write_text("; ".join(wrong))
    sys.stderr.flush()
    os._exit(code)


def wait(pid, seconds=LIMIT):
    """A process's exit code, or minus its signal. After a limit, which is longer on a busy machine,
    the process gets SIGTERM, and a third of the limit later SIGKILL."""
    started, asked = time.time(), False
    limit = seconds * max(1, os.getloadavg()[0] / os.cpu_count())
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        late = time.time() - started - limit
        if late > 0 and not asked:
            asked = not os.kill(pid, signal.SIGTERM)
        if late > limit / 3:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def files_of(folder):
    """{name: what changes whenever a file changes}."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        found[str(path.relative_to(folder))] = (
            about.st_mode, about.st_size, about.st_mtime_ns if not path.is_dir() else 0)
    return found


GOOD = {"refused", "worked", "long"}  # long: stopped when asked to


def judge(code, text, must):
    """The outcome of a case, from its exit code, its stderr, and `must`."""
    lines = text.splitlines() or [""]
    if code == -signal.SIGKILL:
        return "hang"
    if "Traceback" in text or code == 1:
        return "traceback"
    if code < 0:
        return "crash"
    if code == 2:
        errors = sum(line.startswith("error: ") for line in lines)
        if not lines[-1].startswith("error: ") or errors > 1:
            return "several lines"
        return "refused, but must work" if must == "work" else "refused"
    if code == 0:
        return "nonsense" if must == "refuse" else "worked"
    return "long" if code == 128 + signal.SIGTERM else f"exit code {code}"


# ------------------------------------------------------------------------------------------------
# The campaign


def make_stock(place):
    """Fill a folder with the files that the cases damage."""
    for make in (stock.make_weights, stock.make_clips, stock.make_foreign):
        make(place)
    stock.use(place / "weights")
    (place / "adapters").mkdir()
    for method in ("vmc", "motiondirector", "newmove"):
        command(place, train.main, *hop_of(place, method), *SHORT)
        os.rename(place / f"out/{method}.safetensors", place / f"adapters/{method}.safetensors")
        shutil.rmtree(place / "out")
    command(place, train.main, *hop_of(place, "vmc"), *SHORT, "--steps", 2, *CAPTION)
    os.rename(place / "out", place / "run")
    (place / "prompts.txt").write_text("a red star\na blue ring\n")
    command(place, generate.main, "--adapter", "run/vmc.safetensors", "--prompts", "prompts.txt",
            *QUICK)
    os.rename(place / "out", place / "set")


def command(place, main, *argv):
    """Run a command that makes files of the stock."""
    case = Case(place, place)
    case.call(main, *argv)
    outcomes, text = run(case)
    assert outcomes == ["worked"], f"{argv}: {text}"


@contextlib.contextmanager
def stocked(place):
    """Make the stock in a folder, use its model as the tiny one, and load once what all forks
    share."""
    tiny, make_clip = generate.TINY, scores.clip.tiny_clip
    place.mkdir()
    make_stock(place)
    tokenizer.words_to_ids("a star")
    clip = make_clip()
    scores.clip.tiny_clip = lambda device="cpu": clip
    gc.freeze()  # a collection in a fork would write to every page that it shares
    try:
        yield
    finally:
        gc.unfreeze()
        stock.use(tiny)
        scores.clip.tiny_clip = make_clip


def attempt(place, make, *key):
    """One case, made by `make` in a folder that is kept if it shows a fault: its outcomes, and a
    description of the fault."""
    case = Case(place, Path(tempfile.mkdtemp(dir=place.parent)), *key)
    make(case)
    outcomes, text = run(case)
    if set(outcomes) <= GOOD:
        shutil.rmtree(case.folder)
        return outcomes, ""
    return outcomes, f"{key} in {case.folder}: {case.what}: {outcomes}: {case.argv}\n{text[-300:]}"


def campaign(place, kind, numbers, seed):
    """The faults of some cases of a kind, as text."""
    faults = [attempt(place, KINDS[kind], kind, number, seed)[1] for number in numbers]
    return "\n".join(filter(None, faults))
