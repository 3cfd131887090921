"""A campaign of broken inputs: whatever a file, a flag or a text holds, a command does its work, or
says in one line what is wrong and ends with 2. It leaves no traceback, never hangs, never dies, and
touches no file but what it was asked for.

    python tests/fuzz.py --cases 5000 --seed 0               # prints a table, and each fault
    python tests/fuzz.py --kind weights --number 17          # one case again, with what it said
    python tests/fuzz.py --cases 0 --clips FOLDER            # what must work, and these clips too

Every case is a copy of this process, which has imported torch once, and works on a copy of files
that a very small model made: fuzz_stock.py has these, and the ways to spoil them.
"""
import argparse
import contextlib
import gc
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not survive a fork
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import fuzz_stock as stock  # noqa: E402

import eval as evaluate  # noqa: E402
import generate  # noqa: E402
import scores.clip  # noqa: E402
import train  # noqa: E402
from support import machine, recipe, tokenizer  # noqa: E402
from support.files import PART  # noqa: E402

LIMIT = 30  # seconds, after which a case is asked to stop, and, where it does not, hangs
MEMORY = 6 * 2**30  # bytes that a case may ask for
LEARNED = ["--prompt", "a thing hopping", "sampling_steps=2"]  # the run in the stock
RESUME = [*LEARNED, "--steps", 3, "--resume"]
SHORT = "--steps 1 --frames 4 --preview-every 0 --preview-steps 2 --device cpu --out out".split()
QUICK = "--steps 1 --frames 4 --device cpu --out out".split()
SCORE = "--size 32 --frames 4 --device cpu --no-world --out out".split()


class Case:
    """One broken input: a folder with what it needs, and the command that meets it. `must` is
    "refuse" or "work" where that is known, `what` says what was done."""

    def __init__(self, place, folder, kind, number, seed):
        self.r = random.Random(f"{kind} {number} {seed}")
        self.place, self.folder, self.kind, self.number = place, folder, kind, number
        self.must, self.what, self.command, self.argv = "", "", None, []

    def take(self, name, to=None):
        """A copy of a thing of the stock in the case's folder; its path."""
        source, target = self.place / name, self.folder / (to or Path(name).name)
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, target)
        return target

    def spoil(self, path):
        """Spoil a file in one of the ways that its kind allows."""
        ways = [stock.ruin]
        if path.suffix == ".safetensors":
            ways += [stock.retensor] * 4
        elif path.suffix == ".json":
            ways += [stock.rejson] * 4
        self.what, self.must = self.r.choice(ways)(self.r, path)
        self.what = f"{path.relative_to(self.folder)}: {self.what}"

    def call(self, command, *argv):
        self.command, self.argv = command, [str(a) for a in argv]


# ------------------------------------------------------------------------------------------------
# What is broken, one kind below the other: each spoils what it takes, and names a command


def videos(case):
    """A clip to learn from, or to start from."""
    name = case.r.choice(stock.CLIPS)
    path = case.take(f"clips/{name}")
    if path.is_dir():
        case.spoil(case.r.choice(sorted(path.iterdir())))
    else:
        case.spoil(path)
    case.must = ""  # what can still be decoded of a file is a clip
    if case.r.random() < 0.5:
        case.call(train.main, "--video", path, *SHORT)
    else:
        case.call(generate.main, "--init-video", path, "--prompt", "a star", *QUICK)


def weights(case):
    """A base model's folder: tensors, configurations, files."""
    path = case.take("weights")
    files = [p for p in path.rglob("*") if p.is_file()]
    case.spoil(case.r.choice(sorted(files)))
    case.call(generate.main, "--weights", path, "--prompt", "a star", "--size", "64x64", *QUICK)


def adapters(case):
    """An adapter of ours: its tensors, its story, its clip."""
    path = case.take("adapters") / case.r.choice(("vmc", "motiondirector", "newmove"))
    path = path.with_suffix(".safetensors")
    if case.r.random() < 0.3:
        case.what, case.must = stock.restory(case.r, path)
    else:
        clip = path.with_name(f"{path.stem}.clip.safetensors")
        case.spoil(case.r.choice((path, path, path, clip)))
        if clip.name in case.what or case.what.endswith("gone"):
            case.must = ""  # less of what was learned is still an adapter
    case.call(generate.main, "--adapter", path, "--prompt", "a star", *QUICK)


