"""Linears of random weights rounded to int8 or fp8, inputs too, by what one call shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from runners.quantized import FP8_MAX, Quantization, QuantizedLayer, insert_quantized

__all__ = ["round_linears"]

_STEP = 16
"""What int8 and fp8 products want widths to be multiples of."""


def round_linears(component: nn.Module, form: str, call: Callable[[], Any]) -> int:
    """Replace every linear whose widths suit tensor cores; how many were replaced.

    Scales are the largest weight's of each output, and the largest input's of `call`.
    """
    peaks: dict[str, float] = {}
    handles = []
    linears = {
        name: layer
        for name, layer in component.named_modules()
        if isinstance(layer, nn.Linear)
        and layer.in_features % _STEP == 0
        and layer.out_features % _STEP == 0
    }
    for name, layer in linears.items():

        def watch(_layer: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            peaks[name] = max(peaks.get(name, 1e-6), float(inputs[0].abs().max()))

        handles.append(layer.register_forward_pre_hook(watch))
    with torch.inference_mode():
        call()
    for handle in handles:
        handle.remove()
    rounded = {name: _rounded(linears[name], peak, form) for name, peak in peaks.items()}
    insert_quantized(component, rounded)
    return len(rounded)


def _rounded(layer: nn.Linear, peak: float, form: str) -> QuantizedLayer:
    weight = layer.weight.detach().float()
    largest = FP8_MAX if form == "fp8" else 127.0
    scale = weight.abs().amax(1).clamp(min=1e-8) / largest
    codes = weight / scale[:, None]
    tensors = {
        "codes": codes.to(torch.float8_e4m3fn) if form == "fp8" else codes.round().to(torch.int8),
        "scale": scale,
        "activation_scale": torch.tensor(peak / largest),
    }
    if layer.bias is not None:
        tensors["bias"] = layer.bias.detach()
    return QuantizedLayer(Quantization("fp8" if form == "fp8" else "int8"), tensors, None)
