"""The faults of a chaos trial, before any process is hit."""

import random
from collections import Counter

from trials.chaos_faults import draw, spread

AGENTS = ("ash", "birch")


def test_faults_lie_in_every_round_and_none_is_lost():
    planned = draw(200, AGENTS, random.Random(1))
    due = spread(planned, 20)
    rounds = Counter(round_ for round_, _ in due)
    assert sorted(map(id, planned)) == sorted(id(fault) for _, fault in due)
    assert [round_ for round_, _ in due] == sorted(round_ for round_, _ in due)
    assert set(rounds) == set(range(20))


def test_a_trainer_dies_at_most_once_a_round():
    for seed in range(50):
        due = spread(draw(200, AGENTS, random.Random(seed)), 20)
        deaths = Counter((round_, f.target) for round_, f in due if f.way == "trainer")
        assert max(deaths.values()) == 1
