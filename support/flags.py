"""Command-line flags: types that check values, and one-line errors that suggest the nearest known
name."""
import argparse
import difflib
import functools
import math
import re
import sys
from pathlib import Path

from support.files import BadInput, escaped

RENAMED = {"--negative": "--negative-prompt", "--seeds": "--videos-per-prompt",
           "--save": "--save-merged", "--keep-every": "--save-every"}


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, `error: …`, exit code 2, and no usage text.

    Flags cannot be abbreviated: a flag added later could change the meaning of an abbreviation.
    requires: {flag: another flag without which it has no effect}.
    """

    def __init__(self, requires=(), **more):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **more)
        self.requires = dict(requires)

    def parse_args(self, args=None, namespace=None):
        """The flags. Exits with an error for flags that are unknown or have no effect."""
        args = sys.argv[1:] if args is None else args
        for word in args:
            if word.startswith("--") and word.endswith("=--"):  # argparse would drop the value
                self.error(f"{word}: '--' is not a value")
        known, rest = self.parse_known_args(args, namespace)
        for word in rest:
            name = word.partition("=")[0]
            if name in RENAMED:
                self.error(f"{name} was renamed to {RENAMED[name]}")
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            self.error(f"{word!r} belongs to no flag" + (f"; did you mean {near[0]}?" if near else
                       "; put quotes around a text of several words. --help lists all flags."))
        for name, other in self.requires.items():
            given = getattr(known, name)
            if given is not None and given is not False and not getattr(known, other):
                self.error(f"--{name} requires --{other}".replace("_", "-"))
        return known

    def error(self, message):
        """Print one line and exit."""
        self.exit(2, f"error: {escaped(' '.join(message.removeprefix('argument ').split()))}\n")


def int_in(low, high=2**31):
    """An argument type: an integer within low … high."""
    return functools.partial(_number, int, "an integer", low, high)


def float_in(low, high=1e18):
    """An argument type: a number within low … high."""
    return functools.partial(_number, float, "a number", low, high)


def _number(kind, expected, low, high, text):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise BadInput(f"{text[:40]}: expected {expected}, {low:g} to {high:g}.")
    return value


def choice(*known):
    """An argument type: one of the known words."""
    def read(text):
        if text not in known:
            raise BadInput(f"{text[:40]}: expected {' or '.join(known)}.")
        return text

    return read


def non_empty(text):
    """An argument type: a text that is not empty."""
    if not text.strip():
        raise BadInput("the text is empty.")
    return text


def read_size(text):
    """"576x320", a width and a height in pixels, as (height, width). Raises BadInput."""
    found = re.fullmatch(r"(\d{1,4})[x×X](\d{1,4})", text.strip(), re.ASCII)
    sides = [int(side) for side in found.groups()] if found else [0]
    if any(side % 8 or not 8 <= side <= 4096 for side in sides):
        raise BadInput(f"{text!r}: expected WIDTHxHEIGHT in pixels, multiples of 8 up to 4096, "
                       "e.g. 576x320.")
    return sides[1], sides[0]


def existing(text):
    """An argument type: a path that exists."""
    if not Path(text).exists():
        raise BadInput(f"{text} does not exist; correct the path.")
    return Path(text)


def hub_folder(text):
    """An argument type: a local folder. The error has the download command."""
    if Path(text).is_dir():
        return Path(text)
    found = re.fullmatch(r"(?:.*(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+)", text)
    is_hub_name = found and not Path(text).parent.is_dir()
    name = found[1] if is_hub_name else "cerspense/zeroscope_v2_576w"
    folder = name.partition("/")[2]
    raise BadInput(f"{text} is not a local folder in the hub's layout (unet/, vae/, text_encoder/, "
                   "scheduler/). To download one: pip install huggingface_hub; "
                   f"hf download {name} --local-dir {folder}; then give {folder}.")
