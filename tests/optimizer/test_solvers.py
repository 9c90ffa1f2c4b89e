from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from optimizer.quantize.apply import (
    planned_layers,
    quantizable_layers,
    quantized_layer,
    quantized_layers,
)
from optimizer.quantize.observe import LayerStatistics, observing
from optimizer.quantize.policy import Policy, Rule, Scheme
from optimizer.quantize.solvers import quantize_channels, quantize_groups
from runners.quantized import QuantizedLayer

SHAPES = [(8, 64), (8, 64, 3, 3), (5, 32, 1, 1), (3, 192)]
W8A8 = Scheme(bits=8, activation="static")
AFFINE = Scheme(bits=8, activation="affine")


def weight(shape: tuple[int, ...], *, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    if scale.dim() == 1:
        return codes * scale.view(-1, *([1] * (codes.dim() - 1)))
    return codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_codes_fill_their_range_and_scales_fit_in_16_bits(shape: tuple[int, ...]) -> None:
    codes, scale = quantize_channels(weight(shape))
    assert codes.dtype == torch.int8
    assert codes.shape == shape
    assert scale.shape == shape[:1]
    assert int(codes.abs().max()) == 127
    assert torch.equal(scale.half().float(), scale)


@pytest.mark.parametrize("group", [32, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4_codes_are_symmetric_and_scales_fit_in_16_bits(
    shape: tuple[int, ...], group: int
) -> None:
    codes, scale = quantize_groups(weight(shape), group)
    assert codes.dtype == torch.int8
    assert codes.is_contiguous()
    assert codes.shape == shape
    assert scale.shape == (shape[0], shape[1] // group, *shape[2:])
    assert int(codes.abs().max()) == 7
    assert torch.equal(scale.half().float(), scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_searching_is_never_worse_than_the_peaks_scale(shape: tuple[int, ...]) -> None:
    values = weight(shape)
    rows = values.flatten(1)
    plain = (rows.abs().amax(1) / 127).half().float()
    rounded = torch.clamp(torch.round(rows / plain[:, None]), -127, 127) * plain[:, None]
    found = dequantized(*quantize_channels(values))
    assert relative_error(found, values) <= relative_error(rounded.view(shape), values)


def test_a_group_has_its_own_scale_at_each_place_of_the_kernel() -> None:
    """One group's weights are 100 times the others': only its own scale may grow."""
    values = weight((2, 64, 3, 3))
    values[1, 32:, 2, 0] *= 100
    _, scale = quantize_groups(values, 32)
    large = scale[1, 1, 2, 0]
    others = scale.flatten()[scale.flatten() != large]
    assert float(large) > 20 * float(others.max())


def test_weights_of_zero_have_codes_of_zero_and_a_positive_scale() -> None:
    for codes, scale in (
        quantize_channels(torch.zeros(4, 64)),
        quantize_groups(torch.zeros(4, 64), 32),
    ):
        assert not codes.any()
        assert bool((scale > 0).all())


def test_the_power_of_the_inputs_decides_whose_error_counts() -> None:
    values = weight((16, 64))
    power = torch.ones(64)
    power[:8] = 1000
    plain, weighted = (dequantized(*quantize_groups(values, 32, p)) for p in (None, power))

    def counted(found: Tensor) -> float:
        return float(((found - values).square() * power).sum())

    assert counted(weighted) < counted(plain)


def test_rows_do_not_depend_on_how_many_are_searched_at_once() -> None:
    values = weight((5000, 32))
    codes, scale = quantize_channels(values)
    part, part_scale = quantize_channels(values[4000:4200])
    assert torch.equal(codes[4000:4200], part)
    assert torch.equal(scale[4000:4200], part_scale)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(64, 32, 3), nn.Conv2d(32, 32, 3, groups=4), nn.Flatten(2), nn.Linear(25, 6)
    )


def calibrated(root: nn.Module) -> dict[str, LayerStatistics]:
    with observing(root, quantizable_layers(root)) as found:
        for seed in range(3):
            root(weight((2, 64, 9, 9), seed=seed) * 20)
    return found


POLICY = Policy(
    rules=(
        Rule(pattern="0", scheme=W8A8),
        Rule(pattern="*", scheme=Scheme(bits=4, group=64)),
    )
)


def test_linears_and_ungrouped_convolutions_are_planned() -> None:
    assert planned_layers(model(), POLICY) == {"0": W8A8, "3": Scheme(bits=8)}


def test_the_same_calibration_gives_the_same_bytes() -> None:
    states = []
    for _ in range(2):
        root = model()
        layers = quantized_layers(root, planned_layers(root, POLICY), calibrated(root))
        states.append({name: layer.state_dict() for name, layer in layers.items()})
    first, second = states
    assert first.keys() == second.keys() == {"0", "3"}
    for name, tensors in first.items():
        for key, tensor in tensors.items():
            assert tensor.numpy().tobytes() == second[name][key].numpy().tobytes()


@pytest.mark.parametrize("scheme", [W8A8, AFFINE], ids=["static", "affine"])
def test_an_int8_layer_is_close_to_the_float_one(scheme: Scheme) -> None:
    """At least 30 dB: 8 bits give 6 dB each for a uniform range, Gaussians lose about 12 of 50,
    and weight and input add their errors.
    """
    root = model()
    statistics = calibrated(root)
    convolution = root.get_submodule("0")
    assert isinstance(convolution, nn.Conv2d)
    layer = quantized_layer("0", convolution, scheme, statistics)
    assert isinstance(layer, QuantizedLayer)
    x = weight((2, 64, 9, 9), seed=7) * 20
    with torch.no_grad():
        error = relative_error(layer(x), convolution(x))
    assert error <= 10**-3


def test_an_outputs_scale_comes_of_the_layers_own_outputs() -> None:
    root = nn.Sequential(nn.Linear(64, 8))
    x = weight((50, 64)) * 20
    with torch.no_grad(), observing(root, ["0"], ["0"]) as found:
        y = root(x)
    linear = root[0]
    assert isinstance(linear, nn.Linear)
    scheme = Scheme(bits=8, output="static")
    layer = quantized_layer("0", linear, scheme, found)
    assert layer.output_scale is not None
    steps = y / layer.output_scale
    assert 60 < float(steps.abs().max()) < 200
    with torch.no_grad():
        assert relative_error(layer(x), y) < 10**-3


def test_a_static_scheme_without_calibration_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="no calibration statistics"):
        quantized_layer("layer", nn.Linear(64, 4), W8A8, {})
