"""Values in words: sizes, rates, durations, ages. A fact that is not known is an en dash."""

from __future__ import annotations

import math
import time
from urllib.parse import quote

UNKNOWN = "–"


def size(count: float | None) -> str:
    """Bytes in units of a thousand."""
    if count is None:
        return UNKNOWN
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= 0.9995 * factor:
            return f"{_figures(count / factor)} {unit}"
    return f"{count:.0f} B"


def rate(bps: float | None) -> str:
    """Bits per second."""
    if bps is None:
        return UNKNOWN
    return f"{_figures(bps / 1e6)} Mbit/s" if bps >= 1e6 else f"{_figures(bps / 1e3)} kbit/s"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def ago(seconds: float) -> str:
    """How long since, coarsely, so that it does not flicker."""
    if seconds < 10:
        return "just now"
    if seconds < 120:
        return f"{int(seconds) // 10 * 10} s ago"
    if seconds < 7200:
        return f"{int(seconds) // 60} min ago"
    if seconds < 172800:
        return f"{int(seconds) // 3600} h ago"
    return f"{int(seconds) // 86400} days ago"


def moment(at: float | None) -> str:
    """A point in time, UTC."""
    return UNKNOWN if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at)) + " UTC"


def decimal(value: float | None, digits: int = 3) -> str:
    """A number, say a loss."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """A difference, with its sign."""
    return UNKNOWN if value is None else f"{value:+.{digits}f}".replace("-", "−")


def relative(value: float | None) -> str:
    """A relative error, small ones by their power of ten."""
    if value is None:
        return UNKNOWN
    return f"{value:.3f}" if value == 0 or value >= 1e-3 else f"{value:.1e}".replace("-", "−")


def rates(up_bps: float, down_bps: float) -> str:
    """Both ways, in Mbit/s, without the unit."""
    return f"{_figures(up_bps / 1e6)} / {_figures(down_bps / 1e6)}"


def percent(share: float | None, digits: int = 0) -> str:
    """A share of one."""
    return UNKNOWN if share is None else f"{100 * share:.{digits}f} %"


def counted(count: int, thing: str) -> str:
    """A number of things."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def device_link(device_id: str) -> str:
    """The address of a device's page; its name may hold anything."""
    return f"/devices/{quote(device_id, safe='')}"


def _figures(value: float) -> str:
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"
