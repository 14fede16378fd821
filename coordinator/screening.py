"""Which updates of a round enter the merge, and which devices stand apart: decisions and reasons.

Shapes, types, digests and finiteness are refused when an update arrives (`intake`). Here an update
is compared with the others of its round, with earlier ones, and with what its device reports:

| what             | not merged where                                                             |
|------------------|------------------------------------------------------------------------------|
| size             | its root mean square is above `SIZE` times the fleet's median and `SPREADS`   |
|                  | robust standard deviations (of logarithms, this round's and those before;     |
|                  | `SIZE_AT_FIRST` while these are few); one part's, above `PART` times that     |
| direction        | the median of its cosines with the others is next to nothing or negative, and |
|                  | far below theirs with each other                                              |
| copies           | the cosine with another device's is `COPY` or more                            |
| replay           | the same with an earlier update, of whichever device                          |
| report           | losses, tokens, examples or speed that cannot be                              |

A device that took more steps than the others may be larger by as much; under SGD, also one whose
scale is. A round of fewer than `FLEET` devices is compared with the sizes of rounds before, at
`SIZE_OF_FEW`, and says nothing of direction. What it costs honest fleets: `docs/security.md`.

Who is not merged `STRIKES` times within its last `WITHIN` rounds is quarantined; who copies or
replays, at once. It goes on training and being screened; after enough clean rounds in a row it is
back, after twice as many the next time. Pure: memory comes in and goes out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from coordinator.likeness import Likeness
from coordinator.screening_types import Claims, Entry, Outcome, Quarantine, Screened

SIZE, SIZE_AT_FIRST, SIZE_OF_FEW, PART, SPREADS = 1.3, 2.0, 4.0, 4.0, 6.0
ENOUGH = 8  # sizes that tell how much honest ones differ
FLEET = 4  # devices in good standing that make a fleet to compare with
RECENT = 5  # rounds that count as of late
NEXT_TO_NOTHING, COMMON = 0.2, 0.02  # of the fleet's median cosine; which must be at least this
COPY = 0.9
STRIKES, WITHIN = 2, 3
LOSS_ABOVE, LOSS_BELOW, NATS = 2.0, 0.1, 1.0  # training against evaluation; and by so many nats
GROWTH, MOST_OF_MEDIAN = 4.0, 1000.0  # of examples: since its first report, and against others
FASTER = 20.0  # than the device itself measured


def screen(
    round_: int,
    entries: Sequence[Entry],
    found: Likeness,
    past: Sequence[Screened],
    quarantined: Mapping[str, Quarantine],
    *,
    clean_rounds: int,
    offences: Mapping[str, int],
) -> Outcome:
    """Judges the updates of a round. past: of this run, rounds before, in any order.

    clean_rounds: a first quarantine's length; offences: how many each device had before.
    """
    good = np.array([e.device_id not in quarantined for e in entries], bool)
    past = sorted((p for p in past if p.round < round_), key=lambda p: (p.round, p.assignment_id))
    why: list[list[str]] = [[] for _ in entries]
    grave = _copies(entries, found, why) | _replays(entries, found, past, why)
    sizes = _sizes(entries, found, good, past, why)
    agreements = _directions(entries, found, good, past, why)
    _reports(entries, past, why)
    screened = tuple(
        Screened(
            e.assignment_id, e.device_id, round_, not why[i], e.device_id in quarantined,
            tuple(why[i]), float(sizes[i]), agreements[i], e.claims.examples, found.signatures[i],
        )
        for i, e in enumerate(entries)
    )  # fmt: skip
    imposed: list[Quarantine] = []
    served: list[Quarantine] = []
    ran: list[Quarantine] = []
    for device in sorted({e.device_id for e in entries}):
        own = [s for s in screened if s.device_id == device]
        reasons = [r for s in own for r in s.reasons]
        if (held := quarantined.get(device)) is not None:
            clean = 0 if reasons else held.clean + 1
            (served if clean >= held.needed else ran).append(replace(held, clean=clean))
            continue
        before = [p for p in past if p.device_id == device and not p.shadow]
        rounds = sorted({p.round for p in before})[-(WITHIN - 1) :] if WITHIN > 1 else []
        strikes = len({p.round for p in before if p.round in rounds and not p.accepted})
        if device in grave or (reasons and strikes + 1 >= STRIKES):
            needed = clean_rounds * 2 ** min(offences.get(device, 0), 10)
            imposed.append(Quarantine(device, round_, reasons[0], needed))
    return Outcome(screened, tuple(imposed), tuple(q.device_id for q in served), tuple(ran))


def _copies(entries: Sequence[Entry], found: Likeness, why: list[list[str]]) -> set[str]:
    """Devices that send nearly the same as another."""
    marks = found.signatures @ found.signatures.T
    closest = np.fmax(np.nan_to_num(found.cosines, nan=-1.0), marks)
    names = [e.device_id for e in entries]
    grave = set()
    for i, name in enumerate(names):
        others = [j for j in range(len(names)) if names[j] != name]
        like = [j for j in others if closest[i, j] >= COPY]
        if like:
            grave.add(name)
            most = max(closest[i, j] for j in like)
            why[i].append(
                f"its update and that of {', '.join(sorted(names[j] for j in like)[:3])} are "
                f"nearly the same (cosine {most:.2f}); two devices' own training never is"
            )
    return grave


def _replays(
    entries: Sequence[Entry], found: Likeness, past: Sequence[Screened], why: list[list[str]]
) -> set[str]:
    """Devices that send again what they or others sent before."""
    width = found.signatures.shape[1] if len(entries) else 0
    known = [p for p in past if len(p.signature) == width]
    if not known:
        return set()
    marks = np.stack([p.signature for p in known])
    grave = set()
    for i, entry in enumerate(entries):
        alike = marks @ found.signatures[i]
        best = int(np.argmax(alike))
        if alike[best] >= COPY:
            grave.add(entry.device_id)
            of = known[best]
            whose = "its own" if of.device_id == entry.device_id else f"that of {of.device_id}"
            why[i].append(
                f"it sent an update again: nearly the same as {whose} of round {of.round} "
                f"(cosine {alike[best]:.2f})"
            )
    return grave


def _sizes(
    entries: Sequence[Entry],
    found: Likeness,
    good: NDArray[np.bool_],
    past: Sequence[Screened],
    why: list[list[str]],
) -> NDArray[np.float64]:
    """Root mean squares (n,), and reasons where they are far above the others'."""
    with np.errstate(invalid="ignore"):
        sizes = np.sqrt(np.nanmean(found.sizes**2, axis=1)) if len(entries) else np.zeros(0)
    own = np.log(sizes[good & (sizes > 0)])
    before = _log_sizes(past)
    recent = np.concatenate([*before, np.zeros(0)])
    if len(own) >= FLEET:
        reference, whose = own, "the fleet's median"
    elif len(recent) >= FLEET:
        reference, whose = recent, "the median of recent rounds"
    else:
        return sizes
    middle = float(np.median(reference))
    # Off their own round's median: sizes shrink while a run converges.
    rounds = [of - np.median(of) for of in (*before, own) if len(of) >= FLEET]
    off = np.concatenate([*rounds, np.zeros(0)])
    least = SIZE if len(off) >= ENOUGH else SIZE_AT_FIRST
    limit = least
    if len(off):
        limit = max(least, math.exp(min(SPREADS * 1.4826 * float(np.median(np.abs(off))), 20.0)))
    if len(own) < FLEET:
        limit = max(limit, SIZE_OF_FEW)
    relative = None
    if len(own) >= FLEET:
        known = found.sizes[good]
        there = ~np.isnan(known).all(axis=0)  # a late update may hold parts that nobody else does
        parts = np.full(known.shape[1], np.nan)
        parts[there] = np.nanmedian(known[:, there], axis=0)
        relative = found.sizes / np.where(parts > 0, parts, np.nan)
    steps = float(np.median([e.steps for e in entries]))
    scale = float(np.median([e.scale for e in entries]))
    for i, entry in enumerate(entries):
        allowed = max(1.0, entry.steps / max(steps, 1e-9)) * max(1.0, entry.scale / scale)
        times = sizes[i] / math.exp(middle)
        if times > limit * allowed:
            why[i].append(
                f"its update is {times:.1f} times {whose}, at most {limit * allowed:.1f} is merged"
            )
            continue
        if relative is None or not np.isfinite(relative[i]).any():
            continue
        worst = int(np.nanargmax(relative[i]))
        if relative[i, worst] > PART * limit * allowed:
            why[i].append(
                f"its change of {found.parts[worst]} is {relative[i, worst]:.1f} times the fleet's "
                f"median, at most {PART * limit * allowed:.1f} is merged"
            )
    return sizes


