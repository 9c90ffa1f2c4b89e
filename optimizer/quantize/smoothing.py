"""Scales moved from a layer's input into its weight, so that one 8-bit grid fits all channels.

SmoothQuant (Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for
Large Language Models", equation 4): the input is divided by s and the weight's columns multiplied,
s_j = max|x_j|^alpha / max|w_j|^(1-alpha). Here alpha is searched for each layer. An input that was
concatenated (a UNet's skip connections) may get an s for each of its parts instead, which is a
range for each of them (Q-Diffusion, Li et al. 2023, section 4.2: "shortcut splitting").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from optimizer.quantize.observe import LayerStatistics
from optimizer.quantize.ranges import (
    BINS,
    ActivationRange,
    Histogram,
    Observed,
    best_range,
    full_range,
)

__all__ = ["Smoothing", "smoothing"]

_ALPHAS = (0.2, 0.35, 0.5, 0.65, 0.8)
_SPLIT_GAIN, _CHANNEL_GAIN = 0.8, 0.5
"""A multiplication isn't free: only what keeps at most so much of the noise is worth one. Peaks of
single channels say less of other prompts than those of parts."""
_MARGIN = 1.3
"""Of the grid over the largest value seen, where channels were smoothed: what other prompts reach
in a channel that hardly moved in calibration would be clipped (-5 dB on the reference model)."""
_WIDEST = 12.0
"""Powers of two between the middle channel and any other."""


@dataclass(frozen=True)
class Smoothing:
    """`multiplier` [in], of convolutions [in, 1, 1]; the weight's columns are divided by it.

    Powers of two: multiplying by them loses nothing in any floating-point type.
    """

    multiplier: Tensor
    grid: ActivationRange
    """Of the multiplied input."""
    folded: bool = False
    """Whether the layer that makes the input multiplies its outputs itself."""


def smoothing(
    weights: Sequence[Tensor], statistics: LayerStatistics, *, affine: bool, by_channel: bool
) -> Smoothing | None:
    """What loses least for the layers of these `weights` [out, in, ...], which share an input.

    None where nothing loses clearly less than the input as it is.
    """
    if len(statistics.parts) < 2 and not by_channel:
        return None
    sides = _Weights(weights)
    plain, _ = _noise(torch.ones(len(statistics.peaks)), sides, statistics, best_range, affine)
    best, found = plain, None
    for gain, grid_of, multiplier in _candidates(sides, statistics, by_channel=by_channel):
        noise, grid = _noise(multiplier, sides, statistics, grid_of, affine)
        if noise < min(best, gain * plain):
            places = [1] * (weights[0].dim() - 2)
            best, found = noise, Smoothing(multiplier.view(-1, *places), grid)
    return found


class _Weights:
    """What the search needs to know of the weights, by input channel."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        rows = [weight.flatten(2) if weight.dim() > 2 else weight[..., None] for weight in weights]
        self.rows = torch.cat([part.abs().amax(2) for part in rows])
        """The largest size of each output and input channel [out, in]."""
        self.places = rows[0].shape[2]
        self.energy = sum((part.square().sum((0, 2)) for part in rows), torch.zeros(1))
        """The sum of squares of each input channel [in]."""


class _FindRange(Protocol):
    def __call__(self, observed: Observed, *, affine: bool) -> ActivationRange: ...


def _candidates(
    weights: _Weights, statistics: LayerStatistics, *, by_channel: bool
) -> Iterator[tuple[float, _FindRange, Tensor]]:
    """The noise that each may have, of the plain one's; how its grid is found; the multiplier."""
    peaks = statistics.peaks.clamp_min(float(statistics.peaks.max()) * 2**-_WIDEST + 1e-30)
    if len(statistics.parts) > 1:
        parts = torch.split(peaks, list(statistics.parts))
        split = torch.cat([part.max().expand(len(part)) for part in parts])
        yield _SPLIT_GAIN, best_range, _tidy(split)
    if not by_channel:
        return
    widest = weights.rows.amax(0)
    widest = widest.clamp_min(float(widest.max()) * 2**-_WIDEST + 1e-30)
    for alpha in _ALPHAS:
        yield _CHANNEL_GAIN, _roomy_range, _tidy(peaks**alpha / widest ** (1 - alpha))


def _roomy_range(observed: Observed, *, affine: bool) -> ActivationRange:
    return full_range(observed, affine=affine, margin=_MARGIN)


def _tidy(divisor: Tensor) -> Tensor:
    """The multiplier of a divisor: powers of two around 1."""
    powers = divisor.log2()
    return torch.exp2(torch.round(powers.mean() - powers).clamp(-_WIDEST, _WIDEST))


def _noise(
    multiplier: Tensor,
    weights: _Weights,
    statistics: LayerStatistics,
    grid_of: _FindRange,
    affine: bool,  # noqa: FBT001
) -> tuple[float, ActivationRange]:
    """The outputs' squared error, inputs' and weights' roundings taken as independent."""
    x, counts = statistics.typical
    x = x * multiplier
    gain = weights.energy / multiplier.square()
    peak = float((statistics.peaks * multiplier).max())
    grid = grid_of(_histogram(x, counts, peak), affine=affine)
    rounding = counts @ (_rounded(x, grid) - x).square() / counts.sum()
    steps = (weights.rows / multiplier).amax(1) / 127
    moved = float(steps.square().sum()) / 12 * weights.places
    inputs = (statistics.channel_power * multiplier.square()).sum()
    return float((rounding * gain).sum() + moved * inputs), grid


def _histogram(x: Tensor, counts: Tensor, peak: float) -> Histogram:
    """Of values `x` [n, in], each counted so many times [n]."""
    limit = max(peak, 1e-12)
    bins = ((x / limit + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
    weights = counts[:, None].expand_as(x).flatten().double()
    return Histogram(torch.bincount(bins.flatten(), weights, minlength=BINS), limit)


def _rounded(x: Tensor, grid: ActivationRange) -> Tensor:
    zero = grid.zero_point
    low, high = (-128, 127) if zero is None else (-zero, 255 - zero)
    return torch.round(x / grid.scale).clamp_(low, high) * grid.scale
