"""A local round between two of its steps, as a file: what it needs to go on where it was.

Knows optimisers and trainable tensors by their order. It does not know when a checkpoint is due,
nor what the round does with it. The file is a safetensors file, written tensor after tensor: a
device that just holds its optimiser's state has no room for a second copy. Arrays and figures
only, no text of the code.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from edge_agent.training.moments import Moments
from edge_agent.training.steps import StepLog, StepsDone
from profiles.errors import MissingExtraError, SketchfleetError
from protos.contract import Evaluation, from_plain, to_plain
from protos.layout import Parts
from protos.transfer import move_durably

VERSION = 2
MOMENT = "moment."
CHECKSUM = "crc32"  # of everything before it in the file; the last tensor
TYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint8: "U8",
}

log = logging.getLogger("sketchfleet.trainer")

Phase = Literal["slice", "personal", "local"]  # in the order in which they are trained


class SnapshotError(SketchfleetError):
    """A checkpoint that does not fit the round it is for."""


@dataclass(frozen=True)
class RoundSoFar:
    """What a round had measured before the adapter that it is training now."""

    evaluations: tuple[Evaluation, ...] = ()
    evaluate_s: float = 0.0
    paused_s: float = 0.0
    done: tuple[StepsDone, ...] = ()  # of the adapters before
    trained_parameters: int = 0
    kept_rank: int = 0
    tail_before: float = 0.0  # what HetLoRA's tail contributed when training began


@dataclass(frozen=True, eq=False)
class Training:
    """Trainable tensors, the optimiser's state and the steps so far."""

    weights: list[Tensor]  # in the order of the model's parameters
    states: list[dict[str, Any]]  # the optimiser's, one per weight; tensors and numbers
    scaler: dict[str, Any]  # of float16's gradients; empty for wider types
    steps: StepLog


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A round between two steps."""

    phase: Phase
    so_far: RoundSoFar
    training: Training
    trained: Mapping[str, Parts]  # the slice as trained, in the phases after its own
    moments: Moments  # and what its optimiser remembers
    personal: Mapping[str, Parts]  # Ditto's adapter as trained, in the phase after its own


def capture(model: Any, optimizer: Any, scaler: Any, steps: StepLog) -> Training:
    """What `restore` needs; no copies, so write them before the next step."""
    weights = [p for p in model.parameters() if p.requires_grad]
    states = [dict(optimizer.state.get(w, {})) for w in weights]
    kept = {} if scaler is None else scaler.state_dict()
    return Training([w.detach() for w in weights], states, kept, steps)


def restore(model: Any, optimizer: Any, scaler: Any, training: Training) -> None:
    """Puts a fresh model and optimiser where `capture` found them.

    Raises `SnapshotError` when the trainable tensors are others.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    if [w.shape for w in weights] != [w.shape for w in training.weights]:
        raise SnapshotError("the checkpoint holds tensors of other shapes; the round begins anew")
    with torch.no_grad():
        for weight, values, state in zip(weights, training.weights, training.states, strict=True):
            weight.copy_(values)
            if state:
                optimizer.state[weight] = {
                    k: v.to(weight.device, copy=True) if isinstance(v, Tensor) else v
                    for k, v in state.items()
                }
    if scaler is not None and training.scaler:
        scaler.load_state_dict(training.scaler)


def write_snapshot(path: Path, key: str, snapshot: Snapshot) -> None:
    """Writes the file so that after a crash it is there whole or not at all.

    `key`: what the round is; only the same may go on from it. Raises `OSError`.
    """
    tensors, numbers = _to_tensors(snapshot)
    steps = snapshot.training.steps
    facts = {
        "version": VERSION,
        "key": key,
        "torch": torch.__version__,  # another may round otherwise, or name its states otherwise
        "phase": snapshot.phase,
        "so_far": to_plain(snapshot.so_far),
        "numbers": numbers,
        "weights": len(snapshot.training.weights),
        "scaler": snapshot.training.scaler,
        "losses": steps.losses,
        "seconds": steps.seconds,
    }
    temporary = path.with_name(f"{path.name}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as stream:
        _write_tensors(stream, tensors, {"round": json.dumps(facts, sort_keys=True)})
    move_durably(temporary, path)


def read_snapshot(path: Path | None, key: str) -> Snapshot | None:
    """The round in this file; None, and a line in the log, when it is damaged or another's."""
    if path is None or not path.exists():
        return None
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingExtraError("safetensors", "train") from error
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})["round"]
            facts = json.loads(text)
            told = (facts["version"], facts["key"], facts["torch"])
            if told != (VERSION, key, torch.__version__):
                log.info("checkpoint ignored", extra={"why": "it is of another round or agent"})
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            told_crc = int.from_bytes(_bytes(tensors.pop(CHECKSUM)), "little")
        if told_crc != _checksum(tensors, text):
            raise ValueError("bytes changed since they were written")
        return _from_tensors(facts, tensors)
    except (
        OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError,
        SketchfleetError,
    ) as error:  # fmt: skip
        log.warning(
            "checkpoint damaged; the round begins anew", extra={"error": type(error).__name__}
        )
        return None


