"""Fresh keys and signatures from a short-lived process (`keys`), which keeps the agent small."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from edge_agent.identity import IdentityError, Pair

PATIENCE_S = 60.0
PROGRAM = Path(__file__).with_name("keys.py")


@dataclass(frozen=True)
class Asked:
    """A fresh key and the request for a certificate, PEM; by an old key also the proof of it."""

    key: bytes
    request: bytes
    signature: bytes = b""

    def __repr__(self) -> str:
        return "Asked(***)"


def fresh_key(old: Pair | None = None, label: bytes = b"") -> Asked:
    """Blocks for about a third of a second. `old` signs `label` and the request.

    Raises `IdentityError`.
    """
    given = {} if old is None else {"old_key": old.key.decode(), "label": label.decode()}
    try:
        done = subprocess.run(  # noqa: S603 - our own program
            [sys.executable, str(PROGRAM)], input=json.dumps(given), capture_output=True,
            text=True, timeout=PATIENCE_S, check=True,
        )  # fmt: skip
        made = json.loads(done.stdout)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no output"])[-1]
        raise IdentityError(f"no key could be made: {last}") from error
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise IdentityError(f"no key could be made: {type(error).__name__}") from error
    return Asked(
        made["key"].encode(), made["request"].encode(), bytes.fromhex(made.get("signature", ""))
    )
