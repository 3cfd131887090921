"""Where a command runs: devices and precision, torchrun's processes, signals, and how it ends.
"""
import contextlib
import ctypes
import os
import re
import signal
import sys
from datetime import timedelta

import torch
from safetensors import SafetensorError

try:  # the one is of Unix, the other of Windows
    import fcntl
    msvcrt = None
except ImportError:
    fcntl = None
    import msvcrt

from support.files import BadInput, say

# ------------------------------------------------------------------------------------------------
# The device

# The most bytes that a training step at full size keeps for the backward pass, for each pixel of
# the latents of all clips in a batch (emulated by benchmarks/memory.py: see docs/speed.md).
ACTIVATIONS = 530_000


def find_device(device=None):
    """The device that a flag names, or the default; under torchrun each process has its own GPU.
    Raises BadInput when it cannot be used."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:80]
        raise BadInput(f"--device {device} cannot be used ({reason}); give cpu or cuda.") from None
    return device


def default_precision(device):
    """bf16 wherever the hardware multiplies it faster than fp32, else fp32."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if supported() else "fp32"


def autocast(device, precision):
    """The context in which the networks run: bf16 products, or plain fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def keep_memory():
    """Ask glibc to keep freed memory instead of handing it back to the system and asking again.

    On a Linux CPU a training step maps and unmaps all its activations otherwise, which can cost
    several times the arithmetic. Call it before the first large tensor; elsewhere it does nothing.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        trim, top_pad, mmap = -1, -2, -3  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
        for option, size in ((mmap, 1 << 30), (trim, (1 << 31) - 1), (top_pad, 256 << 20)):
            libc.mallopt(option, size)
    except (OSError, AttributeError):
        pass


def explain_load():
    """Say in one line, where others keep the machine busy, what may be faster: threads wait for the
    one that got no core."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows, and where no one knows
        return
    if load > os.cpu_count() and torch.get_num_threads() > 1:
        say(f"note: the machine is busy (load {load:.0f}, {os.cpu_count()} cores); "
            "OMP_NUM_THREADS=1 before the command may be faster")


def send(tensor, device):
    """A tensor on the device, without waiting for it: a GPU reads it from pinned memory."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def checkpointing(flags, learning, clips=1):
    """Whether activations are computed again in the backward pass: as the flag says, or on `auto`
    where the card has no room for them. learning: the parameters that learn; clips: how many go
    through the network as one batch."""
    if flags.checkpointing != "auto":
        return flags.checkpointing == "on"
    if torch.device(flags.device).type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(flags.device)
    # What PyTorch has from the card and does not use is free, too.
    free += torch.cuda.memory_reserved(flags.device) - torch.cuda.memory_allocated(flags.device)
    pixels = clips * flags.frames * flags.size[0] * flags.size[1] // 64
    return step_memory(pixels, sum(p.nbytes for p in learning)) > 0.9 * free


def step_memory(pixels, learning):
    """Bytes that a training step needs beside the weights: its activations, and for the parameters
    that learn, so many bytes of fp32, their gradients, Adam's two moments and copies in bf16."""
    return ACTIVATIONS * pixels + 3.5 * learning


# ------------------------------------------------------------------------------------------------
# Several processes, started by torchrun


def place(device):
    """This process's number and their count: torchrun's, which meet here, else 0 and 1."""
    number, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if count > 1 and not torch.distributed.is_initialized():
        kind = torch.device(device).type
        if kind == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
                                             timeout=timedelta(days=1))  # samples take long
    return number, count


def agreed(value):
    """The first process's value, in all of them."""
    if torch.distributed.is_initialized():
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]
    return value


def gather(mine):
    """The dicts of all processes as one, in the first process; {} in the others."""
    if not torch.distributed.is_initialized():
        return mine
    parts = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    first = torch.distributed.get_rank() == 0
    return {k: v for part in parts for k, v in part.items()} if first else {}


