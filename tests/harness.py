"""A coordinator in this process, and devices that only pretend to train.

Everything between them is real: Link, gRPC over loopback, engine, database, blobs. A device's
"training" is a seeded function of the slice it received, so two runs with the same assignments
must end with the same bytes. What a device trains, keeps at home and sends follows from its
assignment, so that any method can run. Knows no torch; the base model is a handful of bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
from safetensors.numpy import save_file

from coordinator.authority import Authority
from coordinator.bearer import join_token
from coordinator.config import RunConfig
from coordinator.engine import Engine
from coordinator.listeners import AUTHORITY, open_listeners
from coordinator.serve import build_spec, open_state
from coordinator.state import StateFile, StateReader
from edge_agent.identity import Identity
from edge_agent.joining import enroll
from edge_agent.link import Link
from edge_agent.mirror import Mirror
from profiles.device import ComputeProfile, DeviceProfile
from profiles.link import LinkProfile
from protos.chunk import Chunk, chunk_message
from protos.contract import (
    AdapterSpec,
    Assignment,
    Evaluation,
    LocalReport,
    ProfileRequest,
    from_message,
)
from protos.fitting import fit
from protos.invitation import Invitation, pin_of
from protos.mirror import slice_of, whole_of
from protos.packing import pack
from protos.sketch import initial_down, slice_rows
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.status import reason_of
from protos.unpacking import unpack

BASES = Path()  # shared, since the place of a base is part of what a run's devices agree on
RANK = 8
NAMES = ("ash", "birch", "cedar")
SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
LARGE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}


class PowerCutError(Exception):
    """The coordinator's process is gone at this very instruction."""


class Clock:
    """A clock that only the test moves."""

    def __init__(self, now=1_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


def write_base(folder, dimensions=SMALL):
    """A folder that passes for a Llama: dimensions, a tokenizer, and the weights at its end."""
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1,
              "vocab_size": 32, **dimensions}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    hidden, draw = dimensions["hidden_size"], np.random.default_rng(0)
    weights = {
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": draw.normal(size=(32, hidden)).astype(np.float32),
    }
    save_file(weights, folder / "model.safetensors")
    return folder


def make_config(base, state, **sections):
    """A run of three rounds over `base`; `sections` override keys of run.toml by section."""
    plain = {
        "run": {"name": "run", "seed": 7, "rounds": 3},
        "model": {"base": str(base)},
        "adapter": {"rank": RANK, "alpha": 16.0},
        "training": {"precision": "nf4", "sequence_tokens": 64, "local_steps": 4},
        "round": {"min_devices": len(NAMES), "gather_s": 0.0, "round_s": 10.0},
        "evaluation": {"every_rounds": 2, "sequences": 2},
        "server": {"listen": "127.0.0.1:0", "state": str(state), "plain_text": True},
    }
    for section, keys in sections.items():
        plain[section] = {**plain.get(section, {}), **keys}
    return RunConfig.model_validate(plain)


def make_profile(base_digest, *, up_bps=100e6, down_bps=None, tokens_per_s=2000.0,
                 memory_bytes=8 * 10**9):  # fmt: skip
    """A measured device; a slow link or processor makes the planner choose a smaller k."""
    return DeviceProfile(
        board="board of the test",
        cpu="cpu of the test",
        cores=4,
        memory_total_bytes=memory_bytes,
        memory_available_bytes=memory_bytes,
        disk_free_bytes=10**11,
        agent_version="test",
        compute=ComputeProfile(
            base_digest=base_digest,
            precision="nf4",
            tokens_per_s=tokens_per_s,
            forward_tokens_per_s=3 * tokens_per_s,
            baseline_bytes=3 * 10**8,
            peak_bytes=4 * 10**8,
            rank=2,
            sequence_tokens=64,
            micro_batch=4,
        ),
        link=LinkProfile(up_bps=up_bps, down_bps=down_bps or up_bps, rtt_s=0.01),
    )


