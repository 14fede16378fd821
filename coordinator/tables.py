"""Tables for terminals; one look for every command."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """A table whose cells keep their own line breaks."""
    made = Table(box=box.SIMPLE_HEAD, title=title or None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        made.add_column(column, overflow="fold")  # nothing is hidden in a narrow terminal
    for row in rows:
        made.add_row(*row)
    return made
