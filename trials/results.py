"""A trial's folder, read again: facts, ledger and links, and what they add up to.

Knows files and sums; shows nothing. So a report can be made anew, and trials compared, without the
coordinator's state.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from coordinator.phases import DevicePhases, DeviceTime, device_phases
from profiles.program import version
from trials.ledger import LEDGER, LINKS, LedgerError, Row, read_rows, times_of

FACTS = "trial.json"
PACKAGES = ("grpcio", "protobuf", "numpy", "zstandard", "torch", "transformers", "peft",
            "bitsandbytes", "sqlalchemy", "pyarrow")  # fmt: skip


class DeviceFacts(BaseModel):
    """How one device was emulated, in words."""

    link: str
    caps: str


class BulkFacts(BaseModel):
    """Plain TCP over a device's link, bit/s."""

    up_bps: float
    down_bps: float
    seconds: float


class Facts(BaseModel):
    """trial.json: what the ledger does not tell. Times in Unix seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fleet: str
    run: str
    began_at: float
    ended_at: float
    remote: bool
    outcome: str
    emulation: str = ""
    devices: dict[str, DeviceFacts]
    bulk_tcp: dict[str, BulkFacts]
    fairness: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results:
    """One trial."""

    folder: Path
    facts: Facts
    ledger: tuple[Row, ...]
    links: tuple[Row, ...]

    @cached_property
    def times(self) -> tuple[DeviceTime, ...]:
        """Phases by round and device."""
        return times_of(self.ledger)

    @cached_property
    def phases(self) -> tuple[DevicePhases, ...]:
        """Phases by device."""
        return device_phases(self.times, {})

    @property
    def link_rates(self) -> Mapping[str, tuple[float | None, float | None]]:
        """Mean rates (up, down) of each device's link while it transferred, bit/s.

        Weighted by the seconds of each transfer; of estimates, where no link was emulated.
        """
        found = {}
        for device in {r["device"] for r in self.ledger}:
            of = [r for r in self.ledger if r["device"] == device]
            found[device] = (_weighted(of, "link_up_bps", "push_s"),
                             _weighted(of, "link_down_bps", "fetch_s"))  # fmt: skip
        return found

    @property
    def first_opened_at(self) -> float:
        """When the first round opened; when the trial began, if none did."""
        return min((r["opened_at"] for r in self.ledger), default=self.facts.began_at)

    @property
    def rounds_merged(self) -> int:
        """Training rounds that were merged."""
        return len({r["round"] for r in self.ledger
                    if r["merged_at"] is not None and not r["evaluate_only"]})  # fmt: skip

    @property
    def curve(self) -> tuple[tuple[float, float, float], ...]:
        """(seconds since the first round opened, MB moved by then, fleet mean loss), by round.

        Of the whole adapter as received, over the devices that measured it at both ends.
        """
        key = "loss_global_received"
        measured: dict[int, dict[str, float]] = {}
        for r in self.ledger:
            if r[key] is not None:
                measured.setdefault(r["round"], {})[r["device"]] = r[key]
        if not measured:
            return ()
        both = set(measured[min(measured)]) & set(measured[max(measured)])
        points = []
        for round_, losses in sorted(measured.items()):
            if not both or not both <= set(losses):
                continue
            before = [r for r in self.ledger if r["round"] < round_]
            merged = [r["merged_at"] for r in before if r["merged_at"] is not None]
            at = max(merged, default=self.first_opened_at) - self.first_opened_at
            moved = sum((r["up_bytes"] or 0) + (r["down_bytes"] or 0) for r in before)
            points.append((at, moved / 1e6, sum(losses[d] for d in both) / len(both)))
        return tuple(points)


def _weighted(rows: list[Row], key: str, weight: str) -> float | None:
    pairs = [(r[key], r[weight]) for r in rows if r[key] is not None and r[weight]]
    total = sum(w for _, w in pairs)
    return sum(v * w for v, w in pairs) / total if total else None


def write_facts(folder: Path, facts: Facts) -> None:
    """Writes trial.json."""
    (folder / FACTS).write_text(json.dumps(facts.model_dump(), indent=1))


def read_results(folder: Path) -> Results:
    """A trial's folder. Raises `LedgerError` when it holds none."""
    try:
        facts = Facts.model_validate_json((folder / FACTS).read_text())
    except FileNotFoundError as error:
        raise LedgerError(f"{folder} holds no trial: {FACTS} is missing; give the --out folder of "
                          "`sketchfleet-trial run`") from error  # fmt: skip
    except (OSError, ValidationError) as error:
        raise LedgerError(f"{folder / FACTS} cannot be read: {error}") from error
    return Results(
        folder,
        facts,
        tuple(read_rows(folder / "ledger.parquet", LEDGER)),
        tuple(read_rows(folder / "links.parquet", LINKS)),
    )


def versions() -> dict[str, str]:
    """What it ran on: packages, commit if this is a checkout, kernel, processor."""
    found = {"sketchfleet": version()}
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty"],
                         capture_output=True, text=True, check=False)  # fmt: skip
    if git.returncode == 0:
        found["commit"] = git.stdout.strip()
    found |= {"python": platform.python_version(), "kernel": platform.release(),
              "machine": platform.machine(), "processors": str(os.cpu_count())}  # fmt: skip
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            found["cpu"] = line.partition(":")[2].strip()
            break
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed
    return found
