"""A Hugging Face dataset, by its name or as a local folder -> its data files by split.

Knows how datasets name their files ("data/train-00000-of-00003.parquet", "train.jsonl",
"test/0.parquet") and the hub's cache. It runs no dataset's code and reads no file: `records` does.
The `datasets` package is not needed.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from edge_agent.training.documents import CorpusError
from edge_agent.training.records import is_jsonl
from profiles.errors import MissingExtraError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def dataset_files(dataset: str, revision: str, folder: str, split: str) -> list[Path]:
    """The JSONL and Parquet files of one split, in the order of their names.

    dataset: a local folder, or "owner/name" on the hub, of which only these files are fetched;
    without a connection what was fetched before is taken. revision: of the hub's; "" is the
    newest. folder: only files below it; "" is all. split: as it stands in the names.

    Raises `CorpusError` when there is none, `MissingExtraError` without huggingface_hub.
    """
    local = Path(dataset).expanduser()
    root = local if local.is_dir() else _from_hub(dataset, revision, folder, split)
    below = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    data = [name for name in below if _is_data(name)]
    found = _of_split(data, folder, split)
    if not found:
        raise _nothing(dataset, folder, split, data)
    return [root / name for name in found]


def _nothing(dataset: str, folder: str, split: str, data: list[str]) -> CorpusError:
    seen = ", ".join(data[:8]) + (", ..." if len(data) > 8 else "") or "none"
    where = f" below {folder!r}" if folder else ""
    return CorpusError(
        f"dataset {dataset} has no JSONL or Parquet files of split {split!r}{where} (its data "
        f"files: {seen}); correct dataset_split or dataset_folder under [data]"
    )


def _is_data(name: str) -> bool:
    path = PurePosixPath(name)
    # A dataset's own description of itself is JSON too.
    plain = path.name in ("dataset_infos.json", "dataset_info.json", "state.json")
    hidden = any(part.startswith(".") for part in path.parts)
    return (path.suffix == ".parquet" or is_jsonl(Path(name))) and not plain and not hidden


def _of_split(names: Iterable[str], folder: str, split: str) -> list[str]:
    """Those with the split as a word of their name, or of a folder's."""
    word = re.compile(rf"(^|[/._-]){re.escape(split)}([/._-]|$)")
    prefix = folder.strip("/") + "/" if folder else ""
    return [
        name
        for name in names
        if _is_data(name) and name.startswith(prefix) and word.search(name.removeprefix(prefix))
    ]


def _from_hub(dataset: str, revision: str, folder: str, split: str) -> Path:
    """The folder of the hub's cache with these files of a dataset, fetched where they are not."""
    if not HUB_NAME.fullmatch(dataset):
        raise CorpusError(
            f"dataset {dataset!r} is neither a folder here nor a name like owner/name; correct "
            "[data] dataset"
        )
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "train") from error
    from_hub: dict[str, Any] = {"repo_type": "dataset", "revision": revision or None}
    try:
        names = HfApi().list_repo_files(dataset, **from_hub)
    except Exception:  # noqa: BLE001 - the hub client raises many unrelated types when offline
        names = None
    if names is not None and not _of_split(names, folder, split):
        raise _nothing(dataset, folder, split, [name for name in names if _is_data(name)])
    try:
        if names is None:
            return Path(snapshot_download(dataset, local_files_only=True, **from_hub))
        patterns = [glob.escape(name) for name in _of_split(names, folder, split)]
        return Path(snapshot_download(dataset, allow_patterns=patterns, **from_hub))
    except Exception as error:
        raise CorpusError(
            f"dataset {dataset!r} is neither a folder here nor to be had from the hub "
            f"({type(error).__name__}); check the name, the connection and, if it is gated, "
            "HF_TOKEN"
        ) from error
