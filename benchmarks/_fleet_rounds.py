"""Federated rounds of the demo's devices in one process, for ways of sending to be compared.

What plays the rounds is `trials.simulation`; here are the demo's devices, ways of sending in the
words of run.toml, and rounds in which every device sees as many tokens as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.config import RunConfig
from coordinator.state import ADAPTER, StateFile
from edge_agent.training.connectors import DataSelection
from protos.contract import Assignment, Encoding, Precision
from protos.layout import Parts
from protos.unpacking import unpack
from trials.demo import NANO_CODE, devices
from trials.fleet import DeviceSetup
from trials.simulated_bench import SharedBench
from trials.simulated_types import Sending, SimulatedDevice, fleet_loss
from trials.simulation import Simulation


@dataclass(frozen=True)
class Learning:
    """What every device does in a round, whatever the way of sending."""

    rank: int = 32
    alpha: float = 64.0
    seed: int = 7
    precision: Precision = "fp32"
    sequence_tokens: int = 128
    micro_batch: int = 4
    local_steps: int = 20
    learning_rate: float = 3e-3
    held_out_share: float = 0.2
    evaluation_sequences: int = 48

    @property
    def tokens(self) -> int:
        """That a device sees in a round."""
        return self.local_steps * self.micro_batch * self.sequence_tokens


@dataclass(frozen=True)
class Way:
    """A way of sending, in the words of run.toml.

    rank: rows a device trains, 0 for all. share: of the bytes of the whole adapter in float32 that
    an update may have; within them the device chooses ([plan] bytes_per_round). 0: no limit.
    """

    update: Encoding
    slice: Encoding
    group: int = 0
    compressed: bool = False
    density: float = 1.0
    error_feedback: bool = False
    delta: bool = False
    rank: int = 0
    share: float = 0.0

    @property
    def method(self) -> str:
        """Sketches where a device trains a part of the rows."""
        return "fslora" if self.rank else "fedit"

    @property
    def sending(self) -> Sending:
        """What every device sends."""
        return Sending(
            self.update, self.rank, self.density, self.group, self.compressed, self.share
        )


@dataclass(frozen=True)
class Round:
    """Bytes of all devices in a round, and the fleet's mean loss after it, where measured."""

    up_bytes: int
    down_bytes: int
    loss: float | None


def selection(device: DeviceSetup) -> DataSelection:
    """A demo device's code, as its agent would read it."""
    return DataSelection(
        tuple(device.include), tuple(device.exclude), tuple(device.languages), device.max_files
    )


def run_config(c: Learning, way: Way) -> RunConfig:
    """The coordinator's configuration for this learning and way."""
    return RunConfig.model_validate({
        "run": {"name": "wire", "seed": c.seed, "rounds": 1},
        "model": {"base": str(NANO_CODE)},
        "adapter": {"rank": c.rank, "alpha": c.alpha},
        "method": {"name": way.method},
        "training": {
            "precision": c.precision, "sequence_tokens": c.sequence_tokens,
            "micro_batch": c.micro_batch, "local_steps": c.local_steps,
            "learning_rate": c.learning_rate,
        },
        "wire": {
            "slice": way.slice, "global_adapter": way.slice, "delta": way.delta,
            "error_feedback": way.error_feedback,
        },
        "evaluation": {"sequences": c.evaluation_sequences, "held_out_share": c.held_out_share},
    })  # fmt: skip


DENSE = Way("float32", "float32")


class Fleet:
    """The demo's four devices, with base and code in memory, and one run at a time."""

    def __init__(self, learning: Learning, folder: Path) -> None:
        self.learning, self.folder = learning, folder
        self.devices = devices()
        self._bench = SharedBench()
        self._dense = self._simulation(DENSE, folder / "dense")
        self.spec, self.values = self._dense.spec, self._dense.values

    def initial(self) -> StateFile:
        """The adapter that every run starts from."""
        return self._dense.files[ADAPTER]

    def play(self, way: Way, rounds: int, measured: Sequence[int]) -> list[Round]:
        """A run from the start; `measured`: after how many rounds the loss is taken."""
        run = self._simulation(way, self.folder / "run")
        found = []
        for number in range(rounds):
            played = run.round()
            loss = fleet_loss(run.measure()) if number + 1 in measured else None
            found.append(Round(played.up_bytes, played.down_bytes, loss))
        return found

    def first_update(self) -> dict[str, Parts]:
        """What the first device changes in the first round."""
        run = self._simulation(DENSE, self.folder / "run")
        first = self.devices[0].name
        task = run.round([first]).devices[first].task
        data = run.update_path(first).read_bytes()
        return unpack(data, self.spec, task.update, assignment_digest=task.digest)

    def loss(self, file: StateFile) -> float:
        """Fleet mean of a whole adapter on held-out code, nats per token."""
        return fleet_loss(self._dense.measure(files={ADAPTER: file}))

    def task(self, device: str, round_: int, way: Way) -> Assignment:
        """What a device is asked to do, less what it starts from."""
        run = self._simulation(way, self.folder / "run")
        run.number = round_
        return run.task(device, way.rank)

    def _simulation(self, way: Way, folder: Path) -> Simulation:
        simulated = [SimulatedDevice(d.name, selection(d)) for d in self.devices]
        return Simulation(
            run_config(self.learning, way), NANO_CODE, simulated, self._bench, folder,
            {d.name: way.sending for d in self.devices},
        )  # fmt: skip
