"""What every chart has: scales with round ticks, axes with units, a legend, a name and a summary.

Pure text: SVG elements as strings. Styled by classes alone (`CSS`), so that a page may forbid
inline styles; colours follow light and dark, and a marker, dash or hatching always says the same
as the colour.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 420.0  # user units; text of 14 is still 11 px where a phone leaves 340 px
LETTER = 8.1  # mean width of a letter of that text, in the widest of the usual fonts
COLOURS = 8  # series told apart; further ones are drawn alike and counted in the legend
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "plus")

CSS = """\
.chart { display: block; width: 100%; max-width: 35rem; height: auto; color: inherit;
  --s0: #0060a8; --s1: #b34700; --s2: #00734f; --s3: #8f3f80;
  --s4: #7a5c00; --s5: #00708a; --s6: #a3123f; --s7: #555a60; --other: #6d7278;
  --grid: #d9dce0; --axis: #565b61; --paper: #fff }
.chart text { font: 14px system-ui, sans-serif; fill: currentColor }
.chart .grid { stroke: var(--grid); stroke-width: 1 }
.chart .axis { stroke: var(--axis); stroke-width: 1 }
.chart .line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round }
.chart .thin { stroke-width: 1; opacity: .6 }
.chart .band { fill: var(--c); opacity: .16 }
.chart .mark { fill: var(--c); stroke: var(--paper); stroke-width: 1 }
.chart .open { fill: none; stroke: var(--c); stroke-width: 2 }
.chart .bar { fill: var(--c); stroke: var(--paper); stroke-width: 1 }
.chart .hatch { fill: none; stroke: var(--paper); stroke-width: 1; opacity: .7;
  pointer-events: none }
.chart .end { text-anchor: end }
.chart .middle { text-anchor: middle }
.chart .quiet { fill: var(--axis) }
.chart .d1 { stroke-dasharray: 7 3 }
.chart .d2 { stroke-dasharray: 2 3 }
.chart .d3 { stroke-dasharray: 9 3 2 3 }
.chart .s0 { --c: var(--s0) }
.chart .s1 { --c: var(--s1) }
.chart .s2 { --c: var(--s2) }
.chart .s3 { --c: var(--s3) }
.chart .s4 { --c: var(--s4) }
.chart .s5 { --c: var(--s5) }
.chart .s6 { --c: var(--s6) }
.chart .s7 { --c: var(--s7) }
.chart .other { --c: var(--other) }
@media (prefers-color-scheme: dark) {
  .chart { --s0: #6cb6ff; --s1: #ff9d57; --s2: #46d39a; --s3: #e3a1d6;
    --s4: #e8c547; --s5: #5fd0e6; --s6: #ff8fa8; --s7: #c3c8ce; --other: #8d949c;
    --grid: #343a42; --axis: #a3abb5; --paper: #14181d }
}
@media print { .chart { break-inside: avoid } }
"""


@dataclass(frozen=True)
class Axis:
    """What is measured along an axis. whole: only integers are ticks, as for rounds."""

    name: str
    unit: str = ""
    whole: bool = False

    @property
    def title(self) -> str:
        """Name and unit as text."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


@dataclass(frozen=True)
class Scale:
    """Values low..high along pixels start..stop, with ticks at round numbers."""

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """The place of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def round_ticks(low: float, high: float, most: int, whole: bool = False) -> tuple[float, ...]:
    """At most about `most` multiples of 1, 2, 2.5 or 5 times a power of ten that enclose the range.

    Raises `ValueError` unless low < high, both finite.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"no ticks between {low} and {high}")
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(number * step for number in range(first, last + 1))


def scale(
    values: Iterable[float], start: float, stop: float, *, most: int = 6, whole: bool = False,
    zero: bool = False,
) -> Scale:  # fmt: skip
    """A scale that holds all finite values, rounded outwards to its ticks; never empty."""
    kept = [v for v in values if math.isfinite(v)]
    if zero or not kept:
        kept.append(0.0)
    low, high = min(kept), max(kept)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        if low == 0.0:
            high = 1.0
        else:
            room = max(abs(low) * 0.05, 1.0 if whole else 0.0)
            low, high = low - room, high + room
            if zero:
                low, high = min(low, 0.0), max(high, 0.0)
    ticks = round_ticks(low, high, most, whole)
    return Scale(ticks[0], ticks[-1], start, stop, ticks)


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Ticks with as many decimals as their step needs; in powers of ten where those are shorter."""
    largest = max(abs(t) for t in ticks)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else largest
    if largest >= 1e7 or 0 < largest < 1e-3:
        return [f"{0.0 if abs(t) < step / 2 else t:.3g}" for t in ticks]
    decimals = next((d for d in range(6) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 6)
    return [f"{0.0 if abs(t) < step / 2 else t:,.{decimals}f}".replace("-", "−") for t in ticks]


def number(value: float) -> str:
    """A value in the words of a chart: three figures."""
    if not math.isfinite(value):
        return "unknown"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.3g}"
    return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}"{_class(kind)}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{_class(kind)}/>'
    )  # fmt: skip


def series_class(index: int) -> str:
    """The colour class of a series."""
    return f"s{index}" if index < COLOURS else "other"


def mark(x: float, y: float, index: int, hint: str = "") -> str:
    """The marker of a series; `hint` is shown when pointed at."""
    shape = MARKERS[index % len(MARKERS)] if index < COLOURS else "dot"
    path = {
        "circle": "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        "square": "m-4 -4h8v8h-8z",
        "triangle": "m0 -5l5 9h-10z",
        "diamond": "m0 -5.5l5 5.5l-5 5.5l-5 -5.5z",
        "cross": "m-4 -4l8 8m0 -8l-8 8",
        "plus": "m-5 0h10m-5 -5v10",
        "dot": "m-2 -2h4v4h-4z",
    }[shape]
    look = "open" if shape in ("cross", "plus") else "mark"
    start = f'<path d="M{x:.1f} {y:.1f}{path}" class="{look} {series_class(index)}"'
    return f"{start}><title>{escape(hint)}</title></path>" if hint else f"{start}/>"


def swatch(x: float, y: float, width: float, height: float, index: int, hint: str = "") -> str:
    """A filled rectangle of a series, hatched by its index."""
    start = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'class="bar {series_class(index)}"'
    )
    filled = f"{start}><title>{escape(hint)}</title></rect>" if hint else f"{start}/>"
    return filled + _hatching(x, y, width, height, index % 4)


def _hatching(x: float, y: float, width: float, height: float, kind: int) -> str:
    """Thin lines of the paper's colour: none, slanted, upright, lying."""
    right, bottom, lines = x + width, y + height, []
    if kind == 1:
        start = x - height
        while start < right:
            a, b = max(x, start), min(right, start + height)
            if b > a:
                lines.append(
                    f"M{a:.1f} {bottom - (a - start):.1f}L{b:.1f} {bottom - (b - start):.1f}"
                )
            start += 7
    elif kind == 2:
        lines = [f"M{x + 4 * n:.1f} {y:.1f}v{height:.1f}" for n in range(1, int(width / 4) + 1)]
    elif kind == 3:
        lines = [f"M{x:.1f} {y + 4 * n:.1f}h{width:.1f}" for n in range(1, int(height / 4))]
    return f'<path class="hatch" d="{"".join(lines)}"/>' if lines else ""


