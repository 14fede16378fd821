"""Commands of the coordinator about it as a service: healthcheck, config."""

from __future__ import annotations

import argparse
import http.client
from typing import Any

from profiles.errors import SketchfleetError
from profiles.program import above_zero, add_config, show_settings

ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - listened on, asked at loopback
MOST_BYTES = 4096


class UnhealthyError(SketchfleetError):
    """The coordinator does not answer, or says that it is not well."""


def add_commands(commands: Any, settled: argparse.ArgumentParser) -> None:
    """Registers them. settled: the parent with --config and --set."""
    check = commands.add_parser(
        "healthcheck", parents=[settled],
        help="ask the coordinator of this machine whether it is well",
        description="Asks /healthz at [web] listen: ends with 0 when the coordinator and its "
        "database answer, else with 1 and why.",
    )  # fmt: skip
    check.add_argument("--timeout", type=above_zero, default=5.0, metavar="S",
                       help="how long to wait for the answer, seconds (default: 5)")  # fmt: skip
    check.set_defaults(perform=_healthcheck)
    add_config(commands, settled, "SKETCHFLEET_COORDINATOR").set_defaults(perform=_config)


def _healthcheck(args: argparse.Namespace) -> int:
    from coordinator.server_config import find_run_toml, load_service
    from profiles.settings import host_of

    listen = load_service(find_run_toml(args.config), args.set).web.listen
    if not listen:
        raise UnhealthyError(
            'nobody can be asked, for [web] listen is ""; set it to an address of this machine'
        )
    host, port = host_of(listen), int(listen.rpartition(":")[2])
    connection = http.client.HTTPConnection(ANYWHERE.get(host, host), port, timeout=args.timeout)
    try:
        connection.request("GET", "/healthz", headers={"Connection": "close"})
        answer = connection.getresponse()
        said = answer.read(MOST_BYTES).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        raise UnhealthyError(
            f"no coordinator answers at {listen} ({error or type(error).__name__}); see whether it "
            "runs, and its log"
        ) from error
    finally:
        connection.close()
    if answer.status != http.HTTPStatus.OK:
        raise UnhealthyError(f"the coordinator at {listen} is not well: {said}; see its log")
    print(said)
    return 0


def _config(args: argparse.Namespace) -> int:
    from coordinator.config import load_layers
    from coordinator.server_config import find_run_toml

    return show_settings(load_layers(find_run_toml(args.config), args.set), args)
