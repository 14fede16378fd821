"""Hostile devices do what they are said to; the table is what the coordinator's code says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from coordinator.intake import check_update
from edge_agent.training.connectors import DataSelection
from edge_agent.training.rows import Rows
from protos.codecs import NonFiniteError
from protos.packing import pack
from protos.unpacking import open_update
from tests.coordinator.test_screening import NAMES, SPEC, Fleet
from tests.tiny_base import write_base
from trials.attacks import AttackError, Cell, Plan, Range, costs, play_all
from trials.attacks_report import document, worst_of
from trials.hostile import ABOUT, ATTACKS, STRENGTH, Attacker, flipped
from trials.simulation import SimulatedDevice


def sent_by(folder, attack, name, fleet=None, attacker=None):
    """(honest values, what is sent in their place)."""
    fleet = fleet or Fleet(folder)
    attacker = attacker or Attacker(attack, NAMES[:3], SPEC)
    task, honest = fleet.task(name), fleet.honest(name)
    path = folder / task.assignment_id
    path.write_bytes(pack(SPEC, task.update, honest, assignment_digest=task.digest))
    attacker.tamper(task, path)
    reader = open_update(path, SPEC, task)
    return honest, {n: {p: np.array(v) for p, v in reader.module(n).items()} for n in reader.names}


def flat(values):
    return np.concatenate([v.ravel() for of in values.values() for v in of.values()])


@pytest.mark.parametrize(
    ("attack", "factor"), [("sign flip", -1), ("large sign flip", -STRENGTH), ("scaling", 20)]
)
def test_flips_and_scaling_are_multiples_of_the_honest_change(tmp_path, attack, factor):
    honest, sent = sent_by(tmp_path, attack, NAMES[0])
    np.testing.assert_allclose(flat(sent), factor * flat(honest), rtol=1e-5)
    honest, sent = sent_by(tmp_path, attack, NAMES[5])  # no attacker
    np.testing.assert_array_equal(flat(sent), flat(honest))


def test_noise_has_the_size_and_no_direction(tmp_path):
    honest, sent = (flat(v) for v in sent_by(tmp_path, "noise", NAMES[0]))
    assert np.linalg.norm(sent) == pytest.approx(STRENGTH * np.linalg.norm(honest), rel=0.1)
    assert abs(sent @ honest) < 0.2 * np.linalg.norm(sent) * np.linalg.norm(honest)


def test_colluders_send_one_direction(tmp_path):
    fleet, attacker = Fleet(tmp_path, common=0.0), Attacker("colluding", NAMES[:3], SPEC)
    first, second = (
        flat(sent_by(tmp_path, "colluding", name, fleet, attacker)[1]) for name in NAMES[:2]
    )
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert 0.95 < cosine < 1


def test_a_replay_is_the_first_round_again(tmp_path):
    fleet, attacker = Fleet(tmp_path), Attacker("replay", NAMES[:3], SPEC)
    first, _ = sent_by(tmp_path, "replay", NAMES[0], fleet, attacker)
    fleet.number = 4
    _, sent = sent_by(tmp_path, "replay", NAMES[0], fleet, attacker)
    np.testing.assert_allclose(flat(sent), STRENGTH * flat(first), rtol=1e-5)


def test_what_is_no_number_is_refused_when_it_arrives(tmp_path):
    fleet = Fleet(tmp_path)
    task = fleet.task(NAMES[0])
    path = tmp_path / "update"
    path.write_bytes(pack(SPEC, task.update, fleet.honest(NAMES[0]), assignment_digest=task.digest))
    check_update(path, SPEC, task)
    Attacker("NaN", NAMES[:1], SPEC).tamper(task, path)
    with pytest.raises(NonFiniteError):
        check_update(path, SPEC, task)


def test_flipped_labels_are_other_tokens_and_the_only_ones_that_count():
    draw = np.random.default_rng(0)
    rows = Rows(draw.integers(50, size=(4, 8)), np.zeros((4, 8), np.int32), np.ones((4, 8), bool))
    found = flipped(rows, 50)
    np.testing.assert_array_equal(found.tokens[:, ::2], rows.tokens[:, ::2])
    assert (found.tokens[:, 1::2] != rows.tokens[:, 1::2]).mean() > 0.9
    assert found.counted[:, 1::2].all() and not found.counted[:, ::2].any()
    of = dict(zip(rows.tokens[:, 1::2].ravel(), found.tokens[:, 1::2].ravel(), strict=True))
    assert len(set(of.values())) == len(of), "one permutation"


def test_every_attack_is_told_in_words():
    assert set(ABOUT) == set(ATTACKS)


def test_the_table_is_of_the_coordinators_own_checks_and_goes_on_where_it_stopped(tmp_path):
    base = write_base(tmp_path / "base", hidden=32, intermediate=48)
    devices = []
    for i in range(10):
        (tmp_path / f"d{i}").mkdir()
        for j in range(24):
            text = "".join(f"{'abcdefghij'[i]}_{j}_{n} = {n} * {i}\n" for n in range(12))
            (tmp_path / f"d{i}" / f"{j}.py").write_text(text)
        devices.append(SimulatedDevice(f"d{i}", DataSelection((str(tmp_path / f"d{i}"),))))
    plan = Plan(1, 1, (2,), ("scaling", "NaN"), ("none", "recommended"))
    field = Range(plan, tmp_path / "scratch", base, devices)
    played = play_all(plan, tmp_path / "out", field.play, lambda line: None)
    assert set(played) == {c.key for c in plan.cells} and len(played) == 6

    def fate(rule, attack):
        run = played[Cell(rule, attack, 2).key]
        return run.kept_out, run.sent, run.wronged

    assert fate("none", "NaN") == fate("recommended", "NaN") == (2, 2, 0)  # refused on arrival
    assert fate("none", "scaling") == (0, 2, 0)
    assert fate("recommended", "scaling") == (2, 2, 0)
    assert played["recommended-scaling-2"].losses == played["recommended-NaN-2"].losses
    of = {c: cost for c, cost, _ in costs(plan, played)}
    assert of[Cell("none")] == 0 != of[Cell("none", "scaling", 2)]
    assert worst_of(plan, played) == of[Cell("recommended", "NaN", 2)]
    report = document(plan, played, quick=True)
    assert "scaling" in str(report) and "2 of 2" in str(report)

    def never(cell):
        raise AssertionError(f"{cell} was played again")

    assert play_all(plan, tmp_path / "out", never, lambda line: None) == played
    with pytest.raises(AttackError, match="other settings"):
        play_all(replace(plan, rounds=2), tmp_path / "out", never, lambda line: None)
