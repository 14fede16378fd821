"""The agent as a service: told to stop by a signal, watched by whoever started it.

Knows the service manager and signals; what the agent does is the agent's business.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from edge_agent.agent import Agent
from edge_agent.config import AgentConfig
from edge_agent.link import LONGEST_AWAY_S
from edge_agent.status import BEAT_S
from profiles.service_manager import Progress, ServiceManager

# A coordinator may ask to be left alone for LONGEST_AWAY_S, which a call doubles before it retries.
LONGEST_SILENCE_S = 3 * LONGEST_AWAY_S
UNTIMED = frozenset(("starting", "measuring"))  # reading data, fetching a base, timing steps


async def run(config: AgentConfig) -> None:
    """Works until the run is finished, or SIGTERM or Ctrl-C comes. Raises `SketchfleetError`."""
    manager = ServiceManager()
    agent = Agent(config)
    # In a round the sign comes from what watches it and from heartbeats: a step may take long.
    gets_on = Progress(lambda: (agent.status.told, agent.link.moved_bytes), LONGEST_SILENCE_S)

    def is_alive() -> bool:
        return agent.status.phase in UNTIMED or gets_on()

    work = asyncio.ensure_future(agent.run())
    _end_when_told(work)
    manager.ready("starting")
    signs = (
        asyncio.create_task(manager.keep_alive(is_alive, lambda: agent.status.line)),
        asyncio.create_task(_beat(agent, is_alive)),
    )
    try:
        await work
    except asyncio.CancelledError:
        manager.stopping("stopped")
        agent.status("stopped")
    finally:
        for sign in signs:
            sign.cancel()


def _end_when_told(work: asyncio.Future[None]) -> None:
    """Cancels it at the first SIGTERM or SIGINT; a second one ends the process at once."""
    loop, numbers = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)

    def told() -> None:
        work.cancel()
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, told)


async def _beat(agent: Agent, is_alive: Callable[[], bool]) -> None:
    """Keeps the status file fresh, for who cannot be told as systemd is: a container's check."""
    while True:
        if is_alive():
            agent.status.beat()
        await asyncio.sleep(BEAT_S)
