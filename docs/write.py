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
    values, meanings = {}, {}
    for name, recipe in METHODS.items():
        frames, height, width = recipe.shape
        values[name] = {"`--frames`": str(frames), "`--size`": f"{width}x{height}",
                        "`--fps`": f"{recipe.fps:g}"}
        tiny = recipe.override(train.TINY.get(name, "")).settings()
        for setting, value in recipe.settings().items():
            default, small = write_value(value) or "–", write_value(tiny[setting]) or "–"
            values[name][f"`{setting}`"] = default + f" ({small})" * (small != default)
        for action in recipe.parser()._actions:
            meanings[f"`{action.dest}`"] = action.help.rpartition(" (")[0].replace("|", "/")
    lines = ["| setting | " + " | ".join(METHODS) + " | meaning |",
             "|---" * (len(METHODS) + 2) + "|"]
    for setting in dict.fromkeys(s for row in values.values() for s in row):
        cells = [row.get(setting, "") for row in values.values()]
        lines.append(f"| {setting} | {' | '.join(cells)} | {meanings.get(setting, '')} |")
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
