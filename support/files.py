"""Reading what people give, and writing what they keep: nothing here can run what is in a file,
whatever is wrong with one is told in one line, and nothing that is written is ever half there.
"""
import argparse
import contextlib
import fcntl
import itertools
import json
import math
import os
import re
import sys
import tempfile
import types
import typing
from dataclasses import MISSING, field, fields
from pathlib import Path

import torch
from safetensors.torch import load_file


class BadInput(argparse.ArgumentTypeError, ValueError):
    """What a person gave cannot be used; the message says what was found, wanted and to be done.
    argparse tells it beside the flag."""


def say(text):
    """A line for the person at the terminal, apart from the program's results."""
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------
# In


@contextlib.contextmanager
def reading(path, do="get it again"):
    """Whatever goes wrong in the block, where a person's file is read, becomes one line that names
    the file; so a reader is written for files that are right. do: what to do then."""
    try:
        if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
            raise BadInput(f"{path} is no file; give the file itself.")  # one would wait for a pipe
        yield
    except (BadInput, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise BadInput(f"{path} cannot be used ({said}); {do}.") from error


def read_json(path):
    """The object in a JSON file. Raises BadInput when there is none."""
    with reading(path):
        values = json.loads(Path(path).read_text())
        json.dumps(values, ensure_ascii=False).encode()  # lone surrogates are no text
        return dict(values.items())


def number(least, most, default=MISSING):
    """A dataclass field: a number, or a list of them, within least … most."""
    return field(default=default, metadata={"least": least, "most": most})


def one_of(*known):
    """A dataclass field of few known values, of which the first is the default."""
    return field(default=known[0], metadata={"known": known})


def read_fields(cls, values, source):
    """A dataclass of the values that a file holds for its fields; names that are not its own are
    left alone. Its types may be int, float, bool, str, lists of these, and None beside them.

    Raises BadInput, naming the source, for what is missing, of another type, not finite, or outside
    what the field says (`number`, `one_of`).
    """
    chosen = {f.name: values[f.name] for f in fields(cls) if f.name in values}
    wrong = misfits(cls, values) + [f"{f.name} is missing" for f in fields(cls)
                                    if f.name not in values
                                    and f.default is MISSING is f.default_factory]
    try:
        if wrong:
            raise BadInput("; ".join(wrong[:3]))
        return cls(**chosen)  # which may find that its fields do not go together
    except BadInput as error:
        raise BadInput(f"{source}: {error}. Take the file beside the weights.") from None


def misfits(cls, values):
    """What is wrong with those of a dataclass's fields that `values` has, in words."""
    return [f"{f.name} is {repr(values[f.name])[:60]}, wanted {wanted}" for f in fields(cls)
            if f.name in values and (wanted := unlike(f, values[f.name]))]


def unlike(f, value):
    """What a field wants, when the value is not that; else None."""
    known, least, most = (f.metadata.get(name) for name in ("known", "least", "most"))
    if known:
        fits = any(value == k and isinstance(value, bool) == isinstance(k, bool) for k in known)
        return None if fits else " or ".join(map(repr, known))
    if not _is(value, f.type):
        return getattr(f.type, "__name__", str(f.type)) if f.type in (int, float) else str(f.type)
    several = value if isinstance(value, list) else [value]
    if f.type in (int, list[int]) and least is None:
        least, most = 1, 2**16
    if least is not None and not all(v is None or least <= v <= most for v in several):
        return f"{least:g} to {most:g}"
    return None if 0 < len(several) <= 64 else "1 to 64 of them"


def _is(value, kind):
    """isinstance, with lists and unions, where a float may be written as an int, and none is NaN,
    infinite or a truth value."""
    if isinstance(kind, types.UnionType):
        return any(_is(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_is(v, *typing.get_args(kind)) for v in value)
    if kind in (int, float):
        return type(value) in {int: (int,), float: (int, float)}[kind] and abs(value) < 1e18
    return isinstance(value, kind)


WHOLE = ("position_ids", "num_batches_tracked", "alpha")  # names that may hold whole numbers


def read_tensors(path, lists=False):
    """The tensors of a .safetensors, .bin, .pt or .pth file, by name, or, where `lists` are allowed
    too, a file's plain list of tensors. Nothing in the file can run. Raises BadInput when it is
    missing, damaged, or holds anything but finite floating-point numbers."""
    with reading(path, "download or save it again"):
        if Path(path).suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state) if isinstance(state, dict) else state
        named = state if isinstance(state, dict) or not lists else dict(enumerate(state))
        for name, tensor in named.items():
            whole = str(name).endswith(WHOLE) and not tensor.is_complex()
            if not (tensor.is_floating_point() or whole) or not torch.isfinite(tensor).all():
                raise BadInput(f"{path}: {str(name)[:80]} holds NaN, infinity, or {tensor.dtype}; "
                               "download or save it again.")
        return state


# ------------------------------------------------------------------------------------------------
# What flags name, judged before anything is loaded


def check_weights(path, flag="--weights"):
    """Raises BadInput, with the way to get it, when a weights folder is not here. None, the tiny
    model, always is."""
    if path is None or Path(path).is_dir():
        return
    model = re.fullmatch(r"(?:.*(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+)", str(path))
    if model and not Path(path).parent.is_dir():
        folder = model[1].partition("/")[2]
        raise BadInput(f"{flag} {path} is not a folder here. A model of the Hugging Face hub is "
                       f"fetched by: hf download {model[1]} --local-dir {folder} (hf comes with "
                       f"pip install huggingface_hub); then give {flag} {folder}")
    raise BadInput(f"{flag} {path} is not a folder here; give one in the hub's layout: unet/, vae/,"
                   " text_encoder/ and scheduler/ (ZeroScope: hf download "
                   "cerspense/zeroscope_v2_576w --local-dir zeroscope_v2_576w).")


def check_there(path, instead):
    """Raises BadInput where there is nothing at a path; instead: what to give, in words."""
    if not Path(path).exists():
        raise BadInput(f"{path} does not exist here; {instead}.")


def read_size(text):
    """"576x320", a width and a height in pixels, as (height, width). Raises BadInput."""
    found = re.fullmatch(r"(\d{1,4})[x×X](\d{1,4})", text.strip(), re.ASCII)
    sides = [int(side) for side in found.groups()] if found else [0]
    if any(side % 8 or not 8 <= side <= 4096 for side in sides):
        raise BadInput(f"{text!r}: wanted WIDTHxHEIGHT in pixels, multiples of 8 up to 4096, such "
                       "as 576x320.")
    return sides[1], sides[0]


# ------------------------------------------------------------------------------------------------
# Out


PART = ".part-"  # files that are being written


@contextlib.contextmanager
def publish(path):
    """A temporary path beside `path`; when the block ends well it is flushed to disk and takes the
    name, so a reader meets the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=PART, suffix=path.suffix)
    os.close(handle)
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~umask)  # temporary files, and safetensors', are private
        with open(name, "rb+") as file:  # open for writing: Windows flushes no other
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def finite(value):
    """The same with None for what JSON cannot hold: NaN and infinity."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, content):
    """Write a JSON file, whole or not at all. Paths become text."""
    with publish(path) as part:
        text = json.dumps(finite(content), indent=1, ensure_ascii=False, default=str)
        part.write_text(text + "\n")


@contextlib.contextmanager
def own_folder(out, default, resume=False):
    """A folder that nobody else writes in while the block runs: one that was not there, or held
    nothing; to `resume`, the one of a run. What is in a folder is never replaced: of the default,
    out-2, out-3 … come next. Raises BadInput."""
    folder = Path(out or default)
    if not out and not resume:
        others = (default.with_name(f"{default.name}-{n}") for n in itertools.count(2))
        folder = next(f for f in itertools.chain([default], others) if not f.exists())
    if resume and not folder.is_dir():
        raise BadInput(f"{folder} is not there, so there is nothing to resume; leave --resume out.")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # closed by the system, too, however the process ends
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        inside = {p.name for p in folder.iterdir() if not p.name.startswith(PART)}
        if inside and not (resume and ("run.json" in inside or inside == {"prior"})):
            raise BadInput(f"--out {folder} holds files{' and no run' * resume}; give a new folder"
                           f"{', or --resume' * ('run.json' in inside)}.")
        for left in folder.rglob(PART + "*"):  # of a run that was killed while it wrote
            left.unlink()
        yield folder
    except BlockingIOError:
        raise BadInput(f"{folder} is in use by another command; give another --out.") from None
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            folder.rmdir()  # where nothing was written


def slug(text, longest=48):
    """A file name from a text: letters, digits and dashes alone, so it stays in its folder."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:longest].strip("-") or "untitled"