class Coordinator:
    """Serves from one state folder; can be killed and started again on the same port."""

    def __init__(self, config, *, clock=time.time, recorded=None):
        self.config, self.clock, self.recorded = config, clock, recorded
        self.port = self.joining_port = 0
        self.running = False

    async def start(self):
        """New objects over whatever the state folder holds."""
        self.threads = ThreadPoolExecutor()
        asyncio.get_running_loop().set_default_executor(self.threads)
        state = self.config.server.state
        spec, shape = build_spec(self.config, Path(self.config.model.base))
        self.records, self.blobs = open_state(state)
        self.engine = Engine(
            self.config, spec, shape, self.records, self.blobs,
            recorded=self.recorded, clock=self.clock,
        )  # fmt: skip
        place = self.config.server.model_copy(
            update={
                "listen": f"127.0.0.1:{self.port}",
                "enrolment": f"127.0.0.1:{self.joining_port}",
            }
        )
        if not place.plain_text and self.config.pki is None and not (state / AUTHORITY).exists():
            Authority.create(state / AUTHORITY, ["127.0.0.1"])
        self.server = open_listeners(place, self.config.pki, self.engine, self.records)
        self.port, self.joining_port = self.server.port, self.server.joining_port
        if place.plain_text:
            self.token, _ = join_token(state)
        await self.server.start()
        self.driving = asyncio.create_task(self.engine.run())
        self.running = True

    async def kill(self):
        """Ends without saying goodbye to anybody."""
        if not self.running:
            return
        self.running = False
        pending = [self.driving, *self.engine._work]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        await self.server.stop(0)
        self.server = None  # its finaliser wants the loop, so it must run before the loop ends
        await asyncio.sleep(0)
        # A process takes its threads along; here a merge in one of them would go on writing.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor())
        await asyncio.to_thread(self.threads.shutdown)
        self.records.close()

    def cut_power(self, method, *, before):
        """The process dies at the next call of this method of the records, before or after it."""
        real = getattr(self.records, method)

        def dying(*args, **keywords):
            if not before:
                real(*args, **keywords)
            raise PowerCutError(method)

        setattr(self.records, method, dying)

    async def died(self):
        """Waits until the power cut that was asked for has happened, then removes what is left."""
        try:
            await asyncio.wait_for(asyncio.shield(self.driving), 10)
        except PowerCutError:
            pass
        else:
            raise AssertionError("the coordinator was to die, but finished its run")
        await self.kill()

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    @property
    def enrolment(self):
        """Who may join a fleet with certificates."""
        return self.server.enrolment

    def invitation(self, **terms):
        """A join token, as `create_token` takes its terms."""
        authority = self.enrolment.authority
        token, pin = self.enrolment.create_token(**terms), pin_of(authority.trust)
        return Invitation(token, f"127.0.0.1:{self.joining_port}", pin, authority.trust)

    @property
    def state(self):
        return self.engine.state

    def assignment(self, round_, device):
        """The record of one assignment."""
        return self.records.assignment(f"{self.engine.spec.run_id}.{round_}.{device}")

    def model(self, version):
        """The files of the global model after so many rounds, by role; None if there are none."""
        found = self.records.model(self.engine.spec.run_id, version)
        return found[1] if found is not None and found[0] == version else None

    def reader(self, version):
        """Reads the global model as it was after so many rounds."""
        files = {role: StateFile(self.blobs.path(blob.digest), blob.payload)
                 for role, blob in self.model(version).items()}  # fmt: skip
        return StateReader(self.engine.spec, files)

    def digests(self):
        """(role, blob) of every file of the global model after 0, 1, ... rounds."""
        models = map(self.model, range(self.config.run.rounds + 1))
        return [m and tuple(sorted((role, b.digest) for role, b in m.items())) for m in models]

    async def until(self, true, what, within_s=10.0):
        """Waits until `true()` holds."""
        until = time.monotonic() + within_s
        while not true():
            assert time.monotonic() < until, f"{what} did not happen within {within_s:.0f} s"
            if self.driving.done() and self.driving.exception() is not None:
                raise self.driving.exception()
            await asyncio.sleep(0.005)


