"""The picture of a planned fleet: per group the time of a round, and memory against its budget.

Needs matplotlib, of the extra `trial`; nothing else in the coordinator does.
"""

from __future__ import annotations

from pathlib import Path

from coordinator.what_if import GroupPlan, WhatIf
from profiles.errors import MissingExtraError, SketchfleetError
from profiles.models import parameters

PHASES = ("fetch", "train", "evaluate", "send")
COLOURS = ("#56b4e9", "#0072b2", "#009e73", "#e69f00")  # told apart by most colour-blind readers
PALE, DARK, RED = "0.9", "0.35", "#c0392b"
GIGABYTE = 1e9


class PictureError(SketchfleetError):
    """A picture that cannot be written."""


def plan_picture(found: WhatIf, path: Path) -> Path:
    """Draws it as PNG, or what the suffix of `path` says.

    Raises `MissingExtraError` without matplotlib, `PictureError` when it cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "trial") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    groups = found.groups
    places = range(len(groups))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 1.9 + 0.62 * len(groups)), layout="constrained", sharey=True,
        width_ratios=(3, 2),
    )  # fmt: skip
    longest = max(found.round_s, found.busy_s)
    beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": "small"}
    for place, group in zip(places, groups, strict=True):
        budget = group.budget_bytes / GIGABYTE
        left.barh(place, longest, color=PALE, height=0.62)
        right.barh(place, budget, color=PALE, height=0.62)
        right.plot([budget, budget], [place - 0.31, place + 0.31], color=DARK, lw=1.5)
        plan = group.plan
        if plan is None:
            left.annotate(_why_not(group), (0, place), color=RED, **beside)
            right.annotate(f"{budget:.1f} GB", (budget, place), color=RED, **beside)
            continue
        cost, start = plan.predicted, 0.0
        seconds = (cost.fetch_s, cost.train_s, cost.evaluate_s, cost.push_s)
        for length, colour in zip(seconds, COLOURS, strict=True):
            left.barh(place, length, left=start, color=colour, height=0.62)
            start += length
        share = "" if plan.density == 1 else f" at {plan.density:.3g}"
        left.annotate(f"{start:,.0f} s, k={plan.rank}{share}", (longest, place), **beside)
        peak = plan.predicted_peak_bytes / GIGABYTE
        right.barh(place, peak, color=COLOURS[1], height=0.38)
        text = f"{peak:.1f} of {budget:.1f} GB, {plan.precision}"
        right.annotate(text, (budget, place), **beside)
    left.axvline(found.round_s, color=DARK, ls=":", lw=1.2)
    left.set_yticks(list(places), [
        f"{_number(g)} x {g.group.board.name}\n"
        + (f"{g.group.name}, " if g.group.name != g.group.board.name else "")
        + g.group.link.name
        for g in groups
    ])  # fmt: skip
    left.invert_yaxis()
    left.set_xlim(0, 1.2 * longest)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    left.set_xlabel(f"seconds of a round; dotted: its planned length, {found.round_s:,.0f} s")
    handles = [Patch(color=colour) for colour in COLOURS]
    left.legend(handles, PHASES, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4,
                frameon=False, fontsize="small")  # fmt: skip
    right.set_xlim(0, 1.45 * max(g.budget_bytes for g in groups) / GIGABYTE)
    right.set_xlabel("peak memory of the trainer in its budget, GB")
    for axes in (left, right):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.suptitle(
        f"{found.model} ({parameters(found.shape) / 1e9:.2f} B), rank {found.rank}, "
        f"{found.method}: {found.devices} devices, {found.rounds_a_day:,.0f} rounds a day "
        "(predicted from catalogue figures)",
        fontsize="medium",
    )
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:  # no such folder; no such format
        raise PictureError(f"the picture {path} cannot be written: {error}") from error
    finally:
        plt.close(figure)
    return path


def _number(group: GroupPlan) -> str:
    count = group.group.count
    return f"{len(group.plans)} of {count}" if group.plans and group.missing else f"{count}"


def _why_not(group: GroupPlan) -> str:
    if group.group.board.no_trainer:
        return "cannot train"
    return "does not fit in memory" if group.is_unfit else "too slow for the round"
