"""Graphs after simplifying: fewer nodes, the same numbers, whatever sides come."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from optimizer.simplifying import simplify

_GRAPH = """
<ir_version: 11, opset_import: ["" : 23]>
halves (float[batch, 8, side] x) => (float[batch, 8, side] y, float[batch, 8, side] z)
<float zero = {0.0}, int64[1] start = {0}, int64[1] middle = {4}, int64[1] end = {8},
 int64[1] axis = {1}, int64[3] turned = {0, 8, -1}>
{
    same = Add (x, zero)
    sizes = Shape (same)
    whole = Reshape (same, sizes)
    once = Transpose <perm = [0, 2, 1]> (whole)
    back = Transpose <perm = [0, 2, 1]> (once)
    first = Slice (back, start, middle, axis)
    second = Slice (back, middle, end, axis)
    y = Concat <axis = 1> (second, first)
    z = Reshape (back, turned)
}
"""


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    found: list[np.ndarray] = session.run(None, {"x": x})
    return found


@pytest.mark.parametrize("shape", [(1, 8, 5), (3, 8, 2)])
def test_what_changes_nothing_goes_and_the_rest_gives_the_same(shape: tuple[int, ...]) -> None:
    model = ir.from_proto(onnx.parser.parse_model(_GRAPH))
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    before = run(model, x)
    simplify(model)
    for wanted, found in zip(before, run(model, x), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert {"Add", "Transpose"}.isdisjoint(node.op_type for node in model.graph)


def test_shape_arithmetic_is_folded_and_parameters_are_not() -> None:
    x, weight, two = (ir.val(n, ir.DataType.FLOAT, [64, 64]) for n in ("x", "weight", "two"))
    weight.const_value = ir.tensor(np.ones((64, 64), np.float32), name="weight")
    two.const_value = ir.tensor(np.full((64, 64), 2, np.float32), name="two")
    sides = [
        ir.val(n, const_value=ir.tensor(np.array([i]), name=n)) for n, i in (("a", 32), ("b", 2))
    ]
    tape = ir.tape.Tape()
    side = tape.op("Mul", sides)
    doubled = tape.op("Mul", [weight, two])
    product = tape.op(
        "MatMul", [tape.op("Reshape", [x, tape.op("Concat", [side, side], {"axis": 0})]), doubled]
    )
    graph = ir.Graph(
        [x], [product], nodes=tape.nodes, initializers=[weight, two, *sides], opset_imports={"": 23}
    )
    simplify(ir.Model(graph, ir_version=11))
    assert [node.op_type for node in graph] == ["Mul", "MatMul"]  # to 64x64 it was already
    assert weight in graph.initializers.values()
