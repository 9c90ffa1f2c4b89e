"""Conversions of types in an export, with nothing evaluated that they don't touch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn
from torch.onnx._internal.fx.passes import type_promotion

from optimizer.export import export_onnx
from optimizer.promoting import only_needed_evaluations
from runners.signature import Dim, Signature, TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning")  # torch's own
SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", axes=("batch", 6)),),
    outputs=(TensorSpec(name="y", dtype="float32", axes=("batch", 6)),),
    dims=(Dim(name="batch", min=1, opt=2, max=8),),
)
Function = Callable[[Tensor], Tensor]


class _Model(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(6, 6), function
        self.register_buffer("scale", torch.tensor(1.7))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.function(self.linear(x)) * self.scale,)


def nothing(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * x


def integers(x: Tensor) -> Tensor:
    """An integer tensor and a float, an integer quotient, and both read on."""
    places = torch.arange(6)
    return torch.sigmoid((places + x) * 2 + places / 4) - (x > 0).sum(-1, keepdim=True)


def halves(x: Tensor) -> Tensor:
    """fp16 by a float tensor of no axes and of one, and a sum, which is computed in fp32."""
    half = x.half()
    scaled = half * torch.tensor(0.3) + half.sum(-1, keepdim=True)
    return scaled.tanh() * torch.full((6,), 0.7)


def sizes(x: Tensor) -> Tensor:
    """A size as a number, and pieces of a tensor that was converted."""
    first, second = (torch.arange(6) + x).chunk(2, -1)
    return torch.cat([first * x.shape[0], second + x.shape[0] / 2], -1)


def branches(x: Tensor) -> Tensor:
    """Graphs within the graph, each with a conversion."""
    found: Tensor = torch.cond(
        x.sum() > 0, lambda x: torch.arange(6) + x, lambda x: torch.arange(6) / 3 * x, (x,)
    )
    return found.tanh() * 2


FUNCTIONS = [nothing, integers, halves, sizes, branches]
PLAIN = type_promotion._TypePromotionInterpreter


@contextmanager
def counted() -> Iterator[list[fx.Node]]:
    """The nodes that the exporter's interpreter evaluates within."""
    evaluated: list[fx.Node] = []
    plain = fx.Interpreter.run_node

    def run_node(self: fx.Interpreter, n: fx.Node) -> Any:
        if isinstance(self, PLAIN) and n.op == "call_function":
            evaluated.append(n)
        return plain(self, n)

    with mock.patch.object(fx.Interpreter, "run_node", run_node):
        yield evaluated


def traced(module: nn.Module, x: Tensor) -> str:
    """All that torch's exporter says of it: operators, constants, types and shapes of all values.

    Traces name the code that torch wrote for a branch by how many it has written.
    """
    dims = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.onnx.export(
        module, (x,), dynamo=True, dynamic_shapes=dims, optimize=False, verbose=False
    )
    assert program is not None
    return re.sub(r"<eval_with_key>\.\d+", "", str(ir.to_proto(program.model)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_graph_is_the_same_with_less_evaluated(function: Function) -> None:
    module, x = _Model(function).eval(), torch.randn(3, 6)
    with counted() as all_nodes:
        wanted = traced(module, x)
    with counted() as few_nodes, only_needed_evaluations():
        found = traced(module, x)
    assert found == wanted
    assert len(few_nodes) < len(all_nodes)
    assert bool(few_nodes) == (function is not nothing)


@pytest.mark.parametrize("function", [nothing, integers, halves])
def test_what_is_exported_computes_the_same(function: Function, tmp_path: Path) -> None:
    module, x, path = _Model(function).eval(), torch.randn(5, 6), tmp_path / "model.onnx"
    with counted() as evaluated:
        export_onnx(module, (torch.randn(3, 6),), SIGNATURE, path)
    assert bool(evaluated) == (function is not nothing)
    (found,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, module(x)[0].numpy(), rtol=1e-2, atol=1e-2)


class _Silent(fx.Interpreter):
    """Another exporter's: it gives a sum a float in place of an integer, and says so nowhere."""

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.aten.add.Tensor:
            n.args = (n.args[0], 0.5)
        return super().run_node(n)


class _Summing(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, _ = (x + 1).chunk(2)
        return (first * 2, x * 2)


def test_who_reads_another_type_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(6)
    program = torch.export.export(_Summing(), (x,))
    monkeypatch.setattr(type_promotion, "_TypePromotionInterpreter", _Silent)
    with only_needed_evaluations():
        interpreter: Any = type_promotion._TypePromotionInterpreter
        converted, plain = interpreter(program.graph_module).run(x)
    assert (converted.dtype, plain.dtype) == (torch.float32, torch.int64)


def test_an_unknown_exporter_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with only_needed_evaluations():
        assert type_promotion._TypePromotionInterpreter is not PLAIN
    assert type_promotion._TypePromotionInterpreter is PLAIN
    monkeypatch.delattr(type_promotion, "_TypePromotionInterpreter")
    with only_needed_evaluations():
        assert not hasattr(type_promotion, "_TypePromotionInterpreter")
    monkeypatch.setattr(type_promotion, "_TypePromotionInterpreter", print, raising=False)
    with only_needed_evaluations():
        assert type_promotion._TypePromotionInterpreter is print
