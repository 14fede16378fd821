"""Everything that training on this device needs, looked at in one go.

Runs the checks of `checks/` in the order in which their failures stop a device, and nothing else:
what a check finds and how it is mended is the check's own.
"""

from __future__ import annotations

import os
import time

from edge_agent.access import address_of, has_joined, open_link
from edge_agent.checks import fleet, identity, machine, trainer
from edge_agent.checks.finding import Finding, fail
from edge_agent.config import AgentConfig
from edge_agent.machine import Machine
from edge_agent.probe import find_machine
from edge_agent.training.connectors import require_usable
from profiles.errors import SketchfleetError


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
    now = time.time()
    if config.coordinator.plain_text:
        shown = fleet.credential(config, now)[0]
    else:
        shown = identity.certificate(config, now)
    return [
        *machine.examine(here, facts, state, None if cap is None else cap * 10**6, base_bytes),
        *trainer.judge(trainer.ask(config.trainer.python), facts, os.environ, groups()),
        fleet.state_folder(state),
        shown,
        *_coordinator(config),
        model,
        fleet.local_code(lambda: require_usable(config.selection)),
    ]


def _coordinator(config: AgentConfig) -> list[Finding]:
    """Asked only where the device knows how to reach it."""
    if not config.coordinator.plain_text and not has_joined(config):
        return []
    try:
        address = address_of(config)
        return fleet.coordinator(address, lambda: open_link(config), has_joined(config))
    except SketchfleetError as error:
        return [fail("coordinator", str(error), "mend what it names")]


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
