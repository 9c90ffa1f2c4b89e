"""Products of dequantized tensors -> the kernels that ONNX Runtime has for them on a CPU.

Left alone, ONNX Runtime turns dequantized weights into floats when a session opens. So a linear of
4 bits becomes a MatMulNBits; a product whose input is rounded becomes a MatMulIntegerToFloat, of a
convolution's patches too (ConvInteger took six times as long as the float convolution where this
took a quarter to an eighth; QLinearConv would round the output). Convolutions of 4 bits have no
kernel: 4 bits in the file, floats in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["KERNELS", "use_kernels"]

_DOMAIN = "com.microsoft"
_NBITS, _INTEGER = "MatMulNBits", "MatMulIntegerToFloat"
KERNELS = (_NBITS, _INTEGER)

_FOUR_BITS = (ir.DataType.INT4, ir.DataType.UINT4)
_END = np.iinfo(np.int64).max


def use_kernels(model: ir.Model) -> None:
    """Replace every product that has a kernel, by one over the same codes."""
    integers = _Integers(model.graph)
    for node in list(model.graph):
        weight = _weight(node)
        if weight is None:
            continue
        if weight.codes.dtype in _FOUR_BITS and weight.group and node.op_type == "MatMul":
            _use_nbits(model.graph, node, weight)
        elif weight.codes.dtype == ir.DataType.INT8 and (rounded := _rounded_input(node)):
            integers.use(node, rounded, weight)
    _sweep(model.graph)
    model.opset_imports[_DOMAIN] = 1


@dataclass(frozen=True)
class _Weight:
    codes: ir.TensorProtocol
    """[out, in, ...]"""
    scale: ir.TensorProtocol
    zero: ir.TensorProtocol | None
    group: int

    @property
    def name(self) -> str:
        return (self.codes.name or "").removesuffix(".codes")


def _weight(node: ir.Node) -> _Weight | None:
    """The dequantized weight of a linear (stored transposed) or a convolution."""
    if node.op_type not in ("MatMul", "Conv"):
        return None
    source = _producer(node.inputs[1])
    if node.op_type == "MatMul":
        if source is None or source.op_type != "Transpose":
            return None
        source = _producer(source.inputs[0])
    if source is None or source.op_type != "DequantizeLinear":
        return None
    codes, scale, zero = (*(_tensor(value) for value in source.inputs), None)[:3]
    if codes is None or scale is None:
        return None
    return _Weight(codes, scale, zero, source.attributes.get_int("block_size", 0) or 0)


def _rounded_input(node: ir.Node) -> ir.Node | None:
    """The QuantizeLinear with one scale that the product's input went through."""
    read = _producer(node.inputs[0])
    if read is None or read.op_type != "DequantizeLinear":
        return None
    rounded = _producer(read.inputs[0])
    if rounded is None or rounded.op_type != "QuantizeLinear":
        return None
    scale = _tensor(rounded.inputs[1])
    return rounded if scale is not None and scale.size == 1 else None