def foreign(case):
    """Another program's LoRA."""
    path = case.take("foreign")
    name = case.r.choice(stock.FOREIGN)
    case.spoil(path / name if case.r.random() < 0.8 else path / "peft/adapter_config.json")
    if "adapter_config" in case.what:
        name = "peft/adapter_model.safetensors"
    case.call(generate.main, "--adapter", path / name, "--prompt", "a star", *QUICK)


def states(case):
    """What a run goes on from."""
    out = case.take("run", "out")
    way = case.r.choice((stock.ruin, stock.retensor, stock.retensor, stock.retensor))
    case.what, case.must = way(case.r, out / "state.safetensors")
    if case.what == "gone":
        case.must = ""  # then it begins anew
    case.call(train.main, "--video", case.place / "clips/hop.mp4", *SHORT, *RESUME)


def logs(case):
    """A run's log, when it is gone on with and when it is drawn."""
    out = case.take("run", "out" if case.number % 2 else "run")
    case.what, _ = case.r.choice((stock.ruin, stock.relog, stock.relog))(case.r, out / "log.jsonl")
    if case.number % 2:
        case.call(train.main, "--video", case.place / "clips/hop.mp4", *SHORT, *RESUME)
    else:
        case.call(evaluate.main, case.take("set"), *SCORE)


def run_files(case):
    """What train.py says of a run, and its list of files."""
    out = case.take("run", "run")
    case.spoil(out / "run.json")
    if True:
        if not (out / "run.json").is_file():
            case.must = ""  # then it is any folder
        case.call(evaluate.main, case.take("set") if case.number % 3 == 1 else out, *SCORE)


def set_files(case):
    """What generate.py says of a set of videos."""
    path = case.take("set")
    case.spoil(path / "settings.json")
    if not (path / "settings.json").is_file():
        case.must = ""  # then it is a folder of videos
    case.call(evaluate.main, path, *SCORE)


def votes(case):
    """What a study's page saved, and its key."""
    path = case.take("votes")
    case.spoil(path / case.r.choice(("votes.json", "votes.json", "study-key.json")))
    case.must = case.must if "votes.json: gone" in case.what else ""
    case.call(evaluate.main, "--votes", path / "votes.json")


def texts(case):
    """Prompts and captions."""
    text = stock.odd_text(case.r)
    case.what = repr(text[:60])
    if case.r.random() < 0.4:
        case.call(generate.main, "--prompt", text, *QUICK)
        return
    raw = text.encode("utf-8", "surrogateescape")
    path = case.folder / "text.txt"
    if case.r.random() < 0.5:
        path.write_bytes(raw)
        case.call(generate.main, "--prompts", path, *QUICK)
    else:
        clip = case.take("clips/hop.mp4", "text.mp4")
        path.write_bytes(raw)
        case.call(train.main, "--video", clip, *SHORT)


def flags(case, count=1):
    """A flag with an odd value, or several of them."""
    command, base = case.r.choice((
        (train, ["--video", case.place / "clips/hop.mp4", *SHORT]),
        (generate, ["--prompt", "a star", *QUICK]),
        (generate, ["--adapter", case.place / "adapters/vmc.safetensors", "--prompt", "a star",
                    *QUICK]),
        (evaluate, [case.place / "set", *SCORE])))
    argv = []
    for _ in range(count):
        flag = case.r.choice(stock.flags_of(command))
        several = case.r.choice((1, 1, 1, 1, 0, 2))
        argv += [flag, *[stock.odd_value(case.r, case.place) for _ in range(several)]]
    case.what = " ".join(a[:60] for a in argv)
    case.call(command.main, *base, *argv)


def pairs(case):
    """Two flags with odd values."""
    flags(case, 2)


def settings(case):
    """Settings of a recipe, name=value."""
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
    prior = ["--prior", case.place / "prior"] if recipe.METHODS[method].prior else []
    case.call(train.main, "--method", method, "--video", case.place / "clips/hop.mp4", *SHORT,
              *prior, *argv)


