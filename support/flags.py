"""Flags: one line a mistake, with the nearest name that exists, and ranges beside each flag.
"""
import argparse
import difflib
import functools
import math
import sys

from support.files import BadInput


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, `error: …`, with exit code 2 and no usage before it.

    Flags are not abbreviated: a flag that is added later could change what an abbreviation means.
    """

    def __init__(self, **more):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **more)

    def parse_args(self, args=None, namespace=None):
        """The flags. Ends the command for one that is not known, or a word that no flag takes."""
        known, rest = self.parse_known_args(sys.argv[1:] if args is None else args, namespace)
        for word in rest:
            near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, 1)
            self.error(f"{word!r} belongs to no flag"
                       + (f"; did you mean {near[0]}?" if near else "; a text of several words is "
                          "written in quotes, and --help lists all flags."))
        return known

    def error(self, message):
        """One line, and the end."""
        self.exit(2, f"error: {' '.join(message.removeprefix('argument ').split())}\n")


def int_in(low, high=2**31):
    """A whole number within low … high, for `type=`."""
    return functools.partial(_number, int, "a whole number", low, high)


def float_in(low, high=1e18):
    """A number within low … high, and finite, for `type=`."""
    return functools.partial(_number, float, "a number", low, high)


def _number(kind, what, low, high, text):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise BadInput(f"{text[:40]}: wanted {what}, {low:g} to {high:g}.")
    return value


def choice(*known):
    """One of some words, for `type=`."""
    def read(text):
        if text not in known:
            raise BadInput(f"{text[:40]}: wanted {' or '.join(known)}.")
        return text

    return read


def non_empty(value):
    """A text that is not empty, for `type=`."""
    if not value.strip():
        raise BadInput("is empty; write what to show in it.")
    return value
