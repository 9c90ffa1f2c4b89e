"""Low-rank inputs in a graph: the sums they add, whatever quantizing did to a layer's ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimizer.forms import neutral_feeds, prepared_forms, save_form, share_tensors
from optimizer.lora_graph import Factors, add_low_rank
from optimizer.onnx_files import read_graph
from runners.lora_inputs import (
    Target,
    compiled_rank_tensors,
    convolution_layers,
    lora_targets,
    with_lora,
)
from runners.signature import Dim, Signature, TensorSpec

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)


def drawn(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


WEIGHT, BIAS = drawn(6, 5), drawn(5)
KERNEL = drawn(7, 5, 3, 3)


def linear_graph(*, rounded: bool) -> onnx.ModelProto:
    """x -> (8 bits) -> linear `a` with a bias -> y."""
    nodes, read = [], "x"
    initializers = {"module.a.weight.transposed": WEIGHT, "module.a.bias": BIAS}
    if rounded:
        initializers |= {"s": np.array(0.5, np.float32), "z": np.array(0, np.int8)}
        nodes.append(helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]))
        read = "d"
    nodes.append(helper.make_node("MatMul", [read, "module.a.weight.transposed"], ["p"]))
    nodes.append(helper.make_node("Add", ["p", "module.a.bias"], ["y"]))
    return model(nodes, initializers, ("x", ["batch", 6]), ("y", ["batch", 5]))


def convolution_graph(stride: int) -> onnx.ModelProto:
    """x -> convolution `c` of 3x3 places -> y."""
    node = helper.make_node(
        "Conv", ["x", "module.c.weight"], ["y"], pads=[1, 1, 1, 1], strides=[stride, stride]
    )
    given = ("x", ["batch", 5, "height", "width"])
    return model([node], {"module.c.weight": KERNEL}, given, ("y", [None, 7, None, None]))


def model(
    nodes: list[Any], initializers: dict[str, Array], given: Any, found: Any
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(given[0], TensorProto.FLOAT, given[1])],
        [helper.make_tensor_value_info(found[0], TensorProto.FLOAT, found[1])],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    opset = [helper.make_opsetid("", 23)]
    return helper.make_model(graph, opset_imports=opset, ir_version=11)


def run(graph: ir.Model, feeds: dict[str, Array]) -> Array:
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
    found: Array = session.run(["y"], feeds)[0]
    return found


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_linear_gets_the_product_of_its_unrounded_input(rank: int, rounded: bool) -> None:
    plain = ir.from_proto(linear_graph(rounded=rounded))
    formed = ir.from_proto(linear_graph(rounded=rounded))
    assert add_low_rank(formed, {"a": Target(6, 5)}, {}) == {"a": Target(6, 5)}
    x, down, up = drawn(4, 6), drawn(6, rank), drawn(rank, 5)
    found = run(formed, {"x": x, "a.lora_A": down, "a.lora_B": up})
    np.testing.assert_allclose(found, run(plain, {"x": x}) + x @ down @ up, rtol=1e-4, atol=1e-4)


def test_factors_of_quantizing_are_undone() -> None:
    """The graph's x is the model's times 2, 4, ...; its output the model's times 8, 16, ..."""
    before, after = 2.0 ** np.arange(1, 7), 2.0 ** np.arange(3, 8)
    formed = ir.from_proto(linear_graph(rounded=False))
    add_low_rank(formed, {"a": Target(6, 5)}, {"a": Factors(before, after)})
    x, down, up = drawn(4, 6), drawn(6, 2), drawn(2, 5)
    found = run(formed, {"x": x, "a.lora_A": down, "a.lora_B": up})
    wanted = x @ WEIGHT + BIAS + ((x / before) @ down @ up) * after
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_convolution_gets_that_of_a_thin_kernel(rank: int, stride: int) -> None:
    import torch

    formed = ir.from_proto(convolution_graph(stride))
    add_low_rank(formed, {"c": Target(5, 7, (3, 3))}, {})
    x, down, up = drawn(2, 5, 8, 11), drawn(5, rank, 3, 3), drawn(rank, 7)
    found = run(formed, {"x": x, "c.lora_A": down, "c.lora_B": up})
    kernel = KERNEL + np.einsum("irhw,ro->oihw", down, up)
    wanted = torch.nn.functional.conv2d(
        torch.from_numpy(x), torch.from_numpy(kernel), stride=stride, padding=1
    )
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-3, atol=1e-3)


def test_layers_that_nobody_wants_stay_as_they_are() -> None:
    formed = ir.from_proto(linear_graph(rounded=False))
    assert add_low_rank(formed, {"b": Target(6, 5)}, {}) == {}
    assert [value.name for value in formed.graph.inputs] == ["x"]


SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", axes=("batch", 6)),),
    outputs=(TensorSpec(name="y", dtype="float32", axes=("batch", 5)),),
    dims=(Dim(name="batch", min=1, opt=1, max=4),),
)


def test_a_signature_says_which_layers_take_them() -> None:
    targets = {"a": Target(6, 5), "c": Target(5, 7, (3, 3))}
    signature = with_lora(SIGNATURE, targets)
    assert lora_targets(signature) == targets
    assert lora_targets(SIGNATURE) == {}
    assert Signature.model_validate_json(signature.model_dump_json()) == signature


def test_ranks_are_free_and_other_dims_are_not() -> None:
    signature = with_lora(SIGNATURE, {"a": Target(6, 5), "b": Target(5, 5)})
    feeds = {"x": drawn(2, 6), "a.lora_A": drawn(6, 3), "a.lora_B": drawn(3, 5)}
    feeds |= {"b.lora_A": drawn(5, 0), "b.lora_B": drawn(0, 5)}
    assert signature.check(feeds) == {"batch": 2}
    with pytest.raises(ValueError, match="needs 1 <= min"):
        Dim(name="batch", min=0, opt=1, max=4)


def test_layers_beside_kernels_are_told_from_the_others() -> None:
    targets = {
        "conv_in": Target(4, 8, (3, 3)),
        "resnets.0.conv1": Target(8, 8, (3, 3)),
        "resnets.0.conv_shortcut": Target(8, 8, (1, 1)),
        "resnets.0.time_emb_proj": Target(8, 8),
        "attentions.0.proj_in": Target(8, 8, (1, 1)),
        "attentions.0.to_q": Target(8, 8),
    }
    found = convolution_layers(with_lora(SIGNATURE, targets))
    assert found == {name for name in targets if not name.startswith("attentions")}


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_ranks_that_cards_code_does_not_take_get_zeros(rank: int) -> None:
    import torch

    signature = with_lora(SIGNATURE, {"a": Target(6, 5), "c": Target(5, 7, (3, 3))})
    feeds = {"x": drawn(2, 6), "a.lora_A": drawn(6, rank), "a.lora_B": drawn(rank, 5)}
    feeds |= {"c.lora_A": drawn(5, rank, 3, 3), "c.lora_B": drawn(rank, 7)}
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    found = {n: t.numpy() for n, t in compiled_rank_tensors(tensors, signature).items()}
    assert found["a.lora_A"].shape == (6, max(rank, 2))
    assert found["c.lora_A"].shape == (5, max(rank, 2), 3, 3)
    for name in ("a", "c"):
        down, up = found[f"{name}.lora_A"], found[f"{name}.lora_B"]
        assert np.array_equal(down[:, :rank], feeds[f"{name}.lora_A"])
        assert np.array_equal(up[:rank], feeds[f"{name}.lora_B"])
        assert not down[:, rank:].any()
        assert not up[rank:].any()


def test_a_form_is_over_the_plain_graphs_weights(tmp_path: Path) -> None:
    from optimizer.calls import Call

    whole = ir.from_proto(linear_graph(rounded=False))
    big = drawn(6, 5, 40).reshape(6, -1)
    value = ir.val("module.big", const_value=ir.tensor(big, name="module.big"))
    whole.graph.register_initializer(value)
    ir.save(whole, tmp_path / "model.onnx", external_data="model.onnx.data")
    before = (tmp_path / "model.onnx.data").read_bytes()
    formed = read_graph(tmp_path / "model.onnx")
    targets = add_low_rank(formed, {"a": Target(6, 5)}, {})
    signature = with_lora(SIGNATURE, targets)
    save_form("lora", signature, tmp_path, formed)
    assert prepared_forms(tmp_path) == {"lora": signature}
    feeds = neutral_feeds(Call((drawn(2, 6),), ()), SIGNATURE, signature)
    assert {name: array.shape for name, array in feeds.items()} == {
        "x": (2, 6),
        "a.lora_A": (6, 0),
        "a.lora_B": (0, 5),
    }
    one = neutral_feeds(Call((drawn(2, 6),), ()), SIGNATURE, signature, free=1)
    assert one["a.lora_A"].shape == (6, 1)
    assert not one["a.lora_B"].any()

    other = ir.from_proto(linear_graph(rounded=False))
    new = drawn(30, 30)
    for name, array in (("same", big), ("new", new)):
        other.graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    plain = read_graph(tmp_path / "model.onnx")
    ir.external_data.set_base_dir(plain.graph, tmp_path)
    share_tensors(other, plain, tmp_path / "model.onnx.data")
    after = (tmp_path / "model.onnx.data").read_bytes()
    assert after == before + new.tobytes()
    for name, array in (("same", big), ("new", new)):
        tensor = other.graph.initializers[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), array)
