"""Graphs that others exported: what is renamed, retyped and refused. No torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimizer.onnx_files import external_files
from optimizer.onnx_graph import normalized, resizes, save
from profiles.errors import SpecError, UnsupportedError
from runners.signature import Dim, Signature, TensorSpec

BATCH = Dim(name="batch", min=1, opt=1, max=64)


def signature(*inputs: TensorSpec, out: str = "out_sample") -> Signature:
    width = TensorSpec(name=out, dtype="float32", axes=("batch", 2))
    return Signature(inputs=inputs, outputs=(width,), dims=(BATCH,))


X = TensorSpec(name="sample", dtype="float32", axes=("batch", 2))
STEP = TensorSpec(name="timestep", dtype="float32", axes=("batch",))


def write(
    path: Path,
    *,
    kind: int = TensorProto.FLOAT,
    axes: tuple[int | str, ...] = ("b", 2),
    step: tuple[int, tuple[int | str, ...]] | None = None,
    outputs: tuple[str, ...] = ("out_sample", "hidden_states.0"),
) -> Path:
    """sample @ weight [+ timestep] -> the first output, the weight's type being `kind`."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weight = numpy_helper.from_array(np.array([[1, 2], [3, 4]], dtype), "weight")
    inputs = [helper.make_tensor_value_info("sample", kind, axes)]
    nodes = [helper.make_node("MatMul", ["sample", "weight"], ["product"])]
    if step is not None:
        inputs.append(helper.make_tensor_value_info("timestep", *step))
        nodes.append(helper.make_node("Cast", ["timestep"], ["number"], to=kind))
        nodes.append(helper.make_node("Add", ["product", "number"], [outputs[0]]))
    else:
        nodes.append(helper.make_node("Identity", ["product"], [outputs[0]]))
    nodes += [helper.make_node("Relu", [outputs[0]], [name]) for name in outputs[1:]]
    given = [helper.make_tensor_value_info(name, kind, ("b", 2)) for name in outputs]
    graph = helper.make_graph(nodes, "graph", inputs, given, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def run(model: object, folder: Path, **feeds: np.ndarray) -> np.ndarray:
    import onnxruntime as ort

    save(model, folder / "kept.onnx")  # type: ignore[arg-type]
    session = ort.InferenceSession(folder / "kept.onnx", providers=["CPUExecutionProvider"])
    [output] = session.run(None, feeds)
    assert isinstance(output, np.ndarray)
    return output


SAMPLE = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
EXPECTED = np.array([[1, 2], [3, 4], [4, 6]], np.float32)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_a_graph_of_any_float_computes_in_fp32_and_gives_only_what_is_asked(
    tmp_path: Path, kind: int
) -> None:
    model = normalized(
        write(tmp_path / "m.onnx", kind=kind), role="denoiser", signature=signature(X)
    )
    assert [value.name for value in model.graph.outputs] == ["out_sample"]
    assert "Relu" not in {node.op_type for node in model.graph}
    output = run(model, tmp_path, sample=SAMPLE)
    assert (output.dtype, output.tolist()) == (np.float32, EXPECTED.tolist())


@pytest.mark.parametrize(
    "step",
    [
        (TensorProto.FLOAT, ()),
        (TensorProto.FLOAT, (1,)),
        (TensorProto.INT64, ("steps",)),
        (TensorProto.INT32, ()),
    ],
)
def test_a_timestep_of_any_kind_is_given_one_for_each_picture(
    tmp_path: Path, step: tuple[int, tuple[int | str, ...]]
) -> None:
    path = write(tmp_path / "m.onnx", step=step)
    model = normalized(path, role="denoiser", signature=signature(X, STEP))
    steps = np.full(3, 7, np.float32)
    assert run(model, tmp_path, sample=SAMPLE, timestep=steps).tolist() == (EXPECTED + 7).tolist()


def test_optimums_names_become_kilns(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", outputs=("latent_parameters",))
    image = X.model_copy(update={"name": "image"})
    model = normalized(path, role="vae_encoder", signature=signature(image, out="moments"))
    assert run(model, tmp_path, image=SAMPLE).tolist() == EXPECTED.tolist()


def test_a_name_that_is_taken_inside_is_given_up(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", outputs=("latent_parameters",))
    proto = onnx.load(path)
    for node in proto.graph.node:  # "product" -> "moments"
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = name.replace("product", "moments")
    onnx.save(proto, path)
    image = X.model_copy(update={"name": "image"})
    model = normalized(path, role="vae_encoder", signature=signature(image, out="moments"))
    assert run(model, tmp_path, image=SAMPLE).tolist() == EXPECTED.tolist()


def test_shapes_of_parameters_are_told(tmp_path: Path) -> None:
    model = normalized(write(tmp_path / "m.onnx"), role="denoiser", signature=signature(X))
    assert save(model, tmp_path / "kept.onnx") == {"weight": (2, 2)}


@pytest.mark.parametrize(
    ("wanted", "options", "error", "words"),
    [
        ((X, STEP), {}, SpecError, "takes no timestep: it is no export of this component"),
        (
            (X,),
            {"step": (TensorProto.FLOAT, ())},
            UnsupportedError,
            "takes timestep, which kiln has nothing for: compile from the model",
        ),
        ((X,), {"axes": (3, 2)}, UnsupportedError, "one size (sample is 3x2): export it again"),
        ((X,), {"axes": ("b", 5)}, SpecError, "its config says 2 where it has 5: export the"),
        ((X,), {"axes": ("b", 2, 2)}, UnsupportedError, "as ?x2x2, and kiln gives it 2 axes"),
        (
            (X, STEP),
            {"step": (TensorProto.FLOAT, ("b", 2))},
            UnsupportedError,
            "takes timestep with 2 axes, and kiln has 1",
        ),
        ((X,), {"outputs": ("noise",)}, SpecError, "gives noise and no out_sample: export it"),
    ],
)
def test_another_graph_is_refused(
    tmp_path: Path,
    wanted: tuple[TensorSpec, ...],
    options: dict[str, object],
    error: type[Exception],
    words: str,
) -> None:
    path = write(tmp_path / "m.onnx", **options)  # type: ignore[arg-type]
    with pytest.raises(error) as caught:
        normalized(path, role="denoiser", signature=signature(*wanted))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_upsamplings_that_double_are_told_from_those_to_a_size() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 1, "h", "w"))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    size = numpy_helper.from_array(np.array([1, 1, 9, 9]), "size")
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["a"]),
        helper.make_node("Resize", ["a", "", "scales"], ["b"]),
        helper.make_node("Resize", ["b", "", "", "size"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "graph", [x], [y], [scales, size])
    import onnx_ir as ir

    assert resizes(ir.from_proto(helper.make_model(graph))) == 2


def external(path: Path, location: str = "m.data") -> Path:
    """A graph whose weight is in a file beside it; its location is then written over."""
    onnx.save(
        onnx.load(write(path)),
        path,
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(proto.SerializeToString())
    return path


def test_weights_in_a_file_beside_it_are_read(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx")
    assert external_files(path) == ["m.data"]
    model = normalized(path, role="denoiser", signature=signature(X))
    assert run(model, tmp_path, sample=SAMPLE).tolist() == EXPECTED.tolist()


@pytest.mark.parametrize(
    "location", ["../m.data", "sub/../../m.data", "/etc/hostname", "..\\m.data", "C:m.data", ""]
)
def test_weights_outside_the_folder_are_not_read(tmp_path: Path, location: str) -> None:
    (tmp_path / "sub").mkdir()
    path = external(tmp_path / "sub" / "m.onnx", location)
    (tmp_path / "sub" / "m.data").rename(tmp_path / "m.data")
    with pytest.raises(SpecError, match="outside its folder, where nothing is read: export it"):
        external_files(path)


@pytest.mark.parametrize("linked", ["m.data", "sub/m.data"])
def test_weights_behind_a_link_are_not_read(tmp_path: Path, linked: str) -> None:
    path = external(tmp_path / "m.onnx", linked)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "m.data").rename(tmp_path / "elsewhere" / "m.data")
    (tmp_path / "sub").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "m.data").symlink_to(tmp_path / "elsewhere" / "m.data")
    with pytest.raises(SpecError, match="which is a link: put the file itself there"):
        external_files(path)


def test_an_attributes_weights_are_looked_at_too(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "../m.data")
    proto = onnx.load(path, load_external_data=False)
    constant = helper.make_node("Constant", [], ["weight"], value=proto.graph.initializer[0])
    del proto.graph.initializer[:]
    proto.graph.node.insert(0, constant)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(SpecError, match="outside its folder"):
        external_files(path)


def test_a_file_of_weights_that_is_cut_or_missing_is_refused(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx")
    (tmp_path / "m.data").write_bytes(b"\0" * 15)
    with pytest.raises(SpecError, match=r"m\.onnx needs 16 bytes of it and it has 15; export or"):
        external_files(path)
    (tmp_path / "m.data").unlink()
    with pytest.raises(SpecError, match="truncated or missing"):
        external_files(path)


@pytest.mark.parametrize("content", [b"\x08", b"no graph at all", b""])
def test_a_damaged_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(SpecError) as caught:
        external_files(tmp_path / "m.onnx")
    assert "m.onnx is damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_nan_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx")
    proto = onnx.load(path)
    weight = numpy_helper.from_array(np.full((2, 2), np.nan, np.float32), "weight")
    proto.graph.initializer[0].CopyFrom(weight)
    onnx.save(proto, path)
    model = normalized(path, role="denoiser", signature=signature(X))
    with pytest.raises(SpecError, match=r"the weight weight of .* holds NaN"):
        save(model, tmp_path / "kept.onnx")
