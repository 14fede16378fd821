"""Error feedback: over many rounds of changing sketches nothing that was learned is lost."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edge_agent.training.feedback import pack_update
from profiles.model import ModuleShape
from protos.contract import AdapterSpec, Assignment, Payload, UpdateBudget
from protos.sketch import slice_rows
from protos.unpacking import open_update, unpack

SPEC = AdapterSpec(
    "run", "base", "", "0" * 64, 16, 16.0, False, 3,
    (ModuleShape("a", 24, 40), ModuleShape("b", 33, 17)),
    dense=(ModuleShape("norm.weight", 1, 20),),
)  # fmt: skip
PARTS = ("up", "down", "dense")
PAYLOADS = [
    Payload(5, "sign", PARTS), Payload(5, "int2", PARTS), Payload(5, "int4", PARTS, group=8),
    Payload(5, "int8", PARTS), Payload(5, "bfloat16", PARTS),
    Payload(5, "int4", PARTS, density=0.1), Payload(5, "float32", PARTS, density=0.05),
    Payload(5, "int2", PARTS, density=0.2, compressed=True),
]  # fmt: skip


def make_task(round_, payload):
    task = Assignment(
        assignment_id=f"run.{round_}.ash", run_id="run", round=round_, device_id="ash",
        method="fslora", rank=5, rows="independent", sketch_offset=0, alpha=16.0,
        trained=("up", "down"), personal=(), keeps_basis=True, keeps_state=False,
        error_feedback=True, fresh=False, precision="fp32", sequence_tokens=16, micro_batch=1,
        accumulation=1, checkpointing=False, local_steps=1, learning_rate=1e-3, optimizer="sgd",
        update=payload, evaluation_sequences=1, held_out_share=0.1, evaluates_global=False,
        seed=round_, deadline_s=60.0, reason="",
    )  # fmt: skip
    return dataclasses.replace(task, seed=100 + round_)


def whole():
    """Zeros for everything in the global adapter, float64."""
    found = {
        m.name: {"up": np.zeros((16, m.out_features)), "down": np.zeros((16, m.in_features))}
        for m in SPEC.modules
    }
    return found | {t.name: {"dense": np.zeros((1, t.in_features))} for t in SPEC.dense}


def add(total, factors, rows):
    for name, parts in factors.items():
        for part, values in parts.items():
            place = ... if part == "dense" else rows[name]
            total[name][part][place] += values


@pytest.mark.parametrize("payload", PAYLOADS, ids=str)
def test_what_was_sent_and_what_is_held_is_what_was_learned_over_50_rounds(payload):
    draw = np.random.default_rng(0)
    learned, sent, residual = whole(), whole(), {}
    seen = set()
    for round_ in range(50):
        task = make_task(round_, payload)
        rows = {m.name: slice_rows(SPEC, task, m.name) for m in SPEC.modules}
        seen |= set(rows["a"].tolist())
        delta = {
            m.name: {
                "up": draw.standard_normal((5, m.out_features), np.float32),
                "down": draw.standard_normal((5, m.in_features), np.float32),
            }
            for m in SPEC.modules
        } | {"norm.weight": {"dense": draw.standard_normal((1, 20), np.float32)}}
        packed = pack_update(SPEC, task, delta, rows, residual)
        residual = packed.residual
        add(learned, delta, rows)
        add(sent, unpack(packed.data, SPEC, payload, assignment_digest=task.digest), rows)
    assert seen == set(range(16)), "every row was in some sketch"
    everything = {m.name: np.arange(16) for m in SPEC.modules}
    add(sent, residual, everything)
    for name, parts in learned.items():
        for part, values in parts.items():
            np.testing.assert_allclose(sent[name][part], values, rtol=0, atol=2e-4, err_msg=name)


BUDGETS = (260, 5000, 700, 400, 1200, 330, 2000, 500)  # bytes, in turn
CHOICES = ("sign", "int2", "int4", "int8", "bfloat16")


def test_nothing_is_lost_when_every_round_has_another_budget_and_so_another_encoding():
    draw = np.random.default_rng(1)
    learned, sent, residual = whole(), whole(), {}
    chosen = set()
    for round_ in range(50):
        budget = UpdateBudget(BUDGETS[round_ % len(BUDGETS)], CHOICES, sparse=True)
        task = dataclasses.replace(make_task(round_, Payload(5, "int8", PARTS)), budget=budget)
        rows = {m.name: slice_rows(SPEC, task, m.name) for m in SPEC.modules}
        delta = {
            m.name: {
                "up": draw.standard_normal((5, m.out_features), np.float32),
                "down": draw.standard_normal((5, m.in_features), np.float32),
            }
            for m in SPEC.modules
        } | {"norm.weight": {"dense": draw.standard_normal((1, 20), np.float32)}}
        packed = pack_update(SPEC, task, delta, rows, residual)
        residual = packed.residual
        assert len(packed.data) <= budget.size_bytes
        reader = open_update(packed.data, SPEC, task)
        assert reader.payload == packed.chosen
        chosen.add((packed.chosen.encoding, packed.chosen.group, packed.chosen.density < 1))
        add(learned, delta, rows)
        add(sent, {name: reader.module(name) for name in reader.names}, rows)
    assert len(chosen) >= 5, chosen
    add(sent, residual, {m.name: np.arange(16) for m in SPEC.modules})
    for name, parts in learned.items():
        for part, values in parts.items():
            np.testing.assert_allclose(sent[name][part], values, rtol=0, atol=2e-4, err_msg=name)


def test_without_feedback_nothing_is_held_and_coarse_updates_lose_some():
    payload = Payload(5, "sign", PARTS)
    task = dataclasses.replace(make_task(0, payload), error_feedback=False)
    rows = {m.name: slice_rows(SPEC, task, m.name) for m in SPEC.modules}
    delta = {
        m.name: {
            "up": np.tile(np.linspace(0, 1, m.out_features, dtype=np.float32), (5, 1)),
            "down": np.ones((5, m.in_features), np.float32),
        }
        for m in SPEC.modules
    }
    delta["norm.weight"] = {"dense": np.ones((1, 20), np.float32)}
    packed = pack_update(SPEC, task, delta, rows, {})
    found = unpack(packed.data, SPEC, payload, assignment_digest=task.digest)
    assert packed.residual == {}
    assert np.abs(found["a"]["up"] - delta["a"]["up"]).max() > 0.1
