"""What a run supports, and what it cannot: sentences that follow from its figures by rule.

A statement is supported only where the figures exclude chance at 95 %; what was not measured is
named as open, so that nobody reads an answer out of a table that has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from coordinator.association import Association
from coordinator.run_fairness import RunFairness
from coordinator.uncertainty import Interval
from coordinator.web.words import counted, percent

FEW_DEVICES = 8  # below, no rank correlation under 0.7 can be told from none
CHANCE = 0.05

About = Literal[
    "mean", "worst", "spread", "noise", "compression", "alone", "tiers", "participation",
    "energy", "repetition", "left out", "unfinished",
]  # fmt: skip


@dataclass(frozen=True)
class Statement:
    """supported: whether the run shows it; else it is what the run leaves open. about: its rule."""

    supported: bool
    about: About
    text: str


def statements(found: RunFairness, finished: bool) -> tuple[Statement, ...]:
    """Every rule's sentences, the supported first."""
    said = [
        *_unfinished(finished),
        *_changes(found),
        *_spread(found),
        *_noise(found),
        *_compression(found),
        *_alone(found),
        *_tiers(found),
        *_participation(found),
        *_energy(found),
        *_left_out(found),
        *_repetition(found),
    ]
    return tuple(sorted(said, key=lambda s: not s.supported))


def _unfinished(finished: bool) -> list[Statement]:
    text = "The run has not finished; every figure here may still change."
    return [] if finished else [Statement(False, "unfinished", text)]


def _changes(found: RunFairness) -> list[Statement]:
    devices = _devices(len(found.compared))
    said = []
    rules: tuple[tuple[About, str, str], ...] = (
        ("mean", "mean", "mean loss"), ("worst", "worst tenth", "mean loss of the worst tenth"),
    )  # fmt: skip
    for about, name, what in rules:
        measure = found.measure(name)
        if measure is None or measure.before is None or measure.after is None:
            text = f"No device was measured twice: whether the {what} changed is unknown."
            said.append(Statement(False, about, text))
            continue
        change, known = measure.after - measure.before, measure.change_interval
        ends = f"from {measure.before:.3f} to {measure.after:.3f} {found.unit}"
        if known is None:
            text = (
                f"The {what} of {devices} went {ends}, but the losses of single examples were not "
                "kept on both occasions: how much of it is noise cannot be said."
            )
        elif known.excludes_zero:
            way = "fell" if change < 0 else "rose"
            text = (
                f"The {what} of these {devices} {way} {ends}: by {_interval(known, abs(change))}, "
                "on their own held-out data."
            )
        else:
            text = (
                f"Whether the {what} changed: it went {ends}, and the interval of the change, "
                f"{_range(known)}, includes 0."
            )
        supported = known is not None and known.excludes_zero
        said.append(Statement(supported, about, text))
    return said


def _spread(found: RunFairness) -> list[Statement]:
    measure, change = found.measure("standard deviation"), found.spread_change
    if measure is None or change is None or len(found.compared) < 2:
        return []
    ends = f"standard deviation {measure.before:.3f} to {measure.after:.3f} {found.unit}"
    if change.excludes_zero:
        way = "closer together" if change.value < 0 else "further apart"
        text = f"The devices' losses moved {way}, beyond held-out noise: {ends}."
    else:
        text = (
            f"Whether the devices became more alike: {ends}, and the interval of the change of "
            "the variance includes 0."
        )
    return [Statement(change.excludes_zero, "spread", text)]


def _noise(found: RunFairness) -> list[Statement]:
    if found.noise is None or found.spread_interval is None or len(found.compared) < 2:
        return []
    noise, naive = found.noise.noise, found.noise.naive
    part = min(1.0, noise / naive) if naive else 1.0
    if found.spread_interval.low > 0:
        return [Statement(True, "noise",
            f"These devices differ in loss by more than the noise of their held-out sets: standard "
            f"deviation {found.noise.corrected**0.5:.3f} {found.unit} once the noise "
            f"({percent(part)} of the variance) is taken out.")]  # fmt: skip
    return [Statement(False, "noise",
        f"Whether the devices differ at all: {percent(part)} of the variance of their losses is "
        "what held-out sets of this size show among equal devices. Do not rank them by these "
        "losses.",
    )]  # fmt: skip


def _compression(found: RunFairness) -> list[Statement]:
    known = found.compression
    count = known.devices if known is not None else 0
    said = []
    if known is None or known.spearman is None:
        why = "all devices sent alike" if count > 1 else "there are no two devices to compare"
        text = f"Nothing about compression and fairness: {why}."
        return [Statement(False, "compression", text)]
    told = _association(known)
    if known.p_value is not None and known.p_value <= CHANCE and _excludes(known):
        assert known.spearman is not None
        way = "fared worse" if known.spearman < 0 else "fared better"
        said.append(Statement(True, "compression",
            f"Within this run, devices that sent a smaller share of the dense bytes {way}: {told}. "
            "That is no cause: devices differ in data and hardware as well."))  # fmt: skip
    else:
        text = f"Whether compression and the loss gap go together within this run: {told}."
        said.append(Statement(False, "compression", text))
    few = f"With {_devices(count)} and one run" if count < FEW_DEVICES else "With one run"
    said.append(Statement(False, "compression",
        f"{few}, no statement about compression and fairness in general is possible; it takes "
        "several seeds, and ratios assigned independently of the devices' data "
        "(`sketchfleet-trial study`)."))  # fmt: skip
    return said


