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

from support.files import BadInput, say

# ------------------------------------------------------------------------------------------------
# The device


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
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        trim, top_pad, mmap = -1, -2, -3  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
        for option, size in ((mmap, 1 << 30), (trim, (1 << 31) - 1), (top_pad, 256 << 20)):
            libc.mallopt(option, size)


def send(tensor, device):
    """A tensor on the device, without waiting for it: a GPU reads it from pinned memory."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------
# Several processes, started by torchrun


def place(device):
    """This process's number and their count: torchrun's, which meet here, else 0 and 1."""
    number, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if count > 1 and not torch.distributed.is_initialized():
        cuda = torch.device(device).type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                             timeout=timedelta(days=1))  # samples take long
    return number, count


def agreed(value):
    """The first process's value, in all of them."""
    values = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values)
    return values[0]


@contextlib.contextmanager
def first_alone(context, *args):
    """What a context gives, which the first process alone is in, in all of them."""
    first = int(os.environ.get("RANK", 0)) == 0
    with context(*args) if first else contextlib.nullcontext() as value:
        yield agreed(value)


@torch.no_grad()
def add_gradients(parameters):
    """Sum gradients over the processes. A parameter that learned in some of them alone counts as 0
    in the others; one that learned nowhere keeps None, so that the optimiser passes it by."""
    if not torch.distributed.is_initialized():
        return
    learned = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32,
                           device=parameters[0].device)
    torch.distributed.all_reduce(learned)
    for p, count in zip(parameters, learned.tolist()):
        if count:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad)


# ------------------------------------------------------------------------------------------------
# Stopping, and the end


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
        os.write(2, b"\nstopping after this step; once more to stop at once\n")  # no print: it
        # may be one that was interrupted

    def agree(self, device):
        """Before a step: if one process was asked to stop, all were."""
        if torch.distributed.is_initialized():
            asked = torch.tensor(self.caught or 0, device=device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.signal = asked.item() or None
        return self.signal


def leave(number, frame):
    """What a signal does while there is nothing to save: one line, and the end."""
    os.write(2, b"stopped\n")
    raise SystemExit(128 + number)


def run(command):
    """Run a script's main; a person's mistake, or their machine's, becomes one line and exit code
    2. What is left is a mistake of the code's, which Python shows."""
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, leave)
    try:
        return command()
    except BrokenPipeError:  # of `| head -1`: its reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except Exception as error:
        line = mistake(error)
        if line is None:
            raise
        say(f"error: {' '.join(line.split())}")
        sys.exit(2)


MEMORY = r"not enough memory|can't allocate memory|[Oo]ut of memory|Unable to allocate"


def mistake(error):
    """What to tell a person of an error that is theirs, or their machine's; None for our own."""
    text, kind = str(error), type(error).__name__
    if isinstance(error, BadInput):
        return text
    if isinstance(error, UnicodeError):
        return f"a text or a name is not UTF-8 ({text[:80]}); type it again, or rename the file."
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
            isinstance(error, RuntimeError) and re.search(MEMORY, text)):
        return ("out of memory at the size printed above. Try, in this order: --checkpointing on "
                "(when training), a smaller --size, fewer --frames, --batch 1.")
    if isinstance(error, OSError):  # a disk that is full, a folder that is a file, no permission
        return (f"{error.filename or 'a file'}: {error.strerror or error}; give another --out, or "
                "free some space.")
    if kind == "SafetensorError" or "PytorchStreamWriter" in text or "file write failed" in text:
        return f"a file could not be written ({text[:120]}); give another --out, or free some space."
    return None
