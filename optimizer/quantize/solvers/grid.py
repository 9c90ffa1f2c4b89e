"""What solvers work on: a weight as a matrix whose columns come in groups, and a grid of codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Codes",
    "Grid",
    "Inputs",
    "Solve",
    "as_matrix",
    "from_matrix",
    "joined",
    "rounded",
    "storable",
]


@dataclass(frozen=True)
class Grid:
    """Integer codes `low..high`; a scale for every `group` columns of a row."""

    low: int
    high: int
    group: int
    zero_point: bool = False
    """Codes are counted from a zero point that each group has of its own."""


@dataclass(frozen=True)
class Inputs:
    """What is known of the inputs of a matrix's columns; the error of y = x W^T is x's business."""

    power: Tensor | None = None
    """The mean square of each column's input [n]."""
    covariance: Tensor | None = None
    """E[x x^T] [n, n], or [c, c] where n is a multiple of c: the same for each stretch of c."""


@dataclass(frozen=True)
class Codes:
    """`codes` int8 [out, n]; `scale` and `zero` [out, n/group]: w = scale * (code - zero)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def dequantized(self) -> Tensor:
        """The weights that the codes stand for, fp32 [out, n]."""
        rows, groups = self.scale.shape
        codes = self.codes.view(rows, groups, -1).float()
        if self.zero is not None:
            codes = codes - self.zero[..., None]
        return (codes * self.scale[..., None]).view(self.codes.shape)


def joined(parts: Sequence[Codes]) -> Codes:
    """The codes of a matrix from those of its rows' parts."""
    zeros = [part.zero for part in parts if part.zero is not None]
    return Codes(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
    )


Solve = Callable[[Tensor, Grid, Inputs], Codes]
"""(weights fp32 [out, n], grid, what is known of the inputs) -> codes."""


def as_matrix(weight: Tensor) -> Tensor:
    """[out, in, ...] -> [out, taps * in]: the kernel's places outside, so groups are contiguous."""
    return weight.flatten(2).movedim(2, 1).flatten(1) if weight.dim() > 2 else weight


def from_matrix(matrix: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of `as_matrix`, for weights [out, taps * in] and scales [out, taps * groups]."""
    if len(shape) == 2:
        return matrix.contiguous()
    taps = int(torch.Size(shape[2:]).numel())
    inner = matrix.shape[1] // taps
    places = matrix.view(matrix.shape[0], taps, inner).movedim(1, 2)
    return places.reshape(matrix.shape[0], inner, *shape[2:]).contiguous()


def storable(scale: Tensor) -> Tensor:
    """Scales rounded to 16-bit floats, so that storing them so loses nothing; never zero."""
    return scale.clamp_min(2.0**-20).to(torch.float16).to(torch.float32)


def rounded(groups: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """Codes (as floats) of `groups` [..., k] on scales and zero points [...]."""
    codes = torch.round(groups / scale[..., None])
    if zero is not None:
        codes = codes + zero[..., None]
    return codes.clamp_(grid.low, grid.high)