def _log_sizes(past: Sequence[Screened]) -> list[NDArray[np.float64]]:
    """Of updates that were merged, by round, of the last `RECENT`."""
    rounds = sorted({p.round for p in past})[-RECENT:]
    return [
        np.log([p.size for p in past if p.round == r and p.merged and p.size > 0]) for r in rounds
    ]


def _directions(
    entries: Sequence[Entry],
    found: Likeness,
    good: NDArray[np.bool_],
    past: Sequence[Screened],
    why: list[list[str]],
) -> list[float | None]:
    """Median cosine of each with the others in good standing, and reasons where it stands alone.

    Judged by the mean over a device's last rounds: local training is noisy, and in a single round
    even honest devices point almost every way.
    """
    cosines = found.cosines.copy()
    np.fill_diagonal(cosines, np.nan)
    agreements: list[float | None] = []
    for i in range(len(entries)):
        others = cosines[i, good]
        others = others[~np.isnan(others)]
        agreements.append(float(np.median(others)) if len(others) >= FLEET - 1 else None)
    rounds = sorted({p.round for p in past})[-RECENT:]
    lately: dict[str, list[float]] = {}
    for p in past:
        if p.agreement is not None and p.round in rounds:
            lately.setdefault(p.device_id, []).append(p.agreement)
    means = [
        None if a is None else float(np.mean([*lately.get(e.device_id, ()), a]))
        for e, a in zip(entries, agreements, strict=True)
    ]
    known = np.array([m for m, ok in zip(means, good, strict=True) if ok and m is not None])
    if len(known) < FLEET:
        return agreements
    middle = float(np.median(known))
    spread = 1.4826 * float(np.median(np.abs(known - middle)))
    if middle < COMMON:
        return agreements  # the fleet has no common direction to be off
    for i, own in enumerate(means):
        if own is not None and own < min(NEXT_TO_NOTHING * middle, middle - SPREADS * spread):
            way = "against the others" if own < 0 else "nowhere near where the others go"
            why[i].append(
                f"its updates point {way}: median cosine {own:+.3f} of late, of the fleet "
                f"{middle:+.3f}"
            )
    return agreements


