"""sketchfleet-trial: demo. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from profiles.errors import SketchfleetError


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="sketchfleet-trial", description="Runs whole fleets on this machine."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="a coordinator and four agents on loopback, each with its own code and link"
    )
    demo.add_argument("--out", type=Path, default=Path("demo-output"), metavar="FOLDER")
    demo.add_argument("--rounds", type=int, default=6, help="training rounds (default: 6)")
    demo.add_argument(
        "--data", action="append", default=[], metavar="NAME=FOLDER",
        help="let a device train on a folder of yours, for example laptop=~/src (repeatable)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        from trials.demo import demo as run_demo

        return run_demo(args.out, args.rounds, args.data)
    except SketchfleetError as error:
        print(f"sketchfleet-trial: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
