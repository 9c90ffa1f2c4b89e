"""Round to nearest: each group's range is its own extremes (Jacob et al. 2018, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from optimizer.quantize.solvers.grid import Codes, Grid, Inputs, rounded, storable

__all__ = ["peak_grid", "solve"]


def solve(matrix: Tensor, grid: Grid, inputs: Inputs) -> Codes:  # noqa: ARG001
    """Codes on the grids that just hold every weight."""
    groups = matrix.view(matrix.shape[0], -1, grid.group)
    scale, zero = peak_grid(groups, grid)
    codes = rounded(groups, scale, zero, grid).to(torch.int8).view(matrix.shape)
    return Codes(codes, scale, zero)


def peak_grid(
    groups: Tensor, grid: Grid, shrink: float = 1.0, shrink_low: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points [...] of grids over `groups` [..., k], shrunk by a factor.

    With zero points the two ends may shrink by different factors.
    """
    if not grid.zero_point:
        return storable(groups.abs().amax(-1) * shrink / grid.high), None
    low = groups.amin(-1).clamp_max(0) * (shrink if shrink_low is None else shrink_low)
    high = groups.amax(-1).clamp_min(0) * shrink
    scale = storable((high - low) / (grid.high - grid.low))
    zero = torch.round(grid.low - low / scale).clamp_(grid.low, grid.high)
    return scale, zero
