"""Plays the runs of a study in worker processes, and finds them again after a stop.

Every finished run is one JSON file named by its key, written whole or not at all: whatever ends the
study loses only the runs in progress. It knows neither designs nor statistics.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from profiles.settings import Section
from trials.study.design import RunFacts
from trials.study.playing import Player, Point, RunRecord
from trials.study.settings import StudyError, StudySettings

SETTINGS = "study.json"
MEMORY = Path("/dev/shm")  # noqa: S108 - scratch of runs: files that live for seconds

Told = Callable[[str], None]


def play_all(
    settings: StudySettings, runs: Sequence[RunFacts], out: Path, jobs: int, told: Told
) -> dict[str, RunRecord]:
    """Finished records by key; plays what `out` lacks. Raises `StudyError`."""
    claim(settings, out)
    folder = out / "runs"
    folder.mkdir(exist_ok=True)
    missing = [run for run in runs if not (folder / f"{run.key}.json").is_file()]
    told(f"{len(runs)} runs, {len(runs) - len(missing)} of them found finished in {out}")
    began = time.monotonic()
    with Workers(jobs) as workers:
        for done, cell in enumerate(workers.play(missing, folder), 1):
            past = time.monotonic() - began
            left = past / done * (len(missing) - done)
            told(f"{done}/{len(missing)} {cell} ({past / 60:.1f} min, about {left / 60:.1f} left)")
    return {run.key: read_record(folder / f"{run.key}.json") for run in runs}


def claim(settings: Section, out: Path) -> None:
    """Makes `out` this study's. Raises `StudyError` when it is another's.

    Its design may grow and how results are analysed may change, since every run is named by all
    that decides it; what the runs have in common may not.
    """
    out.mkdir(parents=True, exist_ok=True)
    asked = settings.model_dump(mode="json", exclude={"analysis", "link"})
    kept = out / SETTINGS
    if kept.is_file():
        began = json.loads(kept.read_text())
        if {**began, "design": None} != {**asked, "design": None}:
            raise StudyError(
                f"{out} holds a study with other settings ({SETTINGS}); give another --out, or the "
                "settings it began with"
            )
    elif any(out.iterdir()):
        raise StudyError(f"{out} is not empty and holds no study; give another --out")
    write_whole(kept, json.dumps(asked, indent=1))


class Workers:
    """Worker processes, each with a base of its own and one thread.

    begin: called once in each with its scratch folder; play: plays a run and writes its record
    into a folder. Functions of a module, for other runs than `RunFacts`.
    """

    def __init__(
        self, jobs: int, begin: Callable[[Path], None] | None = None,
        play: Callable[[Any, Path], None] | None = None,
    ) -> None:  # fmt: skip
        self._jobs, self._begin, self._one = jobs, begin or _begin, play or _play

    def __enter__(self) -> Workers:
        place = MEMORY if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else None
        self._scratch = Path(tempfile.mkdtemp(prefix="sketchfleet-study-", dir=place))
        context = multiprocessing.get_context("spawn")
        # Before the workers load torch: one thread each, which does not wait by spinning.
        os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
        self._pool = ProcessPoolExecutor(
            self._jobs, mp_context=context, initializer=self._begin, initargs=(self._scratch,)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def play(self, runs: Sequence[Any], folder: Path):  # type: ignore[no-untyped-def]
        """Yields the cell of every run as it is finished and written."""
        waiting = {self._pool.submit(self._one, run, folder): run for run in runs}
        for future in as_completed(waiting):
            run = waiting[future]
            try:
                future.result()
            except Exception as error:
                for other in waiting:
                    other.cancel()
                raise StudyError(
                    f"the run {run.cell!r} of seed {run.seed} failed: {error}; what was finished "
                    "is kept, and the same command goes on from there"
                ) from error
            yield f"seed {run.seed}: {run.cell}"


_player: Player | None = None


def _begin(scratch: Path) -> None:
    """In a worker, once."""
    global _player  # noqa: PLW0603 - what a worker keeps between runs
    import torch

    torch.set_num_threads(1)
    _player = Player(scratch / str(os.getpid()))


def _play(run: RunFacts, folder: Path) -> None:
    assert _player is not None
    write_record(folder / f"{run.key}.json", _player.play(run))


def write_record(path: Path, record: RunRecord) -> None:
    """Whole or not at all."""
    write_whole(path, json.dumps(asdict(record)))


def read_record(path: Path) -> RunRecord:
    """Raises `StudyError` on a file that is none."""
    try:
        plain = json.loads(path.read_text())
        points = [Point(**point) for point in plain.pop("points")]
        return RunRecord(points=points, **plain)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StudyError(f"{path} holds no finished run ({error}); delete it") from error


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all, also after a crash."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    with draft.open() as stream:
        os.fsync(stream.fileno())
    draft.replace(path)
