"""What the wire benchmark counts and concludes; whole runs only where slow tests are wanted."""

import io

import numpy as np
import pytest

from benchmarks._fleet_rounds import Fleet, Learning, Way
from benchmarks.packing import make_factors, make_spec
from benchmarks.wire import (
    FLOOR,
    WAYS,
    Outcome,
    best,
    fewer,
    flower_bytes,
    over_floor,
    payloads,
    picture,
)
from protos.codecs import CODECS
from protos.contract import Encoding


def test_every_encoding_is_held_against_its_floor_dense_and_sparse():
    found = list(payloads(4))
    assert {p.encoding for _, p in found} == set(Encoding.__args__)
    for encoding, codec in CODECS.items():
        mine = [p for _, p in found if p.encoding == encoding]
        assert {p.density for p in mine} >= {1.0, 1 / 16}
        assert ({p.group for p in mine} == {0}) != codec.scaled


def test_updates_of_a_real_shape_stay_within_two_percent_of_the_floor():
    spec = make_spec(layers=1, rank=32)
    ratios = over_floor(spec, make_factors(spec))
    # One layer is little for what a file costs besides its values; at 1/64 that shows.
    kept = {name: ratio for name, ratio in ratios.items() if not name.endswith(" 1/64")}
    beyond = {name: ratio for name, ratio in kept.items() if ratio > FLOOR}
    assert not beyond, f"bytes over floor: {beyond}"


def test_flower_sends_each_factor_as_a_numpy_file_and_equal_ones_once():
    one, other = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    stream = io.BytesIO()
    np.save(stream, one)
    size = len(stream.getvalue())
    assert size == 128 + one.nbytes
    assert flower_bytes({"a": {"up": other, "down": one}}) == 2 * size
    assert flower_bytes({"a": {"up": other, "down": one}, "b": {"up": other, "down": one + 1}}) == (
        3 * size
    )


def outcome(name, size, loss):
    return Outcome(name, size, size, loss)


def test_the_best_way_is_the_shortest_that_loses_at_most_one_percent():
    found = [
        outcome("float32", 1000, 2.0),
        outcome("int8", 250, 2.019),
        outcome("sign", 40, 2.021),  # shorter, but too bad
    ]
    chosen, times = best(found, 2.0, (1000, 1000))
    assert (chosen.name, times) == ("int8", 4.0)


def test_directions_are_counted_apart_and_together():
    assert fewer(Outcome("x", 10, 30, 1.0), (600, 600)) == {"up": 60, "down": 20, "both": 30}


def test_the_picture_is_drawn_for_every_way(tmp_path):
    found = [outcome(name, 10_000 - 700 * i, 2.0 + i / 100) for i, name in enumerate(WAYS)]
    picture(found, 3.0, (10_000, 10_000), 1234, tmp_path / "docs" / "wire.png")
    assert (tmp_path / "docs" / "wire.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_round_of_every_way_moves_the_adapter(tmp_path):
    fleet = Fleet(Learning(local_steps=1, evaluation_sequences=1, sequence_tokens=64), tmp_path)
    before = fleet.loss(fleet.initial())
    for name, way in WAYS.items():
        (last,) = fleet.play(way, 1, (1,))
        assert last.loss != before, name
        assert last.up_bytes > 0, name
        assert (last.down_bytes == 0) == way.delta, name  # the start is drawn, not sent
    assert Way("int8", "int8", rank=8).method == "fslora"
