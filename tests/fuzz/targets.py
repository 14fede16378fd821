"""What the fuzzer feeds: one function a decoder, bytes in. Anything but a value or the documented
error is a finding.

The first bytes of an input choose what is decoded and what is put right before: a fuzzer that had
to guess the 64 bytes of digests in a header would never get past it.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import os
import struct
import tempfile
import types
from functools import cache
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from pydantic import SecretStr

from profiles.device import ComputeProfile, DeviceProfile
from profiles.link import LinkProfile
from profiles.model import ModuleShape
from protos import gaps
from protos.chunk import Chunk, chunk_message, read_chunk
from protos.codecs import CODECS, PackingError
from protos.contract import (
    AdapterSpec,
    Assignment,
    BlobRef,
    ContractError,
    LocalReport,
    MirrorFile,
    MirrorStep,
    Payload,
    ProfileRequest,
    Progress,
    RefusalError,
    UpdateBudget,
    from_message,
    to_message,
)
from protos.layout import COMPRESSED, FRAME, HEADER, HEADER_BYTES, header_of, layout_of
from protos.mirror import advance, mirror_payload, slice_of, whole_of
from protos.packing import pack
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.transfer import PartFile, TransferError
from protos.unpacking import PackedReader, open_packed, open_update

EVERYTHING = ("up", "down", "core", "dense")
SPEC = AdapterSpec(
    "run", "base", "", "ab" * 32, 4, 8.0, False, 3,
    modules=(ModuleShape("q", 6, 5), ModuleShape("down", 3, 9)),
    dense=(ModuleShape("norm", 1, 7),),
)  # fmt: skip
TASK = Assignment(
    assignment_id="run.0.ash", run_id="run", round=0, device_id="ash", method="fslora", rank=2,
    rows="stratified", sketch_offset=0, alpha=8.0, trained=("up", "down"), personal=(),
    keeps_basis=True, keeps_state=False, error_feedback=False, fresh=False, precision="nf4",
    sequence_tokens=16, micro_batch=1, accumulation=1, checkpointing=False, local_steps=1,
    learning_rate=1e-3, optimizer="adamw", update=Payload(2, "int8", EVERYTHING),
    evaluation_sequences=1, held_out_share=0.1, evaluates_global=True, seed=5, deadline_s=60.0,
    reason="",
)  # fmt: skip
PAYLOADS = tuple(
    Payload(2, encoding, parts, density, group, compressed)
    for encoding, codec in CODECS.items()
    for parts in (EVERYTHING, ("up", "down"))
    for density in (1.0, 0.3)
    for group in ((0, 8) if codec.scaled else (0,))
    for compressed in (False, True)
)


def factors(spec: AdapterSpec, payload: Payload, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Values for a packed file of this payload."""
    draw = np.random.default_rng(seed)
    return {
        name: {part: draw.normal(size=(b.rows, b.columns)).astype(np.float32)
               for part, b in parts.items()}
        for name, parts in layout_of(spec, payload).blocks.items()
    }  # fmt: skip


