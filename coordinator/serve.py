"""Serves one run until it is finished: opens the state folder, listens, drives the engine."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from coordinator.config import RunConfig
from coordinator.engine import Engine
from coordinator.enrolment import Enrolment, join_token
from coordinator.issuing import Recorded
from coordinator.planner import DevicePlan
from coordinator.service import add_services, make_server
from coordinator.store.blobs import BlobStore
from coordinator.store.records import Records
from profiles.errors import SketchfleetError
from profiles.model import (
    ModelShape,
    ModuleShape,
    base_digest,
    dense_tensors,
    read_shape,
    resolve_base,
)
from protos.contract import AdapterSpec, Classification, from_plain

log = logging.getLogger("sketchfleet.coordinator")

FAREWELL_S = 30.0  # how long a finished run waits to tell the devices so


class ServeError(SketchfleetError):
    """The coordinator cannot start."""


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
    """Holds the state folder for this process; the lock goes with the process."""
    with (state / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ServeError(
                f"another coordinator already serves from {state}; stop it first"
            ) from error
        yield


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


async def serve(config: RunConfig, recorded: Recorded | None = None) -> None:
    """Runs the coordinator until the run is finished or it is told to stop.

    Raises `ServeError` or `WebError` when the state folder or a port is taken.
    """
    from coordinator.web.facts import FactReader, Live
    from coordinator.web.server import dashboard

    folder = resolve_base(config.model.base, config.model.revision or None)
    spec, shape = build_spec(config, folder)
    state = config.server.state
    records, blobs = open_state(state)
    with _alone(state):
        token, token_file = join_token(state)
        engine = Engine(config, spec, shape, records, blobs, recorded=recorded)
        enrolment = Enrolment(records, token, config.server.credential_days * 86400)
        server = make_server()
        add_services(server, enrolment, engine)
        try:
            port = server.add_insecure_port(config.server.listen)
        except RuntimeError:
            port = 0
        if port == 0:
            raise ServeError(
                f"{config.server.listen} cannot be listened on: the port is in use or the address "
                "is not this machine's; stop what listens there or change [server] listen"
            )
        read = FactReader(
            records, spec.run_id, lambda: Live(engine.state, dict(engine.progress), engine.left_out)
        )
        async with dashboard(config, read) as address:
            stop = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            await server.start()
            log.warning("plain text on loopback: for one machine only")
            log.info(
                "serving",
                extra={
                    "run_id": spec.run_id,
                    "address": f"{config.server.listen.rpartition(':')[0]}:{port}",
                    "join_token_file": str(token_file),
                    "round": engine.state.round,
                    "dashboard": address,
                },
            )
            driving = asyncio.create_task(engine.run())
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({driving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if driving.done():
                driving.result()
                until = time.monotonic() + FAREWELL_S
                while not engine.told_finished() and not stop.is_set() and time.monotonic() < until:
                    await asyncio.sleep(0.1)
            stopping.cancel()
            driving.cancel()
            await server.stop(grace=2)
    records.close()
