"""What the tests share: where the repository is, the tiny model loaded once, clips to learn from,
and ways to run a command."""
import os
import re
import signal
import sys
import traceback
from pathlib import Path

# One thread for all: the tests start processes of their own, and threads that wait for each other
# on a shared machine cost more than they give. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import sampler  # noqa: E402
import train  # noqa: E402
from support import machine, media  # noqa: E402
from tiny import world  # noqa: E402

TINY = ROOT / "tiny" / "weights"


def relative(a, b):
    """‖a − b‖ / ‖b‖."""
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="session")
def tiny():
    return model.load(TINY)


@pytest.fixture(scope="session", autouse=True)
def threads():
    machine.keep_memory()
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two clips of hopping things, in videos/ with captions beside them, and a picture."""
    folder = tmp_path_factory.mktemp("clips")
    scenes = world.sample_scenes(2, torch.Generator().manual_seed(5), ("hopping",))
    videos = world.render(scenes)
    for i, video in enumerate(videos):
        media.write_video(folder / "videos" / f"{i}.mp4", video, world.FPS)
        (folder / "videos" / f"{i}.txt").write_text(f"thing {i} hopping")
    Image.fromarray(media.to_pixels(videos[0])[0]).save(folder / "thing.png")
    return folder


@pytest.fixture(scope="session")
def hop(folder):
    return folder / "videos" / "0.mp4"


@pytest.fixture(autouse=True)
def handlers():
    """A run that is tested in this process leaves its answers to signals there."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def bars(monkeypatch):
    """The bars that samples and inversions would show if they took long: {name: steps}."""
    shown = {}

    def bar(total, desc, **more):
        shown[desc] = total
        return tqdm(total=total, desc=desc, **more)

    monkeypatch.setattr(sampler, "tqdm", bar)
    return shown


# ------------------------------------------------------------------------------------------------
# train.py in this process, or in a copy of it

FAST = ("--preview-every", 0, "--preview-steps", 2, "--frames", 4)


def flags_of(method, video, out, *more):
    """Flags for a run of few frames without samples, with two prior clips where they are made."""
    flags = ["--method", method, *(("--video", video) if video else ()), "--out", out, *FAST, *more]
    if train.METHODS[method].prior and not {"--prior", "--weights"} & set(more):
        flags.append("prior_clips=2")
    return [str(flag) for flag in flags]


def learn(*args):
    train.main(flags_of(*args))


def prepared(*args):
    """A Run as main makes it, ready for its first step."""
    return train.prepare(*train.parse(flags_of(*args)))


def complain(argv, says, capsys, main=train.main):
    """The command ends with exit code 2 and one line, the last, that says `says`."""
    with pytest.raises(SystemExit) as stop:
        machine.run(lambda: main([str(a) for a in argv]))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("error: "), lines
    assert re.search(says, lines[-1]), lines[-1]
    assert len([line for line in lines if "error:" in line]) == 1


def fork(action, says=os.devnull, **environment):
    """A copy of this process that does something as a script would; its id. What it says to the
    person goes to a file. Costs no import of torch, as a new Python would."""
    if pid := os.fork():
        return pid
    os.environ.update(environment)
    sys.stderr, code = open(says, "w", buffering=1), 0
    try:
        machine.run(action)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 99
    os._exit(code or 0)


def end_of(pid):
    """A process's exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
