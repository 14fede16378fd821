"""Everything that training on this device needs, looked at in one go.

Runs the checks of `checks/` in the order in which their failures stop a device, and nothing else:
what a check finds and how it is mended is the check's own.
"""

from __future__ import annotations

import os
import time

from edge_agent.checks import fleet, machine, trainer
from edge_agent.checks.finding import Finding
from edge_agent.config import AgentConfig
from edge_agent.machine import Machine
from edge_agent.probe import find_machine
from edge_agent.training.connectors import require_usable


def examine(
    config: AgentConfig, base: str | None = None, here: Machine | None = None
) -> list[Finding]:
    """The findings, most basic first. Takes as long as importing torch does."""
    here = here or Machine()
    facts = find_machine(here)
    state = config.state.folder
    cap = config.limits.memory_mb
    model, base_bytes = fleet.base_model(
        base or config.model.base, fleet.last_digest(state), facts.gpu is not None
    )
    credential, kept = fleet.credential(config, time.time())
    return [
        *machine.examine(here, facts, state, None if cap is None else cap * 10**6, base_bytes),
        *trainer.judge(trainer.ask(config.trainer.python), facts, os.environ, groups()),
        fleet.state_folder(state),
        credential,
        *fleet.coordinator(config.coordinator.address, kept),
        model,
        fleet.local_code(lambda: require_usable(config.selection)),
    ]


def groups() -> list[str]:
    """The names of this user's groups; "root" when it is root."""
    import grp

    names = ["root"] if os.geteuid() == 0 else []
    for number in {os.getegid(), *os.getgroups()}:
        try:
            names.append(grp.getgrgid(number).gr_name)
        except KeyError:  # a group that only the container's outside knows
            continue
    return names
