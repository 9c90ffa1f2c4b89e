"""A 16-bit correction of low rank for what 4-bit rounding loses.

SVDQuant's idea (Li et al. 2025) in the form of LQER (Zhang et al. 2024, section 3.2): the rounding
error, as the layer's inputs see it, is approximated by its largest singular vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimizer.quantize.solvers.grid import Codes, Inputs

__all__ = ["Thin", "correction"]


@dataclass(frozen=True)
class Thin:
    """`up` [out, rank] times `down` [rank, n] is added to the dequantized weight."""

    down: Tensor
    up: Tensor


def correction(matrix: Tensor, codes: Codes, inputs: Inputs, rank: int) -> Thin:
    """The best correction of this rank of what the codes lose, for inputs of this power."""
    error = matrix - codes.dequantized()
    weight = torch.ones(matrix.shape[1]) if inputs.power is None else inputs.power.sqrt()
    weight = weight.clamp_min(weight.mean() * 1e-2)
    seen = error * weight
    left = _largest_left(seen, rank)
    right = left.T @ seen
    half = torch.linalg.vector_norm(right, dim=1).sqrt().clamp_min(1e-30)
    return Thin(down=right / half[:, None] / weight, up=left * half)


def _largest_left(matrix: Tensor, rank: int) -> Tensor:
    """The left singular vectors [rows, rank] of the largest singular values.

    From the Gram matrix of the shorter side: a convolution has ten or more times as many columns
    as rows, and a full decomposition would take as much longer.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.T
    vectors: Tensor = torch.linalg.eigh(short @ short.T).eigenvectors
    largest = vectors[:, len(vectors) - rank :]
    if wide:
        return largest
    basis: Tensor = torch.linalg.qr(matrix @ largest).Q
    return basis