class Begun(NamedTuple):
    """A push that was declared."""

    update: pb.PushedUpdate
    durable_bytes: int


class Device:
    """One agent without a trainer; `mirrored`: it keeps a copy of the global adapter."""

    def __init__(self, name, address, folder, profile, mirrored=False):
        self.name, self.folder, self.profile = name, folder, profile
        self.folder.mkdir(parents=True, exist_ok=True)
        self.address, self.link = address, Link(address)
        self.identity = Identity(self.folder / "identity")
        self.mirror = Mirror(self.folder / "mirror") if mirrored else None
        self.homes = {}  # by round: module -> (rows, what stayed at home)

    async def enroll(self, token):
        """Joins and says at the first poll what it is."""
        await self.link.enroll(token, self.name, "test", 5.0)

    async def join(self, invitation):
        """Joins a fleet with certificates."""
        await asyncio.to_thread(
            enroll, self.identity, invitation, self.name, "test", lambda: None, 20.0
        )
        await self.link.close()
        self.link = Link(self.address, None, self.identity.credentials)

    async def poll(self, wait_s=0.0, working_on="", profile=None):
        """One long poll."""
        held = None if self.mirror is None else self.mirror.digest
        return await self.link.next_task(profile, working_on, wait_s, 10.0, mirror=held)

    async def take(self, within_s=10.0):
        """The next assignment, with the run's spec."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            answer = await self.poll(wait_s=1.0, profile=self.profile)
            if answer.kind == pb.NextTaskResponse.KIND_ASSIGNMENT:
                return (from_message(answer.spec, AdapterSpec),
                        from_message(answer.assignment, Assignment))  # fmt: skip
            assert answer.kind == pb.NextTaskResponse.KIND_WAIT, f"{self.name} was told {answer}"
        raise AssertionError(f"{self.name} got no assignment within {within_s:.0f} s")

    async def train(self, spec, a):
        """A packed update that depends on all that was received and on the assignment's seed."""
        start = await self.start(spec, a)
        side = await self.read((a.side,) if a.side else (), spec)
        pull = math.tanh(sum(float(v.sum()) for parts in side.values() for v in parts.values()))
        delta = make_delta(start, a.seed, a.trained, bias=1e-3 * pull)
        self.homes[a.round] = {
            name: (tuple(rows_of(spec, a, name)),
                   {part: start[name][part] + delta[name][part] for part in a.personal})
            for name in (module.name for module in spec.modules)
        }  # fmt: skip
        return self.write_update(spec, a, delta)

    async def start(self, spec, a):
        """What a device trains from, by tensor and part: its home, the slice, a draw, zeros."""
        received = await self.received(spec, a, a.slice, slice_of)
        return self.completed(spec, a, received, a.rank, {*a.trained, *a.personal})

    def completed(self, spec, a, received, rank, needed):
        """An adapter of so many rows with what did not travel."""
        newest = max((r for r in self.homes if r < a.round), default=None)
        home = self.homes[newest] if newest is not None else {}
        core = "core" in needed or any("core" in parts for parts in received.values())
        whole = {}
        for m in spec.modules:
            shapes = {"up": (rank, m.out_features), "down": (rank, m.in_features)}
            shapes |= {"core": (rank, rank)} if core else {}
            drawn = {}
            if a.fresh:
                drawn["down"] = initial_down(spec.seed, m.name, rank, m.in_features,
                                             round_=a.round, device_id=a.device_id)  # fmt: skip
            rows, kept = home.get(m.name, ((), {}))
            kept = kept if rows == tuple(rows_of(spec, a, m.name)) else {}
            zeros = {part: np.zeros(shape, np.float32) for part, shape in shapes.items()}
            whole[m.name] = {**zeros, **drawn, **received.get(m.name, {}), **kept}
        return whole | {tensor.name: received[tensor.name] for tensor in spec.dense}

    async def received(self, spec, a, blobs, cut):
        """What these files hold, or what is cut from the mirror in their place."""
        if a.mirror is None:
            return await self.read(blobs, spec)
        for blob in self.mirror.wanted(a.mirror):
            await self.link.fetch(blob, self.folder)
        return cut(spec, a, self.mirror.take(spec, a, self.folder))

    async def read(self, blobs, spec):
        """What these files hold together: tensor -> part -> values. No part lies in two of them."""
        found = {}
        for blob in blobs:
            path = await self.link.fetch(blob, self.folder)
            for name, parts in unpack(path.read_bytes(), spec, blob.payload).items():
                assert not found.get(name, {}).keys() & parts.keys(), f"{name} lies in two files"
                found.setdefault(name, {}).update(parts)
        return found

    def write_update(self, spec, a, delta):
        """A delta as the file that would be pushed; of its parts, those to be sent."""
        path = self.folder / f"{a.assignment_id}.update"
        payload = a.update
        if a.budget is not None:
            payload = fit(spec, payload, a.budget, delta, fed_back=a.error_feedback)[0].payload
        path.write_bytes(pack(spec, payload, delta, assignment_digest=a.digest, seed=a.seed))
        return path

    async def push(self, a, path):
        """(receipt, outcome) of pushing a file as the update of an assignment."""
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return await self.link.push(a.assignment_id, digest, path)

    async def report(self, spec, a):
        """Reports; measures the whole adapter when asked to."""
        measured = []
        if a.evaluates_global:
            files = await self.received(spec, a, a.global_adapter, whole_of)
            whole = self.completed(spec, a, files, spec.rank, a.personal)
            side = await self.read((a.global_side,) if a.global_side else (), spec)
            ups = [parts["up"] for model in (whole, side) for parts in model.values()
                   if "up" in parts]  # fmt: skip
            size = float(np.sqrt(sum(np.square(up).sum() for up in ups)))
            measured.append(Evaluation(
                "global", "received", 3.0 / (1 + size), 0.5, 1000,
                example_millinats=(1_800_000, 1_200_000), example_tokens=(600, 400),
            ))  # fmt: skip
        if a.trains:
            loss = 1.0 + a.seed % 997 / 997
            measured.append(Evaluation("slice", "received", loss, 0.5, 1000))
            if a.local_only:
                measured.append(Evaluation("local", "trained", 2.0 - 0.1 * a.round, 0.25, 1000))
        kept = 0
        if a.trains and a.pruning is not None and a.seed % 2:
            kept = max(1, math.floor(a.pruning.keep * a.rank + 1e-9))
        await self.link.report(
            LocalReport(
                a.assignment_id, "done", evaluations=tuple(measured),
                train_examples=10 + len(self.name) if a.trains else 0, kept_rank=kept,
            ),
            10.0,
        )  # fmt: skip

    async def deliver(self, spec, a):
        """Does all that an assignment asks for."""
        if a.trains:
            await self.push(a, await self.train(spec, a))
        await self.report(spec, a)

    async def work(self):
        """Takes and delivers until the run is finished; the assignments in order."""
        done = []
        profile = self.profile
        while True:
            answer = await self.poll(wait_s=2.0, profile=profile)
            profile = None
            if answer.kind == pb.NextTaskResponse.KIND_RUN_FINISHED:
                return done
            spec = from_message(answer.spec, AdapterSpec)
            if answer.kind == pb.NextTaskResponse.KIND_PROFILE:
                from_message(answer.profile_request, ProfileRequest)
                profile = self.profile
            elif answer.kind == pb.NextTaskResponse.KIND_ASSIGNMENT:
                a = from_message(answer.assignment, Assignment)
                await self.deliver(spec, a)
                done.append(a)

    # --- below Link: single calls, to send what Link never would --------------------------------

    @contextlib.asynccontextmanager
    async def pushing(self, update):
        """(the stream of a push, its first answer): declared, and no byte sent."""
        stream = self.link._push(metadata=self.link._metadata, timeout=10)
        try:
            await stream.write(pb.PushRequest(update=update).SerializeToString())
            yield stream, await stream.read()
        finally:
            stream.cancel()

    async def begin(self, assignment_id, digest, size_bytes):
        """Declares an update and hangs up."""
        update = pb.PushedUpdate(assignment_id=assignment_id, digest=digest, size_bytes=size_bytes)
        async with self.pushing(update) as (_, answer):
            return Begun(update, answer.durable_bytes)

    async def put(self, update, offset, data, checksum):
        """Sends one chunk and hangs up; the bytes held then."""
        async with self.pushing(update) as (stream, _):
            await stream.write(chunk_message(Chunk(offset, data, checksum, True)))
            return (await stream.read()).durable_bytes

    async def commit(self, update):
        """Sends nothing more; the receipt."""
        async with self.pushing(update) as (stream, _):
            await stream.done_writing()
            return (await stream.read()).receipt


