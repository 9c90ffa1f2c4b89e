"""One ONNX file as others export it -> the graph that kiln builds from: names, types, fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from optimizer.graph import clean
from optimizer.onnx_files import read_graph
from profiles.errors import SpecError, UnsupportedError
from runners.signature import Signature, TensorSpec

__all__ = ["normalized", "resizes", "save"]

_NAMES = {
    "vae_decoder": {"latent_sample": "latent", "sample": "image"},
    "vae_encoder": {"sample": "image", "latent_parameters": "moments"},
}
"""Role -> optimum's name of an input or output -> kiln's, where they differ."""

_SAMPLED = "latent_sample"
"""What VAE encoders gave before optimum 1.20: already drawn from the distribution."""

_HALVES = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_FLOAT = ir.DataType.FLOAT
_TYPED = ("to", "dtype")
"""Attributes that name a type."""


def normalized(path: Path, *, role: str, signature: Signature) -> ir.Model:
    """The graph with the signature's inputs and outputs, computing in fp32.

    Outputs that the signature doesn't have are dropped. Raises `SpecError` where one is missing,
    `UnsupportedError` for inputs that kiln doesn't know and for graphs of one size.
    """
    model = read_graph(path)
    ir.external_data.set_base_dir(model.graph, path.parent)
    # as kiln's own exports are; TensorRT's types are written out for initializers only
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _widen(model)
    names = _NAMES.get(role, {})
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in names and not (role == "vae_encoder" and value.name == _SAMPLED):
            _rename(model.graph, value, names[value.name])
    _set_outputs(model, path, signature)
    _set_inputs(model, path, signature)
    passes.RemoveUnusedNodesPass()(model)
    clean(model)
    return model


def resizes(model: ir.Model) -> int:
    """How many upsamplings double whatever they get; those to a computed size don't count."""
    return sum(
        node.op_type == "Resize" and len(node.inputs) < 4 and node.inputs[-1] is not None
        for node in model.graph
    )


def save(model: ir.Model, path: Path) -> dict[str, tuple[int, ...]]:
    """Write the graph, weights beside it as `path`.data; the shapes of its float parameters.

    Raises `SpecError` where one holds a NaN.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype != _FLOAT or tensor.size == 1:
            continue
        if np.isnan(tensor.numpy()).any():
            raise SpecError(
                f"the weight {name} of {path.parent.name} holds NaN: the export is damaged; export "
                "or copy it again"
            )
        shapes[str(name)] = tuple(tensor.shape.numpy())
    weights = path.with_name(f"{path.name}.data")
    ir.save(model, path, external_data=weights.name)
    weights.touch()  # nothing is written beside a graph whose tensors are all small
    return shapes


def _widen(model: ir.Model) -> None:
    """Let everything that is of 16 bits be of 32."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in (*graph.inputs, *graph.outputs):
            if value.dtype in _HALVES:
                value.dtype = _FLOAT
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype in _HALVES:
                value.const_value = _widened(value.const_value)
                value.dtype = _FLOAT
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in _HALVES:
                    node.attributes[name] = ir.AttrTensor(name, _widened(attribute.value))
                elif name in _TYPED and attribute.value in {half.value for half in _HALVES}:
                    node.attributes[name] = ir.AttrInt64(name, _FLOAT.value)


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """The tensor in fp32, made when it is written: all of a large model's wouldn't fit."""

    def made() -> ir.Tensor:
        return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(made, dtype=_FLOAT, shape=tensor.shape, name=tensor.name)


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    """Give an input or output its name; another value that has it gets a new one."""
    computed = (output for node in graph for output in node.outputs)
    for other in (*graph.inputs, *list(graph.initializers.values()), *computed):
        if other is not value and other.name == name:
            other.name = f"{name}.inner"
    value.name = name


def _set_outputs(model: ir.Model, path: Path, signature: Signature) -> None:
    """Let the graph give the signature's outputs, in order, and nothing else."""
    graph = model.graph
    given = {str(value.name): value for value in graph.outputs}
    found = []
    for spec in signature.outputs:
        value = given.get(spec.name)
        if value is None and spec.name == "moments" and _SAMPLED in given:
            value = _distribution(given[_SAMPLED])
        if value is None:
            raise SpecError(
                f"{path} gives {', '.join(given)} and no {spec.name}: export it again, with a "
                "current optimum"
            )
        _rename(graph, value, spec.name)
        found.append(value)
    graph.outputs.clear()
    for value, spec in zip(found, signature.outputs, strict=True):
        value.shape, value.dtype = ir.Shape(spec.axes), _type_of(spec)
        graph.outputs.append(value)


