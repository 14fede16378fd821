"""Flower's stock FedAvg over dense float32 factors; every version is kept with the time it came.

Runs in Flower's own environment. Evaluates nothing: that is done afterwards, alike for both sides.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


def main(grid: Grid, context: Context) -> None:
    """Starts from `initial.npz` in the run's folder; leaves `round-N.npz` and when each came."""
    folder = Path(str(context.run_config["folder"]))
    devices = int(context.run_config["devices"])
    with np.load(folder / "initial.npz") as initial:
        names = list(initial)
        arrays = ArrayRecord([initial[name] for name in names])

    def keep(round_: int, arrays: ArrayRecord) -> None:
        came = time.time()
        values = dict(zip(names, arrays.to_numpy_ndarrays(), strict=True))
        np.savez(folder / f"round-{round_}.npz", **values)
        with (folder / "rounds.txt").open("a") as times:
            times.write(f"{round_} {came}\n")

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=devices, min_available_nodes=devices)
    strategy.start(
        grid=grid, initial_arrays=arrays, num_rounds=int(context.run_config["rounds"]),
        evaluate_fn=keep,
    )  # fmt: skip


app.main()(main)