def rows_of(spec, a, name):
    """The global rows of a module that an assignment's slice holds."""
    return slice_rows(spec, a, name).tolist()


def make_delta(start, seed, trained=("up", "down", "core", "dense"), *, size=0.02, bias=0.0):
    """What a device "learnt": noise plus a pull towards zero, so wrong input gives wrong output.

    Parts that are not trained do not move.
    """
    rng = np.random.default_rng(seed)

    def moved(values):
        return (size * rng.normal(size=values.shape) - 0.1 * values + bias).astype(np.float32)

    return {
        name: {part: moved(values) if part in trained else np.zeros_like(values)
               for part, values in parts.items()}
        for name, parts in start.items()
    }  # fmt: skip


class Fleet:
    """A coordinator and its enrolled devices by name."""

    def __init__(self, coordinator, devices):
        self.coordinator, self.devices = coordinator, devices

    def __getitem__(self, name):
        return self.devices[name]

    async def restart(self):
        """Kills the coordinator and starts it again over the same state."""
        await self.coordinator.kill()
        await self.coordinator.start()

    async def take(self):
        """The next assignment of every device: name -> (spec, assignment)."""
        taken = await asyncio.gather(*(d.take() for d in self.devices.values()))
        return dict(zip(self.devices, taken, strict=True))

    async def round(self, order=None):
        """Everybody takes and then, one after the other in this order, delivers."""
        taken = await self.take()
        for name in order or self.devices:
            await self[name].deliver(*taken[name])

    async def finish(self):
        """Everybody works until the run is finished: name -> assignments."""
        done = await asyncio.gather(*(d.work() for d in self.devices.values()))
        return dict(zip(self.devices, done, strict=True))