@contextlib.contextmanager
def on_disk(data: bytes):
    """A path that holds these bytes, without a disk."""
    handle = os.memfd_create("input")
    try:
        os.write(handle, data)
        yield Path(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


def put_right(body: bytes, payload: Payload, digest: bytes, flags: int) -> bytes:
    """flags & 1: with the right header; & 2: with a table that adds up."""
    layout = layout_of(SPEC, payload)
    data = header_of(layout, payload, digest) + body if flags & 1 else body
    begin = HEADER_BYTES + layout.table_bytes
    if not flags & 2 or layout.fixed or len(data) < begin:
        return data
    table = np.frombuffer(data[HEADER_BYTES:begin], "<u4").astype(np.int64)
    counts, stored = table[0::2].copy(), table[1::2].copy()
    sizes = np.array([b.size for parts in layout.blocks.values() for b in parts.values()])
    most = np.array([b.most_bytes for parts in layout.blocks.values() for b in parts.values()])
    if layout.kept:
        counts %= sizes + 1
        for at in range(len(counts)):
            free = layout.kept - counts[:at].sum()
            rest = sizes[at + 1 :].sum()
            counts[at] = min(max(counts[at], free - rest), free, sizes[at])
    else:
        counts = sizes
    lengths, left = stored % FRAME % (most + 1), len(data) - begin
    for at in range(len(lengths)):
        lengths[at] = min(max(lengths[at], left - most[at + 1 :].sum()), left, most[at])
        left -= lengths[at]
    table[0::2], table[1::2] = counts, lengths + (stored // FRAME) * FRAME
    return data[:HEADER_BYTES] + table.astype("<u4").tobytes() + data[begin:]


def read_whole(reader: PackedReader) -> None:
    """Decodes everything; what comes must be of the right shape and finite."""
    layout = layout_of(SPEC, reader.payload)
    for name in reader.names:
        for part, values in reader.module(name).items():
            block = layout.blocks[name][part]
            assert values.shape == (block.rows, block.columns), f"{name} {part}: {values.shape}"
            assert values.dtype == np.float32 and np.isfinite(values).all(), f"{name} {part}"


# --- targets ------------------------------------------------------------------------------------


def packed(data: bytes) -> None:
    """A packed file whose payload is known: slices, adapters, mirrors, planned updates."""
    payload, flags = PAYLOADS[data[0] % len(PAYLOADS)] if data else PAYLOADS[0], data[1:2]
    bits = flags[0] if flags else 0
    file = put_right(data[2:], payload, bytes(32), bits)
    with contextlib.suppress(PackingError):
        if bits & 4:
            with on_disk(file) as path:
                read_whole(open_packed(path, SPEC, payload))
        else:
            read_whole(PackedReader(file, SPEC, payload))


@cache
def budget_task() -> tuple[Assignment, bytes]:
    """An assignment whose update the device chooses, and its digest."""
    budget = UpdateBudget(4096, tuple(CODECS), True, (0, 8))
    task = dataclasses.replace(TASK, update=Payload(2, "int8", EVERYTHING, compressed=True),
                               budget=budget)  # fmt: skip
    return task, task.digest


def update(data: bytes) -> None:
    """An update that the device chose the form of, as the coordinator opens it."""
    if len(data) < 2:
        return
    task, digest = budget_task()
    payload = dataclasses.replace(PAYLOADS[data[0] % len(PAYLOADS)], compressed=True,
                                  parts=EVERYTHING)  # fmt: skip
    file = put_right(data[2:], payload, digest, data[1])
    if data[1] & 8 and len(file) >= HEADER_BYTES:  # any count of kept values
        head = list(HEADER.unpack_from(file))
        head[7] = COMPRESSED | struct.unpack_from("<H", file, HEADER_BYTES - 2)[0]
        file = HEADER.pack(*head) + file[HEADER_BYTES:]
    with contextlib.suppress(PackingError):
        if data[1] & 4:
            with on_disk(file) as path:
                read_whole(open_update(path, SPEC, task, digest))
        else:
            read_whole(open_update(file, SPEC, task, digest))


def places(data: bytes) -> None:
    """The index of a sparse block; what is decoded must come back from the encoder."""
    if len(data) < 4:
        return
    count, size = struct.unpack_from("<HH", data)
    size = size % 2048 + 1
    try:
        kept = gaps.decode(memoryview(data)[4:], count, size)
    except gaps.GapError:
        return
    assert len(kept) == count and (np.diff(kept) > 0).all()
    assert not count or (kept[0] >= 0 and kept[-1] < size)
    again = gaps.decode(memoryview(gaps.encode(kept, size)), count, size)
    assert np.array_equal(again, kept)


def chunk(data: bytes) -> None:
    """A message of an upload or a download: protobuf must understand it alike."""
    found = read_chunk(data)
    if found is None:
        with contextlib.suppress(DecodeError):
            pb.PushRequest.FromString(data)
        return
    assert -(2**63) <= found.offset < 2**63 and (found.crc32 or 0) < 2**64
    again = read_chunk(chunk_message(found))
    assert again is not None
    assert (again.offset, bytes(again.data), again.crc32, again.acknowledge) == (
        found.offset, bytes(found.data), found.crc32, found.acknowledge)  # fmt: skip
    with contextlib.suppress(DecodeError):
        theirs = pb.PushRequest.FromString(data)
        assert (theirs.offset, theirs.data) == (found.offset, bytes(found.data))


class _Model:
    """What a part file should hold."""

    def __init__(self, size_bytes: int) -> None:
        self.whole = np.random.default_rng(size_bytes).bytes(size_bytes)


def part(data: bytes) -> None:
    """Chunks in any order, any size, with any checksum: a part file is always a true prefix."""
    if not data:
        return
    size, at = data[0] + 1, 1
    whole = _Model(size).whole
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        path = Path(place) / "part"
        file = PartFile(path, size)
        held = 0
        while at + 3 <= len(data):
            offset, length, kind = data[at], data[at + 1], data[at + 2]
            at += 3
            offset -= 128 if kind & 8 else 0
            piece = whole[max(0, offset) : max(0, offset) + length]
            if kind & 4:
                piece += bytes(length - len(piece))
            checksum = Chunk(offset, piece).crc32
            if kind & 1:
                checksum = kind * 2654435761 % 2**32
            if kind & 2:  # a new life of this end
                file.close()
                file = PartFile(path, size)
                assert file.length == held, "a part file forgot what it held"
            try:
                after = file.write(offset, piece, checksum)
            except TransferError:
                continue
            assert held <= after <= size
            held = after
            assert path.read_bytes() == whole[:held], "a part file is not a prefix"
        with contextlib.suppress(TransferError):
            import hashlib

            file.finish(hashlib.sha256(whole).hexdigest(), path.with_name("done"), durable=False)
            assert path.with_name("done").read_bytes() == whole
        file.close()


@cache
def mirror_cases() -> tuple[tuple[Assignment, bytes | None], ...]:
    """Assignments that step a mirror, each with the mirror that is held."""
    whole = mirror_payload(SPEC, ("up", "down"))
    base = pack(SPEC, whole, factors(SPEC, whole))
    blob = BlobRef("", len(base), whole)
    cases = []
    for rows, rank in (("slice", 2), ("rest", 2), ("all", 4)):
        for encoding in ("int8", "int4", "float32"):
            payload = Payload(rank, encoding, ("up", "down"))
            for held, adds in ((None, False), (blob, True)):
                file = MirrorFile(BlobRef("", 0, payload), rows, adds)
                step = MirrorStep((file,), BlobRef("", 0, whole), 0.5, held)
                task = dataclasses.replace(TASK, mirror=step)
                cases.append((task, base if held is not None else None))
    return tuple(cases)


def mirror(data: bytes) -> None:
    """A step of a device's mirror, from a file that the coordinator made up."""
    if len(data) < 2:
        return
    task, base = mirror_cases()[data[0] % len(mirror_cases())]
    payload = task.mirror.files[0].blob.payload
    file = put_right(data[2:], payload, bytes(32), data[1])
    with contextlib.ExitStack() as stack, contextlib.suppress(PackingError):
        path = stack.enter_context(on_disk(file))
        held = stack.enter_context(on_disk(base)) if base is not None else None
        out = stack.enter_context(on_disk(b""))
        with np.errstate(over="ignore", invalid="ignore"):
            advance(SPEC, task, held, [path], out)
        for found in (slice_of(SPEC, task, out), whole_of(SPEC, task, out)):
            for parts in found.values():
                assert all(np.isfinite(v).all() for v in parts.values())


MESSAGES = (
    (pb.DeviceProfile, DeviceProfile), (pb.LocalReport, LocalReport), (pb.Progress, Progress),
    (pb.Assignment, Assignment), (pb.AdapterSpec, AdapterSpec), (pb.LinkProfile, LinkProfile),
    (pb.ProfileRequest, ProfileRequest), (pb.MirrorStep, MirrorStep), (pb.Payload, Payload),
)  # fmt: skip
PLAIN = tuple(
    getattr(pb, name) for name in sorted(pb.DESCRIPTOR.message_types_by_name)
)  # those that no fact is made of, too


def message(data: bytes) -> None:
    """Any message of the service, and the fact it carries; a fact must survive the way back."""
    if not data:
        return
    if data[0] & 64:  # put together field by field: bytes at random rarely are a message
        kind, fact = MESSAGES[data[0] % len(MESSAGES)]
        sent = kind()
        fill(sent, data[1:])
        data = data[:1] + sent.SerializeToString()
    if data[0] & 192 == 128:
        with contextlib.suppress(DecodeError):
            PLAIN[data[0] % len(PLAIN)].FromString(data[1:])
        return
    kind, fact = MESSAGES[data[0] % len(MESSAGES)]
    try:
        found = from_message(kind.FromString(data[1:]), fact)
    except (DecodeError, ContractError):
        return
    assert from_message(to_message(found, kind), fact) == found


# --- what planning makes of what devices claim ---------------------------------------------------

NUMBERS = (0.0, 1.0, -1.0, 0.5, 64.0, 3e3, 2e9, 1e12, 1e300, -1e300, 5e-324, 1e-9)
WORDS = ("", "nf4", "int8", "bf16", "fp32", "int2", "sign", "done", "out_of_memory", "slice",
         "received", "trained", "global", "ab" * 32)  # fmt: skip


def fill(sent, data: bytes, at: int = 0) -> int:
    """Sets the fields of a message by what bytes say, one a field; returns how many were used."""
    for field in sent.DESCRIPTOR.fields:
        if at >= len(data):
            return at
        byte, at = data[at], at + 1
        kind = field.cpp_type
        if kind == field.CPPTYPE_MESSAGE:
            if byte % 8 == 0:
                continue
            target = getattr(sent, field.name)
            at = fill(target.add() if field.is_repeated else target, data, at)
            continue
        if kind in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
            value = NUMBERS[byte % len(NUMBERS)]
        elif kind == field.CPPTYPE_STRING:
            value = WORDS[byte % len(WORDS)]
        elif kind == field.CPPTYPE_BOOL:
            value = bool(byte & 1)
        elif kind in (field.CPPTYPE_INT32, field.CPPTYPE_INT64):
            bits = 31 if kind == field.CPPTYPE_INT32 else 63
            value = (0, 1, 2, 7, 4096, 2**30, 2**bits - 1, -1, -(2**bits))[byte % 9]
        else:
            continue
        if field.is_repeated:
            getattr(sent, field.name).append(value)
        else:
            setattr(sent, field.name, value)
    return at


@cache
def planning():
    """What a round is planned with, beside what devices say."""
    from coordinator.config import RunConfig
    from profiles.model import ModelShape

    config = RunConfig.model_validate({
        "run": {"name": "run"}, "model": {"base": "base"}, "adapter": {"rank": 4},
        "training": {"sequence_tokens": 16, "local_steps": 2},
        "round": {"round_s": 60.0}, "wire": {"update": "auto"},
    })  # fmt: skip
    method = config.make_method()
    policy = config.plan_policy(method, files=method.files(1), update_parts=method.sent(1),
                                side_rank=0, evaluates_global=True, rounds_left=3)  # fmt: skip
    shape = ModelShape(
        model_type="llama", hidden=8, intermediate=16, layers=1, heads=2, kv_heads=1, head_dim=4,
        vocabulary=32, tied_embeddings=False,
    )  # fmt: skip
    return shape, policy, good_profile()


def good_profile() -> DeviceProfile:
    """A device that takes part whatever others say."""
    compute = ComputeProfile(SPEC.base_digest, "nf4", 2e3, 6e3, 3 * 10**8, 4 * 10**8, 2, 16, 1)
    return DeviceProfile("b", "c", 4, 2**33, 2**33, 2**36, "0", compute=compute,
                         link=LinkProfile(1e8, 1e8, 0.01))  # fmt: skip


def claims(data: bytes) -> None:
    """A profile and a report that are let in: planning the next round neither fails nor is swayed
    to leave the others out.
    """
    from coordinator.allowance import curves_of
    from coordinator.corrections import learnt
    from coordinator.plan_types import UpdateTerms
    from coordinator.planner import plan_round
    from coordinator.plausible import require_plausible, require_plausible_report
    from coordinator.store.rows import AssignmentRecord

    shape, policy, good = planning()
    profile, report = pb.DeviceProfile(), pb.LocalReport()
    fill(report, data, fill(profile, data))
    try:
        bad, told = from_message(profile, DeviceProfile), from_message(report, LocalReport)
        require_plausible(bad)
        require_plausible_report(told)
    except (ContractError, RefusalError):
        return
    predicted = {"predicted": {"train_s": 1.0, "evaluate_s": 1.0}, "uncorrected_peak_bytes": 10**8}
    record = AssignmentRecord(TASK, predicted, "arrived", told, None, None, None, None)
    history = [dataclasses.replace(record, assignment=dataclasses.replace(TASK, device_id="bad"))]
    terms = {d: UpdateTerms(None, c) for d, c in curves_of(history).items()}
    plan = plan_round(shape, SPEC, policy, {"good": good, "bad": bad}, terms=terms,
                      corrections=learnt(history, [0]))  # fmt: skip
    assert any(p.device_id == "good" for p in plan.devices), "an honest device was left out"


def _pem(label: str, der: bytes) -> bytes:
    lines = base64.encodebytes(der).decode()
    return f"-----BEGIN {label}-----\n{lines}-----END {label}-----\n".encode()


def joining(data: bytes) -> None:
    """What strangers may send: signing requests, and certificates that are said to have expired."""
    from coordinator.certificates import CertificateError, requested_key
    from coordinator.enrolment import Enrolment

    if not data:
        return
    if data[0] & 1:
        with contextlib.suppress(CertificateError):
            requested_key(_pem("CERTIFICATE REQUEST", data[1:]) if data[0] & 2 else data[1:])
        return
    unknown = types.SimpleNamespace(
        authority=types.SimpleNamespace(trust_domain="fleet"),
        members=types.SimpleNamespace(standing=lambda device_id, fingerprint: None),
    )
    certificate = _pem("CERTIFICATE", data[1:]) if data[0] & 2 else data[1:]
    with contextlib.suppress(RefusalError):
        Enrolment.reenroll(unknown, certificate, b"request", data[-70:])


def invitation(data: bytes) -> None:
    """A join file, or its short form, that somebody else wrote."""
    from protos.invitation import InvitationError, pinned, read_invitation

    if not data:
        return
    with contextlib.suppress(InvitationError):
        if data[0] == 0:
            pinned(data[1:], "x" * 43)
        elif data[0] == 1:
            with on_disk(data[1:]) as path:
                read_invitation(str(path))
        else:
            read_invitation(data.decode(errors="replace"))


TARGETS = {f.__name__: f for f in (packed, update, places, chunk, part, mirror, message, claims,
                                   joining, invitation)}  # fmt: skip


# --- where it begins ----------------------------------------------------------------------------


def seeds(target: str) -> list[bytes]:
    """Good inputs of a target, so that the fuzzer begins with what decodes."""
    found: list[bytes] = []
    if target in ("packed", "update"):
        for index, payload in enumerate(PAYLOADS):
            shape, digest = payload, bytes(32)
            if target == "update":
                shape = dataclasses.replace(payload, compressed=True, parts=EVERYTHING)
                digest = budget_task()[1]
            file = pack(SPEC, shape, factors(SPEC, shape), assignment_digest=digest)
            found += [bytes((index, 4)) + file, bytes((index, 3)) + file[HEADER_BYTES:]]
    elif target == "mirror":
        for index, (task, _) in enumerate(mirror_cases()):
            payload = task.mirror.files[0].blob.payload
            file = pack(SPEC, payload, factors(SPEC, payload, index))
            found += [bytes((index, 1)) + file[HEADER_BYTES:]]
    elif target == "places":
        for size in (8, 100, 1000):
            for count in (0, 1, size // 9, size // 2, size):
                kept = np.sort(np.random.default_rng(size).permutation(size)[:count])
                found.append(struct.pack("<HH", count, size - 1) + gaps.encode(kept, size))
    elif target == "chunk":
        found = [
            chunk_message(Chunk(at, b"data", crc, ask))
            for at, crc, ask in ((0, None, False), (300, 7, True), (-1, 2**32 - 1, False))
        ]
        declared = pb.PushedUpdate(assignment_id="run.0.ash", digest="ab" * 32, size_bytes=1000)
        found.append(pb.PushRequest(update=declared).SerializeToString())
    elif target == "part":
        found = [
            bytes((99, 0, 50, 0, 50, 50, 0)),
            bytes((99, 0, 60, 0, 40, 60, 2, 0, 100, 4)),
            bytes((20, 5, 9, 1, 0, 21, 0, 21, 200, 4)),
        ]
    elif target == "message":
        task = to_message(mirror_cases()[3][0], pb.Assignment)
        spec = to_message(SPEC, pb.AdapterSpec)
        report = pb.LocalReport(assignment_id="run.0.ash", outcome="done", train_examples=9)
        report.evaluations.add(
            subject="global",
            stage="received",
            loss=1.5,
            tokens=9,
            example_millinats=[4, 5],
            example_tokens=[1, 2],
        )
        profile = pb.DeviceProfile(board="b", cores=4, memory_total_bytes=2**33)
        profile.link.up_bps = 1e6
        profile.compute.tokens_per_s = 100.0
        for index, sent in ((3, task), (4, spec), (1, report), (0, profile)):
            found.append(bytes((index,)) + sent.SerializeToString())
        for index, kind in enumerate(PLAIN):
            number = next(n for n in range(128, 192) if n % len(PLAIN) == index)
            found.append(bytes((number,)) + kind().SerializeToString())
        found += [bytes((64 + index,)) + bytes(range(1, 80)) for index in range(len(MESSAGES))]
    elif target in ("joining", "invitation"):
        found = join_seeds(target)
    elif target == "claims":
        found = [bytes(range(start, start + 120)) for start in (1, 40, 90)]
    return found


def join_seeds(target: str) -> list[bytes]:
    """A request and a certificate of a made-up authority; a join file and its short form."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    from coordinator.certificates import new_key
    from protos.invitation import Invitation

    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "device:ash")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    uri = x509.UniformResourceIdentifier("spiffe://fleet/device/ash")
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 7, start,
                                start + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([uri]), False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    if target == "joining":
        der = certificate.public_bytes(Encoding.DER)
        return [b"\3" + request.public_bytes(Encoding.DER), b"\2" + der,
                b"\1" + request.public_bytes(Encoding.PEM),
                b"\0" + certificate.public_bytes(Encoding.PEM)]  # fmt: skip
    root = certificate.public_bytes(Encoding.PEM)
    token = SecretStr("abcdefgh." + "x" * 24)
    whole = Invitation(token, "fleet.example:8471", "p" * 43, root)
    return [b"\0" + root, b"\1" + whole.to_json().encode(), whole.short_form.encode()]
