"""Facts that travel: equal to their messages, whole after every trip, refused when ill-formed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.device import ComputePoint, ComputeProfile, DeviceProfile, GpuProfile, PowerProfile
from profiles.link import LinkProfile
from profiles.model import ModuleShape
from protos.contract import (
    AdapterSpec,
    Assignment,
    BlobRef,
    Classification,
    ContractError,
    ErrorCurve,
    Evaluation,
    LocalReport,
    MirrorFile,
    MirrorStep,
    Objective,
    Payload,
    ProfileRequest,
    Progress,
    Pruning,
    UpdateBudget,
    canonical_json,
    from_json,
    from_message,
    from_plain,
    to_message,
    to_plain,
)
from protos.sketchfleet.v1 import fleet_pb2 as pb

TRAVELLERS = {
    AdapterSpec: pb.AdapterSpec,
    Assignment: pb.Assignment,
    BlobRef: pb.BlobRef,
    Classification: pb.Classification,
    ComputePoint: pb.ComputePoint,
    ComputeProfile: pb.ComputeProfile,
    DeviceProfile: pb.DeviceProfile,
    Evaluation: pb.Evaluation,
    GpuProfile: pb.GpuProfile,
    LinkProfile: pb.LinkProfile,
    LocalReport: pb.LocalReport,
    MirrorFile: pb.MirrorFile,
    MirrorStep: pb.MirrorStep,
    ModuleShape: pb.ModuleShape,
    Objective: pb.Objective,
    Payload: pb.Payload,
    PowerProfile: pb.PowerProfile,
    ProfileRequest: pb.ProfileRequest,
    Progress: pb.Progress,
    Pruning: pb.Pruning,
    UpdateBudget: pb.UpdateBudget,
    ErrorCurve: pb.ErrorCurve,
}
ONE_OF_EACH = {int: 7, float: 0.5, str: "word", bool: True}
by_name = pytest.mark.parametrize("kind", TRAVELLERS, ids=lambda kind: kind.__name__)


def is_optional(hint):
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def make(kind, **changes):
    """One fact of a kind with every field set, nested ones too."""

    def value(hint):
        if is_optional(hint):
            return value(typing.get_args(hint)[0])
        if typing.get_origin(hint) is typing.Literal:
            return typing.get_args(hint)[0]
        if typing.get_origin(hint) is tuple:
            return (value(typing.get_args(hint)[0]),)
        return make(hint) if dataclasses.is_dataclass(hint) else ONE_OF_EACH[hint]

    hints = typing.get_type_hints(kind)
    return kind(**({f.name: value(hints[f.name]) for f in dataclasses.fields(kind)} | changes))


def facts(kind):
    """Any fact of a kind that the wire can hold."""

    def values(hint):
        if is_optional(hint):
            return st.none() | values(typing.get_args(hint)[0])
        if typing.get_origin(hint) is typing.Literal:
            return st.sampled_from(typing.get_args(hint))
        if typing.get_origin(hint) is tuple:
            return st.lists(values(typing.get_args(hint)[0]), max_size=3).map(tuple)
        if dataclasses.is_dataclass(hint):
            return facts(hint)
        return {
            int: st.integers(0, 2**31 - 1),
            float: st.floats(allow_nan=False, allow_infinity=False),
            str: st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
            bool: st.booleans(),
        }[hint]

    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{f.name: values(hints[f.name]) for f in dataclasses.fields(kind)})


@by_name
def test_a_fact_and_its_message_have_the_same_fields(kind):
    mine = {field.name for field in dataclasses.fields(kind)}
    theirs = {field.name for field in TRAVELLERS[kind].DESCRIPTOR.fields}
    assert mine == theirs, f"{kind.__name__} and fleet.proto differ in {sorted(mine ^ theirs)}"


@by_name
def test_what_may_be_absent_is_optional_in_the_message_too(kind):
    hints = typing.get_type_hints(kind)
    may = {f.name for f in dataclasses.fields(kind) if is_optional(hints[f.name])}
    fields = TRAVELLERS[kind].DESCRIPTOR.fields
    optional = {f.name for f in fields if f.containing_oneof is not None}
    assert may == optional, "an absent value would arrive as zero, or zero as absent"


@pytest.mark.parametrize("kind", TRAVELLERS, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_fact_survives_the_wire_and_the_database(kind, data):
    fact = data.draw(facts(kind))
    parsed = TRAVELLERS[kind].FromString(to_message(fact, TRAVELLERS[kind]).SerializeToString())
    for back in (from_message(parsed, kind), from_json(kind, canonical_json(fact))):
        assert back == fact
        assert canonical_json(back) == canonical_json(fact), "digests would differ at both ends"


def test_large_seeds_and_sizes_survive():
    spec = make(AdapterSpec, seed=2**64 - 1)
    assert from_message(to_message(spec, pb.AdapterSpec), AdapterSpec) == spec
    blob = make(BlobRef, size_bytes=2**62)
    assert from_message(to_message(blob, pb.BlobRef), BlobRef) == blob


def test_a_whole_number_in_a_float_field_gives_the_same_digest_at_both_ends():
    spec = make(AdapterSpec, alpha=32)
    assert from_message(to_message(spec, pb.AdapterSpec), AdapterSpec).digest == spec.digest


def test_the_digest_is_that_of_sorted_compact_json():
    spec = AdapterSpec("run", "org/base", "main", "ab" * 32, 8, 16.0, False, 5,
                       (ModuleShape("q", 4, 3),))  # fmt: skip
    rest = (
        '"dense":[],"modules":[{"in_features":3,"name":"q","out_features":4}],"rank":8,"run_id":"run",'
        '"seed":5,"use_rslora":false}'
    )
    base = f'"base_digest":"{"ab" * 32}",'
    whole = '{"alpha":16.0,"base":"org/base",' + base + '"base_revision":"main",' + rest
    assert canonical_json(spec) == whole.encode()
    identity = '{"alpha":16.0,' + base + rest
    assert spec.digest == hashlib.sha256(identity.encode()).digest()


WHERE_THE_BASE_LIES = {AdapterSpec: {"base", "base_revision"}, Assignment: set()}


@pytest.mark.parametrize("kind", WHERE_THE_BASE_LIES)
def test_every_field_but_where_the_base_lies_changes_the_digest(kind):
    fact = make(kind)
    other = {int: 8, float: 0.25, str: "other", bool: False, tuple: (), BlobRef: None,
             Objective: None, Pruning: None, Payload: make(Payload, rank=8), UpdateBudget: None,
             MirrorStep: None, Classification: None}  # fmt: skip
    hints = typing.get_type_hints(kind)
    seen = {fact.digest}
    for field in dataclasses.fields(kind):
        if typing.get_origin(hints[field.name]) is typing.Literal:
            change = typing.get_args(hints[field.name])[1]
        else:
            change = other[type(getattr(fact, field.name))]
        changed = dataclasses.replace(fact, **{field.name: change})
        if field.name in WHERE_THE_BASE_LIES[kind]:
            assert changed.digest == fact.digest, f"{field.name} is only a place"
            continue
        assert changed.digest not in seen, f"{field.name} does not count in the digest"
        seen.add(changed.digest)


@pytest.mark.parametrize("tensors", ["modules", "dense"])
def test_a_tensor_changes_the_digest(tensors):
    fact = make(AdapterSpec)
    for change in ({"name": "k"}, {"out_features": 1}, {"in_features": 1}):
        tensor = dataclasses.replace(getattr(fact, tensors)[0], **change)
        assert dataclasses.replace(fact, **{tensors: (tensor,)}).digest != fact.digest


def test_what_the_update_is_to_hold_changes_the_digest():
    fact = make(Assignment)
    changes = {"rank": 8, "encoding": "int8", "parts": ("up", "down"), "density": 0.25,
               "group": 64, "compressed": False}  # fmt: skip
    assert changes.keys() == {field.name for field in dataclasses.fields(Payload)}
    for name, value in changes.items():
        update = dataclasses.replace(fact.update, **{name: value})
        assert dataclasses.replace(fact, update=update).digest != fact.digest


def test_one_ref_is_fetched_once_wherever_it_is_named():
    a, b, c, d = (make(BlobRef, digest=name) for name in "abcd")
    task = make(Assignment, slice=(a, b), global_adapter=(b, c), side=d, global_side=d, mirror=None)
    assert task.blobs == (a, b, c, d)
    file = MirrorFile(c, "all", adds=True)
    step = MirrorStep((file, file), result=b, up_factor=1.0, base=a)
    none = {"slice": (), "global_adapter": (), "side": None, "global_side": None}
    assert make(Assignment, **none, mirror=step).blobs == (c,), "neither its base nor its result"
    assert make(Assignment, **none, mirror=None).blobs == ()


def test_a_device_of_no_steps_does_not_train():
    assert make(Assignment, local_steps=1).trains
    assert not make(Assignment, local_steps=0).trains


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 4.0), (True, 8.0)])
def test_the_scale_of_an_adapter_is_that_of_peft(use_rslora, scale):
    assert make(AdapterSpec, rank=64, alpha=16.0, use_rslora=use_rslora).scale(4) == scale


@by_name
def test_what_has_a_default_means_the_same_when_it_is_left_out(kind):
    """So that a fact stored or sent by a release that did not know a field is read all the same."""
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING:
            continue
        fact = make(kind, **{field.name: field.default})
        plain = to_plain(fact)
        plain.pop(field.name, None)
        assert from_plain(kind, plain) == fact


@by_name
def test_a_missing_field_is_named(kind):
    for field in dataclasses.fields(kind):
        has_default = field.default is not dataclasses.MISSING
        if has_default or field.default_factory is not dataclasses.MISSING:
            continue
        plain = to_plain(make(kind))
        del plain[field.name]
        with pytest.raises(ContractError, match=rf"^{kind.__name__}: {field.name}: field required"):
            from_plain(kind, plain)


@by_name
def test_an_ill_typed_field_is_named_in_one_line(kind):
    for field in dataclasses.fields(kind):
        plain = to_plain(make(kind)) | {field.name: {"no": "such thing"}}
        with pytest.raises(ContractError, match=rf"^{kind.__name__}: {field.name}.*\w") as told:
            from_plain(kind, plain)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("kind", "change", "where"),
    [
        (LocalReport, {"train_loss": math.nan}, "train_loss"),
        (LocalReport, {"evaluations": (make(Evaluation, loss=math.inf),)}, "evaluations.0.loss"),
        (DeviceProfile, {"link": make(LinkProfile, up_bps=-math.inf)}, "link.up_bps"),
        (Payload, {"density": math.nan}, "density"),
        (Assignment, {"update": make(Payload, density=math.inf)}, "update.density"),
    ],
)
def test_a_number_that_is_none_neither_leaves_nor_enters(kind, change, where):
    fact = make(kind, **change)
    with pytest.raises(ContractError, match=f"{kind.__name__} cannot be sent"):
        to_message(fact, TRAVELLERS[kind])
    with pytest.raises(ContractError, match=f"{kind.__name__}: {where}: must be a finite number"):
        from_json(kind, canonical_json(fact))


def test_a_nan_that_a_message_smuggles_in_is_refused():
    message = to_message(make(LocalReport), pb.LocalReport)
    message.train_loss = math.nan
    with pytest.raises(ContractError, match="train_loss: must be a finite number"):
        from_message(message, LocalReport)


def test_a_number_beyond_its_wire_type_is_not_sent():
    with pytest.raises(ContractError, match=r"LocalReport cannot be sent: .*peak_bytes"):
        to_message(make(LocalReport, peak_bytes=2**70), pb.LocalReport)


def test_an_empty_message_is_no_assignment():
    with pytest.raises(ContractError, match=r"^Assignment: rows: input should be 'prefix'"):
        from_message(pb.Assignment(), Assignment)


def test_a_ref_that_does_not_say_what_it_holds_is_refused():
    message = to_message(make(BlobRef), pb.BlobRef)
    message.ClearField("payload")
    with pytest.raises(ContractError, match=r"^BlobRef: payload: field required"):
        from_message(message, BlobRef)


@pytest.mark.parametrize(
    ("kind", "change", "where"),
    [
        (Payload, {"parts": ["up", "middle"]}, "parts.1"),
        (Payload, {"encoding": "int5"}, "encoding"),
        (BlobRef, {"payload": {"rank": 1, "encoding": "int5"}}, "payload.encoding"),
        (Assignment, {"rows": "random"}, "rows"),
        (Assignment, {"trained": ["sideways"]}, "trained.0"),
    ],
)
def test_a_word_that_the_wire_does_not_know_is_named(kind, change, where):
    with pytest.raises(ContractError, match=rf"^{kind.__name__}: {where}: input should be"):
        from_plain(kind, to_plain(make(kind)) | change)


@pytest.mark.parametrize("text", ["", "{", "nonsense", b"\xff\xfe", "[1, 2]", "null", '"text"'])
def test_text_that_is_no_fact_is_refused(text):
    with pytest.raises(ContractError):
        from_json(BlobRef, text)


def test_fields_of_a_later_version_are_passed_over():
    plain = to_plain(make(BlobRef)) | {"compression": "zstd"}
    assert from_json(BlobRef, json.dumps(plain)) == make(BlobRef)
