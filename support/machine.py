"""Device and precision, processes under torchrun, signals, and errors that end a command."""
import contextlib
import ctypes
import errno
import os
import re
import signal
import sys
from datetime import timedelta

import torch

from support.files import BadInput, log

# --- Device and precision -----------------------------------------------------------------------


def find_device(device=None):
    """The device of --device, or the default. Under torchrun each process has its own GPU. Raises
    BadInput if the device cannot be used."""
    device = device or ("cuda" if torch.cuda.is_available() else
                        "mps" if torch.backends.mps.is_available() else "cpu")
    if device == "cuda" and distributed():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=device).item()  # fails on the device "meta" too
        return device
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:80]
        raise BadInput(f"--device {device} cannot be used ({reason}); give cpu, cuda or "
                       "mps.") from None


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def default_precision(device):
    """bf16 if the hardware supports it; fp16 on older GPUs; else fp32."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if torch.device(device).type == "cpu" and supported() else "fp32"


def autocast(device, precision):
    """The autocast context of the networks: matrix products in bf16 or fp16; none for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, DTYPES[precision])


def tune_malloc():
    """Make glibc keep freed memory instead of returning it to the system.

    Otherwise a training step on a Linux CPU maps and unmaps all its activations, which can take
    several times as long as the computation. Call it before the first large tensor.
    """
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        libc = ctypes.CDLL("libc.so.6")
        trim, top_pad, mmap = -1, -2, -3  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
        for option, size in ((mmap, 1 << 30), (trim, (1 << 31) - 1), (top_pad, 256 << 20)):
            libc.mallopt(option, size)


def to_device(tensor, device):
    """Copy a tensor to the device; to CUDA from pinned memory, without a synchronization. On MPS,
    such a copy could read memory that is already freed (PyTorch #189690)."""
    cuda = torch.device(device).type == "cuda"
    if cuda and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=cuda)


# --- Several processes, started by torchrun -----------------------------------------------------


def distributed():
    """True under torchrun. RANK and WORLD_SIZE alone may come from other launchers."""
    return {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def init_distributed(device):
    """Connect the processes of torchrun. Returns (rank, world size)."""
    if not distributed():
        return 0, 1
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if count > 1 and not torch.distributed.is_initialized():
        cuda = torch.device(device).type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                             timeout=timedelta(days=1))  # sampling takes long
    return rank, count


def broadcast(value):
    """Broadcast the value of rank 0 to all processes."""
    values = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values)
    return values[0]


@contextlib.contextmanager
def on_rank_zero(context, *args):
    """Enter a context in rank 0 only, and broadcast its value."""
    first = not distributed() or os.environ["RANK"] == "0"
    with context(*args) if first else contextlib.nullcontext() as value:
        yield broadcast(value)


@torch.no_grad()
def all_reduce_gradients(parameters):
    """Sum gradients over all processes. A missing gradient counts as 0; if it is missing in all
    processes, it stays None, so that the optimizer skips the parameter."""
    if not torch.distributed.is_initialized():
        return
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32,
                           device=parameters[0].device)
    torch.distributed.all_reduce(present)
    for p, count in zip(parameters, present.tolist()):
        if count:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad)


# --- Signals and errors -------------------------------------------------------------------------


class Stop:
    """SIGINT or SIGTERM stops all processes after the step; a second signal stops at once."""

    in_progress = False

    def __init__(self):
        self.signal = self.caught = None  # of any process, and of this one
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.catch)

    def catch(self, number, frame):
        if self.caught and not distributed():  # torchrun passes each signal on twice
            os._exit(128 + number)
        self.signal = self.caught = number
        Stop.in_progress = True
        write_stderr(b"\nstopping after this step; send the signal again to stop at once\n")

    def agree(self, device):
        """The signal that any process received, or None. Called before each step."""
        if torch.distributed.is_initialized():
            signal_number = torch.tensor(self.caught or 0, device=device)
            torch.distributed.all_reduce(signal_number, torch.distributed.ReduceOp.MAX)
            self.signal = signal_number.item() or None
        return self.signal


def exit_on_signal(number, frame):
    """The signal handler outside of training: print one line and exit."""
    write_stderr(b"stopped\n")
    raise SystemExit(128 + number)


def write_stderr(line):
    """Print in a signal handler, without print, which the signal may have interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, line)


class Output:
    """stdout or stderr. If its reader is gone, e.g. of `| head -1`, writing raises BrokenPipeError,
    but not while training stops, since Ctrl-C also ends `| tee log.txt`."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Write a text."""
        return self._call("write", text)

    def flush(self):
        """Flush the stream."""
        self._call("flush")

    def _call(self, name, *args):
        try:
            return getattr(self.stream, name)(*args)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if not Stop.in_progress:
                raise


def run(command):
    """Run a script's main. Errors of the user and the machine become one line and exit code 2;
    other exceptions keep their traceback."""
    Stop.in_progress = False
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        if hasattr(stream, "reconfigure") and not isinstance(stream, Output):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
            setattr(sys, name, Output(stream))
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, exit_on_signal)
    try:
        " ".join(sys.argv).encode()  # raises for arguments that are not UTF-8
        return command()
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        line = user_error(error)
        if line is None:
            raise
        log(f"error: {' '.join(line.split())}")
        sys.exit(2)


MEMORY = r"not enough memory|can't allocate memory|[Oo]ut of memory|Unable to allocate"


def user_error(error):
    """One line for an error of the user or the machine; None for an error in the code."""
    text, kind = str(error), type(error).__name__
    if isinstance(error, BadInput):
        return text
    if isinstance(error, UnicodeError):
        return (f"a text or a file name is not UTF-8 ({text[:80]}); correct or rename it, or set "
                "PYTHONUTF8=1 if the locale is not UTF-8.")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
            isinstance(error, RuntimeError) and re.search(MEMORY, text)):
        return ("out of memory. Try, in this order: --checkpointing on (when training), a smaller "
                "--size, fewer --frames, --batch 1.")
    if isinstance(error, OSError):  # disk full, no permission, a folder in place of a file
        advice = "check its permissions" if error.errno == errno.EACCES else "free disk space"
        return (f"{error.filename or 'a file, or stdout'}: {error.strerror or error}; {advice}, or "
                "give another --out.")
    if kind == "SafetensorError" or "PytorchStreamWriter" in text or "file write failed" in text:
        return f"a file cannot be written ({text[:120]}); give another --out, or free disk space."
    return None
