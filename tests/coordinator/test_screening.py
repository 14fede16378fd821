"""Screening: each attack is found by what it does, honest fleets are left alone, and a way back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coordinator.likeness import Sent, likeness
from coordinator.methods import MethodOptions, make
from coordinator.screener import Delivered, Screener, ScreeningMemory
from coordinator.screening import COPY
from profiles.model import ModuleShape
from protos.contract import AdapterSpec, Assignment, Evaluation, LocalReport, Payload
from protos.packing import pack
from protos.sketch import slice_rows

RANK = 6
SPEC = AdapterSpec(
    "run", "base", "main", "ab" * 32, RANK, 12.0, False, 5,
    (ModuleShape("q", 30, 40), ModuleShape("down", 50, 25)),
)  # fmt: skip
NAMES = tuple(f"board-{i}" for i in range(10))
SIZES = dict(zip(NAMES, (6, 6, 6, 6, 3, 3, 3, 6, 6, 2), strict=True))


class Fleet:
    """Devices that agree in part, train a little differently, and may be made to attack."""

    def __init__(self, folder, *, common=0.5, names=NAMES, clean_rounds=3, **changes):
        self.folder, self.names, self.common = folder, names, common
        self.method = make("fslora", MethodOptions(rank=RANK))
        self.screener = Screener(SPEC, self.method, "adamw", clean_rounds, "secret")
        self.memory, self.number, self.kept = ScreeningMemory(), 0, {}
        self.changes = changes  # of every assignment

    def task(self, name, **changes):
        k, place = SIZES[name], self.names.index(name)
        facts = {
            "assignment_id": f"run.{self.number}.{name}",
            "run_id": "run",
            "round": self.number,
            "device_id": name,
            "method": "fslora",
            "rank": k,
            "rows": "stratified",
            "sketch_offset": 2 * place,
            "alpha": 12.0,
            "trained": ("up", "down"),
            "personal": (),
            "keeps_basis": True,
            "keeps_state": False,
            "error_feedback": False,
            "fresh": False,
            "precision": "nf4",
            "sequence_tokens": 32,
            "micro_batch": 2,
            "accumulation": 1,
            "checkpointing": False,
            "local_steps": 4,
            "learning_rate": 1e-3,
            "optimizer": "adamw",
            "update": Payload(k, "float32", ("up", "down")),
            "evaluation_sequences": 1,
            "held_out_share": 0.1,
            "evaluates_global": False,
            "seed": 1,
            "deadline_s": 60.0,
            "reason": "",
        }
        return Assignment(**facts | self.changes | changes)

    def honest(self, name, number=None):
        """What a device would send: partly the round's common direction, partly its own."""
        number = self.number if number is None else number
        task = self.task(name)
        own = np.random.default_rng([number, *name.encode()])
        size = 0.01 * (1 + 0.1 * own.normal())
        found = {}
        for m in SPEC.modules:
            rows = slice_rows(SPEC, task, m.name)
            shared = np.random.default_rng([number, m.out_features])
            found[m.name] = {}
            for part, width in (("up", m.out_features), ("down", m.in_features)):
                agreed = shared.normal(size=(RANK, width))[rows]
                noise = own.normal(size=(len(rows), width))
                mixed = self.common * agreed + np.sqrt(1 - self.common**2) * noise
                found[m.name][part] = (size * mixed).astype(np.float32)
        return found

    def report(self, task, **changes):
        received = Evaluation("slice", "received", 2.0, 0.5, 1000)
        facts = {
            "assignment_id": task.assignment_id,
            "outcome": "done",
            "evaluations": (received,),
            "train_examples": 100,
            "train_loss": 1.9,
            "train_tokens": 256,
            "step_s": 0.1,
        }
        return LocalReport(**facts | changes)

    def round(self, tamper=lambda name, delta: delta, reports=None, tasks=None):
        """Everybody delivers; what screening found, by device."""
        delivered = []
        for name in self.names:
            task = self.task(name, **(tasks or {}).get(name, {}))
            path = self.folder / task.assignment_id
            delta = tamper(name, self.honest(name))
            path.write_bytes(pack(SPEC, task.update, delta, assignment_digest=task.digest))
            report = self.report(task, **(reports or {}).get(name, {}))
            delivered.append(Delivered(task, path, report, own_step_s=0.1))
        self.outcome = self.screener.screen(self.number, delivered, self.memory)
        self.memory.note(self.outcome)
        self.number += 1
        return {s.device_id: s for s in self.outcome.screened}


def times(factor):
    return lambda delta: {n: {p: np.float32(factor) * v for p, v in of.items()}
                          for n, of in delta.items()}  # fmt: skip


def by(attackers, change):
    return lambda name, delta: change(delta) if name in attackers else delta


def kept_out(found):
    return {name for name, s in found.items() if not s.merged}


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path)


