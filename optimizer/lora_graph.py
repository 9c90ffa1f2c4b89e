"""Low-rank inputs beside the products of a prepared graph: y + (x @ A) @ B for every layer.

A and B are inputs of the graph, of any rank, 0 included. They read what a layer's input was before
it was rounded, and what they give is added before the output is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import nn

from optimizer.quantize.apply import quantizable_layers
from runners.lora_inputs import Target, lora_inputs
from runners.quantized import QuantizedLayer
from runners.refitting import weight_layer

__all__ = ["Factors", "add_low_rank", "factors", "layer_of", "targets"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Factors:
    """What quantizing multiplied a layer's input [in] and output [out] with; None: nothing."""

    input: Array | None = None
    output: Array | None = None


def targets(module: nn.Module) -> dict[str, Target]:
    """Every linear and ungrouped convolution, quantized or not, by name."""
    found = {name: layer.weight.shape for name, layer in quantizable_layers(module).items()}
    for name, layer in module.named_modules():
        if isinstance(layer, QuantizedLayer):
            found[name] = layer.codes.shape
    return {
        name: Target(int(shape[1]), int(shape[0]), tuple(int(side) for side in shape[2:]))
        for name, shape in found.items()
    }


def factors(module: nn.Module) -> dict[str, Factors]:
    """The factors of the layers that have any (optimizer.quantize.apply leaves them there)."""
    found = {}
    for name, layer in module.named_modules():
        pair = (getattr(layer, "input_factor", None), getattr(layer, "output_factor", None))
        if pair != (None, None):
            arrays = (None if x is None else x.detach().flatten().numpy() for x in pair)
            found[name] = Factors(*arrays)
    return found


def add_low_rank(
    model: ir.Model, wanted: Mapping[str, Target], scaled: Mapping[str, Factors]
) -> dict[str, Target]:
    """Give the graph the inputs of all `wanted` layers that it has; which ones these are."""
    surgery = _Surgery(model.graph)
    found: dict[str, Target] = {}
    for node in list(model.graph):
        name = layer_of(node)
        if name is None or name not in wanted:
            continue
        if name not in found:
            surgery.take(name, wanted[name], scaled.get(name, Factors()))
        found[name] = wanted[name]
        if wanted[name].kernel:
            surgery.beside_convolution(node, name, wanted[name])
        else:
            surgery.beside_linear(node, name)
    return found


def layer_of(node: ir.Node) -> str | None:
    """The layer whose product it is, by its weight's or codes' name."""
    if node.op_type not in ("MatMul", "Gemm", "Conv") or node.domain:
        return None
    value = node.inputs[1]
    while value is not None and (source := value.producer()) is not None:
        if source.op_type not in ("Transpose", "DequantizeLinear"):
            return None
        value = source.inputs[0]
    return weight_layer(str(value.name)) if value is not None else None


def _unrounded(value: ir.Value) -> ir.Value:
    """What a dequantized input was before it was quantized."""
    read = value.producer()
    rounded = read.inputs[0].producer() if read and read.op_type == "DequantizeLinear" else None
    if rounded is None or rounded.op_type != "QuantizeLinear":
        return value
    found = rounded.inputs[0]
    assert found is not None
    return found


def _with_bias(node: ir.Node) -> ir.Node:
    """The addition of a constant that alone reads the product, or the product itself."""
    uses = list(node.outputs[0].uses())
    if node.op_type != "MatMul" or len(uses) != 1 or uses[0].node.op_type != "Add":
        return node
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx]
    constant = other is not None and other.is_initializer()
    return add if constant and not node.outputs[0].is_graph_output() else node