def _to_tensors(snapshot: Snapshot) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors by "group/..." and the optimiser's plain numbers by the same kind of name."""
    training = snapshot.training
    tensors = {f"weight/{i}": w for i, w in enumerate(training.weights)}
    numbers: dict[str, float] = {}
    for i, state in enumerate(training.states):
        for kind, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"state/{i}/{kind}"] = value.detach()
            else:
                numbers[f"state/{i}/{kind}"] = value
    tensors["random"] = training.steps.random_state
    groups = {"trained": snapshot.trained, "personal": snapshot.personal}
    groups |= {f"{MOMENT}{kind}": found for kind, found in snapshot.moments.items()}
    for group, adapter in groups.items():
        for name, parts in adapter.items():
            for part, values in parts.items():
                tensors[f"{group}/{part}/{name}"] = torch.from_numpy(values)
    return tensors, numbers


def _from_tensors(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Snapshot:
    count = int(facts["weights"])
    states: list[dict[str, Any]] = [{} for _ in range(count)]
    groups: dict[str, dict[str, Any]] = {}
    for place, value in {**tensors, **facts["numbers"]}.items():
        group, _, rest = place.partition("/")
        if group == "state":
            number, _, kind = rest.partition("/")
            states[int(number)][kind] = value
        elif group in ("trained", "personal") or group.startswith(MOMENT):
            part, _, name = rest.partition("/")
            groups.setdefault(group, {}).setdefault(name, {})[part] = value.numpy()
    steps = StepLog(list(facts["losses"]), list(facts["seconds"]), tensors["random"])
    return Snapshot(
        phase=facts["phase"],
        so_far=from_plain(RoundSoFar, facts["so_far"]),
        training=Training(
            [tensors[f"weight/{i}"] for i in range(count)], states, facts["scaler"], steps
        ),
        trained=groups.pop("trained", {}),
        personal=groups.pop("personal", {}),
        moments={group.removeprefix(MOMENT): found for group, found in groups.items()},
    )


def _write_tensors(stream: IO[bytes], tensors: Mapping[str, Tensor], told: dict[str, str]) -> None:
    """The safetensors format: length of the header, header, bytes of one tensor after another."""
    header: dict[str, Any] = {"__metadata__": told}
    end = 0
    for name, value in [*_in_order(tensors), (CHECKSUM, torch.zeros(4, dtype=torch.uint8))]:
        begin, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": TYPES[value.dtype], "shape": list(value.shape),
                        "data_offsets": [begin, end]}  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    checksum = zlib.crc32(told["round"].encode())
    for _, value in _in_order(tensors):
        data = _bytes(value)
        checksum = zlib.crc32(data, checksum)
        stream.write(data)
    stream.write(checksum.to_bytes(4, "little"))


def _checksum(tensors: Mapping[str, Tensor], facts: str) -> int:
    """CRC-32 over facts and bytes, as `_write_tensors` makes it."""
    found = zlib.crc32(facts.encode())
    for _, value in _in_order(tensors):
        found = zlib.crc32(_bytes(value), found)
    return found


def _in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """As they lie in the file: wide types first, so that each begins where its type may."""
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _bytes(value: Tensor) -> memoryview:
    """Of one tensor, without a copy when it lies in one piece on the CPU."""
    flat = value.cpu().contiguous().reshape(-1).view(torch.uint8)
    values: Any = flat.numpy()  # numpy's stub does not say that an array is a buffer
    return memoryview(values)
