"""Weights in the small float types: nearest values, scales by the peak."""

from __future__ import annotations

import torch
from torch import Tensor

from runners.quantized import FP4_VALUES, FP8_MAX, NF4_BLOCK, NF4_VALUES

__all__ = ["fp8", "nf4", "nvfp4"]

_FP4_MAX = 6.0
_GROUP = 16


def fp8(weight: Tensor) -> dict[str, Tensor]:
    """`codes` float8_e4m3fn shaped as `weight` [out, in, ...]; `scale` [out]."""
    scale = (weight.flatten(1).abs().amax(1) / FP8_MAX).clamp_min(2.0**-20)
    shaped = scale.view(-1, *([1] * (weight.dim() - 1)))
    return {"codes": (weight / shaped).to(torch.float8_e4m3fn), "scale": scale}


def nf4(weight: Tensor) -> dict[str, Tensor]:
    """`codes` uint8 indices shaped as `weight`; `scale`: the peaks of 64 along a row [out, n]."""
    rows = weight.reshape(weight.shape[0], -1, NF4_BLOCK)
    peak = rows.abs().amax(-1)
    values = torch.tensor(NF4_VALUES)
    limits = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(rows / peak.clamp_min(1e-30)[..., None], limits)
    return {"codes": codes.to(torch.uint8).view(weight.shape), "scale": peak}


def nvfp4(weight: Tensor) -> dict[str, Tensor]:
    """`codes` uint8, e2m1's bits; `scale` e4m3 [out, in/16, ...], times the tensor's, `whole` 0-d.

    The tensor's scale puts the largest block scale at e4m3's largest value.
    """
    out, channels = weight.shape[:2]
    groups = weight.reshape(out, channels // _GROUP, _GROUP, *weight.shape[2:])
    peak = groups.abs().amax(2)
    whole = (peak.max() / (_FP4_MAX * FP8_MAX)).clamp_min(2.0**-60)
    small = (peak / _FP4_MAX / whole).clamp_min(2.0**-9).to(torch.float8_e4m3fn)
    steps = groups / (small.float() * whole).unsqueeze(2)
    values = torch.tensor(FP4_VALUES[:8])
    sizes = torch.bucketize(steps.abs(), (values[1:] + values[:-1]) / 2)
    codes = (sizes + 8 * (steps < 0)).to(torch.uint8)
    return {"codes": codes.view(weight.shape), "scale": small, "whole": whole}
