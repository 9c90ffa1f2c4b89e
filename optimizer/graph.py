"""Clean-up of an exported ONNX graph: exporter metadata, repeated work, int4 packing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

__all__ = ["clean", "name_transposed"]


def clean(model: ir.Model) -> None:
    """Merge equal scales and repeated Q/DQ, pack 4-bit codes, strip the exporter's metadata."""
    _share_small_initializers(model.graph)
    passes.CommonSubexpressionEliminationPass()(model)
    _pack_int4(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    _strip(model)


def name_transposed(graph: ir.Graph) -> None:
    """Name a transposed parameter after the parameter: the optimizer stores linears' weights so."""
    for node in graph:
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is not None and source.is_initializer():
            node.outputs[0].name = f"{source.name}.transposed"


def _share_small_initializers(graph: ir.Graph) -> None:
    """Let equal scalars be one value, so that equal Quantize nodes are seen to be equal."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.size > 1:
            continue
        array = tensor.numpy()
        key = (tensor.dtype, array.shape, array.tobytes())
        kept = first.setdefault(key, value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            if not value.is_graph_output():
                del graph.initializers[value.name or ""]


_PACKED = {ir.DataType.INT8: ir.DataType.INT4, ir.DataType.UINT8: ir.DataType.UINT4}


def _pack_int4(graph: ir.Graph) -> None:
    """Give codes and zero points of block-wise DequantizeLinear nodes 4-bit types, two a byte."""
    for node in graph:
        if node.op_type != "DequantizeLinear" or not node.attributes.get_int("block_size", 0):
            continue
        for value in (node.inputs[0], *node.inputs[2:]):
            if value is None or value.const_value is None:
                continue
            packed = _PACKED.get(value.const_value.dtype)
            if packed is None:  # shared with a node that was here before
                continue
            array = value.const_value.numpy()
            value.const_value = ir.PackedTensor(
                _nibbles(array), packed, shape=ir.Shape(array.shape), name=value.name
            )
            value.dtype = packed


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
