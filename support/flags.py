"""Flags: one line a mistake, with the nearest name that exists, and ranges beside each flag.
"""
import argparse
import difflib
import functools
import math
import re
import sys

from support.files import BadInput


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, `error: …`, with exit code 2 and no usage before it.

    Flags are not abbreviated: a flag that is added later could change what an abbreviation means.
    """

    def __init__(self, **more):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **more)

    def add_argument(self, *names, type=None, **more):
        """As argparse's; a `type` may say by BadInput what is wrong, and that is told."""
        return super().add_argument(*names, **more, **({"type": spoken(type)} if type else {}))

    def parse_args(self, args=None, namespace=None):
        """The flags. Ends the command for one that is not known, or a word that no flag takes."""
        args = sys.argv[1:] if args is None else list(args)
        for arg in args:
            if not is_text(arg):
                self.error(f"{arg!r} is not UTF-8 text; type it again, or rename the file.")
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [flag for flag in rest if flag.startswith("-")]
            self.error(self.unknown(flags[0]) if flags else stray(args, rest[0]))
        return known

    def unknown(self, flag):
        """What to say of a flag that does not exist."""
        name = flag.partition("=")[0]
        return f"there is no {name}{meant(name, self._option_string_actions)} --help lists all."

    def error(self, message):
        """One line, and the end."""
        message = message.removeprefix("argument ")
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            wrong, choices = found[1], found[2].replace("'", "").split(", ")
            flag = message.partition(":")[0]
            message = f"{flag} {wrong}{meant(wrong, choices)} Choose from {', '.join(choices)}."
        elif "expected" in message:
            flag = message.partition(":")[0]
            message += f"; a value that begins with a dash is written {flag}=-…"
        self.exit(2, f"error: {' '.join(message.split())}\n")


def meant(word, known):
    """'; did you mean …?' where a known name is near, else '.'."""
    near = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else "."


def stray(args, word):
    """What to say of a word that no flag takes: most likely a text without quotes."""
    flags = [arg for arg in args[: args.index(word)] if arg.startswith("--")]
    if not flags:
        return f"{word!r} belongs to no flag; --help lists them."
    rest = args[args.index(flags[-1]) + 1 :]
    text = []
    for arg in rest:
        if arg.startswith("--"):
            break
        text.append(arg)
    return f"{word!r} belongs to no flag; put a text in quotes: {flags[-1]} \"{' '.join(text)}\""


def is_text(arg):
    """Whether an argument came as UTF-8: others hold lone surrogates, which no file here takes."""
    try:
        arg.encode()
    except UnicodeEncodeError:
        return False
    return True


# ------------------------------------------------------------------------------------------------
# Kinds of values, for `type=`


MANY = 2**31  # what nothing is counted beyond


def spoken(kind):
    """The same type, whose BadInput becomes the message of its flag."""
    @functools.wraps(kind, updated=())
    def read(text):
        try:
            return kind(text)
        except BadInput as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def whole(low, high=MANY):
    """A whole number within low … high."""
    return functools.partial(_number, int, "a whole number", low, high)


def real(low, high=math.inf):
    """A number within low … high, and finite."""
    return functools.partial(_number, float, "a number", low, high)


def _number(kind, what, low, high, text):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high or value == math.inf:
        most = "or more" if high >= MANY and not value > high else f"to {high:g}"
        raise BadInput(f"{text[:40]}: wanted {what}, {low:g} {most}.")
    return value


def some_text(value):
    """A text that is not empty."""
    if not value.strip():
        raise BadInput("is empty; write what to show in it.")
    return value
