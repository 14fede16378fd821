"""Serves one run until it is finished: opens the state folder, listens, drives the engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import sqlalchemy

from coordinator.clock import SteadyClock
from coordinator.config import RunConfig
from coordinator.engine import Engine
from coordinator.issuing import Recorded
from coordinator.listeners import open_listeners
from coordinator.planner import DevicePlan
from coordinator.store.blobs import BlobStore
from coordinator.store.database import locked
from coordinator.store.records import Records
from profiles.errors import ExitCode, SketchfleetError
from profiles.model import (
    ModelShape,
    ModuleShape,
    base_digest,
    dense_tensors,
    read_shape,
    resolve_base,
)
from profiles.progress import progress
from profiles.service_manager import Progress, ServiceManager
from protos.contract import AdapterSpec, Classification, from_plain

log = logging.getLogger("sketchfleet.coordinator")

DRAIN_S = 20.0  # for uploads and a merge under way when told to stop
FAREWELL_S = 30.0  # how long a finished run waits to tell the devices so
LONGEST_SILENCE_S = 60.0  # of a run that ticks twice a second


class ServeError(SketchfleetError):
    """The coordinator cannot start."""


class ServedError(ServeError):
    """Another coordinator serves from the state folder."""

    exit_code: ClassVar[ExitCode] = ExitCode.LATER


def open_state(state: Path) -> tuple[Records, BlobStore]:
    """The database and the blobs of a state folder. Raises `ServeError`, `StoreError`."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        return Records(state / "coordinator.sqlite"), BlobStore(state / "blobs")
    except OSError as error:
        raise ServeError(
            f"state folder {state} cannot be used: {error.strerror}; choose another [server] state"
        ) from error


def build_spec(config: RunConfig, folder: Path) -> tuple[AdapterSpec, ModelShape]:
    """The contract of a run over the base in `folder`. Raises `ModelError`."""
    labels = config.model.labels
    shape = replace(read_shape(folder), labels=len(labels))
    if shape.encodes and not labels:
        raise ServeError(
            f"[model] base is an encoder ({shape.model_type}), which predicts no next token; set "
            "task = sequence-classification, or choose a decoder"
        )
    modules = shape.modules(config.model.targets)
    whole = config.model.modules_to_save
    linears = {m.name: m in modules for m in shape.modules(())}
    quantised = config.training.precision in ("nf4", "int8", "auto")
    for name, adapted in linears.items():
        around = next((w for w in whole if f"{name}.".startswith(f"{w}.")), None)
        if around is not None and adapted:
            raise ServeError(
                f"[model] {name} is both adapted and trained whole (modules_to_save names "
                f"{around}); name smaller modules there or take its projection out of targets"
            )
        if around is not None and quantised:
            raise ServeError(
                f"[model] modules_to_save takes in {name}, which [training] precision = "
                f'"{config.training.precision}" quantises; quantised weights cannot be trained, '
                "use bf16 or fp32"
            )
    classification: Classification | None = None
    drawn: tuple[ModuleShape, ...] = ()
    if labels:
        head, drawn = shape.head(len(labels))
        classification = Classification(labels, head)
        if any(f"{name}.".startswith(f"{head}.") for name in whole):
            raise ServeError(
                f"[model] modules_to_save names {head}, the task head, which is trained whole "
                "anyway; leave it out"
            )
    dense = (*drawn, *dense_tensors(folder, tuple(dict.fromkeys(whole))))
    names = [tensor.name for tensor in dense]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ServeError(
            f"[model] modules_to_save names {twice[0]} twice, once with a module around it; leave "
            "one of them out"
        )
    spec = AdapterSpec(
        run_id=config.run.name,
        base=config.model.base,
        base_revision=config.model.revision,
        base_digest=base_digest(folder),
        rank=config.adapter.rank,
        alpha=config.adapter.alpha,
        use_rslora=config.adapter.rslora,
        seed=config.run.seed,
        modules=modules,
        dense=dense,
        classification=classification,
    )
    return spec, shape


