"""sketchfleet-trial: run, plot, demo, compare, capped, study. Imports nothing heavy before."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from profiles.program import add_common, at_least, perform
from profiles.progress import progress

OWN_PACKAGES = frozenset(("matplotlib", "pyarrow", "rich", "scipy", "sqlalchemy"))  # of its extra
OWN_DATA = "let a device train on a folder of yours, for example laptop=~/src (repeatable)"


def make_parser() -> argparse.ArgumentParser:
    """Every command and option of the program."""
    parser = argparse.ArgumentParser(
        prog="sketchfleet-trial", description="Runs whole fleets on this machine."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run", help="a fleet under links and caps as fleet.toml describes it (docs/trials.md)"
    )
    run.add_argument("fleet", type=Path, metavar="fleet.toml")
    run.add_argument("--out", type=Path, required=True, metavar="FOLDER",
                     help="for everything that is found; must not be there yet")  # fmt: skip
    run.add_argument(
        "--remote", action="store_true",
        help="start no agents: wait for the named devices on their own machines",
    )  # fmt: skip
    plot = commands.add_parser(
        "plot", help="a trial's report made anew, or several trials in one table and picture"
    )
    plot.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    plot.add_argument("--out", type=Path, metavar="FOLDER",
                      help="of a comparison (default: trials-compared)")  # fmt: skip
    demo = commands.add_parser(
        "demo", help="a coordinator and four agents on loopback, each with its own code and link"
    )
    demo.add_argument("--out", type=Path, default=Path("demo-output"), metavar="FOLDER",
                      help="for logs, state and results (default: demo-output)")  # fmt: skip
    demo.add_argument("--rounds", type=at_least(1), default=6, help="training rounds (default: 6)")
    demo.add_argument("--local-only", action="store_true",
                      help="each device also trains alone, to compare; twice as long")  # fmt: skip
    compare = commands.add_parser(
        "compare", help="several methods on the same devices, data and seed: a table and a picture"
    )
    compare.add_argument("--out", type=Path, default=Path("compare-output"), metavar="FOLDER",
                      help="for logs, state and results (default: compare-output)")  # fmt: skip
    compare.add_argument(
        "--rounds", type=at_least(1), default=4, help="training rounds (default: 4)"
    )
    compare.add_argument(
        "--methods", default="", metavar="A,B,...", help="names as in run.toml (default: all)"
    )
    capped = commands.add_parser(
        "capped", help="boards capped by the kernel: planned, against all at the smallest rank"
    )
    capped.add_argument("--out", type=Path, default=Path("capped-output"), metavar="FOLDER",
                      help="for logs, state and results (default: capped-output)")  # fmt: skip
    capped.add_argument(
        "--rounds", type=at_least(1), default=6, help="training rounds (default: 6)"
    )
    study = commands.add_parser(
        "study", help="many simulated runs by design: what they say, how surely (docs/studies.md)"
    )
    study.add_argument("name", choices=("compression-fairness", "methods", "rank-shift"))
    study.add_argument("--config", type=Path, metavar="study.toml",
                       help="the study's settings (default: as shipped)")  # fmt: skip
    study.add_argument("--out", type=Path, required=True, metavar="FOLDER",
                       help="for runs and report; a study that was stopped goes on")  # fmt: skip
    study.add_argument("--jobs", type=at_least(1), default=2, help="worker processes (default: 2)")
    study.add_argument("--quick", action="store_true", help="the shipped quick settings")
    study.add_argument("--data", type=Path, metavar="FOLDER",
                       help="rank-shift: the folder of the labelled files, as GLUE's")  # fmt: skip
    chaos = commands.add_parser(
        "chaos", help="a run under random faults, which must end as one that is left alone"
    )
    chaos.add_argument("--faults", type=at_least(0), default=200, help="how many (default: 200)")
    chaos.add_argument(
        "--rounds", type=at_least(1), default=20, help="training rounds (default: 20)"
    )
    chaos.add_argument(
        "--seed", type=at_least(0), default=1, help="of the faults and the run (default: 1)"
    )
    chaos.add_argument("--out", type=Path, default=Path("chaos-output"), metavar="FOLDER",
                      help="for logs, state and results (default: chaos-output)")  # fmt: skip
    attacks = commands.add_parser(
        "attacks", help="hostile devices under every robust merge: a table (docs/security.md)"
    )
    attacks.add_argument("--out", type=Path, required=True, metavar="FOLDER",
                         help="for runs and report; a table that was stopped goes on")  # fmt: skip
    attacks.add_argument(
        "--quick",
        action="store_true",
        help="two of ten hostile, no rule against what is recommended",
    )
    for command in (demo, compare):
        command.add_argument(
            "--data", action="append", default=[], metavar="NAME=FOLDER", help=OWN_DATA
        )
    add_common(parser, commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return perform(
        "sketchfleet-trial",
        lambda: _command(make_parser().parse_args(argv)),
        extra="trial",
        packages=OWN_PACKAGES,
    )


def _command(args: argparse.Namespace) -> int:
    if "perform" in args:
        return int(args.perform(args))
    if args.command == "run":
        from trials.run import run_trial

        return run_trial(args.fleet, args.out, args.remote)
    if args.command == "plot":
        from trials.trial_report import plot as plot_trials

        with progress("reading and drawing"):
            told = plot_trials(args.folders, args.out)
        print(told)
        return 0
    if args.command == "chaos":
        from trials.chaos import chaos as run_chaos

        return run_chaos(args.out, args.faults, args.rounds, args.seed)
    if args.command == "demo":
        from trials.demo import demo as run_demo

        return run_demo(args.out, args.rounds, args.data, local_only=args.local_only)
    if args.command == "study":
        from trials.study.command import study as run_study

        return run_study(args.name, args.config, args.out, args.jobs, args.quick, args.data)
    if args.command == "attacks":
        from trials.attacks_report import attacks as run_attacks

        return run_attacks(args.out, args.quick)
    if args.command == "capped":
        from trials.capped import capped as run_capped

        return run_capped(args.out, args.rounds)
    from trials.compare import compare as run_compare

    methods = [name.strip() for name in args.methods.split(",") if name.strip()]
    return run_compare(args.out, methods, args.rounds, args.data)


if __name__ == "__main__":
    sys.exit(main())
