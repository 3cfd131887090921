"""Write what the documentation says of the methods from the methods themselves, so that it is true.

    python docs/write.py        # docs/methods.md, and the drawing assets/unet.svg

The drawing is the UNet of ZeroScope, one row a method, one column a kind of layer; a cell is marked
as the method's parts mark the parameters of that kind.
"""
import inspect
import re
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

import lora  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from support.files import publish, read_fields, read_json  # noqa: E402
from support.recipe import METHODS, write_value  # noqa: E402

# A column of the drawing: its name in two lines, whether it is temporal, and the pattern of the
# parameters that it stands for.
KINDS = (
    ("ResNet", "", False, r".*resnets\..*"),
    ("temporal", "convolution", True, r".*temp_convs\..*"),
    ("self-", "attention", False, r".*\.attentions\..*attn1\.to_.*"),
    ("cross-att.", "to text", False, r".*\.attentions\..*attn2\.to_.*"),
    ("feed-", "forward", False, r".*\.attentions\..*\.ff\..*"),
    ("attention", "over frames", True, r"(transformer_in|.*temp_attentions).*attn[12]\.to_.*"),
    ("feed-", "forward", True, r"(transformer_in|.*temp_attentions).*\.ff\..*"),
    ("word", "vector", False, None),
)


def tiny_unet():
    """The names of a UNet's parameters, of which no memory is needed."""
    path = model.TINY / "unet" / "config.json"
    with torch.device("meta"):
        return model.UNet(read_fields(model.UNetConfig, read_json(path), path))


# ------------------------------------------------------------------------------------------------
# docs/methods.md


def methods_page():
    """The methods' docstrings and settings, one after the other."""
    lines = ["# The methods", "", "Written by `python docs/write.py` from the functions in "
             "`train.py`: what each does, where its numbers are from, and where the paper, the "
             "published code and this code differ.", ""]
    for name, recipe in METHODS.items():
        frames, height, width = recipe.shape
        text, _, keywords = inspect.getdoc(recipe.function).partition("\n\n")
        lines += [f"## {name}", "", f"*{recipe.source}; {frames} frames of {width}×{height} at "
                  f"{write_value(recipe.fps)} a second*", "", " ".join(text.split()), ""]
        lines += ["| setting | default | with the tiny model | meaning |", "|---|---|---|---|"]
        tiny = recipe.but(train.TINY.get(name, "")).settings()
        for setting, value in recipe.settings().items():
            own, here = write_value(value), write_value(tiny[setting])
            part, _, field = setting.rpartition(".")
            if part and recipe.parts[part].lacks(field):
                continue  # it would do nothing
            lines.append(f"| `{setting}` | {own or '–'} | {here if here != own else ''} | "
                         f"{recipe.meaning(setting).replace('|', '/')} |")
        lines.append("")
        for when, line in train.changes(name):
            if line != train.TINY.get(name):  # it has a column
                lines += [f"{when.capitalize()}: `{line}`.", ""]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# assets/unet.svg


def marks(unet, recipe):
    """For each column: {part: "full", "LoRA" or "word"} of the parts that learn there."""
    columns = []
    for *_, pattern in KINDS:
        found = {}
        for name, part in recipe.parts.items():
            if pattern is None and isinstance(part, lora.Word) and part.vectors:
                found[name] = "word"
            if pattern and isinstance(part, lora.Part) and part.layers != "none":
                for parameter in lora.select(unet, part.layers):
                    if re.fullmatch(pattern, parameter):
                        found[name] = "LoRA" if part.rank else "full"
        columns.append(found)
    return columns


def letters(unet, recipe, pattern):
    """Which of an attention's matrices learn, where it is not all of them: "q k v"."""
    names = [lora.select(unet, p.layers) for p in recipe.parts.values()
             if isinstance(p, lora.Part) and p.layers != "none"]
    found = set()
    for parameter in [n for chosen in names for n in chosen]:
        if pattern and "attn" in pattern and re.fullmatch(pattern, parameter):
            found.add(re.search(r"to_(q|k|v|out)", parameter)[1])
    return " ".join(sorted(found, key="qkvout".index)) if 0 < len(found) < 4 else ""


