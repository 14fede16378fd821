"""What `study rank-shift` writes: the answer by rule, statements, tables and charts.

Knows the findings of `rank_shift_analysis` and the words for them; it computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coordinator.document import Document, Part, Section, Table, Words
from trials.study.rank_shift import ShiftRecord
from trials.study.rank_shift_analysis import FIGURES, Claim, Findings, analyse
from trials.study.rank_shift_settings import RankShiftSettings, base_of
from trials.study.words import (
    Statement,
    answer,
    interval_figure,
    number,
    p_value,
    said,
    shown,
)

QUESTIONS: Mapping[str, tuple[str, str]] = {
    "ranks": (
        "Does it matter how the same total of ranks is spread over the devices?",
        "the mean loss or the worst device's",
    ),
    "shift": (
        "Does it matter how unlike the devices' {classes} are?",
        "the mean loss or the worst device's",
    ),
    "tiers": ("Do devices of low rank fare worse than those of high rank?", "the gap between them"),
}


def conclude(
    s: RankShiftSettings, data: Path | None, records: Mapping[str, ShiftRecord]
) -> tuple[Document, dict[str, Any]]:
    """The report, and all figures as plain values."""
    found = analyse(s, data, records)
    classes = classes_of(s)
    statements = [_said(claim) for claim in found.claims]
    seconds = sum(record.seconds for record in records.values())
    sections = (
        answer(_answers(s, found)),
        *said(statements),
        _setting(s, found, len(records), seconds),
        _learnt(s, found),
        _losses(found),
        *_claims(found),
    )
    lead = (
        f"Whether it matters how LoRA ranks are spread over devices, and whether that changes "
        f"when devices have unlike {classes}. Intervals are of 95 %."
    )
    task = Path(s.task.train[0]).parent.name if s.task.train else ""  # GLUE's folders
    title = f"Ranks unevenly spread, and skewed {classes}{f': {task}' if task else ''}"
    return Document(title, lead, sections), _plain(found)


def classes_of(s: RankShiftSettings) -> str:
    """What devices have in unlike shares, in a word."""
    return "labels" if s.task.kind == "classification" else "domains"


def unit_of(s: RankShiftSettings) -> str:
    """Of losses."""
    return f"nats {'an example' if s.task.labels else 'a token'}"


# --- the answer ---------------------------------------------------------------------------------


def _answers(s: RankShiftSettings, found: Findings) -> list[str]:
    """A sentence or two for each question."""
    told = []
    if not _learns(found):
        told.append(
            "Nothing was learnt that the intervals could tell from no learning, where "
            f"{classes_of(s)} are least skewed: what follows compares models without skill, which "
            f"may favour some {classes_of(s)} over others. Read it as a check of the procedure, "
            "not as an answer."
        )
    for kind, (question, what) in QUESTIONS.items():
        mine = [claim for claim in found.claims if claim.kind == kind]
        if not mine:
            continue
        yes = [claim for claim in mine if claim.supported]
        words = question.format(classes=classes_of(s))
        if yes:
            told.append(
                f"{words} Shown in {len(yes)} of {len(mine)} comparisons: "
                + "; ".join(f"{c.words}, {shown(c.estimate)} {unit_of(s)}" for c in yes) + "."
            )  # fmt: skip
            continue
        widest = max(mine, key=lambda c: c.estimate.high - c.estimate.low).estimate
        narrowest = min(mine, key=lambda c: c.estimate.high - c.estimate.low).estimate
        told.append(
            f"{words} No relation was shown in any of {len(mine)} comparisons of {what}. That is "
            f"not the same as none: the intervals reach from {_half(narrowest)} to {_half(widest)} "
            f"{unit_of(s)} either way."
        )
    return told


def _half(e: Any) -> str:
    return f"±{(e.high - e.low) / 2:.2f}"


def _learns(found: Findings) -> bool:
    return any(e.high < 0 for e in found.learnt.values())


def _said(claim: Claim) -> Statement:
    return Statement(
        f"{claim.words}: {shown(claim.estimate)}, adjusted p {p_value(claim.p)}.", claim.supported
    )


# --- what was run -------------------------------------------------------------------------------


def _setting(s: RankShiftSettings, found: Findings, runs: int, seconds: float) -> Section:
    d, c, classes = s.design, s.learning, classes_of(s)
    base = "" if s.task.base else base_of(s.task).parent.name
    if s.task.kind == "code":
        base = "nano model"
    files = f" of {', '.join(s.task.train)}" if s.task.train else ""
    words = (
        f"{f'The base is {base}. ' if base else ''}{d.devices} devices of {d.examples} examples "
        f"each{files}; {c.rounds} rounds of {c.local_steps} steps of {c.micro_batch}, learning "
        f"rate {c.learning_rate:g}, {len(d.seeds)} seeds; {runs} runs, {seconds / 60:.0f} minutes "
        f"of one processor. Losses in {unit_of(s)}, lower is better; a device's is that of the "
        f"global adapter on held-out data that is the same for all, weighed by the {classes} that "
        "the device has. A method that needs one rank for all has the lowest of the fleet's."
    )
    skews = Table(
        "Skew: mean total-variation distance of a device's shares from the fleet's",
        ("alpha", "skew"), tuple((f"{a:g}", number(v, 2)) for a, v in found.skews.items()),
    )  # fmt: skip
    ranks = Table(
        "Distributions of ranks, dealt to devices by the seed",
        ("ranks", "of the devices", "in all"),
        tuple((name, ", ".join(map(str, r)), str(sum(r))) for name, r in d.ranks.items()),
        text_columns=2,
    )
    return Section("What was run", (Words(words), skews, ranks))


def _learnt(s: RankShiftSettings, found: Findings) -> Section:
    rows = []
    for method, e in found.learnt.items():
        mean, worst = found.accuracy[method, s.design.baseline, s.design.alphas[-1]]
        rows.append((method, shown(e), f"{mean:.3f}", f"{worst:.3f}"))
    caption = (
        f"Mean loss after less before, and accuracy after: {s.design.baseline} ranks, alpha "
        f"{s.design.alphas[-1]:g}, {unit_of(s)}"
    )
    columns = ("method", "loss after less before", "accuracy, mean", "worst device")
    return Section("Was anything learnt?", (Table(caption, columns, tuple(rows)),))


def _losses(found: Findings) -> Section:
    columns = ("method", "ranks", "alpha", *FIGURES, "accuracy, mean / worst", "kB up per device")
    rows = []
    for (method, spread, alpha), figures in found.cells.items():
        told = [shown(figures[name]) if name in figures else "" for name in FIGURES]
        mean, worst = found.accuracy[method, spread, alpha]
        sent = found.up_bytes[method, spread, alpha] / 1e3
        rows.append((method, spread, f"{alpha:g}", *told, f"{mean:.3f} / {worst:.3f}",
                     f"{sent:.0f}"))  # fmt: skip
    caption = "After the last round; lowest less highest rank: above zero, low ranks fare worse"
    return Section("Losses", (Table(caption, columns, tuple(rows), text_columns=2, wide=True),))


def _claims(found: Findings) -> list[Section]:
    parts: list[Part] = [
        Words(
            "Intervals are over seeds and held-out examples, paired by seed. A gap between ranks "
            "is tested by dealing the ranks anew within each seed, all else by Student's t; p is "
            "Holm's within each kind of question. Supported: p below 0.05 and zero left out."
        )
    ]
    for kind in QUESTIONS:
        if mine := [claim for claim in found.claims if claim.kind == kind]:
            caption = f"Differences: {kind}"
            parts.append(interval_figure(caption, [(c.words, c.estimate) for c in mine], "nats"))
    return [Section("Every comparison", tuple(parts))]


def _plain(found: Findings) -> dict[str, Any]:
    return {
        "cells": [
            {"method": m, "ranks": r, "alpha": a, "accuracy": found.accuracy[m, r, a],
             "up_bytes": found.up_bytes[m, r, a],
             **{name: asdict(e) for name, e in figures.items()}}
            for (m, r, a), figures in found.cells.items()
        ],
        "skews": {f"{a:g}": value for a, value in found.skews.items()},
        "learnt": {m: asdict(e) for m, e in found.learnt.items()},
        "claims": [{**asdict(c), "supported": c.supported} for c in found.claims],
    }  # fmt: skip
