"""What this device shows who it is by: key and certificate, and this machine's clock."""

from __future__ import annotations

import stat
from pathlib import Path

from edge_agent.access import identity_of
from edge_agent.checks.finding import Finding, fail, ok, warn
from edge_agent.config import AgentConfig
from edge_agent.identity import Identity
from profiles.errors import SketchfleetError

JOIN = "ask the operator for a join file and run `sketchfleet-agent enroll FILE`"


def certificate(config: AgentConfig, now: float) -> Finding:
    """Kept, private, and valid at this machine's clock (Unix s)."""
    own = config.coordinator.own_pki
    if own is not None:
        missing = [str(path) for path in own if not path.is_file()]
        if missing:
            return fail("certificate", f"{missing[0]} is not there",
                        "correct [coordinator] ca, certificate and key")  # fmt: skip
        return _private(own[2]) or ok("certificate", f"{own[1]}, of your own PKI")
    identity = identity_of(config)
    if not identity.exists:
        return fail("certificate", "this device has not joined a fleet yet", JOIN)
    try:
        return _private(identity.folder / "pair.json") or _lasting(identity, now)
    except (SketchfleetError, ValueError) as error:
        return fail("certificate", str(error), JOIN)


def _private(path: Path) -> Finding | None:
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        return warn("certificate", f"the key in {path} may be read by others", f"chmod 600 {path}")
    return None


def _lasting(identity: Identity, now: float) -> Finding:
    made, ends = identity.pair.made_at, identity.pair.ends_at
    name = identity.fleet["device"]
    if now < made:
        return warn("certificate", f"{name}; made {made - now:.0f} s after this clock's time",
                    "set this machine's clock (timedatectl)")  # fmt: skip
    if now > ends:
        return warn("certificate", f"{name}; expired {(now - ends) / 86400:.1f} days ago",
                    "`run` enrols again with its key, within 30 days; check the clock")  # fmt: skip
    return ok("certificate", f"{name}; {(ends - now) / 86400:.1f} days left, renewed by itself")
