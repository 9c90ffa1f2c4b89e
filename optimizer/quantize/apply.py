"""Policy and statistics -> quantized layers in the place of float ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from optimizer.quantize.observe import LayerStatistics, best_range, output_of
from optimizer.quantize.policy import Policy, Scheme
from optimizer.quantize.solvers import quantize_channels, quantize_groups
from runners.quantized import Quantization, QuantizedLayer, convolution_of

__all__ = ["planned_layers", "quantizable_layers", "quantized_layer"]


def quantizable_layers(root: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every linear and ungrouped 2-d convolution of `root`, by name."""
    return {
        name: layer
        for name, layer in root.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


def planned_layers(root: nn.Module, policy: Policy) -> dict[str, Scheme]:
    """The layers of `root` that `policy` stores in fewer than 16 bits, with their schemes."""
    schemes = {
        name: policy.scheme(name, layer.weight.shape[1])
        for name, layer in quantizable_layers(root).items()
    }
    return {name: scheme for name, scheme in schemes.items() if scheme.bits < 16}


def quantized_layer(
    name: str,
    layer: nn.Linear | nn.Conv2d,
    scheme: Scheme,
    found: Mapping[str, LayerStatistics],
) -> QuantizedLayer:
    """The quantized form of one layer, whose weights are finite (`load_module` sees to that)."""
    weight, statistics = layer.weight.detach(), found.get(name)
    power = statistics.channel_power if statistics is not None else None
    if scheme.bits == 4:
        codes, scale = quantize_groups(weight, scheme.group, power)
    else:
        codes, scale = quantize_channels(weight, power)
    tensors: dict[str, Tensor] = {"codes": codes, "scale": scale}
    if scheme.activation != "none":
        grid = best_range(_observed(found, name), affine=scheme.activation == "affine")
        tensors["activation_scale"] = torch.tensor(grid.scale)
        if grid.zero_point is not None:
            tensors["activation_zero_point"] = torch.tensor(grid.zero_point, dtype=torch.uint8)
    if scheme.output != "none":
        grid = best_range(_observed(found, output_of(name)), affine=False)
        tensors["output_scale"] = torch.tensor(grid.scale)
    if layer.bias is not None:
        tensors["bias"] = layer.bias.detach().float()
    quantization = Quantization(
        bits=4 if scheme.bits == 4 else 8, group=scheme.group, activation=scheme.activation
    )
    return QuantizedLayer(quantization, tensors, convolution_of(layer))


def _observed(found: Mapping[str, LayerStatistics], name: str) -> LayerStatistics:
    if name not in found:
        raise ValueError(f"{name} has no calibration statistics")
    return found[name]


def quantized_layers(
    root: nn.Module,
    schemes: Mapping[str, Scheme],
    statistics: Mapping[str, LayerStatistics],
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, QuantizedLayer]:
    """The quantized form of every planned layer; `on_layer` is called after each."""
    layers = quantizable_layers(root)
    found = {}
    for name, scheme in schemes.items():
        found[name] = quantized_layer(name, layers[name], scheme, statistics)
        on_layer()
    return found
