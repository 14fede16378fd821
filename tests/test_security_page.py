"""docs/security.md says what the code does, and every promise on it has a test that exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from coordinator import connections, dialling, limits, service, throttle
from coordinator.config import LimitsSection
from coordinator.joining_service import MOST_REQUEST_BYTES
from edge_agent.link import LONGEST_AWAY_S
from protos.transfer import MAX_MESSAGE_BYTES

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs/security.md").read_text()


@cache
def functions_of(path):
    """Names of the functions of a file."""
    return {node.name for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}  # fmt: skip


def test_every_test_that_holds_a_promise_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) > 20
    missing = [f"{path}::{name}" for path, name in named
               if not (ROOT / path).is_file() or name not in functions_of(ROOT / path)]  # fmt: skip
    assert not missing


def test_every_promise_has_a_test():
    rows = []
    for table in re.findall(r"\| promise \| held by \|\n\|---\|---\|\n((?:\|.*\|\n)+)", TEXT):
        rows += table.splitlines()
    assert len(rows) > 15
    assert not [row for row in rows if "::test_" not in row]


def test_no_section_was_left_empty():
    marked = re.findall(r"<!-- ([\w-]+) begin -->\n(.*?)<!-- \1 end -->", TEXT, re.DOTALL)
    assert len(marked) >= 6
    assert not [name for name, content in marked if not content.strip()]


def test_the_limits_on_the_page_are_those_of_the_code():
    shown = dict(
        re.findall(r"^\| ([^|]+?) \| ([^|]+?) \| [^|]+ \|$", TEXT[TEXT.index("## Limits") :], re.M)
    )
    calls, options = limits.CALLS, dict(service.SERVER_OPTIONS)

    def rate(per_s, burst):
        return f"{per_s:g} a second, {burst:g} at once"

    most = ("NextTask", "Report", "Renew", "Probe", "Fetch", "Push")
    in_all = ("Probe", "Fetch", "Push", "Report", "Renew", "Enroll")
    expected = {
        "a file's bytes over the link, either way":
            f"{limits.TRIES} times its size and 1 MiB, whole again in an hour",
        f"calls; a probe counts as {calls['Probe'].counts:g}":
            rate(limits.CALLS_PER_S, limits.CALLS_BURST),
        "calls beyond these": rate(limits.OVER_PER_S, limits.OVER_BURST),
        "messages in its streams": rate(limits.MESSAGES_PER_S, limits.MESSAGES_BURST),
        "a stream without a message": f"{throttle.SILENT_S:g} s",
        "calls on a connection": str(options["grpc.max_concurrent_streams"]),
        "a message": f"{MAX_MESSAGE_BYTES >> 20} MiB; one to join {MOST_REQUEST_BYTES >> 10} KiB",
        "calls to join": rate(limits.STRANGERS_PER_S, limits.STRANGERS_BURST),
        "calls that are turned away (revoked, unknown, wrong token)":
            rate(limits.REFUSALS_PER_S, limits.REFUSALS_BURST),
        "a connection without a call that was let in": f"{connections.ANONYMOUS_S:g} s",
        "bytes of such a connection": f"{connections.STRANGE_BYTES >> 10} KiB",
        "new connections": rate(dialling.DIALS_PER_S, dialling.DIALS_BURST),
        "bytes of its connections that are in no message of a call that was let in":
            f"{limits.NOISE_PER_S / 1024:g} KiB a second, {limits.NOISE_IN_BURST / 2**20:g} MiB at "
            f"once coming and {limits.NOISE_OUT_BURST / 2**20:g} MiB going, a tenth of messages' "
            f"own bytes and {limits.NOISE_BACK:.0%} of those the other way".replace("2%", "2 %"),
        "the disk": f"`[limits] disk_share = {LimitsSection().disk_share:g}` of it, or "
                    f"{limits.MOST_SPARE_BYTES >> 30} GiB left",
    }  # fmt: skip
    assert {key: shown.get(key) for key in expected} == expected
    assert ", ".join(f"{name} {calls[name].at_once}" for name in most) in TEXT
    assert ", ".join(f"{name} {calls[name].in_all}" for name in in_all) in TEXT
    assert f"not heard for {limits.FLOOD_S:g} s" in TEXT
    assert f"counts as {dialling.LOUD_DIALS} new ones" in TEXT
    assert f"up to {dialling.SHUT_OUT_S:g} s at a time" in TEXT and limits.NOISE_SHARE == 0.1
    assert limits.REFILL_S == 3600 and LONGEST_AWAY_S == 300
    assert LimitsSection().mb_per_day is None
    assert f"| connections | {connections.MOST_OF_DEVICE} |" in TEXT
    assert f"| connections | {connections.MOST_CONNECTIONS}," in TEXT
