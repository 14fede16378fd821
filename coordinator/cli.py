"""sketchfleet-coordinator: its commands. Light until a command runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator import (
    identity_commands,
    operation_commands,
    plan_commands,
    screening_commands,
    service_commands,
)
from profiles.program import add_common, at_least, perform, settings_options
from profiles.progress import progress
from protos.export_options import add_export_options

if TYPE_CHECKING:
    from coordinator.store.blobs import BlobStore
    from coordinator.store.records import Records

OWN_PACKAGES = frozenset(
    (
        "alembic",
        "jinja2",
        "prometheus_client",
        "rich",
        "safetensors",
        "sqlalchemy",
        "starlette",
        "uvicorn",
    )
)  # of the coordinator's extra


def make_parser() -> argparse.ArgumentParser:
    """Every command and option of the program."""
    parser = argparse.ArgumentParser(
        prog="sketchfleet-coordinator",
        description="Assigns, merges and measures federated LoRA rounds over a fleet of devices.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    settled = settings_options("run.toml")
    serve = commands.add_parser(
        "serve", parents=[settled], help="serve the run described by run.toml until it ends"
    )
    serve.add_argument(
        "--replay", type=Path, metavar="FILE",
        help="use these recorded plans (from `runs NAME --plans`) instead of planning",
    )  # fmt: skip

    kept = argparse.ArgumentParser(add_help=False)
    kept.add_argument("--state", type=Path, metavar="FOLDER",
                      help="the coordinator's state (default: [server] state as `serve` here "
                      "would have it)")  # fmt: skip
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON")

    commands.add_parser("devices", parents=[kept, as_json], help="enrolled devices and profiles")
    runs = commands.add_parser("runs", parents=[kept, as_json], help="runs, or one run's rounds")
    runs.add_argument("run", nargs="?", help="name of a run")
    runs.add_argument("--plans", action="store_true", help="print the run's plans for --replay")
    report = commands.add_parser(
        "report", parents=[kept, as_json], help="per-device table and fairness of a run"
    )
    report.add_argument("run", help="name of the run")
    report.add_argument(
        "--out", type=Path, metavar="FILE",
        help="write the whole report, with plots, to FILE.html, FILE.md or FILE.json",
    )  # fmt: skip
    ledger = commands.add_parser(
        "ledger", parents=[kept], help="write a row per device and round of a run as a file"
    )
    ledger.add_argument("run", help="name of the run")
    ledger.add_argument("--out", type=Path, required=True, metavar="FILE.parquet|.csv",
                        help="where to; the ending says which format")  # fmt: skip
    dashboard = commands.add_parser(
        "dashboard", parents=[kept], help="show a run that nobody serves in the browser"
    )
    dashboard.add_argument("run", help="name of the run")
    dashboard.add_argument("--listen", default="127.0.0.1:9464", metavar="ADDRESS:PORT",
                           help="of this machine alone (default: 127.0.0.1:9464)")  # fmt: skip
    export = commands.add_parser(
        "export", parents=[kept], help="write the model of any round for PEFT, llama.cpp or merged"
    )
    export.add_argument("run", help="name of the run")
    export.add_argument(
        "--round", type=at_least(0), help="after so many rounds (default: the latest)"
    )
    add_export_options(export)
    plan_commands.add_commands(commands, as_json)
    identity_commands.add_commands(commands, kept, as_json)
    operation_commands.add_commands(commands, kept, as_json)
    screening_commands.add_commands(commands, kept, as_json)
    service_commands.add_commands(commands, settled)
    add_common(parser, commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return perform(
        "sketchfleet-coordinator", lambda: _command(make_parser().parse_args(argv)),
        extra="coordinator", packages=OWN_PACKAGES,
    )  # fmt: skip


def _command(args: argparse.Namespace) -> int:
    if getattr(args, "state", args) is None:
        from coordinator.server_config import usual_state

        args.state = usual_state()
    if "perform" in args:
        return int(args.perform(args))
    return int({"serve": _serve, "devices": _devices, "runs": _runs, "report": _report,
                "ledger": _ledger, "dashboard": _dashboard, "export": _export,
               }[args.command](args))  # fmt: skip


def _serve(args: argparse.Namespace) -> int:
    from coordinator.config import load_layers
    from coordinator.server_config import find_run_toml

    config = load_layers(find_run_toml(args.config), args.set).settings
    import asyncio
    import os

    # gRPC's own line about a port in use would stand before our sentence; read when it is loaded.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")

    from coordinator.serve import load_recorded, serve
    from profiles.events import set_up_logging

    recorded = None if args.replay is None else load_recorded(args.replay)
    set_up_logging(config.log.format, config.log.level)
    asyncio.run(serve(config, recorded))
    return 0


def _open(state: Path) -> tuple[Records, BlobStore]:
    from coordinator.serve import ServeError, open_state

    if not (state / "coordinator.sqlite").is_file():
        raise ServeError(
            f"{state} is not a coordinator's state folder; pass the [server] state of run.toml "
            "as --state"
        )
    return open_state(state)


def _devices(args: argparse.Namespace) -> int:
    from profiles.progress import duration_words
    from protos.contract import to_plain

    records, _ = _open(args.state)
    devices, known = records.all_devices(), identity_commands.standing(records)
    if args.json:
        plain = [{**to_plain(d), **known.get(d.device_id, {})} for d in devices]
        print(json.dumps(plain, indent=2))
        return 0
    rows = []
    for d in devices:
        p = d.profile
        rows.append([
            d.device_id,
            p.board if p else "-",
            f"{p.trainer_bytes / 1e9:.2f} GB" if p else "-",
            f"{p.compute.tokens_per_s:,.0f} tok/s" if p and p.compute else "-",
            f"{p.link.up_bps / 1e6:.2f} / {p.link.down_bps / 1e6:.2f} Mbit/s"
            if p and p.link else "-",
            f"{duration_words(time.time() - d.last_seen_at)} ago",
            identity_commands.standing_words(known.get(d.device_id), time.time()),
        ])  # fmt: skip
    _table(("device", "board", "for training", "compute", "up / down", "seen", "identity"), rows,
           "no device has joined yet; `token create` makes what one joins with")  # fmt: skip
    return 0


def _runs(args: argparse.Namespace) -> int:
    from coordinator.issuing import recorded_plans
    from coordinator.report import build_report

    records, _ = _open(args.state)
    if args.run is None:
        runs = records.all_runs()
        plain = [{"run_id": r.run_id, "base": r.spec.base, "rank": r.spec.rank,
                  "method": r.config["method"]["name"], "finished": r.finished_at is not None,
                  "rounds": len(records.all_rounds(r.run_id))} for r in runs]  # fmt: skip
        if args.json:
            print(json.dumps(plain, indent=2))
        else:
            _table(tuple(plain[0]) if plain else (),
                   [[str(v) for v in r.values()] for r in plain],
                   "no run was served from here yet")  # fmt: skip
        return 0
    with progress("reading the run"):
        report = build_report(records, args.run)
    if args.plans:
        print(json.dumps(recorded_plans(records.assignments(args.run)), indent=1))
    elif args.json:
        print(json.dumps(report.plain()["rounds"], indent=2))
    else:
        _table(
            ("round", "phase", "seconds", "merge s", "aggregation error", "worst layer", "late"),
            [[str(r["round"]), r["phase"] + (" (evaluation)" if r["evaluate_only"] else ""),
              _number(r["seconds"], ".1f"), _number(r["merge_s"], ".3f"),
              _number(r["aggregation_error"], ".2e"),
              _number(max(r["aggregation_errors"].values(), default=None), ".2e"),
              str(len(r["late"]))]
             for r in report.rounds],
        )  # fmt: skip
    return 0


def _report(args: argparse.Namespace) -> int:
    from coordinator.phases import PHASE_COLUMNS, phase_table
    from coordinator.report import (
        DEVICE_COLUMNS,
        ERROR_COLUMNS,
        build_report,
        device_table,
        error_table,
        fairness_lines,
        reason_lines,
    )

    if args.out is not None:
        from coordinator.run_report import check_suffix, run_results, write_report

        check_suffix(args.out)
        with progress("writing the report"):
            write_report(run_results(_open(args.state)[0], args.run), args.out)
        print(args.out)
        return 0
    records, _ = _open(args.state)
    with progress("reading the run"):
        report = build_report(records, args.run)
    if args.json:
        print(json.dumps(report.plain(), indent=2))
        return 0
    _table(DEVICE_COLUMNS, device_table(report))
    if report.phases:
        print("\nSeconds by phase, bytes, and what the link gave of what the device estimates it:")
        _table(PHASE_COLUMNS, phase_table(report.phases))
    if errors := error_table(report):
        print("\nAggregation error of the last round, against the mean of the devices' products:")
        _table(ERROR_COLUMNS, errors)
    print("\n".join(["", *fairness_lines(report), "", *reason_lines(report)]))
    return 0


def _ledger(args: argparse.Namespace) -> int:
    from coordinator.ledger import ledger_rows
    from coordinator.ledger_files import write_ledger
    from coordinator.serve import ServeError

    records, _ = _open(args.state)
    if records.run(args.run) is None:
        known = ", ".join(run.run_id for run in records.all_runs()) or "none"
        raise ServeError(f"no run {args.run!r} here; runs kept: {known}")
    with progress("writing the ledger"):
        count = write_ledger(args.out, args.run, ledger_rows(records, args.run))
    print(f"{args.out}: {count} rows")
    return 0


def _dashboard(args: argparse.Namespace) -> int:
    from coordinator.web.app import make_app
    from coordinator.web.facts import FactReader
    from coordinator.web.server import WebError, WebServer
    from profiles.settings import host_of, is_loopback

    try:
        local = is_loopback(host_of(args.listen))
    except ValueError as error:
        raise WebError(f"--listen {args.listen} {error}") from error
    if not local:
        raise WebError(f"--listen {args.listen} can be reached from elsewhere; use 127.0.0.1")
    records, _ = _open(args.state)
    read = FactReader(records, args.run)
    read()
    server = WebServer(make_app(read, state=args.state), args.listen)
    print(f"{server.start()}/ until interrupted", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        server.stop()
        records.close()


def _export(args: argparse.Namespace) -> int:
    from coordinator.export import export_run
    from protos.export_options import ExportError, wanted_of

    wanted_form = wanted_of(args)
    records, blobs = _open(args.state)
    run = records.run(args.run)
    found = None if run is None else records.model(args.run, args.round)
    if run is None or found is None or args.round not in (None, found[0]):
        wanted = args.run if args.round is None else f"{args.run} after {args.round} rounds"
        raise ExportError(
            f"there is no adapter of run {wanted}; `sketchfleet-coordinator runs` lists what "
            "there is"
        )
    with progress("exporting the adapter"):
        written = export_run(run, found[0], found[1], blobs, wanted_form)
    print(written)
    return 0


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str | None = None) -> None:
    from coordinator.tables import print_table

    print_table(columns, rows, empty)


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
