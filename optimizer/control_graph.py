"""A UNet's exported graph with a residual added to every skip and to the middle.

What ONNX it is exported to joins a skip to the decoder's state by one Concat each: the residuals
are added to what goes in there, as diffusers' UNet2DConditionModel does.
"""

from __future__ import annotations

import onnx_ir as ir

from profiles.errors import BuildError
from runners.signature import Signature, TensorSpec

__all__ = ["add_residuals"]

_ADDED = "residual"


def add_residuals(model: ir.Model, signature: Signature) -> None:
    """Give the graph the inputs `down_residual_0`, ... and `mid_residual` of `signature`.

    Raises BuildError for a graph whose skips aren't joined as expected.
    """
    wanted = [spec for spec in signature.inputs if spec.name.endswith("residual") or _is_down(spec)]
    *down, mid = wanted
    joins = [node for node in model.graph if _joins_a_skip(node)]
    if len(joins) != len(down):
        raise BuildError(
            f"The denoiser's graph joins {len(joins)} skips and has {len(down)} residuals to take: "
            "compile without --controlnet, and report the model."
        )
    inputs = {spec.name: _input(spec) for spec in wanted}
    model.graph.inputs.extend(inputs.values())
    _add(model.graph, joins[0], 0, inputs[mid.name])
    for join, spec in zip(joins, reversed(down), strict=True):
        _add(model.graph, join, 1, inputs[spec.name])


def _is_down(spec: TensorSpec) -> bool:
    return spec.name.startswith(f"down_{_ADDED}_")


def _joins_a_skip(node: ir.Node) -> bool:
    """Whether it joins two pictures along their channels."""
    if node.op_type != "Concat" or len(node.inputs) != 2:
        return False
    shapes = [value.shape for value in node.inputs if value is not None]
    ranks = {len(shape) for shape in shapes if shape is not None}  # not all are known
    return node.attributes["axis"].as_int() == 1 and ranks <= {4}


def _input(spec: TensorSpec) -> ir.Value:
    return ir.Value(
        name=spec.name,
        shape=ir.Shape(list(spec.axes)),
        type=ir.TensorType(ir.DataType.FLOAT),
    )


def _add(graph: ir.Graph, join: ir.Node, place: int, residual: ir.Value) -> None:
    """Let `join` read the sum of what it reads at `place` and the residual."""
    added = ir.node("Add", [join.inputs[place], residual], name=f"{residual.name}_added")
    added.outputs[0].name = f"{residual.name}_sum"
    added.outputs[0].shape = residual.shape
    added.outputs[0].type = residual.type
    graph.insert_before(join, added)
    join.replace_input_with(place, added.outputs[0])
