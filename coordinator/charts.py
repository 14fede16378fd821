"""Charts as inline SVG, in plain Python: lines with bands, scatter, bars, dots with intervals.

A function takes values and returns one `<svg>` as text; the page brings `CSS` once. Works without
scripts, in light and dark, for 0, 1 or many values; values that are not finite are left out. Every
name is escaped: names of devices come from devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.chart_frame import (
    COLOURS,
    CSS,
    LETTER,
    WIDTH,
    Axis,
    clipped,
    dash,
    legend,
    line,
    mark,
    number,
    scale,
    series_class,
    svg,
    swatch,
    text,
    x_axis,
    y_axis,
)

__all__ = [
    "CSS", "Axis", "Bars", "Dot", "Group", "Interval", "Line", "bar_chart", "interval_chart",
    "line_chart", "scatter_chart",
]  # fmt: skip

TOP = 30.0  # below the title of the y axis
PLOT = 190.0  # height of lines and scatters
LEFT, RIGHT = 58.0, WIDTH - 12.0
LABELLED_DOTS = 12  # more labels hide each other; each dot still tells its name when pointed at
ROW = 24.0  # of bars and intervals
NOTHING = "nothing measured yet"


@dataclass(frozen=True)
class Line:
    """A series over x, in order of x. band: (x, low, high), an interval around it."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Dot:
    """One observation."""

    x: float
    y: float
    label: str = ""


@dataclass(frozen=True)
class Group:
    """Observations of a kind."""

    name: str
    dots: Sequence[Dot]


@dataclass(frozen=True)
class Bars:
    """One value per category."""

    name: str
    values: Sequence[float]


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; low and high None where there is none."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def line_chart(
    title: str, lines: Sequence[Line], x: Axis, y: Axis, description: str = ""
) -> str:  # fmt: skip
    """Several series over a common x; the first eight in colours of their own."""
    kept = [
        Line(one.name, [p for p in one.points if _finite(*p)], [b for b in one.band if _finite(*b)])
        for one in lines
    ]
    kept = [one for one in kept if one.points]
    across = scale((px for one in kept for px, _ in one.points), LEFT, RIGHT - 6, whole=x.whole)
    heights = [py for one in kept for _, py in one.points]
    heights += [edge for one in kept for _, low, high in one.band for edge in (low, high)]
    up = scale(heights, TOP + PLOT, TOP, most=5, whole=y.whole)
    drawn = [*y_axis(up, y, LEFT, RIGHT), *x_axis(across, x, TOP + PLOT)]
    for index, one in reversed(list(enumerate(kept))):  # the first on top
        look = f"{series_class(index)} {dash(index)}"
        if len(one.band) > 1:
            edge = [f"{across(bx):.1f},{up(high):.1f}" for bx, _, high in one.band]
            edge += [f"{across(bx):.1f},{up(low):.1f}" for bx, low, _ in reversed(one.band)]
            drawn.append(f'<polygon class="band {series_class(index)}" points="{" ".join(edge)}"/>')
        if len(one.points) > 1:
            path = " ".join(f"{across(px):.1f},{up(py):.1f}" for px, py in one.points)
            drawn.append(f'<polyline class="line {look}" points="{path}"/>')
        marked = one.points if len(one.points) <= 30 else one.points[-1:]
        drawn += [
            mark(across(px), up(py), index, f"{one.name}: {number(py)} at {x.name} {px:g}".strip())
            for px, py in marked
        ]
    if not kept:
        drawn.append(_nothing())
    words, taken = legend([one.name for one in kept], TOP + PLOT + 48, "lines")
    said = description or _told(
        [f"{one.name or y.name} {number(one.points[0][1])} at {x.name} {one.points[0][0]:g}, "
         f"{number(one.points[-1][1])} at {one.points[-1][0]:g}" for one in kept]
    )  # fmt: skip
    return svg(title, said, TOP + PLOT + 48 + taken, [*drawn, *words])


def scatter_chart(
    title: str, groups: Sequence[Group], x: Axis, y: Axis, description: str = ""
) -> str:  # fmt: skip
    """Observations by two values; labels where few enough to be read."""
    kept = [Group(g.name, [d for d in g.dots if _finite(d.x, d.y)]) for g in groups]
    kept = [g for g in kept if g.dots]
    dots = [d for g in kept for d in g.dots]
    across = scale((d.x for d in dots), LEFT, RIGHT - 6, whole=x.whole)
    up = scale((d.y for d in dots), TOP + PLOT, TOP, most=5, whole=y.whole)
    drawn = [*y_axis(up, y, LEFT, RIGHT), *x_axis(across, x, TOP + PLOT, TOP)]
    if up.low < 0 < up.high:
        drawn.append(line(LEFT, up(0), RIGHT, up(0), "axis"))
    for index, group in reversed(list(enumerate(kept))):
        for d in group.dots:
            hint = f"{d.label or group.name}: {number(d.x)}, {number(d.y)}"
            drawn.append(mark(across(d.x), up(d.y), index, hint))
    if len(dots) <= LABELLED_DOTS:
        drawn += _labels([(across(d.x), up(d.y), d.label) for d in dots if d.label])
    if not kept:
        drawn.append(_nothing())
    words, taken = legend([g.name for g in kept], TOP + PLOT + 48)
    said = description or _told(
        [f"{d.label or 'one'} {x.name} {number(d.x)}, {y.name} {number(d.y)}" for d in dots]
    )
    return svg(title, said, TOP + PLOT + 48 + taken, [*drawn, *words])


