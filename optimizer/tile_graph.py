"""A VAE half's exported graph cut in two: the part of the whole picture, and the part of tiles.

The cut is where the blocks of one size meet the middle block; it is found by the name of a
convolution. In the part of tiles, every GroupNormalization becomes operators that take their
statistics from outside and give what they saw, as runners.vae_parts has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from optimizer.lora_graph import layer_of
from optimizer.tile_norms import give_statistics
from profiles.errors import BuildError
from runners.signature import Signature, TensorSpec

__all__ = ["cut_tile", "cut_whole"]

Half = Literal["decoder", "encoder"]

_FIRST: dict[Half, str] = {
    "decoder": "up_blocks.0.resnets.0.conv1",
    "encoder": "mid_block.resnets.0.conv1",
}
"""The second part's first convolution."""
_TYPES = {"float32": ir.DataType.FLOAT}


def cut_whole(model: ir.Model, half: Half, signature: Signature, *, factor: int) -> None:
    """Leave of the half's graph the part that sees the whole picture.

    `factor`: pixels of a latent's side. Raises BuildError for a graph that isn't an
    AutoencoderKL's.
    """
    meeting = _meeting(model.graph, half)
    if half == "decoder":
        _set_outputs(model.graph, [meeting], signature)
    else:
        _set_input(model.graph, meeting, signature, factor=factor)
    _tidy(model)


def cut_tile(model: ir.Model, half: Half, signature: Signature) -> None:
    """Leave of the half's graph the part that sees tiles, its norms' statistics from outside.

    Raises BuildError for a graph that isn't an AutoencoderKL's.
    """
    graph = model.graph
    made = meeting = _meeting(graph, half)
    if half == "decoder":
        made = graph.outputs[0]
        _set_input(graph, meeting, signature, factor=1)
    else:
        graph.inputs[0].shape = _input(signature.inputs[0]).shape
    inputs = {spec.name: _input(spec) for spec in signature.inputs[1:]}
    graph.inputs.extend(inputs.values())
    norms = [node for node in _reaching(made) if node.op_type == "GroupNormalization"]
    _set_outputs(graph, [made, give_statistics(graph, norms, inputs)], signature)
    _tidy(model)


def _meeting(graph: ir.Graph, half: Half) -> ir.Value:
    """What the first part gives to the second: what the norm before that convolution reads.

    Norms themselves have no names to go by: exporters share weights that are equal.
    """
    for node in graph:
        if layer_of(node) == f"{half}.{_FIRST[half]}":
            before: ir.Node | None = node
            while before is not None and before.op_type != "GroupNormalization":
                before = _given(before, 0).producer()
            if before is not None:
                return _given(before, 0)
    raise BuildError(
        f"The VAE's {half} has no {_FIRST[half]} that its graph could be cut at: compile with "
        "--no-tiles, and report the model."
    )


def _set_input(graph: ir.Graph, meeting: ir.Value, signature: Signature, *, factor: int) -> None:
    """Let the graph begin at `meeting`; sizes that are read of the plain input, which has `factor`
    places for one of the meeting's along a side, follow from the new one's.
    """
    plain, value = graph.inputs[0], _input(signature.inputs[0])
    for use in list(meeting.uses()):
        use.node.replace_input_with(use.idx, value)
    for use in list(plain.uses()):
        if use.node.op_type == "Shape":
            _read_sizes(graph, use.node, value, factor)
    graph.inputs[0] = value


def _read_sizes(graph: ir.Graph, shape: ir.Node, value: ir.Value, per: int) -> None:
    """Let a Shape node read `value`, times `per` along height and width."""
    shape.replace_input_with(0, value)
    start, end = shape.attributes.get_int("start", 0), shape.attributes.get_int("end", 4)
    factors = np.array([1, 1, per, per], np.int64)[start:end]
    if set(factors.tolist()) == {1}:
        return
    users = [(use.node, use.idx) for use in shape.outputs[0].uses()]
    name = f"{shape.name}.per"
    constant = ir.val(name, const_value=ir.tensor(factors, name=name))
    graph.register_initializer(constant)
    times = ir.node("Mul", [shape.outputs[0], constant], name=f"{name}.times")
    times.outputs[0].name = f"{name}.sizes"
    graph.insert_after(shape, times)
    for user, index in users:
        user.replace_input_with(index, times.outputs[0])


def _set_outputs(graph: ir.Graph, values: Sequence[ir.Value], signature: Signature) -> None:
    """Let these be all outputs, under the signature's names."""
    graph.outputs.clear()
    for spec, value in zip(signature.outputs, values, strict=True):
        value.name = spec.name
        value.type, value.shape = ir.TensorType(_TYPES[spec.dtype]), ir.Shape(list(spec.axes))
        graph.outputs.append(value)


def _reaching(value: ir.Value) -> list[ir.Node]:
    """The nodes that `value` is computed by, in the graph's order."""
    found: set[ir.Node] = set()
    waiting = [value.producer()]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [source.producer() for source in node.inputs if source is not None]
    graph = value.graph
    assert graph is not None, "it is a value of this graph"
    return [node for node in graph if node in found]


def _tidy(model: ir.Model) -> None:
    """Remove what no output needs any more."""
    graph = model.graph
    kept = {node for output in graph.outputs for node in _reaching(output)}
    graph.remove([node for node in graph if node not in kept], safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def _input(spec: TensorSpec) -> ir.Value:
    return ir.Value(
        name=spec.name,
        shape=ir.Shape(list(spec.axes)),
        type=ir.TensorType(_TYPES[spec.dtype]),
    )


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
