"""sketchfleet-agent: enroll, run, probe, record, doctor, status, export, generate.

Imports nothing heavy until it is needed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

from profiles.errors import SketchfleetError


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="sketchfleet-agent",
        description="Trains this device's slice of a shared adapter on code that stays here.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("run", "join the fleet and work until the run is finished"),
        ("probe", "what this device is: board, memory, GPU, power, heat and the link"),
        ("doctor", "check everything that training here needs, and say how to mend it"),
        ("status", "what the agent is doing"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.add_argument("--config", type=Path, default=Path("agent.toml"), metavar="FILE")
        if name != "run":
            command.add_argument("--json", action="store_true", help="print JSON")
        if name in ("probe", "doctor"):
            wanted = "measure training steps of" if name == "probe" else "check"
            command.add_argument("--base", metavar="MODEL", help=f"{wanted} this base model too")
        if name == "probe":
            command.add_argument(
                "--precision", choices=("nf4", "int8", "bf16", "fp32"), default="nf4",
                help="of the base while it is measured",
            )  # fmt: skip
            command.add_argument("--tokens", type=int, default=512, help="per sequence")
            command.add_argument("--micro-batch", type=int, default=1, help="sequences per step")
            command.add_argument("--rank", type=int, default=8, help="of the adapter")
    enroll = commands.add_parser(
        "enroll",
        help="join a fleet with what its operator handed over",
        description="Makes this device's key and has the fleet sign a certificate for it.",
    )
    enroll.add_argument(
        "invitation", metavar="FILE|WORD", help="the join file, or its short form in quotes"
    )
    enroll.add_argument("--config", type=Path, default=Path("agent.toml"), metavar="FILE")
    enroll.add_argument(
        "--patience", type=float, default=24.0, metavar="H",
        help="how long to wait for the operator's approval, hours (default: 24)",
    )  # fmt: skip
    record = commands.add_parser(
        "record",
        help="write down what the link to the coordinator is like over time",
        description="Writes a trace of the link (CSV) that trials play back (docs/trials.md). "
        "Measuring the rate fills the link for some seconds each time.",
    )
    record.add_argument("--config", type=Path, default=Path("agent.toml"), metavar="FILE")
    record.add_argument("--out", type=Path, required=True, metavar="CSV")
    record.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    record.add_argument(
        "--every", type=float, default=30.0, metavar="S",
        help="seconds between two measurements of the rate (default: 30)",
    )  # fmt: skip
    export = commands.add_parser(
        "export",
        help="write this device's own adapter as a PEFT folder",
        description="Writes the adapter that a run trained for this device alone (the method's "
        "personal parts, or Ditto's) as a PEFT folder.",
    )
    export.add_argument("--config", type=Path, default=Path("agent.toml"), metavar="FILE")
    export.add_argument("--run", required=True, metavar="NAME", help="the run it comes from")
    export.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="a folder that is not there yet"
    )
    generate = commands.add_parser(
        "generate", help="complete code with a base model and, if given, an exported adapter"
    )
    generate.add_argument("prompt", help="code to continue")
    generate.add_argument("--base", required=True, help="hub id or model folder")
    generate.add_argument("--adapter", type=Path, help="PEFT folder")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args(argv)
    try:
        return int({
            "enroll": _enroll, "run": _run, "probe": _probe, "doctor": _doctor, "status": _status,
            "record": _record,
            "export": _export, "generate": _generate,
        }[args.command](args))  # fmt: skip
    except SketchfleetError as error:
        print(f"sketchfleet-agent: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        from edge_agent.failures import is_of_disk

        if not is_of_disk(error):
            raise
        print(f"sketchfleet-agent: {error.filename} cannot be used ({error.strerror}); make room "
              "or see to its disk, then start again: nothing is lost", file=sys.stderr)  # fmt: skip
        return 1
    except KeyboardInterrupt:
        return 130


def _enroll(args: argparse.Namespace) -> int:
    from edge_agent.config import load_agent_config

    config = load_agent_config(args.config)
    from edge_agent.access import identity_of
    from edge_agent.agent import version
    from edge_agent.joining import enroll
    from protos.invitation import read_invitation

    name = config.device.name

    def waiting() -> None:
        print(f"{name} awaits approval: sketchfleet-coordinator approve {name}", flush=True)

    identity = identity_of(config)
    enroll(identity, read_invitation(args.invitation), name, version(), waiting,
           3600 * args.patience)  # fmt: skip
    print(f"{name} has joined the fleet at {identity.fleet['address']}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from edge_agent.config import load_agent_config

    config = load_agent_config(args.config)
    from edge_agent.agent import Agent
    from profiles.events import set_up_logging

    set_up_logging()

    async def go() -> None:
        import signal

        agent = Agent(config)
        work = asyncio.ensure_future(agent.run())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, work.cancel)
        try:
            await work
        except asyncio.CancelledError:
            agent.status("stopped")

    asyncio.run(go())
    return 0


def _probe(args: argparse.Namespace) -> int:
    from edge_agent.config import load_agent_config
    from edge_agent.survey import Wanted, describe, survey

    wanted = None
    if args.base is not None:
        wanted = Wanted(args.base, args.precision, args.tokens, args.micro_batch, args.rank)
    found = asyncio.run(survey(load_agent_config(args.config), wanted))
    print(json.dumps(found.plain, indent=2) if args.json else describe(found))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    import dataclasses

    from edge_agent.checks.finding import render
    from edge_agent.config import load_agent_config
    from edge_agent.doctor import examine

    findings = examine(load_agent_config(args.config), args.base)
    if args.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        print(render(findings))
    return 1 if any(finding.state == "fail" for finding in findings) else 0


def _record(args: argparse.Namespace) -> int:
    from edge_agent.config import load_agent_config
    from edge_agent.recorder import RecordError, record
    from profiles.trace import LinkState

    config = load_agent_config(args.config)
    if not (args.minutes > 0 and args.every > 0):
        raise RecordError("--minutes and --every must be above 0")
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
    from edge_agent.config import load_agent_config
    from edge_agent.status import describe, read_status

    found = read_status(load_agent_config(args.config).state.folder)
    print(json.dumps(found) if args.json else describe(found, time.time()))
    return 0


def _export(args: argparse.Namespace) -> int:
    import importlib.util

    from edge_agent.config import load_agent_config
    from edge_agent.journal import JournalError, kept_homes
    from profiles.errors import MissingExtraError

    config = load_agent_config(args.config)
    homes = kept_homes(config.state.folder)
    if args.run not in homes:
        kept = f"it keeps something of: {', '.join(homes)}" if homes else "it keeps nothing"
        raise JournalError(
            f"this device keeps nothing of a run {args.run!r} ({kept}); only methods with personal "
            "parts and [personal] ditto leave an adapter here"
        )
    home = homes[args.run]
    if home is None:
        raise JournalError(
            f"what this device kept of run {args.run!r} is damaged or gone; the next round of the "
            "run begins it anew"
        )
    if args.out.exists():
        raise JournalError(f"{args.out} already exists; give --out a folder that does not")
    if importlib.util.find_spec("safetensors") is None:
        raise MissingExtraError("safetensors", "train")
    from edge_agent.training.personal import export_personal

    export_personal(home.path, home.spec, config.model.base or home.spec.base, args.out)
    print(f"{args.out}: this device's own adapter of run {args.run}")
    return 0


def _generate(args: argparse.Namespace) -> int:
    """Hands over to the training room: this process stays without torch."""
    import importlib.util
    import os

    from profiles.errors import MissingExtraError

    for package in ("torch", "peft"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "train")
    words = ["--base", args.base, "--prompt", args.prompt,
             "--max-new-tokens", str(args.max_new_tokens)]  # fmt: skip
    if args.adapter is not None:
        words += ["--adapter", str(args.adapter)]
    module = "edge_agent.training.completion"
    os.execv(sys.executable, [sys.executable, "-m", module, *words])  # noqa: S606 - our own module


if __name__ == "__main__":
    sys.exit(main())
