"""Command-line flags: one line per mistake, with the nearest known name, and ranges of values.
"""
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
        """The flags. Ends the command for unknown flags, and for words that belong to no flag."""
        known, rest = self.parse_known_args(sys.argv[1:] if args is None else args, namespace)
        for word in rest:
            name = word.partition("=")[0]
            if name in RENAMED:
                self.error(f"{name} is called {RENAMED[name]} now")
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            self.error(f"{word!r} belongs to no flag"
                       + (f"; did you mean {near[0]}?" if near else "; put a text of several words "
                          "in quotes. --help lists all flags."))
        return known

    def error(self, message):
        """Print one line and exit."""
        self.exit(2, f"error: {' '.join(message.removeprefix('argument ').split())}\n")


def int_in(low, high=2**31):
    """An integer within low … high, for `type=`."""
    return functools.partial(_number, int, "an integer", low, high)


def float_in(low, high=1e18):
    """A finite number within low … high, for `type=`."""
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
    """One of some words, for `type=`."""
    def read(text):
        if text not in known:
            raise BadInput(f"{text[:40]}: expected {' or '.join(known)}.")
        return text

    return read


def non_empty(text):
    """A text that is not empty, for `type=`."""
    if not text.strip():
        raise BadInput("the text is empty.")
    return text
