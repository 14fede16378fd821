"""The attack table as a command: plays what is missing, prints and writes the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from coordinator.document import Bullets, Code, Document, Section, Table, Words, markdown
from coordinator.tables import table
from trials.attacks import (
    FULL,
    PROMISED,
    QUICK,
    RECOMMENDED,
    RECOMMENDED_RULE,
    Cell,
    Plan,
    Played,
    Range,
    costs,
    play_all,
)
from trials.hostile import ABOUT
from trials.results import versions

PROMISE = 0.03  # of loss, that 20 % hostile devices cost at most under the recommended setting


def attacks(out: Path, quick: bool) -> int:
    """Plays or continues the table; returns the exit code: 1 where the promise is not kept."""
    import torch

    torch.set_num_threads(1)
    plan, console = (QUICK if quick else FULL), Console(highlight=False, soft_wrap=True)
    field = Range(plan, out / "scratch")
    played = play_all(plan, out, field.play, lambda line: console.print(line, markup=False))
    made = document(plan, played, quick)
    for section in made.sections:
        for part in section.parts:
            if isinstance(part, Table):
                console.print(table(part.columns, part.rows, part.caption))
    (out / "report.md").write_text(markdown(made))
    found = [
        {"rule": c.rule, "attack": c.attack, "hostile": c.hostile, "cost": cost, "gain_lost": lost,
         "kept_out": played[c.key].kept_out, "sent": played[c.key].sent,
         "wronged": played[c.key].wronged, "honest": played[c.key].honest}
        for c, cost, lost in costs(plan, played)
    ]  # fmt: skip
    plain = {"setting": plan.setting(), "cells": found}
    (out / "report.json").write_text(json.dumps(plain, indent=1))
    picture(plan, played, out / "attacks.png")
    worst = worst_of(plan, played)
    console.print(
        f"20 % hostile devices cost at most {100 * worst:.1f} % of loss under the recommended "
        f"setting; {out / 'report.md'}, report.json and attacks.png are written", markup=False,
    )  # fmt: skip
    return 0 if worst <= PROMISE else 1


def worst_of(plan: Plan, played: Mapping[str, Played]) -> float:
    """The highest cost of two in ten hostile devices under the recommended setting."""
    return max(
        cost
        for c, cost, _ in costs(plan, played)
        if c.rule == RECOMMENDED and c.hostile == PROMISED
    )


def document(plan: Plan, played: Mapping[str, Played], quick: bool) -> Document:
    """The report."""
    of = {c: (cost, lost) for c, cost, lost in costs(plan, played)}
    clean = played[Cell("none").key]
    gain = sum(clean.before.values()) / sum(clean.losses.values()) - 1
    tables = []
    for count in plan.hostile:
        rows = [
            (a, *(_signed(of[Cell(rule, a, count)][0]) for rule in plan.rules))
            for a in plan.attacks
        ]
        tables.append(Table(
            f"{10 * count} % of the devices hostile: mean final loss of the honest ones on their "
            "own held-out code, against the clean run without a rule, in percent.",
            ("attack", *plan.rules), tuple(rows), wide=True,
        ))  # fmt: skip
    none = tuple(_signed(of[Cell(rule)][0]) for rule in plan.rules)
    tables.append(Table("No device hostile: what each rule costs by itself, in percent of loss.",
                        ("", *plan.rules), (("clean", *none),), wide=True))  # fmt: skip
    with_rule = [c for c in plan.cells if c.rule == RECOMMENDED]
    wronged = sum(played[c.key].wronged for c in with_rule)
    honest = sum(played[c.key].honest for c in with_rule)
    kept = tuple(
        (a, *(f"{played[Cell(RECOMMENDED, a, n).key].kept_out} of "
              f"{played[Cell(RECOMMENDED, a, n).key].sent}" for n in plan.hostile))
        for a in plan.attacks
    )  # fmt: skip
    heads = ("attack", *(f"{10 * n} %" for n in plan.hostile))
    seconds = sum(p.seconds for p in played.values())
    command = f"sketchfleet-trial attacks --out attacks{' --quick' if quick else ''}"
    on = ", ".join(f"{key} {value}" for key, value in versions().items())
    about = (
        "Ten devices with one kind of code each, FSLoRA of rank 8 (four devices hold all rows, six "
        f"hold half), {plan.rounds} rounds of {plan.local_steps} steps. The clean run takes the "
        f"fleet's loss from {_mean(clean.before):.3f} to {_mean(clean.losses):.3f} nats a token: "
        f'to learn nothing at all would cost {_signed(gain)} %. "{RECOMMENDED}" is screening '
        f'with robust = "{RECOMMENDED_RULE}"; the other columns are merged without screening, '
        "after the checks on arrival."
    )
    screened = Table(
        "Updates of hostile devices that did not enter the merge, by share of hostile devices.",
        heads, kept,
    )  # fmt: skip
    return Document("Hostile devices and robust merges", about, (
        Section("The attacks", (
            Bullets(tuple(f"{name}: {ABOUT[name]}." for name in plan.attacks)),
        )),
        Section("What they cost", tuple(tables)),
        Section("What screening did", (
            screened,
            Words(f"Of {honest} updates of honest devices in these runs, {wronged} were kept out."),
        )),
        Section("How", (Code("The command", command),
                        Words(f"On {on}; {seconds:.0f} s of processor time in all."))),
    ))  # fmt: skip


def picture(plan: Plan, played: Mapping[str, Played], path: Path) -> None:
    """Cost by rule, a panel for each share of hostile devices."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    of = {c: 100 * cost for c, cost, _ in costs(plan, played)}
    figure, panels = plt.subplots(
        1, len(plan.hostile), figsize=(4.2 * len(plan.hostile) + 1, 4.6), sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    places = range(len(plan.rules))
    for axes, count in zip(panels[0], plan.hostile, strict=True):
        for number, attack in enumerate(plan.attacks):
            ys = [of[Cell(rule, attack, count)] for rule in plan.rules]
            axes.plot(ys, places, "o", color=f"C{number}", alpha=0.75, label=attack)
        axes.axvline(100 * PROMISE, color="0.4", ls=":")
        axes.set_xscale("symlog", linthresh=3)
        axes.set_title(f"{10 * count} % hostile")
        axes.set_xlabel("final loss against clean, %")
        axes.set_yticks(list(places), plan.rules)
        axes.grid(axis="x", alpha=0.25)
    panels[0][-1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _mean(of: Mapping[str, float]) -> float:
    return sum(of.values()) / len(of)
