"""What `study compression-fairness` writes: statements by rule, tables and charts.

Knows the findings of `compression` and the words for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from coordinator.document import Document, Part, Section, Table, Words
from trials.study.board import Cell
from trials.study.compression import (
    ALPHA,
    CONTROLS,
    OUTCOMES,
    PRIMARY,
    Across,
    Helps,
    Within,
    across,
    helps,
    within,
)
from trials.study.settings import StudySettings
from trials.study.statistics import Estimate
from trials.study.words import (
    Statement,
    answer,
    interval_figure,
    number,
    p_value,
    said,
    shown,
)

TITLE = "Compression and fairness"
LEAD = (
    "Whether devices that are compressed more end worse off, whether compression makes a fleet "
    "less even, and what helps. Intervals are of 95 %."
)


def conclude(s: StudySettings, cells: Mapping[str, Cell]) -> tuple[Document, dict[str, Any]]:
    """The report, and all figures as plain values."""
    inside, over, helped = within(s, cells), across(s, cells), helps(s, cells)
    statements = [
        *(_said_within(w) for w in inside if _is_primary(w)),
        *(_said_across(o) for o in over if o.metric in ("mean loss", "range")),
        *(_said_helps(h) for h in helped),
    ]
    sections = (
        answer(_answers(inside, over, helped)), *said(statements), _setting(s, cells),
        _within_section(inside), _across_section(over), *_helps_sections(s, helped),
    )  # fmt: skip
    figures = {
        "within": [asdict(w) for w in inside],
        "across": [asdict(o) for o in over],
        "helps": [asdict(h) for h in helped],
        "statements": [asdict(statement) for statement in statements],
    }
    return Document(TITLE, LEAD, sections), figures


def _is_primary(w: Within) -> bool:
    return w.assignment == "independent" and w.outcome in (PRIMARY, "excess over dense")


def _setting(s: StudySettings, cells: Mapping[str, Cell]) -> Section:
    any_cell = next(iter(cells.values()))
    c, f = s.learning, s.fleet
    sizes = ", ".join(map(str, sorted(f.train_sequences)))
    seconds = sum(r.seconds for cell in cells.values() for r in cell.records)
    runs = sum(cell.seeds for cell in cells.values())
    dense = next(cell for cell in cells.values() if cell.facts.kind == "dense")
    local = next(cell for cell in cells.values() if cell.facts.kind == "local")
    rows = [
        [name, number(dense.start.loss[:, i].mean()), number(dense.final.loss[:, i].mean()),
         number(local.final.loss[:, i].mean()), number(float(dense.controls[1][0, i]))]
        for i, name in enumerate(dense.devices)
    ]  # fmt: skip
    words = (
        f"The nano model, rank {c.rank}; {len(f.domains)} devices, one domain of code each, "
        f"with {sizes} training sequences of {c.sequence_tokens} tokens dealt out anew for "
        f"every seed; {f.participants} drawn for each of {c.rounds} rounds of "
        f"{c.local_steps} steps; {len(s.design.seeds)} seeds; weights by {c.weights}. "
        f"{runs} runs, {seconds / 60:.0f} minutes of one processor. Losses are nats per token "
        f"on {any_cell.sequences} held-out sequences of each device."
    )
    columns = ("device", "loss before", "dense fleet", "local-only", "skew, bits")
    table = Table("The two controls: losses in nats per token, means over seeds", columns,
                  tuple(map(tuple, rows)))  # fmt: skip
    return Section("What was run", (Words(words), table))


# --- the answer -----------------------------------------------------------------------------


def _answers(
    inside: Sequence[Within], over: Sequence[Across], helped: Sequence[Helps]
) -> list[str]:
    """To each of the study's questions, from what was shown and what was not."""
    told = []
    for outcome, words in ((PRIMARY, "training alone"), ("excess over dense", "the dense run")):
        mine = [w for w in inside if w.assignment == "independent" and w.outcome == outcome]
        if not mine:
            continue
        yes = [f"{w.arm} (rho {shown(w.rho, 2)})" for w in mine if _found(w.rho, w.adjusted)]
        no = [f"{w.arm} ({shown(w.rho, 2)})" for w in mine if not _found(w.rho, w.adjusted)]
        reach = max(w.detectable for w in mine)
        told.append(
            "Does a device that is compressed more end worse off, where ratios were drawn at "
            f"random? Against {words}: shown for {_listed(yes)}; not shown for {_listed(no)}. "
            f"Correlations below {reach:.2f} such a study would often miss."
        )
    for matched in ("rounds", "bytes"):
        mine_over = [o for o in over if o.metric == "range" and o.matched == matched]
        if mine_over:
            yes = [f"{o.arm} ({'more' if o.slope.value > 0 else 'less'} uneven)"
                   for o in mine_over if _found(o.slope, o.adjusted)]  # fmt: skip
            no = [o.arm for o in mine_over if not _found(o.slope, o.adjusted)]
            told.append(
                "Does compressing all devices alike make the fleet less even? Range of losses "
                f"after as many {matched}: shown for {_listed(yes)}; not shown for {_listed(no)}."
            )
    if helped:
        shown_for, others = _helping(helped)
        told.append(
            "What narrows the gap between the most and the least compressed devices? By so many "
            f"nats per token at best, without adjustment for {len(helped)} comparisons: "
            f"{_listed(shown_for)}. Not shown for {_listed(others)}."
        )
    return told


