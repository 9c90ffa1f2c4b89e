"""An fp32 graph in 16 bits: what stays, what is cast, and that ONNX's own checker agrees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimizer.narrow import narrow
from profiles.errors import BuildError

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def model() -> ir.Model:
    """A sine of an input times a frequency, into a product, a norm and a resize."""
    rng = np.random.default_rng(0)
    tensors = {
        "frequency": rng.random((1, 8), np.float32),
        "weight": rng.standard_normal((8, 16), np.float32),
        "huge": np.array([-3.4e38, 1.0], np.float32),
        "gain": np.ones(16, np.float32),
        "offset": np.zeros(16, np.float32),
        "axes": np.array([1], np.int64),
        "scales": np.array([1, 2], np.float32),
    }
    nodes = [
        helper.make_node("Unsqueeze", ["angle_of", "axes"], ["column"]),
        helper.make_node("Mul", ["column", "frequency"], ["angle"]),
        helper.make_node("Sin", ["angle"], ["sine"]),
        helper.make_node("MatMul", ["sine", "weight"], ["embedded"]),
        helper.make_node("Add", ["embedded", "sample"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "gain", "offset"], ["normed"]),
        helper.make_node("Resize", ["normed", "", "scales"], ["larger"]),
        helper.make_node("ReduceMax", ["huge"], ["largest"], keepdims=0),
        helper.make_node("Add", ["larger", "largest"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("angle_of", FLOAT, ["batch"]),
            helper.make_tensor_value_info("sample", FLOAT, ["batch", 16]),
        ],
        [helper.make_tensor_value_info("out", FLOAT, ["batch", 32])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(made)


def narrowed(dtype: str = "fp16") -> onnx.ModelProto:
    found = model()
    narrow(found, dtype)
    proto = ir.to_proto(found)
    onnx.checker.check_model(proto, full_check=True)
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True)


def types(proto: onnx.ModelProto) -> dict[str, int]:
    values = (*proto.graph.value_info, *proto.graph.output, *proto.graph.input)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return {**found, **{tensor.name: tensor.data_type for tensor in proto.graph.initializer}}


@pytest.mark.parametrize(("dtype", "narrow_type"), [("fp16", HALF), ("bf16", TensorProto.BFLOAT16)])
def test_inputs_and_outputs_stay_and_the_rest_is_narrow(dtype: str, narrow_type: int) -> None:
    found = types(narrowed(dtype))
    assert found["angle_of"] == found["sample"] == found["out"] == FLOAT
    for name in ("embedded", "sum", "normed", "larger", "weight", "gain"):
        assert found[name] == narrow_type, name


def test_types_that_an_operator_fixes_and_whole_numbers_stay() -> None:
    found = types(narrowed())
    assert found["scales"] == FLOAT
    assert found["axes"] == TensorProto.INT64


def test_norms_sum_in_fp32() -> None:
    (norm,) = (n for n in narrowed().graph.node if n.op_type == "LayerNormalization")
    assert {a.name: a.i for a in norm.attribute}["stash_type"] == FLOAT


def test_what_the_type_cannot_hold_becomes_the_nearest_that_it_can() -> None:
    (huge,) = (t for t in narrowed().graph.initializer if t.name == "huge")
    np.testing.assert_array_equal(numpy_helper.to_array(huge), np.array([-65504, 1], np.float16))


def test_it_computes_what_the_wide_graph_computes(tmp_path: Path) -> None:
    import onnxruntime as ort

    feeds = {
        "angle_of": np.array([0.9, 0.3], np.float32),
        "sample": np.random.default_rng(1).standard_normal((2, 16), np.float32),
    }
    outputs = []
    for number, proto in enumerate((ir.to_proto(model()), narrowed())):
        path = tmp_path / f"{number}.onnx"
        onnx.save(proto, path)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, feeds)[0])
    np.testing.assert_allclose(outputs[1], outputs[0], atol=4e-3)


def test_a_graph_whose_types_cannot_be_inferred_is_refused_by_the_nodes_name() -> None:
    broken = model()
    unknown = ir.node("NoSuchOperator", [broken.graph.inputs[1]], name="stranger")
    broken.graph.append(unknown)
    with pytest.raises(BuildError, match="type of NoSuchOperator at stranger can't be inferred"):
        narrow(broken, "fp16")
