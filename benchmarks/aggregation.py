"""How far each way of merging is from the mean of products, layer by layer, on real updates.

Runs the demo's four devices with FLoRA-NA (or takes the state of a finished run) and merges the
stored updates of its last training round again with every method that merges whole adapters. The
floor is the best approximation of the same rank, by SVD. FLoRA-NA must lie between that and FedIT
on every layer: e_SVD <= e_NA <= e_FedIT; the program fails where it does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from coordinator.merge import Merger, StoredUpdate
from coordinator.methods import MethodOptions, make
from coordinator.serve import open_state
from coordinator.server_optimizer import Plain
from coordinator.state import StateFile, StateReader
from trials.compare import sections_for
from trials.demo import PATIENCE_S, devices
from trials.fleet import LocalFleet

METHODS = ("flexlora", "flora-na", "lora-fair", "fedit", "fedex-lora")
BEST = "flexlora"  # with equal ranks the truncated SVD of the mean of products
SLACK = 1 + 1e-6  # merged factors are rounded to float32


def run_fleet(folder: Path, quick: bool) -> Path:
    """A short run of FLoRA-NA; its state folder."""
    sections = sections_for("flora-na", 1 if quick else 3)
    if quick:
        sections["training"] = {**sections["training"], "local_steps": 10, "min_local_steps": 5}
    with LocalFleet(folder, sections, devices()) as fleet:
        fleet.start()
        records, _ = open_state(fleet.state)
        fleet.await_finish(records, PATIENCE_S + 600)
        records.close()
    return folder / "coordinator"


def merge_again(state: Path, work: Path) -> tuple[int, dict[str, dict[str, float]]]:
    """(round, method -> module -> error) of the last training round whose updates are kept."""
    records, blobs = open_state(state)
    run = records.all_runs()[-1]
    kept = [a for a in records.assignments(run.run_id)
            if a.merged_in == a.assignment.round and a.update_digest is not None
            and blobs.holds(a.update_digest)]  # fmt: skip
    if not kept:
        sys.exit(f"{state} keeps no updates of a merged round; give the state of a finished run")
    round_ = max(a.assignment.round for a in kept)
    updates = [
        StoredUpdate(a.assignment.device_id, a.assignment, blobs.path(a.update_digest),
                     float(a.report.train_examples))
        for a in kept
        if a.assignment.round == round_ and a.update_digest and a.report is not None
    ]  # fmt: skip
    found = records.model(run.run_id, round_)
    assert found is not None
    version, files = found
    reader = StateReader(
        run.spec, {r: StateFile(blobs.path(b.digest), b.payload) for r, b in files.items()}
    )
    errors = {}
    for name in METHODS:
        method = make(name, MethodOptions(rank=run.spec.rank))
        place = work / name
        place.mkdir()
        merger = Merger(run.spec, method, Plain(), lambda at: reader, place.joinpath)
        result = merger.merge(round_, version + 1, reader, updates)
        if not result.exact:
            sys.exit("the fleet is too large for exact errors; use fewer devices or a lower rank")
        errors[name] = result.errors
    records.close()
    return round_, errors


def main() -> int:
    """Prints the table and one line of JSON; 1 where a layer breaks the order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of ten steps")
    parser.add_argument("--state", type=Path, help="state folder of a run whose devices had k = r")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        state = args.state or run_fleet(folder / "fleet", args.quick)
        (folder / "work").mkdir()
        round_, errors = merge_again(state, folder / "work")
    modules = list(errors[BEST])
    print(f"round {round_}, {len(modules)} layers; error against the mean of products")
    print(f"{'method':11} {'least':>9} {'median':>9} {'largest':>9} {'median over SVD':>16}")
    for name in METHODS:
        values = list(errors[name].values())
        over = statistics.median(errors[name][m] / errors[BEST][m] for m in modules)
        print(f"{name:11} {min(values):9.2e} {statistics.median(values):9.2e} "
              f"{max(values):9.2e} {over:16.4f}")  # fmt: skip
    broken = [
        m for m in modules
        if not errors[BEST][m] <= errors["flora-na"][m] * SLACK
        or not errors["flora-na"][m] <= errors["fedit"][m] * SLACK
    ]  # fmt: skip
    held = len(modules) - len(broken)
    print(f"e_SVD <= e_NA <= e_FedIT holds on {held} of {len(modules)} layers")
    print(json.dumps({
        "benchmark": "aggregation", "round": round_, "layers": len(modules),
        "broken": broken, "errors": errors,
    }))  # fmt: skip
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
