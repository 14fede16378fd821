"""Commands of the coordinator about screening: who is in quarantine, and letting a device back."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from coordinator.operation_commands import state_folder
from profiles.errors import SketchfleetError


class ReleaseError(SketchfleetError):
    """No such device in quarantine."""


def add_commands(commands: Any, kept: argparse.ArgumentParser, as_json: Any) -> None:
    """Registers them. kept, as_json: parents with --state and --json."""
    release = commands.add_parser(
        "release", parents=[kept], help="merge a quarantined device's updates again, from now on"
    )
    release.add_argument("device", metavar="NAME")
    release.set_defaults(perform=_release)

    quarantine = commands.add_parser(
        "quarantine", parents=[kept, as_json], help="devices in quarantine, and why"
    )
    quarantine.set_defaults(perform=_quarantine)


def _release(args: argparse.Namespace) -> int:
    from coordinator.audit import Audit
    from coordinator.store.records import Records
    from coordinator.store.screenings import Screenings

    records = Records(state_folder(args.state) / "coordinator.sqlite")
    try:
        store = Screenings(records)
        with records.transaction():
            if not store.end(args.device, "release", time.time()):
                held = ", ".join(sorted(store.standing())) or "no device"
                raise ReleaseError(f"{args.device!r} is not in quarantine; {held} is")
            Audit(records).record("quarantine ended", device=args.device, by="release")
    finally:
        records.close()
    print(f"{args.device} is released: its updates are merged again, from the next merge on")
    return 0


def _quarantine(args: argparse.Namespace) -> int:
    from coordinator.store.records import Records
    from coordinator.store.screenings import Screenings
    from coordinator.tables import print_table

    records = Records(state_folder(args.state) / "coordinator.sqlite")
    try:
        held = list(Screenings(records).standing().values())
    finally:
        records.close()
    if args.json:
        plain = [{"device": one.device_id, "since_round": one.round, "reason": one.reason,
                  "clean_rounds": one.clean, "needed": one.needed} for one in held]  # fmt: skip
        print(json.dumps(plain, indent=2))
    elif held:
        rows = [(o.device_id, str(o.round), f"{o.clean} of {o.needed}", o.reason) for o in held]
        print_table(("device", "since round", "clean rounds", "reason"), rows)
    else:
        print("no device is in quarantine")
    return 0
