"""A coordinator of its own for a transfer benchmark, with an adapter of the size wanted."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.exchange import fake_base
from profiles.model import ModuleShape
from trials.fleet import LocalFleet

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """So many devices, each moving about so many bytes in either direction."""

    devices: int
    size_bytes: int


def run_section(base: Path, case: Case, rank: int) -> dict[str, dict[str, Any]]:
    """run.toml: every device gets the whole adapter, both ways in float32."""
    return {
        "run": {"name": "bench", "rounds": 1},
        "model": {"base": str(base)},
        "adapter": {"rank": rank},
        "method": {"name": "fedit"},
        "training": {"sequence_tokens": 128, "micro_batch": 1, "local_steps": 1},
        "wire": {"update": "float32", "slice": "float32"},
        "round": {"min_devices": case.devices, "gather_s": 0, "round_s": 3000,
                  "max_round_s": 3600},
        "evaluation": {"every_rounds": 1000},
    }  # fmt: skip


def rank_for(size_bytes: int, layers: int) -> int:
    """The rank at which an adapter of the fake base has about this size in float32."""
    shapes = {"q": (896, 896), "k": (128, 896), "v": (128, 896), "o": (896, 896),
              "gate": (4864, 896), "up": (4864, 896), "down": (896, 4864)}  # fmt: skip
    modules = tuple(
        ModuleShape(f"{i}.{name}", *shape) for i in range(layers) for name, shape in shapes.items()
    )
    each = 4 * sum(m.out_features + m.in_features for m in modules)
    return max(1, round(size_bytes / each))


@contextlib.contextmanager
def coordinator(case: Case, *, secured: bool = False) -> Iterator[tuple[LocalFleet, Path]]:
    """A coordinator that serves such a case, and a folder for its devices."""
    layers = 24 if case.size_bytes > 4 * MIB else 2
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = fake_base(folder / "base", layers=layers)
        run = run_section(base, case, rank_for(case.size_bytes, layers))
        with LocalFleet(folder / "fleet", run, [], secured=secured) as fleet:
            fleet.start_coordinator()
            fleet.await_token()
            yield fleet, folder


def join_words(fleet: LocalFleet, devices: int) -> str:
    """What so many devices join with: an invitation's short form, or a plain-text fleet's token."""
    if fleet.secured:
        return fleet.invitation(uses=devices).short_form
    return (fleet.state / "join-token").read_text().strip()
