"""What connects this device with its fleet: state, credential, coordinator, base model, code."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from edge_agent.checks.finding import Finding, fail, ok, skip, warn
from edge_agent.config import AgentConfig
from edge_agent.link import Link, LinkError, RefusedError
from profiles.compat import wait_for
from profiles.errors import SketchfleetError
from profiles.memory import weight_bytes
from profiles.model import base_digest, read_shape, resolve_base
from profiles.settings import host_of
from protos.contract import Reason

CONNECT_S = 5.0
EXPIRING_S = 2 * 86400.0


def state_folder(folder: Path) -> Finding:
    """Can be written, and by nobody else read: it holds the credential."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        mend = "choose another [state] folder, or run the doctor as the agent's user"
        return fail("state", f"{existing} cannot be written by this user", mend)
    if existing != folder:
        return ok("state", f"{folder} will be made")
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        return warn("state", f"{folder} may be read by others", f"chmod 700 {folder}")
    return ok("state", f"{folder} is writable and private")


def credential(config: AgentConfig, now: float) -> tuple[Finding, str]:
    """Of a plain-text fleet: the kept credential; empty when there is none to be used."""
    path, token = config.state.folder / "credential.json", config.coordinator.token_file
    try:
        plain = json.loads(path.read_text())
        kept, renew_at = str(plain["credential"]), float(plain["renew_at"])
    except FileNotFoundError:
        if token.is_file():
            return ok("credential", f"none yet; {token} will get one"), ""
        return fail("credential", f"none, and no join token at {token}",
                    "copy the token from the coordinator's state folder and set [coordinator] "
                    "token_file"), ""  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return warn("credential", f"{path} is damaged", "the next `run` enrols again"), ""
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        return warn("credential", f"{path} may be read by others", f"chmod 600 {path}"), kept
    if now > renew_at:
        days = (now - renew_at) / 86400
        return warn("credential", f"due for renewal for {days:.1f} days; it may have expired",
                    "`run` renews it, or enrols again with the join token"), kept  # fmt: skip
    return ok("credential", f"kept; renewed in {(renew_at - now) / 86400:.1f} days"), kept


def coordinator(
    address: str, dial: Callable[[], Link], joined: bool, limit_s: float = CONNECT_S
) -> list[Finding]:
    """Its name, its port, and whether what answers there is a coordinator that knows us.

    dial: makes a link to it, by which this device is known if it has joined.
    """
    host, port = host_of(address), int(address.rpartition(":")[2])
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return [fail("name", f"{host} cannot be resolved: {error.strerror}",
                     "correct [coordinator] address, or this machine's DNS")]  # fmt: skip
    findings = [ok("name", f"{host} is {found[0][4][0]}")]
    try:
        socket.create_connection((host, port), timeout=limit_s).close()
    except ConnectionRefusedError:
        return [*findings, fail("port", f"{address} refuses connections",
                                "start the coordinator, or correct the port")]  # fmt: skip
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or "no way there"
        return [*findings, fail("port", f"{address}: {why}",
                                "check the network, and firewalls on the way")]  # fmt: skip
    findings.append(ok("port", f"{address} accepts connections"))

    async def ask() -> Finding:
        return await answers(dial(), joined, limit_s)

    return [*findings, asyncio.run(ask())]


async def answers(link: Link, joined: bool, limit_s: float) -> Finding:
    """Whether a coordinator speaks there, and whether it knows this device."""
    try:
        rtt_s = await wait_for(link.ping(), limit_s)
    except RefusedError as error:
        if error.reason is not Reason.BAD_CREDENTIAL:
            return fail("coordinator", f"refuses: {error}", "ask the coordinator's operator")
        if not joined:
            return ok("coordinator", "answers; this device has not joined yet")
        return warn("coordinator", "answers, but does not know this device any more",
                    "`run` enrols again; the join token must be valid")  # fmt: skip
    except (LinkError, TimeoutError) as error:
        return fail("coordinator", f"what listens at {link.address} is no coordinator of this "
                    f"fleet ({error})",
                    "correct [coordinator] address; is a proxy in between?")  # fmt: skip
    finally:
        await link.close()
    return ok("coordinator", f"answers in {rtt_s * 1e3:.0f} ms")


def base_model(where: str, wanted_digest: str, on_gpu: bool) -> tuple[Finding, int | None]:
    """The base and its bytes in nf4. `wanted_digest`: of the run this device last measured for."""
    if not where:
        return skip("model", "the run names it; check one with --base FOLDER"), None
    try:
        folder = resolve_base(where)
        digest = base_digest(folder)
        size = weight_bytes(read_shape(folder), "nf4", on_gpu=on_gpu)
    except SketchfleetError as error:
        return fail("model", str(error), "fetch the base, or correct [model] base"), None
    told = f"{folder}, digest {digest[:12]}, about {size / 1e9:.2f} GB in nf4"
    if wanted_digest and wanted_digest != digest:
        return warn("model", f"{told}; the last run of this device used {wanted_digest[:12]}",
                    "for that run, fetch the same revision"), size  # fmt: skip
    return ok("model", told), size


def last_digest(folder: Path) -> str:
    """Of the base this device measured itself with last; empty when it has not."""
    try:
        return str(json.loads((folder / "profile.json").read_text())
                   ["measured"]["compute"]["base_digest"])  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def local_code(look: Callable[[], object]) -> Finding:
    """Whether there is code to train on; `look` raises when there is not, as `run` does."""
    try:
        look()
    except SketchfleetError as error:
        return fail("data", str(error), "correct [data] in agent.toml")
    return ok("data", "there is code to train on")
