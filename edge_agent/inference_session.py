"""An exported graph in ONNX Runtime: tokens, a cache and an adapter in, logits and a cache out.

Knows the graph's inputs (`training.export_graph`). It keeps nothing between two runs, so that any
number of threads may run it at once. It knows no text and no requests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.inference_folder import ExportInfo, InferenceError
from profiles.errors import MissingExtraError

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]

ERRORS_ONLY = 3  # else a warning for every factor, which are inputs on purpose


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of all layers, (b, heads, tokens, size) each, and how many tokens."""

    values: tuple[Any, ...]  # onnxruntime.OrtValue
    tokens: int

    @property
    def size_bytes(self) -> int:
        """In memory."""
        return sum(int(np.prod(value.shape())) for value in self.values) * 4

    def first(self, tokens: int) -> Cache:
        """Those of the first so many tokens, copied."""
        if tokens == self.tokens:
            return self
        kept = (_value(value.numpy()[:, :, :tokens]) for value in self.values)
        return Cache(tuple(kept), tokens)


@dataclass(frozen=True, eq=False)
class Adapter:
    """Factors in memory. name: of the file."""

    name: str
    factors: Any  # onnxruntime.LoraAdapter; run options hold it by address only


class Session:
    """A loaded graph."""

    def __init__(self, path: Path, info: ExportInfo, threads: int | None) -> None:
        """threads: that all runs share; None: the processors this process may use.

        Raises `InferenceError`, `MissingExtraError`.
        """
        runtime = onnxruntime()
        self._info = info
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or usable_processors()
        options.log_severity_level = ERRORS_ONLY
        # Whoever waits for work would otherwise burn a processor that training here needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session: Any = runtime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises many types of its own
            raise InferenceError(
                f"{path} cannot be loaded ({_reason(error)}); export the base anew"
            ) from error
        sides = [f"{i}.{side}" for side in ("key", "value") for i in range(info.layers)]
        self._past = [f"past.{side}" for side in sides]
        self._outputs = ["logits", *(f"present.{side}" for side in sides)]

    @property
    def empty(self) -> Cache:
        """The cache of one text that has not begun."""
        return self.empty_of(1)

    def empty_of(self, batch: int) -> Cache:
        """The cache of so many texts."""
        shape = (batch, self._info.key_value_heads, 0, self._info.head_size)
        none = _value(np.zeros(shape, np.float32))
        return Cache((none,) * len(self._past), 0)

    def run(
        self,
        tokens: Tokens,
        cache: Cache,
        logits_at: Sequence[int] | Tokens,
        adapter: Adapter | None = None,
    ) -> tuple[Logits, Cache]:
        """Logits (b, n, vocabulary) at n of the tokens (b, t) that follow `cache`, and the next.

        Texts of a batch that are shorter than others end in any tokens, whose logits nobody asks
        for.
        """
        batch, new = tokens.shape
        total = cache.tokens + new
        places = np.broadcast_to(np.arange(cache.tokens, total), (batch, new))
        feeds = {
            "input_ids": _value(tokens),
            "attention_mask": _value(np.ones((batch, total), np.int64)),
            "position_ids": _value(places),
            "logits_at": _value(np.asarray(logits_at, np.int64)),
            **dict(zip(self._past, cache.values, strict=True)),
        }
        options = onnxruntime().RunOptions()
        options.log_severity_level = ERRORS_ONLY
        if adapter is not None:
            options.add_active_adapter(adapter.factors)
        logits, *grown = self._session.run_with_ort_values(self._outputs, feeds, options)
        return logits.numpy(), Cache(tuple(grown), total)


def onnxruntime() -> Any:
    """The package. Raises `MissingExtraError`."""
    try:
        import onnxruntime as found
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "serve") from error
    return found


def usable_processors() -> int:
    """How many this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _value(values: NDArray[Any]) -> Any:
    return onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values))


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
