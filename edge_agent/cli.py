"""sketchfleet-agent: enroll, run, probe, record, doctor, status, export, generate.

Imports nothing heavy until it is needed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent import bundle_commands, export_commands, inference_commands, serving_commands
from profiles.program import (
    above_zero,
    add_common,
    add_config,
    at_least,
    perform,
    settings_options,
    show_settings,
    version,
)
from profiles.progress import progress

if TYPE_CHECKING:
    from edge_agent.config import AgentConfig

OWN_PACKAGES = frozenset(("psutil",))  # of the agent's extra


def make_parser() -> argparse.ArgumentParser:
    """Every command and option of the program."""
    parser = argparse.ArgumentParser(
        prog="sketchfleet-agent",
        description="Trains this device's slice of a shared adapter on code that stays here.",
    )
    settled = settings_options("agent.toml")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("run", "join the fleet and work until the run is finished"),
        ("probe", "what this device is: board, memory, GPU, power, heat and the link"),
        ("doctor", "check everything that training here needs, and say how to mend it"),
        ("status", "what the agent is doing"),
        ("healthcheck", "exit 0 while the agent runs and its work gets on"),
    ):
        command = commands.add_parser(
            name, parents=[settled], help=text, description=text.capitalize() + "."
        )
        if name not in ("run", "healthcheck"):
            command.add_argument("--json", action="store_true", help="print JSON")
        if name in ("probe", "doctor"):
            wanted = "measure training steps of" if name == "probe" else "check"
            command.add_argument("--base", metavar="MODEL", help=f"{wanted} this base model too")
        if name == "probe":
            command.add_argument(
                "--precision", choices=("nf4", "int8", "bf16", "fp32"), default="nf4",
                help="of the base while it is measured",
            )  # fmt: skip
            command.add_argument("--tokens", type=at_least(1), default=512, help="per sequence")
            command.add_argument(
                "--micro-batch", type=at_least(1), default=1, help="sequences per step"
            )
            command.add_argument("--rank", type=at_least(1), default=8, help="of the adapter")
    enroll = commands.add_parser(
        "enroll",
        parents=[settled],
        help="join a fleet with what its operator handed over",
        description="Makes this device's key and has the fleet sign a certificate for it.",
    )
    enroll.add_argument(
        "invitation", metavar="FILE|WORD|-",
        help="the join file, or its short form in quotes; - reads either from standard input",
    )  # fmt: skip
    enroll.add_argument(
        "--patience", type=above_zero, default=24.0, metavar="H",
        help="how long to wait for the operator's approval, hours (default: 24)",
    )  # fmt: skip
    record = commands.add_parser(
        "record",
        parents=[settled],
        help="write down what the link to the coordinator is like over time",
        description="Writes a trace of the link (CSV) that trials play back (docs/trials.md). "
        "Measuring the rate fills the link for some seconds each time.",
    )
    record.add_argument("--out", type=Path, required=True, metavar="CSV", help="the trace")
    record.add_argument("--minutes", type=above_zero, default=10.0, help="how long (default: 10)")
    record.add_argument(
        "--every", type=above_zero, default=30.0, metavar="S",
        help="seconds between two measurements of the rate (default: 30)",
    )  # fmt: skip
    export_commands.add_commands(commands, settled)
    serving_commands.add_commands(commands, settled)
    bundle_commands.add_commands(commands)
    inference_commands.add_commands(commands, settled)
    add_config(commands, settled, "SKETCHFLEET_AGENT")
    add_common(parser, commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return perform(
        "sketchfleet-agent",
        lambda: _command(make_parser().parse_args(argv)),
        extra="agent",
        packages=OWN_PACKAGES,
    )


def _command(args: argparse.Namespace) -> int:
    if "perform" in args:
        return int(args.perform(args))
    return int({
        "enroll": _enroll, "run": _run, "probe": _probe, "doctor": _doctor, "status": _status,
            "healthcheck": _healthcheck,
        "record": _record, "config": _config,
    }[args.command](args))  # fmt: skip


def _settings(args: argparse.Namespace) -> AgentConfig:
    from edge_agent.config import load_agent_config

    return load_agent_config(args.config, args.set)


def _config(args: argparse.Namespace) -> int:
    from edge_agent.config import read_agent_config

    return show_settings(read_agent_config(args.config, args.set), args)


def _enroll(args: argparse.Namespace) -> int:
    config = _settings(args)
    from edge_agent.access import identity_of
    from edge_agent.joining import enroll
    from protos.invitation import read_invitation

    name = config.device.name

    waits = contextlib.ExitStack()

    def waiting() -> None:
        print(f"{name} awaits approval: sketchfleet-coordinator approve {name}", flush=True)
        waits.enter_context(progress("waiting for it"))

    identity = identity_of(config)
    with waits:
        enroll(identity, read_invitation(args.invitation), name, version(), waiting,
               3600 * args.patience)  # fmt: skip
    print(f"{name} has joined the fleet at {identity.fleet['address']}")
    return 0


def _run(args: argparse.Namespace) -> int:
    config = _settings(args)
    from edge_agent.service import run
    from profiles.events import set_up_logging

    set_up_logging(config.log.format, config.log.level)
    asyncio.run(run(config))
    return 0


def _probe(args: argparse.Namespace) -> int:
    from edge_agent.survey import Wanted, describe, survey

    wanted = None
    if args.base is not None:
        wanted = Wanted(args.base, args.precision, args.tokens, args.micro_batch, args.rank)
    config = _settings(args)
    with progress("looking at this machine and its link"):
        found = asyncio.run(survey(config, wanted))
    print(json.dumps(found.plain, indent=2) if args.json else describe(found))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    import dataclasses
    from shutil import get_terminal_size

    from edge_agent.checks.finding import render
    from edge_agent.doctor import examine

    config = _settings(args)
    with progress("checking"):
        findings = examine(config, args.base)
    if args.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        print(render(findings, min(100, get_terminal_size((100, 24)).columns)))
    return 1 if any(finding.state == "fail" for finding in findings) else 0


def _record(args: argparse.Namespace) -> int:
    from edge_agent.recorder import RecordError, record
    from profiles.trace import LinkState

    config = _settings(args)
    if not args.out.resolve().parent.is_dir():
        raise RecordError(f"{args.out.resolve().parent} is not there; choose another --out")

    def told(at_s: float, now: LinkState) -> None:
        rates = (f"{now.up_bps / 1e6:.3g} up, {now.down_bps / 1e6:.3g} down Mbit/s"
                 if now.up_bps else "outage")  # fmt: skip
        print(f"{at_s:7.0f} s  {rates}, {2e3 * now.delay_s:.0f} ms round trip", flush=True)

    found = asyncio.run(record(config, args.out, 60 * args.minutes, args.every, told))
    print(
        f"{args.out}: {len(found.times)} states; measuring moved {found.moved_bytes / 1e6:.1f} MB"
    )
    return 0


def _status(args: argparse.Namespace) -> int:
    from edge_agent.status import describe, read_status

    found = read_status(_settings(args).state.folder)
    print(json.dumps(found) if args.json else describe(found, time.time()))
    return 0


def _healthcheck(args: argparse.Namespace) -> int:
    from edge_agent.status import StatusError, beats

    if not beats(_settings(args).state.folder, time.time()):
        raise StatusError("the agent has given no sign of life lately; start it again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
