"""Charts: sound SVG whatever the values, readable ticks, nothing of a name becomes markup."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.chart_frame import COLOURS, WIDTH, round_ticks, scale, tick_texts
from coordinator.charts import (
    CSS,
    Axis,
    Bars,
    Dot,
    Group,
    Interval,
    Line,
    bar_chart,
    interval_chart,
    line_chart,
    scatter_chart,
)

HOSTILE = "\"><script>alert(1)</script>&'{{7*7}}"
X, Y = Axis("rounds merged", whole=True), Axis("loss", "nats per token")
SVG = "{http://www.w3.org/2000/svg}"


def every_chart(names, values):
    """One of each kind over the same names and values."""
    return [
        line_chart("t", [Line(n, [(0, v), (1, v + 1)], [(0, v - 1, v + 1), (1, v, v + 2)])
                         for n, v in zip(names, values, strict=True)], X, Y),
        scatter_chart("t", [Group(n, [Dot(v, -v, n)])
                            for n, v in zip(names, values, strict=True)], Axis("ratio"), Y),
        bar_chart("t", names, [Bars("sent", values), Bars("fetched", values)], Axis("b", "MB")),
        bar_chart("t", names, [Bars("a", values), Bars("b", values)], Axis("s"), stacked=True),
        interval_chart("t", [Interval(n, v, v - 1, v + 1)
                             for n, v in zip(names, values, strict=True)], Y, reference=0.0),
    ]  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_every_chart_is_sound_named_and_described_for_any_number_of_devices(count):
    names = [f"device-{i}" for i in range(count)]
    for chart in every_chart(names, [1.0 + i for i in range(count)]):
        root = ElementTree.fromstring(chart)
        assert root.get("role") == "img"
        assert root.find(f"{SVG}title").text == "t"
        assert root.find(f"{SVG}desc").text
        assert root.get("aria-labelledby") == root.find(f"{SVG}title").get("id")
        if not count:
            assert "nothing measured yet" in chart


def test_names_of_devices_never_become_markup():
    for chart in every_chart([HOSTILE, "b"], [1.0, 2.0]):
        root = ElementTree.fromstring(chart)  # would fail on markup out of place
        assert not list(root.iter(f"{SVG}script"))
        assert HOSTILE in "".join(root.itertext()) or "…" in chart


def test_charts_hold_no_script_no_inline_style_and_nothing_from_elsewhere():
    for chart in every_chart(["a", "b"], [1.0, 2.0]):
        assert not re.search(r"<script|\son\w+=|\sstyle=|href=", chart)
    assert "url(" not in CSS and "@import" not in CSS


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=6))
def test_no_value_breaks_a_chart(values):
    names = [str(i) for i in range(len(values))]
    for chart in (every_chart(names, values)[0], every_chart(names, values)[1]):
        for element in ElementTree.fromstring(chart).iter():
            for key in ("x", "y", "x1", "y1", "points", "d"):
                assert "nan" not in element.get(key, "") and "inf" not in element.get(key, "")


def test_a_value_that_is_not_finite_is_left_out_and_the_others_stay():
    chart = line_chart("t", [Line("a", [(0, 1.0), (1, math.nan), (2, 3.0)])], X, Y)
    assert len(re.findall(r"<title>a:", chart)) == 2


def test_equal_values_still_have_a_scale_around_them():
    for value in (0.0, 5.0, -3.0, 1e-9, 1e9):
        found = scale([value, value], 0, 100)
        assert found.low <= value <= found.high and found.low < found.high
        assert 0 <= found(value) <= 100


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 9))
def test_ticks_enclose_the_range_in_equal_round_steps(low, width, most):
    ticks = round_ticks(low, low + width, most)
    assert ticks[0] <= low + 1e-6 * width and ticks[-1] >= low + width * (1 - 1e-6)
    assert len(ticks) <= most + 2
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert any(abs(mantissa - m) < 1e-6 for m in (1, 2, 2.5, 5, 10))


def test_rounds_have_whole_numbers_as_ticks():
    assert all(t == int(t) for t in scale([0, 1, 2], 0, 1, whole=True).ticks)
    assert tick_texts(scale([0, 1, 2], 0, 1, whole=True).ticks) == ["0", "1", "2"]


def test_ticks_are_written_with_the_decimals_that_their_step_needs():
    assert tick_texts((0.0, 0.25, 0.5)) == ["0.00", "0.25", "0.50"]
    assert tick_texts((-1000.0, 0.0, 1000.0)) == ["−1,000", "0", "1,000"]


def test_more_series_than_colours_are_counted_in_the_legend():
    chart = line_chart("t", [Line(f"d{i}", [(0, 1.0)]) for i in range(50)], X, Y)
    assert f"{50 - COLOURS} others" in chart


def test_series_differ_in_marker_dash_or_hatching_not_in_colour_alone():
    lines = line_chart("t", [Line(f"d{i}", [(0, i), (1, i)]) for i in range(COLOURS)], X, Y)
    looks = re.findall(r'<polyline class="line s\d (d\d)"', lines)
    marks = [re.search(r"d=\"M[\d. ]+(.*?)\"", m).group(1)
             for m in re.findall(r"<path [^>]*><title>", lines)[::2]]  # fmt: skip
    assert len(set(zip(looks, marks, strict=True))) == COLOURS
    bars = bar_chart("t", ["a"], [Bars(str(i), [50.0]) for i in range(3)], Y, stacked=True)
    assert bars.count('class="hatch"') == 4  # two of three, on the bar and in the legend


def test_words_stay_within_the_picture():
    chart = bar_chart("t", ["a-device-whose-name-is-sixty-three-letters-long-as-names-may-be-abc"],
                      [Bars("s", [12_345_678.0])], Axis("bytes", "B"))  # fmt: skip
    for label in ElementTree.fromstring(chart).iter(f"{SVG}text"):
        assert 0 <= float(label.get("x")) <= WIDTH


def test_bars_with_a_value_missing_are_refused():
    with pytest.raises(ValueError, match="1 values for 2 names"):
        bar_chart("t", ["a", "b"], [Bars("s", [1.0])], Y)


def test_long_names_of_intervals_are_told_whole_above_their_rows():
    names = [f"sketch, fslora, ratios {a}" for a in ("independent", "anti-size", "wealth")]
    drawn = interval_chart("t", [Interval(n, 0.1, 0.0, 0.2) for n in names], Axis("nats"))
    texts = [e.text for e in ElementTree.fromstring(drawn).iter() if e.tag.endswith("text")]
    assert set(names) <= set(texts), texts
    low = interval_chart("t", [Interval(n, 0.1, 0.0, 0.2) for n in "abc"], Axis("nats"))
    assert height(low) < height(drawn)


def height(drawn):
    return float(ElementTree.fromstring(drawn).get("viewBox").split()[3])