def fine(case):
    """What must work."""
    case.must = "work"
    case.what, set_up = stock.FINE[case.number % len(stock.FINE)]
    command, argv = set_up(case)
    main, base = {"train": (train.main, SHORT), "generate": (generate.main, QUICK),
                  "eval": (evaluate.main, SCORE)}[command]
    case.call(main, *base, *argv)


KINDS = {"videos": videos, "weights": weights, "adapters": adapters, "foreign": foreign,
         "states": states, "logs": logs, "run files": run_files, "set files": set_files,
         "votes": votes, "texts": texts, "flags": flags, "pairs": pairs, "settings": settings,
         "fine": fine}


# ------------------------------------------------------------------------------------------------
# One case: run, and judged


OUTCOMES = {
    "refused": "one line, exit 2", "worked": "exit 0", "long": "honest work, stopped when asked to",
    "traceback": "", "hang": "", "lines": "refused, and not in one line", "crash": "by a signal",
    "exit": "another exit code", "nonsense": "worked, and must be refused",
    "lost": "refused, and must work", "stray": "a file written or changed that is not the output"}
GOOD = ("refused", "worked", "long")


def run(case):
    """Run a case in a copy of this process; returns its outcomes and what it said."""
    for name in ("tmp", "out"):
        (case.folder / name).mkdir(exist_ok=True)
    before = files_of(case.folder)
    pid = os.fork()
    if not pid:
        act(case)
    code = wait(pid)
    said = (case.folder / "err").read_bytes().decode("utf-8", "replace").strip()
    outcomes = [judge(code, said, case.must)]
    after = files_of(case.folder)
    mine = "out", "err", *[os.path.normpath(a) for a in case.argv if a and a[:2] != "--"]
    parents = {str(p) for name in mine for p in Path(name).parents}  # of an --out that is deep
    strange = [name for name in after.keys() | before.keys() if PART in name or after.get(name)
               != before.get(name) and not name.startswith(mine) and name not in parents]
    if strange:
        outcomes.append("stray")
        said += f" (stray: {strange[0]})"
    return outcomes, said