@contextlib.contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Holds the state folder for this process."""
    with locked(state) as alone:
        if not alone:
            raise ServedError(f"another coordinator already serves from {state}; stop it first")
        yield


@contextlib.contextmanager
def _disk_told(state: Path) -> Iterator[None]:
    """Says what to do where the state folder cannot be written. Raises `ServeError`."""
    try:
        yield
    except (OSError, sqlite3.Error, sqlalchemy.exc.DBAPIError) as error:
        raise ServeError(
            f"state folder {state} cannot be used ({_cause(error)}); make room or see to its disk, "
            "then start again: the run goes on where it was"
        ) from error


def _cause(error: Exception) -> str:
    if isinstance(error, sqlalchemy.exc.DBAPIError):
        return str(error.orig)
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def load_recorded(path: Path) -> Recorded:
    """Plans written by `sketchfleet-coordinator runs --plans`. Raises `ServeError`."""
    try:
        entries = json.loads(path.read_text())
        plans: dict[int, tuple[float, list[DevicePlan]]] = {}
        for entry in entries:
            _, devices = plans.setdefault(int(entry["round"]), (float(entry["round_s"]), []))
            devices.append(from_plain(DevicePlan, entry["plan"]))
    except (OSError, ValueError, KeyError, TypeError, SketchfleetError) as error:
        raise ServeError(f"recorded plans {path} cannot be used: {error}") from error
    return plans


async def _drive(engine: Engine, driving: asyncio.Task[None], stop: asyncio.Event) -> None:
    """Until the run is finished and its devices know, or `stop`. Raises what the engine did."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({driving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if driving.done():
        driving.result()
        until = time.monotonic() + FAREWELL_S
        while not engine.told_finished() and not stop.is_set() and time.monotonic() < until:
            await asyncio.sleep(0.1)


def _told_to_stop() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; a second one ends the process at once, as it would."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def told() -> None:
        stop.set()
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, told)
    return stop


def _status(engine: Engine) -> str:
    """For the service manager."""
    state, of = engine.state, engine.config.run.rounds
    return f"{engine.spec.run_id}: round {state.round} of {of}, {state.phase}"


async def serve(config: RunConfig, recorded: Recorded | None = None) -> None:
    """Runs the coordinator until the run is finished or it is told to stop.

    Raises `ServeError`, `ListenError` or `WebError` when the state folder or a port is taken, and
    `AuthorityError` where no certificate authority was made.
    """
    from coordinator.web.facts import FactReader, Live
    from coordinator.web.server import dashboard

    folder = resolve_base(config.model.base, config.model.revision or None)
    with progress("reading the base model"):
        spec, shape = build_spec(config, folder)
    state = config.server.state
    records, blobs = open_state(state)
    with _alone(state):
        with _disk_told(state):
            engine = Engine(
                config, spec, shape, records, blobs, recorded=recorded, clock=SteadyClock()
            )
            server = open_listeners(config.server, config.pki, engine, records)
        read = FactReader(
            records, spec.run_id, lambda: Live(engine.state, dict(engine.progress), engine.left_out)
        )
        async with dashboard(config, read) as address:
            stop = _told_to_stop()
            await server.start()
            log.info(
                "serving",
                extra={
                    "run_id": spec.run_id,
                    **server.facts,
                    "round": engine.state.round,
                    "dashboard": address,
                },
            )
            manager, gets_on = ServiceManager(), Progress(lambda: engine.ticks, LONGEST_SILENCE_S)
            manager.ready(_status(engine))
            driving = asyncio.create_task(engine.run())
            pulse = asyncio.create_task(manager.keep_alive(gets_on, lambda: _status(engine)))
            try:
                with _disk_told(state):
                    await _drive(engine, driving, stop)
                manager.stopping(f"stopping in {_status(engine)}")
                if not driving.done():
                    log.info("stopping", extra={"round": engine.state.round, "at_most_s": DRAIN_S})
                    until = time.monotonic() + DRAIN_S
                    await engine.drain(DRAIN_S)
                    await server.stop(grace=max(0.0, until - time.monotonic()))
            finally:
                pulse.cancel()
                driving.cancel()
                await server.stop(grace=2)
    records.close()
