"""Charts as SVG, written by hand: panels side by side, each with lines or marks and error bars.

    chart("out/x.svg", [Panel("agreement", "steps", "agreement", [Series("vmc", points)])])
"""
import math
from dataclasses import dataclass
from html import escape

from support.files import publish

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b",
           "#7f7f7f", "#bcbd22", "#9467bd", "#17becf")  # the first seven are Okabe and Ito's
WIDE, HIGH, LEFT, TOP, LINE = 330, 240, 52, 34, 15  # of a panel's field, and around it; pixels


@dataclass
class Series:
    """Points (x, y) or (x, y, low, high), in order; joined by a line or not."""

    name: str
    points: list
    joined: bool = True


@dataclass
class Panel:
    """One field with its axes' names."""

    title: str
    x: str
    y: str
    series: list


def ticks(low, high, count=5):
    """Round numbers within low … high, about `count` of them."""
    size = 10.0 ** math.floor(math.log10((high - low) / count))
    size *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * size) <= count)
    return [size * i for i in range(math.ceil(low / size), math.floor(high / size) + 1)]


def reach(numbers):
    """The least and most of numbers, with a little room."""
    low, high = min(numbers), max(numbers)
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def draw(panel, left):
    """The SVG elements of a panel whose field begins at `left`."""
    points = [p for s in panel.series for p in s.points]
    x0, x1 = reach([p[0] for p in points])
    y0, y1 = reach([v for p in points for v in p[1:]])
    at = lambda x, y: (left + (x - x0) / (x1 - x0) * WIDE, TOP + (y1 - y) / (y1 - y0) * HIGH)
    text = lambda x, y, what, more="": (
        f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(str(what))}</text>')
    middle, end = 'text-anchor="middle"', 'text-anchor="end"'
    out = [f'<rect x="{left}" y="{TOP}" width="{WIDE}" height="{HIGH}" fill="none" stroke="#999"/>',
           text(left, TOP - 12, panel.title, 'font-weight="bold"'),
           text(left + WIDE / 2, TOP + HIGH + 34, panel.x, middle),
           text(left + 6, TOP + 14, panel.y, 'fill="#666"')]
    for x in ticks(x0, x1):
        out.append(text(at(x, y0)[0], TOP + HIGH + 16, f"{x:g}", middle))
    for y in ticks(y0, y1):
        height = at(x0, y)[1]
        out.append(text(left - 6, height + 4, f"{y:.3g}", end))
        out.append(f'<path d="M{left} {height:.1f}h{WIDE}" stroke="#eee"/>')
    named = [(COLOURS[i % len(COLOURS)], s) for i, s in enumerate(panel.series) if s.points]
    for i, (colour, series) in enumerate(named):
        places = [at(*p[:2]) for p in series.points]
        if series.joined:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        for (x, y), point in zip(places, series.points):
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            if len(point) == 4:
                low, high = at(point[0], point[2])[1], at(point[0], point[3])[1]
                out.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>')
        out.append(text(left, TOP + HIGH + 56 + LINE * i, "● " + series.name, f'fill="{colour}"'))
    return out


def chart(path, panels):
    """Write the panels side by side; those that have no points are left out."""
    panels = [p for p in panels if any(s.points for s in p.series)]
    each = LEFT + WIDE + 24
    height = TOP + HIGH + 56 + LINE * max([len(p.series) for p in panels], default=0)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{each * len(panels)}" '
             f'height="{height}" font-family="sans-serif" font-size="12">',
             '<rect width="100%" height="100%" fill="white"/>']
    for i, panel in enumerate(panels):
        lines += draw(panel, LEFT + each * i)
    if panels:
        with publish(path) as part:
            part.write_text("\n".join([*lines, "</svg>", ""]))
