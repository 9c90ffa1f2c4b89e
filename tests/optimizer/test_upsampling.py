from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from optimizer.upsampling import upsampling_without_questions


class _Levels(nn.Module):
    """Down two sizes, and up again to the sizes that were there, as UNets do."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(Downsample2D(4, use_conv=True) for _ in range(2))
        self.up = nn.ModuleList(Upsample2D(4, use_conv=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        sizes = []
        for layer in self.down:
            sizes.append(x.shape[2:])
            x = layer(x)
        for layer in self.up:
            x = layer(x, sizes.pop())
        return x


def exported(module: nn.Module) -> Any:
    """As torch.onnx exports it first."""
    free = torch.export.Dim.DYNAMIC
    return torch.export.export(
        module,
        (torch.randn(2, 4, 17, 23),),
        dynamic_shapes=({0: free, 2: free, 3: free},),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def test_several_sizes_are_exported_without_dynamo() -> None:
    """With the question torch 2.13 can't; once it can, optimizer.upsampling has no purpose."""
    module, x = _Levels().eval(), torch.randn(1, 4, 21, 30)
    with torch.no_grad():
        with pytest.raises(torch.fx.proxy.TraceError):
            exported(module)
        wanted = module(x)
        with upsampling_without_questions(module):
            torch.testing.assert_close(module(x), wanted, rtol=0, atol=0)
            program = exported(module)
        torch.testing.assert_close(program.module()(x), wanted)
    assert all("forward" not in vars(layer) for layer in module.up)


def test_other_ways_to_upsample_stay_as_they_are() -> None:
    transposed = Upsample2D(4, use_conv_transpose=True)
    with upsampling_without_questions(nn.Sequential(transposed)):
        assert "forward" not in vars(transposed)
    doubled, x = Upsample2D(4), torch.randn(1, 4, 5, 6)
    with upsampling_without_questions(nn.Sequential(doubled)):
        assert doubled(x).shape == (1, 4, 10, 12)
