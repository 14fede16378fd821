"""The rounds of a run, and one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.charts import Axis, Dot, Group, Line, line_chart, scatter_chart
from coordinator.store.rows import RoundRecord
from coordinator.web import words
from coordinator.web.facts import Facts
from coordinator.web.pages.outcomes import outcome_cell, phase_chart
from coordinator.web.pages.parts import Cell, Chart, Figure, Table


@dataclass(frozen=True)
class RoundsView:
    """All rounds."""

    rounds: Table
    charts: tuple[Chart, ...]


@dataclass(frozen=True)
class RoundView:
    """One round."""

    number: int
    kind: str
    figures: tuple[Figure, ...]
    devices: Table
    charts: tuple[Chart, ...]
    layers: Table
    before: int | None  # the neighbours, for links
    after: int | None


def rounds_view(facts: Facts) -> RoundsView:
    """The page `/rounds`."""
    seconds = [(float(r.round), r.closed_at - r.opened_at) for r in facts.rounds
               if r.closed_at is not None]  # fmt: skip
    merging = [(float(r.round), float(r.detail["merge_s"])) for r in facts.rounds
               if r.detail.get("merge_s") is not None]  # fmt: skip
    errors = [(float(r.round), float(r.detail["aggregation_error"])) for r in facts.rounds
              if r.detail.get("aggregation_error") is not None]  # fmt: skip
    number = Axis("round", whole=True)
    how_long, how_wrong = "Length of rounds, and of their merges", "Aggregation error"
    return RoundsView(
        rounds=Table(
            caption="Rounds",
            columns=("Round", "Phase", "Opened", "Length", "Merged", "Late", "Failed", "Sent",
                     "Merge", "Aggregation error"),
            rows=tuple(_round_row(facts, r) for r in reversed(facts.rounds)),
            empty="No round has begun yet.",
            numeric=frozenset({3, 4, 5, 6, 7, 8, 9}),
        ),
        charts=(
            Chart(how_long, line_chart(how_long, [Line("open", seconds), Line("merge", merging)],
                                       number, Axis("time", "s"))),
            Chart(how_wrong, line_chart(how_wrong, [Line("", errors)], number,
                                        Axis("relative error")),
                  "Distance of the merged change from the weighted mean of the devices' products, "
                  "in units of the latter."),
        ),
    )  # fmt: skip


def _round_row(facts: Facts, r: RoundRecord) -> tuple[Cell, ...]:
    given = [a for a in facts.given if a.assignment.round == r.round]
    failed = sum(a.state == "failed" for a in given)
    return (
        Cell(f"{r.round}", f"/rounds/{r.round}"),
        Cell(r.phase, note="evaluation" if r.evaluate_only else ""),
        Cell(words.moment(r.opened_at)),
        Cell(words.duration(None if r.closed_at is None else r.closed_at - r.opened_at)),
        Cell(f"{sum(a.merged_in is not None for a in given)} of {len(given)}"
             if not r.evaluate_only else words.UNKNOWN),
        Cell(str(len(r.detail.get("late", [])))),
        Cell(str(failed), level="bad" if failed else ""),
        Cell(words.size(sum(a.update_bytes or 0 for a in given))),
        Cell(words.duration(r.detail.get("merge_s"))),
        Cell(words.relative(r.detail.get("aggregation_error"))),
    )  # fmt: skip


def round_view(facts: Facts, number: int) -> RoundView | None:
    """The page `/rounds/N`; None for a round that has not begun."""
    r = next((r for r in facts.rounds if r.round == number), None)
    if r is None:
        return None
    rows = [row for row in facts.rows if row.round == number]
    known = {r.round for r in facts.rounds}
    length_s = None if r.closed_at is None else r.closed_at - r.opened_at
    return RoundView(
        number=number,
        kind="evaluation" if r.evaluate_only else "training",
        figures=(
            Figure("Phase", r.phase, f"opened {words.moment(r.opened_at)}"),
            Figure("Length", words.duration(length_s),
                   f"{words.duration(r.deadline_at - r.opened_at)} allowed"),
            Figure("Merged", f"{sum(row.merged for row in rows)} of {len(rows)}", "updates"),
            Figure("Merge", words.duration(r.detail.get("merge_s"))),
            Figure("Aggregation error", words.relative(r.detail.get("aggregation_error")),
                   "" if r.detail.get("aggregation_error") is None else "relative"),
        ),
        devices=Table(
            caption="Devices in this round",
            columns=("Device", "k", "Outcome", "Sent", "Fetch", "Train", "Push", "Weight",
                     "Share", "Loss received", "Loss trained"),
            rows=tuple(
                (
                    Cell(row.device_id, words.device_link(row.device_id)),
                    Cell(f"{row.rank} of {row.global_rank}"),
                    outcome_cell(facts, row),
                    Cell(words.size(row.up_bytes) if row.up_bytes else words.UNKNOWN),
                    Cell(words.duration(row.fetch_s)),
                    Cell(words.duration(row.train_s)),
                    Cell(words.duration(row.push_s)),
                    Cell(words.UNKNOWN if row.weight is None else f"{row.weight:,.3g}"),
                    Cell(words.percent(row.update_share, 1)),
                    Cell(words.decimal(row.loss_received)),
                    Cell(words.decimal(row.loss_trained)),
                )
                for row in rows
            ),
            empty="No device was given work in this round.",
            numeric=frozenset({1, 3, 4, 5, 6, 7, 8, 9, 10}),
        ),
        charts=(*_coverage(r), phase_chart(rows)),
        layers=_layers(r.detail.get("aggregation_errors") or {}),
        before=number - 1 if number - 1 in known else None,
        after=number + 1 if number + 1 in known else None,
    )  # fmt: skip


def _coverage(r: RoundRecord) -> tuple[Chart, ...]:
    coverage = [float(c) for c in r.detail.get("coverage") or ()]
    if not coverage:
        return ()
    title = "Devices that trained each component"
    cold = sum(c == 0 for c in coverage)
    note = (
        f"{cold} of {len(coverage)} components were trained by nobody."
        if cold
        else f"Each of the {len(coverage)} components was trained by somebody."
    )
    dots = [Dot(float(component), devices) for component, devices in enumerate(coverage)]
    by_nobody = [d for d in dots if d.y == 0]
    drawn = scatter_chart(
        title, [Group("trained", [d for d in dots if d.y]), Group("by nobody", by_nobody)],
        Axis("component", whole=True), Axis("devices, mean over layers"), note,
    )  # fmt: skip
    return (Chart(title, drawn, note),)


def _layers(errors: Mapping[str, float]) -> Table:
    worst = sorted(errors.items(), key=lambda pair: -pair[1])[:10]
    return Table(
        caption="Layers with the largest aggregation error",
        columns=("Layer", "Relative error"),
        rows=tuple((Cell(name), Cell(words.relative(error))) for name, error in worst),
        empty="No aggregation error is known of this round.",
        numeric=frozenset({1}),
    )
