"""Reading the user's files and writing outputs. No file can run code, every error is one line, and
an output file appears complete or not at all.
"""
import argparse
import codecs
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import types
import typing
import zipfile
from dataclasses import MISSING, field, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


class BadInput(argparse.ArgumentTypeError, ValueError):
    """Input that cannot be used. The message names the value found, the value expected and the fix.
    argparse prints it next to the flag."""


def print_line(text):
    """Print a line of results to stdout. Control characters are escaped."""
    print(escaped(text), flush=True)


def log(text):
    """Print a line for the user to stderr. Control characters are escaped."""
    print(escaped(text), file=sys.stderr, flush=True)


def escaped(text):
    """Text with its control characters written as \\x1b, \\n and so on, so it stays one line."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda m: repr(m[0])[1:-1], str(text))


# --- Reading ------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path, advice="download or create it again"):
    """Turn any error in the block, which reads a user's file, into a one-line BadInput that names
    the file and ends with the advice. Readers can then assume correct files."""
    try:
        if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
            raise BadInput(f"{path} is not a regular file; give the file itself.")  # a pipe blocks
        yield
    except (BadInput, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise BadInput(f"{path} cannot be used ({reason}); {advice}.") from error


def read_json(path):
    """The object in a JSON file. Raises BadInput."""
    with reading(path):
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        json.dumps(values, ensure_ascii=False).encode()  # raises for lone surrogates
        return dict(values.items())


def read_text(path):
    """The text of a file of at most 1 MB: UTF-8, or UTF-16 with a byte-order mark. Raises BadInput.
    """
    with reading(path, "save it as UTF-8 text"):
        if Path(path).stat().st_size > 2**20:
            raise ValueError("larger than 1 MB")
        raw = Path(path).read_bytes()
        marked = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = raw.decode("utf-16" if marked else "utf-8-sig")
        if "\0" in text:
            raise ValueError("neither UTF-8 nor UTF-16 with a byte-order mark")
        return text


def number(low, high, default=MISSING):
    """A dataclass field: a number, or a list of them, within low … high."""
    return field(default=default, metadata={"low": low, "high": high})


def one_of(*known):
    """A dataclass field with a few known values. The first is the default."""
    return field(default=known[0], metadata={"known": known})


def read_fields(cls, values, source):
    """A dataclass from the values that a file gives for its fields. Other names are ignored. Types
    may be int, float, bool, str, lists of these, and None.

    Raises BadInput, naming the source, for values that are missing, of another type, not finite, or
    outside the field's range (`number`, `one_of`).
    """
    given = {f.name: values[f.name] for f in fields(cls) if f.name in values}
    wrong = field_errors(cls, given)
    for f in fields(cls):
        if f.name not in given and f.default is MISSING and f.default_factory is MISSING:
            wrong.append(f"{f.name} is missing")
    if wrong:
        raise BadInput(f"{source}: {'; '.join(wrong[:3])}. Restore the original file.")
    return cls(**given)


def field_errors(cls, values):
    """One message per wrong value, of {name: value} for fields of a dataclass."""
    wrong = []
    for f in fields(cls):
        if f.name in values and (expected := expected_values(f, values[f.name])):
            wrong.append(f"{f.name} is {repr(values[f.name])[:60]}, expected {expected}")
    return wrong


def expected_values(f, value):
    """The values that a field accepts, as text, if `value` is not one of them; else None."""
    known, low, high = (f.metadata.get(name) for name in ("known", "low", "high"))
    if known:
        fits = any(value == k and isinstance(value, bool) == isinstance(k, bool) for k in known)
        return None if fits else " or ".join(map(repr, known))
    if not has_type(value, f.type):
        return getattr(f.type, "__name__", str(f.type)) if f.type in (int, float) else str(f.type)
    several = value if isinstance(value, list) else [value]
    if f.type in (int, list[int]) and low is None:
        low, high = 1, 2**16
    if low is not None and not all(v is None or low <= v <= high for v in several):
        return f"{low:g} to {high:g}"
    if f.default_factory is not MISSING:  # a list of any length
        return None
    return None if 0 < len(several) <= 64 else "1 to 64 values"


def has_type(value, kind):
    """isinstance, also for lists and unions. A float may be written as an int. Numbers are finite,
    and a bool is not a number."""
    if isinstance(kind, types.UnionType):
        return any(has_type(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(has_type(v, *typing.get_args(kind)) for v in value)
    if kind in (int, float):
        return type(value) in {int: (int,), float: (int, float)}[kind] and abs(value) < 1e18
    return isinstance(value, kind)


# --- Tensors ------------------------------------------------------------------------------------


INTEGERS = ("position_ids", "num_batches_tracked", "alpha")  # names that may hold integers


def read_tensors(path, lists=False):
    """The tensors of a .safetensors, .bin, .pt or .pth file by name; with `lists`, a plain list of
    tensors is accepted too. Raises BadInput when the file is missing, damaged, or holds anything
    except finite floating-point numbers."""
    with reading(path, "download or save it again"):
        if Path(path).suffix == ".safetensors":
            state = load_file(path)
            check_digest(path, state)
        else:
            check_pickle(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state) if isinstance(state, dict) else state
        named = state if isinstance(state, dict) or not lists else dict(enumerate(state))
        for name, tensor in named.items():
            integer = str(name).endswith(INTEGERS) and not tensor.is_complex()
            if tensor.nbytes > tensor.untyped_storage().nbytes():  # expanded: would not fit memory
                raise BadInput(f"{path}: {str(name)[:80]} is larger than its data; save it again.")
            if not (tensor.is_floating_point() or integer) or not torch.isfinite(tensor).all():
                raise BadInput(f"{path}: {str(name)[:80]} holds NaN, infinity, or {tensor.dtype}; "
                               "download or save it again.")
        return state


def check_pickle(path):
    """Raises ValueError for a damaged archive and for a pickle that could allocate any amount of
    memory. `torch.load(weights_only=True)` allows bytearray(n)."""
    if not zipfile.is_zipfile(path):
        pickles = [Path(path).read_bytes()]
    else:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type for part in archive.infolist()):  # never by torch.save
                raise ValueError("it is compressed")
            if damaged := archive.testzip():
                raise ValueError(f"its part {damaged} is damaged")
            pickles = [archive.read(n) for n in archive.namelist() if n.endswith(".pkl")]
    if any(b"bytearray" in text for text in pickles):
        raise ValueError("its pickle holds a bytearray")


def digest(tensors, meta):
    """A checksum of the metadata, and of the names, shapes, types and values of tensors."""
    total = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def check_digest(path, tensors):
    """Raises ValueError if a file written by `save_tensors` was changed later."""
    meta = read_meta(path)
    has_digest, expected = meta.keys() & {"digest", "tensors"}, meta.pop("digest", None)
    if has_digest and expected != digest(tensors, meta):
        raise ValueError(f"its checksum is wrong: it has {len(tensors)} of {meta['tensors']} "
                         "tensors")


def read_meta(path):
    """The metadata of a .safetensors file, str to str; {} for other files. Raises BadInput."""
    if Path(path).suffix != ".safetensors":
        return {}
    with reading(path, "download or save it again"), safe_open(path, "pt") as file:
        return file.metadata() or {}


def save_tensors(path, tensors, meta):
    """Write a .safetensors file with a checksum. Equal tensors and metadata give equal files."""
    tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    meta = meta | {"tensors": str(len(tensors))}
    meta["digest"] = digest(tensors, meta)
    with atomic_write(path) as part:
        save_file(tensors, part, meta)
        with open(part, "rb+") as file:  # safetensors writes the metadata in random order
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            file.seek(8)
            file.write(text.ljust(size))


# --- Writing ------------------------------------------------------------------------------------


UNFINISHED = ".unfinished"  # a folder inside the output folder, for files that are being written
_private = None  # its path, while `output_folder` is active


@contextlib.contextmanager
def temporary_folder(path):
    """A temporary folder on the disk of `path`, inside the output folder if that is on this disk:
    a kill then leaves nothing elsewhere."""
    parent = Path(path).parent
    parent.mkdir(parents=True, exist_ok=True)
    if _private and os.stat(parent).st_dev == os.stat(_private.parent).st_dev:
        parent = _private
        parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".tmp-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def atomic_write(path):
    """A temporary path. When the block ends without error, its file is flushed to disk and renamed
    to `path`. Readers see the old file or the new one, never half a file."""
    path = Path(path)
    umask = os.umask(0)
    os.umask(umask)
    # One folder per file, since libraries write temporary files next to it.
    with temporary_folder(path) as folder:
        part = folder / path.name
        yield part
        os.chmod(part, 0o666 & ~umask)  # safetensors makes files private
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)


def append_line(path, text):
    """Append a line to a file, which is created if missing. The newline comes first, so a line cut
    off by a kill does not damage the next one. Links and pipes are refused with an OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # not on Windows
    handle = os.open(path, flags, 0o666)
    with open(handle, "w", encoding="utf-8") as file:
        file.write("\n" + text)


