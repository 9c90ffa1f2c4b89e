"""Diffusers' upsampling without its question whether a tensor has too many elements.

It asks by the ratio of two sides. torch.export notes the answer as a comparison of quotients, which
it can't write into a graph of three sizes or more (TraceError in 2.13): every real UNet was then
traced again by TorchDynamo, which takes several times as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["upsampling_without_questions"]


@contextmanager
def upsampling_without_questions(module: nn.Module) -> Iterator[None]:
    """Within, all of the module's Upsample2D that interpolate compute the same and ask nothing."""
    from diffusers.models.upsampling import Upsample2D

    changed = [
        layer
        for layer in module.modules()
        if isinstance(layer, Upsample2D)
        and layer.interpolate
        and layer.norm is None
        and not layer.use_conv_transpose
    ]
    for layer in changed:
        layer.forward = _Upsampling(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


class _Upsampling:
    """What Upsample2D.forward computes: nearest neighbours, then its convolution."""

    def __init__(self, layer: Any) -> None:
        self._convolution = None
        if layer.use_conv:
            self._convolution = layer.conv if layer.name == "conv" else layer.Conv2d_0

    def __call__(self, x: Tensor, output_size: Any = None) -> Tensor:
        size = {"scale_factor": 2.0} if output_size is None else {"size": output_size}
        x = functional.interpolate(x, mode="nearest", **size)
        return x if self._convolution is None else self._convolution(x)
