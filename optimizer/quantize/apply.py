"""Policy and statistics -> quantized layers in the place of float ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from optimizer.quantize import floats, lowrank
from optimizer.quantize.folding import gains
from optimizer.quantize.observe import LayerStatistics, output_of
from optimizer.quantize.policy import Policy
from optimizer.quantize.ranges import best_range
from optimizer.quantize.schemes import (
    W4A16,
    W8A8,
    W8A16,
    Fp8,
    LlmInt8,
    Nf4,
    Nvfp4,
    Scheme,
    TorchaoInt8,
)
from optimizer.quantize.smoothing import Smoothing, smoothing
from optimizer.quantize.solvers import SOLVERS
from optimizer.quantize.solvers.grid import Grid, Inputs, as_matrix, from_matrix
from runners.quantized import FP8_MAX, Quantization, QuantizedLayer, convolution_of

__all__ = ["planned_layers", "quantizable_layers", "quantized_layer", "quantized_layers"]

Statistics = Mapping[str, LayerStatistics]
_Found = tuple[Quantization, dict[str, Tensor]]


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
        name: policy.scheme(name, tuple(layer.weight.shape))
        for name, layer in quantizable_layers(root).items()
    }
    return {name: scheme for name, scheme in schemes.items() if scheme.bits < 16}


def quantized_layers(
    root: nn.Module,
    schemes: Mapping[str, Scheme],
    statistics: Statistics,
    solver: str,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, QuantizedLayer]:
    """The quantized form of every planned layer; `on_layer` is called after each.

    Multipliers of inputs go into the layers that make those inputs, where there are such: `root`'s
    own, if they are kept, are changed in place.
    """
    layers = quantizable_layers(root)
    smooth = _smoothings(layers, schemes, statistics, solver)
    gain = _fold(root, schemes, smooth)
    found = {}
    for name, scheme in schemes.items():
        layer, one = layers[name], smooth.get(name)
        found[name] = _quantized(name, layer, scheme, statistics, solver, one, gain.get(name))
        # what is added beside a layer must be brought to its scale (optimizer.lora_graph)
        _keep_factors(found[name], None if one is None else one.multiplier, gain.get(name))
        on_layer()
    return found


@torch.no_grad()
def _fold(
    root: nn.Module, schemes: Mapping[str, Scheme], smooth: dict[str, Smoothing | None]
) -> dict[str, Tensor]:
    """Planned layer -> what its outputs are multiplied by, for the layers that read them.

    Their entries in `smooth` say so; kept layers of `root` are changed here.
    """
    multipliers = {name: one.multiplier for name, one in smooth.items() if one is not None}
    rounded = {name for name, s in schemes.items() if isinstance(s, W8A8) and s.output}
    found: dict[str, Tensor] = {}
    for reader, (name, gain) in gains(root, multipliers, frozenset(rounded)).items():
        one = smooth[reader]
        assert one is not None
        smooth[reader] = replace(one, folded=True)
        if name in schemes:
            found[name] = gain
        else:
            _multiply_outputs(root.get_submodule(name), gain)
            _keep_factors(root.get_submodule(name), None, gain)
    return found


def _keep_factors(layer: nn.Module, before: Tensor | None, after: Tensor | None) -> None:
    """Note on the layer what its input and its output are multiplied with, for low-rank parts."""
    layer.__dict__["input_factor"], layer.__dict__["output_factor"] = before, after


def _multiply_outputs(layer: nn.Module, gain: Tensor) -> None:
    for parameter in layer.parameters():  # weight [out, in] and bias [out]
        parameter.mul_(gain.view(-1, *([1] * (parameter.dim() - 1))))


@torch.no_grad()
def _smoothings(
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    schemes: Mapping[str, Scheme],
    statistics: Statistics,
    solver: str,
) -> dict[str, Smoothing | None]:
    """What the inputs of W8A8 layers are multiplied with; layers that share an input share it.

    Inputs that were always the same have the same energies, to the last bit.
    """
    sharing: dict[tuple[bytes, torch.Size, bool], list[str]] = {}
    for name, scheme in schemes.items():
        if isinstance(scheme, W8A8):
            energy = _observed(statistics, name).channel_power.numpy().tobytes()
            kernel = layers[name].weight.shape[2:]
            sharing.setdefault((energy, kernel, scheme.zero_point), []).append(name)
    found: dict[str, Smoothing | None] = {}
    for (_, _, affine), names in sharing.items():
        weights = [layers[name].weight.detach().float() for name in names]
        by_channel = SOLVERS[solver].smooths
        one = smoothing(weights, statistics[names[0]], affine=affine, by_channel=by_channel)
        found |= dict.fromkeys(names, one)
    return found


@torch.no_grad()
def quantized_layer(
    name: str,
    layer: nn.Linear | nn.Conv2d,
    scheme: Scheme,
    statistics: Statistics,
    solver: str = "mse",
) -> QuantizedLayer:
    """The quantized form of one layer, whose weights are finite (`load_module` sees to that).

    `solver` finds the codes of the integer schemes; those of float types are the nearest.
    """
    smooth = _smoothings({name: layer}, {name: scheme}, statistics, solver)
    return _quantized(name, layer, scheme, statistics, solver, smooth.get(name), None)


def _quantized(
    name: str,
    layer: nn.Linear | nn.Conv2d,
    scheme: Scheme,
    statistics: Statistics,
    solver: str,
    smooth: Smoothing | None,
    gain: Tensor | None,
) -> QuantizedLayer:
    weight, bias = layer.weight.detach().float(), layer.bias
    if gain is not None:
        weight = weight * gain.view(-1, *([1] * (weight.dim() - 1)))
        bias = None if bias is None else bias * gain
    if smooth is not None:
        weight = weight / smooth.multiplier
    form: Quantization
    tensors: dict[str, Tensor]
    match scheme:
        case Nf4():
            form, tensors = Quantization("nf4"), floats.nf4(weight)
        case Nvfp4():
            form, tensors = Quantization("nvfp4", 16), floats.nvfp4(weight)
        case Fp8():
            form, tensors = Quantization("fp8"), floats.fp8(weight)
        case W4A16():
            form, tensors = _groups(weight, scheme, statistics.get(name), solver)
        case _:
            form, tensors = _rows(weight, statistics.get(name), solver, smooth)
            form = _rounding_as_it_comes(form, scheme)
    tensors |= _ends(name, scheme, statistics, smooth)
    if bias is not None:
        tensors["bias"] = bias.detach().float()
    return QuantizedLayer(form, tensors, convolution_of(layer))


def _rows(
    weight: Tensor, inputs: LayerStatistics | None, solver: str, smooth: Smoothing | None
) -> _Found:
    """int8 codes with one scale an output channel; GPTQ has nothing to win there."""
    matrix = as_matrix(weight)
    known = Inputs() if inputs is None else inputs.inputs(matrix.shape[1], covariance=False)
    if smooth is not None and known.power is not None:
        by_channel = known.power.view(-1, len(smooth.multiplier))
        known = Inputs((by_channel * smooth.multiplier.flatten().square()).flatten())
    how = "mse" if solver == "gptq" else solver
    codes = SOLVERS[how].solve(matrix, Grid(-127, 127, matrix.shape[1]), known)
    tensors = {"codes": from_matrix(codes.codes, weight.shape), "scale": codes.scale.flatten()}
    return Quantization("int8"), tensors


def _rounding_as_it_comes(form: Quantization, scheme: Scheme) -> Quantization:
    """The form, and who rounds the input where no calibrated scale does."""
    match scheme:
        case LlmInt8():
            return replace(form, dynamic=True, library="bitsandbytes")
        case TorchaoInt8():
            return replace(form, dynamic=True, library="torchao")
        case W8A16():
            return replace(form, dynamic=scheme.dynamic)
    return form


def _groups(weight: Tensor, scheme: W4A16, inputs: LayerStatistics | None, solver: str) -> _Found:
    """4-bit codes in groups, their zero points, and the correction's two matrices."""
    matrix = as_matrix(weight)
    known = Inputs() if inputs is None else inputs.inputs(matrix.shape[1])
    low, high = (-7, 7) if scheme.symmetric else (0, 15)
    grid = Grid(low, high, scheme.group, zero_point=not scheme.symmetric)
    codes = SOLVERS[solver].solve(matrix, grid, known)
    tensors = {
        "codes": from_matrix(codes.codes, weight.shape),
        "scale": from_matrix(codes.scale, weight.shape),
    }
    if codes.zero is not None:
        tensors["codes"] = tensors["codes"].to(torch.uint8)
        tensors["zero"] = from_matrix(codes.zero.to(torch.uint8), weight.shape)
    if scheme.rank:
        thin = lowrank.correction(matrix, codes, known, scheme.rank)
        tensors["down"] = from_matrix(thin.down, (scheme.rank, *weight.shape[1:]))
        tensors["up"] = thin.up.view(*thin.up.shape, *([1] * (weight.dim() - 2)))
    return Quantization("int4" if scheme.symmetric else "uint4", scheme.group), tensors


def _ends(
    name: str, scheme: Scheme, statistics: Statistics, smooth: Smoothing | None
) -> dict[str, Tensor]:
    """The grids of the layer's input and output, where the scheme rounds them."""
    tensors: dict[str, Tensor] = {}
    if isinstance(scheme, Fp8):
        tensors["activation_scale"] = torch.tensor(_observed(statistics, name).peak / FP8_MAX)
    if isinstance(scheme, W8A8):
        if smooth is not None:
            grid = smooth.grid
            if not smooth.folded:
                tensors["multiplier"] = smooth.multiplier
        else:
            grid = best_range(_observed(statistics, name), affine=scheme.zero_point)
        tensors["activation_scale"] = torch.tensor(grid.scale)
        if grid.zero_point is not None:
            tensors["activation_zero_point"] = torch.tensor(grid.zero_point, dtype=torch.uint8)
        if scheme.output:
            grid = best_range(_observed(statistics, output_of(name)), affine=False)
            tensors["output_scale"] = torch.tensor(grid.scale)
    return tensors


def _observed(statistics: Statistics, name: str) -> LayerStatistics:
    if name not in statistics:
        raise ValueError(f"{name} has no calibration statistics")
    return statistics[name]
