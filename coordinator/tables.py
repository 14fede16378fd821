"""Tables for terminals; one look for every command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

UNFOLDED = 10_000  # columns; for programs and pagers a row is a line


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leaves it to `profiles.program`: that `head` has seen enough is no error."""
        raise BrokenPipeError


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """A table whose cells keep their own line breaks."""
    made = Table(box=box.SIMPLE_HEAD, title=title or None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        made.add_column(column, overflow="fold")  # nothing is hidden in a narrow terminal
    for row in rows:
        made.add_row(*row)
    return made


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str | None = None
) -> None:
    """Prints it as wide as the terminal; each row as a card where words would be cut in two.

    empty: what to say instead where there are no rows.

    Colour and the like: as NO_COLOR, FORCE_COLOR and TERM say, and at a terminal alone.
    """
    folds = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = _Console(width=None if folds else UNFOLDED)
    if empty is not None and not rows:
        console.print(empty, highlight=False, markup=False)
        return
    made = table(columns, [[escape(cell) for cell in row] for row in rows])
    unbounded = console.options.update(max_width=UNFOLDED)
    if Measurement.get(console, unbounded, made).minimum <= console.width:
        console.print(made)
        return
    head = max(map(len, columns))
    for row in rows:
        for column, cell in zip(columns, row, strict=True):
            console.print(f"{column:<{head}}  {cell}", highlight=False, markup=False)
        console.print()
