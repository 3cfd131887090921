"""Command-line flags with ranges, and one-line errors that suggest the nearest known name."""
import argparse
import difflib
import functools
import math
import sys

from support.files import BadInput

RENAMED = {"--negative": "--negative-prompt", "--seeds": "--videos-per-prompt",
           "--save": "--save-merged", "--keep-every": "--save-every"}


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, `error: …`, exit code 2, and no usage text.

    Flags cannot be abbreviated: a flag added later could change the meaning of an abbreviation.
    """

    def __init__(self, **more):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **more)

    def parse_args(self, args=None, namespace=None):
        """The flags. Exits with an error for unknown flags and stray words."""
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
        return known

    def error(self, message):
        """Print one line and exit."""
        self.exit(2, f"error: {' '.join(message.removeprefix('argument ').split())}\n")


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
