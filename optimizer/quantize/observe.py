"""Activation statistics, streamed: a histogram and channel energies per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Self

import torch
from torch import Tensor, nn

from optimizer.quantize.solvers.grid import Inputs

__all__ = ["ActivationRange", "LayerStatistics", "best_range", "observing", "output_of"]

_BINS = 2048


class LayerStatistics:
    """What one layer's inputs looked like, over all calls.

    `histogram`: counts of x in equal bins from -limit to limit, which doubles as needed;
    `energy`: the sum of squares per input channel [in]; `count`: values per channel.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.histogram = torch.zeros(_BINS, dtype=torch.float64)
        self.limit = 0.0
        self.energy: Tensor | None = None
        self.count = 0
        self.covariance: Callable[[], Tensor] | None = None
        """Loads what was collected beside, where a solver needs it."""

    def add(self, x: Tensor, channel_axis: int) -> None:
        """Take one call's input."""
        values = x.detach().float()
        peak = float(torch.linalg.vector_norm(values, torch.inf))
        if self.limit == 0.0:
            self.limit = max(peak, 1e-12)
        while peak > self.limit:
            merged = self.histogram.view(-1, 2).sum(1)
            quarter = torch.zeros(_BINS // 4, dtype=torch.float64)
            self.histogram = torch.cat((quarter, merged, quarter))
            self.limit *= 2
        self.histogram += torch.histc(values, _BINS, -self.limit, self.limit).double()
        channels = values.movedim(channel_axis, -1).flatten(0, -2)
        energy = channels.square().sum(0).double()
        self.energy = energy if self.energy is None else self.energy + energy
        self.count += channels.shape[0]

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors, for safetensors."""
        if self.energy is None:
            raise ValueError("the layer was never called")
        return {
            "histogram": self.histogram,
            "limit": torch.tensor(self.limit, dtype=torch.float64),
            "energy": self.energy,
            "count": torch.tensor(self.count),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """The inverse of `state`."""
        found = cls()
        found.restore(state)
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Be what `state` was taken of."""
        self.histogram, self.energy = state["histogram"], state["energy"]
        self.limit, self.count = float(state["limit"]), int(state["count"])

    @property
    def peak(self) -> float:
        """The largest size of a value, to the width of a bin."""
        _, low, high = _observed(self)
        return max(-low, high)

    def inputs(self, columns: int, *, covariance: bool = True) -> Inputs:
        """What solvers may know of the inputs of a weight with so many columns.

        A convolution's columns are the kernel's places, each with all channels.
        """
        power = self.channel_power
        load = self.covariance if covariance else None
        return Inputs(power.repeat(columns // len(power)), None if load is None else load())

    @property
    def channel_power(self) -> Tensor:
        """The mean square of each input channel [in]."""
        if self.energy is None:
            raise ValueError("the layer was never called")
        return (self.energy / max(self.count, 1)).float()


@dataclass(frozen=True)
class ActivationRange:
    """An 8-bit grid: `scale * (code - zero_point)`; int8 where zero_point is None, else uint8."""

    scale: float
    zero_point: int | None


def best_range(statistics: LayerStatistics, *, affine: bool) -> ActivationRange:
    """The 8-bit grid that loses least squared error on the observed histogram.

    Rounding costs scale^2/12 for each value inside the grid, clipping its squared excess (Sung,
    Shin and Hwang 2015, "Resiliency of deep neural networks under quantization"). With `affine`, a
    grid with a zero point is taken where it loses a tenth less: after SiLU and GELU half of a
    symmetric grid would stay empty.
    """
    centres, low, high = _observed(statistics)
    peak = max(-low, high)
    clips = peak * torch.linspace(0.1, 1.0, 96, dtype=torch.float64)
    loss = _losses(statistics.histogram, centres, -clips, clips, clips / 127)
    best = int(loss.argmin())
    symmetric = ActivationRange(float(clips[best] / 127), None)
    if not affine:
        return symmetric
    low, high = min(low, 0.0), max(high, 0.0)
    ratios = torch.linspace(0.3, 1.0, 22, dtype=torch.float64)
    lows, highs = (
        grid.flatten() for grid in torch.meshgrid(low * ratios, high * ratios, indexing="ij")
    )
    scales = (highs - lows) / 255
    zeros = torch.round(-lows / scales)
    losses = _losses(statistics.histogram, centres, -zeros * scales, (255 - zeros) * scales, scales)
    found = int(losses.argmin())
    if losses[found] > 0.9 * loss[best]:
        return symmetric
    return ActivationRange(float(scales[found]), int(zeros[found]))


def _observed(statistics: LayerStatistics) -> tuple[Tensor, float, float]:
    """Bin centres, and the edges of the lowest and highest bin that hold anything."""
    width = 2 * statistics.limit / _BINS
    centres = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * width - statistics.limit
    filled = statistics.histogram.nonzero()
    if not len(filled):
        return centres, -statistics.limit, statistics.limit
    return centres, float(centres[filled[0]] - width / 2), float(centres[filled[-1]] + width / 2)


def _losses(
    histogram: Tensor, centres: Tensor, lows: Tensor, highs: Tensor, scales: Tensor
) -> Tensor:
    """The squared error of each candidate grid (lows, highs, scales: [n]) -> [n]."""
    below = (lows[:, None] - centres).clamp_min(0)
    above = (centres - highs[:, None]).clamp_min(0)
    inside = ((below == 0) & (above == 0)).double() * scales[:, None].square() / 12
    return (histogram * (inside + below.square() + above.square())).sum(1)


def output_of(layer: str) -> str:
    """What the statistics of a layer's output are called."""
    return f"{layer}.output"


@contextmanager
def observing(
    root: nn.Module, layers: Iterable[str], outputs: Iterable[str] = ()
) -> Iterator[dict[str, LayerStatistics]]:
    """Collect statistics of the named `layers`' inputs while the context is open.

    The layers that a pattern of `outputs` (fnmatch) matches have those of their outputs collected
    too, under `output_of(layer)`.
    """
    found: dict[str, LayerStatistics] = {}
    handles = []
    for name in layers:
        layer = root.get_submodule(name)
        axis = 1 if isinstance(layer, nn.Conv2d) else -1
        found[name] = LayerStatistics()
        handles.append(layer.register_forward_pre_hook(_input_hook(found[name], axis)))
        if any(fnmatchcase(name, pattern) for pattern in outputs):
            found[output_of(name)] = LayerStatistics()
            handles.append(layer.register_forward_hook(_output_hook(found[output_of(name)], axis)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(statistics: LayerStatistics, axis: int) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        statistics.add(inputs[0], axis)

    return hook


def _output_hook(statistics: LayerStatistics, axis: int) -> Any:
    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        statistics.add(output, axis)

    return hook
