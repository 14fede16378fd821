"""Pictures of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.report import RunReport

if TYPE_CHECKING:
    from trials.compare import Outcome

OWN = ("slice", "trained")


def loss_picture(report: RunReport, path: Path) -> Path:
    """Held-out loss per device over rounds: lines for the global adapter, dots for slices."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for number, row in enumerate(report.rows):
        colour = f"C{number}"
        mine = [p for p in report.curve if p.device_id == row.device_id]
        whole = [(p.round, p.loss) for p in mine if p.subject == "global"]
        trained = [(p.round + 1, p.loss) for p in mine if (p.subject, p.stage) == OWN]
        label = f"{row.device_id} ({row.language}, k={row.rank})"
        axes.plot([x for x, _ in whole], [y for _, y in whole], "-o", color=colour, label=label)
        axes.plot([x for x, _ in trained], [y for _, y in trained], ".", color=colour, alpha=0.45)
    axes.plot([], [], "-o", color="grey", label="global adapter, as received")
    axes.plot([], [], ".", color="grey", alpha=0.6, label="own slice, after local training")
    axes.set_xlabel("rounds merged")
    axes.set_ylabel("held-out loss, nats per token")
    axes.set_title("Held-out loss on each device's own code")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def compare_picture(found: Sequence[Outcome], path: Path) -> Path:
    """Per method: fleet mean and worst device at the end, and both against bytes sent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    ranked = sorted(found, key=lambda o: -o.loss_after)
    height = max(4.0, 1.2 + 0.36 * len(ranked))
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, height), layout="constrained")
    places = range(len(ranked))
    for place, o in zip(places, ranked, strict=True):
        left.plot([o.loss_after, o.worst_after], [place, place], "-", color="0.75", zorder=1)
    left.plot([o.loss_after for o in ranked], places, "o", color="C0", label="fleet mean")
    left.plot([o.worst_after for o in ranked], places, "s", color="C3", label="worst device")
    left.axvline(ranked[0].loss_before, color="0.4", ls=":", label="fleet mean at the start")
    left.set_yticks(list(places), [o.method + ("*" if o.personal else "") for o in ranked])
    left.set_xlabel("held-out loss at the end, nats per token")
    left.grid(axis="x", alpha=0.25)
    left.legend(fontsize="small")
    shared = [o for o in ranked if not o.personal]  # a device's own model is another thing
    spread = max(o.loss_after for o in shared) - min(o.loss_after for o in shared)
    lowest = -math.inf
    for o in reversed(shared):
        moved = (o.up_bytes + o.down_bytes) / 1e6
        lowest = max(o.loss_after, lowest + 0.028 * spread)  # labels do not cover each other
        right.plot(moved, o.loss_after, "o", color="C0")
        right.annotate(
            o.method, (moved, o.loss_after), (1.06 * moved, lowest), fontsize="x-small",
            va="center", arrowprops={"arrowstyle": "-", "color": "0.8", "lw": 0.6},
        )  # fmt: skip
    right.set_xscale("log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter(ScalarFormatter())
    right.xaxis.set_minor_formatter(NullFormatter())
    right.set_xlabel("moved by the whole fleet, MB up and down")
    right.set_ylabel("fleet mean at the end, nats per token")
    right.margins(x=0.12)
    right.grid(alpha=0.25)
    figure.suptitle("Methods on the same devices, code, links and seed")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