def text(x, y, words, size=13, anchor="middle", more=""):
    """A line of text."""
    return (f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" {more}>'
            f"{escape(words)}</text>")


def box(x, y, w, h, fill, more='stroke="#555"'):
    """A rectangle."""
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" fill="{fill}" {more}/>'


def drawing():
    """The SVG: a U of blocks, the layers in one of them, and the table of what learns."""
    unet, left, wide = tiny_unet(), 190, 96
    spatial, temporal = "#e8eef7", "#fbe9d7"
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 970 624" '
           'font-family="Helvetica, Arial, sans-serif" fill="#222">',
           '<rect width="970" height="624" fill="#fff"/>']
    for i in range(4):  # the way down, the middle, and the way up
        h = 86 - 16 * i
        out.append(box(60 + 78 * i, 30 + 20 * i, 58, h, spatial))
        out.append(box(838 - 78 * i, 30 + 20 * i, 58, h, spatial))
        if i < 3:
            out.append(text(89 + 78 * i, 26 + 20 * i, ("320", "640", "1280")[i], 11))
            start, end = 60 + 78 * i + 58, 838 - 78 * i
            y = 36 + 20 * i
            out.append(f'<path d="M{start} {y} H{end}" stroke="#999" stroke-dasharray="4 4"/>')
    out += [box(400, 104, 150, 36, spatial), text(475, 127, "middle block"),
            text(28, 76, "x_t", 15), text(930, 76, "ε̂ or v̂", 15),
            text(475, 26, "skips", 11),
            text(475, 172, "every layer of every block: ResNet, temporal convolution, spatial "
                 "transformer, temporal transformer", 13)]
    top = 200
    for i, (first, second, over_time, _) in enumerate(KINDS):
        x = left + wide * i
        out.append(box(x + 3, top, wide - 6, 46, temporal if over_time else spatial))
        out.append(text(x + wide / 2, top + (20 if second else 28), first, 12))
        out.append(text(x + wide / 2, top + 36, second, 12))
    for row, (name, recipe) in enumerate(METHODS.items()):
        y = top + 82 + 36 * row
        out.append(text(left - 12, y + 5, name, 13, "end"))
        out.append(f'<path d="M{left} {y + 18} H{left + wide * len(KINDS)}" stroke="#ddd"/>')
        for i, found in enumerate(marks(unet, recipe)):
            some = letters(unet, recipe, KINDS[i][3])
            out.append(text(left + wide * i + wide / 2 + 14, y + 4, some, 11, "start"))
            for k, (part, how) in enumerate(found.items()):
                colour = "#2b6cb0" if part.startswith(("look", "subject")) else "#c05621"
                x = left + wide * i + wide / 2 + 20 * (k - (len(found) - 1) / 2)
                fill = colour if how in ("full", "word") else "none"
                out.append(f'<circle cx="{x}" cy="{y}" r="8" fill="{fill}" stroke="{colour}" '
                           'stroke-width="3"/>')
    y = 610
    legend = (("#c05621", "#c05621", "in full, for the motion"),
              ("none", "#c05621", "LoRA, for the motion"),
              ("none", "#2b6cb0", "LoRA, for the look"))
    for i, (fill, colour, words) in enumerate(legend):
        x = left + 220 * i
        out.append(f'<circle cx="{x}" cy="{y - 5}" r="8" fill="{fill}" stroke="{colour}" '
                   'stroke-width="3"/>')
        out.append(text(x + 16, y, words, 13, "start"))
    return "\n".join([*out, "</svg>", ""])


def main():
    """Write both files."""
    for path, content in ((ROOT / "docs" / "methods.md", methods_page()),
                          (ROOT / "assets" / "unet.svg", drawing())):
        with publish(path) as part:
            part.write_text(content)
        print(path)


if __name__ == "__main__":
    main()