def _reports(entries: Sequence[Entry], past: Sequence[Screened], why: list[list[str]]) -> None:
    """Reasons where a report says what cannot be."""
    examples = [e.claims.examples for e in entries if e.claims.examples > 0]
    middle = float(np.median(examples)) if len(examples) >= FLEET else 0.0
    for said, entry in zip(why, entries, strict=True):
        c, seen = entry.claims, _received(entry.claims)
        if not math.isfinite(c.train_loss) or c.train_loss < 0:
            said.append(f"it reports a training loss of {c.train_loss}")
        elif seen is not None and c.train_loss > max(LOSS_ABOVE * seen, seen + NATS):
            said.append(
                f"it trained at a loss of {c.train_loss:.2f}, far above the {seen:.2f} that it "
                "measured on its held-out code: what it trains on is not what it evaluates on"
            )
        elif seen is not None and 0 < c.train_loss < min(LOSS_BELOW * seen, seen - NATS):
            said.append(
                f"it trained at a loss of {c.train_loss:.2f}, far below the {seen:.2f} that it "
                "measured before training"
            )
        if c.most_tokens and c.tokens > c.most_tokens:
            said.append(
                f"it reports {c.tokens:,} trained tokens, its assignment comes to at most "
                f"{c.most_tokens:,}"
            )
        first = next((p.examples for p in past if p.device_id == entry.device_id), 0)
        if first and c.examples > GROWTH * first:
            said.append(f"it reports {c.examples:,} examples, where it began with {first:,}")
        elif middle and c.examples > MOST_OF_MEDIAN * middle:
            said.append(f"it reports {c.examples:,} examples, the fleet's median is {middle:,.0f}")
        if c.own_step_s > 0 and 0 < c.step_s < c.own_step_s / FASTER:
            said.append(
                f"it reports steps of {c.step_s:.3f} s, its own measurements predict "
                f"{c.own_step_s:.3f} s"
            )


def _received(claims: Claims) -> float | None:
    """The loss as received, where it is a number that training can be held against."""
    loss = claims.received_loss
    return loss if loss is not None and math.isfinite(loss) and loss > 0 else None
