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
    left, values, right = torch.linalg.svd(error * weight, full_matrices=False)
    half = values[:rank].sqrt()
    return Thin(down=half[:, None] * right[:rank] / weight, up=left[:, :rank] * half)
