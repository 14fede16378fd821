"""A planned fleet in words: tables for a terminal, sentences, and plain values for JSON.

Decides nothing; the figures are those of `coordinator.what_if`. Bytes are in powers of ten, as
links and memory caps are; times are seconds.
"""

from __future__ import annotations

from typing import Any

from coordinator.planner import DevicePlan
from coordinator.what_if import GroupPlan, WhatIf
from profiles.boards import Board, load_boards
from profiles.links import load_links
from profiles.models import load_models, parameters
from protos.contract import to_plain

GROUP_COLUMNS = (
    "devices", "k\nbase", "steps of\ntokens", "fetch\ns", "train", "eval", "send", "memory\nof GB",
    "MB down\nup",
)  # fmt: skip
DAY_COLUMNS = ("devices", "each a day\ndown", "\nup", "in all a day\ndown", "\nup")
BUDGET_COLUMNS = (
    "devices", "update of\nkB at most", "\nexpected", "encoding", "values\nkept", "expected\nerror"
)  # fmt: skip
BOARD_COLUMNS = ("board", "", "memory", "GB/s", "TFLOPS fp16", "power modes")
LINK_COLUMNS = ("link", "", "Mbit/s\nup", "\ndown", "round trip", "varies by", "loss", "metered")
MODEL_COLUMNS = ("model", "on the hub", "parameters")


def group_table(found: WhatIf) -> list[list[str]]:
    """One row a group that takes part, columns as `GROUP_COLUMNS`."""
    return [
        [
            f"{_heading(g)}\n{_kind(g)}",
            f"{_k(g, found.rank)}\n{plan.precision}",
            f"{_range([p.local_steps for p in g.plans])} of\n{_step(plan)}",
            *map(_s, _phases(plan)),
            f"{_gb(plan.predicted_peak_bytes)}\nof {_gb(g.budget_bytes)}",
            f"{_mb(plan.predicted.down_bytes)}\n{_mb(plan.predicted.up_bytes)}",
        ]
        for g in found.groups
        if (plan := g.plan) is not None
    ]


def day_table(found: WhatIf) -> list[list[str]]:
    """What moves in a day, columns as `DAY_COLUMNS`."""
    rows = [
        [
            _heading(g),
            _amount(g.a_day.down_bytes),
            _amount(g.a_day.up_bytes),
            _amount(g.a_day.down_bytes * len(g.plans)),
            _amount(g.a_day.up_bytes * len(g.plans)),
        ]
        for g in found.groups
        if g.plans
    ]
    whole = found.a_day
    return [*rows, ["the fleet", "", "", _amount(whole.down_bytes), _amount(whole.up_bytes)]]


def headline(found: WhatIf) -> str:
    """What was planned, in a sentence."""
    everybody = sum(g.group.count for g in found.groups)
    return (
        f"{found.model}, {_count(parameters(found.shape))} parameters, {found.method}, rank "
        f"{found.rank}: {found.devices} of {everybody} devices take part. Predicted from "
        "catalogue figures; nothing was measured."
    )


def round_lines(found: WhatIf) -> list[str]:
    """How long rounds are and how many a day has, in sentences."""
    if not found.devices:
        return []
    slowest = max((p for g in found.groups for p in g.plans), key=lambda p: p.predicted.total_s)
    lines = [
        f"A round takes {_s(found.busy_s)} s of the {_s(found.round_s)} s planned; the slowest is "
        f"{slowest.device_id}. Each row of the rank is trained by {found.coverage:.3g} devices."
    ]
    if found.measuring_s is not None:
        lines.append(
            f"Every {_ordinal(found.every_rounds)} round also measures the whole adapter and takes "
            f"{_s(found.measuring_s)} s."
        )
    return [*lines, f"One after another, that makes {found.rounds_a_day:,.0f} rounds a day."]


def allowance_lines(found: WhatIf) -> list[str]:
    """Groups that would move more in a day than their owners let them."""
    lines = []
    for g in found.groups:
        link = g.group.profile.link
        moved = g.a_day.up_bytes + g.a_day.down_bytes
        if link is not None and link.budget_bytes is not None and moved > link.budget_bytes:
            lines.append(
                f"{_heading(g)}: {_amount(moved)} a day each, more than the "
                f"{_amount(link.budget_bytes)} that the owner allows; plan fewer or longer rounds"
            )
    return lines


