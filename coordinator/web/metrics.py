"""The run as Prometheus metrics: base units, conventional names, a bounded number of series.

Everything is read from the facts at the time of a scrape, so that a restart loses no count. Of
`MOST_DEVICES` devices each has series of its own, those that enrolled first; the rest are one
device named "other": sums of bytes, means of losses and ratios, the oldest sign of life.
"""

from __future__ import annotations

import math
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from coordinator.store.rows import AssignmentRecord
from coordinator.web.facts import FactReader, Facts
from coordinator.web.pages.fairness import summaries, tier_means
from coordinator.web.pages.standing import Standing, standings
from coordinator.web.pages.warnings import ALERT_KINDS, counts
from profiles.program import version

CONTENT_TYPE = CONTENT_TYPE_LATEST
MOST_DEVICES = 50
MOST_TIERS = 20
OTHER = "other"
PHASES = ("gathering", "open", "merging", "finished")


class Exporter:
    """The text of /metrics, from a registry of its own."""

    def __init__(self, read: FactReader, state: Path | None = None) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_RunCollector(read, state))

    def text(self) -> bytes:
        """One scrape."""
        return generate_latest(self._registry)

    def names(self) -> set[str]:
        """Names of all samples of a scrape."""
        return {s.name for metric in self._registry.collect() for s in metric.samples}


class _RunCollector(Collector):
    def __init__(self, read: FactReader, state: Path | None) -> None:
        self._read, self._state = read, state

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering reads no database."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All families of one scrape."""
        facts = self._read()
        found = standings(facts)
        yield from _run(facts, found)
        yield from _work(facts)
        yield from _fairness(facts)
        yield from _devices(facts, found)
        if self._state is not None:
            yield _gauge(
                "state_disk_free_bytes", "Free on the disk of the state folder.",
                shutil.disk_usage(self._state).free,
            )  # fmt: skip


def _run(facts: Facts, found: Sequence[Standing]) -> Iterator[Metric]:
    info = InfoMetricFamily("sketchfleet_run", "What the coordinator serves.")
    info.add_metric([], {
        "run": facts.run.run_id, "method": str(facts.run.config["method"]["name"]),
        "version": version(), "python": platform.python_version(),
    })  # fmt: skip
    yield info
    state = None if facts.live is None else facts.live.state
    phase = "finished" if facts.run.finished_at is not None else state.phase if state else ""
    phases = GaugeMetricFamily(
        "sketchfleet_round_phase", "1 for what the round does now.", labels=["phase"]
    )
    for one in PHASES:
        phases.add_metric([one], float(one == phase))
    yield phases
    number = state.round if state else facts.rounds[-1].round if facts.rounds else 0
    yield _gauge("round", "Number of the present round, from 0.", number)
    yield _gauge("rounds_wanted", "Training rounds that the run is to have.", facts.rounds_wanted)
    yield _counter("rounds_merged", "Training rounds merged.", facts.rounds_merged)
    if state is not None and state.phase == "open" and math.isfinite(state.deadline_at_s):
        yield _gauge("round_deadline_timestamp_seconds", "When the open round is to close.",
                     state.deadline_at_s)  # fmt: skip
    devices = GaugeMetricFamily("sketchfleet_devices", "Devices by what they do.", labels=["state"])
    connected = len(state.ready) if state else 0
    working = sum(s.at_work for s in found)
    for name, count in (("enrolled", len(found)), ("ready", connected), ("working", working)):
        devices.add_metric([name], count)
    yield devices


def _work(facts: Facts) -> Iterator[Metric]:
    outcomes = CounterMetricFamily(
        "sketchfleet_assignments", "Assignments by what came of them.", labels=["outcome"]
    )
    for outcome in ("merged", "done", "failed", "issued"):
        outcomes.add_metric([outcome], sum(_outcome(a) == outcome for a in facts.given))
    yield outcomes
    lengths = [r.closed_at - r.opened_at for r in facts.rounds if r.closed_at is not None]
    merges = [float(r.detail["merge_s"]) for r in facts.rounds if r.detail.get("merge_s")]
    for name, what, seconds in (
        ("round_duration_seconds", "From opening to close.", lengths),
        ("merge_seconds", "Weighing, merging and storing.", merges),
    ):
        yield SummaryMetricFamily(f"sketchfleet_{name}", what, len(seconds), math.fsum(seconds))
    errors = [r.detail["aggregation_error"] for r in facts.rounds
              if r.detail.get("aggregation_error") is not None]  # fmt: skip
    if errors:
        yield _gauge("aggregation_error_ratio", "Relative error of the newest merge.", errors[-1])
    covered = [r.detail["coverage"] for r in facts.rounds if r.detail.get("coverage")]
    if covered:
        cold = sum(c == 0 for c in covered[-1])
        yield _gauge("components_untrained", "Rank components that nobody trained in the newest "
                     "merged round.", cold)  # fmt: skip