class _Surgery:
    """Adds nodes to one graph; each layer's two inputs are taken once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._pairs: dict[str, tuple[ir.Value, ir.Value]] = {}
        self._after: ir.Node | None = None
        self._count = 0

    def take(self, name: str, target: Target, scaled: Factors) -> None:
        """Give the graph the two inputs of a layer, brought to the scale of what it multiplies."""
        pair = []
        for spec in lora_inputs({name: target}):
            value = ir.Value(
                name=spec.name,
                shape=ir.Shape(
                    [f"{spec.name}.rank" if isinstance(a, str) else a for a in spec.axes]
                ),
                type=ir.TensorType(ir.DataType.FLOAT),
            )
            self._graph.inputs.append(value)
            pair.append(value)
        self._after = None
        down, up = pair
        if scaled.input is not None:
            sides = [1] * (1 + len(target.kernel))
            inverse = (1 / scaled.input).astype(np.float32).reshape(-1, *sides)
            down = self._add("Mul", [down, self._constant(f"{name}.lora.input", inverse)], name)
        if scaled.output is not None:
            factor = scaled.output.astype(np.float32).reshape(1, -1)
            up = self._add("Mul", [up, self._constant(f"{name}.lora.output", factor)], name)
        self._pairs[name] = (down, up)

    def beside_linear(self, node: ir.Node, name: str) -> None:
        """Add (x @ A) @ B to a linear's output."""
        down, up = self._pairs[name]
        x = _unrounded(_given(node))
        last = self._after = _with_bias(node)
        thin = self._add("MatMul", [x, down], name)
        self._join(last, self._add("MatMul", [thin, up], name), name)

    def beside_convolution(self, node: ir.Node, name: str, target: Target) -> None:
        """Add the same to a convolution's output.

        The kernel's places are products over channels first; a convolution with a constant kernel
        then moves each to where it belongs: kernels as inputs aren't known to every backend.
        """
        down, up = self._pairs[name]
        x, y = _unrounded(_given(node)), node.outputs[0]
        self._after = node
        places = int(np.prod(target.kernel))
        size_in, size_out = self._sizes(x, 2, 4, name), self._sizes(y, 2, 4, name)
        batch, rank = self._sizes(x, 0, 1, name), self._sizes(up, 0, 1, name)
        rows = self._reshaped(down, [target.inputs, _REST], name)
        rows = self._add("Transpose", [rows], name, {"perm": (1, 0)})
        flat = self._reshaped(x, [batch, target.inputs, _REST], name)
        thin = self._add("MatMul", [rows, flat], name)  # [batch, rank * places, height * width]
        plain = all(side == 1 for side in target.kernel) and set(_steps(node)) == {1}
        if not plain:
            count = self._add("Mul", [batch, rank], name)
            planes = self._reshaped(thin, [count, places, size_in], name)
            kernel = self._constant(
                f"lora.places.{'x'.join(map(str, target.kernel))}",
                np.eye(places, dtype=np.float32).reshape(1, places, *target.kernel),
            )
            moved = self._add("Conv", [planes, kernel], name, _geometry(node))
            area = self._add("ReduceProd", [size_out], name, {"keepdims": 1})
            thin = self._reshaped(moved, [batch, rank, area], name)
        wide = self._add("Transpose", [up], name, {"perm": (1, 0)})
        product = self._add("MatMul", [wide, thin], name)
        whole = self._add("Shape", [y], name)
        self._join(node, self._add("Reshape", [product, whole], name, {"allowzero": 1}), name)

    def _join(self, last: ir.Node, added: ir.Value, name: str) -> None:
        """Let all who read the last node's output read the sum."""
        y = last.outputs[0]
        users = [
            (use.node, use.idx) for use in y.uses() if f"{name}.lora." not in str(use.node.name)
        ]
        joined = self._add("Add", [y, added], name)
        for user, index in users:
            user.replace_input_with(index, joined)
        if y.is_graph_output():
            outputs = self._graph.outputs
            joined.shape, joined.type, plain = y.shape, y.type, y.name
            outputs[list(outputs).index(y)] = joined
            y.name = f"{name}.lora.plain"
            joined.name = plain

    def _sizes(self, value: ir.Value, start: int, end: int, name: str) -> ir.Value:
        return self._add("Shape", [value], name, {"start": start, "end": end})

    def _reshaped(self, value: ir.Value, sizes: Sequence[ir.Value | int], name: str) -> ir.Value:
        """The value in another shape, of numbers and of computed sizes."""
        parts = [
            self._constant(f"lora.size.{size}", np.array([size], np.int64))
            if isinstance(size, int)
            else size
            for size in sizes
        ]
        shape = self._add("Concat", parts, name, {"axis": 0})
        known = _REST not in sizes
        return self._add("Reshape", [value, shape], name, {"allowzero": int(known)})

    def _constant(self, name: str, array: Array) -> ir.Value:
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self._graph.register_initializer(value)
        return value

    def _add(
        self,
        kind: str,
        inputs: Sequence[ir.Value],
        name: str,
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        self._count += 1
        label = f"{name}.lora.{self._count}"
        node = ir.node(kind, inputs, attributes, outputs=[ir.val(label)], name=label)
        if self._after is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(self._after, node)
        if self._after is not None:
            self._after = node
        return node.outputs[0]


_REST = -1


def _given(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _steps(node: ir.Node) -> Sequence[int]:
    return node.attributes.get_ints("strides", (1, 1)) or (1, 1)


def _geometry(node: ir.Node) -> dict[str, Any]:
    """The convolution's own attributes, for another kernel of the same size."""
    names = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")
    return {name: node.attributes[name].value for name in names if name in node.attributes}
