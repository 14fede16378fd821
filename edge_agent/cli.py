"""sketchfleet-agent: run, probe, status, export, generate.

Imports nothing heavy until it is needed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

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
        ("probe", "measure this device: memory, processor and, if it answers, the link"),
        ("status", "what the agent is doing"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.add_argument("--config", type=Path, default=Path("agent.toml"), metavar="FILE")
        if name != "run":
            command.add_argument("--json", action="store_true", help="print JSON")
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
            "run": _run, "probe": _probe, "status": _status, "export": _export,
            "generate": _generate,
        }[args.command](args))  # fmt: skip
    except SketchfleetError as error:
        print(f"sketchfleet-agent: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


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
    from edge_agent.agent import AgentError, version
    from edge_agent.config import load_agent_config
    from edge_agent.link import Link, LinkError
    from edge_agent.probe import probe
    from protos.contract import to_plain

    config = load_agent_config(args.config)

    async def link_facts() -> Any:
        link = Link(config.coordinator.address)
        try:
            kept = config.state.folder / "credential.json"
            if not kept.is_file():
                raise AgentError("this device has not joined a fleet yet")
            try:
                link.credential = str(json.loads(kept.read_text())["credential"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise AgentError(f"{kept} is damaged; the next `run` enrols again") from error
            return await link.probe(metered=False)
        finally:
            await link.close()

    unmeasured = ""
    link = None
    try:
        link = asyncio.run(link_facts())
    except (AgentError, LinkError) as error:
        unmeasured = str(error)
    megabytes = config.limits.memory_mb
    found = probe(
        version=version(), state=config.state.folder, board=config.device.board,
        memory_cap_bytes=None if megabytes is None else megabytes * 10**6, link=link,
    )  # fmt: skip
    if args.json:
        print(json.dumps(to_plain(found), indent=2))
        return 0
    print(f"board      {found.board}\nprocessor  {found.cpu}, {found.cores} cores")
    print(f"memory     {found.memory_available_bytes / 1e9:.1f} GB available of "
          f"{found.memory_total_bytes / 1e9:.1f}; training may use "
          f"{found.trainer_bytes / 1e9:.2f}")  # fmt: skip
    print(f"disk       {found.disk_free_bytes / 1e9:.1f} GB free")
    if link is None:
        print(f"link       not measured: {unmeasured}")
    else:
        print(f"link       {link.up_bps / 1e6:.2f} Mbit/s up, {link.down_bps / 1e6:.2f} down, "
              f"{link.rtt_s * 1e3:.0f} ms round trip")  # fmt: skip
    print("compute    measured with the run's own model when the agent joins a run")
    return 0


def _status(args: argparse.Namespace) -> int:
    from edge_agent.agent import AgentError
    from edge_agent.config import load_agent_config

    path = load_agent_config(args.config).state.folder / "status.json"
    try:
        plain = json.loads(path.read_text())
        plain["running"] = Path(f"/proc/{plain['pid']}").exists()
    except OSError as error:
        raise AgentError(
            f"no agent has run with this configuration ({path} is not there)"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise AgentError(f"{path} is damaged; the next `run` writes it anew") from error
    if args.json:
        print(json.dumps(plain))
    else:
        state = plain["phase"] if plain["running"] else f"not running (last: {plain['phase']})"
        details = ", ".join(
            f"{k} {v}" for k, v in plain.items() if k not in ("phase", "at", "pid", "running")
        )
        print(f"{state}{': ' + details if details else ''}, {time.time() - plain['at']:.0f} s ago")
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