def bar_chart(
    title: str, names: Sequence[str], series: Sequence[Bars], value: Axis, *,
    stacked: bool = False, description: str = "",
) -> str:  # fmt: skip
    """Lying bars, one row a category, so that long names and fifty devices have room.

    stacked: values, none of them negative, lie end to end. Raises `ValueError` where a series has
    not one value per name.
    """
    for one in series:
        if len(one.values) != len(names):
            raise ValueError(f"{one.name}: {len(one.values)} values for {len(names)} names")
    clean = [[v if math.isfinite(v) else 0.0 for v in one.values] for one in series]
    ends = [v for values in clean for v in values]
    if stacked:
        ends = [math.fsum(values) for values in zip(*clean, strict=True)]
    left, most = _name_room(names)
    thick = ROW - 8 if stacked or len(series) < 2 else 12.0
    step = ROW if stacked else max(ROW, thick * len(series) + 8)
    bottom = 8 + step * max(1, len(names))
    across = scale(ends, left, RIGHT - 10, most=5, whole=value.whole, zero=True)
    drawn = x_axis(across, value, bottom, 4)
    for row, name in enumerate(names):
        y, at = 8 + row * step, 0.0
        drawn.append(text(left - 6, y + step / 2 + 1, clipped(name, most), "end"))
        for index, one in enumerate(series):
            v = clean[index][row]
            begin, top = (at, y) if stacked else (0.0, y + index * thick)
            at += v
            x1, x2 = sorted((across(begin), across(begin + v)))
            hint = f"{name}, {one.name}: {number(one.values[row])}" if one.name else name
            drawn.append(swatch(x1, top, x2 - x1, thick, index, hint))
    if not names:
        drawn.append(text((left + RIGHT) / 2, 24, NOTHING, "middle quiet"))
    words, taken = legend([one.name for one in series], bottom + 48, "bars")
    said = description or _told(
        [f"{name}: " + ", ".join(f"{one.name} {number(one.values[row])}".strip() for one in series)
         for row, name in enumerate(names)]
    )  # fmt: skip
    return svg(title, said, bottom + 48 + taken, [*drawn, *words])


def interval_chart(
    title: str, rows: Sequence[Interval], value: Axis, *, reference: float | None = None,
    description: str = "",
) -> str:  # fmt: skip
    """A dot and its interval per row; `reference` draws a line, say where there is no effect.

    Names too long to stand beside their rows stand above them.
    """
    kept = [r for r in rows if _finite(r.value)]
    edges = [e for r in kept for e in (r.value, r.low, r.high) if e is not None]
    left, most = _name_room([r.name for r in kept])
    above = any(len(r.name) > most for r in kept)
    step = ROW
    if above:
        left, most, step = 12.0, int(RIGHT / LETTER), ROW + 18
    bottom = 8 + step * max(1, len(kept))
    held = edges if reference is None else [*edges, reference]
    across = scale(held, left, RIGHT - 10, most=5, whole=value.whole)
    drawn = x_axis(across, value, bottom, 4)
    if reference is not None:
        drawn.append(line(across(reference), 4, across(reference), bottom, "axis d1"))
    for row, r in enumerate(kept):
        y = 8 + (row + 1) * step - ROW / 2
        name = clipped(r.name, most)
        drawn.append(text(2, y - 13, name) if above else text(left - 6, y + 5, name, "end"))
        hint = f"{r.name}: {number(r.value)}"
        if r.low is not None and r.high is not None and _finite(r.low, r.high):
            low, high = across(r.low), across(r.high)
            drawn.append(line(low, y, high, y, "line s0"))
            drawn += [line(e, y - 5, e, y + 5, "line s0") for e in (low, high)]
            hint += f" [{number(r.low)}, {number(r.high)}]"
        drawn.append(mark(across(r.value), y, 0, hint))
    if not kept:
        drawn.append(text((left + RIGHT) / 2, 24, NOTHING, "middle quiet"))
    said = description or _told([f"{r.name} {number(r.value)}{_range(r)}" for r in kept])
    return svg(title, said, bottom + 48, drawn)


def _range(r: Interval) -> str:
    return "" if r.low is None or r.high is None else f" ({number(r.low)} to {number(r.high)})"


def _labels(wanted: Sequence[tuple[float, float, str]]) -> list[str]:
    """Labels beside their dots, on the side with room; one that would hide another is left out."""
    taken: list[tuple[float, float, float]] = []
    drawn = []
    for x, y, label in wanted:
        words = clipped(label, 18)
        width = len(words) * LETTER
        left = x + 8 if x + 8 + width <= WIDTH else x - 8 - width
        if any(left < b and a < left + width and abs(y - at) < 14 for a, b, at in taken):
            continue
        taken.append((left, left + width, y))
        drawn.append(text(left, y + 5, words))
    return drawn


def _name_room(names: Sequence[str]) -> tuple[float, int]:
    """(where the plot begins, letters of a name that are shown)."""
    longest = min(20, max((len(n) for n in names), default=4))
    return 14 + longest * LETTER + 6, longest


def _told(parts: Sequence[str]) -> str:
    """The values in words; beyond sixteen the table beside the chart tells them better."""
    more = f"; and {len(parts) - 2 * COLOURS} more" if len(parts) > 2 * COLOURS else ""
    return ("; ".join(parts[: 2 * COLOURS]) + more or NOTHING) + "."


def _nothing() -> str:
    return text((LEFT + RIGHT) / 2, TOP + PLOT / 2, NOTHING, "middle quiet")


def _finite(*values: float) -> bool:
    return all(map(math.isfinite, values))
