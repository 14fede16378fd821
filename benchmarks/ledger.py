"""What the fairness ledger costs: bytes of a report, and its share of a round's time.

    python -m benchmarks.ledger [--quick]

Bytes: a report's message with what the ledger adds (losses of single held-out sequences, the
evaluation of the local-only adapter) less the same without, for real losses of the demo's fleet and
for the most that may be told. Time: what is done only for the ledger, at an agent (sums by row, the
examples of an evaluation, their message) and at the coordinator (parsing and storing them, shares
and directions of the updates, their rows in the database), over the shortest round of the demo's
fleet, whose model is the smallest there is. A round with the shapes of Qwen2.5-Coder-1.5B and 20
devices stands beside it: what attributing its merge takes, and the length of round of which that
would be 1 %. The local-only adapter itself is not counted: it doubles the training of who asks for
it. Ends with 1 where a bound is broken: 2 kB, and 1 % of the fleet's shortest round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.merge import RANK, make_spec, write_updates
from coordinator.ledger_types import Contribution
from coordinator.merge import Merger
from coordinator.methods import MethodOptions, make
from coordinator.serve import open_state
from coordinator.server_optimizer import Plain
from coordinator.state import StateReader, write_initial
from coordinator.store.records import Records
from coordinator.store.rows import AssignmentRecord
from protos.contract import (
    MOST_EXAMPLES,
    Evaluation,
    LocalReport,
    canonical_json,
    from_message,
    to_message,
)
from protos.sketchfleet.v1 import fleet_pb2 as pb
from trials.demo import PATIENCE_S, devices, run_sections
from trials.fleet import LocalFleet

MOST_BYTES, MOST_SHARE = 2000, 0.01


def run_fleet(folder: Path, quick: bool) -> tuple[list[AssignmentRecord], list[Any]]:
    """(assignments, rounds) of a short run of the demo."""
    sections = run_sections(1 if quick else 3)
    sections["evaluation"]["every_rounds"] = 1
    if quick:
        sections["training"] |= {"local_steps": 10, "min_local_steps": 5}
    with LocalFleet(folder, sections, devices()) as fleet:
        fleet.start()
        records, _ = open_state(fleet.state)
        fleet.await_finish(records, PATIENCE_S + 600)
        run_id = fleet.run_id
        found = records.assignments(run_id), records.all_rounds(run_id)
        records.close()
    return found


def added_bytes(report: LocalReport) -> int:
    """What a report of these evaluations is longer by than without the ledger's part."""
    bare = tuple(
        dataclasses.replace(e, example_millinats=(), example_tokens=())
        for e in report.evaluations if e.subject != "local"
    )  # fmt: skip
    return _size(report) - _size(dataclasses.replace(report, evaluations=bare))


def _size(report: LocalReport) -> int:
    return len(to_message(report, pb.LocalReport).SerializeToString())


def most_told() -> LocalReport:
    """Sequences of 32 k tokens at 16 nats each, and a local-only adapter."""
    seen = Evaluation(
        "global", "received", 1 / 3, 1 / 3, 2**30,
        example_millinats=(1000 * 16 * 2**15,) * MOST_EXAMPLES,
        example_tokens=(2**15,) * MOST_EXAMPLES,
    )  # fmt: skip
    bare = dataclasses.replace(seen, example_millinats=(), example_tokens=())
    local = dataclasses.replace(bare, subject="local", stage="trained")
    return LocalReport("a", "done", evaluations=(seen, local))