def _alone(found: RunFairness) -> list[Statement]:
    local = found.local
    if local is None:
        return [Statement(False, "alone",
            "No adapter was trained on a device's data alone, so nobody can say whether taking "
            "part is worth it.")]  # fmt: skip
    margins = {d.device_id: d.margin for d in found.devices}
    gaps = {
        d.device_id: d.loss_last - d.loss_local for d in found.devices
        if d.loss_last is not None and d.loss_local is not None
    }  # fmt: skip
    # sqrt 2: the noise of both losses as if independent, which it is at most.
    clear = {
        name: gap for name, gap in gaps.items()
        if (margin := margins[name]) is not None and abs(gap) > 2**0.5 * margin
    }  # fmt: skip
    better = sorted(name for name, gap in clear.items() if gap < 0)
    worse = sorted(name for name, gap in clear.items() if gap > 0)
    said = []
    if better:
        said.append(Statement(True, "alone",
            f"Taking part was worth it for {_named(better)}: lower loss than an adapter trained "
            "on their own data alone with the same budget, beyond held-out noise."))  # fmt: skip
    if worse:
        said.append(Statement(True, "alone",
            f"{_named(worse)} would have done better alone, beyond held-out noise."))  # fmt: skip
    unclear = sorted(gaps.keys() - clear.keys())
    if unclear:
        said.append(Statement(False, "alone",
            f"Whether taking part was worth it for {_named(unclear)}: the difference to an adapter "
            "of their own is within the noise of their held-out data, or that noise is not "
            "known."))  # fmt: skip
    missing = len(found.devices) - local.devices
    if missing:
        said.append(Statement(False, "alone",
            f"{_devices(missing)} of {len(found.devices)} trained no adapter alone: nothing can be "
            "said of what taking part was worth to them."))  # fmt: skip
    return said


def _tiers(found: RunFairness) -> list[Statement]:
    tiers = found.tiers
    if tiers is None or len(tiers.means) < 2:
        text = "Nothing about kinds of hardware: all measured devices are of one kind."
        return [Statement(False, "tiers", text)]
    if min(tiers.devices.values()) < 2:
        alone = sorted(t for t, n in tiers.devices.items() if n < 2)
        return [Statement(False, "tiers",
            f"Whether hardware or data makes the difference between kinds of hardware: of "
            f"{_named(alone)} there is one device only.")]  # fmt: skip
    share, chance = tiers.between_share, tiers.between_by_chance
    if share is None or chance is None:
        return []
    return [Statement(False, "tiers",
        f"Whether kinds of hardware are served unequally: {percent(share)} of the variance lies "
        f"between them, where {percent(chance)} would by chance, and devices of a kind share no "
        "data by design.")]  # fmt: skip


def _participation(found: RunFairness) -> list[Statement]:
    silent = sorted(d.device_id for d in found.devices if d.rounds_given and not d.rounds_joined)
    if not silent:
        return []
    return [Statement(True, "participation",
        f"No update of {_named(silent)} was ever merged; the model owes nothing to their data.",
    )]  # fmt: skip


def _energy(found: RunFairness) -> list[Statement]:
    told = sum(d.joules is not None for d in found.devices)
    if told == len(found.devices):
        return []
    count = f"{told} of {len(found.devices)} devices" if told else "no device"
    text = f"What the run cost in energy: {count} can measure it."
    return [Statement(False, "energy", text)]


def _left_out(found: RunFairness) -> list[Statement]:
    missing = sorted({d.device_id for d in found.devices} - set(found.compared))
    if not missing or not found.compared:
        return []
    return [Statement(False, "left out",
        f"How {_named(missing)} fared: not measured both before and after, so in no figure that "
        "compares the two.")]  # fmt: skip


def _repetition(found: RunFairness) -> list[Statement]:
    return [Statement(False, "repetition",
        "How another seed, other devices or another method would have fared: this is one run. Its "
        "intervals cover the choice of held-out examples, not of the order of batches, the "
        "sketches, or who took part when.")]  # fmt: skip


def _association(known: Association) -> str:
    parts = [f"Spearman {known.spearman:+.2f} over {_devices(known.devices)}"]
    if known.low is None or known.high is None or known.p_value is None:
        return f"{parts[0]}, too few for an interval"
    parts.append(f"95 % interval {known.low:+.2f} to {known.high:+.2f}")
    parts.append(f"permutation p = {known.p_value:.2g}")
    return ", ".join(parts) + ("" if _excludes(known) else "; the interval includes 0")


def _excludes(known: Association) -> bool:
    return known.low is not None and known.high is not None and (known.low > 0 or known.high < 0)


def _interval(known: Interval, shown: float) -> str:
    low, high = sorted((abs(known.low), abs(known.high)))
    return f"{shown:.3f} (95 % interval {low:.3f} to {high:.3f})"


def _range(known: Interval) -> str:
    return f"{known.low:+.3f} to {known.high:+.3f}"


def _devices(count: int) -> str:
    return counted(count, "device")


def _named(names: Sequence[str], most: int = 6) -> str:
    shown = list(names[:most])
    if len(names) > most:
        return ", ".join(shown) + f" and {len(names) - most} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
