"""Links over time: steady ones, outages, recordings, and what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.trace import LinkState, Outage, TraceError, read_trace, replayed, steady, write_trace

GOOD, BAD = LinkState(1e6, 4e6, 0.05), LinkState(2e5, 4e5, 0.2, 0.1)
HEADER = "t_s,up_bps,down_bps,rtt_s,loss\n"


def test_nothing_passes_during_an_outage_and_everything_between():
    link = steady(GOOD, Outage(every_s=60, lasts_s=20))
    assert [link(t).up_bps for t in (0, 39.9, 40, 59.9, 60, 99, 101)] == [
        1e6, 1e6, 0, 0, 1e6, 1e6, 0,
    ]  # fmt: skip
    assert link(45).delay_s == GOOD.delay_s
    assert all(steady(GOOD)(t) == GOOD for t in (0, 59, 1e6))


@given(t=st.floats(0, 1e6))
def test_a_recording_begins_again(t):
    link = replayed([0, 2, 5], [GOOD, BAD, GOOD])
    assert link(t) == (BAD if 2 <= t % 8 < 5 else GOOD)


def test_a_recording_is_read_as_documented(tmp_path):
    path = tmp_path / "bus.csv"
    path.write_text(HEADER + "0,1e6,4e6,0.1,0\n10,0,0,0.1,0\n12,2e5,4e5,0.4,0.1\n")
    link = read_trace(path)
    assert link(0) == GOOD
    assert link(11).up_bps == 0
    assert link(13) == BAD


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must begin with the line t_s,up_bps"),
        ("t,up\n0,1\n", "must begin with the line t_s,up_bps"),
        (HEADER, "begins at t_s = 0"),
        (HEADER + "1,1,1,0,0\n", "begins at t_s = 0"),
        (HEADER + "0,1,1,0,0\n0,1,1,0,0\n", "must rise"),
        (HEADER + "0,1,1,0,0\n2,fast,1,0,0\n", "line 3"),
        (HEADER + "0,1,1,0\n", "line 2"),
        (HEADER + "0,-1,1,0,0\n", "line 2: rates"),
        (HEADER + "0,nan,1,0,0\n", "line 2: rates"),
        (HEADER + "0,1,1,inf,0\n", "line 2: rates"),
        (HEADER + "0,1,1,0,1\n", "line 2: loss"),
    ],
)
def test_a_bad_recording_is_refused_with_its_line(tmp_path, text, told):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=told):
        read_trace(path)


@pytest.mark.parametrize(("every", "lasts"), [(60, 0), (60, 60), (60, -1), (0, 0), (math.nan, 1)])
def test_an_outage_that_is_none_is_refused(every, lasts):
    with pytest.raises(TraceError, match="outage"):
        Outage(every, lasts)


def test_what_is_written_is_read_again_and_ends_when_it_should(tmp_path):
    path, gone = tmp_path / "train.csv", LinkState(0, 0, 0.05)
    write_trace(path, [0, 10, 12.5], [GOOD, gone, BAD], ends_s=20)
    link = read_trace(path)
    assert [link(t) for t in (0, 11, 12.5, 19.9)] == [GOOD, gone, BAD, BAD]
    assert link(20.1) == GOOD, "it begins again at its end"


def test_a_recording_that_cannot_be_read_is_not_written(tmp_path):
    with pytest.raises(TraceError, match="must rise"):
        write_trace(tmp_path / "a.csv", [0, 0], [GOOD, BAD])
    assert not (tmp_path / "a.csv").exists()
