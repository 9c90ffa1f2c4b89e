"""Group norms of a graph whose statistics come from outside, as runners.vae_parts has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["give_statistics"]


def give_statistics(
    graph: ir.Graph, norms: Sequence[ir.Node], inputs: Mapping[str, ir.Value]
) -> ir.Value:
    """Put operators that take the inputs `rows`, `columns`, `own` and `given` in the place of every
    GroupNormalization among `norms`; returns what they see, [norms, 2, groups].
    """
    seen = []
    for index, node in enumerate(norms):
        seen.append(_Norm(graph, node, inputs).replaced(index))
    joined = ir.node("Concat", seen, {"axis": 0}, name="tile.seen")
    joined.outputs[0].name = "tile.seen.value"
    graph.append(joined)
    return joined.outputs[0]


class _Norm:
    """One norm's operators, put before it, and then in its place."""

    def __init__(self, graph: ir.Graph, node: ir.Node, inputs: Mapping[str, ir.Value]) -> None:
        self._graph, self._node, self._inputs = graph, node, inputs
        self._count = 0
        x, weight, bias = node.inputs
        assert x is not None and weight is not None and bias is not None and weight.shape  # noqa: PT018
        # the attention's norm reads [batch, channels, places], folded of a map: here the map is
        folded = x.producer()
        self._fold = folded if folded is not None and folded.op_type == "Reshape" else None
        self._x = x if self._fold is None else self._fold.inputs[0]
        self._weight, self._bias = weight, bias
        self._groups = int(node.attributes["num_groups"].as_int())
        self._channels = int(weight.shape.numpy()[0])

    def replaced(self, index: int) -> ir.Value:
        """What it sees, [1, 2, groups]; whoever read the norm reads what these operators give."""
        rows, columns = self._side("rows", 2, [1, -1]), self._side("columns", 3, [-1, 1])
        mean = self._over_core(self._x, rows, columns)
        centred = self._add("Sub", self._x, self._by_channel(mean))
        variance = self._over_core(self._add("Mul", centred, centred), rows, columns)
        used, spread = self._used(mean, variance, index)
        eps = self._number(float(self._node.attributes["epsilon"].as_float()))
        deviation = self._add("Sqrt", self._add("Add", spread, eps))
        scale = self._by_channel(self._add("Reciprocal", deviation))
        weight, bias = (
            self._reshaped(value, [1, self._channels, 1, 1]) for value in (self._weight, self._bias)
        )
        moved = self._add("Sub", self._x, self._by_channel(used))
        scaled = self._add("Mul", moved, self._add("Mul", scale, weight))
        normed = self._add("Add", scaled, bias)
        if self._fold is not None:
            normed = self._add("Reshape", normed, self._fold.inputs[1])
        seen = self._reshaped(self._add("Concat", mean, variance, axis=0), [1, 2, self._groups])
        for use in list(self._node.outputs[0].uses()):
            use.node.replace_input_with(use.idx, normed)
        self._graph.remove(self._node, safe=True)
        return seen

    def _used(self, mean: ir.Value, variance: ir.Value, index: int) -> tuple[ir.Value, ir.Value]:
        """Mean and variance that it norms with, each [groups]."""
        own = self._inputs["own"]
        given = self._add("Gather", self._inputs["given"], self._whole(index), axis=0)
        added, factor = (self._add("Gather", given, self._whole(i), axis=0) for i in (0, 1))
        used = self._add("Add", self._add("Mul", own, mean), added)
        rest = self._add("Sub", self._number(1.0), own)
        spread = self._add("Add", self._add("Mul", own, variance), rest)
        return used, self._add("Mul", spread, factor)

    def _side(self, name: str, axis: int, shape: list[int]) -> ir.Value:
        """An input's latents as the norm's places."""
        value = self._inputs[name]
        places = self._add("Shape", self._x, start=axis, end=axis + 1)
        latents = self._add("Shape", value)
        scale = self._add("Div", places, latents)
        wide = self._add("Concat", latents, scale, axis=0)
        repeated = self._add("Expand", self._reshaped(value, [-1, 1]), wide)
        return self._reshaped(repeated, shape)

    def _over_core(self, value: ir.Value, rows: ir.Value, columns: ir.Value) -> ir.Value:
        """[1, channels, height, width] -> the weighted mean of each group, [groups]."""
        across = self._add("Div", self._add("MatMul", value, columns), self._total(columns))
        means = self._add("Div", self._add("MatMul", rows, across), self._total(rows))
        grouped = self._reshaped(means, [self._groups, -1])
        return self._add("ReduceMean", grouped, self._sizes([1]), keepdims=0)

    def _total(self, side: ir.Value) -> ir.Value:
        return self._add("ReduceSum", side, keepdims=1)

    def _by_channel(self, value: ir.Value) -> ir.Value:
        """[groups] -> [1, channels, 1, 1]."""
        each = self._channels // self._groups
        wide = self._add(
            "Expand", self._reshaped(value, [-1, 1]), self._sizes([self._groups, each])
        )
        return self._reshaped(wide, [1, self._channels, 1, 1])

    def _reshaped(self, value: ir.Value, shape: list[int]) -> ir.Value:
        return self._add("Reshape", value, self._sizes(shape))

    def _sizes(self, sizes: list[int]) -> ir.Value:
        return self._constant(f"tile.sizes.{sizes}", np.array(sizes, np.int64))

    def _whole(self, number: int) -> ir.Value:
        return self._constant(f"tile.whole.{number}", np.array(number, np.int64))

    def _number(self, number: float) -> ir.Value:
        return self._constant(f"tile.number.{number}", np.array(number, np.float32))

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        if name not in self._graph.initializers:
            value = ir.val(name, const_value=ir.tensor(array, name=name))
            self._graph.register_initializer(value)
        return self._graph.initializers[name]

    def _add(self, kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        self._count += 1
        label = f"{self._node.name}.tile.{self._count}"
        node = ir.node(kind, inputs, attributes, outputs=[ir.val(label)], name=label)
        self._graph.insert_before(self._node, node)
        return node.outputs[0]
