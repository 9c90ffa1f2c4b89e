"""The exporter's second trace, which only programs that need it get."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from optimizer.export import export_onnx
from runners.signature import Dim, Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", axes=("batch", 6)),),
    outputs=(TensorSpec(name="y", dtype="float32", axes=("batch", 6)),),
    dims=(Dim(name="batch", min=1, opt=2, max=8),),
)


class _Model(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(6, 6), function

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.function(self.linear(x)),)


def cast(x: Tensor) -> Tensor:
    found = (x > 0).to(torch.int64).to(torch.float32) + x.to("cpu", torch.float32)
    return found.to(dtype=torch.float32, device="cpu", memory_format=torch.contiguous_format)


def without_translation(x: Tensor) -> Tensor:
    found: Tensor = torch.special.log_ndtr(x)
    return found


def in_place(x: Tensor) -> Tensor:
    return x.clone().mul_(2).add_(1)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning")  # torch's own
@pytest.mark.parametrize(
    ("function", "traces"), [(cast, 0), (without_translation, 1), (in_place, 1)]
)
def test_programs_are_traced_again_where_they_need_it(
    function: Callable[[Tensor], Tensor], traces: int, tmp_path: Path
) -> None:
    module, x = _Model(function).eval(), torch.randn(5, 6)
    plain, path = ExportedProgram.run_decompositions, tmp_path / "model.onnx"
    with mock.patch.object(
        ExportedProgram, "run_decompositions", autospec=True, side_effect=plain
    ) as traced:
        export_onnx(module, (torch.randn(3, 6),), SIGNATURE, path)
    assert traced.call_count == traces
    (found,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, module(x)[0].numpy(), rtol=1e-4, atol=1e-5)