def budget_table(found: WhatIf) -> list[list[str]]:
    """What byte budgets make of updates, columns as `BUDGET_COLUMNS`; empty without any."""
    rows = []
    for g in found.groups:
        plan = g.plan
        if plan is None or plan.budget is None or plan.update is None:
            continue
        update = plan.update
        rows.append([
            _heading(g),
            f"{plan.budget.size_bytes / 1e3:,.1f}",
            f"{plan.predicted.up_bytes / 1e3:,.1f}",
            f"{update.encoding}/{update.group}" if update.group else update.encoding,
            f"{update.density:.2g}",
            f"{plan.expected_error:.2f}",
        ])  # fmt: skip
    return rows


def reason_lines(found: WhatIf) -> list[str]:
    """What binds each group, in the planner's words."""
    return [f"{_heading(g)}: {g.plan.reason}" for g in found.groups if g.plan is not None]


def left_out_lines(found: WhatIf) -> list[str]:
    """Who does not take part, and why."""
    return [
        f"{g.missing} of {g.group.count} {g.group.name}: {why}"
        for g in found.groups
        for why in g.left_out
    ]


def plain(found: WhatIf) -> dict[str, Any]:
    """JSON values, units in the names."""
    return {
        "model": found.model,
        "parameters": parameters(found.shape),
        "method": found.method,
        "rank": found.rank,
        "devices": found.devices,
        "coverage": found.coverage,
        "round_s": found.round_s,
        "busy_s": found.busy_s,
        "measuring_s": found.measuring_s,
        "measuring_every_rounds": found.every_rounds,
        "rounds_a_day": found.rounds_a_day,
        "up_bytes_a_day": found.a_day.up_bytes,
        "down_bytes_a_day": found.a_day.down_bytes,
        "groups": [
            {
                "name": g.group.name,
                "count": g.group.count,
                "board": g.group.board.name,
                "link": g.group.link.name,
                "takes_part": len(g.plans),
                "left_out": list(g.left_out),
                "unfit": g.is_unfit,
                "memory_budget_bytes": g.budget_bytes,
                "up_bytes_a_day_each": g.a_day.up_bytes,
                "down_bytes_a_day_each": g.a_day.down_bytes,
                "plans": [to_plain(p) for p in g.plans],
            }
            for g in found.groups
        ],
    }


# --- the catalogues -----------------------------------------------------------------------------


def board_table() -> list[list[str]]:
    """Known boards, columns as `BOARD_COLUMNS`."""
    return [
        [
            board.name,
            board.title,
            f"{board.memory.label_gib:g} GB{' shared' if board.kind == 'jetson' else ''}",
            f"{board.memory.bandwidth_gb_per_s:g}",
            _tflops(board),
            ", ".join(mode.name for mode in board.power_modes),
        ]
        for board in load_boards().values()
    ]


def link_table() -> list[list[str]]:
    """Known links, columns as `LINK_COLUMNS`."""
    return [
        [
            link.name,
            link.title,
            f"{link.up_bps / 1e6:g}",
            f"{link.down_bps / 1e6:g}",
            f"{link.rtt_s * 1e3:g} ms",
            f"{link.variation:.0%}",
            f"{link.loss:.1%}",
            "yes" if link.metered else "no",
        ]
        for link in load_links().values()
    ]


def model_table() -> list[list[str]]:
    """Known models, columns as `MODEL_COLUMNS`."""
    return [
        [model.name, model.hub_id, _count(parameters(model.shape))]
        for model in load_models().values()
    ]


def _tflops(board: Board) -> str:
    if board.no_trainer:
        return "cannot train"
    return f"{board.gpu.dense_fp16_tflops:g}" if board.gpu else "no GPU"


# --- words --------------------------------------------------------------------------------------


def _heading(group: GroupPlan) -> str:
    some = f"{len(group.plans)} of " if group.missing else ""
    return f"{some}{group.group.count} {group.group.name}"


def _kind(group: GroupPlan) -> str:
    board, link = group.group.board.name, group.group.link.name
    return link if group.group.name == board else f"{board}\n{link}"


def _k(group: GroupPlan, rank: int) -> str:
    density = {p.density for p in group.plans}
    share = "" if density == {1.0} else f"\nat {min(density):.3g}"
    return f"{_range([p.rank for p in group.plans])}/{rank}{share}"


def _step(plan: DevicePlan) -> str:
    times = f"x{plan.accumulation}" if plan.accumulation > 1 else ""
    kept = "\ncheckpoint" if plan.checkpointing else ""
    return f"{plan.micro_batch}{times}x{plan.sequence_tokens}{kept}"


def _phases(plan: DevicePlan) -> tuple[float, float, float, float]:
    cost = plan.predicted
    return cost.fetch_s, cost.train_s, cost.evaluate_s, cost.push_s


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ending}"


def _s(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}"


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f}"


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.3g}"


def _amount(size_bytes: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.3g} {name}"
    return f"{size_bytes / 1e6:.3g} MB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.0f} M"
