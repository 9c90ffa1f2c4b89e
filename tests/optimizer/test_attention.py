"""ONNX Runtime's attention in blocks: the same numbers as the standard operator's, no matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from optimizer.backends.onnxruntime_attention import use_blocks
from runners import gauge

HEADS, SIZE = 4, 16


def model(*, masked: bool = False, heads: int | str = HEADS, **attributes: Any) -> ir.Model:
    def value(name: str, places: str) -> Any:
        return helper.make_tensor_value_info(
            name, TensorProto.FLOAT, ["batch", heads, places, SIZE]
        )

    inputs = [value("q", "queries"), value("k", "keys"), value("v", "keys")]
    if masked:
        axes = ["batch", heads, "queries", "keys"]
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, axes))
    node = helper.make_node("Attention", [x.name for x in inputs], ["y"], **attributes)
    graph = helper.make_graph([node], "attention", inputs, [value("y", "queries")])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return ir.from_proto(made)


def session(found: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    raw = ir.to_proto(found).SerializeToString()
    return ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])


def feeds(batch: int, queries: int, keys: int) -> dict[str, Any]:
    numbers = np.random.default_rng(0)

    def draw(places: int) -> Any:
        return numbers.standard_normal((batch, HEADS, places, SIZE)).astype(np.float32)

    return {"q": draw(queries), "k": draw(keys), "v": draw(keys)}


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.11}, {"is_causal": 0}], ids=str)
@pytest.mark.parametrize("sizes", [(1, 64, 64), (2, 100, 7), (3, 300, 300)], ids=str)
def test_blocks_give_the_operators_numbers(
    sizes: tuple[int, int, int], attributes: dict[str, Any]
) -> None:
    given = feeds(*sizes)
    [wanted] = session(model(**attributes)).run(None, given)
    blocks = model(**attributes)
    assert use_blocks(blocks) == 1
    assert not [node for node in blocks.graph if node.op_type == "Attention"]
    [found] = session(blocks).run(None, given)
    # sums of up to 300 products in another order: a few roundings of fp32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "changed",
    [{"masked": True}, {"is_causal": 1}, {"softcap": 2.0}, {"heads": "heads"}],
    ids=str,
)
def test_what_the_kernel_cannot_do_stays(changed: dict[str, Any]) -> None:
    found = model(**changed)
    assert use_blocks(found) == 0
    assert [node.op_type for node in found.graph] == ["Attention"]


def unshaped(*, one: bool) -> ir.Model:
    """As a VAE is exported: heads are split off by a Reshape, and no shape in between is noted; of
    `one` picture at once, to a constant shape.
    """
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "places", HEADS * SIZE])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", HEADS, "places", SIZE])
    sizes = {"batch": 1, "rest": -1, "heads": HEADS, "size": SIZE}
    numbers = [helper.make_tensor(n, TensorProto.INT64, [1], [size]) for n, size in sizes.items()]
    numbers.append(helper.make_tensor("whole", TensorProto.INT64, [4], list(sizes.values())))
    nodes = [
        helper.make_node("Concat", list(sizes), ["joined"], axis=0),
        helper.make_node("Reshape", ["x", "whole" if one else "joined"], ["split"]),
        helper.make_node("Transpose", ["split"], ["turned"], perm=[0, 2, 1, 3]),
        helper.make_node("Attention", ["turned"] * 3, ["y"]),
    ]
    graph = helper.make_graph(nodes, "unshaped", [x], [y], numbers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return ir.from_proto(made)


@pytest.mark.parametrize("one", [False, True])
def test_heads_are_read_of_what_splits_them_off(one: bool) -> None:
    given = {"x": np.random.default_rng(0).standard_normal((1, 50, HEADS * SIZE), np.float32)}
    [wanted] = session(unshaped(one=one)).run(None, given)
    blocks = unshaped(one=one)
    assert use_blocks(blocks) == 1
    [found] = session(blocks).run(None, given)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6)


def test_the_matrix_is_never_held() -> None:
    places = 1536
    given, matrix = feeds(1, places, places), HEADS * places * places * 4
    blocks = model()
    use_blocks(blocks)
    rises = []
    for found in (session(blocks), session(model())):
        found.run(None, feeds(1, 8, 8))
        gauge.trim()
        before = gauge.resident_bytes()
        gauge.reset_peak()
        found.run(None, given)
        rises.append(gauge.peak_bytes() - before)
    # the arrays themselves are 6 MB; the matrix is 38 MB
    assert rises[0] < matrix / 2 < rises[1]
