"""Attention without its matrix: what ONNX Runtime runs in blocks in the place of an Attention node.

Its CPU kernel for the standard operator fills the whole matrix, [batch, heads, queries, keys]: that
of Stable Diffusion 1.5 at 1024 px takes 8 GiB a prompt. Its own MultiHeadAttention goes through
blocks of queries and keys that fit the processor's cache (a "flash" kernel), where there is no
mask.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["use_blocks"]

_DOMAIN, _KERNEL = "com.microsoft", "MultiHeadAttention"
_PLAIN = {"is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0}
"""Attributes of Attention that the kernel doesn't have, and what they mustn't differ from."""


def use_blocks(model: ir.Model) -> int:
    """Replace every Attention that has no mask by the kernel that never holds its matrix; how many
    there were.
    """
    replaced = 0
    for node in list(model.graph):
        if node.op_type == "Attention" and node.domain == "" and (heads := _heads(node)):
            _replace(model.graph, node, heads)
            replaced += 1
    if replaced:
        model.opset_imports[_DOMAIN] = 1
    return replaced


def _heads(node: ir.Node) -> int | None:
    """Of an Attention that the kernel can run: [batch, heads, places, size], nothing else."""
    query, key, value = node.inputs[:3]
    if any(node.inputs[3:]) or len(node.outputs) != 1 or not (query and key and value):
        return None
    if any(_number(node, name, plain) != plain for name, plain in _PLAIN.items()):
        return None
    counts = {_axis(x, 1) or _split_into(x) for x in (query, key, value)}
    return counts.pop() if len(counts) == 1 else None


def _split_into(value: ir.Value) -> int | None:
    """The heads that a value without a known shape, as a VAE's are, was split into: a Reshape to
    [batch, places, heads, size], then a Transpose.
    """
    turned = value.producer()
    split = turned.inputs[0] if turned is not None and turned.op_type == "Transpose" else None
    reshape = None if split is None else split.producer()
    shape = reshape.inputs[1] if reshape is not None and reshape.op_type == "Reshape" else None
    found = -1 if shape is None else _element(shape, 2)
    return found if found > 0 else None


def _element(shape: ir.Value, index: int) -> int:
    """Of a shape of four numbers, a constant or joined from constants and others; else -1."""
    joined = shape.producer()
    if shape.const_value is not None and shape.const_value.size == 4:
        return int(shape.const_value.numpy()[index])
    if joined is None or joined.op_type != "Concat" or len(joined.inputs) != 4:
        return -1
    part = joined.inputs[index]
    constant = None if part is None else part.const_value
    return -1 if constant is None else int(constant.numpy().item())


def _axis(value: ir.Value, axis: int) -> int | None:
    """The length of an axis of a value of four axes, where it is known."""
    if value.shape is None or len(value.shape) != 4:
        return None
    length = value.shape[axis]
    return length if isinstance(length, int) else None


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def _replace(graph: ir.Graph, node: ir.Node, heads: int) -> None:
    """The kernel takes and gives [batch, places, heads * size]; ONNX Runtime drops the transposes
    that cancel out with those around an Attention.
    """
    name = node.outputs[0].name
    flat = [_flattened(graph, node, x, f"{name}.{i}") for i, x in enumerate(node.inputs[:3])]
    attributes: dict[str, int | float] = {"num_heads": heads}
    if (scale := node.attributes.get("scale")) is not None:
        attributes["scale"] = scale.value
    kernel = ir.node(_KERNEL, flat, attributes, domain=_DOMAIN, outputs=[ir.val(f"{name}.blocks")])
    split = ir.node(
        "Reshape", [kernel.outputs[0], _integers(graph, f"{name}.heads", (0, 0, heads, -1))]
    )
    turned = ir.node("Transpose", [split.outputs[0]], {"perm": [0, 2, 1, 3]})
    graph.insert_before(node, [kernel, split, turned])
    split.outputs[0].name, turned.outputs[0].name = f"{name}.split", f"{name}.turned"
    ir.convenience.replace_all_uses_with(
        node.outputs[0], turned.outputs[0], replace_graph_outputs=True
    )
    graph.remove(node, safe=True)


def _flattened(graph: ir.Graph, node: ir.Node, value: ir.Value | None, name: str) -> ir.Value:
    turned = ir.node(
        "Transpose", [value], {"perm": [0, 2, 1, 3]}, outputs=[ir.val(f"{name}.turned")]
    )
    shape = _integers(graph, f"{name}.shape", (0, 0, -1))
    flat = ir.node("Reshape", [turned.outputs[0], shape], outputs=[ir.val(f"{name}.flat")])
    graph.insert_before(node, [turned, flat])
    return flat.outputs[0]


def _integers(graph: ir.Graph, name: str, values: tuple[int, ...]) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(np.array(values, dtype=np.int64), name=name))
    graph.register_initializer(value)
    return value
