"""Writes an adapter in the form that is asked for: what each form needs of the base."""

from __future__ import annotations

from profiles.model import read_shape, resolve_base
from protos.export_options import Wanted
from protos.gguf_lora import write_gguf
from protos.merged_folder import write_merged
from protos.peft_folder import write_peft
from protos.whole_adapter import WholeAdapter

TELLING_LOSS = 1e-3  # share of an update's energy that rounding may take before it is told


def write_form(adapter: WholeAdapter, wanted: Wanted) -> str:
    """Writes it; returns the line that tells of it.

    Raises `ExportError`, `ModelError`, `MissingExtraError`.
    """
    spec, out = adapter.spec, wanted.out
    name = wanted.base or spec.base
    revision = None if wanted.base else spec.base_revision or None
    if wanted.form == "peft":
        write_peft(adapter, out, name, resolve_base(name, revision) if adapter.dense else None)
        return str(out)
    base = resolve_base(name, revision)
    if wanted.form == "gguf":
        write_gguf(adapter, read_shape(base), out)
        return f"{out}: {len(adapter.factors)} tensors of rank {adapter.rank}"
    merge = write_merged(adapter, base, out, name, wanted.precision)
    said = f"{out}: {merge.tensors} tensors changed"
    if merge.lost_share > TELLING_LOSS:
        said += (
            f"; rounding lost {merge.lost_share:.1%} of the update's energy, "
            "--dtype float32 would keep it"
        )
    return said
