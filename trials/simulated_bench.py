"""What all simulated devices of a process share: one base, and everybody's code in tokens.

Knows the trainer's workbench and rows; it knows no rounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_agent.training.connectors import DataSelection
from edge_agent.training.workbench import LocalRows, Workbench


class SharedBench(Workbench):
    """A workbench that keeps the rows of every selection, and can give out fewer to train on."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[tuple[object, ...], LocalRows] = {}
        self._limits: dict[DataSelection, int | None] = {}

    def limit(self, data: DataSelection, train_sequences: int | None) -> None:
        """From now on at most so many training sequences of this selection, evenly spaced."""
        self._limits[data] = train_sequences

    def rows(self, folder: Any, base: Any, data: DataSelection, *how: Any) -> LocalRows:
        """As a workbench's, with the limit; the held-out rows are the same under every limit."""
        key = (folder, data, *how)
        if key not in self._kept:
            self._kept[key] = super().rows(folder, base, data, *how)
        found, most = self._kept[key], self._limits.get(data)
        if most is None or most >= len(found.train):
            return found
        places = np.linspace(0, len(found.train) - 1, most).astype(np.int64)
        return LocalRows(found.train.take(places), found.held_out, found.main_language)
