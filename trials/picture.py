"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path

from coordinator.report import RunReport

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
        label = f"{row.device_id} ({row.language}, k={row.k})"
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
