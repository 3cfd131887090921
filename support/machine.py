"""Where a command runs: devices and precision, torchrun's processes, signals, and how it ends.
"""
import contextlib
import ctypes
import os
import signal
import sys
from datetime import timedelta

import torch

try:  # the one is of Unix, the other of Windows
    import fcntl
    msvcrt = None
except ImportError:
    fcntl = None
    import msvcrt

from support.files import BadInput, say

# ------------------------------------------------------------------------------------------------
# The device

# Bytes that a training step at full size keeps for each latent pixel of a clip (emulated: see
# docs/speed.md), from which `checkpointing` tells whether a card will do.
ACTIVATIONS = 340_000


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


def send(tensor, device):
    """A CPU tensor on the device, without waiting for it: a GPU reads it from pinned memory."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def checkpointing(flags):
    """Whether activations are computed again in the backward pass: as the flag says, or on `auto`
    where the device's free memory would not hold them."""
    if flags.checkpointing != "auto":
        return flags.checkpointing == "on"
    if torch.device(flags.device).type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(flags.device)
    latents = flags.frames * flags.size[0] * flags.size[1] // 64
    return ACTIVATIONS * latents > 0.8 * free


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
    except OSError:
        raise BadInput(f"{path.parent} is in use by another run; give another --out.") from None
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
        say("\nstopping after this step; once more to stop at once")

    def agree(self, device):
        """Before a step: if one process was asked to stop, all were."""
        if torch.distributed.is_initialized():
            asked = torch.tensor(self.signal or 0, device=device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.signal = asked.item() or None
        return self.signal


def run(command):
    """Run a script's main; a person's mistake becomes one line and exit code 2."""
    try:
        return command()
    except BadInput as error:
        line = str(error)
    except torch.OutOfMemoryError:
        line = ("out of memory at the size printed above. Try, in this order: --checkpointing on "
                "(when training), a smaller --size, fewer --frames, --batch 1.")
    except OSError as error:  # a disk that is full, a folder that is a file, no permission
        line = (f"{error.filename or 'a file'}: {error.strerror or error}; "
                "give another --out, or free some space.")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)
