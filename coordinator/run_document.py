"""The report of a run as a document: its tables, figures and statements, in order.

Figures come from `run_fairness`, sentences on what they mean from `run_statements`; here they get
the captions, definitions and units that a reader outside the project needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.association import Association
from coordinator.device_figures import mean_of
from coordinator.document import Bullets, Code, Document, Part, Section, Table, Words
from coordinator.methods import METHODS
from coordinator.phases import PHASE_COLUMNS, phase_table
from coordinator.report import RunReport
from coordinator.run_charts import charts_of_costs, charts_of_devices, charts_of_rounds, scatters
from coordinator.run_fairness import Measure, RunFairness
from coordinator.run_statements import Statement
from coordinator.uncertainty import Interval
from coordinator.web.words import (
    UNKNOWN,
    counted,
    decimal,
    duration,
    moment,
    percent,
    signed,
    size,
)
from profiles.program import version

DIGITS = {"Jain": 4, "Gini": 4, "Theil T": 5, "Atkinson": 5}  # near 1 or 0 for alike devices
OF_MACHINES = ("server", "web")  # sections of run.toml that say where, not what

PAPERS = {
    "q-ffl": "Fair Resource Allocation in Federated Learning (arXiv 1905.10497)",
    "afl": "Agnostic Federated Learning (arXiv 1902.00146)",
    "term": "Tilted Empirical Risk Minimization (arXiv 2007.01162)",
    "propfair": "Proportional Fairness in Federated Learning (arXiv 2202.01666)",
    "momentum": "Adaptive Federated Optimization (arXiv 2003.00295)",
    "adam": "Adaptive Federated Optimization (arXiv 2003.00295)",
}
STATISTICS = (
    "Jain's index: Jain, Chiu, Hawe, A Quantitative Measure of Fairness, DEC-TR-301 (1984)",
    "Gini, Theil, Atkinson: Atkinson, On the Measurement of Inequality, J. Econ. Theory 2 (1970); "
    "Theil, Economics and Information Theory (1967)",
    "CVaR: Rockafellar, Uryasev, Optimization of Conditional Value-at-Risk, J. Risk 2 (2000)",
    "Bootstrap: Davison, Hinkley, Bootstrap Methods and their Application (1997); rescaled as Rao, "
    "Wu, J. Am. Stat. Assoc. 83 (1988)",
    "Spearman's interval: Bonett, Wright, Psychometrika 65 (2000); permutation p-values: Phipson, "
    "Smyth, Stat. Appl. Genet. Mol. Biol. 9 (2010)",
)


def run_document(report: RunReport, found: RunFairness, said: Sequence[Statement]) -> Document:
    """The report, in the order in which a reader wants it."""
    config = report.run.config
    return Document(
        title=f"Run {report.run.run_id}",
        lead=f"{_method(config)} on {config['model']['base']}, "
        f"{counted(len(found.devices), 'device')}, {report.rounds_merged} of "
        f"{config['run']['rounds']} rounds merged"
        + ("." if report.run.finished_at else "; not finished."),
        sections=(
            Section("What this run supports, and what it cannot", _supported(said)),
            Section("What ran", _what_ran(report, found)),
            Section("Fairness", _fairness(found)),
            Section("Devices", _devices(found)),
            Section("Hardware", _tiers(found)),
            Section("Participation", _participation(found)),
            Section("Compression and fairness", _compression(found)),
            Section("Bytes and seconds", _costs(report, found)),
            Section("Alerts", _alerts(found)),
            Section("Screening", _screening(report)),
            Section("References", (Bullets(_references(config)),)),
        ),
    )


def _supported(said: Sequence[Statement]) -> tuple[Part, ...]:
    shown = tuple(s.text for s in said if s.supported)
    left = tuple(s.text for s in said if not s.supported)
    return (
        Words("Supported, at 95 %:" if shown else "Nothing is shown at 95 %."),
        *([Bullets(shown)] if shown else []),
        Words("Left open:"),
        Bullets(left),
    )


def _what_ran(report: RunReport, found: RunFairness) -> tuple[Part, ...]:
    run = report.run
    c: dict[str, Any] = run.config
    training, wire, measured = c["training"], c["wire"], c["evaluation"]
    fairness, server = c["fairness"], c["server_optimizer"]
    revision = f" at {c['model']['revision']}" if c["model"]["revision"] else ""
    feedback = ", error feedback" if wire["error_feedback"] else ""
    scale = ", rank-stabilised" if c["adapter"]["rslora"] else ""
    rows = [
        ("method", _method(c)),
        ("weights", fairness["weights"]),
        ("local loss", fairness["loss"]),
        ("server step", server["name"]),
        ("base model", f"{c['model']['base']}{revision}, {training['precision']}"),
        ("adapter", f"LoRA, rank {run.spec.rank}, alpha {c['adapter']['alpha']:g}{scale}"),
        ("rounds", f"{report.rounds_merged} merged of {c['run']['rounds']}"),
        ("devices", f"{len(found.devices)}, {len(found.compared)} of them measured at both ends"),
        ("local round", f"{training['local_steps']} steps of {training['micro_batch']} × "
                        f"{training['accumulation']} sequences of {training['sequence_tokens']} "
                        f"tokens, {training['optimizer']}, learning rate "
                        f"{training['learning_rate']:g}"),
        ("updates sent as", str(wire["update"]) + feedback),
        ("measured on", f"up to {measured['sequences']} held-out sequences per device, "
                        f"{percent(measured['held_out_share'])} of its data"),
        ("seed", str(c["run"]["seed"])),
        ("started", moment(run.created_at)),
        ("finished", moment(run.finished_at) if run.finished_at else "not yet"),
        ("reported with", f"sketchfleet {version()}"),
    ]  # fmt: skip
    told = {name: section for name, section in c.items() if name not in OF_MACHINES}
    return (
        Table("The settings that matter most.", ("setting", "value"), tuple(rows), text_columns=2),
        Code("Every setting of run.toml, as JSON", json.dumps(told, indent=1)),
    )


def _fairness(found: RunFairness) -> tuple[Part, ...]:
    if not found.losses:
        return (Words("No device has measured the global adapter twice: nothing to compare yet."),)
    count = len(found.compared)
    parts: list[Part] = [
        _measure_table(found.losses, (
            f"Loss of the global adapter over the {counted(count, 'device')} measured at both "
            f"ends: each device's mean loss on its own held-out data, {found.unit}, "
            "lower is better. Before: as first received; after: as last received. In brackets: "
            "95 % bootstrap intervals over held-out examples within devices; that of the change is "
            "paired by example. Worst (best) tenth: mean of the ⌈N/10⌉ highest (lowest) losses. "
            "CVaR: mean of the worst quarter, a device at its edge by its part. "
            "Standard deviation of the population. Jain = 1 / (1 + CV²), the square of the "
            "cosine to equal losses. Theil T = ln N − entropy, in nats. Atkinson at ε = 1. "
            "Intervals of range, Gini and the like are too narrow where devices hardly differ."
        )),
    ]  # fmt: skip
    if found.noise is not None and count > 1:
        noise = found.noise
        parts.append(Words(
            f"Of the variance of the last losses, {noise.naive:.4f} ({found.unit})², the finite "
            f"held-out sets alone would show {noise.noise:.4f}; corrected for it the variance is "
            f"{noise.corrected:.4f}, a standard deviation of {noise.corrected**0.5:.3f}."
        ))  # fmt: skip
    elif count > 1:
        parts.append(Words(
            "The losses of single held-out examples were not kept, so that no interval can be "
            "given and the noise of the held-out sets stays in every figure."
        ))  # fmt: skip
    if found.accuracies:
        parts.append(_measure_table(found.accuracies, (
            "The same of accuracy, a share of the predictions, higher is better: the worst tenth "
            "are the lowest."
        )))  # fmt: skip
    return (*parts, *charts_of_rounds(found))


def _measure_table(measures: Sequence[Measure], caption: str) -> Table:
    def ends(value: float | None, known: Interval | None, digits: int) -> str:
        shown = decimal(value, digits)
        return shown if known is None else f"{shown} {_brackets(known, digits, '.')}"

    rows = []
    for m in measures:
        digits = DIGITS.get(m.name, 3)
        change = None if m.before is None or m.after is None else m.after - m.before
        shown = signed(change, digits)
        if m.change_interval is not None:
            shown += f" {_brackets(m.change_interval, digits, '+.')}"
        before = ends(m.before, m.before_interval, digits)
        rows.append((m.name, before, ends(m.after, m.after_interval, digits), shown))
    return Table(caption, ("figure", "before", "after", "change"), tuple(rows))


def _brackets(known: Interval, digits: int, form: str) -> str:
    shown = (format(v, f"{form}{digits}f").replace("-", "−") for v in (known.low, known.high))
    return "[{}, {}]".format(*shown)


def _devices(found: RunFairness) -> tuple[Part, ...]:
    fared = Table(
        "How each device fared: loss of the global adapter on its own held-out data as first and "
        "last received (± half of the 95 % interval from its held-out examples), of its own "
        "adapter after its last training, and of an adapter trained on its data alone with the "
        f"same budget, {found.unit}. Gap: last received less the mean of the fleet. Alone: last "
        "received less local-only; above 0 the device would do better alone. Accuracy: of the next "
        "token, first and last received.",
        ("device", "hardware", "language", "first", "last", "own", "local-only", "gap", "alone",
         "accuracy"),
        tuple(
            (
                d.device_id, d.tier or d.board or UNKNOWN, d.language or UNKNOWN,
                decimal(d.loss_first),
                decimal(d.loss_last) + ("" if d.margin is None else f" ± {d.margin:.3f}"),
                decimal(d.loss_trained), decimal(d.loss_local), signed(d.gap),
                signed(_difference(d.loss_last, d.loss_local)),
                f"{decimal(d.accuracy_first)} → {decimal(d.accuracy_last)}",
            )
            for d in found.devices
        ),
        text_columns=3,
        wide=True,
    )  # fmt: skip
    gave = Table(
        "What each device was asked and gave: k of r rows in its last round and the mean sketch "
        "ratio k / r; encoding and bits per value of its update; bytes sent and fetched over the "
        "run, and the share sent of a dense float32 adapter each time; seconds fetching, "
        "training, evaluating, packing and sending; joules of the whole board where it can tell; "
        "rounds merged of those given; mean share of the merged updates (by inner products: those "
        "of a round sum to 1, one may be below 0) and mean cosine with it.",
        ("device", "k", "ratio", "encoding", "bits", "sent", "fetched", "kept", "busy", "energy",
         "rounds", "share", "cosine"),
        tuple(
            (
                d.device_id, str(d.rank), decimal(d.ratio, 2), d.encoding,
                decimal(d.bits_per_value, 1), size(d.up_bytes), size(d.down_bytes),
                percent(d.kept_share, 1), duration(d.seconds),
                UNKNOWN if d.joules is None else f"{d.joules:,.0f} J",
                f"{d.rounds_joined}/{d.rounds_given}", percent(d.share), decimal(d.alignment, 2),
            )
            for d in found.devices
        ),
        wide=True,
    )  # fmt: skip
    failed = tuple(
        f"{d.device_id}: " + ", ".join(f"{what} in {counted(n, 'round')}"
                                       for what, n in d.failures.items())
        for d in found.devices if d.failures
    )  # fmt: skip
    alone: tuple[Part, ...] = ()
    if (local := found.local) is not None:
        alone = (Words(
            f"Against training alone, over the {counted(local.devices, 'device')} that tried it: "
            f"{percent(local.worse_off_share)} have a higher loss with the global adapter; the "
            f"mean difference is {signed(local.mean)} {found.unit}, the worst "
            f"{signed(local.worst)}. Of an adapter trained alone devices send the mean loss and "
            "not that of each example, so these differences have no interval, and the count holds "
            "devices that are above by chance."
        ),)  # fmt: skip
    lost = (Words("Rounds that came to nothing:"), Bullets(failed)) if failed else ()
    return (fared, *alone, gave, *lost, *charts_of_devices(found))


def _tiers(found: RunFairness) -> tuple[Part, ...]:
    tiers = found.tiers
    if tiers is None:
        return (Words("No device has both told its hardware and measured the last adapter."),)
    members = {tier: [d for d in found.devices if d.tier == tier] for tier in tiers.means}
    table = Table(
        f"Kinds of hardware (as in the board catalogue). Loss: mean of the last losses, nats per "
        f"token; largest difference of means {tiers.gap:.3f}. Between-tier share of the variance, "
        f"η² = {decimal(tiers.between_share, 2)}; tiers that make no difference would show "
        f"{decimal(tiers.between_by_chance, 2)} on average.",
        ("hardware", "devices", "measured", "loss", "fall", "ratio", "sent", "merged", "share"),
        tuple(
            (
                tier, str(len(of)), str(tiers.devices[tier]), decimal(tiers.means[tier]),
                decimal(mean_of([d.gain for d in of])), decimal(mean_of([d.ratio for d in of]), 2),
                size(sum(d.up_bytes for d in of)),
                f"{sum(d.rounds_joined for d in of)}/{sum(d.rounds_given for d in of)}",
                percent(mean_of([d.share for d in of])),
            )
            for tier, of in members.items()
        ),
    )  # fmt: skip
    return (table,)


def _participation(found: RunFairness) -> tuple[Part, ...]:
    if not found.participation:
        return (Words("No update has been merged yet."),)
    rows = []
    for what, e in found.participation.items():
        form = {"bytes sent": size, "seconds at work": duration}.get(what, _plain_number)
        amounts = (form(value) for value in (e.total, e.least, e.most))
        rows.append((what, *amounts, decimal(e.jain), decimal(e.gini)))
    return (Table(
        "How evenly the devices took part: sums over the run by device; of the merged updates, "
        "the mean share without its sign. Devices that gave nothing count with 0.",
        ("what", "fleet", "least", "most", "Jain", "Gini"), tuple(rows)),)  # fmt: skip


def _compression(found: RunFairness) -> tuple[Part, ...]:
    return (
        Table(
            "Rank correlations over the devices of this run. Interval: 95 %, Bonett and Wright. "
            "p: two-sided permutation of which device has which figure. Gap: the device's last "
            "loss less the fleet's mean; fall: first loss less last.",
            ("pair", "devices", "Spearman ρ", "95 % interval", "p", "Kendall τ-b"),
            (_correlation("bytes sent / dense bytes, with the gap", found.compression),
             _correlation("sketch ratio k / r, with the fall", found.ratio)),
        ),
        *scatters(found),
    )  # fmt: skip


def _correlation(name: str, a: Association | None) -> tuple[str, ...]:
    if a is None:
        return (name, "0", *[UNKNOWN] * 4)
    whole = UNKNOWN
    if a.low is not None and a.high is not None:
        whole = f"{signed(a.low, 2)} to {signed(a.high, 2)}"
    return (name, str(a.devices), signed(a.spearman, 2), whole, decimal(a.p_value),
            signed(a.kendall, 2))  # fmt: skip


def _costs(report: RunReport, found: RunFairness) -> tuple[Part, ...]:
    table = Table(
        "Seconds by phase over the run, as each device measured them; MB of files; share of bytes "
        "that crossed the link again; goodput, and the share it is of the link as the device "
        "estimates it.",
        PHASE_COLUMNS, tuple(tuple(row) for row in phase_table(report.phases)), wide=True,
    )  # fmt: skip
    return (table, *charts_of_costs(report, found))


def _alerts(found: RunFairness) -> tuple[Part, ...]:
    if not found.alerts:
        return (Words(
            "Nothing stands out. Rules ask for more than chance shows: few rounds or devices raise "
            "no alert, whatever happened to them."
        ),)  # fmt: skip
    return (Table(
        "What stands out beyond chance, at 1 % per kind and fleet.",
        ("alert", "about", "what", "since round"),
        tuple((a.severity, a.subject, a.message, str(a.since_round)) for a in found.alerts),
        text_columns=3,
    ),)  # fmt: skip


def _screening(report: RunReport) -> tuple[Part, ...]:
    kept_out = sum(len(r["not_merged"]) for r in report.rounds)
    said = Words(f"{counted(kept_out, 'update')} of those that arrived did not enter the model.")
    if not report.quarantines:
        return (said, Words("No device was put in quarantine."))
    return (said, Table(
        "Devices in quarantine: what they sent was checked and not merged.",
        ("device", "since round", "until", "why"),
        tuple(
            (q.quarantine.device_id, str(q.quarantine.round), q.ended_by or "it still runs",
             q.quarantine.reason)
            for q in report.quarantines
        ),
        text_columns=4,
    ))  # fmt: skip


def _references(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = (config["fairness"]["weights"], config["fairness"]["loss"],
             config["server_optimizer"]["name"])  # fmt: skip
    method = METHODS.get(config["method"]["name"])
    own = [f"{config['method']['name']}: {method.paper}"] if method is not None else []
    return (*own, *(f"{name}: {PAPERS[name]}" for name in names if name in PAPERS), *STATISTICS)


def _method(config: Mapping[str, Any]) -> str:
    return str(config["method"]["name"])


def _plain_number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other
