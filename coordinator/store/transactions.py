"""Transactions on the coordinator's database, which calls on one thread share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from coordinator.store.database import open_database
from protos import faults
from protos.transfer import make_folder


class Transactions:
    """The database at `path`, made if it is not there. Raises `StoreError`."""

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self.path = path
        self._engine = open_database(path)
        self._own = threading.local()  # db: this thread's transaction over several methods

    @contextmanager
    def transaction(self) -> Iterator[sql.Connection]:
        """One transaction, which all methods called within share: all of it or nothing."""
        shared: sql.Connection | None = getattr(self._own, "db", None)
        if shared is not None:
            yield shared
            return
        faults.point("db")
        with self._engine.begin() as db:
            self._own.db = db
            try:
                yield db
            finally:
                del self._own.db

    def together(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Calls of methods as one transaction: what each returned, or the exception it raised.

        Where one fails, each is a transaction of its own.
        """
        try:
            with self.transaction():
                return [call() for call in calls]
        except Exception:  # noqa: BLE001 - it comes again, of the call that it belongs to
            return [_outcome(call) for call in calls]

    def close(self) -> None:
        """Releases the database file."""
        self._engine.dispose()


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - handed to whoever asked for it
        return error