# Honest fleets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("common", [0.0, 0.1, 0.3, 0.8])
def test_honest_devices_are_left_alone_however_much_they_differ(tmp_path, common):
    """One of 80 updates at most, of devices that agree in nothing or in nearly all."""
    fleet = Fleet(tmp_path, common=common)
    wronged = [name for _ in range(8) for name in kept_out(fleet.round())]
    assert len(wronged) <= 1 and not fleet.memory.quarantined


def test_fewer_steps_elsewhere_are_no_reason_to_doubt_a_device_that_took_more(fleet):
    tasks = {name: {"local_steps": 1} for name in NAMES[1:]}
    found = fleet.round(by(NAMES[:1], times(3)), tasks=tasks)
    assert found[NAMES[0]].merged
    assert not fleet.round(by(NAMES[:1], times(30)), tasks=tasks)[NAMES[0]].merged


def test_a_fleet_of_three_is_not_judged_until_it_has_a_history(tmp_path):
    fleet = Fleet(tmp_path, names=NAMES[:3])
    assert not kept_out(fleet.round())
    assert not kept_out(fleet.round())
    found = fleet.round(by(NAMES[:1], times(50)))
    assert kept_out(found) == {NAMES[0]}
    assert "recent rounds" in found[NAMES[0]].reasons[0]


# Attacks -----------------------------------------------------------------------------------------


def test_what_is_too_large_is_not_merged_and_twice_is_quarantined(fleet):
    bad = NAMES[:3]
    found = fleet.round(by(bad, times(20)))
    assert kept_out(found) == set(bad) and not fleet.memory.quarantined
    assert "times the fleet's median" in found[bad[0]].reasons[0]
    fleet.round(by(bad, times(20)))
    assert set(fleet.memory.quarantined) == set(bad)


def test_one_layer_that_is_far_too_large_is_found_in_an_update_that_is_not(fleet):
    def one_part(delta):
        return {"q": {"up": 12 * delta["q"]["up"], "down": 0 * delta["q"]["down"]},
                "down": {p: np.float32(1e-3) * v for p, v in delta["down"].items()}}  # fmt: skip

    for _ in range(3):
        fleet.round()
    found = fleet.round(by(NAMES[:1], one_part))
    assert kept_out(found) == {NAMES[0]}


def test_a_flipped_sign_stands_against_the_others(fleet):
    bad = NAMES[:3]
    found = fleet.round(by(bad, times(-1)))
    assert kept_out(found) == set(bad)
    assert "against the others" in found[bad[0]].reasons[0]


def test_noise_of_the_right_size_goes_nowhere(fleet):
    draw = np.random.default_rng(0)

    def noise(delta):
        return {n: {p: (0.01 * draw.normal(size=v.shape)).astype(np.float32)
                    for p, v in of.items()} for n, of in delta.items()}  # fmt: skip

    found = fleet.round(by(NAMES[:2], noise))
    assert kept_out(found) == set(NAMES[:2])


def test_colluders_are_found_by_being_alike_and_quarantined_at_once(tmp_path):
    fleet = Fleet(tmp_path, common=0.1)
    bad, first, draw = NAMES[:3], {}, np.random.default_rng(0)  # all hold all rows

    def same(name, delta):
        if name not in bad:
            return delta
        first.setdefault("delta", delta)
        return {n: {p: v + (0.001 * draw.normal(size=v.shape)).astype(np.float32)
                    for p, v in of.items()} for n, of in first["delta"].items()}  # fmt: skip

    found = fleet.round(same)
    assert kept_out(found) == set(bad) == set(fleet.memory.quarantined)
    assert "nearly the same" in found[bad[0]].reasons[0]


@pytest.mark.parametrize("thief", [NAMES[0], NAMES[1]])
def test_what_was_sent_before_is_a_replay_of_whoever_sent_it(tmp_path, thief):
    fleet = Fleet(tmp_path, common=0.1)
    stolen = fleet.honest(NAMES[0])
    fleet.round()
    fleet.round()
    found = fleet.round(by([thief], lambda delta: times(1.2)(stolen)))
    assert kept_out(found) == {thief} == set(fleet.memory.quarantined)
    whose = "its own" if thief == NAMES[0] else f"that of {NAMES[0]}"
    assert f"nearly the same as {whose} of round 0" in " ".join(found[thief].reasons)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"train_loss": 7.0}, "far above"),  # labels that were flipped, say
        ({"train_loss": 0.01}, "far below"),
        ({"train_loss": -1.0}, "a training loss of -1"),
        ({"train_tokens": 10**6}, "1,000,000 trained tokens"),
        ({"train_examples": 10**6}, "1,000,000 examples"),
        ({"step_s": 1e-4}, "its own measurements predict"),
    ],
)
def test_reports_that_cannot_be_keep_an_update_out(fleet, claim, said):
    found = fleet.round(reports={NAMES[0]: claim})
    assert kept_out(found) == {NAMES[0]} and said in found[NAMES[0]].reasons[0]


