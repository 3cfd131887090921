"""Reading what people give, and writing what they keep: nothing here can run what is in a file, and
nothing that is written is ever half there.

Axes: none; this room knows bytes, names and messages.
"""
import contextlib
import json
import math
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
from safetensors import SafetensorError
from safetensors.torch import load_file


class BadInput(ValueError):
    """What a person gave cannot be used; the message says what was found, wanted and to be done."""


def say(text):
    """A line for the person at the terminal, apart from the program's results."""
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------
# In


LONGEST, HUGE = 64, 1e18  # items in a list of a configuration, and numbers in it


def read_json(path):
    """The object in a JSON file. Raises BadInput when there is none."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path} is missing. A weights folder in the hub's layout has it: "
                       "unet/, vae/, text_encoder/ and scheduler/, each with its config.")
    try:
        values = json.loads(path.read_text())
        json.dumps(values, ensure_ascii=False).encode()  # lone surrogates are no text
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise BadInput(f"{path} is not a JSON object; download it again.")
    return values


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
    wrong = misfits(cls, values)
    wrong += [f"{f.name} is missing" for f in fields(cls)
              if f.name not in values and f.default is MISSING]
    if wrong:
        raise BadInput(f"{source}: {'; '.join(wrong[:3])}. Take the file beside the weights.")
    try:
        return cls(**chosen)
    except BadInput as error:  # what a dataclass finds in its fields together
        raise BadInput(f"{source}: {error}. Take the file beside the weights.") from None


def misfits(cls, values):
    """What is wrong with those of a dataclass's fields that `values` has, in words."""
    wrong = []
    for f in fields(cls):
        if f.name in values and (wanted := _unlike(f, values[f.name])):
            wrong.append(f"{f.name} is {repr(values[f.name])[:60]}, wanted {wanted}")
    return wrong


def _unlike(f, value):
    """What a field wants, when the value is not that; else None."""
    known, least, most = (f.metadata.get(name) for name in ("known", "least", "most"))
    if known:
        fits = any(value == k and isinstance(value, bool) == isinstance(k, bool) for k in known)
        return None if fits else " or ".join(map(repr, known))
    if not _is(value, f.type):
        return getattr(f.type, "__name__", str(f.type)) if f.type in (int, float) else str(f.type)
    several = value if isinstance(value, list) else [value]
    if least is not None and not all(v is None or least <= v <= most for v in several):
        return f"{least:g} to {most:g}"
    return None if several and len(several) <= LONGEST else f"1 to {LONGEST} of them"


