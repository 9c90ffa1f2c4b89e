"""A VAE half's exported graph cut in two at its attention: what comes before it, and after it.

Both see tiles: every GroupNormalization becomes operators that take their statistics from outside
and give what they saw, as runners.vae_parts has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from optimizer.tile_norms import give_statistics
from profiles.errors import BuildError
from runners.signature import Signature, TensorSpec

__all__ = ["cut_after", "cut_before"]

Half = Literal["decoder", "encoder"]
_TYPES = {"float32": ir.DataType.FLOAT}


def cut_before(model: ir.Model, half: Half, signature: Signature) -> None:
    """Leave of the half's graph what comes before its attention: its input's features, and what is
    attended to.

    Raises BuildError for a graph that isn't an AutoencoderKL's.
    """
    graph = model.graph
    attention = _attention(graph, half)
    features = _features(attention, half)
    mixed = [_as_map(graph, attention, index, features) for index in range(3)]
    graph.inputs[0].shape = _input(signature.inputs[0]).shape
    _let_see(graph, [features, *mixed], graph.inputs[:1], signature)
    _tidy(model)


def cut_after(model: ir.Model, half: Half, signature: Signature, *, factor: int) -> None:
    """Leave of the half's graph what comes after its attention; `factor`: places of its input for
    one of the attention's along a side.

    Raises BuildError for a graph that isn't an AutoencoderKL's.
    """
    graph = model.graph
    made = graph.outputs[0]
    attention = _attention(graph, half)
    features = _features(attention, half)
    given, attended = (_input(spec) for spec in signature.inputs[:2])
    found = _as_attended(graph, attention, attended)
    for use in list(attention.outputs[0].uses()):
        use.node.replace_input_with(use.idx, found)
    _set_input(graph, features, given, factor=factor)
    graph.inputs.append(attended)
    _let_see(graph, [made], graph.inputs[:2], signature)
    _tidy(model)


def _let_see(
    graph: ir.Graph, made: list[ir.Value], taken: Sequence[ir.Value], signature: Signature
) -> None:
    """Give the graph the inputs that come after `taken`, and its outputs: `made`, and what the
    norms that lead there see.
    """
    inputs = {spec.name: _input(spec) for spec in signature.inputs[len(taken) :]}
    graph.inputs.extend(inputs.values())
    reaching = {node for value in made for node in _reaching(value)}
    norms = [n for n in graph if n in reaching and n.op_type == "GroupNormalization"]
    _set_outputs(graph, [*made, give_statistics(graph, norms, inputs)], signature)


def _attention(graph: ir.Graph, half: Half) -> ir.Node:
    """The only one."""
    found = [node for node in graph if node.op_type == "Attention" and node.domain == ""]
    if len(found) != 1:
        raise _uncut(half, f"{len(found)} attentions in its graph, and one is needed to cut it at")
    return found[0]


def _features(attention: ir.Node, half: Half) -> ir.Value:
    """[batch, channels, height, width]: what the norm before the attention reads, unfolded."""
    node: ir.Node | None = attention
    while node is not None and node.op_type != "GroupNormalization":
        node = _given(node, 0).producer()
    folded = None if node is None else _given(node, 0).producer()
    if folded is None or folded.op_type != "Reshape":
        raise _uncut(half, "no norm before its attention")
    return _given(folded, 0)


def _uncut(half: Half, why: str) -> BuildError:
    return BuildError(f"The VAE's {half} has {why}: compile with --no-tiles, and report the model.")


def _as_map(graph: ir.Graph, attention: ir.Node, index: int, like: ir.Value) -> ir.Value:
    """An input of the attention, [1, 1, places, channels], as the map that `like` is."""
    name = f"tile.map.{index}"
    turned = ir.node("Transpose", [_given(attention, index)], {"perm": [0, 1, 3, 2]})
    shape = ir.node("Shape", [like])
    folded = ir.node("Reshape", [turned.outputs[0], shape.outputs[0]])
    for node in (turned, shape, folded):
        node.name = node.outputs[0].name = f"{name}.{node.op_type}"
    graph.insert_before(attention, [turned, shape, folded])
    return folded.outputs[0]


def _as_attended(graph: ir.Graph, attention: ir.Node, value: ir.Value) -> ir.Value:
    """A map [1, channels, height, width] as what the attention gives, [1, 1, places, channels]."""
    name, channels = "tile.attended", value.shape[1] if value.shape else -1
    array = np.array([1, 1, -1, channels], np.int64)
    sizes = ir.val(f"{name}.sizes", const_value=ir.tensor(array, name=f"{name}.sizes"))
    graph.register_initializer(sizes)
    turned = ir.node("Transpose", [value], {"perm": [0, 2, 3, 1]})
    folded = ir.node("Reshape", [turned.outputs[0], sizes])
    for node in (turned, folded):
        node.name = node.outputs[0].name = f"{name}.{node.op_type}"
    graph.insert_before(attention, [turned, folded])
    return folded.outputs[0]


def _set_input(graph: ir.Graph, meeting: ir.Value, value: ir.Value, *, factor: int) -> None:
    """Let the graph begin with `value` at `meeting`; sizes that are read of the plain input, which
    has `factor` places for one of the meeting's along a side, follow from the new one's.
    """
    plain = graph.inputs[0]
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
