"""The weights of an exported graph in 8 or 4 bits, and the factors that stand for no adapter.

Linear layers become `MatMulNBits` of ONNX Runtime: blocks of 32 weights with a scale each (and a
zero point, in 4 bits), activations in 8 bits by row, so that a token's result does not depend on
which others are computed with it, as it would with ONNX's own dynamic quantisation. Embeddings and
the output head keep 8 bits in either case, and are stored once where they are tied. Knows ONNX; no
torch, no files.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import onnx
import onnx_ir
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_agent.inference_folder import ExportPrecision
from profiles.model import ModuleShape

BLOCK_WEIGHTS = 32
INT8_SUMS = 4  # MatMulNBits' accuracy_level: products in int8


def quantise(model: ModelProto, precision: ExportPrecision) -> ModelProto:
    """The graph with weights of this precision, and no adapter; it is changed in place."""
    _drop_absent_adapter(model)
    embedding = _embedding(model)
    width = next(t for t in model.graph.initializer if t.name == embedding.input[0]).dims[1]
    tied = width % BLOCK_WEIGHTS == 0 and any(
        node.op_type == "Transpose" and node.input[0] == embedding.input[0]
        for node in model.graph.node
    )
    _transpose_weights(model)
    head = _head(model)
    if precision == "int4":
        model = _linears(model, 4, leave=[head.name])
    model = _linears(model, 8)
    embedding = _embedding(model)
    if tied:
        _look_up_in_head(model, embedding, width)
    else:
        _look_up_in_8_bits(model, embedding)
    return model


def add_absent_adapter(graph: onnx_ir.Graph, modules: tuple[ModuleShape, ...]) -> None:
    """Factors of rank 0 for every module, as initialisers that an adapter takes the place of."""
    inputs = {value.name: value for value in graph.inputs}
    for module in modules:
        for part, shape in (("down", (module.in_features, 0)), ("up", (0, module.out_features))):
            value = inputs[f"{module.name}.{part}"]
            value.const_value = onnx_ir.tensor(np.zeros(shape, np.float32), name=value.name)
            graph.register_initializer(value)


def _drop_absent_adapter(model: ModelProto) -> None:
    """What quantises a graph would take it for constants, and drop the inputs."""
    inputs = {value.name for value in model.graph.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in inputs]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _transpose_weights(model: ModelProto) -> None:
    """Stores what the graph would transpose: a head tied to the embeddings, which are wanted so."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [n for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in weights]:
        values = numpy_helper.to_array(weights[node.input[0]])
        turned = np.ascontiguousarray(values.transpose(_axes(node, values.ndim)))
        model.graph.initializer.append(numpy_helper.from_array(turned, node.output[0]))
        model.graph.node.remove(node)


def _axes(node: NodeProto, dimensions: int) -> list[int]:
    """`perm` of a Transpose; reversed is what it means when it says nothing."""
    given = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
    return list(reversed(range(dimensions))) if given is None else given


def _embedding(model: ModelProto) -> NodeProto:
    """What looks tokens up."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return next(n for n in model.graph.node if n.op_type == "Gather" and n.input[0] in weights
                and n.input[1] == "input_ids")  # fmt: skip


def _head(model: ModelProto) -> NodeProto:
    """What gives the logits: of the products with weights, the last."""
    weights = {tensor.name for tensor in model.graph.initializer}
    products = ("MatMul", "MatMulNBits")
    return [n for n in model.graph.node if n.op_type in products and n.input[1] in weights][-1]


def _look_up_in_8_bits(model: ModelProto, embedding: NodeProto) -> None:
    """int8 with a scale per token."""
    weights = next(t for t in model.graph.initializer if t.name == embedding.input[0])
    values = numpy_helper.to_array(weights)  # (vocabulary, width)
    scales = np.maximum(np.abs(values).max(1, keepdims=True) / 127, np.float32(1e-12))
    codes = np.rint(values / scales).astype(np.int8)
    model.graph.initializer.extend([
        numpy_helper.from_array(codes, "embedding.codes"),
        numpy_helper.from_array(scales.astype(np.float32), "embedding.scales"),
    ])  # fmt: skip
    wanted = embedding.input[1]
    _replace(model, embedding, [
        helper.make_node("Gather", ["embedding.codes", wanted], ["embedded.codes"]),
        helper.make_node("Cast", ["embedded.codes"], ["embedded.floats"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["embedding.scales", wanted], ["embedded.scales"]),
        helper.make_node("Mul", ["embedded.floats", "embedded.scales"], [embedding.output[0]]),
    ])  # fmt: skip


def _look_up_in_head(model: ModelProto, embedding: NodeProto, width: int) -> None:
    """Out of the blocks of a head that is tied to it: bytes around 128, with a scale each."""
    head = _head(model)
    codes, scales = head.input[1], head.input[2]  # (vocabulary, blocks, 32), (vocabulary × blocks)
    wanted = embedding.input[1]
    model.graph.initializer.extend([
        numpy_helper.from_array(np.array(128, np.float32), "embedding.zero"),
        numpy_helper.from_array(np.array([-1, width // BLOCK_WEIGHTS, 1]), "embedding.blocks"),
        numpy_helper.from_array(np.array([0, 0, width]), "embedding.width"),
    ])  # fmt: skip
    _replace(model, embedding, [
        helper.make_node("Gather", [codes, wanted], ["embedded.codes"]),
        helper.make_node("Cast", ["embedded.codes"], ["embedded.bytes"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["embedded.bytes", "embedding.zero"], ["embedded.floats"]),
        helper.make_node("Reshape", [scales, "embedding.blocks"], ["embedding.scales"]),
        helper.make_node("Gather", ["embedding.scales", wanted], ["embedded.scales"]),
        helper.make_node("Mul", ["embedded.floats", "embedded.scales"], ["embedded.blocks"]),
        helper.make_node("Reshape", ["embedded.blocks", "embedding.width"], [embedding.output[0]]),
    ])  # fmt: skip


def _replace(model: ModelProto, old: NodeProto, new: list[NodeProto]) -> None:
    """Puts nodes in the place of one, whose weights go with it."""
    graph = model.graph
    place = list(graph.node).index(old)
    weights = old.input[0]
    graph.node.remove(old)
    for node in reversed(new):
        graph.node.insert(place, node)
    if not any(weights in node.input for node in graph.node):
        graph.initializer.remove(next(t for t in graph.initializer if t.name == weights))


def _linears(model: ModelProto, bits: int, leave: list[str] | None = None) -> ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    told = logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer")
    level = told.level
    told.setLevel(logging.ERROR)  # it says a line per product
    try:
        make: Any = MatMulNBitsQuantizer  # untyped
        work = make(
            model,
            bits=bits,
            block_size=BLOCK_WEIGHTS,
            is_symmetric=bits == 8,
            accuracy_level=INT8_SUMS,
            nodes_to_exclude=leave or [],
            op_types_to_quantize=("MatMul",),
        )
        work.process()
    finally:
        told.setLevel(level)
    quantised: onnx.ModelProto = work.model.model
    return quantised
