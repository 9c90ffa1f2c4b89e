"""An fp32 graph -> the same graph computed in 16 bits, every type written out (strong typing).

Builders that infer nothing need it. Graph inputs and outputs keep their types, with a Cast behind
or before them. Scales that are dequantized themselves, and what they dequantize, stay in fp32:
their own scale is too small for fp16. Norms say in their attributes that they sum in fp32.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from profiles.errors import BuildError

__all__ = ["narrow"]

_FLOAT = ir.DataType.FLOAT
_TYPES = {
    "fp16": (ir.DataType.FLOAT16, np.dtype(np.float16), 65504.0),
    "bf16": (ir.DataType.BFLOAT16, np.dtype(ml_dtypes.bfloat16), 3.3895313892515355e38),
}
_PRODUCTS = {"MatMul", "Gemm", "Conv", "Attention"}
_IN_FP32 = {
    "LayerNormalization": "stash_type",
    "GroupNormalization": "stash_type",
    "RMSNormalization": "stash_type",
}
_ALWAYS_FP32 = {"Resize": (1, 2)}
"""Inputs whose type the operator fixes."""


def narrow(model: ir.Model, dtype: str) -> None:
    """Let every float of the graph but its inputs' and outputs' be of `dtype`: fp16 or bf16.

    Raises BuildError where ONNX can't infer the type of a node's output.
    """
    passes.ShapeInferencePass()(model)  # what fails in it is logged, and nothing is changed
    for node in model.graph:
        if any(value.dtype is None for value in node.outputs):
            raise BuildError(
                f"The type of {node.op_type} at {node.name} can't be inferred: report the model."
            )
    _Narrowing(model.graph, dtype).run()


class _Narrowing:
    def __init__(self, graph: ir.Graph, dtype: str) -> None:
        self._graph = graph
        self._type, self._numpy, self._limit = _TYPES[dtype]
        self._precise: set[ir.Value] = set()
        self._cast: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        graph = self._graph
        wide = [x for x in graph.inputs if x.dtype == _FLOAT]
        nodes = list(graph)
        for node in nodes:
            if self._stays(node):
                self._precise.update(x for x in node.outputs if x.dtype == _FLOAT)
                continue
            self._narrow_node(node, wide)
        for index, value in enumerate(graph.outputs):
            if value.dtype == self._type:
                graph.outputs[index] = self._widened(value)

    def _stays(self, node: ir.Node) -> bool:
        """Whether a node reads only precise floats and constants, and is no product, or gives the
        scales of another dequantization.
        """
        if node.op_type == "DequantizeLinear" and any(
            user.op_type == "DequantizeLinear" and index == 1
            for user, index in node.outputs[0].uses()
        ):
            return True
        floats = [x for x in node.inputs if x is not None and x.dtype == _FLOAT]
        variable = [x for x in floats if not x.is_initializer()]
        return (
            bool(variable)
            and node.op_type not in _PRODUCTS
            and all(x in self._precise for x in variable)
        )

    def _narrow_node(self, node: ir.Node, wide: list[ir.Value]) -> None:
        fixed = _ALWAYS_FP32.get(node.op_type, ())
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != _FLOAT or index in fixed:
                continue
            if value.is_initializer():
                node.replace_input_with(index, self._constant(value))
            elif value in self._precise or value in wide:
                node.replace_input_with(index, self._narrowed(value))
        if (name := _IN_FP32.get(node.op_type)) is not None:
            node.attributes[name] = ir.AttrInt64(name, _FLOAT.value)
        if node.op_type == "Cast" and node.attributes["to"].as_int() == _FLOAT.value:
            node.attributes["to"] = ir.AttrInt64("to", self._type.value)
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == _FLOAT:
                node.attributes[name] = ir.AttrTensor(name, self._tensor(attribute.value))
        for value in node.outputs:
            if value.dtype == _FLOAT:
                value.dtype = self._type

    def _tensor(self, tensor: ir.TensorProtocol, name: str | None = None) -> ir.LazyTensor:
        """The tensor in the type, made when it is written: all of a large model's wouldn't fit.

        Values that the type can't hold become the nearest that it can.
        """

        def made() -> ir.Tensor:
            held = np.clip(tensor.numpy(), -self._limit, self._limit).astype(self._numpy)
            return ir.Tensor(held, dtype=self._type, name=name)

        return ir.LazyTensor(made, dtype=self._type, shape=tensor.shape, name=name)

    def _constant(self, value: ir.Value) -> ir.Value:
        """The initializer in the type; its fp32 form stays for whoever needs that."""
        if value not in self._cast:
            assert value.const_value is not None
            users = {node for node, _ in value.uses()}
            shared = any(self._stays(node) or node.op_type in _ALWAYS_FP32 for node in users)
            name = f"{value.name}.{self._type.name.lower()}" if shared else value.name
            tensor = self._tensor(value.const_value, name)
            if not shared:
                del self._graph.initializers[value.name or ""]
            found = ir.Value(
                name=name, shape=value.shape, type=ir.TensorType(self._type), const_value=tensor
            )
            self._graph.register_initializer(found)
            self._cast[value] = found
        return self._cast[value]

    def _narrowed(self, value: ir.Value) -> ir.Value:
        """A Cast of a precise value or a graph input, one for all its readers."""
        if value not in self._cast:
            node = _cast(value, self._type, f"{value.name}.{self._type.name.lower()}")
            producer = value.producer()
            if producer is None:
                self._graph.insert_before(self._graph[0], node)
            else:
                self._graph.insert_after(producer, node)
            self._cast[value] = node.outputs[0]
        return self._cast[value]

    def _widened(self, value: ir.Value) -> ir.Value:
        name = value.name
        value.name = f"{name}.{self._type.name.lower()}"
        node = _cast(value, _FLOAT, name or "")
        self._graph.append(node)
        return node.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": dtype.value})
    node.outputs[0].name = name
    node.outputs[0].shape = value.shape
    node.outputs[0].dtype = dtype
    return node
