"""`sketchfleet-agent bundle`: its options, and what it prints."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

from profiles.errors import ExitCode


def add_commands(commands: Any) -> None:
    """Registers the command."""
    bundle = commands.add_parser(
        "bundle",
        help="collect all that a machine without a network is installed from",
        description="Writes one .tar with Sketchfleet, every wheel it needs on a platform, the "
        "installer, and if given a base model, a configuration and a join file. pip fetches the "
        "wheels, from the indexes it is set up for; nothing of the platform is needed here.",
    )
    bundle.add_argument(
        "platform", metavar="PLATFORM", help="jetpack6, jetpack7, x86-cuda or x86-cpu"
    )
    bundle.add_argument(
        "--out", type=Path, required=True, metavar="FILE.tar", help="must not be there yet"
    )
    bundle.add_argument(
        "--extras", default="train", metavar="LIST",
        help="of the package: agent (no torch: the trainer has its own interpreter), serve "
        "(inference without torch), train (default), or several with commas",
    )  # fmt: skip
    bundle.add_argument("--python", metavar="VERSION", help="of the machine, where it has a choice")
    bundle.add_argument("--model", type=Path, metavar="FOLDER", help="a base model to bring along")
    bundle.add_argument("--config", type=Path, metavar="FILE", help="its agent.toml")
    bundle.add_argument(
        "--join", type=Path, metavar="FILE",
        help="a join file; the .tar is then a secret until the token is used",
    )  # fmt: skip
    bundle.set_defaults(perform=_bundle)


def _bundle(args: argparse.Namespace) -> int:
    from edge_agent.bundle import MB, make, wanted

    wish = wanted(args.platform, args.python, args.extras, args.model, args.config, args.join)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing half done is left
    make(wish, args.out)
    print(
        f"{args.out}: {args.out.stat().st_size / MB:.0f} MB for {wish.platform.name}, Python "
        f"{wish.python}; unpack it there and run install.sh in it"
    )
    return ExitCode.OK