@torch.no_grad()
def add_gradients(parameters):
    """Sum gradients over the processes. A parameter that learned in some of them alone counts as 0
    in the others; one that learned nowhere keeps None, so that the optimiser passes it by."""
    if not torch.distributed.is_initialized():
        return
    parameters = list(parameters)
    learned = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32,
                           device=parameters[0].device)
    torch.distributed.all_reduce(learned)
    for p, count in zip(parameters, learned.tolist()):
        if count:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad)


# ------------------------------------------------------------------------------------------------
# One folder, one run


def lock(path):
    """An open file that no other command can lock until it is closed, or its process has ended.
    Raises BadInput where one has."""
    file = path.open("a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        file.close()
        raise BadInput(f"{path.parent} is in use by another run; give another --out.") from None
    except OSError:  # a file system without locks
        pass
    return file


# ------------------------------------------------------------------------------------------------
# Stopping


class Stop:
    """The first SIGINT or SIGTERM asks for a stop after the step, in all processes; the second
    stops at once."""

    def __init__(self):
        self.signal = self.caught = None  # what all agree on, and what came here
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.catch)

    def catch(self, number, frame):
        if self.caught and "WORLD_SIZE" not in os.environ:  # torchrun passes signals on twice
            os._exit(128 + number)
        self.signal = self.caught = number
        say_at_once("\nstopping after this step; once more to stop at once")

    def agree(self, device):
        """Before a step: if one process was asked to stop, all were."""
        if torch.distributed.is_initialized():
            asked = torch.tensor(self.caught or 0, device=device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.signal = asked.item() or None
        return self.signal


def say_at_once(text):
    """`say` for what a signal interrupts, which may be writing to the same stream."""
    try:
        say(text)
    except RuntimeError:  # Python lets no one into a stream twice
        os.write(2, f"{text}\n".encode())


class Pipe:
    """A stream whose reader may leave, as that of `| head -1` does: what is written after that is
    lost, and nothing ends because of it."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, act, *args):
        try:
            act(*args)
        except BrokenPipeError:  # the stream's own buffer goes there too, when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def leave(number, frame):
    """What a signal does while there is nothing to save: one line, and the end."""
    say_at_once("stopped")
    raise SystemExit(128 + number)


def run(command):
    """Run a script's main; a person's mistake becomes one line and exit code 2."""
    caught = {s: signal.signal(s, leave) for s in (signal.SIGINT, signal.SIGTERM)}
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and Pipe(stream) for stream in streams)
    try:
        return command()
    except Exception as error:
        line = mistake(error)
        if line is None:
            raise
        say(f"error: {' '.join(line.split())}")
        sys.exit(2)
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        sys.stdout, sys.stderr = streams
        for s, handler in caught.items():
            signal.signal(s, handler)


MEMORY = r"not enough memory|can't allocate memory|[Oo]ut of memory|Unable to allocate"
WRITING = r"PytorchStreamWriter|file write failed|inline_container|unexpected pos"


def mistake(error):
    """What to tell a person of an error that is theirs, or their machine's; None for our own."""
    text = str(error)
    if isinstance(error, BadInput):
        return text
    if isinstance(error, RuntimeError) and text.startswith("Symlink loop"):  # of Path.resolve
        return f"{text}: a link that leads nowhere; give the file itself."
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
            isinstance(error, RuntimeError) and re.search(MEMORY, text)):
        return ("out of memory at the size printed above. Try, in this order: --checkpointing on "
                "(when training), a smaller --size, fewer --frames, --batch 1.")
    if isinstance(error, OSError):  # a disk that is full, a folder that is a file, no permission
        where = f"{error.filename or 'a file'}: {error.strerror or error}"
    elif isinstance(error, SafetensorError) or (
            isinstance(error, RuntimeError) and re.search(WRITING, text)):
        where = f"a file could not be written ({text[:120]})"
    else:
        return None
    return f"{where}; give another --out, or free some space."