def agent_seconds(report: LocalReport, row_tokens: int, micro_batch: int) -> float:
    """Of one round: sums by row in every evaluation, examples in one, and their message."""
    from edge_agent.training.evaluation import HeldOutResult, _examples

    examples = next(e for e in report.evaluations if e.example_millinats)
    rows = len(examples.example_tokens)
    counted = np.ones((micro_batch, row_tokens), np.bool_)
    losses = np.ones(micro_batch * (row_tokens - 1), np.float32)

    def by_row() -> None:
        which = np.nonzero(counted[:, 1:])[0]
        np.bincount(which, weights=losses, minlength=micro_batch).astype(np.float64)
        np.bincount(which, minlength=micro_batch)

    nats = np.array(examples.example_millinats) / 1000
    found = HeldOutResult(1.0, 1.0, 1, nats, np.array(examples.example_tokens))
    bare = dataclasses.replace(examples, example_millinats=(), example_tokens=())

    def message() -> float:
        return _timed(lambda: to_message(examples, pb.Evaluation)) - _timed(
            lambda: to_message(bare, pb.Evaluation)
        )

    passes = 3 * -(-rows // micro_batch)
    return passes * _timed(by_row) + _timed(lambda: _examples(found)) + max(0.0, message())


def coordinator_seconds(report: LocalReport, devices_: int, folder: Path) -> float:
    """Of one round, attribution aside: reading and storing examples, and rows of contributions."""
    bare = dataclasses.replace(report, evaluations=tuple(
        dataclasses.replace(e, example_millinats=(), example_tokens=())
        for e in report.evaluations))  # fmt: skip

    def taken(one: LocalReport) -> float:
        message = to_message(one, pb.LocalReport)
        return _timed(lambda: canonical_json(from_message(message, LocalReport)))

    gave = {str(i): Contribution(0.5, 0.5, 0.5, 1.0, bytes(64)) for i in range(devices_)}
    records = Records(folder / "records.sqlite")
    began = time.perf_counter()
    records.publish_round("run", 0, {}, [], {}, 0.0, gave)
    stored_s = time.perf_counter() - began
    records.close()
    return devices_ * max(0.0, taken(report) - taken(bare)) + stored_s


def _timed(work: Callable[[], Any], times: int = 50) -> float:
    """Seconds of one call, the mean of the faster half."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return float(np.mean(sorted(seconds)[: times // 2]))


def large_merge(folder: Path, layers: int) -> dict[str, float]:
    """Seconds of merging 20 int8 updates of unequal ranks, and of attributing the merge."""
    spec, method = make_spec(layers), make("fslora", MethodOptions(rank=RANK))
    updates = write_updates(folder, spec, method, "int8")
    numbers = iter(range(10**6))

    def new_file(role: str) -> Path:
        return folder / f"state-{next(numbers)}"

    reader = StateReader(spec, write_initial(spec, method, new_file))
    merger = Merger(spec, method, Plain(), lambda round_: reader, new_file)
    best = {"merge_s": np.inf, "attribution_s": np.inf}
    for _ in range(2):
        began = time.perf_counter()
        result = merger.merge(0, 1, reader, updates)
        whole_s = time.perf_counter() - began
        best = min(best, {"merge_s": whole_s - result.attribution_s,
                          "attribution_s": result.attribution_s},
                   key=lambda found: found["attribution_s"])  # fmt: skip
        for file in result.files.values():
            file.path.unlink()
    return {name: seconds * 28 / layers for name, seconds in best.items()}


def main() -> int:
    """Prints the figures and one line of JSON; 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round; 2 layers of 28")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        given, history = run_fleet(folder / "fleet", args.quick)
        trained = [r for r in history if r.merged_at is not None and not r.evaluate_only]
        round_s = min((r.closed_at or 0.0) - r.opened_at for r in trained)
        attribution_s = max(r.detail["attribution_s"] for r in trained)
        sent = [a for a in given if a.report is not None and a.assignment.trains]
        longest = max(sent, key=lambda a: added_bytes(a.report or LocalReport("", "done")))
        assert longest.report is not None
        task = longest.assignment
        agent_s = agent_seconds(longest.report, task.sequence_tokens, task.micro_batch)
        told_s = coordinator_seconds(longest.report, 4, folder)
        (folder / "large").mkdir()
        large = large_merge(folder / "large", 2 if args.quick else 28)
    found = {
        "bytes": added_bytes(longest.report), "most_bytes": added_bytes(most_told()),
        "round_s": round_s, "agent_share": agent_s / round_s,
        "coordinator_share": (attribution_s + told_s) / round_s,
        "large_attribution_s": large["attribution_s"],
        "large_over_merge": large["attribution_s"] / large["merge_s"],
    }  # fmt: skip
    print(f"bytes a report is longer by: {found['bytes']} in the demo, at most "
          f"{found['most_bytes']} (bound {MOST_BYTES})")  # fmt: skip
    print(f"share of the demo's shortest round ({round_s:.1f} s): agent "
          f"{found['agent_share']:.4%}, coordinator {found['coordinator_share']:.4%} "
          f"(bound {MOST_SHARE:.0%})")  # fmt: skip
    how = "extrapolated from 2 layers" if args.quick else "28 layers"
    print(f"Qwen2.5-Coder-1.5B, 20 devices of ranks 4 to 64 ({how}): "
          f"{large['attribution_s']:.2f} s to attribute, {found['large_over_merge']:.2f} of "
          f"merging; 1 % of a round of {100 * large['attribution_s']:.0f} s")  # fmt: skip
    print(json.dumps({"benchmark": "ledger", **found}))
    kept = found["most_bytes"] < MOST_BYTES and max(
        found["agent_share"], found["coordinator_share"]) < MOST_SHARE  # fmt: skip
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
