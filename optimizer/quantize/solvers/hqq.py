"""Half-quadratic quantization: scales or zero points fitted to an error with heavy tails.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": minimize
|W - dequantized|_p with p < 1 by turns of a shrinkage step on the error and a closed form. Their
closed form moves the zero points, which are floats; ours are absent or whole numbers, so here the
scales are fitted by least squares first. Needs no data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizer.quantize.solvers.grid import Codes, Grid, Inputs, joined, rounded, storable
from optimizer.quantize.solvers.nearest import peak_grid

__all__ = ["solve"]

_NORM = 0.7
_BETA, _KAPPA = 10.0, 1.01
_ROUNDS = 20
_AT_ONCE = 1 << 18


def solve(matrix: Tensor, grid: Grid, inputs: Inputs) -> Codes:  # noqa: ARG001
    """Codes after at most 20 turns; of each group the best ones seen, the first being the peak's.

    Rows are taken in parts that fit a processor's cache, each until a turn doesn't improve it.
    """
    rows = max(1, _AT_ONCE // matrix.shape[1])
    return joined([_solved(part, grid) for part in torch.split(matrix, rows)])


def _solved(matrix: Tensor, grid: Grid) -> Codes:
    groups = matrix.view(matrix.shape[0], -1, grid.group)
    scale, zero = peak_grid(groups, grid)
    codes = rounded(groups, scale, zero, grid)
    best_scale, best_zero, best_codes = scale, zero, codes
    best_loss = torch.full(scale.shape, torch.inf)
    beta, least = _BETA, float("inf")
    for _ in range(_ROUNDS):
        centred = codes if zero is None else codes - zero[..., None]
        error = groups - centred * scale[..., None]
        loss = error.abs().pow(_NORM).sum(-1)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better[..., None], codes, best_codes)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
        total = float(loss.sum())
        if total >= least:
            break
        least = total
        scale, zero = _fitted(groups - _shrunk(error, beta), codes, scale, zero, grid)
        codes = rounded(groups, scale, zero, grid)
        beta *= _KAPPA
    return Codes(best_codes.to(torch.int8).view(matrix.shape), best_scale, best_zero)


def _shrunk(error: Tensor, beta: float) -> Tensor:
    """The generalized soft threshold: small errors go to 0, outliers stay."""
    size = error.abs()
    step = size.clamp_min(1e-8).pow(_NORM - 1) / beta
    return error.sign() * (size - step).clamp_min(0)


def _fitted(
    target: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid
) -> tuple[Tensor, Tensor | None]:
    """The scale by least squares, then the zero point by the mean, rounded."""
    centred = codes if zero is None else codes - zero[..., None]
    fitted = (centred * target).sum(-1) / centred.square().sum(-1).clamp_min(1e-12)
    scale = storable(torch.where(fitted > 0, fitted, scale))
    if zero is None:
        return scale, None
    moved = (codes - target / scale[..., None]).mean(-1)
    return scale, torch.round(moved).clamp_(grid.low, grid.high)
