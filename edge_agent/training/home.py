"""What a device keeps for itself between the rounds of a run: one safetensors file.

Knows the names of what is kept and which rows of the global adapter it belongs to. It knows no
torch and does not decide what is worth keeping. Arrays and identifiers only: no text of the local
code, though what was trained on it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiles.errors import MissingExtraError, SketchfleetError
from protos.contract import AdapterSpec
from protos.layout import Parts
from protos.transfer import write_durably

VERSION = 1
# Fields of a home, and names in its file.
GROUPS = ("slice", "personal", "side", "residual", "local")
MOMENT = "moment."

Rows = Mapping[str, NDArray[np.int64]]
"""Module -> sorted global rows (k,) that a slice holds of it."""

log = logging.getLogger("sketchfleet.trainer")


class HomeError(SketchfleetError):
    """A home that cannot be read, or does not hold what is asked of it."""


@dataclass(frozen=True, eq=False)
class Home:
    """Everything but `residual` and `local` belongs to `rows`, those of the slice trained last.

    slice: as it was trained, when parts of it are personal; personal: Ditto's own adapter; side:
    the frozen branch beside these two; moments: the optimiser's, by its name for them; residual:
    what updates left out so far, up (r, m), down (r, n) and core (r, r) by global row; local: the
    adapter that is never merged (`local_only`), of rows that are nobody else's.
    """

    round: int = 0
    alpha: float = 0.0  # lora_alpha of `slice` and `personal`
    rows: Rows = field(default_factory=dict)
    slice: dict[str, Parts] = field(default_factory=dict)
    personal: dict[str, Parts] = field(default_factory=dict)
    side: dict[str, Parts] = field(default_factory=dict)
    moments: dict[str, dict[str, Parts]] = field(default_factory=dict)
    residual: dict[str, Parts] = field(default_factory=dict)
    local: dict[str, Parts] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to keep."""
        return not (self.slice or self.personal or self.moments or self.residual or self.local)

    def at(self, rows: Rows) -> Home:
        """The home less the modules that it holds other rows of; dense tensors have no rows."""
        none = np.empty(0, dtype=np.int64)
        other = {n for n, r in rows.items() if not np.array_equal(self.rows.get(n, none), r)}

        def same(found: Mapping[str, Parts]) -> dict[str, Parts]:
            return {name: parts for name, parts in found.items() if name not in other}

        moments = {kind: same(found) for kind, found in self.moments.items()}
        return dataclasses.replace(
            self, slice=same(self.slice), personal=same(self.personal), moments=moments
        )


def read_home(path: Path | None, spec: AdapterSpec) -> Home:
    """The home in this file; an empty one, and a line in the log, when it is of no use.

    A home that cannot be read costs the device what it kept and no more: the round goes on.
    """
    if path is None or not path.exists():
        return Home()
    try:
        return load_home(path, spec)
    except HomeError as error:
        log.warning("%s", error, extra={"run": spec.run_id})
        return Home()


def load_home(path: Path, spec: AdapterSpec) -> Home:
    """The home in this file.

    Raises `HomeError` when it is damaged or of another run, `MissingExtraError` without
    safetensors.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingExtraError("safetensors", "train") from error
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {})["home"])
            if facts["version"] != VERSION:
                raise HomeError(
                    f"{path} has version {facts['version']}, this agent reads {VERSION}; it "
                    "begins anew with the next round"
                )
            if facts["spec_digest"] != spec.digest.hex():
                raise HomeError(
                    f"{path} belongs to run {facts['run_id']} with adapter spec "
                    f"{facts['spec_digest'][:12]}, this run has {spec.digest.hex()[:12]}; it "
                    "begins anew with the next round"
                )
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return _from_arrays(facts, arrays)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise HomeError(
            f"{path} cannot be read ({type(error).__name__}); it begins anew with the next round"
        ) from error


def write_home(path: Path, home: Home, spec: AdapterSpec) -> None:
    """Writes the file so that after a crash it is there whole or not at all; same home, same bytes.

    Raises `MissingExtraError` without safetensors.
    """
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise MissingExtraError("safetensors", "train") from error
    facts = {
        "version": VERSION,
        "spec_digest": spec.digest.hex(),
        "run_id": spec.run_id,
        "round": home.round,
        "alpha": home.alpha,
    }
    # One entry: safetensors writes several in no fixed order.
    metadata = {"home": json.dumps(facts, sort_keys=True)}
    write_durably(path, save(_to_arrays(home), metadata), mode=0o600)


def _to_arrays(home: Home) -> dict[str, NDArray[Any]]:
    """By "group/part/name", and "rows/name"."""
    groups = {group: getattr(home, group) for group in GROUPS}
    groups |= {f"{MOMENT}{kind}": found for kind, found in home.moments.items()}
    arrays: dict[str, NDArray[Any]] = {f"rows/{name}": rows for name, rows in home.rows.items()}
    for group, adapter in groups.items():
        for name, parts in adapter.items():
            arrays |= {f"{group}/{part}/{name}": values for part, values in parts.items()}
    return arrays


def _from_arrays(facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Home:
    rows: dict[str, NDArray[np.int64]] = {}
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for key, values in sorted(arrays.items()):
        group, _, place = key.partition("/")
        if group == "rows":
            rows[place] = values.astype(np.int64)
            continue
        if values.dtype != np.float32 or not np.isfinite(values).all():
            raise ValueError(f"{key} holds other than finite float32 values")
        part, _, name = place.partition("/")
        groups.setdefault(group, {}).setdefault(name, {})[part] = values
    moments = {g.removeprefix(MOMENT): v for g, v in groups.items() if g.startswith(MOMENT)}
    return Home(
        round=int(facts["round"]),
        alpha=float(facts["alpha"]),
        rows=rows,
        moments=moments,
        **{group: groups[group] for group in GROUPS},
    )
