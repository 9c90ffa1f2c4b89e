"""Histograms of activations -> the 8-bit grids that lose least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["BINS", "ActivationRange", "Histogram", "Observed", "best_range", "edges", "full_range"]

BINS = 2048


class Observed(Protocol):
    """What was seen of a tensor."""

    histogram: Tensor
    """Counts (or weights) of values in equal bins from -limit to limit."""
    limit: float


@dataclass
class Histogram:
    """Nothing but that."""

    histogram: Tensor
    limit: float


@dataclass(frozen=True)
class ActivationRange:
    """An 8-bit grid: `scale * (code - zero_point)`; int8 where zero_point is None, else uint8."""

    scale: float
    zero_point: int | None


def best_range(observed: Observed, *, affine: bool) -> ActivationRange:
    """The 8-bit grid that loses least squared error on the observed histogram.

    Rounding costs scale^2/12 for each value inside the grid, clipping its squared excess (Sung,
    Shin and Hwang 2015, "Resiliency of deep neural networks under quantization"). With `affine`, a
    grid with a zero point is taken where it loses a tenth less: after SiLU and GELU half of a
    symmetric grid would stay empty.
    """
    centres, low, high = edges(observed)
    peak = max(-low, high)
    clips = peak * torch.linspace(0.1, 1.0, 96, dtype=torch.float64)
    loss = _losses(observed.histogram, centres, -clips, clips, clips / 127)
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
    losses = _losses(observed.histogram, centres, -zeros * scales, (255 - zeros) * scales, scales)
    found = int(losses.argmin())
    if losses[found] > 0.9 * loss[best]:
        return symmetric
    return ActivationRange(float(scales[found]), int(zeros[found]))


def full_range(observed: Observed, *, affine: bool, margin: float) -> ActivationRange:
    """The grid that clips nothing that was seen, nor what is `margin` times as large.

    With `affine`, a zero point is taken where it makes the steps a twentieth finer.
    """
    _, low, high = edges(observed)
    low, high = margin * min(low, 0.0), margin * max(high, 0.0)
    symmetric, scale = max(-low, high) / 127, (high - low) / 255
    if affine and scale < 0.95 * symmetric:
        return ActivationRange(scale, round(-low / scale))
    return ActivationRange(symmetric, None)


def edges(observed: Observed) -> tuple[Tensor, float, float]:
    """Bin centres, and the edges of the lowest and highest bin that hold anything."""
    width = 2 * observed.limit / BINS
    centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * width - observed.limit
    filled = observed.histogram.nonzero()
    if not len(filled):
        return centres, -observed.limit, observed.limit
    return centres, float(centres[filled[0]] - width / 2), float(centres[filled[-1]] + width / 2)


def _losses(
    histogram: Tensor, centres: Tensor, lows: Tensor, highs: Tensor, scales: Tensor
) -> Tensor:
    """The squared error of each candidate grid (lows, highs, scales: [n]) -> [n]."""
    below = (lows[:, None] - centres).clamp_min(0)
    above = (centres - highs[:, None]).clamp_min(0)
    inside = ((below == 0) & (above == 0)).double() * scales[:, None].square() / 12
    return (histogram * (inside + below.square() + above.square())).sum(1)
