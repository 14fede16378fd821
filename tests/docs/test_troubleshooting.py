"""Every message that the troubleshooting page quotes is one that the code gives."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/troubleshooting.md"


def text_of(node: ast.expr) -> str | None:
    """A string in the code, with a gap where it takes a value."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(v.value if isinstance(v, ast.Constant) else "\0" for v in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return f"{text_of(left) or chr(0)}{text_of(right) or chr(0)}"
    return None


@cache
def messages() -> frozenset[str]:
    found = set()
    for package in ("coordinator", "edge_agent", "profiles", "protos"):
        for path in (ROOT / package).rglob("*.py"):
            if not path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, ast.expr) and (text := text_of(node)):
                        found.add(text)
    return frozenset(found)


def quotes() -> list[str]:
    rows = re.findall(r"^\| (.*?) \|", PAGE.read_text(), re.MULTILINE)
    return [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)
            if " " in quote and not quote.startswith("sketchfleet-")]  # fmt: skip


def test_every_message_that_is_quoted_is_given_by_the_code():
    found = quotes()
    assert len(found) > 30
    patterns = {quote: re.compile(".*".join(re.escape(part.strip()) for part in quote.split("…")),
                                  re.DOTALL) for quote in found}  # fmt: skip
    lost = [q for q, pattern in patterns.items() if not any(map(pattern.search, messages()))]
    assert not lost
