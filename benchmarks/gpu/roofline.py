"""What a call costs in operations, and how many the machine does a second at its best."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["flops_of", "peak_flops"]

_PEAK_SIDE = 8192


def flops_of(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Of one call, counted from shapes alone: `module` is on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*(tensor.to("meta") for tensor in inputs))
    return int(counter.get_total_flops())


def peak_flops(device: str) -> float:
    """The best of 20 products of square bf16 matrices, operations a second."""
    side = _PEAK_SIDE if device == "cuda" else 512
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        one @ other
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
