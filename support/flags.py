"""Flags: one line a mistake, with the nearest name that exists, and ranges beside each flag.
"""
import argparse
import difflib
import functools
import itertools
import math
import re
import sys

from support.files import BadInput

# What other programs call what is written otherwise here.
SIZES = ("--width", "--height", "--resolution")
SETTINGS = {"--lr": "motion.lr=…", "--learning-rate": "motion.lr=…", "--rank": "motion.rank=…",
            "--config": "motion.lr=… and others"}


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
        self.given = args = sys.argv[1:] if args is None else list(args)
        for arg in args:
            if not is_text(arg):
                self.error(f"{arg!r} is not UTF-8 text; type it again, or rename the file.")
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [flag for flag in rest if flag.startswith("-")]
            self.error(self.unknown(flags[0]) if flags else self.stray(rest[0]))
        return known

    def unknown(self, flag):
        """What to say of a flag that does not exist."""
        name, known = flag.partition("=")[0], self._option_string_actions
        if name in SIZES and "WIDTHxHEIGHT" in getattr(known.get("--size"), "help", ""):
            return f"there is no {name}; give --size WIDTHxHEIGHT."
        setting = f"{name[2:]}=…" if "." in name else SETTINGS.get(name)
        if setting and "--method" in known:
            return (f"there is no {name}; settings are name=value: {setting} (--method NAME --help "
                    "lists a method's).")
        near = [other for other in known if other not in ("-h", "--help")]
        return f"there is no {name}{meant(name, near)} --help lists all."

    def stray(self, word):
        """What to say of a word that no flag takes: of a text, most likely it has no quotes."""
        known, before = self._option_string_actions, self.given[: self.given.index(word)]
        flags = [i for i, arg in enumerate(before) if arg.partition("=")[0] in known]
        if not flags:
            return f"{word!r} belongs to no flag; --help lists them."
        name, _, text = self.given[flags[-1]].partition("=")
        action, rest = known[name], self.given[flags[-1] + 1 :]
        if getattr(action.type, "__wrapped__", None) not in TEXTS:
            takes = "no value" if action.nargs == 0 else "one value"
            return f"{word!r} belongs to no flag; {name} takes {takes}."
        words = itertools.takewhile(lambda arg: not arg.startswith("--"), rest)
        text = " ".join(filter(None, [text, *words]))
        return f"{word!r} belongs to no flag; put a text in quotes: {name} \"{text}\""

    def error(self, message):
        """One line, and the end."""
        message = message.removeprefix("argument ")
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            wrong, choices = found[1], found[2].replace("'", "").split(", ")
            flag = message.partition(":")[0]
            message = f"{flag} {wrong}{meant(wrong, choices)} Choose from {', '.join(choices)}."
        elif "expected" in message:
            flag = message.partition(":")[0]
            after = dict(zip(self.given, self.given[1:])).get(flag, "")
            if after[:1] == "-" and after.partition("=")[0] not in self._option_string_actions:
                message += f"; a value that begins with a dash is written {flag}=-…"
        self.exit(2, f"error: {' '.join(message.split())}\n")


def meant(word, known):
    """'; did you mean …?' where a known name is near, else '.'."""
    near = difflib.get_close_matches(word, list(known), 1, 0.7)
    return f"; did you mean {near[0]}?" if near else "."


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


TEXTS = (some_text, str)  # the types of flags that take words, which a shell splits
