"""Runs a method over the stored updates of a round, module by module.

Memory is one module times the participants, and one file is open at a time, so a fleet may be
larger than memory or the limit on open files. It knows packed files and assignments; it does not
know who may take part (screening), what weights mean (fairness), or where results are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator.lowrank import Bundle, inner, norm, stack
from coordinator.methods import Method, MethodError, ModuleUpdate
from coordinator.methods.base import normalised
from protos.contract import AdapterSpec, Assignment
from protos.packing import Factors, PackingError, open_packed
from protos.sketch import sketch_rows

EPSILON = 1e-12  # keeps the relative error finite while the ideal update is still zero


@dataclass(frozen=True)
class StoredUpdate:
    """A packed update on disk, the assignment it answers, and the weight it enters with."""

    device_id: str
    assignment: Assignment
    path: Path
    weight: float


@dataclass(frozen=True, eq=False)
class MergeResult:
    """The adapter after a round, and what each device gave to it.

    norms: Frobenius norm of a device's weighted delta factors over all modules, by device id.
    share: its part in the sum of norms; equal parts when nobody moved anything. Sums to 1.
    coverage: (r,) float64, participants that held each global row, averaged over modules.
    aggregation_error: ||merged - ideal|| / ||ideal||, the ideal being the weighted mean of the
    devices' trained slices in weight space.
    """

    adapter: dict[str, Bundle]
    norms: dict[str, float]
    share: dict[str, float]
    coverage: NDArray[np.float64]
    aggregation_error: float


def merge_round(
    spec: AdapterSpec,
    method: Method,
    current: Mapping[str, Bundle],
    updates: Sequence[StoredUpdate],
) -> MergeResult:
    """Merges stored updates into the adapter; the same bits whatever the order given.

    A late update brings the rows of the round it was assigned in; its delta is added to today's
    adapter. For the aggregation error its slice is taken to have started from that adapter too.
    Raises `PackingError`, `SketchError`, `MethodError`, `OSError`.
    """
    ordered = sorted(
        updates, key=lambda u: (u.device_id, u.assignment.round, u.assignment.assignment_id)
    )
    digests = [update.assignment.digest for update in ordered]
    shares = normalised([update.weight for update in ordered])
    adapter: dict[str, Bundle] = {}
    energies = np.zeros(len(ordered))
    coverage = np.zeros(spec.rank)
    off_target = target = 0.0
    for module in spec.modules:
        before = current[module.name]
        parts = [
            _read(spec, update, digest, module.name)
            for update, digest in zip(ordered, digests, strict=True)
        ]
        after = method.merge_module(before, parts)
        adapter[module.name] = after
        for i, part in enumerate(parts):
            energies[i] += shares[i] ** 2 * _energy(part.delta)
            coverage[part.rows] += 1 / len(spec.modules)
        ideal = stack([_trained(spec, before, part) for part in parts], shares.tolist())
        ideal_energy = norm(ideal) ** 2
        target += ideal_energy
        off_target += ideal_energy - 2 * inner(after, ideal) + norm(after) ** 2
    norms = _by_device(ordered, energies)
    return MergeResult(
        adapter=adapter,
        norms=norms,
        share=_share(norms),
        coverage=coverage,
        aggregation_error=math.sqrt(max(off_target, 0.0)) / (math.sqrt(target) + EPSILON),
    )


def merge_sound(
    spec: AdapterSpec,
    method: Method,
    current: Mapping[str, Bundle],
    updates: Sequence[StoredUpdate],
) -> tuple[MergeResult | None, dict[str, str]]:
    """`merge_round` of what can be merged, and why the rest was left out, by assignment id.

    One update that no merge survives must not stop the run; the result is None if none is sound.
    """
    try:
        return merge_round(spec, method, current, updates), {}
    except (PackingError, MethodError) as error:
        whole = error
    dropped: dict[str, str] = {}
    for update in updates:
        try:
            merge_round(spec, method, current, [update])
        except (PackingError, MethodError) as error:
            dropped[update.assignment.assignment_id] = str(error)
    if not dropped:  # each alone is sound, together they are not
        raise whole
    sound = [u for u in updates if u.assignment.assignment_id not in dropped]
    return (merge_round(spec, method, current, sound) if sound else None), dropped


def cut_slice(
    spec: AdapterSpec,
    adapter: Mapping[str, Bundle],
    assignment_round: int,
    sketch_offset: int,
    k: int,
) -> dict[str, Factors]:
    """The rows a device is to train, by module name: up (k, m), down (k, n). To be packed."""
    factors = {}
    for name, bundle in adapter.items():
        rows = sketch_rows(spec.seed, assignment_round, name, spec.rank, sketch_offset, k)
        part = bundle.take(rows)
        factors[name] = Factors(part.up, part.down)
    return factors


def adapter_to_factors(adapter: Mapping[str, Bundle]) -> dict[str, Factors]:
    """The whole adapter as packing takes it; arrays are shared, not copied."""
    return {name: Factors(bundle.up, bundle.down) for name, bundle in adapter.items()}


def adapter_from_factors(spec: AdapterSpec, factors: Mapping[str, Factors]) -> dict[str, Bundle]:
    """The whole adapter as unpacked, at the scale of the spec's full rank."""
    scale = spec.scale(spec.rank)
    return {name: Bundle(part.up, part.down, scale) for name, part in factors.items()}


def _read(spec: AdapterSpec, update: StoredUpdate, digest: bytes, module: str) -> ModuleUpdate:
    task = update.assignment
    rows = sketch_rows(spec.seed, task.round, module, spec.rank, task.sketch_offset, task.rank)
    reader = open_packed(
        update.path,
        spec,
        task.rank,
        assignment_digest=digest,
        encoding=task.update_encoding,
    )
    return ModuleUpdate(update.device_id, rows, reader.module(module), update.weight, task.rank)


def _trained(spec: AdapterSpec, before: Bundle, part: ModuleUpdate) -> Bundle:
    """The slice as the device ended with it, at the scale it trained with."""
    up = before.up[part.rows] + part.delta.up
    down = before.down[part.rows] + part.delta.down
    return Bundle(up, down, spec.scale(part.k))


def _energy(delta: Factors) -> float:
    up, down = delta.up.astype(np.float64), delta.down.astype(np.float64)
    return float(np.square(up).sum() + np.square(down).sum())


def _by_device(updates: Sequence[StoredUpdate], energies: NDArray[np.float64]) -> dict[str, float]:
    """A device with a late and a fresh update in one round counts once."""
    totals: dict[str, float] = {}
    for update, energy in zip(updates, energies, strict=True):
        totals[update.device_id] = totals.get(update.device_id, 0.0) + float(energy)
    return {device: math.sqrt(total) for device, total in totals.items()}


def _share(norms: Mapping[str, float]) -> dict[str, float]:
    total = sum(norms.values())
    if total == 0:
        return dict.fromkeys(norms, 1 / len(norms))
    return {device: value / total for device, value in norms.items()}