# What makes the planner give each device another k of RANK within a round of 10 s.
UNEQUAL = {
    "ash": {},
    "birch": {"tokens_per_s": 170.0},
    "cedar": {"up_bps": 5000.0, "down_bps": 12_000.0},
}


@contextlib.asynccontextmanager
async def fleet(folder, *, names=NAMES, profiles=UNEQUAL, dimensions=SMALL, clock=time.time,
                recorded=None, mirrored=False, **sections):  # fmt: skip
    """A started coordinator under `folder` and these devices, enrolled."""
    base = write_base(BASES / str(dimensions["hidden_size"]), dimensions)
    config = make_config(base, folder / "state", **sections)
    coordinator = Coordinator(config, clock=clock, recorded=recorded)
    await coordinator.start()
    digest = coordinator.engine.spec.base_digest
    devices = {
        name: Device(name, coordinator.address, folder / name,
                     make_profile(digest, **profiles.get(name, {})), mirrored)
        for name in names
    }  # fmt: skip
    try:
        for device in devices.values():
            if config.server.plain_text:
                await device.enroll(coordinator.token)
            else:
                await device.join(coordinator.invitation())
        yield Fleet(coordinator, devices)
    finally:
        for device in devices.values():
            await device.link.close()
        await coordinator.kill()


async def reason_for(call):
    """The reason a single call is refused for."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return reason_of(error)[0]
    raise AssertionError(f"the call was to be refused, it was answered: {answer}")


def raw_transfer(address):
    """(channel, call of Push) without the limits that Link puts on itself."""
    unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    channel = grpc.aio.insecure_channel(address, options=unlimited)
    return channel, channel.stream_stream("/sketchfleet.v1.TransferService/Push")
