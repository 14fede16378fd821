"""`sketchfleet-agent probe`: everything that can be told of this device, for people and as JSON.

Gathers and shows; what is read and how is `probe`'s, `readings`' and `network`'s.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from edge_agent.access import has_joined, open_link
from edge_agent.agent import AgentError
from edge_agent.config import AgentConfig
from edge_agent.link import LinkError, RefusedError
from edge_agent.machine import Machine
from edge_agent.network import is_metered
from edge_agent.probe import MachineFacts, find_machine, host_memory, probe
from edge_agent.profiler import profile_job
from edge_agent.readings import Readings, Sensors
from edge_agent.trainer_process import TrainerError, TrainerProcess
from profiles.device import ComputeProfile, DeviceProfile, GpuProfile
from profiles.link import LinkProfile
from profiles.model import ModuleShape, base_digest, read_shape, resolve_base
from profiles.program import version
from protos.contract import AdapterSpec, Classification, ProfileRequest, from_plain, to_plain

GB = 1e9


@dataclass(frozen=True)
class Wanted:
    """How compute is to be measured, with which base."""

    base: str
    precision: str
    sequence_tokens: int
    micro_batch: int
    rank: int


@dataclass(frozen=True)
class Survey:
    """What was found."""

    profile: DeviceProfile
    facts: MachineFacts
    readings: Readings
    zram_bytes: int
    metered: bool
    unmeasured_link: str = ""  # why the link is not in the profile

    @property
    def plain(self) -> dict[str, Any]:
        """The profile as the coordinator gets it, and beside it what only people want."""
        seen = self.facts.gpu
        return {
            **to_plain(self.profile),
            "board_facts": {
                **dataclasses.asdict(self.facts.board), "jetpack": self.facts.board.jetpack,
                "module_name": self.facts.board.module_name,
            },
            "gpu_seen": None if seen is None else dataclasses.asdict(seen),
            "readings": dataclasses.asdict(self.readings),
            "zram_bytes": self.zram_bytes,
            "metered": self.metered,
        }  # fmt: skip


async def survey(
    config: AgentConfig, wanted: Wanted | None, machine: Machine | None = None
) -> Survey:
    """Looks at everything; measures compute only for the base in `wanted`.

    Raises `SketchfleetError` when that base cannot be read or trained.
    """
    machine = machine or Machine()
    facts = find_machine(machine)
    metered = is_metered(machine, config.network.metered)
    link, why = None, ""
    try:
        link = await _link(config, metered)
    except (AgentError, LinkError, RefusedError) as error:
        why = str(error)
    megabytes = config.limits.memory_mb
    cap_bytes = None if megabytes is None else megabytes * 10**6
    found = probe(
        version=version(), state=config.state.folder, board=config.device.board,
        memory_cap_bytes=cap_bytes, link=link, machine=machine, facts=facts,
    )  # fmt: skip
    if wanted is not None:
        compute, gpu = await _compute(config, wanted, cap_bytes)
        found = dataclasses.replace(found, compute=compute, gpu=gpu)
    return Survey(
        found, facts, Sensors(machine).read(), host_memory(machine).zram_bytes, metered, why
    )


async def _link(config: AgentConfig, metered: bool) -> LinkProfile:
    if not has_joined(config):
        raise AgentError("this device has not joined a fleet yet")
    link = open_link(config)
    if config.coordinator.plain_text and not link.credential:
        kept = config.state.folder / "credential.json"
        raise AgentError(f"{kept} is damaged; the next `run` enrols again")
    try:
        return await link.probe(metered=metered)
    finally:
        await link.close()


async def _compute(
    config: AgentConfig, wanted: Wanted, cap_bytes: int | None
) -> tuple[ComputeProfile, GpuProfile | None]:
    """A few real training steps in the trainer process."""
    folder = resolve_base(wanted.base)
    shape, classification = read_shape(folder), None
    dense: tuple[ModuleShape, ...] = ()
    if shape.encodes:  # measured as what it can be trained for, with the fewest labels
        head, dense = shape.head(2)
        classification = Classification(("0", "1"), head)
    spec = AdapterSpec(
        run_id="probe", base=wanted.base, base_revision="", base_digest=base_digest(folder),
        rank=wanted.rank, alpha=2.0 * wanted.rank, use_rslora=False, seed=0,
        modules=shape.modules(()), dense=dense, classification=classification,
    )  # fmt: skip
    request = from_plain(ProfileRequest, {
        "precision": wanted.precision, "sequence_tokens": wanted.sequence_tokens,
        "micro_batch": wanted.micro_batch, "rank": wanted.rank,
    })  # fmt: skip
    config.state.folder.mkdir(parents=True, exist_ok=True)
    trainer = TrainerProcess(
        config.trainer.python, config.limits.threads, config.state.folder / "probe-trainer.log"
    )
    try:
        result = await trainer.run(profile_job(folder, spec, request, cap_bytes))
    except TrainerError as error:
        raise AgentError(
            f"this device cannot train {wanted.base}: {error}; run `sketchfleet-agent doctor`"
        ) from error
    finally:
        await trainer.stop()
    gpu = result.get("gpu")
    card = None if gpu is None else from_plain(GpuProfile, gpu)
    return from_plain(ComputeProfile, result["compute"]), card


def describe(found: Survey) -> str:
    """One fact a line, for people."""
    lines = [
        ("board", _board(found)),
        ("processor", f"{found.profile.cpu}, {found.profile.cores} cores"),
        ("memory", _memory(found)),
        ("GPU", _gpu(found)),
        ("disk", f"{found.profile.disk_free_bytes / GB:.1f} GB free"),
        ("power", _power(found)),
        ("heat", _heat(found.readings)),
        ("link", _link_line(found)),
        ("compute", _compute_line(found.profile.compute)),
    ]
    return "\n".join(f"{name:<11}{text}" for name, text in lines if text)


def _board(found: Survey) -> str:
    board = found.facts.board
    known = f"known as {found.profile.known_board}" if found.profile.known_board else ""
    stack = f"L4T {board.l4t}" if board.l4t else ""
    stack += f" (JetPack {board.jetpack})" if board.jetpack else ""
    cuda = f"CUDA {board.cuda}" if board.cuda else ""
    parts = (found.profile.board, known, board.module_name, stack, cuda)
    return ", ".join(part for part in parts if part)


def _memory(found: Survey) -> str:
    p = found.profile
    text = (f"{p.memory_available_bytes / GB:.1f} GB available of {p.memory_total_bytes / GB:.1f}; "
            f"training may use {p.trainer_bytes / GB:.2f}")  # fmt: skip
    if p.memory_cap_bytes is not None:
        text += f" (capped at {p.memory_cap_bytes / GB:.2f})"
    if p.swap_bytes:
        text += f"; swap {p.swap_bytes / GB:.1f}, of it zram {found.zram_bytes / GB:.1f}"
    return text


def _gpu(found: Survey) -> str:
    gpu = found.profile.gpu or found.facts.gpu
    if gpu is None:
        return "none seen"
    shared = "shares the memory" if gpu.unified_memory else (
        f"{gpu.memory_free_bytes / GB:.1f} GB free of {gpu.memory_total_bytes / GB:.1f}"
    )  # fmt: skip
    told = "" if found.profile.gpu is not None else "; `doctor` says whether torch can use it"
    return f"{gpu.name}, compute capability {gpu.compute_capability}, {shared}{told}"


def _power(found: Survey) -> str:
    power, now = found.profile.power, found.readings
    parts = [f"mode {power.mode}"] if power is not None and power.mode else []
    if now.watts is not None:
        parts.append(f"{now.watts:.1f} W now")
    if now.on_battery is not None:
        charge = "" if now.battery_percent is None else f" at {now.battery_percent:.0f} %"
        parts.append(f"on battery{charge}" if now.on_battery else f"plugged in, battery{charge}")
    return ", ".join(parts)


def _heat(now: Readings) -> str:
    if now.temperature_c is None:
        return ""
    room = "" if now.headroom_c is None else (
        f", {now.headroom_c:.0f} °C below where it protects itself"
    )  # fmt: skip
    return f"{now.temperature_c:.0f} °C{room}"


def _link_line(found: Survey) -> str:
    link = found.profile.link
    metered = ", metered" if found.metered else ""
    if link is None:
        return f"not measured: {found.unmeasured_link}{metered}"
    return (f"{link.up_bps / 1e6:.2f} Mbit/s up, {link.down_bps / 1e6:.2f} down, "
            f"{link.rtt_s * 1e3:.0f} ms round trip{metered}")  # fmt: skip


def _compute_line(compute: ComputeProfile | None) -> str:
    if compute is None:
        return "measured with the run's own model when the agent joins a run; now with --base"
    return (f"{compute.tokens_per_s:.0f} tokens/s trained, {compute.forward_tokens_per_s:.0f} "
            f"evaluated, {compute.precision}, {compute.micro_batch} x {compute.sequence_tokens} "
            f"tokens, rank {compute.rank}; peak {compute.peak_bytes / GB:.2f} GB")  # fmt: skip
