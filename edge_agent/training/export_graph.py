"""A causal language model as an ONNX graph with a KV cache and LoRA factors as inputs.

Knows transformers and torch.onnx. It knows no files, no precisions and no adapters: every linear
layer of the decoder takes factors of any rank, and whoever feeds the graph says which.

    input_ids       (b, t) int64
    attention_mask  (b, past + t) int64, 1 where a token is: gaps may be anywhere but the end
    position_ids    (b, t) int64
    logits_at       (n,) int64, which of the t tokens logits are wanted of
    past.I.key, past.I.value        (b, key-value heads, past, head size), past may be 0
    MODULE.down (in, r), MODULE.up (r, out): what the module gives becomes W x + x down up
    -> logits (b, n, vocabulary), present.I.key, present.I.value (b, heads, past + t, head size)
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edge_agent.training.branches import adapted_layer
from profiles.errors import SketchfleetError
from profiles.model import ModelShape, ModuleShape

ROPES = ("default", "linear", "llama3", "yarn")  # others look at how long the text is
TRACED_RANK = 5
SLIDING = "sliding_attention"

Factors = dict[str, tuple[Tensor, Tensor]]  # module -> down (in, r), up (r, out)


class GraphError(SketchfleetError):
    """A model that cannot become such a graph."""


class Adapted(nn.Module):
    """A linear layer with a branch beside it whose factors are looked up when it is called."""

    def __init__(self, layer: nn.Linear, name: str, factors: Factors) -> None:
        super().__init__()
        self.layer, self._name, self._factors = layer, name, factors

    def forward(self, x: Tensor) -> Tensor:
        """(…, out) of (…, in)."""
        down, up = self._factors[self._name]
        given: Tensor = self.layer(x)
        return given + (x @ down) @ up


class Cache:
    """Keys and values of all layers that grow by concatenation, as transformers asks for them."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self.keys, self.values = list(keys), list(values)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends those of the new tokens, (b, heads, t, size); returns all."""
        self.keys[layer] = torch.cat([self.keys[layer], keys], -2)
        self.values[layer] = torch.cat([self.values[layer], values], -2)
        return self.keys[layer], self.values[layer]

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens so far."""
        return self.keys[layer].shape[-2]


class Decoder(nn.Module):
    """The graph's inputs and outputs around a transformers model; see the head of this file."""

    def __init__(self, model: Any, modules: tuple[ModuleShape, ...]) -> None:
        super().__init__()
        self.model = model
        self._names = [module.name for module in modules]
        self._factors: Factors = {}
        for module in modules:
            layer = adapted_layer(model, module.name, module.out_features, module.in_features)
            if type(layer) is not nn.Linear:
                raise GraphError(
                    f"{module.name} is a {type(layer).__name__}, not a plain linear layer; export "
                    "a base that is stored in full precision"
                )
            model.set_submodule(module.name, Adapted(layer, module.name, self._factors))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_at: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        downs: list[Tensor],
        ups: list[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits, all keys and all values."""
        self._factors.clear()
        self._factors.update(zip(self._names, zip(downs, ups, strict=True), strict=True))
        place = torch.arange(input_ids.shape[1]) + keys[0].shape[2]
        before = torch.arange(attention_mask.shape[1])[None, :] <= place[:, None]
        seen = before[None] & (attention_mask[:, None, :] > 0)
        lowest = torch.finfo(torch.float32).min
        cache = Cache(keys, values)
        out = self.model(
            input_ids=input_ids,
            attention_mask=torch.where(seen[:, None], 0.0, lowest),  # (b, 1, t, past + t)
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=logits_at,
        )
        return out.logits, cache.keys, cache.values


def context_tokens(config: Any) -> int:
    """How long a text may become: the positions, or the window of layers that see no farther.

    config: of a transformers model.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    positions = int(config.max_position_embeddings)
    if window is None or (kinds is not None and SLIDING not in kinds):
        return positions
    return min(positions, int(window))


def to_graph(model: Any, shape: ModelShape, modules: tuple[ModuleShape, ...]) -> Any:
    """The model as an `onnx_ir.Model` that holds torch's own weights, float32.

    `model`: float32, on the processor, in evaluation mode; it is no longer of use afterwards.
    Takes some seconds a layer. Raises `GraphError`.
    """
    rope = (getattr(model.config, "rope_parameters", None)
            or getattr(model.config, "rope_scaling", None) or {})  # fmt: skip
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if kind not in ROPES:
        raise GraphError(
            f"rotary positions of type {kind} change with the length of the text, which a graph "
            f"cannot hold; export a base with one of {', '.join(ROPES)}"
        )
    model.set_attn_implementation("eager")
    decoder = Decoder(model, modules).eval()
    arguments, names = _inputs(shape, modules)
    outputs = ["logits", *(f"present.{i}.{side}" for side in ("key", "value")
                           for i in range(shape.layers))]  # fmt: skip
    with torch.no_grad(), _quiet():
        try:
            program = torch.onnx.export(
                decoder,
                tuple(value for value, _ in arguments),
                dynamic_shapes=tuple(moving for _, moving in arguments),
                input_names=names,
                output_names=outputs,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # the exporter raises many unrelated types
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise GraphError(
                f"torch cannot export this {shape.model_type} model: {reason}"
            ) from error
    assert program is not None
    _any_rank(program.model.graph, modules)
    _forget_origin(program.model)
    return program.model


def _inputs(
    shape: ModelShape, modules: tuple[ModuleShape, ...]
) -> tuple[list[tuple[Any, Any]], list[str]]:
    """(example, which dimensions move) of every argument of `Decoder`; names of all tensors.

    No two sizes of the example are equal, nor 0 or 1, lest the exporter takes one for another.
    """
    batch, past, new = 2, 3, 4
    moves, held = torch.export.Dim.DYNAMIC, torch.export.Dim("past")
    cache = torch.zeros(batch, shape.kv_heads, past, shape.head_dim)
    sides = [[cache.clone() for _ in range(shape.layers)] for _ in range(2)]
    downs = [torch.zeros(m.in_features, TRACED_RANK) for m in modules]
    ups = [torch.zeros(TRACED_RANK, m.out_features) for m in modules]
    text = {0: moves, 1: moves}
    arguments: list[tuple[Any, Any]] = [
        (torch.zeros(batch, new, dtype=torch.int64), text),
        (torch.ones(batch, past + new, dtype=torch.int64), text),
        (torch.arange(past, past + new).repeat(batch, 1), text),
        (torch.tensor([0, 2, 3]), {0: moves}),
        *((side, [{0: moves, 2: held}] * shape.layers) for side in sides),
        (downs, [None] * len(modules)),
        (ups, [None] * len(modules)),
    ]
    names = ["input_ids", "attention_mask", "position_ids", "logits_at"]
    names += [f"past.{i}.{side}" for side in ("key", "value") for i in range(shape.layers)]
    names += [f"{m.name}.{part}" for part in ("down", "up") for m in modules]
    return arguments, names


def _any_rank(graph: Any, modules: tuple[ModuleShape, ...]) -> None:
    """Lets every module have a rank of its own. Only two products know it, and ask for no size.

    As a dimension that moves, each would double what the exporter has to prove; and under one name
    for all, ONNX Runtime would reuse the memory of one product for a larger one.
    """
    import onnx_ir

    for node in graph:
        for value in node.outputs:
            if value.shape is not None and not value.is_graph_output():
                value.shape = None
    inputs = {value.name: value for value in graph.inputs}
    for module in modules:
        rank = f"{module.name}.rank"
        inputs[f"{module.name}.down"].shape = onnx_ir.Shape([module.in_features, rank])
        inputs[f"{module.name}.up"].shape = onnx_ir.Shape([rank, module.out_features])


def _forget_origin(model: Any) -> None:
    """Drops what the exporter tells of its own source files, most of a small graph's bytes."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages it does not need here."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    before = [logger.level for logger in noisy]
    try:
        for logger in noisy:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, before, strict=True):
            logger.setLevel(level)
