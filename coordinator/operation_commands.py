"""Commands of the coordinator about what it keeps: backup, restore, audit."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from profiles.progress import progress


def add_commands(commands: Any, kept: argparse.ArgumentParser, as_json: Any) -> None:
    """Registers them. kept, as_json: parents with --state and --json."""
    backup = commands.add_parser(
        "backup", parents=[kept, as_json],
        help="copy the state folder, whether a coordinator serves or not",
    )  # fmt: skip
    backup.add_argument("target", type=Path, metavar="FOLDER|FILE.tar")
    backup.set_defaults(perform=_backup)

    restore = commands.add_parser("restore", parents=[kept], help="make a state folder of a backup")
    restore.add_argument("backup", type=Path, metavar="FOLDER|FILE.tar")
    restore.set_defaults(perform=_restore)

    audit = commands.add_parser(
        "audit", parents=[kept, as_json],
        help="who joined, what was assigned, merged, refused, backed up",
    )  # fmt: skip
    audit.add_argument("run", nargs="?", help="name of a run (default: everything)")
    audit.add_argument("--since", type=_time, default=0.0, metavar="TIME",
                       help="2026-11-22, 2026-11-22T14:00, or 90m, 24h, 7d ago")  # fmt: skip
    audit.set_defaults(perform=_audit)


def _backup(args: argparse.Namespace) -> int:
    from coordinator.backup import back_up

    with progress("backing up"):
        made = back_up(state_folder(args.state), args.target)
    if args.json:
        print(json.dumps({"target": str(args.target), **asdict(made)}, indent=2))
        return 0
    print(
        f"{args.target}: {made.blobs} blobs, {made.size_bytes / 1e6:.1f} MB, audit log of "
        f"{made.audit_rows} rows up to {made.audit_link[:16]}"
    )
    return 0


def _restore(args: argparse.Namespace) -> int:
    from coordinator.backup import restore

    with progress("checking and restoring"):
        made = restore(args.backup, args.state)
    runs = ", ".join(f"{run} after {n} rounds" for run, n in made.rounds.items()) or "no run"
    print(f"{args.state}: {runs}, as of {_stamp(made.at)}")
    return 0


def _audit(args: argparse.Namespace) -> int:
    from coordinator.audit import Audit
    from coordinator.store.records import Records

    records = Records(state_folder(args.state) / "coordinator.sqlite")
    try:
        log = Audit(records)
        entries = log.entries(args.run, args.since)
        if args.json:
            for e in entries:
                print(json.dumps({"number": e.number, "at": e.at, "event": e.event, **e.facts}))
        else:
            for e in entries:
                facts = "  ".join(f"{k}={_plain(v)}" for k, v in e.facts.items())
                print(f"{_stamp(e.at)}  {e.event}  {facts}")
        with progress("checking the chain of the audit log"):
            rows, link = log.check()
    finally:
        records.close()
    if not args.json:
        print(f"{rows} rows, unchanged up to {link}")
    return 0


def state_folder(state: Path) -> Path:
    """The folder, if it is one. Raises `ServeError`."""
    from coordinator.serve import ServeError

    if not (state / "coordinator.sqlite").is_file():
        raise ServeError(
            f"{state} is not a coordinator's state folder; pass the [server] state of run.toml "
            "as --state"
        )
    return state


def _stamp(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().isoformat(timespec="seconds")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _time(text: str) -> float:
    from profiles.compat import moment

    units = {"m": 60.0, "h": 3600.0, "d": 86400.0}
    try:
        if text[-1:] in units and text[:-1].replace(".", "", 1).isdigit():
            return time.time() - float(text[:-1]) * units[text[-1]]
        return moment(text).timestamp()
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time; write 2026-11-22, 2026-11-22T14:00, or 24h"
        ) from error
