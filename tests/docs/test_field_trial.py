"""The field trial's page can be followed by the program that follows it."""

from __future__ import annotations

import re
import tomllib

import pytest

from coordinator.config import RunConfig
from edge_agent.config import AgentConfig
from tools import field_trial
from tools.page_commands import steps
from trials.machines import unavailable

PLACES = {field_trial.DESK, field_trial.EVERY, field_trial.HUB, *field_trial.DEVICES}


def test_every_step_is_one_that_the_program_can_take():
    found = steps(field_trial.PAGE)
    lost = [s.where for s in found if s.kind == "commands" and s.where not in PLACES]
    lost += [s.where for s in found if s.kind == "file" and s.where.partition(":")[0] not in PLACES]
    lost += [s.text for s in found if s.kind == "action"
             and not any(re.fullmatch(p, s.text) for p in field_trial.ACTIONS)]  # fmt: skip
    assert not lost
    assert {s.where for s in found if s.kind == "commands"} == PLACES


def test_the_files_of_the_page_are_settings_that_are_accepted():
    files = {
        s.where.rpartition(":")[2]: s.text for s in steps(field_trial.PAGE) if s.kind == "file"
    }
    RunConfig.model_validate(tomllib.loads(files["/etc/sketchfleet/run.toml"]))
    AgentConfig.model_validate(tomllib.loads(files["device.toml"]))


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(2400)
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_the_page_leads_where_it_says(tmp_path):
    assert field_trial.main(["--out", str(tmp_path / "trial")]) == 0
