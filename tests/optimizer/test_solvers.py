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
from optimizer.quantize.lowrank import correction
from optimizer.quantize.observe import LayerStatistics, observing
from optimizer.quantize.policy import Policy, Rule
from optimizer.quantize.schemes import W4A16, W8A8, W8A16
from optimizer.quantize.solvers import SOLVERS
from optimizer.quantize.solvers.grid import Codes, Grid, Inputs, as_matrix, from_matrix
from runners.quantized import QuantizedLayer

SHAPES = [(8, 64), (8, 64, 3, 3), (5, 32, 1, 1), (3, 192)]
INT8 = W8A8(zero_point=False)
AFFINE = W8A8()


def weight(shape: tuple[int, ...], *, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


def grid(matrix: Tensor, kind: str) -> Grid:
    return {
        "int8": Grid(-127, 127, matrix.shape[1]),
        "int4": Grid(-7, 7, 32),
        "uint4": Grid(0, 15, 32, zero_point=True),
    }[kind]


def inputs_like(matrix: Tensor, *, seed: int = 1) -> Inputs:
    """Of correlated inputs whose columns differ in size."""
    columns = matrix.shape[1]
    mixing = torch.randn((columns, columns), generator=torch.Generator().manual_seed(seed))
    mixing += 3 * torch.eye(columns)
    covariance = mixing @ mixing.T / columns
    return Inputs(covariance.diagonal().clone(), covariance)


def output_error(codes: Codes, matrix: Tensor, inputs: Inputs) -> float:
    """E |x (W - W')^T|^2 for inputs of this covariance."""
    error = codes.dequantized() - matrix
    assert inputs.covariance is not None
    return float(((error @ inputs.covariance) * error).sum())


@pytest.mark.parametrize("kind", ["int8", "int4", "uint4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_codes_stay_on_their_grid_and_scales_fit_in_16_bits(
    solver: str, shape: tuple[int, ...], kind: str
) -> None:
    matrix = as_matrix(weight(shape))
    wanted = grid(matrix, kind)
    codes = SOLVERS[solver].solve(matrix, wanted, inputs_like(matrix))
    assert codes.codes.dtype == torch.int8
    assert codes.codes.shape == matrix.shape
    assert codes.scale.shape == (matrix.shape[0], matrix.shape[1] // wanted.group)
    assert wanted.low <= int(codes.codes.min()) <= int(codes.codes.max()) <= wanted.high
    assert torch.equal(codes.scale.half().float(), codes.scale)
    assert bool((codes.scale > 0).all())
    assert (codes.zero is not None) == wanted.zero_point
    if codes.zero is not None:
        assert torch.equal(codes.zero, codes.zero.round())
        assert wanted.low <= float(codes.zero.min()) <= float(codes.zero.max()) <= wanted.high
    assert relative_error(codes.dequantized(), matrix) < {"int8": 1e-3}.get(kind, 0.03)


@pytest.mark.parametrize("kind", ["int8", "int4", "uint4"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_of_zero_stay_zero(solver: str, kind: str) -> None:
    matrix = torch.zeros(4, 64)
    codes = SOLVERS[solver].solve(matrix, grid(matrix, kind), inputs_like(matrix))
    assert not codes.dequantized().any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_gives_the_same_bytes_twice(solver: str) -> None:
    matrix = weight((16, 192))
    first, second = (
        SOLVERS[solver].solve(matrix.clone(), grid(matrix, "int4"), inputs_like(matrix))
        for _ in range(2)
    )
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)


@pytest.mark.parametrize("kind", ["int8", "int4", "uint4"])
def test_a_clipping_search_is_never_worse_than_the_peaks_range(kind: str) -> None:
    matrix = weight((64, 192))
    nearest, clipped = (
        SOLVERS[name].solve(matrix, grid(matrix, kind), Inputs()) for name in ("rtn", "mse")
    )
    assert relative_error(clipped.dequantized(), matrix) <= relative_error(
        nearest.dequantized(), matrix
    )


def test_the_power_of_the_inputs_decides_whose_error_counts() -> None:
    matrix = weight((16, 64))
    power = torch.ones(64)
    power[:8] = 1000
    plain, weighted = (
        SOLVERS["mse"].solve(matrix, grid(matrix, "int4"), Inputs(p)).dequantized()
        for p in (None, power)
    )

    def counted(found: Tensor) -> float:
        return float(((found - matrix).square() * power).sum())

    assert counted(weighted) < counted(plain)


@pytest.mark.parametrize("kind", ["int4", "uint4"])
@pytest.mark.parametrize("shape", [(32, 128), (32, 320)], ids=str)
def test_gptq_loses_less_than_nearest_codes_on_the_same_grids(
    shape: tuple[int, ...], kind: str
) -> None:
    """The codes are the only difference: less than two thirds of the error for such inputs."""
    matrix = weight(shape)
    inputs = inputs_like(matrix)
    plain, gptq = (
        SOLVERS[name].solve(matrix, grid(matrix, kind), inputs) for name in ("mse", "gptq")
    )
    assert torch.equal(plain.scale, gptq.scale)
    assert output_error(gptq, matrix, inputs) < output_error(plain, matrix, inputs) / 1.5


def test_gptq_with_independent_inputs_rounds_to_the_nearest() -> None:
    matrix = weight((8, 128))
    inputs = Inputs(torch.ones(128), torch.eye(128))
    plain, gptq = (
        SOLVERS[name].solve(matrix, grid(matrix, "int4"), inputs) for name in ("mse", "gptq")
    )
    assert torch.equal(plain.codes, gptq.codes)


def test_gptq_takes_a_channels_covariance_for_every_place_of_a_kernel() -> None:
    values = weight((8, 64, 3, 3))
    channels = inputs_like(values[:, :, 0, 0]).covariance
    whole = SOLVERS["gptq"].solve(as_matrix(values), Grid(-7, 7, 32), Inputs(None, channels))
    for place in range(9):
        matrix = values[:, :, place // 3, place % 3]
        part = SOLVERS["gptq"].solve(matrix, Grid(-7, 7, 32), Inputs(None, channels))
        assert torch.equal(whole.codes[:, place * 64 : place * 64 + 64], part.codes)


def test_gptq_without_a_covariance_is_a_programming_error() -> None:
    matrix = weight((8, 64))
    with pytest.raises(ValueError, match="needs the covariance"):
        SOLVERS["gptq"].solve(matrix, grid(matrix, "int4"), Inputs())


def heavy_tailed(shape: tuple[int, ...]) -> Tensor:
    return weight(shape).pow(3) * 100 + weight(shape, seed=3)


@pytest.mark.parametrize("kind", ["int4", "uint4"])
def test_hqq_lowers_the_heavy_tailed_error_that_it_minimizes(kind: str) -> None:
    matrix = heavy_tailed((64, 192))
    nearest, hqq = (
        SOLVERS[name].solve(matrix, grid(matrix, kind), Inputs()).dequantized()
        for name in ("rtn", "hqq")
    )
    assert float((hqq - matrix).abs().pow(0.7).sum()) < float(
        (nearest - matrix).abs().pow(0.7).sum()
    )


def test_hqq_agrees_with_onnx_runtimes() -> None:
    """Its zero points are floats and ours whole, which may cost a tenth of the error."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        HQQWeightOnlyQuantConfig,
        HQQWeightOnlyQuantizer,
    )

    matrix = weight((64, 128))
    theirs = HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(block_size=64))
    packed, scale, zero = theirs.quantize_internal(matrix, bits=4, group_size=64)
    codes = torch.as_tensor(packed).float().view(64, 2, 64)
    scale, zero = (torch.as_tensor(t).float().view(64, 2, 1) for t in (scale, zero))
    wanted = ((codes - zero) * scale).view(64, 128)
    found = SOLVERS["hqq"].solve(matrix, Grid(0, 15, 64, zero_point=True), Inputs())
    ours, published = (relative_error(w, matrix) for w in (found.dequantized(), wanted))
    assert ours <= 1.1 * published


def test_nearest_codes_agree_with_onnx_runtimes() -> None:
    """Theirs use -8 too, which is worth a seventh of the step at most, and so of the amplitude."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    matrix = weight((64, 128))
    quantizer = DefaultWeightOnlyQuantizer(
        DefaultWeightOnlyQuantConfig(block_size=64, is_symmetric=True)
    )
    packed, scales, _ = quantizer.qbits_block_quant(matrix.T.contiguous().numpy())
    bytes_ = torch.from_numpy(packed).view(64, 2, 32)
    codes = torch.stack((bytes_ & 0xF, bytes_ >> 4), dim=-1).flatten(2).float() - 8
    wanted = (codes * torch.from_numpy(scales).view(64, 2, 1)).view(64, 128)
    found = SOLVERS["rtn"].solve(matrix, Grid(-7, 7, 64), Inputs())
    ours, published = (relative_error(w, matrix) for w in (found.dequantized(), wanted))
    assert ours == pytest.approx(published, rel=2 / 7)


def test_a_matrix_has_the_kernels_places_outside_and_comes_back() -> None:
    values = weight((8, 64, 3, 2))
    matrix = as_matrix(values)
    assert torch.equal(matrix[:, 64:128], values[:, :, 0, 1])
    assert torch.equal(from_matrix(matrix, values.shape), values)
    scales = weight((8, 6 * 2))
    assert torch.equal(from_matrix(scales, values.shape)[:, 1, 0, 1], scales[:, 3])


def test_a_correction_of_full_rank_leaves_no_error_and_of_less_rank_less() -> None:
    matrix = weight((16, 64))
    inputs = inputs_like(matrix)
    codes = SOLVERS["rtn"].solve(matrix, Grid(-7, 7, 32), inputs)
    errors = []
    for rank in (0, 4, 8, 16):
        thin = correction(matrix, codes, inputs, rank)
        found = codes.dequantized() + thin.up @ thin.down
        assert inputs.power is not None
        errors.append(float(((found - matrix).square() * inputs.power).sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.8 * errors[0]
    assert errors[-1] < 1e-6 * errors[0]


@pytest.mark.parametrize("shape", [(24, 96), (160, 64)])
def test_a_correction_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    matrix = weight(shape)
    codes = SOLVERS["rtn"].solve(matrix, Grid(-7, 7, 32), Inputs())
    error = matrix - codes.dequantized()
    thin = correction(matrix, codes, Inputs(), 5)
    left = float((error - thin.up @ thin.down).square().sum())
    least = float(torch.linalg.svdvals(error)[5:].square().sum())
    assert left == pytest.approx(least, rel=1e-4)
    assert torch.equal(thin.up, correction(matrix, codes, Inputs(), 5).up)


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
        Rule(pattern="0", scheme=INT8),
        Rule(pattern="*", scheme=W4A16()),
    )
)


def test_linears_and_ungrouped_convolutions_are_planned() -> None:
    assert planned_layers(model(), POLICY) == {"0": INT8, "3": W8A16()}


def test_the_same_calibration_gives_the_same_bytes() -> None:
    states = []
    for _ in range(2):
        root = model()
        layers = quantized_layers(root, planned_layers(root, POLICY), calibrated(root), "mse")
        states.append({name: layer.state_dict() for name, layer in layers.items()})
    first, second = states
    assert first.keys() == second.keys() == {"0", "3"}
    for name, tensors in first.items():
        for key, tensor in tensors.items():
            assert tensor.numpy().tobytes() == second[name][key].numpy().tobytes()


@pytest.mark.parametrize("scheme", [INT8, AFFINE], ids=["static", "affine"])
def test_an_int8_layer_is_close_to_the_float_one(scheme: W8A8) -> None:
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
    layer = quantized_layer("0", linear, W8A8(output=True), found)
    assert layer.output_scale is not None
    steps = y / layer.output_scale
    assert 60 < float(steps.abs().max()) < 200
    with torch.no_grad():
        assert relative_error(layer(x), y) < 10**-3


def test_a_static_scheme_without_calibration_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="no calibration statistics"):
        quantized_layer("layer", nn.Linear(64, 4), INT8, {})
