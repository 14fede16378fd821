"""`sketchfleet-agent export`: the adapter that this device holds, for other programs."""

from __future__ import annotations

import argparse
from typing import Any

from profiles.errors import SketchfleetError
from protos.export_options import add_export_options, wanted_of


class NoAdapterError(SketchfleetError):
    """The device holds no adapter of the kind that is asked for."""


def add_commands(commands: Any, settled: argparse.ArgumentParser) -> None:
    """Registers `export`. settled: --config and --set."""
    export = commands.add_parser(
        "export",
        parents=[settled],
        help="write the adapter that this device holds for PEFT, llama.cpp or merged",
        description="Writes the newest adapter that this device holds: its own where it has one "
        "(methods with personal parts, [personal] ditto), else the fleet's as it last came whole.",
    )
    export.add_argument(
        "--run", default="", metavar="NAME", help="the run it comes from (default: the last one)"
    )
    export.add_argument(
        "--whose", choices=("own", "fleet"), help="only this device's own, or only the fleet's"
    )
    add_export_options(export)
    export.set_defaults(perform=_export)


def _export(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from edge_agent.adapters import newest_adapter
    from edge_agent.config import load_agent_config
    from protos.export_forms import write_form

    wanted = wanted_of(args)
    config = load_agent_config(args.config, args.set)
    found = newest_adapter(config.state.folder, args.run, args.whose)
    if found is None:
        raise NoAdapterError(_nothing(args.run, args.whose))
    if not wanted.base:
        wanted = replace(wanted, base=config.model.base)
    print(f"{write_form(found.adapter, wanted)} ({found})")
    return 0


def _nothing(run: str, whose: str | None) -> str:
    of = f" of a run {run!r}" if run else ""
    if whose == "own":
        return (
            f"this device keeps no adapter of its own{of}; only methods with personal parts and "
            "[personal] ditto leave one here"
        )
    return (
        f"this device holds no adapter of the fleet{of} yet; it gets the whole one with the first "
        "round that measures it"
    )