def _use_nbits(graph: ir.Graph, node: ir.Node, weight: _Weight) -> None:
    values = weight.codes.numpy().astype(np.int16)
    signed = weight.codes.dtype == ir.DataType.INT4
    rows, columns = values.shape
    packed = _packed(values + 8 if signed else values)
    inputs = [
        node.inputs[0],
        _constant(
            graph,
            f"{weight.name}.packed",
            packed.reshape(rows, columns // weight.group, weight.group // 2),
        ),
        _constant(graph, f"{weight.name}.scales", weight.scale.numpy().reshape(-1)),
    ]
    if weight.zero is not None:
        zeros = weight.zero.numpy().astype(np.int16)
        if zeros.shape[1] % 2:
            zeros = np.pad(zeros, ((0, 0), (0, 1)))
        inputs.append(_constant(graph, f"{weight.name}.zeros", _packed(zeros).reshape(-1)))
    attributes = {
        "K": columns,
        "N": rows,
        "bits": 4,
        "block_size": weight.group,
        "accuracy_level": 1,
    }
    kernel = ir.node(
        _NBITS,
        inputs,
        attributes,
        domain=_DOMAIN,
        outputs=[ir.val(f"{node.outputs[0].name}.product")],
    )
    graph.insert_before(node, kernel)
    _replace(graph, node, kernel)


class _Integers:
    """Rewrites products of two 8-bit factors; an input that several read is rounded once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._rounded: dict[tuple[ir.Value | None, ...], ir.Value] = {}
        self._turned: dict[ir.Value, ir.Value] = {}

    def use(self, node: ir.Node, rounded: ir.Node, weight: _Weight) -> None:
        """Replace `node`, whose input went through `rounded`."""
        name = node.outputs[0].name
        codes, zero = self._input(rounded)
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) > 2 else None
        columns = codes if node.op_type == "MatMul" else self._patches(node, codes, zero, weight)
        rows = weight.codes.numpy()
        # as the patches: the kernel's places outside, its channels inside
        matrix = rows.reshape(*rows.shape[:2], -1).transpose(2, 1, 0).reshape(-1, rows.shape[0])
        inputs = [
            columns,
            _constant(self._graph, f"{weight.name}.columns", matrix),
            rounded.inputs[1],
            _constant(self._graph, f"{weight.name}.scales", weight.scale.numpy().reshape(-1)),
            zero,
            None,
            bias,
        ]
        kernel = self._add(node, _INTEGER, inputs, f"{name}.product", domain=_DOMAIN)
        if node.op_type == "Conv":
            kernel = self._add(
                node, "Transpose", [kernel], f"{name}.planes", {"perm": (0, 3, 1, 2)}
            )
        producer = kernel.producer()
        assert producer is not None
        _replace(self._graph, node, producer)

    def _input(self, rounded: ir.Node) -> tuple[ir.Value, ir.Value]:
        """The input as uint8 codes, and their zero point; int8's are those plus 128."""
        x, scale, zero = (*rounded.inputs, None)[:3]
        if zero is None:
            zero = _constant(self._graph, "middle_of_uint8", np.array(128, np.uint8))
        key = (x, scale, zero)
        if key not in self._rounded:
            name = f"{rounded.outputs[0].name}.uint8"
            self._rounded[key] = self._add(rounded, "QuantizeLinear", [x, scale, zero], name)
        return self._rounded[key], zero

    def _patches(self, node: ir.Node, codes: ir.Value, zero: ir.Value, weight: _Weight) -> ir.Value:
        """[batch, height, width, places * channels] of [batch, channels, height, width]."""
        if codes not in self._turned:
            self._turned[codes] = self._add(
                node, "Transpose", [codes], f"{codes.name}.turned", {"perm": (0, 2, 3, 1)}
            )
        name = node.outputs[0].name
        kernel = weight.codes.numpy().shape[2:]
        pads = node.attributes.get_ints("pads", (0, 0, 0, 0)) or (0, 0, 0, 0)
        steps = node.attributes.get_ints("strides", (1, 1)) or (1, 1)
        spread = node.attributes.get_ints("dilations", (1, 1)) or (1, 1)
        turned = self._turned[codes]
        if any(pads):
            ends = [turned, self._integers(pads), zero, self._integers((1, 2))]
            turned = self._add(node, "Pad", ends, f"{name}.padded")
        if kernel == (1, 1) and tuple(steps) == (1, 1):
            return turned
        taken = []
        for place in product(*(range(side) for side in kernel)):
            starts = [at * step for at, step in zip(place, spread, strict=True)]
            ends_at = [
                (at - side + 1) * step or _END
                for at, side, step in zip(place, kernel, spread, strict=True)
            ]
            limits = [self._integers(found) for found in (starts, ends_at, (1, 2), steps)]
            at = ".".join(map(str, place))
            taken.append(self._add(node, "Slice", [turned, *limits], f"{name}.place.{at}"))
        return self._add(node, "Concat", taken, f"{name}.patches", {"axis": 3})

    def _integers(self, values: Iterable[int]) -> ir.Value:
        found = tuple(int(value) for value in values)
        name = f"integers.{'.'.join(map(str, found))}"
        return _constant(self._graph, name, np.array(found, np.int64))

    def _add(
        self,
        before: ir.Node,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: dict[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        node = ir.node(kind, inputs, attributes, domain=domain, outputs=[ir.val(name)])
        self._graph.insert_before(before, node)
        return node.outputs[0]


def _replace(graph: ir.Graph, node: ir.Node, by: ir.Node) -> None:
    node.outputs[0].replace_all_uses_with(by.outputs[0])
    graph.remove(node, safe=True)


def _sweep(graph: ir.Graph) -> None:
    """Remove what nothing reads any more."""
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None else value.const_value


def _packed(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Two codes 0..15 a byte along the last axis, low nibble first."""
    pairs = codes.astype(np.uint8).reshape(*codes.shape[:-1], -1, 2)
    found: np.ndarray[Any, Any] = pairs[..., 0] | (pairs[..., 1] << 4)
    return found


def _constant(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value