def _fairness(facts: Facts) -> Iterator[Metric]:
    history = summaries(facts)
    if history:
        last = next(reversed(history.values()))
        losses = GaugeMetricFamily(
            "sketchfleet_loss_nats", "Newest loss of the whole adapter over the fleet, per token.",
            labels=["statistic"],
        )  # fmt: skip
        for name in ("mean", "worst_decile_mean", "best", "worst", "range"):
            losses.add_metric([name], getattr(last, name))
        yield losses
        if last.jain is not None and last.gini is not None:
            yield _gauge("loss_jain_ratio", "Jain's index of the newest losses.", last.jain)
            yield _gauge("loss_gini_ratio", "Gini index of the newest losses.", last.gini)
        tiers = GaugeMetricFamily(
            "sketchfleet_tier_loss_nats", "Newest mean loss by kind of hardware, per token.",
            labels=["tier"],
        )  # fmt: skip
        newest = [(tier, points[-1][1]) for tier, points in tier_means(facts).items()]
        for tier, loss in newest[:MOST_TIERS]:
            tiers.add_metric([tier], loss)
        if rest := [loss for _, loss in newest[MOST_TIERS:]]:
            tiers.add_metric([OTHER], math.fsum(rest) / len(rest))
        yield tiers
    alerts = GaugeMetricFamily("sketchfleet_alerts", "Alerts that stand now.", labels=["kind"])
    standing = counts(facts)
    for kind in ALERT_KINDS:
        alerts.add_metric([kind], standing.get(kind, 0))
    yield alerts


def _devices(facts: Facts, found: Sequence[Standing]) -> Iterator[Metric]:
    joined = {d.device_id: d.enrolled_at for d in facts.devices}
    order = sorted(found, key=lambda s: (joined.get(s.device_id, math.inf), s.device_id))
    own, rest = order[:MOST_DEVICES], order[MOST_DEVICES:]

    def family(
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily], name: str, what: str,
        value: Callable[[Standing], float | None], together: Callable[[list[float]], float],
    ) -> Metric:  # fmt: skip
        metric = kind(f"sketchfleet_device_{name}", what, labels=["device"])
        for s in own:
            if (v := value(s)) is not None:
                metric.add_metric([s.device_id], v)
        if others := [v for s in rest if (v := value(s)) is not None]:
            metric.add_metric([OTHER], together(others))
        return metric

    gauge, counter = GaugeMetricFamily, CounterMetricFamily
    yield family(counter, "update_bytes", "Updates sent.", lambda s: s.up_bytes, math.fsum)
    yield family(counter, "fetched_bytes", "Models fetched.", lambda s: s.down_bytes, math.fsum)
    yield family(counter, "dense_bytes", "Dense float32 adapters in place of the updates sent.",
                 lambda s: s.dense_bytes, math.fsum)  # fmt: skip
    yield family(counter, "rounds_merged", "Rounds whose merge holds its update.",
                 lambda s: s.merged, math.fsum)  # fmt: skip
    yield family(gauge, "loss_nats", "Newest loss of the whole adapter, per token.",
                 lambda s: s.loss, _mean)  # fmt: skip
    yield family(gauge, "loss_gap_nats", "Newest loss less the fleet's mean, per token.",
                 lambda s: s.gap, _mean)  # fmt: skip
    yield family(gauge, "sketch_ratio", "k / r of its newest training round.",
                 lambda s: s.last.ratio if s.last else None, _mean)  # fmt: skip
    yield family(gauge, "last_seen_timestamp_seconds", "Its last sign of life.",
                 lambda s: s.last_seen_at or None, min)  # fmt: skip


def _outcome(record: AssignmentRecord) -> str:
    if record.merged_in is not None:
        return "merged"
    return "done" if record.state == "arrived" else record.state


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"sketchfleet_{name}", what, value=value)


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"sketchfleet_{name}", what, value=value)
