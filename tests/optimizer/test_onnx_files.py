from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimizer.onnx_files import read_stored
from profiles.errors import SpecError

WEIGHTS = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A graph whose weights lie in a file that has another name as well."""
    one, two = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width])
        for name, width in (("x", 2), ("y", 3))
    )
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [one],
        [two],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    path = tmp_path / "model.onnx"
    onnx.save(
        helper.make_model(graph),
        path,
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    os.link(tmp_path / "model.onnx.data", tmp_path / "blob")
    return path


def test_a_stored_graphs_linked_weights_are_read(path: Path, tmp_path: Path) -> None:
    value = ir.load(path).graph.initializers["w"].const_value
    assert value is not None
    with pytest.raises(ValueError, match="multiple hard links"):  # what read_stored is there for
        value.numpy()
    model = read_stored(path)
    stored = model.graph.initializers["w"].const_value
    assert stored is not None
    np.testing.assert_array_equal(stored.numpy(), WEIGHTS)
    (tmp_path / "out").mkdir()
    ir.save(model, tmp_path / "out" / "again.onnx", external_data="again.data")
    again = onnx.load(tmp_path / "out" / "again.onnx").graph.initializer[0]
    np.testing.assert_array_equal(numpy_helper.to_array(again), WEIGHTS)


def test_a_stored_graph_reads_beside_itself_only(path: Path) -> None:
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = "../elsewhere"
    onnx.save(proto, path)
    with pytest.raises(SpecError, match="outside its folder"):
        read_stored(path)
