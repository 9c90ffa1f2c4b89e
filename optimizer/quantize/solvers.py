"""Weights in, integer codes and scales out. All solvers are deterministic."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["quantize_channels", "quantize_groups"]


def quantize_channels(weight: Tensor, power: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 codes shaped as `weight` [out, in, ...] and one scale an output channel [out].

    The scale is searched from 80 % to 100 % of the channel's peak for the least squared error,
    each input channel's error weighted by `power` [in], the mean square of what it is multiplied
    with.
    """
    rows = weight.flatten(1).float()
    scale, codes = _search(
        rows, _weights(weight, power).flatten(1), levels=127, low=0.8, candidates=6
    )
    return codes.view(weight.shape), scale


def quantize_groups(
    weight: Tensor, group: int, power: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """4-bit codes (-7..7, in int8) shaped as `weight` [out, in, ...]; scales [out, in/group, ...].

    The same search per group, from 50 % of the group's peak (clipping pays more at 4 bits).
    """
    out, channels = weight.shape[:2]
    grouped = (out, channels // group, group, *weight.shape[2:])

    def rows(tensor: Tensor) -> Tensor:
        return tensor.reshape(grouped).movedim(2, -1).flatten(0, -2)

    scale, codes = _search(
        rows(weight.float()), rows(_weights(weight, power)), levels=7, low=0.5, candidates=21
    )
    shape = (out, channels // group, *weight.shape[2:])
    codes = codes.view(*shape, group).movedim(-1, 2).reshape(weight.shape)
    return codes.contiguous(), scale.view(shape)


def _weights(weight: Tensor, power: Tensor | None) -> Tensor:
    if power is None:
        return torch.ones_like(weight, dtype=torch.float32)
    shaped = power.float().view(1, -1, *([1] * (weight.dim() - 2)))
    return shaped.clamp_min(shaped.mean() * 1e-4).expand(weight.shape)


def _search(
    rows: Tensor, importance: Tensor, *, levels: int, low: float, candidates: int
) -> tuple[Tensor, Tensor]:
    """The best scale of each row [n] and the row's codes [n, k], of 4,096 rows at a time."""
    scales, codes = [], []
    for part, weights in zip(torch.split(rows, 4096), torch.split(importance, 4096), strict=True):
        peak = part.abs().amax(1)
        best_loss = torch.full_like(peak, torch.inf)
        best = torch.zeros_like(peak)
        for ratio in torch.linspace(low, 1.0, candidates).tolist():
            scale = _storable(peak * ratio / levels)
            error = _round(part, scale, levels) * scale[:, None] - part
            loss = (error.square() * weights).sum(1)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best = torch.where(better, scale, best)
        scales.append(best)
        codes.append(_round(part, best, levels).to(torch.int8))
    return torch.cat(scales), torch.cat(codes)


def _storable(scale: Tensor) -> Tensor:
    """Scales rounded to 16-bit floats, so that storing them so loses nothing; never zero."""
    return scale.clamp_min(2.0**-20).to(torch.float16).to(torch.float32)


def _round(rows: Tensor, scale: Tensor, levels: int) -> Tensor:
    return torch.clamp(torch.round(rows / scale[:, None]), -levels, levels)
