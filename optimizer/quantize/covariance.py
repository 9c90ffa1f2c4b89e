"""The covariance of a layer's inputs, streamed: what GPTQ needs to know.

A convolution sees patches. Where a patch is small enough, its whole covariance is kept; else that
of the channels alone, which takes the kernel's places as independent. Of a large input only evenly
spread positions count, so that collecting costs less than the model itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Covariance", "in_passes", "observing_covariance"]

_WIDEST_PATCH = 2304
"""Columns: 256 channels of a 3x3 kernel; 21 MB."""

_POSITIONS = 512
"""Of each call, at most; an SD1.5 layer of 1,280 inputs gets 32 x 512 samples of 32 steps."""


class Covariance:
    """E[x x^T] over everything added, fp32 [n, n]."""

    def __init__(self) -> None:
        """Start empty."""
        self.total: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor, layer: nn.Module) -> None:
        """Take one call's input to `layer`."""
        rows = _rows(x.detach().float(), layer)
        product = rows.T @ rows
        self.total = product if self.total is None else self.total.add_(product)
        self.count += len(rows)

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors, for safetensors."""
        if self.total is None:
            raise ValueError("the layer was never called")
        return {"total": self.total, "count": torch.tensor(self.count)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Be what `state` was taken of."""
        self.total, self.count = state["total"], int(state["count"])

    def finished(self) -> Tensor:
        """The estimate, in the memory that it was collected in."""
        return self.mean if self.total is None else self.total.div_(self.count)

    @property
    def mean(self) -> Tensor:
        """The estimate so far."""
        if self.total is None:
            raise ValueError("the layer was never called")
        return self.total / self.count


def in_passes(layers: Mapping[str, nn.Linear | nn.Conv2d], room: int) -> list[list[str]]:
    """The layers in groups, in order, whose covariances fit into `room` bytes together.

    One that doesn't fit alone is a group of its own.
    """
    passes: list[list[str]] = []
    left = 0
    for name, layer in layers.items():
        needed = 4 * _columns(layer) ** 2
        if not passes or needed > left:
            passes.append([])
            left = room
        passes[-1].append(name)
        left -= needed
    return passes


def _columns(layer: nn.Linear | nn.Conv2d) -> int:
    """Of what a covariance is taken of."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    places = layer.kernel_size[0] * layer.kernel_size[1]
    return layer.in_channels if _by_channels(layer) else layer.in_channels * places


def _by_channels(layer: nn.Conv2d) -> bool:
    """Whether a patch is too large, or one pixel."""
    places = layer.kernel_size[0] * layer.kernel_size[1]
    return places == 1 or places * layer.in_channels > _WIDEST_PATCH


def _rows(x: Tensor, layer: nn.Module) -> Tensor:
    """Samples of what the weight's columns (`as_matrix`) are multiplied with [samples, n]."""
    if not isinstance(layer, nn.Conv2d):
        return _spread(x.flatten(0, -2))
    if _by_channels(layer):
        return _spread(x.movedim(1, -1).flatten(0, -2))
    places = layer.kernel_size[0] * layer.kernel_size[1]
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    rows = _spread(patches.movedim(1, -1).flatten(0, -2))
    return rows.view(len(rows), x.shape[1], places).movedim(1, 2).flatten(1)


def _spread(rows: Tensor) -> Tensor:
    """At most `_POSITIONS` rows, evenly spread."""
    step = -(-len(rows) // _POSITIONS)
    return rows[step // 2 :: step]


@contextmanager
def observing_covariance(root: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Covariance]]:
    """Collect the covariances of the named layers' inputs while the context is open."""
    found: dict[str, Covariance] = {}
    handles = []
    for name in layers:
        found[name] = Covariance()

        def hook(
            module: nn.Module, inputs: tuple[Any, ...], into: Covariance = found[name]
        ) -> None:
            into.add(inputs[0], module)

        handles.append(root.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
