"""What a run's model is beyond its base, as it is written for others to load.

`peft_folder`, `gguf_lora` and `merged_folder` write it; coordinator and device make it out of what
they keep. Knows factors and scales; it knows no files, but that what is written appears whole.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from protos.codecs import Values
from protos.contract import AdapterSpec
from protos.export_options import ExportError
from protos.layout import Parts


@dataclass(frozen=True, eq=False)
class WholeAdapter:
    """dW = spec.scale(rank) * up' down for every module of the spec.

    factors: module -> (up (rank, out), down (rank, in)), float32. dense: tensor trained whole ->
    its difference from the base, (out, in) float32. round: how many rounds went into it; None
    where nobody knows.
    """

    spec: AdapterSpec
    rank: int
    factors: Mapping[str, tuple[Values, Values]]
    dense: Mapping[str, Values] = field(default_factory=dict)
    round: int | None = None

    @property
    def scale(self) -> float:
        """The factor on every product."""
        return self.spec.scale(self.rank)


def with_branch(
    spec: AdapterSpec, parts: Parts, scale: float, side: Parts | None = None
) -> tuple[Values, Values]:
    """(up, down) at the spec's own scale for their rank, whose product is all of these parts.

    parts: up (k, out), down (k, in) and perhaps core (k, k), at `scale`; side: a branch at scale
    1 that becomes further rows. Scales go to `up` alone, in float64.
    """
    up, down = parts["up"].astype(np.float64), parts["down"]
    if "core" in parts:  # up' core down = (core' up)' down
        up = parts["core"].T.astype(np.float64) @ up
    up *= scale
    if side is not None:
        up = np.concatenate([up, side["up"]])
        down = np.concatenate([down, side["down"]])
    up /= spec.scale(len(down))
    return up.astype(np.float32), np.ascontiguousarray(down, dtype=np.float32)


def require_text_model(spec: AdapterSpec, form: str) -> None:
    """Raises `ExportError` for a classifier, whose head only PEFT's form has a place for."""
    if spec.classification is not None:
        raise ExportError(
            f"run {spec.run_id} trains a classifier, and {form} has no place for its head; export "
            "it as a PEFT folder"
        )


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target` at the end, or is gone after an error.

    Raises `ExportError` when `target` is there already or cannot be made.
    """
    if target.exists():
        raise ExportError(f"{target} already exists; name a new folder or remove it first")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise ExportError(
            f"{target} cannot be made ({error.strerror}); choose another place"
        ) from error
    try:
        yield part
        part.chmod(0o755)  # temporary folders are for their owner only
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
