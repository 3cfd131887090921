"""Write the settings table of docs/methods.md from the methods in train.py.

    python docs/write.py
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import train  # noqa: E402
from support.files import write_text  # noqa: E402
from support.recipe import METHODS, write_value  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- settings -->\n", "<!-- /settings -->"


def settings_table():
    """One row per setting, one column per method, and a list of the settings that depend on the
    training data."""
    table, meanings = {}, {}  # {setting: {method: cell}}, {setting: meaning}
    for name, recipe in METHODS.items():
        frames, height, width = recipe.shape
        shape = {"--frames": frames, "--size": f"{width}x{height}", "--fps": recipe.fps}
        tiny = shape | recipe.override(train.TINY.get(name, "")).settings()
        for setting, value in (shape | recipe.settings()).items():
            default, small = write_value(value) or "–", write_value(tiny[setting]) or "–"
            cell = default if small == default else f"{default} ({small})"
            table.setdefault(setting, {})[name] = cell
        for action in recipe.parser()._actions:
            meanings[action.dest] = action.help.rpartition(" (")[0].replace("|", "/")
    lines = ["| setting | " + " | ".join(METHODS) + " | meaning |",
             "|---" * (len(METHODS) + 2) + "|"]
    for setting, cells in table.items():
        values = " | ".join(cells.get(name, "") for name in METHODS)
        lines.append(f"| `{setting}` | {values} | {meanings.get(setting, '')} |")
    lines += ["", "Settings that depend on the training data:", ""]
    for (name, kind), line in train.BY_DATA.items():
        lines.append(f"- `{name}` with {kind}: `{line}`")
    return "\n".join(lines) + "\n"


def page():
    """The text of docs/methods.md with the current table."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + settings_table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    write_text(PAGE, page())
