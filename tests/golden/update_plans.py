"""Golden plans: what each known model would be on each known board, alone, as text.

`python -m tests.golden.update_plans` writes them anew; read the difference line by line before it
is kept: these files are the one place where a person sees what a change of the cost model or the
planner means. Nothing in them was measured.
"""

from __future__ import annotations

from pathlib import Path

from coordinator.config import RunConfig
from coordinator.what_if import GroupPlan, what_if
from coordinator.what_if_fleet import parse_fleet
from profiles.boards import load_boards
from profiles.models import load_models, parameters

PLANS = Path(__file__).parent / "plans"
LINK = "home-dsl"
TRAINING = {"precision": "auto", "sequence_tokens": 512, "micro_batch": 4, "local_steps": 20}
COLUMNS = (
    "board", "k", "base", "a step", "ckpt", "steps", "fetch", "train", "eval", "send", "s",
    "GB", "of",
)  # fmt: skip


def plan_text(model: str) -> str:
    """The golden file of a model."""
    shape = load_models()[model].shape
    config = RunConfig.model_validate(
        {"run": {"name": "golden"}, "model": {"base": model}, "training": TRAINING,
         "adapter": {"rank": 32}, "round": {"max_round_s": 3600}}
    )  # fmt: skip
    lines = [
        f"# {model}, {parameters(shape) / 1e6:,.1f} M parameters. Each board alone on {LINK}, idle "
        "and unmeasured:",
        "# rank 32, 20 steps of 4 x 512 tokens, precision auto, rounds of at most 3600 s.",
        "# Seconds of an ordinary round by phase and in all; peak memory of the budget, GB.",
    ]
    rows: list[tuple[str, ...]] = [COLUMNS]
    reasons = []
    for board in load_boards():
        (found,) = what_if(model, shape, config, parse_fleet(f"1 {board} on {LINK}")).groups
        if found.plan is None:
            reasons.append(f"-- {found.left_out[0]}")
        else:
            rows.append(_row(found))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    table = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join([*lines, "", *table, "", *reasons]).rstrip() + "\n"


def _row(found: GroupPlan) -> tuple[str, ...]:
    plan = found.plan
    assert plan is not None
    cost = plan.predicted
    seconds = (cost.fetch_s, cost.train_s, cost.evaluate_s, cost.push_s, cost.total_s)
    times = f"x{plan.accumulation}" if plan.accumulation > 1 else ""
    return (
        found.group.board.name,
        str(plan.rank),
        plan.precision,
        f"{plan.micro_batch}{times}x{plan.sequence_tokens}",
        "yes" if plan.checkpointing else "no",
        str(plan.local_steps),
        *(f"{s:.0f}" if s >= 10 else f"{s:.1f}" for s in seconds),
        f"{plan.predicted_peak_bytes / 1e9:.1f}",
        f"{found.budget_bytes / 1e9:.1f}",
    )


def main() -> None:
    PLANS.mkdir(exist_ok=True)
    for old in PLANS.glob("*.txt"):
        old.unlink()
    for model in load_models():
        (PLANS / f"{model}.txt").write_text(plan_text(model))


if __name__ == "__main__":
    main()
