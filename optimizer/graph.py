"""Clean-up of an exported ONNX graph: exporter metadata, repeated work, int4 packing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from runners.refitting import TRANSPOSED

__all__ = ["clean", "fold_fp4", "name_transposed"]


def clean(model: ir.Model) -> None:
    """Merge equal scales and repeated Q/DQ, fold multipliers, pack 4-bit codes, strip metadata."""
    _share_small_initializers(model.graph)
    passes.CommonSubexpressionEliminationPass()(model)
    _fold_multipliers(model.graph)
    _pack_4_bits(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    _strip(model)


def name_transposed(graph: ir.Graph) -> None:
    """Name a transposed parameter after the parameter: the optimizer stores linears' weights so."""
    for node in graph:
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is not None and source.is_initializer():
            node.outputs[0].name = f"{source.name}{TRANSPOSED}"


def _share_small_initializers(graph: ir.Graph) -> None:
    """Let equal scalars, and multipliers, be one, so that equal Quantize nodes are seen to be."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or (tensor.size > 1 and not _is_multiplier(value)):
            continue
        array = tensor.numpy()
        key = (tensor.dtype, array.shape, array.tobytes())
        kept = first.setdefault(key, value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            if not value.is_graph_output():
                del graph.initializers[value.name or ""]


def _is_multiplier(value: ir.Value | None) -> bool:
    """Whether it is one of runners.quantized's."""
    return value is not None and value.is_initializer() and ".multiplier" in (value.name or "")


_NORMS = {"LayerNormalization", "GroupNormalization"}


def _fold_multipliers(graph: ir.Graph) -> None:
    """Let a norm whose output is only multiplied, channel by channel, give the product itself."""
    for node in list(graph):
        if node.op_type != "Mul" or not any(_is_multiplier(value) for value in node.inputs):
            continue
        x, multiplier = sorted(node.inputs, key=_is_multiplier)
        norm = x.producer() if x is not None else None
        if norm is None or norm.op_type not in _NORMS or len(x.uses()) != 1:
            continue
        if not all(value is None or value.is_initializer() for value in norm.inputs[1:]):
            continue
        factor = multiplier.const_value.numpy().reshape(-1)
        for index, value in enumerate(norm.inputs[1:], start=1):
            if value is not None:
                norm.replace_input_with(index, _multiplied(graph, value, factor, norm))
        node.outputs[0].replace_all_uses_with(x)
        graph.remove(node, safe=True)


def _multiplied(graph: ir.Graph, value: ir.Value, factor: np.ndarray, reader: ir.Node) -> ir.Value:
    """The initializer times `factor`, under its own name unless others read it as it is."""
    assert value.const_value is not None
    array = (value.const_value.numpy() * factor).astype(np.float32)
    if len(value.uses()) == 1:
        value.const_value = ir.tensor(array, name=value.name)
        return value
    name = f"{value.name}.of.{reader.name}"
    found = ir.Value(
        name=name, shape=value.shape, type=value.type, const_value=ir.tensor(array, name=name)
    )
    graph.register_initializer(found)
    return found


_PACKED = {ir.DataType.INT8: ir.DataType.INT4, ir.DataType.UINT8: ir.DataType.UINT4}


def _pack_4_bits(graph: ir.Graph) -> None:
    """Give codes and zero points of block-wise DequantizeLinear nodes 4-bit types, two a byte.

    Where the scales are dequantized themselves, the codes are e2m1's bits (nvfp4).
    """
    for node in graph:
        if node.op_type != "DequantizeLinear" or not node.attributes.get_int("block_size", 0):
            continue
        for value in (node.inputs[0], *node.inputs[2:]):
            if value is None or value.const_value is None:
                continue
            packed = _PACKED.get(value.const_value.dtype)
            scale = node.inputs[1].producer() if node.inputs[1] is not None else None
            if packed is not None and scale is not None and scale.op_type == node.op_type:
                packed = ir.DataType.FLOAT4E2M1
            if packed is None:  # shared with a node that was here before
                continue
            array = value.const_value.numpy()
            value.const_value = ir.PackedTensor(
                _nibbles(array), packed, shape=ir.Shape(array.shape), name=value.name
            )
            value.dtype = packed


def fold_fp4(model: ir.Model) -> None:
    """Turn dequantized e2m1 weights into the fp32 weights that they stand for."""
    graph = model.graph
    for node in list(graph):
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.const_value is None:
            continue
        if codes.const_value.dtype != ir.DataType.FLOAT4E2M1:
            continue
        scales = node.inputs[1].producer()
        small, whole = (value.const_value.numpy().astype(np.float32) for value in scales.inputs)
        group = node.attributes["block_size"].as_int()
        weight = codes.const_value.numpy().astype(np.float32) * np.repeat(small * whole, group, 1)
        name = f"{codes.name}.dequantized"
        value = ir.Value(
            name=name,
            shape=ir.Shape(weight.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.tensor(weight, name=name),
        )
        graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
    passes.RemoveUnusedNodesPass()(model)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    flat = codes.reshape(-1).astype(np.uint8) & 0xF
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    packed: np.ndarray = flat[0::2] | (flat[1::2] << 4)
    return packed


def _strip(model: ir.Model) -> None:
    """Remove metadata_props, doc strings and value_info: stack traces with absolute paths."""
    passes.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    ends = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        node.metadata_props.clear()
    computed = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *computed):
        value.metadata_props.clear()
        if value not in ends:
            value.shape, value.type = None, None
