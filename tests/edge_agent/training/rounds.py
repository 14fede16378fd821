"""Assignments, adapters and jobs for tests of the training room."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.training import trainer
from edge_agent.training.jobs import run_job
from edge_agent.training.workbench import Workbench
from profiles.model import ModuleShape
from protos.contract import (
    AdapterSpec,
    Assignment,
    BlobRef,
    LocalReport,
    Part,
    Payload,
    from_plain,
    to_plain,
)
from protos.layout import Parts
from protos.packing import pack
from protos.unpacking import open_update

K = 2
NORM = ModuleShape("model.norm.weight", 1, 64)
HEAD = ModuleShape("lm_head.weight", 264, 64)  # tied to the embeddings in the tiny base
ALL: tuple[Part, ...] = ("up", "down", "core", "dense")


def make_assignment(**changes: Any) -> Assignment:
    """Two rows of a stock adapter, up and down trained and sent."""
    k = changes.get("rank", K)
    facts: dict[str, Any] = {
        "assignment_id": "a1",
        "run_id": "run",
        "round": 1,
        "device_id": "d1",
        "method": "some",
        "rank": k,
        "rows": "prefix",
        "sketch_offset": 0,
        "alpha": 16.0,
        "trained": ("up", "down"),
        "personal": (),
        "keeps_basis": True,
        "keeps_state": False,
        "error_feedback": False,
        "fresh": False,
        "precision": "fp32",
        "sequence_tokens": 48,
        "micro_batch": 2,
        "accumulation": 2,
        "checkpointing": False,
        "local_steps": 4,
        "learning_rate": 5e-3,
        "optimizer": "adamw",
        "update": Payload(k, "float32"),
        "evaluation_sequences": 8,
        "held_out_share": 0.25,
        "evaluates_global": False,
        "seed": 7,
        "deadline_s": 60.0,
        "reason": "",
    }
    return Assignment(**(facts | changes))


def make_adapter(
    spec: AdapterSpec, k: int, *, parts: tuple[Part, ...] = ("up", "down"), seed: int = 3
) -> dict[str, Parts]:
    """Everything drawn, so that every part has a gradient."""
    draw = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return (draw.normal(size=shape) * 0.1).astype(np.float32)

    found: dict[str, Parts] = {}
    for m in spec.modules:
        whole = {
            "up": values(k, m.out_features),
            "down": values(k, m.in_features),
            "core": values(k, k),
        }
        found[m.name] = {part: whole[part] for part in parts if part in whole}
    if "dense" in parts:
        for t in spec.dense:
            found[t.name] = {"dense": values(t.out_features, t.in_features) * np.float32(0.1)}
    return found


def at_start(spec: AdapterSpec, k: int, seed: int = 3) -> dict[str, Parts]:
    """As in round 0: up is zero, down is drawn."""
    found = make_adapter(spec, k, seed=seed)
    return {n: {"up": np.zeros_like(p["up"]), "down": p["down"]} for n, p in found.items()}


def parts_of(adapter: Mapping[str, Parts]) -> tuple[Part, ...]:
    """Those that any module or tensor has, in the order of the format."""
    return tuple(part for part in ALL if any(part in parts for parts in adapter.values()))


def plus(adapter: Mapping[str, Parts], delta: Mapping[str, Parts]) -> dict[str, Parts]:
    """The adapter moved by what the update holds."""
    return {
        name: {p: v + delta.get(name, {}).get(p, np.float32(0)) for p, v in parts.items()}
        for name, parts in adapter.items()
    }


class Device:
    """One device's folder: writes the files of a job, runs it, and keeps the home."""

    def __init__(
        self, folder: Path, base_folder: Path, code_folder: Path, bench: Workbench
    ) -> None:
        self.folder, self.base_folder, self.code_folder = folder, base_folder, code_folder
        self.bench = bench
        self.home = folder / "home"  # as left by the last round that kept something
        self.update = folder / "update.bin"

    def blob(
        self, name: str, spec: AdapterSpec, k: int, adapter: Mapping[str, Parts], **payload: Any
    ) -> tuple[BlobRef, str]:
        """Packs an adapter into a file of that name."""
        facts = {"encoding": "float32", "parts": parts_of(adapter)} | payload
        held = Payload(k, **facts)
        path = self.folder / name
        path.write_bytes(pack(spec, held, adapter))
        return BlobRef("00" * 32, path.stat().st_size, held), str(path)

    def job(
        self,
        spec: AdapterSpec,
        task: Assignment,
        *slices: Mapping[str, Parts],
        whole: tuple[Mapping[str, Parts], ...] = (),
        side: Mapping[str, Parts] | None = None,
        global_side: Mapping[str, Parts] | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        """A train job as plain JSON values; the adapters are packed and named in the assignment."""
        own = [self.blob(f"slice{i}", spec, task.rank, s) for i, s in enumerate(slices)]
        all_ = [self.blob(f"whole{i}", spec, spec.rank, w) for i, w in enumerate(whole)]
        branches = []
        for name, branch in (("side", side), ("global_side", global_side)):
            rank = 0 if branch is None else len(next(iter(branch.values()))["up"])
            branches.append((None, None) if branch is None else self.blob(name, spec, rank, branch))
        task = replace(
            task,
            slice=tuple(ref for ref, _ in own),
            global_adapter=tuple(ref for ref, _ in all_),
            side=branches[0][0],
            global_side=branches[1][0],
        )
        job = {
            "job": "train",
            "base_folder": str(self.base_folder),
            "spec": to_plain(spec),
            "assignment": to_plain(task),
            "slice_paths": [path for _, path in own],
            "side_path": branches[0][1],
            "global_paths": [path for _, path in all_],
            "global_side_path": branches[1][1],
            "update_path": str(self.update),
            "home_path": str(self.home),
            "home_out": str(self.folder / "home.new"),
            "personal_weight": 0.0,
            "data": {
                "include": [str(self.code_folder)],
                "exclude": [],
                "languages": [],
                "max_files": None,
            },
            "memory_cap_bytes": None,
        }
        return job | changes

    def round(
        self, spec: AdapterSpec, task: Assignment, *slices: Mapping[str, Parts], **changes: Any
    ) -> tuple[LocalReport, dict[str, Parts]]:
        """One round as the agent does it: the new home takes the old one's place."""
        job = self.job(spec, task, *slices, **changes)
        report = report_of(run(job, self.bench))
        new = self.folder / "home.new"
        if new.exists():
            new.replace(self.home)
        if not task.trains:
            return report, {}
        sent = from_plain(Assignment, job["assignment"])
        reader = open_update(self.update, spec, sent)
        return report, {name: reader.module(name) for name in reader.names}


def run(job: Mapping[str, Any], bench: Workbench) -> list[dict[str, Any]]:
    """Events of one job, as they would cross the pipe."""
    events: list[dict[str, Any]] = []
    try:
        run_job(json.loads(json.dumps(job)), bench, lambda e: events.append(dict(e)))
    except Exception as error:  # noqa: BLE001
        events.append(trainer.describe(error))
    return events


def report_of(events: list[dict[str, Any]]) -> LocalReport:
    """The report of a job that went well."""
    assert events[-1]["event"] == "result", events[-1]
    return from_plain(LocalReport, events[-1]["report"])


def loss_of(report: LocalReport, subject: Any, stage: Any) -> float:
    """The loss of one evaluation of a report."""
    found = report.evaluation(subject, stage)
    assert found is not None, f"{subject} {stage} was not evaluated"
    return found.loss


def only(adapter: dict[str, Parts], *parts: str) -> dict[str, Parts]:
    """The adapter less other parts."""
    thinned = {n: {p: v for p, v in x.items() if p in parts} for n, x in adapter.items()}
    return {name: found for name, found in thinned.items() if found}


def assert_same(got: dict[str, Parts], want: dict[str, Parts], **tolerance: float) -> None:
    """Bit for bit, or within what `numpy.testing.assert_allclose` is told."""
    assert got.keys() == want.keys()
    for name, parts in want.items():
        assert got[name].keys() == parts.keys(), name
        for part, values in parts.items():
            if tolerance:
                np.testing.assert_allclose(got[name][part], values, err_msg=name, **tolerance)
            else:
                np.testing.assert_array_equal(got[name][part], values, err_msg=name)


def norm_of(adapter: dict[str, Parts]) -> float:
    """Over everything in it."""
    return float(np.sqrt(sum(np.square(v).sum() for x in adapter.values() for v in x.values())))


def moved(one: dict[str, Parts], other: dict[str, Parts]) -> float:
    """The norm of their difference."""
    return norm_of({n: {p: v - other[n][p] for p, v in x.items()} for n, x in one.items()})
