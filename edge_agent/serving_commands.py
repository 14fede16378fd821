"""`sketchfleet-agent serve`: the completions endpoint, on the newest adapter held here."""

from __future__ import annotations

import argparse
from typing import Any


def add_commands(commands: Any, settled: argparse.ArgumentParser) -> None:
    """Registers `serve`. settled: --config and --set."""
    serve = commands.add_parser(
        "serve",
        parents=[settled],
        help="complete code over HTTP, always on the newest adapter held here",
        description="Serves an OpenAI-compatible completions endpoint (docs/serving.md) from a "
        "base that export-base wrote, always on the newest adapter that this device holds.",
    )
    serve.add_argument(
        "--model", metavar="FOLDER", help="what export-base wrote (default: [serve] model)"
    )
    serve.add_argument(
        "--listen", metavar="ADDRESS:PORT", help="default: [serve] listen, else 127.0.0.1:8765"
    )
    serve.set_defaults(perform=_serve)


def _serve(args: argparse.Namespace) -> int:
    from pathlib import Path

    from edge_agent.config import load_agent_config
    from edge_agent.serving import serve
    from profiles.events import set_up_logging

    above = list(args.set)
    if args.model is not None:
        above.append(f"serve.model={Path(args.model).expanduser().resolve()}")
    if args.listen is not None:
        above.append(f"serve.listen={args.listen}")
    config = load_agent_config(args.config, above)
    set_up_logging(config.log.format, config.log.level)
    return serve(config)
