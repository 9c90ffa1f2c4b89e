"""GPTQ: weights are rounded one column at a time, and the rest make up for the error.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", algorithm 1, with scales fixed beforehand by the clipping search ("static groups") so
that columns can be taken in the order of falling input power ("act order").
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizer.quantize.solvers.clipping import solve as clipped
from optimizer.quantize.solvers.grid import Codes, Grid, Inputs

__all__ = ["solve"]

_DAMPING = 0.01
"""Of the mean diagonal, added to the diagonal."""

_BLOCK = 128


def solve(matrix: Tensor, grid: Grid, inputs: Inputs) -> Codes:
    """Codes with the least error of the layer's output, as far as a greedy order finds it.

    A covariance of fewer inputs than columns (a convolution's, by channel) is used for each stretch
    of columns as for rows of their own.
    """
    start = clipped(matrix, grid, inputs)
    if inputs.covariance is None:
        raise ValueError("GPTQ needs the covariance of the inputs")
    width = inputs.covariance.shape[0]
    order = torch.argsort(inputs.covariance.diagonal(), descending=True, stable=True)
    factor = _factor(inputs.covariance[order][:, order])

    def arranged(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, width)[:, order]

    def by_column(tensor: Tensor) -> Tensor:
        return arranged(tensor.repeat_interleave(grid.group, dim=1))

    zero = None if start.zero is None else by_column(start.zero)
    found = _rounded(arranged(matrix), by_column(start.scale), zero, factor, grid)
    codes = torch.empty_like(found)
    codes[:, order] = found
    return Codes(codes.view(matrix.shape), start.scale, start.zero)


def _factor(covariance: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped covariance's inverse [n, n]."""
    matrix = covariance.double()
    matrix.diagonal().clamp_min_(0)
    matrix.diagonal().add_(_DAMPING * matrix.diagonal().mean() + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def _rounded(
    matrix: Tensor, scale: Tensor, zero: Tensor | None, factor: Tensor, grid: Grid
) -> Tensor:
    """Codes int8 of `matrix` [out, n] on scales and zero points of every column [out, n]."""
    left = matrix.clone()
    codes = torch.empty(matrix.shape, dtype=torch.int8)
    for first in range(0, matrix.shape[1], _BLOCK):
        last = min(first + _BLOCK, matrix.shape[1])
        errors = torch.empty((matrix.shape[0], last - first))
        block = left[:, first:last]
        for i in range(last - first):
            j = first + i
            column = block[:, i]
            code = torch.round(column / scale[:, j])
            if zero is not None:
                code = code + zero[:, j]
            code = code.clamp_(grid.low, grid.high)
            codes[:, j] = code.to(torch.int8)
            value = (code if zero is None else code - zero[:, j]) * scale[:, j]
            error = (column - value) / factor[j, j]
            block[:, i + 1 :] -= torch.outer(error, factor[j, j + 1 : last])
            errors[:, i] = error
        left[:, last:] -= errors @ factor[first:last, last:]
    return codes
