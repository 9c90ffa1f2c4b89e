"""Clipping search: the range of each group that loses least squared error, inputs considered.

As in Choukroun et al. 2019 ("Low-bit quantization of neural networks for efficient inference",
section 3.1), each column's error weighted by the power of its input, as in AWQ's clipping (Lin et
al. 2024, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from optimizer.quantize.solvers.grid import Codes, Grid, Inputs, joined, rounded
from optimizer.quantize.solvers.nearest import peak_grid

__all__ = ["best_grid", "solve"]

_AT_ONCE = 1 << 18
"""Weights searched at a time: what fits a processor's cache."""


def solve(matrix: Tensor, grid: Grid, inputs: Inputs) -> Codes:
    """Codes on the best grids."""
    rows = max(1, _AT_ONCE // matrix.shape[1])
    return joined([_solved(part, grid, inputs) for part in torch.split(matrix, rows)])


def _solved(matrix: Tensor, grid: Grid, inputs: Inputs) -> Codes:
    groups = matrix.view(matrix.shape[0], -1, grid.group)
    importance = None
    if inputs.power is not None:
        importance = inputs.power.clamp_min(inputs.power.mean() * 1e-4).view(-1, grid.group)
    scale, zero = best_grid(groups, grid, importance)
    codes = rounded(groups, scale, zero, grid).to(torch.int8).view(matrix.shape)
    return Codes(codes, scale, zero)


def best_grid(
    groups: Tensor, grid: Grid, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points [...] for `groups` [..., k] with the least weighted error.

    `importance` broadcasts against `groups`. Candidates are ranges from 80 % (8 bits) or 50 % (4
    bits, where clipping pays more) of a group's extremes to all of them.
    """
    best_loss = torch.full(groups.shape[:-1], torch.inf)
    best_scale = torch.zeros(groups.shape[:-1])
    best_zero = torch.zeros(groups.shape[:-1]) if grid.zero_point else None
    for shrink, shrink_low in _candidates(grid):
        scale, zero = peak_grid(groups, grid, shrink, shrink_low)
        codes = rounded(groups, scale, zero, grid)
        if zero is not None:
            codes -= zero[..., None]
        error = codes.mul_(scale[..., None]).sub_(groups).square_()
        loss = (error if importance is None else error.mul_(importance)).sum(-1)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_scale = torch.where(better, scale, best_scale)
        if best_zero is not None and zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _candidates(grid: Grid) -> Iterator[tuple[float, float]]:
    wide = grid.high - grid.low > 100
    shrinks = torch.linspace(0.8, 1.0, 6) if wide else torch.linspace(0.5, 1.0, 21)
    if not grid.zero_point:
        yield from ((float(s), float(s)) for s in shrinks)
        return
    coarse = torch.linspace(0.6, 1.0, 9).tolist()
    yield from ((high, low) for high in coarse for low in coarse)