def nan_to_none(value):
    """The value as JSON holds it: None for NaN and infinity, absolute paths as text."""
    text = lambda other: str(other.absolute() if isinstance(other, Path) else other)
    return json.loads(json.dumps(value, default=text), parse_constant=lambda name: None)


def write_json(path, content):
    """Write a JSON file atomically. Paths become absolute, since they may be read elsewhere."""
    write_text(path, json.dumps(nan_to_none(content), indent=1, ensure_ascii=False) + "\n")


def write_text(path, text):
    """Write a text file atomically, in UTF-8."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def output_folder(out, default, resume=None):
    """An output folder, locked while the block runs. It is new or empty; with `resume` (None for
    commands without that flag) it belongs to a run. Without --out, `default` is numbered:
    default-2, default-3, … After a kill it may contain `.unfinished`, which --resume deletes;
    generate.py and eval.py need a new folder then. Raises BadInput."""
    global _private
    folder = Path(out) if out else find_run(default) if resume else new_folder(default)
    if resume and not folder.is_dir():
        raise BadInput(f"{folder} does not exist, so there is nothing to resume; drop --resume.")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        found = {p.name for p in folder.iterdir()}
        is_run = resume is not None and holds_run(folder, found)
        if found and not (resume and is_run):
            advice = ", or --resume" if is_run else ""
            raise BadInput(f"--out {folder} {'holds no run' if resume else 'is not empty'}; give a "
                           f"new folder{advice}.")
        _private = folder / UNFINISHED
        try:
            if UNFINISHED in found:  # left by a kill
                shutil.rmtree(_private)
            yield folder
        finally:
            shutil.rmtree(_private, ignore_errors=True)
            _private = None
            with contextlib.suppress(OSError):
                folder.rmdir()  # succeeds only if nothing was written


def holds_run(folder, found):
    """True if a folder with this content belongs to a run, also one killed at its first file."""
    private = folder / UNFINISHED
    if UNFINISHED in found and (private.is_symlink() or not private.is_dir() or any(
            not p.name.startswith(".tmp-") for p in private.iterdir())):
        return False
    with contextlib.suppress(BadInput):
        return found == {UNFINISHED} or "fixed" in read_json(folder / "run.json")
    return False


def new_folder(default):
    """The first of default, default-2, default-3, … that does not exist, created."""
    for n in itertools.count(1):
        folder = default if n == 1 else default.with_name(f"{default.name}-{n}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def find_run(default):
    """The one folder among default, default-2, … that holds a run. Raises BadInput for several."""
    numbered = re.compile(re.escape(default.name) + r"(-\d+)?")
    paths = default.parent.iterdir() if default.parent.is_dir() else []
    runs = [p for p in paths if numbered.fullmatch(p.name) and (p / "run.json").is_file()]
    if len(runs) > 1:
        raise BadInput(f"--resume: {len(runs)} runs match, {' and '.join(map(str, sorted(runs)))}; "
                       "give --out with one of them.")
    return runs[0] if runs else default


@contextlib.contextmanager
def locked(folder):
    """Lock a folder; the system releases the lock even after a kill. Raises BadInput if another
    command has locked it."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BadInput(f"{folder} is in use by another command; give another --out.") from None
    finally:
        os.close(handle)


def slug(text, longest=48):
    """A file name from a text: only letters, digits and dashes, so it stays in its folder."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:longest].strip("-") or "untitled"