def act(case):
    """What the copy does: the command, as a script would, with the case's folder as its own."""
    os.chdir(case.folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tempfile.tempdir = str(case.folder / "tmp")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open("err", os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # as Python has it
    code = 0
    try:
        machine.run(lambda: case.command(case.argv))
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def wait(pid):
    """A process's exit code or, below zero, signal; where it takes too long, it is asked to stop,
    and where it does not, it is killed."""
    started, asked = time.time(), False
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        late = time.time() - started - LIMIT
        if late > 0 and not asked:
            asked = not os.kill(pid, signal.SIGTERM)
        if late > 10:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def files_of(folder):
    """{name: what tells that a file is as it was}."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        found[str(path.relative_to(folder))] = (
            about.st_mode, about.st_size, about.st_mtime_ns if not path.is_dir() else 0)
    return found


def judge(code, said, must):
    """A case's outcome, by its exit code, what it said, and what it must do."""
    lines = said.splitlines() or [""]
    if code == -signal.SIGKILL:
        return "hang"
    if "Traceback" in said or code == 1:
        return "traceback"
    if code < 0:
        return "crash"
    if code == 2:
        if not lines[-1].startswith("error: ") or said.count("error: ") > 1:
            return "lines"
        return "lost" if must == "work" else "refused"
    if code == 0:
        return "nonsense" if must == "refuse" else "worked"
    return "long" if code == 128 + signal.SIGTERM else "exit"


# ------------------------------------------------------------------------------------------------
# The campaign


def make_stock(place):
    """Fill a folder with what the cases spoil."""
    for make in (stock.make_weights, stock.make_clips, stock.make_foreign):
        make(place)
    stock.use(place / "weights")
    clip, out = place / "clips/hop.mp4", place / "adapters"
    hop = ["--video", clip, *SHORT]
    for method, more in (("vmc", ()), ("motiondirector", ()),
                         ("newmove", ("--prior", place / "prior"))):
        command(place, train.main, *hop, "--method", method, *more)
        for file in (place / "out").glob("*.safetensors"):
            out.mkdir(exist_ok=True)
            shutil.copy(file, out)
        shutil.rmtree(place / "out")
    command(place, train.main, *hop, "--steps", 2, *LEARNED)
    os.rename(place / "out", place / "run")
    (place / "prompts.txt").write_text("a red star\na blue ring\n")
    command(place, generate.main, "--adapter", "run/vmc.safetensors", "--prompts", "prompts.txt",
            *QUICK)
    os.rename(place / "out", place / "set")
    (place / "votes").mkdir()
    (place / "votes/study-key.json").write_text('{"1a": "one", "2b": "two"}')
    (place / "votes/votes.json").write_text(
        '{"session": "s", "votes": [{"chosen": "1a", "other": "2b", "ratings": '
        '{"1a": {"motion": 3}, "2b": {"text": 5}}}]}')


def command(place, main, *argv):
    """A command that makes something of the stock; raises RuntimeError where it does not."""
    case = Case(place, place, "stock", 0, 0)
    case.call(main, *argv)
    (place / "tmp").mkdir(exist_ok=True)
    pid = os.fork()
    if not pid:
        act(case)
    if wait(pid):
        raise RuntimeError(f"{argv}: {(place / 'err').read_text()}")


@contextlib.contextmanager
def stocked(place):
    """The stock is in a folder, the very small model stands for the tiny one, and what takes long
    to make and is always the same is made once for all copies of this process."""
    tiny, made = generate.TINY, scores.clip.tiny_clip
    make_stock(place)
    tokenizer.words_to_ids("a star")
    clip = made()
    scores.clip.tiny_clip = lambda device="cpu": clip
    gc.freeze()  # a collection in a copy would write to every page that it shares
    try:
        yield
    finally:
        gc.unfreeze()
        stock.use(tiny)
        scores.clip.tiny_clip = made


def attempt(place, kind, number, seed, keep=None):
    """One case: (the case, its outcomes, what it said)."""
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        case = Case(place, Path(keep or folder), kind, number, seed)
        case.folder.mkdir(exist_ok=True)
        KINDS[kind](case)
        return case, *run(case)


def campaign(place, plan, seed, say=print):
    """Run a plan, [(kind, number)]; returns {kind: Counter of outcomes} and the faults, in text."""
    counts, faults = {}, []
    for kind, number in plan:
        try:
            case, outcomes, said = attempt(place, kind, number, seed)
        except KeyboardInterrupt:  # what was done till then is told
            break
        counts.setdefault(kind, Counter()).update(outcomes)
        last = (said.splitlines() or [""])[-1][:160]
        line = f"{kind} {number} ({case.what[:100]}): {', '.join(outcomes)}: {last}"
        if set(outcomes) - set(GOOD):
            faults.append(line)
        if outcomes not in (["refused"], ["worked"]):  # also what takes long, to be looked at
            say(line, flush=True)
    return counts, faults


def table(counts):
    """The counts as text, a line a kind."""
    rows = [["", "n", *OUTCOMES]]
    for kind, count in counts.items():
        n = sum(v for k, v in count.items() if k != "stray")
        rows.append([kind, n, *[count[name] or "·" for name in OUTCOMES]])
    return "\n".join("".join(f"{cell!s:>10}" for cell in row) for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--cases", type=int, default=500, help="broken inputs, over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="of this kind alone")
    parser.add_argument("--number", type=int, help="this case alone, kept in fuzz-case/")
    parser.add_argument("--clips", type=Path, help="a folder of clips that must work, too")
    args = parser.parse_args()
    kinds = [args.kind] if args.kind else [kind for kind in KINDS if kind != "fine"]
    plan = [(kinds[i % len(kinds)], i // len(kinds)) for i in range(args.cases)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        place = Path(folder) / "stock"
        place.mkdir()
        stack.enter_context(stocked(place))
        stock.FINE.extend(stock.real_clips(args.clips))
        if args.number is not None:
            case, outcomes, said = attempt(place, args.kind, args.number, args.seed,
                                           Path("fuzz-case").resolve())
            print(case.what, *case.argv, said, outcomes, sep="\n")
            return
        plan += [("fine", n) for n in range(len(stock.FINE))] if not args.kind else []
        counts, faults = campaign(place, plan, args.seed)
        print(table(counts), f"{len(faults)} faults", sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
