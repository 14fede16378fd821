"""What is planned for known models on known boards changes only when somebody means it to."""

from __future__ import annotations

import pytest

from profiles.models import load_models
from tests.golden.update_plans import PLANS, plan_text


def test_every_known_model_has_its_golden_plan_and_nothing_else_has() -> None:
    assert {path.stem for path in PLANS.glob("*.txt")} == set(load_models())


@pytest.mark.parametrize("model", load_models())
def test_plans_are_as_a_person_last_read_them(model: str) -> None:
    kept = (PLANS / f"{model}.txt").read_text()
    assert plan_text(model) == kept, (
        "the plans changed: run `python -m tests.golden.update_plans`, read the difference line "
        "by line, and keep it if every line is plausible"
    )
