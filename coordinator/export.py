"""The model of a run, at any round, in a form that others load.

Knows versions of a run's model. How a form is written is `protos.peft_folder`'s, `gguf_lora`'s and
`merged_folder`'s. It needs no torch. A branch beside the base becomes further rows of the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from coordinator.config import RunConfig
from coordinator.lowrank import Bundle, stack
from coordinator.methods import Method
from coordinator.state import StateFile, StateReader
from coordinator.store.blobs import BlobStore
from coordinator.store.rows import RunRecord
from protos.contract import AdapterSpec, BlobRef
from protos.export_forms import write_form
from protos.export_options import ExportError, Wanted
from protos.whole_adapter import WholeAdapter


def export_run(
    run: RunRecord, round_: int, files: Mapping[str, BlobRef], blobs: BlobStore, wanted: Wanted
) -> str:
    """Writes the model of a run after `round_` rounds; returns what to say of it.

    Raises `ExportError`, `ModelError`, `MissingExtraError`.
    """
    spec = run.spec
    method = RunConfig.model_validate(run.config).make_method()
    reader = StateReader(
        spec, {role: StateFile(blobs.path(b.digest), b.payload) for role, b in files.items()}
    )
    bundles, dense = global_adapter(spec, method, reader)
    return write_form(whole_adapter(spec, bundles, dense, round_), wanted)


def global_adapter(
    spec: AdapterSpec, method: Method, model: StateReader
) -> tuple[dict[str, Bundle], dict[str, NDArray[np.float32]]]:
    """(one bundle per module, branch included; differences of the dense tensors) of a model.

    Raises `ExportError` for a method whose model is partly at home.
    """
    if not method.has_global:
        raise ExportError(
            f"{method.name} keeps {', '.join(method.personal)} on the devices, so there is no "
            "adapter for all; export each device's own with `sketchfleet-agent export`"
        )
    adapter = {}
    for module in spec.modules:
        state = model.module(module.name)
        whole = state.product
        adapter[module.name] = whole if state.side is None else stack([whole, state.side], [1, 1])
    return adapter, {t.name: model.dense(t.name)[0] for t in spec.dense}


def whole_adapter(
    spec: AdapterSpec,
    adapter: Mapping[str, Bundle],
    dense: Mapping[str, NDArray[np.float32]] | None = None,
    round_: int | None = None,
) -> WholeAdapter:
    """Bundles of one rank r, up (r, out) and down (r, in), one per module of the spec.

    Raises `ExportError` when they do not fit it.
    """
    rank = _common_rank(spec, adapter)
    scale = spec.scale(rank)
    factors = {
        m.name: (adapter[m.name].at_scale(scale).up, adapter[m.name].down) for m in spec.modules
    }
    return WholeAdapter(spec, rank, factors, dense or {}, round_)


def _common_rank(spec: AdapterSpec, adapter: Mapping[str, Bundle]) -> int:
    """The rank all bundles share. Raises `ExportError`."""
    named = {m.name for m in spec.modules}
    if odd := sorted(named ^ adapter.keys()):
        raise ExportError(
            f"adapter and run differ in {len(odd)} modules, first {odd[0]}; export with its own run"
        )
    ranks = {adapter[name].up.shape[0] for name in named}
    if len(ranks) != 1:
        raise ExportError(f"modules have ranks {sorted(ranks)}; truncate them to one rank first")
    rank = int(ranks.pop())
    for m in spec.modules:
        got = (adapter[m.name].up.shape, adapter[m.name].down.shape)
        want = ((rank, m.out_features), (rank, m.in_features))
        if got != want:
            raise ExportError(f"{m.name} has factors of shape {got}, the run says {want}")
    return rank