def clipped(words: str, most: int) -> str:
    """Words cut to a length, on one line."""
    flat = " ".join(words.split())
    return flat if len(flat) <= most else f"{flat[: most - 1]}…"


def y_axis(scale: Scale, axis: Axis, left: float, right: float) -> list[str]:
    """Grid lines, tick labels, and the title above them, where no head needs to be turned."""
    drawn = [text(2, 15, axis.title, "quiet")]
    for value, words in zip(scale.ticks, tick_texts(scale.ticks), strict=True):
        y = scale(value)
        drawn += [line(left, y, right, y, "grid"), text(left - 6, y + 5, words, "end quiet")]
    return drawn


def x_axis(scale: Scale, axis: Axis, y: float, top: float | None = None) -> list[str]:
    """The base line, ticks thinned until their labels have room, and the title below.

    top: vertical grid lines reach up to there.
    """
    drawn = [line(scale.start, y, scale.stop, y, "axis")]
    words = tick_texts(scale.ticks)
    room = (scale.stop - scale.start) / max(1, len(words) - 1)
    every = max(1, math.ceil((max(map(len, words)) + 1.5) * LETTER / room))
    for index, (value, label) in enumerate(zip(scale.ticks, words, strict=True)):
        x = scale(value)
        if top is not None:
            drawn.append(line(x, top, x, y, "grid"))
        drawn.append(line(x, y, x, y + 4, "axis"))
        if index % every == 0:
            over = x + len(label) * LETTER / 2 > WIDTH
            drawn.append(
                text(
                    WIDTH - 2 if over else x, y + 19, label, "end quiet" if over else "middle quiet"
                )
            )
    middle = (scale.start + scale.stop) / 2
    return [*drawn, text(middle, y + 38, axis.title, "middle quiet")]


def legend(names: Sequence[str], y: float, kind: str = "marks") -> tuple[list[str], float]:
    """(elements, the height they take) of the names of series; none where all are nameless.

    kind: "marks", "lines" (dashed as drawn) or "bars".
    """
    shown = [clipped(name, 24) for name in names[:COLOURS]]
    if len(names) > COLOURS:
        shown.append(f"{len(names) - COLOURS} others")
    if not any(shown):
        return [], 0.0
    drawn, x, row = [], 4.0, 0
    for index, name in enumerate(shown):
        width = 40 + len(name) * LETTER
        if x > 4 and x + width > WIDTH:
            x, row = 4.0, row + 1
        middle = y + row * 22 + 11
        if kind == "lines":
            look = f"line {series_class(index)} {dash(index)}"
            drawn.append(line(x, middle, x + 24, middle, look))
        if kind == "bars":
            drawn.append(swatch(x + 2, middle - 7, 22, 14, index))
        else:
            drawn.append(mark(x + 12, middle, index))
        drawn.append(text(x + 30, middle + 5, name))
        x += width + 8
    return drawn, 22.0 * (row + 1)


def dash(index: int) -> str:
    """The dash class of a series."""
    return f"d{index % 4}" if index < COLOURS else "thin"


def svg(title: str, description: str, height: float, drawn: Sequence[str]) -> str:
    """The chart as one element that screen readers take for an image with a name and a summary."""
    body = "".join(drawn)
    # Names must be unique on a page and the same on every reload of the same chart.
    name = hashlib.sha256(f"{title}{body}".encode()).hexdigest()[:10]
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:.0f} {height:.0f}" width="{WIDTH:.0f}" '
        f'height="{height:.0f}" role="img" aria-labelledby="t{name}" aria-describedby="d{name}" '
        f'xmlns="http://www.w3.org/2000/svg"><title id="t{name}">{escape(title)}</title>'
        f'<desc id="d{name}">{escape(description)}</desc>{body}</svg>'
    )


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