def _helping(helped: Sequence[Helps]) -> tuple[list[str], list[str]]:
    """What narrowed a gap, by how much at the most and how often; and what never did."""
    of: dict[str, list[Estimate]] = {}
    for h in helped:
        of.setdefault(h.name, []).append(h.differences["tier gap"])
    narrowed = {name: [e for e in gaps if e.high < 0] for name, gaps in of.items()}
    found = [
        f"{name} {shown(min(gaps, key=lambda e: e.value))}, in {len(gaps)} of {len(of[name])}"
        for name, gaps in narrowed.items()
        if gaps
    ]
    return found, [name for name, gaps in narrowed.items() if not gaps]


def _listed(items: Sequence[str]) -> str:
    return "; ".join(items) or "none"


# --- statements -----------------------------------------------------------------------------


def _found(e: Estimate, p: float) -> bool:
    """By test and interval alike."""
    return p <= ALPHA and e.excludes_zero


def _said_within(w: Within) -> Statement:
    figures = (
        f"Spearman's rho of halvings of bytes with the {w.outcome} is {shown(w.rho, 2)} "
        f"(adjusted p {p_value(w.adjusted)}); {shown(w.slope, 4)} nats per token and halving"
    )
    where = f"{w.arm}, ratios drawn at random"
    if _found(w.rho, w.adjusted):
        way = "worse" if w.rho.value > 0 else "better"
        return Statement(
            f"{where}: devices that were compressed more ended {way}. {figures}.", True
        )
    return Statement(
        f"{where}: no relation was shown. {figures}. A rho of {w.detectable:.2f} would have been "
        f"found in four of five such studies; {w.highest:.2f} is the highest that ties allow.",
        False,
    )


def _said_across(o: Across) -> Statement:
    where = f"{o.arm}, all devices alike, after as many {o.matched}"
    figures = (
        f"{shown(o.slope, 4)} per halving of bytes, rho {shown(o.rho, 2)}, adjusted p "
        f"{p_value(o.adjusted)}; {number(o.dense)} dense, {number(o.most)} at the most compressed"
    )
    if _found(o.slope, o.adjusted):
        way = "rises" if o.slope.value > 0 else "falls"
        return Statement(f"{where}: the {o.metric} {way} with compression. {figures}.", True)
    return Statement(f"{where}: no change of the {o.metric} was shown. {figures}.", False)


def _said_helps(h: Helps) -> Statement:
    gap = h.differences["tier gap"]
    others = "; ".join(f"{name} {shown(e)}" for name, e in h.differences.items()
                       if name != "tier gap")  # fmt: skip
    cost = f"{others}; {h.bytes_ratio:.2f} times the bytes"
    if gap.excludes_zero:
        way = "narrows" if gap.value < 0 else "widens"
        return Statement(
            f"{h.name} {way} the gap between most and least compressed devices of {h.against} by "
            f"{shown(gap)} nats per token. {cost}.", True,
        )  # fmt: skip
    return Statement(
        f"{h.name} was not shown to change the gap between most and least compressed devices of "
        f"{h.against}: {shown(gap)}. {cost}.", False,
    )  # fmt: skip


# --- tables ---------------------------------------------------------------------------------


