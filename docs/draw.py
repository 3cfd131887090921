"""Figures of docs/tour.md: film strips and matrices as PNG, line charts as SVG.

Axes: F frames, H W pixels.
"""
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.files import atomic_write, write_text
from support.media import every_nth, to_pixels

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#555555")
WIDE, HIGH, LEFT, TOP = 300, 190, 44, 30  # an SVG panel's field and margins, pixels


def strip(path, rows, columns=8, zoom=1.25):
    """A PNG with one row of frames per video: rows {label: video (3, F, H, W) in [-1, 1]}."""
    font = ImageFont.load_default(13)
    labels = [label.split("\n") for label in rows]
    left = max(int(font.getlength(line)) for lines in labels for line in lines) + 12
    images = []
    for lines, video in zip(labels, rows.values()):
        pixels = np.concatenate(list(to_pixels(every_nth(video, columns))), axis=1)
        frames = Image.fromarray(pixels).resize(
            (round(pixels.shape[1] * zoom), round(pixels.shape[0] * zoom)), Image.LANCZOS)
        row = Image.new("RGB", (left + frames.width, frames.height + 3), "white")
        row.paste(frames, (left, 0))
        top = frames.height / 2 - 8 * len(lines)
        ImageDraw.Draw(row).text((0, top), "\n".join(lines), "black", font)
        images.append(row)
    save_rows(path, images)


def save_rows(path, images):
    """Write images below each other as one PNG with a palette of 256 colors."""
    width, height = max(i.width for i in images), sum(i.height for i in images)
    page, y = Image.new("RGB", (width, height), "white"), 0
    for image in images:
        page.paste(image, (0, y))
        y += image.height
    with atomic_write(path) as part:
        page.quantize(256, dither=Image.Dither.NONE).save(part, optimize=True)


def matrices(path, named, cell=8, per_row=4):
    """A PNG of square matrices {label: (F, F)}, each scaled so that black is its maximum."""
    font, tiles = ImageFont.load_default(12), []
    for label, matrix in named.items():
        shade = 255 - 255 * np.asarray(matrix) / np.asarray(matrix).max()
        square = Image.fromarray(shade.astype(np.uint8)).resize(
            (len(matrix) * cell,) * 2, Image.NEAREST)
        tile = Image.new("RGB", (square.width + 24, square.height + 32), "white")
        tile.paste(square, (0, 20))
        ImageDraw.Draw(tile).text((0, 3), label, "black", font)
        tiles.append(np.asarray(tile))
    rows = [np.concatenate(tiles[i : i + per_row], 1) for i in range(0, len(tiles), per_row)]
    save_rows(path, [Image.fromarray(row) for row in rows])


def charts(path, *panels):
    """An SVG with panels next to each other. Each is a dict: title (with the quantity of the
    vertical axis), x (the label of the other), lines {name: (xs, ys)}, optional xlim and ylim."""
    content = [panel(LEFT + i * (LEFT + WIDE + 8), **p) for i, p in enumerate(panels)]
    legend = max((len(p["lines"]) + 1) // 2 for p in panels)
    width, height = len(panels) * (LEFT + WIDE + 8) + 16, TOP + HIGH + 44 + 16 * legend
    write_text(path, "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>', *content, "</svg>", ""]))


def panel(left, title, x, lines, xlim=None, ylim=None):
    """The SVG elements of one panel of `charts`."""
    values = [np.concatenate([np.asarray(line[k], float) for line in lines.values()])
              for k in (0, 1)]
    x0, x1 = xlim or (values[0].min(), values[0].max())
    y0, y1 = ylim or padded(values[1])
    at_x = lambda v: left + (v - x0) / (x1 - x0) * WIDE
    at_y = lambda v: TOP + (y1 - v) / (y1 - y0) * HIGH
    text = lambda px, py, what, more="": (
        f'<text x="{px:.1f}" y="{py:.1f}" {more}>{escape(what)}</text>')
    out = [f'<rect x="{left}" y="{TOP}" width="{WIDE}" height="{HIGH}" fill="none" stroke="#999"/>',
           text(left, TOP - 10, title, 'font-weight="bold"'),
           text(left + WIDE / 2, TOP + HIGH + 32, x, 'text-anchor="middle"')]
    for v in ticks(x0, x1):
        out.append(text(at_x(v), TOP + HIGH + 16, f"{v:g}", 'text-anchor="middle"'))
    for v in ticks(y0, y1):
        out.append(text(left - 5, at_y(v) + 4, f"{v:g}", 'text-anchor="end"'))
        out.append(f'<path d="M{left} {at_y(v):.1f}h{WIDE}" stroke="#eee"/>')
    for i, (color, (name, (xs, ys))) in enumerate(zip(COLORS, lines.items())):
        points = " ".join(f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in zip(xs, ys))
        out.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        if name:
            column, row = i % 2, i // 2
            out.append(text(left + column * WIDE / 2, TOP + HIGH + 52 + 16 * row, f"● {name}",
                            f'fill="{color}"'))
    return "\n".join(out)


def padded(values):
    """The range of values, with a margin."""
    low, high = values.min(), values.max()
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def ticks(low, high):
    """About five round numbers in [low, high]."""
    low, high = min(low, high), max(low, high)
    step = 10 ** np.floor(np.log10((high - low) / 5))
    step *= min((m for m in (1, 2, 5, 10)), key=lambda m: abs((high - low) / (m * step) - 5))
    return np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step + 0.0
