"""Devices of a transfer benchmark in one process: the agent's link code, no training.

python -m benchmarks._our_clients    # obeys its standard input (`_crowd`)
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._crowd import obey
from benchmarks.exchange import profile
from edge_agent.identity import Identity
from edge_agent.joining import enroll
from edge_agent.link import Link
from protos.contract import AdapterSpec, Assignment, BlobRef, from_message
from protos.invitation import SHORT_FORM, read_invitation
from protos.layout import Parts
from protos.packing import pack
from protos.sketchfleet.v1 import fleet_pb2 as pb


def make_update(spec: AdapterSpec, task: Assignment) -> bytes:
    """Any values do; every device sends other ones."""
    draw = np.random.default_rng(task.seed)
    k = task.rank
    sides: dict[str, Parts] = {
        m.name: {
            "up": draw.standard_normal((k, m.out_features), np.float32),
            "down": draw.standard_normal((k, m.in_features), np.float32),
        }
        for m in spec.modules
    }
    return pack(spec, task.update, sides, assignment_digest=task.digest)


@dataclass
class Joined:
    """An enrolled device with its assignment and a packed update."""

    link: Link
    task: Assignment
    update: Path
    digest: str
    fetched: Path  # a folder
    shown: str  # the folder of its identity; in plain text its credential

    @property
    def slice(self) -> BlobRef:
        """Its slice, which is one file."""
        (blob,) = self.task.slice
        return blob

    async def down(self) -> None:
        """Fetches the slice, anew."""
        (self.fetched / self.slice.digest).unlink(missing_ok=True)
        await self.link.fetch(self.slice, self.fetched)

    async def up(self) -> None:
        """Pushes the update."""
        await self.link.push(self.task.assignment_id, self.digest, self.update)

    async def round(self) -> None:
        """What an agent does, but for the training between."""
        await self.down()
        await self.up()


async def enrolled(address: str, words: str, name: str, folder: Path) -> tuple[Link, str]:
    """A device's link, and what it shows: its identity's folder, or its credential (plain text).

    words: `join_words`.
    """
    if SHORT_FORM.fullmatch(words):
        identity = Identity(folder / f"{name}.identity")
        invitation = read_invitation(words)
        await asyncio.to_thread(enroll, identity, invitation, name, "0", lambda: None, 60)
        return Link(address, None, identity.credentials), str(identity.folder)
    link = Link(address)
    await link.enroll(words, name, "0", 60)
    return link, link.credential


async def join(address: str, words: str, name: str, folder: Path) -> Joined:
    """Enrols, takes an assignment and packs an update for it."""
    link, shown = await enrolled(address, words, name, folder)
    answer = await link.next_task(None, "", 0, 60)
    spec = from_message(answer.spec, AdapterSpec)
    while answer.kind != pb.NextTaskResponse.KIND_ASSIGNMENT:
        answer = await link.next_task(profile(spec.base_digest), "", 10, 60)
    task = from_message(answer.assignment, Assignment)
    own = folder / task.device_id
    own.mkdir()
    data = make_update(spec, task)
    (own / "update").write_bytes(data)
    return Joined(link, task, own / "update", hashlib.sha256(data).hexdigest(), own, shown)


class _Devices:
    """Those of one process. An assignment takes one update, so every lap has devices of its own."""

    async def join(self, task: dict[str, Any]) -> dict[str, Any]:
        """A device for each name of each lap; answers the bytes of an update and of a slice."""
        folder = Path(task["folder"])
        joined = await asyncio.gather(*(
            join(task["address"], task["words"], f"{name}-{lap}", folder)
            for lap in range(task["laps"]) for name in task["names"]
        ))  # fmt: skip
        each = len(task["names"])
        self._laps = [joined[start : start + each] for start in range(0, len(joined), each)]
        one = self._laps[0][0]
        return {"up_bytes": one.update.stat().st_size, "down_bytes": one.slice.size_bytes}

    async def ready(self, task: dict[str, Any]) -> dict[str, Any]:
        """The devices of this lap have measured their links, as agents have."""
        self._lap = self._laps[task["lap"]]
        for device in self._lap:
            await device.link.probe(metered=True)
        return {}

    async def down(self, task: dict[str, Any]) -> dict[str, Any]:
        """The lap's devices fetch."""
        await asyncio.gather(*(device.down() for device in self._lap))
        return {}

    async def up(self, task: dict[str, Any]) -> dict[str, Any]:
        """They push."""
        await asyncio.gather(*(device.up() for device in self._lap))
        return {}

    async def round(self, task: dict[str, Any]) -> dict[str, Any]:
        """They fetch and push, each in its own time."""
        await asyncio.gather(*(device.round() for device in self._lap))
        return {}


if __name__ == "__main__":
    devices = _Devices()
    asyncio.run(obey({"join": devices.join, "ready": devices.ready, "down": devices.down,
                      "up": devices.up, "round": devices.round}))  # fmt: skip
