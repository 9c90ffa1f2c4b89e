"""ONNX -> ONNX Runtime: the exported graph, 4-bit linears as MatMulNBits, which has kernels.

ONNX Runtime unpacks a block-wise DequantizeLinear to floats when a session opens; MatMulNBits keeps
the codes. Convolutions have no such kernel: 4 bits in the file, floats in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer.backends import Built
from runners.engines.onnxruntime import ACCURACY

__all__ = ["build", "low_bit_layers", "use_low_bit_products"]

_GRAPH, _WEIGHTS = "model.onnx", "model.onnx.data"
_DOMAIN, _KERNEL = "com.microsoft", "MatMulNBits"


def build(
    source: Path,
    out: Path,
    *,
    dtype: str,  # noqa: ARG001
    role: str,  # noqa: ARG001
    dynamic: bool = False,  # noqa: ARG001
) -> Built:
    """Write graph and weights into `out`; the session optimizes when it opens."""
    model = ir.load(source / _GRAPH)
    use_low_bit_products(model)
    ir.save(model, out / _GRAPH, external_data=_WEIGHTS)
    if not (out / _WEIGHTS).is_file():
        (out / _WEIGHTS).touch()
    return Built(
        files={"graph": _GRAPH, "weights": _WEIGHTS},
        properties={"weights_location": _WEIGHTS, ACCURACY: "1"},
    )


def low_bit_layers(engine: Any) -> int:
    """The MatMulNBits of the graph: no other product of ours has a low-bit kernel there."""
    graph = ir.from_proto(_proto(bytes(engine.files["graph"]))).graph
    return sum(node.op_type == _KERNEL for node in graph)


def _proto(raw: bytes) -> Any:
    import onnx

    return onnx.load_from_string(raw)


def use_low_bit_products(model: ir.Model) -> None:
    """Replace every product with a 4-bit weight [out, in] by a MatMulNBits over the same codes."""
    for node in list(model.graph):
        weight = _four_bit_weight(node)
        if weight is not None:
            _replace(model.graph, node, weight)
    for node in reversed(list(model.graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    model.opset_imports[_DOMAIN] = 1


def _four_bit_weight(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear behind a MatMul's transposed weight, if it is a 4-bit one."""
    if node.op_type != "MatMul":
        return None
    turned = node.inputs[1].producer() if node.inputs[1] is not None else None
    if turned is None or turned.op_type != "Transpose" or turned.inputs[0] is None:
        return None
    found = turned.inputs[0].producer()
    if found is None or found.op_type != "DequantizeLinear" or found.inputs[0] is None:
        return None
    four = found.inputs[0].dtype in (ir.DataType.INT4, ir.DataType.UINT4)
    return found if four and found.attributes.get_int("block_size", 0) else None


def _replace(graph: ir.Graph, product: ir.Node, weight: ir.Node) -> None:
    codes, scale, zero = (*(_tensor(value) for value in weight.inputs), None)[:3]
    assert codes is not None
    assert scale is not None
    group = weight.attributes.get_int("block_size", 0)
    values = codes.numpy().astype(np.int16)
    signed = codes.dtype == ir.DataType.INT4
    rows, columns = values.shape
    packed = _packed(values + 8 if signed else values).reshape(rows, columns // group, group // 2)
    name = (codes.name or "").removesuffix(".codes")
    inputs = [
        product.inputs[0],
        _constant(graph, f"{name}.packed", packed),
        _constant(graph, f"{name}.scales", scale.numpy().reshape(-1)),
    ]
    if zero is not None:
        zeros = zero.numpy().astype(np.int16)
        if zeros.shape[1] % 2:
            zeros = np.pad(zeros, ((0, 0), (0, 1)))
        inputs.append(_constant(graph, f"{name}.zeros", _packed(zeros).reshape(-1)))
    kernel = ir.node(
        _KERNEL,
        inputs,
        {"K": columns, "N": rows, "bits": 4, "block_size": group, "accuracy_level": 1},
        domain=_DOMAIN,
        outputs=[ir.val(f"{name}.product")],
    )
    graph.insert_before(product, kernel)
    product.outputs[0].replace_all_uses_with(kernel.outputs[0])
    graph.remove(product, safe=True)


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None else value.const_value


def _packed(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Two codes 0..15 a byte along the last axis, low nibble first."""
    pairs = codes.astype(np.uint8).reshape(*codes.shape[:-1], -1, 2)
    found: np.ndarray[Any, Any] = pairs[..., 0] | (pairs[..., 1] << 4)
    return found


def _constant(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value