def _within_section(found: Sequence[Within]) -> Section:
    parts: list[Part] = [
        Words(
            "x is log2 of dense over sent bytes, as measured for each level. Figures are of ranks "
            "within each run, averaged over seeds (partial: pooled, one coefficient for each "
            f"control over all runs; controls: {CONTROLS}). p permutes ratios among the devices of "
            "a run; it is exact where ratios were drawn at random, and under the two other "
            "assignments it tests an association which the assignment itself may have made. "
            "A partial of ranks takes out what is linear in them: where a control went with ratio "
            "and loss alike at a rho of 0.8, made-up studies without effect had 0.12 left. "
            "Intervals resample seeds, devices and sequences. Positive: compression goes with "
            f"worse. The primary test is {PRIMARY} under the independent assignment, adjusted by "
            "Holm over arms; all others by Benjamini and Hochberg."
        )
    ]
    columns = ("arm", "assignment", "Spearman", "Kendall tau-b", "partial", "nats per halving",
               "p", "adjusted p", "partial p", "detectable rho")  # fmt: skip
    for outcome, words in OUTCOMES.items():
        mine = [w for w in found if w.outcome == outcome]
        rows = tuple(
            (w.arm, w.assignment, shown(w.rho, 2), shown(w.tau, 2), shown(w.partial, 2),
             shown(w.slope, 4), p_value(w.rho.p), p_value(w.adjusted), p_value(w.partial.p),
             number(w.detectable, 2))
            for w in mine
        )  # fmt: skip
        caption = f"{outcome.capitalize()}: {words}"
        parts.append(Table(caption, columns, rows, text_columns=2, wide=True))
        parts.append(interval_figure(
            f"Nats per token and halving of bytes: {outcome}",
            [(f"{w.arm}, {w.assignment}", w.slope) for w in mine], "nats per halving",
        ))  # fmt: skip
    return Section("Within runs: devices at different ratios", tuple(parts))


def _across_section(found: Sequence[Across]) -> Section:
    parts: list[Part] = [
        Words(
            "Levels are compared within each seed; p permutes them there. Matched at rounds: after "
            "the last. Matched at bytes: each run where the fleet has sent what the dense run had "
            "at its first measurement. Metrics are of the losses of all devices; the fleet is not "
            "resampled, only seeds and sequences. The mean loss after as many rounds is adjusted "
            "by Holm over arms, all others by Benjamini and Hochberg."
        )
    ]
    columns = ("arm", "metric", "dense", "most compressed", "per halving", "Spearman", "p",
               "adjusted p")  # fmt: skip
    for matched in ("rounds", "bytes"):
        rows = tuple(
            (o.arm, o.metric, number(o.dense, 4), number(o.most, 4), shown(o.slope, 5),
             shown(o.rho, 2), p_value(o.rho.p), p_value(o.adjusted))
            for o in found if o.matched == matched
        )  # fmt: skip
        parts.append(Table(f"After as many {matched}", columns, rows, text_columns=2, wide=True))
    return Section("Across runs: all devices at the same ratio", tuple(parts))


def _helps_sections(s: StudySettings, found: Sequence[Helps]) -> list[Section]:
    if not found:
        return []
    names = tuple(found[0].differences)
    of_tier = len(s.fleet.domains) // len(s.ratios.sketch)
    rows = tuple(
        (h.name, h.against, *(shown(h.differences[n]) for n in names), f"{h.bytes_ratio:.2f}")
        for h in found
    )
    words = (
        "Differences from the run without it, paired by seed; below zero is better. Tier gap: "
        "how much more the most compressed devices change than the least. No adjustment for "
        f"{len(found)} comparisons: of intervals without an effect one in twenty excludes zero. "
        "With an adapter for each tier every device is measured on its own tier's. A tier is "
        f"{of_tier} devices here, so that this is near to an adapter for each device, and says "
        "little of larger tiers."
    )
    table = Table(
        "Each mitigation less the same run without it, nats per token",
        ("what", "against", *names, "times the bytes"), rows, text_columns=2, wide=True,
    )  # fmt: skip
    figure = interval_figure(
        "Change of the gap between most and least compressed devices",
        [(f"{h.name}: {h.against}", h.differences["tier gap"]) for h in found], "nats per token",
    )  # fmt: skip
    return [Section("What may help", (Words(words), table, figure))]
