"""Predicted against measured error of packed updates, for all encodings and densities.

Real updates: local rounds of the shipped nano model on the repository's own code, by the very
trainer that agents start. Measured: packed, unpacked, compared. Three predictions of it: from the
values themselves, as a device makes them on a sample; by the curves of the update before, as the
planner makes them for a device that reported; and by the prior, for one that did not. Then what a
byte budget makes of it: the least error among fixed encodings of that size against the fitted one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._local_rounds import Setting, local_round, make_spec
from protos.codecs import CODECS, Values, squares
from protos.contract import AdapterSpec, Payload, UpdateBudget
from protos.distortion import ROW_SPREAD, error_at, error_curve, prior_curve, relative_error, sample
from protos.fitting import fit
from protos.layout import Parts
from protos.packing import pack
from protos.unpacking import unpack
from trials.demo import NANO_CODE

RANK = 16
GROUPS = (0, 64)
DENSITIES = (1.0, 1 / 4, 1 / 16, 1 / 64)
BITS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25)  # of a value on average, that budgets allow
SHARES = tuple(2.0**-i for i in range(8))


def real_update(spec: AdapterSpec, optimizer: str, steps: int, seed: int) -> dict[str, Parts]:
    """What a local round changed, in float32."""
    rate = 0.3 if optimizer == "sgd" else 3e-3
    with tempfile.TemporaryDirectory() as work:
        setting = Setting(str(NANO_CODE), "fp32", (), RANK, 128, 4, False, optimizer)
        local_round(NANO_CODE, spec, setting, Path(work), steps=steps, threads=1,
                    encoding="float32", learning_rate=rate, seed=seed)  # fmt: skip
        data = (Path(work) / "update.bin").read_bytes()
    payload = Payload(RANK, "float32")
    return unpack(data, spec, payload, assignment_digest=data[60:92])


def blocks_of(factors: Mapping[str, Parts]) -> list[Values]:
    """All blocks in order."""
    return [values for parts in factors.values() for values in parts.values()]


def measured(
    spec: AdapterSpec, payload: Payload, factors: Mapping[str, Parts], *, fed_back: bool
) -> float:
    """Relative squared error of what arrives."""
    back = unpack(pack(spec, payload, factors, seed=None if fed_back else 1), spec, payload)
    pairs = list(zip(blocks_of(factors), blocks_of(back), strict=True))
    return sum(squares(a - b) for a, b in pairs) / sum(squares(a) for a, _ in pairs)


def compare(
    spec: AdapterSpec,
    before: Mapping[str, Parts],
    factors: Mapping[str, Parts],
    optimizer: str,
    *,
    fed_back: bool,
) -> list[dict[str, Any]]:
    """One row for each encoding, group and density."""
    rows: list[dict[str, Any]] = []
    now, last = blocks_of(factors), sample(blocks_of(before))
    for encoding, codec in CODECS.items():
        for group in GROUPS if codec.scaled else (0,):
            curve = error_curve(last, encoding, group, fed_back=fed_back)
            prior = prior_curve(encoding, group, fed_back, ROW_SPREAD.get(optimizer, 0.0))
            for density in DENSITIES if fed_back else DENSITIES[:1]:
                if encoding == "sign" and not fed_back:
                    continue
                payload = Payload(RANK, encoding, density=density, group=group)
                rows.append({
                    "encoding": encoding, "group": group, "density": density,
                    "fed_back": fed_back,
                    "measured": measured(spec, payload, factors, fed_back=fed_back),
                    "from_values": relative_error(
                        sample(now), encoding, group, density, fed_back=fed_back
                    ),
                    "from_last": error_at(curve, density),
                    "prior": error_at(prior, density),
                })  # fmt: skip
    return rows


def budgets(spec: AdapterSpec, factors: Mapping[str, Parts]) -> list[dict[str, Any]]:
    """Under each budget: the fitted payload, and the best of those of one density and whole rows
    that a person could have named beforehand.
    """
    values = RANK * spec.parameters_per_rank
    rows: list[dict[str, Any]] = []
    for bits in BITS:
        size = int(bits * values / 8)
        terms = UpdateBudget(size, ("bfloat16", "int8", "int4", "int2", "sign"), sparse=True)
        found, _ = fit(spec, Payload(RANK, "int8"), terms, factors, fed_back=True)
        data = pack(spec, found.payload, factors, seed=None)
        assert len(data) == found.size_bytes <= size
        fixed = {}
        for encoding in terms.encodings:
            for share in SHARES:
                payload = Payload(RANK, encoding, density=share)
                if len(pack(spec, payload, factors, seed=None)) <= size:
                    fixed[encoding] = measured(spec, payload, factors, fed_back=True)
                    break
        rows.append({
            "bits": bits, "size_bytes": size, "used_bytes": found.size_bytes,
            "encoding": found.payload.encoding, "group": found.payload.group,
            "density": found.payload.density, "expected": found.error,
            "measured": measured(spec, found.payload, factors, fed_back=True), "fixed": fixed,
        })  # fmt: skip
    return rows


def off(rows: list[dict[str, Any]], which: str) -> tuple[float, float]:
    """Median and largest distance of a prediction from the measured error."""
    gaps = [abs(float(row[which]) - float(row["measured"])) for row in rows]
    return statistics.median(gaps), max(gaps)


def main() -> None:
    """Prints the tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    steps = 4 if quick else 20
    spec = make_spec(NANO_CODE, (), RANK)
    results = {}
    for optimizer in ("adamw",) if quick else ("adamw", "sgd"):
        before, factors = (real_update(spec, optimizer, steps, seed) for seed in (1, 2))
        captured = [1 - e for e in error_curve(
            sample(blocks_of(factors)), "float32", 0, fed_back=True
        ).errors]  # fmt: skip
        energies = ", ".join(f"{c:.2f}" for c in captured[1:6])
        print(f"\n{optimizer}, {steps} steps, {RANK * spec.parameters_per_rank:,} values")
        print(f"energy of the largest 1/2, 1/4 ... 1/32 of them: {energies}")
        rows = [
            r for fed in (False, True)
            for r in compare(spec, before, factors, optimizer, fed_back=fed)
        ]  # fmt: skip
        print(f"{'encoding':14} {'density':>8} {'rounded':>9} {'measured':>9} {'values':>9} "
              f"{'last':>9} {'prior':>9}")  # fmt: skip
        for r in rows:
            name = f"{r['encoding']}/{r['group']}" if r["group"] else str(r["encoding"])
            print(f"{name:14} {r['density']:8.4f} {'nearest' if r['fed_back'] else 'at random':>9} "
                  f"{r['measured']:9.5f} {r['from_values']:9.5f} {r['from_last']:9.5f} "
                  f"{r['prior']:9.5f}")  # fmt: skip
        distances = {which: off(rows, which) for which in ("from_values", "from_last", "prior")}
        for which, (median, largest) in distances.items():
            print(f"{which:12} off by {median:.4f} on the median, {largest:.4f} at most")
        fits = budgets(spec, factors)
        print(f"{'bits':>5} {'bytes':>9} {'used':>6}  {'chosen':22} {'expected':>9} "
              f"{'measured':>9}  best of fixed encodings and halved densities")  # fmt: skip
        for f in fits:
            name = f"{f['encoding']}/{f['group']}" if f["group"] else str(f["encoding"])
            fixed = f["fixed"]
            best = min(fixed, key=fixed.__getitem__)
            print(f"{f['bits']:5} {f['size_bytes']:9,} {f['used_bytes'] / f['size_bytes']:6.1%}  "
                  f"{name + ' at ' + format(f['density'], '.3f'):22} {f['expected']:9.4f} "
                  f"{f['measured']:9.4f}  {best} {fixed[best]:.4f}")  # fmt: skip
        results[optimizer] = {
            "captured": captured, "rows": rows, "off": distances, "budgets": fits,
        }  # fmt: skip
    print(json.dumps({"benchmark": "distortion", "steps": steps, "results": results}))


if __name__ == "__main__":
    main()
