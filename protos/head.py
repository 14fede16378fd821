"""What the tensors that are trained whole start from: a drawn task head, or the base's own weights.

A sequence classifier's head is in no pretrained base. Both ends derive the same one from the run's
seed, and only differences from it travel.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from profiles.model import ModuleShape, base_tensor
from protos.contract import AdapterSpec
from protos.sketch import keyed_stream

SPREAD = 0.02  # standard deviation of a new head's weights, as BERT's (arXiv 1810.04805)


def head_tensors(spec: AdapterSpec) -> tuple[ModuleShape, ...]:
    """Those of the spec's dense tensors that are drawn; none unless the run classifies."""
    if spec.classification is None:
        return ()
    inside = f"{spec.classification.head}."
    return tuple(tensor for tensor in spec.dense if tensor.name.startswith(inside))


def initial_head(seed: int, tensor: ModuleShape) -> NDArray[np.float32]:
    """A head's tensor as every device of a run begins with it: (out, in), or (n,) zeros for a bias.

    Weights are uniform, not normal, with BERT's spread: sums and roots alone give the same bits on
    every machine.
    """
    if tensor.name.endswith(".bias"):
        return np.zeros(tensor.in_features, dtype=np.float32)
    shape = (tensor.out_features, tensor.in_features)
    raw = keyed_stream("head", seed, tensor.name).random_raw(shape[0] * shape[1])
    unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
    drawn: NDArray[np.float64] = (2.0 * unit - 1.0) * (SPREAD * 3.0**0.5)
    return drawn.reshape(shape).astype(np.float32)


def starting_tensor(spec: AdapterSpec, base_folder: Path, name: str) -> NDArray[np.float32]:
    """What a dense tensor's difference is added to, as the model has its shape.

    Raises `ModelError` when it is the base's own and not there.
    """
    drawn = {tensor.name: tensor for tensor in head_tensors(spec)}
    if name in drawn:
        return initial_head(spec.seed, drawn[name])
    return base_tensor(base_folder, name)
