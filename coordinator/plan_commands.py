"""The coordinator's `plan`: what a run would ask of a fleet that does not exist yet."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from profiles.progress import progress


def add_commands(commands: Any, as_json: argparse.ArgumentParser) -> None:
    """Registers it. as_json: the parent with --json."""
    plan = commands.add_parser(
        "plan", parents=[as_json], help="what a run would ask of a fleet that does not exist yet"
    )
    plan.add_argument(
        "--model", metavar="MODEL", help="a config.json, a model folder, or a known name"
    )
    fleet = plan.add_mutually_exclusive_group()
    fleet.add_argument("--fleet", type=Path, metavar="FILE", help="fleet.toml (docs/boards.md)")
    fleet.add_argument("--devices", metavar="WORDS", help='"12 orin-nano-8gb on lte, 4 rtx-4090 '
                       'on fibre"')  # fmt: skip
    plan.add_argument("--run", type=Path, metavar="FILE", help="run.toml (default: its defaults)")
    plan.add_argument("--picture", type=Path, metavar="PNG", help="also draw time and memory")
    plan.add_argument("--list", action="store_true", help="known boards, links and models")
    plan.set_defaults(perform=_plan)


def _plan(args: argparse.Namespace) -> int:
    from coordinator import what_if_report as words
    from coordinator.config import RunConfig, load_config
    from coordinator.tables import print_table
    from coordinator.what_if import WhatIfError, what_if
    from coordinator.what_if_fleet import parse_fleet, read_fleet
    from profiles.models import find_model

    if args.list:
        return _list(args.json)
    config = None if args.run is None else load_config(args.run)
    wanted = args.model or (config.model.base if config else None)
    if wanted is None:
        raise WhatIfError("no model to plan for; give --model, or --run with a [model] base")
    if args.fleet is None and args.devices is None:
        raise WhatIfError(
            'no fleet to plan for; give --fleet, or --devices "12 orin-nano-8gb on lte"'
        )
    model, shape = find_model(wanted)
    if config is None:
        config = RunConfig.model_validate({"run": {"name": "plan"}, "model": {"base": model}})
    groups = read_fleet(args.fleet) if args.devices is None else parse_fleet(args.devices)
    with progress(f"planning for {sum(group.count for group in groups)} devices"):
        found = what_if(model, shape, config, groups)
    if args.picture is not None and found.devices:
        from coordinator.what_if_picture import plan_picture

        plan_picture(found, args.picture)
    if args.json:
        print(json.dumps(words.plain(found), indent=2))
        return 0 if found.devices else 1
    print(words.headline(found), end="\n\n")
    if found.devices:
        print_table(words.GROUP_COLUMNS, words.group_table(found))
        if budgets := words.budget_table(found):
            print()
            print_table(words.BUDGET_COLUMNS, budgets)
        print("\n".join(["", *words.round_lines(found), ""]))
        print_table(words.DAY_COLUMNS, words.day_table(found))
        print("\n".join([*words.allowance_lines(found), "", "What binds:",
                         *words.reason_lines(found)]))  # fmt: skip
    if left_out := words.left_out_lines(found):
        print("\n".join(["", "Left out:", *left_out]))
    if args.picture is not None and found.devices:
        print(f"\n{args.picture}")
    if not found.devices:
        raise WhatIfError("no device can take part in a round; the reasons are above")
    return 0


def _list(as_json: bool) -> int:
    """Shows the catalogues."""
    from coordinator import what_if_report as words
    from coordinator.tables import print_table
    from profiles.boards import load_boards
    from profiles.links import load_links
    from profiles.models import load_models
    from protos.contract import to_plain

    if as_json:
        print(json.dumps({
            "boards": to_plain(list(load_boards().values())),
            "links": to_plain(list(load_links().values())),
            "models": to_plain(list(load_models().values())),
        }, indent=2))  # fmt: skip
        return 0
    print_table(words.BOARD_COLUMNS, words.board_table())
    print_table(words.LINK_COLUMNS, words.link_table())
    print_table(words.MODEL_COLUMNS, words.model_table())
    return 0
