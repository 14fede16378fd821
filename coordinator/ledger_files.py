"""The ledger as a file, Parquet or CSV, and back.

Knows columns and formats; what the rows mean is `ledger_types`. Columns are the fields of
`LedgerRow`, after the run's name; lists of a CSV are separated by spaces, and what was not measured
is empty there and null in Parquet.
"""

from __future__ import annotations

import csv
import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from coordinator.ledger_types import LedgerRow
from profiles.errors import MissingExtraError, SketchfleetError
from profiles.files import replacing

Row = dict[str, Any]
SUFFIXES = (".parquet", ".csv")


class LedgerFileError(SketchfleetError):
    """A file that is no ledger, or a name that says neither format."""


def write_ledger(path: Path, run_id: str, rows: Iterable[LedgerRow]) -> int:
    """Writes rows to `path`, by its suffix .parquet or .csv; returns how many.

    The file appears whole or not at all. Raises `LedgerFileError`, and `MissingExtraError` for
    Parquet without pyarrow.
    """
    plain = [{"run_id": run_id, **dataclasses.asdict(row)} for row in rows]
    if _suffix(path) == ".parquet":
        write_parquet(path, _schema(), plain)
        return len(plain)
    with _replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["run_id", *_hints()])
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in plain)
    return len(plain)


def read_ledger(path: Path) -> dict[str, tuple[LedgerRow, ...]]:
    """Rows by run, as they were written. Raises `LedgerFileError`, `MissingExtraError`."""
    hints = _hints()
    if _suffix(path) == ".parquet":
        rows = read_parquet(path, _schema())
    else:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                _require(path, {"run_id", *hints}, reader.fieldnames or ())
                rows = [
                    {"run_id": row["run_id"], **{n: _value(row[n], hints[n]) for n in hints}}
                    for row in reader
                ]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise LedgerFileError(f"{path} cannot be read: {error}") from error
    found: dict[str, list[LedgerRow]] = {}
    try:
        for row in rows:
            found.setdefault(row.pop("run_id"), []).append(_adapter().validate_python(row))
    except ValidationError as error:
        first = error.errors()[0]
        raise LedgerFileError(f"{path}: {first['loc'][0]}: {first['msg'].lower()}") from error
    return {run_id: tuple(of) for run_id, of in found.items()}


def write_parquet(path: Path, schema: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows under a pyarrow schema. The file appears whole or not at all."""
    arrow, parquet = _arrow()
    table = arrow.Table.from_pylist(list(rows), schema=schema)
    with _replacing(path) as temporary:
        parquet.write_table(table, temporary)


def read_parquet(path: Path, schema: Any) -> list[Row]:
    """The columns of a schema, as they were written. Raises `LedgerFileError`."""
    arrow, parquet = _arrow()
    try:
        table = parquet.read_table(path)
    except (OSError, arrow.ArrowException) as error:
        raise LedgerFileError(f"{path} cannot be read: {error}") from error
    _require(path, schema.names, table.column_names)
    rows: list[Row] = table.select(schema.names).to_pylist()
    return rows


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    return pyarrow, parquet


@cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(LedgerRow)


@cache
def _adapter() -> TypeAdapter[LedgerRow]:
    return TypeAdapter(LedgerRow)


def _schema() -> Any:
    """Of `LedgerRow` and the run's name, in pyarrow's types."""
    arrow, _ = _arrow()
    kinds = {str: arrow.string(), int: arrow.int64(), float: arrow.float64(), bool: arrow.bool_()}

    def kind(hint: Any) -> Any:
        if typing.get_origin(hint) is tuple:
            return arrow.list_(kinds[typing.get_args(hint)[0]])
        return kinds[_plain(hint)]

    columns = [(name, kind(hint)) for name, hint in _hints().items()]
    return arrow.schema([("run_id", arrow.string()), *columns])


def _plain(hint: Any) -> Any:
    """The type of a field that may be None."""
    inner = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return inner[0] if inner else hint


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _value(text: str, hint: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        return text.split()
    return None if text == "" and _plain(hint) is not hint else text


def _suffix(path: Path) -> str:
    if path.suffix.lower() not in SUFFIXES:
        raise LedgerFileError(
            f"{path} is neither .parquet nor .csv; end the name in the format you want"
        )
    return path.suffix.lower()


def _require(path: Path, wanted: Iterable[str], found: Iterable[str]) -> None:
    if missing := sorted(set(wanted) - set(found)):
        raise LedgerFileError(f"{path} lacks {missing[0]}; it was written by another version")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """As `replacing`. Raises `LedgerFileError`."""
    try:
        with replacing(path) as draft:
            yield draft
    except OSError as error:
        raise LedgerFileError(
            f"{path} cannot be written ({error.strerror}); choose another place"
        ) from error