def test_examples_may_not_multiply_while_a_run_goes_on(fleet):
    fleet.round(reports={NAMES[0]: {"train_examples": 100}})
    assert not kept_out(fleet.round(reports={NAMES[0]: {"train_examples": 300}}))
    assert kept_out(fleet.round(reports={NAMES[0]: {"train_examples": 500}})) == {NAMES[0]}


# Quarantine --------------------------------------------------------------------------------------


def test_clean_rounds_in_a_row_lead_back_and_the_second_time_takes_twice_as_many(tmp_path):
    fleet, bad = Fleet(tmp_path, clean_rounds=2), NAMES[:1]
    attack = by(bad, times(20))
    for _ in range(2):
        fleet.round(attack)
    assert fleet.memory.quarantined[bad[0]].needed == 2
    found = fleet.round()
    assert found[bad[0]].accepted and not found[bad[0]].merged  # in the shadow
    fleet.round(attack)
    assert fleet.memory.quarantined[bad[0]].clean == 0  # in a row
    fleet.round()
    assert "after 1 more clean round," in fleet.memory.quarantined[bad[0]].told
    fleet.round()
    assert not fleet.memory.quarantined and fleet.outcome.served == bad
    assert fleet.round()[bad[0]].merged
    for _ in range(2):
        fleet.round(attack)
    assert fleet.memory.quarantined[bad[0]].needed == 4


def test_devices_in_quarantine_are_no_measure_for_the_others(fleet):
    bad = NAMES[:4]
    for _ in range(2):
        fleet.round(by(bad, times(20)))
    assert set(fleet.memory.quarantined) == set(bad)
    assert kept_out(fleet.round(by(bad, times(1.2)))) == set(bad)


# What it goes by ---------------------------------------------------------------------------------


def test_cosines_are_those_of_dense_rows_that_two_devices_share(fleet):
    delivered, dense, held = [], [], []
    for name in NAMES[3:6]:
        task, delta = fleet.task(name), fleet.honest(name)
        path = fleet.folder / name
        path.write_bytes(pack(SPEC, task.update, delta, assignment_digest=task.digest))
        delivered.append(Sent(task, path))
        whole, mine = [], []
        for m in SPEC.modules:
            rows = slice_rows(SPEC, task, m.name)
            for values in delta[m.name].values():
                wide = np.zeros((RANK, values.shape[1]))
                wide[rows] = values / np.sqrt((values**2).mean())
                whole.append(wide)
                mine.append(np.repeat([[r in rows] for r in range(RANK)], values.shape[1], axis=1))
        dense.append(np.concatenate(whole, axis=1))
        held.append(np.concatenate(mine, axis=1))
    found = likeness(SPEC, delivered, common_basis=True, key="k")
    for i in range(3):
        for j in range(3):
            a, b = (np.where(held[i] & held[j], dense[d], 0) for d in (i, j))
            want = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
            assert found.cosines[i, j] == pytest.approx(want, abs=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.signatures, axis=1), 1, rtol=1e-5)


def test_signatures_are_alike_as_the_updates_are_and_depend_on_the_key(fleet):
    def signature(delta, key):
        task = fleet.task(NAMES[0])
        path = fleet.folder / "one"
        path.write_bytes(pack(SPEC, task.update, delta, assignment_digest=task.digest))
        return likeness(SPEC, [Sent(task, path)], common_basis=True, key=key).signatures[0]

    own, other = fleet.honest(NAMES[0], 0), fleet.honest(NAMES[0], 1)
    assert signature(own, "k") @ signature(times(3)(own), "k") == pytest.approx(1, abs=1e-5)
    assert abs(signature(own, "k") @ signature(other, "k")) < COPY - 0.1
    assert signature(own, "k") @ signature(own, "other key") < COPY


def test_the_same_round_is_judged_alike_in_any_order(fleet):
    fleet.round()
    before = dataclasses.replace(fleet.memory, past=list(fleet.memory.past))
    task_paths = []
    for name in NAMES:
        task = fleet.task(name)
        path = fleet.folder / task.assignment_id
        path.write_bytes(pack(SPEC, task.update, fleet.honest(name), assignment_digest=task.digest))
        task_paths.append(Delivered(task, path, fleet.report(task)))
    first, again = (
        fleet.screener.screen(1, order, before) for order in (task_paths, task_paths[::-1])
    )
    for a, b in zip(first.screened, again.screened, strict=True):
        assert (a.assignment_id, a.reasons, a.size) == (b.assignment_id, b.reasons, b.size)
        assert a.agreement == b.agreement and a.signature.tobytes() == b.signature.tobytes()