def _distribution(sampled: ir.Value) -> ir.Value | None:
    """What a sample was drawn from: mean + deviation * noise, the mean half of the channels."""
    add = sampled.producer()
    if add is None or add.op_type != "Add" or not _ancestors(add) >= {"Exp", "RandomNormalLike"}:
        return None
    producers = [value.producer() for value in add.inputs if value is not None]
    halves = [node for node in producers if node is not None and node.op_type in _CHUNKS]
    return halves[0].inputs[0] if len(halves) == 1 else None


_CHUNKS = ("Slice", "Split")


def _ancestors(node: ir.Node) -> set[str]:
    """The operators that a node's inputs are computed with."""
    waiting, seen = [node], {node}
    while waiting:
        values = [value for value in waiting.pop().inputs if value is not None]
        new = {made for value in values if (made := value.producer()) is not None} - seen
        waiting += new
        seen |= new
    return {found.op_type for found in seen}


def _set_inputs(model: ir.Model, path: Path, signature: Signature) -> None:
    """Let the graph take the signature's inputs, in order."""
    graph = model.graph
    given = {str(x.name): x for x in graph.inputs if x.name not in graph.initializers}
    wanted = {spec.name: spec for spec in signature.inputs}
    if unknown := sorted(given.keys() - wanted.keys()):
        raise UnsupportedError(
            f"{path} takes {', '.join(unknown)}, which kiln has nothing for: compile from the "
            "model that it was exported from"
        )
    if missing := sorted(wanted.keys() - given.keys()):
        raise SpecError(f"{path} takes no {missing[0]}: it is no export of this component")
    taken = [_as_specified(graph, given[name], spec, path) for name, spec in wanted.items()]
    graph.inputs.clear()
    graph.inputs.extend(taken)


def _as_specified(graph: ir.Graph, value: ir.Value, spec: TensorSpec, path: Path) -> ir.Value:
    """The graph's input as the spec has it: itself, or one before it that is turned into it.

    A timestep, of which the spec has one for each picture, may be a single number.
    """
    per_picture = spec.axes == ("batch",)
    rank = None if value.shape is None else len(value.shape)
    if per_picture and rank not in (0, 1):
        raise UnsupportedError(f"{path} takes {spec.name} with {rank} axes, and kiln has 1")
    if not per_picture:
        _require_axes(value, spec, path)
    if not per_picture and value.dtype == _type_of(spec):
        value.shape = ir.Shape(spec.axes)
        return value
    taken = ir.Value(name=spec.name, shape=ir.Shape(spec.axes), type=ir.TensorType(_type_of(spec)))
    value.name = f"{spec.name}.given"
    nodes, last = [], taken
    if per_picture:
        first = np.array(0 if rank == 0 else [0], np.int64)
        index = ir.Value(name=f"{spec.name}.first", const_value=ir.tensor(first))
        graph.register_initializer(index)
        nodes.append(ir.node("Gather", [last, index]))
        last = nodes[-1].outputs[0]
    if value.dtype not in (None, _type_of(spec)):
        nodes.append(ir.node("Cast", [last], attributes={"to": value.dtype.value}))
        last = nodes[-1].outputs[0]
    for number, node in enumerate(nodes):
        node.name = node.outputs[0].name = f"{spec.name}.{number}"
    graph.insert_before(graph[0], nodes)
    value.replace_all_uses_with(last)
    return taken


def _require_axes(value: ir.Value, spec: TensorSpec, path: Path) -> None:
    """Raise where the graph was exported for other sizes than the spec's."""
    if value.shape is None:
        return
    sizes = [size if isinstance(size, int) else None for size in value.shape]
    seen = "x".join(str(size or "?") for size in sizes)
    if len(sizes) != len(spec.axes):
        raise UnsupportedError(
            f"{path} takes {spec.name} as {seen}, and kiln gives it {len(spec.axes)} axes: compile "
            "from the model that it was exported from"
        )
    for size, axis in zip(sizes, spec.axes, strict=True):
        if size is not None and isinstance(axis, str):
            raise UnsupportedError(
                f"{path} was exported for one size ({spec.name} is {seen}): export it again with "
                "dynamic axes"
            )
        if size is not None and size != axis:
            raise SpecError(
                f"{path} takes {spec.name} as {seen}, and its config says {axis} where it has "
                f"{size}: export the whole pipeline again"
            )


def _type_of(spec: TensorSpec) -> ir.DataType:
    return ir.DataType.from_numpy(np.dtype(spec.dtype))
