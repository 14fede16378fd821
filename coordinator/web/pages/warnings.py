"""What someone should look at now."""

from __future__ import annotations

from typing import get_args

from coordinator.alerts import Kind
from coordinator.web import words
from coordinator.web.facts import Facts
from coordinator.web.pages.parts import Notice

OVERDUE = "round_overdue"
ALERT_KINDS: tuple[str, ...] = (*get_args(Kind), OVERDUE)


def notices(facts: Facts) -> tuple[Notice, ...]:
    """Alerts of the run, the most pressing first."""
    found = []
    if (late_s := overdue_s(facts)) is not None:
        found.append(Notice(
            f"round {_number(facts)} is {words.duration(late_s)} past its deadline and still "
            "waits for a quorum", "bad", "/rounds",
        ))  # fmt: skip
    for alert in facts.alerts:
        device = alert.kind in ("device_falling_behind", "device_worse_than_alone")
        found.append(Notice(
            alert.message, "bad" if alert.severity == "critical" else "warn",
            words.device_link(alert.subject) if device else "/fairness",
        ))  # fmt: skip
    return tuple(found)


def counts(facts: Facts) -> dict[str, int]:
    """How many alerts of each kind stand."""
    found = dict.fromkeys(ALERT_KINDS, 0)
    for alert in facts.alerts:
        found[alert.kind] += 1
    found[OVERDUE] = int(overdue_s(facts) is not None)
    return found


def overdue_s(facts: Facts) -> float | None:
    """How far the open round is past its deadline; None if it is not."""
    if facts.live is None or facts.live.state.phase != "open":
        return None
    late_s = facts.at - facts.live.state.deadline_at_s
    return late_s if late_s > 0 else None


def _number(facts: Facts) -> int:
    assert facts.live is not None
    return facts.live.state.round
