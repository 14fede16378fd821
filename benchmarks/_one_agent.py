"""The network half of one agent in a process of its own: fetches, pushes, and says what it took.

    python -m benchmarks._one_agent ADDRESS IDENTITY|CREDENTIAL FOLDER < task.json

The task names blobs to fetch and an update to push. Prints JSON: seconds, and resident bytes with
all of an agent's network process imported, before and at most.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import edge_agent.agent  # noqa: F401 - what an agent's network process holds
from edge_agent.certified import CertifiedMembership
from edge_agent.identity import Identity
from edge_agent.link import Link
from protos.contract import BlobRef, from_plain


def resident_bytes(which: str, pid: int | str = "self") -> int:
    """VmRSS, or VmHWM for the most so far, of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no {which}")


async def work(address: str, shown: str, folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """Fetches, then pushes, as far as the task names something. shown: the folder of an identity,
    or a plain-text fleet's credential.
    """
    if Path(shown).is_dir():
        identity = Identity(Path(shown))
        membership = CertifiedMembership(
            identity, link := Link(address, None, identity.credentials)
        )
        await membership.sign_on()
    else:
        link = Link(address)
        link.credential = shown
    link.patience_s = 600.0
    await link.probe(metered=True)  # as an agent does before its first round
    found: dict[str, Any] = {"idle_bytes": resident_bytes("VmRSS")}
    begun = time.monotonic()
    for blob in task.get("blobs", []):
        await link.fetch(from_plain(BlobRef, blob), folder)
    found["fetch_s"] = time.monotonic() - begun
    begun = time.monotonic()
    if "update" in task:
        await link.push(task["assignment_id"], task["digest"], Path(task["update"]))
    found["push_s"] = time.monotonic() - begun
    await link.close()
    return found | {
        "peak_bytes": resident_bytes("VmHWM"), "resumes": link.resumes,
        "resent_bytes": link.resent_bytes,
    }  # fmt: skip


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms: %(message)s")
    address, shown, folder = sys.argv[1:]
    print(json.dumps(asyncio.run(work(address, shown, Path(folder), json.load(sys.stdin)))))
