"""Pictures of a trial from its ledger: time line, links, loss; and of several trials.

Draws what it is given; sums and shares are `trials.results`'.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator.phases import PHASES
from trials.results import Results

COLOURS = {"wait": "0.88", "fetch": "C0", "load": "C7", "train": "C2", "evaluate": "C8",
           "paused": "C5", "pack": "C4", "push": "C1"}  # fmt: skip
MOST_DRAWN = 40  # devices; more are not to be told apart
BIN_S = 5.0  # of what a link moved: single seconds say more of TCP's bursts than of the rate


def timeline(results: Results, path: Path) -> Path:
    """A bar per device and round, from the first round's opening, by phase; merges behind them."""
    plt = _pyplot()
    from matplotlib.patches import Patch

    devices = sorted({t.device_id for t in results.times})[:MOST_DRAWN]
    rows = {device: row for row, device in enumerate(reversed(devices))}
    began = results.first_opened_at
    figure, axes = plt.subplots(figsize=(11, 1.6 + 0.42 * len(devices)), layout="constrained")
    shown = set()
    for t in results.times:
        if t.device_id not in rows:
            continue
        at = t.begun_at - began - t.seconds["wait"]
        for phase in PHASES:
            seconds = t.seconds[phase]
            if seconds <= 0:
                continue
            left = max(0.0, at)  # what was before the first round is not drawn
            width = at + seconds - left
            if width > 0:
                axes.barh(rows[t.device_id], width, left=left, height=0.7, color=COLOURS[phase])
                shown.add(phase)
            at += seconds
    rounds: dict[int, dict[str, Any]] = {r["round"]: r for r in results.ledger}
    for r in rounds.values():
        if r["closed_at"] is not None and r["merged_at"] is not None:
            axes.axvspan(r["closed_at"] - began, r["merged_at"] - began, color="C3", alpha=0.5,
                         lw=0.8)  # fmt: skip
        axes.axvline(r["opened_at"] - began, color="0.35", lw=0.7, ls=":")
    handles = [Patch(color=COLOURS[p], label=p) for p in PHASES if p in shown]
    handles.append(Patch(color="C3", alpha=0.5, label="merge"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles),
                  fontsize="small", frameon=False)  # fmt: skip
    axes.set_yticks(list(rows.values()), list(rows))
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds since the first round opened (dotted: a round opens)")
    axes.set_title(f"Where each device's time went, {results.facts.run}")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def links_picture(results: Results, path: Path) -> Path:
    """Per device: the link's rate each way over time, and what moved."""
    plt = _pyplot()

    began = results.facts.began_at if not results.ledger else results.first_opened_at
    by_device: dict[str, list[dict[str, Any]]] = {}
    for row in results.links:
        by_device.setdefault(row["device"], []).append(row)
    devices = list(by_device)[:MOST_DRAWN]
    figure, grid = plt.subplots(
        len(devices), 2, figsize=(11, 0.8 + 1.5 * len(devices)), layout="constrained", sharex=True,
        squeeze=False,
    )  # fmt: skip
    for device, pair in zip(devices, grid, strict=True):
        rows = by_device[device]
        at = [r["at"] - began for r in rows]
        for axes, way, colour in zip(pair, ("down", "up"), ("C0", "C1"), strict=True):
            rate = [r[f"{way}_bps"] / 1e6 for r in rows]
            axes.fill_between(at, rate, step="post", color="0.85", lw=0, label="the link's rate")
            if rows[0][f"{way}_bytes"] is not None:  # of links that are not emulated, none knows
                times, moved = _moved(at, [r[f"{way}_bytes"] for r in rows])
                axes.step(times, moved, where="post", color=colour, lw=1.1,
                          label="moved, as packets")  # fmt: skip
            axes.set_ylim(bottom=0)
            axes.set_title(f"{device}, {way}", fontsize="small", loc="left")
            axes.grid(alpha=0.25)
        pair[0].set_ylabel("Mbit/s")
    for axes in grid[-1]:
        axes.set_xlabel("seconds since the first round opened")
    grid[0][0].legend(fontsize="x-small", loc="upper right")
    grid[0][1].legend(fontsize="x-small", loc="upper right")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _moved(at: Sequence[float], total_bytes: Sequence[int]) -> tuple[list[float], list[float]]:
    """(starts of bins, Mbit/s in them) from a running count of bytes."""
    starts, rates = [at[0]], []
    begun, held = at[0], total_bytes[0]
    for moment, total in zip(at, total_bytes, strict=True):
        if moment - begun >= BIN_S:
            rates.append(8 * (total - held) / 1e6 / (moment - begun))
            starts.append(moment)
            begun, held = moment, total
    return starts, [*rates, rates[-1] if rates else 0.0]


def loss_curve(results: Results, path: Path) -> Path:
    """Fleet mean loss against time and against bytes."""
    return compare_trials([results], path)


def compare_trials(found: Sequence[Results], path: Path) -> Path:
    """Fleet mean loss of several trials, against time and against bytes moved by all devices."""
    plt = _pyplot()

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for results in found:
        curve = results.curve
        label = results.folder.resolve().name
        loss = [point[2] for point in curve]
        left.plot([point[0] for point in curve], loss, "-o", ms=4, label=label)
        right.plot([point[1] for point in curve], loss, "-o", ms=4, label=label)
    left.set_xlabel("seconds since the first round opened")
    right.set_xlabel("moved by all devices, both ways, MB")
    left.set_ylabel("fleet mean of held-out loss, nats per token")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    if len(found) > 1:
        right.legend(fontsize="small")
    figure.suptitle("Held-out loss of the whole adapter")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
