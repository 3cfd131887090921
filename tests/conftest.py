"""Shared by the tests: paths, the tiny model, clips, optional packages, and ways to run a command.
"""
import gc
import json
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from fractions import Fraction
from pathlib import Path

# One thread: the tests start processes of their own, and waiting threads slow a shared machine.
# Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import av  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import sampler  # noqa: E402
import train  # noqa: E402
from support import machine, media  # noqa: E402
from tiny import world  # noqa: E402

TINY = ROOT / "tiny" / "weights"

# ZeroScope's UNet and text encoder, and a narrow UNet with all its kinds of layers.
HEAD = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2}
FULL_UNET = HEAD | {
    "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 1024,
    "attention_head_dim": 64,
    "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
    "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3,
}
NARROW_UNET = HEAD | {
    "block_out_channels": [32, 64, 64], "cross_attention_dim": 24, "attention_head_dim": 8,
    "norm_num_groups": 8,
    "down_block_types": ["CrossAttnDownBlock3D"] * 2 + ["DownBlock3D"],
    "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 2,
}
FULL_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
             "num_attention_heads": 16}


def relative(a, b):
    """‖a − b‖ / ‖b‖."""
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------------
# Packages that only the tests need. A test that requests one is skipped where it is missing.


def optional(package):
    """The package, or a skip of the test that requests it."""
    return pytest.importorskip(package, reason=f"{package} is not installed; "
                               "pip install -r requirements-test.txt")


class Optional:
    """A package whose use skips the test where it is missing."""

    def __init__(self, package):
        self.package = package

    def __getattr__(self, name):
        return getattr(optional(self.package), name)


@pytest.fixture(scope="session")
def diffusers():
    return optional("diffusers")


@pytest.fixture(scope="session")
def transformers():
    return optional("transformers")


@pytest.fixture(scope="session")
def peft():
    return optional("peft")


# ------------------------------------------------------------------------------------------------
# Models and clips


@pytest.fixture(scope="session")
def tiny():
    """The tiny model, which no test may change."""
    return model.load(TINY)


@pytest.fixture(scope="session")
def full():
    """ZeroScope's UNet on the meta device: names and shapes without numbers."""
    with torch.device("meta"):
        return model.UNet(model.UNetConfig(**FULL_UNET))


@pytest.fixture(scope="session", autouse=True)
def malloc():
    machine.tune_malloc()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two clips of hopping objects in videos/, each with a caption file, and an image."""
    folder = tmp_path_factory.mktemp("clips")
    scenes = world.sample_scenes(2, torch.Generator().manual_seed(5), ("hopping",))
    videos = world.render(scenes)
    for i, video in enumerate(videos):
        media.write_video(folder / "videos" / f"{i}.mp4", video, world.FPS)
        (folder / "videos" / f"{i}.txt").write_text(f"thing {i} hopping")
    for name in ("thing", "again"):
        Image.fromarray(media.to_pixels(videos[0])[0]).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def hop(folder):
    """The first of the two clips."""
    return folder / "videos" / "0.mp4"


def encode(path, pixels, rate=8, codec="libx264", pix_fmt="yuv420p", times=None, **more):
    """Write pixels (F, H, W, 3 or 4) uint8 as any program might. times: seconds of each frame;
    more: attributes of the codec context. Returns the path."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = pix_fmt
        if times:
            more["time_base"] = Fraction(1, 1000)
        for name, value in more.items():
            setattr(stream.codec_context, name, value)
        for i, image in enumerate(pixels):
            kind = "rgba" if image.shape[2] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(image, format=kind)
            if times:
                frame.pts, frame.time_base = round(1000 * times[i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(autouse=True)
def handlers():
    """A command that runs in this process replaces its signal handlers. This restores them."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def spy(monkeypatch):
    """spy(owner, name, note): from now on, note(…) precedes each call of a function."""
    def replace(owner, name, note):
        function = getattr(owner, name)

        def noted(*args, **more):
            note(*args, **more)
            return function(*args, **more)

        monkeypatch.setattr(owner, name, noted)

    return replace


@pytest.fixture
def bars(monkeypatch):
    """The progress bars of sampling and inversion: {title: steps}."""
    shown = {}

    def bar(total, desc, **more):
        shown[desc] = total
        return tqdm(total=total, desc=desc, **more)

    monkeypatch.setattr(sampler, "tqdm", bar)
    return shown


# ------------------------------------------------------------------------------------------------
# train.py in this process or in a fork of it

FAST = ("--preview-every", 0, "--preview-steps", 2, "--frames", 4)


def flags_of(method, video, out, *more):
    """Flags of a short run: four frames, no previews, two generated regularization clips."""
    flags = ["--method", method, *(("--video", video) if video else ()), "--out", out, *FAST, *more]
    prior = train.METHODS[method].own.get("prior")
    if prior and not {"--prior", "--weights"} & set(more):
        flags.append("num_prior_clips=2")
    return [str(flag) for flag in flags]


def run_training(*args):
    """A whole run of train.py, from the arguments of `flags_of`."""
    train.main(flags_of(*args))


def prepare_run(method, video, parent, *more):
    """A Run that is ready for its first step, in a new folder inside `parent`."""
    parent.mkdir(parents=True, exist_ok=True)
    out = tempfile.mkdtemp(dir=parent)
    return train.prepare(*train.parse(flags_of(method, video, out, *more)))


def log_of(out):
    """The records of a run's log.jsonl."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().split("\n") if line]


def losses_of(out):
    """The losses of a run's steps."""
    return [record["loss"] for record in log_of(out)]


def same_weights(a, b, name="vmc.safetensors"):
    """True if the adapters in two folders are equal."""
    one, two = load_file(a / name), load_file(b / name)
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def expect_error(argv, message, capsys, main=train.main):
    """The command ends with exit code 2, and its last line is an error that matches `message`."""
    with pytest.raises(SystemExit) as stop:
        machine.run(lambda: main([str(a) for a in argv]))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("error: "), lines
    assert re.search(message, lines[-1]), lines[-1]
    assert len([line for line in lines if "error:" in line]) == 1


def fork(action, stderr=os.devnull, **environment):
    """Fork this process and run `action` as a script would. Returns the process id. Unlike a new
    Python, a fork does not import torch again."""
    gc.collect()  # a child cannot free a video frame, whose threads exist in the parent alone
    if pid := os.fork():
        return pid
    os.environ.update(environment)
    tqdm.set_lock(threading.RLock())  # its default lock is shared with the parent
    sys.stderr, code = open(stderr, "w", buffering=1), 0
    os.dup2(sys.stderr.fileno(), 2)  # signal handlers write there
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
