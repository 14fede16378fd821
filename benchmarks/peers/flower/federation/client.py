"""A device under Flower: hands the factors to Sketchfleet's own trainer and sends back the result.

Runs in Flower's own environment, in the process that Flower starts for each message. The trainer is
a process that stays, with base and code in memory, reached through a socket in the device's folder:
what differs between the two sides is then not the training.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from protos.contract import AdapterSpec, Assignment, BlobRef, Payload, from_plain, to_plain
from protos.layout import Parts
from protos.packing import pack
from protos.transfer import sha256_of
from protos.unpacking import unpack

app = ClientApp()


def train(message: Message, context: Context) -> Message:
    """One local round; the reply holds every factor as it was trained."""
    folder = Path(str(context.node_config["folder"]))
    given = json.loads((folder / "job.json").read_text())
    job: dict[str, Any] = given["job"]
    spec = from_plain(AdapterSpec, job["spec"])
    payload = Payload(spec.rank, "float32")
    arrays = iter(message.content["arrays"].to_numpy_ndarrays())
    received: dict[str, Parts] = {
        m.name: {"up": next(arrays), "down": next(arrays)} for m in spec.modules
    }
    slice_ = folder / "slice.bin"
    slice_.write_bytes(pack(spec, payload, received))
    round_ = int(message.content["config"]["server-round"]) - 1  # Flower counts from one
    blob = BlobRef(sha256_of(slice_), slice_.stat().st_size, payload)
    task = from_plain(Assignment, job["assignment"] | {
        "seed": given["seeds"][round_], "round": round_, "slice": [to_plain(blob)],
    })  # fmt: skip
    update = folder / "update.bin"
    report = _ask(folder / "trainer", job | {
        "assignment": to_plain(task), "slice_paths": [str(slice_)], "update_path": str(update),
    })  # fmt: skip
    delta = unpack(update.read_bytes(), spec, task.update, assignment_digest=task.digest)
    trained = [
        received[m.name][part] + delta[m.name][part]
        for m in spec.modules for part in ("up", "down")
    ]  # fmt: skip
    found = RecordDict({
        "arrays": ArrayRecord(trained),
        "metrics": MetricRecord({"num-examples": report["train_examples"]}),
    })  # fmt: skip
    return Message(content=found, reply_to=message)


def _ask(trainer: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The report of a job. Raises `RuntimeError` with what the trainer said."""
    with socket.socket(socket.AF_UNIX) as call:
        call.connect(str(trainer))
        call.sendall(json.dumps(job).encode() + b"\n")
        with call.makefile("rb") as answer:
            event = json.loads(answer.readline())
    if event["event"] != "result":
        raise RuntimeError(event["message"])
    report: dict[str, Any] = event["report"]
    return report


app.train()(train)
