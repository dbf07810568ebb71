"""Charts as SVG text, with nothing but Python: a page that holds them needs no other file.

Widths are in the units of the viewBox; the page scales a chart to its column.
"""

import math
from collections.abc import Sequence
from html import escape

INK, FAINT, GRID = "#1d2733", "#5c6b7a", "#dfe5ea"
COLOURS = ("#1f6f8b", "#c8553d", "#4c8c4a", "#8a5a9e", "#b8860b", "#555b66")
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "12 4")
FONT = "font-family='system-ui, sans-serif' font-size='13'"


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = INK, more: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{colour}' {FONT} {more}>{escape(text)}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = GRID, width: float = 1) -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{colour}' stroke-width='{width}'/>"


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f"<svg viewBox='0 0 {width:.0f} {height:.0f}' role='img' aria-label='{escape(title, quote=True)}' "
        f"style='max-width:{1.2 * width:.0f}px' xmlns='http://www.w3.org/2000/svg'>{''.join(parts)}</svg>"
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` of them."""
    raw = (high - low) / max(1, count - 1) or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def interval_chart(
    rows: Sequence[tuple[str, float, float, int]], axis: str, rows_axis: str, limits: tuple[float, float]
) -> str:
    """A dot and an interval for each row.

    Args:
        rows: (name, value, half width of the interval, index of the colour).
        axis, rows_axis: names of the horizontal axis, and of what the rows are.
        limits: a band that is shaded: within it a difference is small.
    """
    # Names stand above their intervals: beside them they would leave a narrow window no room for the plot.
    width, left, plot_width, row_height, strip, top = 430.0, 22.0, 386.0, 42, 20, 26
    low = min(limits[0], *(value - half for _, value, half, _ in rows))
    high = max(limits[1], *(value + half for _, value, half, _ in rows))
    marks = ticks(low, high)
    low, high = marks[0], marks[-1]
    bottom = top + row_height * len(rows)

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * plot_width

    parts = [_text(6, 16, rows_axis, colour=FAINT)]
    for index, (name, value, half, colour) in enumerate(rows):
        end = top + row_height * (index + 1)
        begin, middle = end - strip, end - strip / 2
        paint = COLOURS[colour % len(COLOURS)]
        parts += [
            _text(6, begin - 5, name),
            f"<rect x='{place(limits[0]):.1f}' y='{begin}' width='{place(limits[1]) - place(limits[0]):.1f}' "
            f"height='{strip}' fill='#e9f2ec'/>",
            *(_line(place(mark), begin, place(mark), end) for mark in marks),
            _line(place(0), begin, place(0), end, INK),
            _line(place(value - half), middle, place(value + half), middle, paint, 2),
            f"<circle cx='{place(value):.1f}' cy='{middle:.1f}' r='4' fill='{paint}'/>",
        ]
    parts += [_text(place(mark), bottom + 18, f"{mark:g}", "middle", FAINT) for mark in marks]
    parts.append(_text(left + plot_width / 2, bottom + 40, axis, "middle"))
    return _svg(width, bottom + 50, axis, parts)


def curve_chart(curves: Sequence[tuple[str, Sequence[float]]], x_axis: str, y_axis: str) -> str:
    """Curves over 0, 1, 2, ..., from 0 to 1, named in a legend below."""
    width, left, top, plot_width, plot_height = 430.0, 64.0, 12.0, 346.0, 270.0
    bottom = top + plot_height
    last = max(len(values) for _, values in curves) - 1
    parts = []
    for mark in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - mark * plot_height
        parts += [_line(left, y, left + plot_width, y), _text(left - 8, y + 4, f"{mark:.0%}", "end", FAINT)]
    for mark in ticks(0, last, 6):
        if mark <= last:
            x = left + plot_width * mark / max(1, last)
            parts += [_line(x, bottom, x, bottom + 5, FAINT), _text(x, bottom + 20, f"{mark:g}", "middle", FAINT)]
    for index, (_, values) in enumerate(curves):
        points = " ".join(
            f"{left + plot_width * i / max(1, last):.1f},{bottom - value * plot_height:.1f}"
            for i, value in enumerate(values)
        )
        parts.append(
            f"<polyline points='{points}' fill='none' stroke='{COLOURS[index % len(COLOURS)]}' stroke-width='2.2' "
            f"stroke-dasharray='{DASHES[index % len(DASHES)]}'/>"
        )
    parts.append(_text(left + plot_width / 2, bottom + 42, x_axis, "middle"))
    middle = top + plot_height / 2
    parts.append(_text(14, middle, y_axis, "middle", more=f"transform='rotate(-90 14 {middle:.0f})'"))
    y = bottom + 66
    for index, (name, values) in enumerate(curves):
        parts += [
            f"<line x1='{left:.0f}' y1='{y - 4:.0f}' x2='{left + 36:.0f}' y2='{y - 4:.0f}' "
            f"stroke='{COLOURS[index % len(COLOURS)]}' stroke-width='2.2' "
            f"stroke-dasharray='{DASHES[index % len(DASHES)]}'/>",
            _text(left + 44, y, f"{name} ({values[-1]:.0%} at the end)"),
        ]
        y += 21
    return _svg(width, y + 2, y_axis, parts)


def heat_map(
    name: str,
    values: Sequence[Sequence[float]],
    columns: Sequence[str],
    rows: Sequence[str],
    axes: tuple[str, str],
) -> str:
    """A table of shares from 0 to 1 as colours; each cell holds its number. `axes`: names of columns and of rows."""
    cell_width, cell_height, left, top = 58.0, 30.0, 74.0, 34.0
    # Maps with few columns are as wide as their names need, all alike, so that they stand in columns.
    width = max(left + cell_width * len(columns) + 16, left + 9 * max(20, len(name)))
    bottom = top + cell_height * len(rows)
    parts = [_text(left, 20, name, more="font-weight='600'")]
    for i, row in enumerate(values):
        y = top + cell_height * i
        parts.append(_text(left - 8, y + 20, rows[i], "end", FAINT))
        for j, value in enumerate(row):
            x = left + cell_width * j
            shade = int(245 - 165 * value), int(247 - 110 * value), int(250 - 95 * value)
            parts += [
                f"<rect x='{x:.1f}' y='{y:.1f}' width='{cell_width - 2}' height='{cell_height - 2}' "
                f"fill='rgb{shade}'/>",
                _text(x + cell_width / 2 - 1, y + 19, f"{value:.2f}", "middle", "#fff" if value > 0.6 else INK),
            ]
    for j, column in enumerate(columns):
        parts.append(_text(left + cell_width * (j + 0.5) - 1, bottom + 16, column, "middle", FAINT))
    middle = (top + bottom) / 2
    parts += [
        _text(left + cell_width * len(columns) / 2, bottom + 38, axes[0], "middle"),
        _text(14, middle, axes[1], "middle", more=f"transform='rotate(-90 14 {middle:.0f})'"),
    ]
    return _svg(width, bottom + 52, name, parts)
