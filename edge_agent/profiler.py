"""What this device tells the coordinator of itself: probed, measured, and learned on the way.

Compute is measured when the coordinator asks; the link is measured once and then learned from real
transfers, until the device is on another network. What was learned outlives the process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from edge_agent.bases import Bases
from edge_agent.config import AgentConfig
from edge_agent.link import Link, LinkError
from edge_agent.link_estimate import LinkEstimate, Transfer, differs
from edge_agent.machine import Machine
from edge_agent.membership import Membership
from edge_agent.network import DailyBudget, default_route, is_metered
from edge_agent.probe import find_machine, probe
from edge_agent.trainer_process import TrainerError, TrainerProcess
from profiles.device import ComputeProfile, DeviceProfile, GpuProfile
from profiles.errors import SketchfleetError
from profiles.link import LinkProfile
from protos.contract import (
    AdapterSpec,
    ContractError,
    ProfileRequest,
    from_plain,
    to_plain,
)
from protos.transfer import write_durably

log = logging.getLogger("sketchfleet.agent")

RETRY_S = 5.0
SCARCE_BYTES = 100 * 10**6  # with less left of a day, the link is measured as if it were metered
KEPT = "profile.json"


class UnfitError(SketchfleetError):
    """The run's base cannot be trained here."""


class Profiler:
    """Keeps the profile and knows when the coordinator should hear of it."""

    def __init__(
        self, config: AgentConfig, version: str, link: Link, fleet: Membership, bases: Bases,
        machine: Machine, budget: DailyBudget,
    ) -> None:  # fmt: skip
        self._config, self._version = config, version
        self._link, self._fleet, self._bases = link, fleet, bases
        self._machine, self._budget = machine, budget
        self._facts = find_machine(machine)
        self._path = config.state.folder / KEPT
        self._route = default_route(machine)
        self._metered: bool | None = None
        self._measured, self._estimate = self._recalled()
        self._profile: DeviceProfile | None = None
        self._told: LinkProfile | None = None if self._measured is None else self._measured.link
        self.is_due = True  # whether the next poll should carry the profile
        link.on_transfer = self.learn

    @property
    def memory_cap_bytes(self) -> int | None:
        """What the owner allows the trainer."""
        megabytes = self._config.limits.memory_mb
        return None if megabytes is None else megabytes * 10**6

    @property
    def profile(self) -> DeviceProfile:
        """To be sent: facts of now, and what was measured in this life."""
        if self._profile is None:
            self._profile = self.known()
        return self._profile

    def known(self) -> DeviceProfile:
        """What can be told without measuring."""
        found = probe(
            version=self._version, state=self._config.state.folder,
            board=self._config.device.board, memory_cap_bytes=self.memory_cap_bytes,
            machine=self._machine, facts=self._facts,
        )  # fmt: skip
        left = found.memory_available_bytes - self._config.policy.leave_memory_mb * 10**6
        return dataclasses.replace(found, memory_available_bytes=max(0, left))

    def sent(self) -> None:
        """The coordinator has the profile now."""
        self.is_due = False
        if self._profile is not None and self._profile.link is not None:
            self._told = self._profile.link

    # --- compute --------------------------------------------------------------------------------

    async def measure(
        self, spec: AdapterSpec, request: ProfileRequest, trainer: TrainerProcess
    ) -> None:
        """Measures link and compute for this base. Raises `UnfitError`, `ModelError`."""
        await self.measure_link()
        known = await asyncio.to_thread(self.known)  # before the trainer takes memory of its own
        folder = await self._bases.folder(spec)
        job = profile_job(folder, spec, request, self.memory_cap_bytes)
        try:
            result = await trainer.run(job)
        except TrainerError as error:
            raise UnfitError(f"this device cannot train {spec.base}: {error}") from error
        gpu = result.get("gpu")
        compute = from_plain(ComputeProfile, result["compute"])
        if self._config.personal.ditto > 0:
            # Every step for the fleet is followed by one for the device's own adapter, so towards
            # the run a token takes twice as long; the planner's times are right only with this.
            compute = dataclasses.replace(compute, tokens_per_s=compute.tokens_per_s / 2)
        card = None if gpu is None else from_plain(GpuProfile, gpu)
        self._profile = self._measured = dataclasses.replace(
            known, gpu=card, compute=compute, link=self._link_profile()
        )
        self.is_due = True
        self.keep()
        log.info("profile", extra={"tokens_per_s": round(compute.tokens_per_s)})

    # --- link -----------------------------------------------------------------------------------

    async def measure_link(self) -> None:
        """Measures the link, however long it takes until it is there."""
        self._metered = await asyncio.to_thread(
            is_metered, self._machine, self._config.network.metered
        )
        sparing = self._metered or not self._budget.allows(SCARCE_BYTES)
        while True:
            try:
                link = await self._fleet.call(lambda: self._link.probe(metered=sparing))
            except LinkError as error:
                log.warning("link not measured, trying again: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            break
        self._estimate = LinkEstimate.measured(link)
        log.info("link", extra={"up_bps": round(link.up_bps), "down_bps": round(link.down_bps),
                                "metered": self._metered})  # fmt: skip

    def learn(self, transfer: Transfer) -> None:
        """Takes what a real transfer says of the link."""
        if self._estimate is not None:
            self._estimate = self._estimate.after(transfer)

    async def refresh(self, may_measure: bool = True) -> None:
        """Before a poll: is the device on another network, has the link or the budget changed?

        A link that must be measured anew waits for a time when no work is at hand.
        """
        if self._profile is None:
            self._profile = await asyncio.to_thread(self.known)
        route = default_route(self._machine)
        if route and route != self._route and may_measure:
            log.info("the way out changed; the link is measured anew")
            self._route, self._estimate = route, None
        if self._measured is None:
            return  # the coordinator asks for the first measurement itself
        if self._estimate is None:
            if not may_measure or self._budget.is_used_up:
                return
            await self.measure_link()
        link = self._link_profile()
        if link is None or (
            self._told is not None and not differs(link, self._told, self._budget.daily_bytes)
        ):
            return
        now = await asyncio.to_thread(self.known)
        self._profile = self._measured = dataclasses.replace(
            self._measured, link=link, power=now.power
        )
        self.is_due = True
        self.keep()

    def _link_profile(self) -> LinkProfile | None:
        if self._estimate is None:
            return None
        left = 0 if self._budget.is_used_up else self._budget.left_bytes
        return self._estimate.profile(bool(self._metered), left)

    # --- what outlives the process --------------------------------------------------------------

    def keep(self) -> None:
        """For the next life of the agent."""
        if self._measured is None or self._estimate is None:
            return
        plain = {"route": self._route, "measured": to_plain(self._measured),
                 "estimate": to_plain(self._estimate)}  # fmt: skip
        write_durably(self._path, json.dumps(plain).encode())

    def _recalled(self) -> tuple[DeviceProfile | None, LinkEstimate | None]:
        """What an earlier life measured on this machine, and learned on this network."""
        try:
            plain = json.loads(self._path.read_text())
            measured = from_plain(DeviceProfile, plain["measured"])
            estimate = from_plain(LinkEstimate, plain["estimate"])
            route = str(plain["route"])
        except FileNotFoundError:
            return None, None
        except (OSError, ValueError, KeyError, TypeError, ContractError) as error:
            log.warning("what was measured before is measured again: %s", error)
            return None, None
        now = self.known().completed_by(measured)
        if now.compute is None:  # another machine or another version
            return None, None
        self._metered = None if measured.link is None else measured.link.metered
        return now, estimate if route == self._route else None


def profile_job(
    folder: Path, spec: AdapterSpec, request: ProfileRequest, memory_cap_bytes: int | None
) -> dict[str, Any]:
    """The trainer's job that measures compute."""
    return {
        "job": "profile", "base_folder": str(folder), "spec": to_plain(spec),
        "request": to_plain(request), "memory_cap_bytes": memory_cap_bytes,
    }  # fmt: skip
