"""Made-up records of a study's runs, so that what is concluded can be tested without training."""

import numpy as np

from trials.study.playing import Point, RunRecord

E = 12
DENSE = 100_000


def record(run, effect=0.0, shift=None, noise=0.005):
    """A run whose devices lose `effect` nats for each tier. Pairs by seed, as real runs do.

    shift: of the loss after training, by facts; default: falls with rounds, local-only is worse.
    """
    shared = np.random.default_rng([run.seed, 99])
    domain = {d: 2.5 + 0.2 * i for i, d in enumerate(run.devices)}
    each = {d: shared.normal(0, 0.2, E) for d in run.devices}
    own = np.random.default_rng(int(run.key, 16) % 2**32)
    down = {"local": 0.1}.get(run.kind, 0.2)
    points, joined = [], dict.fromkeys(run.devices, 0)
    for number in (0, *run.measured):
        for present in run.present[:number] if number == run.measured[-1] else []:
            for d in present:
                joined[d] += 1
        share = number / run.measured[-1]
        loss = {
            d: domain[d]
            - down * share
            + share * effect * run.tier[d]
            + own.normal(0, noise) * share
            for d in run.devices
        }
        if shift is not None:
            loss = {d: value + share * shift(run, d) for d, value in loss.items()}
        so_far = {d: sum(d in p for p in run.present[:number]) for d in run.devices}
        points.append(
            Point(
                number,
                {d: [60 * (loss[d] + x) for x in each[d]] for d in run.devices},
                {d: [60] * E for d in run.devices},
                {d: int(so_far[d] * DENSE / 2 ** run.tier[d]) for d in run.devices},
                {d: so_far[d] * DENSE for d in run.devices},
                {d: 0.1 * so_far[d] for d in run.devices},
            )
        )
    skew = {d: 0.1 + 0.01 * i for i, d in enumerate(run.devices)}
    return RunRecord(
        run.key, run.cell, run.seed, points, joined, skew, DENSE, dict.fromkeys(joined, 0.1), 1.0
    )