def _is(value, kind):
    """isinstance, with lists and unions, where a float may be written as an int, and none is NaN,
    infinite or a truth value."""
    if isinstance(kind, types.UnionType):
        return any(_is(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_is(v, *typing.get_args(kind)) for v in value)
    if kind in (int, float):
        numbers = (int, float) if kind is float else (int,)
        return type(value) in numbers and -HUGE < value < HUGE
    return isinstance(value, kind)


WHOLE = ("position_ids", "num_batches_tracked", "alpha")  # names that may hold whole numbers
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(path, lists=False):
    """The tensors of a .safetensors, .bin, .pt or .pth file, by name, or, where `lists` are allowed
    too, a file's plain list of tensors. Nothing in the file can run.

    Raises BadInput, naming the file, when it is missing, damaged, or holds anything but finite
    floating-point numbers (whole ones under a few names alone), or claims more than it holds.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a folder, or a pipe, for which one would wait
        raise BadInput(f"{path} is no file; give the file itself.")
    try:
        state = _load(path)
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; check the path.") from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, MemoryError) as error:
        lines = str(error).strip().splitlines() or ["empty"]
        raise BadInput(f"{path} cannot be read ({lines[0][:120]}); download or save it again."
                       ) from None
    except Exception as error:  # pickle's own errors: code in the file, or not a checkpoint at all
        raise BadInput(f"{path} is not a file of plain tensors ({type(error).__name__}); "
                       "nothing in it was run. Get it as .safetensors.") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    named = state
    if lists and isinstance(state, list):
        named = {str(i): tensor for i, tensor in enumerate(state)}
    if not isinstance(named, dict) or not all(
            isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in named.items()):
        raise BadInput(f"{path} does not map names to tensors; is it the right file?")
    for name, tensor in named.items():
        if problem := _unusable(name, tensor):
            raise BadInput(f"{path}: {name[:80]} {problem}; download or save it again.")
    return state


def _load(path):
    """What a file of tensors holds, without asking for more memory than the file is long."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
        if claimed > path.stat().st_size:
            raise ValueError(f"it claims {claimed:,} bytes")
    return torch.load(path, map_location="cpu", weights_only=True)


def _unusable(name, tensor):
    """What keeps a tensor from being used as numbers, or None."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return f"is a {tensor.layout} tensor on {tensor.device}, wanted plain numbers"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"claims to be {tuple(tensor.shape)}, more than the file holds"
    if tensor.dtype not in FLOATS:
        whole = name.endswith(WHOLE) and not tensor.is_complex() and not tensor.is_floating_point()
        return None if whole else f"is {tensor.dtype}, wanted one of {FLOATS}"
    return None if torch.isfinite(tensor).all() else "holds NaN or infinity"


# ------------------------------------------------------------------------------------------------
# What flags name, judged before anything is loaded


HUB = r"(?:(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+)(?:/.*)?"
OWNER, KNOWN = "cerspense/", ("zeroscope_v2_576w", "zeroscope_v2_XL")  # given without whose it is


def check_weights(path, flag="--weights"):
    """Raises BadInput, with the way to get it, when a weights folder is not here. None, the tiny
    model, always is."""
    if path is None or Path(path).is_dir():
        return
    path = Path(path)
    if path.exists():
        raise BadInput(f"{flag} {path} is a file; give the folder in the hub's layout: unet/, "
                       "vae/, text_encoder/ and scheduler/.")
    bare = str(path) in KNOWN
    model = re.fullmatch(HUB, OWNER + str(path) if bare else str(path))
    if model and (bare or not path.is_absolute() and not path.parent.is_dir()):
        folder = model[1].partition("/")[2]
        raise BadInput(f"{flag} {path} is not a folder here. A model of the Hugging Face hub is "
                       f"fetched by: hf download {model[1]} --local-dir {folder} (hf comes with "
                       f"pip install huggingface_hub); then give {flag} {folder}")
    if re.match(r"\w+:/", str(path)):
        raise BadInput(f"{flag} {path} is an address; download it, and give the folder.")
    raise BadInput(f"{flag} {path} is not a folder; check the path.")


def check_there(path, instead):
    """Raises BadInput where there is nothing at a path; instead: what to give, in words."""
    if Path(path).exists():
        return
    if re.match(r"\w+:/", str(path)):
        raise BadInput(f"{path} is an address; download it, and give the file.")
    raise BadInput(f"{path} does not exist; {instead}.")


LARGEST_SIDE = 4096  # pixels; sizes are judged here, before memory is asked for


def read_size(text):
    """"576x320", a width and a height in pixels, as (height, width). Raises BadInput."""
    found = re.fullmatch(r"(\d{1,6})[x×X](\d{1,6})", text.strip(), re.ASCII)
    if not found:
        raise BadInput(f"{text!r}: wanted WIDTHxHEIGHT in pixels, such as 576x320.")
    width, height = int(found[1]), int(found[2])
    for side in (width, height):
        if side % 8 or not 8 <= side <= LARGEST_SIDE:
            raise BadInput(f"{text}: wanted sides of 8 to {LARGEST_SIDE} pixels, multiples of 8.")
    return height, width


def check_folder_out(path, flag="--out"):
    """Raises BadInput when a folder could not be made or written there. Makes nothing."""
    path = nearest = Path(path)
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise BadInput(f"{flag} {path}: {nearest} is a file; give a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise BadInput(f"{flag} {path}: {nearest} may not be written; give another folder.")


# ------------------------------------------------------------------------------------------------
# Out


PART = ".part-"  # files that are being written


def room_for(path, size):
    """Raises BadInput when the disk of `path` cannot take `size` more bytes."""
    free = shutil.disk_usage(Path(path).parent).free
    if free < size:
        raise BadInput(f"{path} needs {size:,} bytes, the disk has {free:,} left; nothing was "
                       "changed. Free some, or give another --out.")


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


def slug(text, longest=48):
    """A file name from a text: letters, digits and dashes alone, so it stays in its folder."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:longest].strip("-") or "untitled"
