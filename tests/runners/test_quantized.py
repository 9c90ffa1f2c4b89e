"""The quantized layers, which are the oracle of every engine, against plain float layers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runners.quantized import (
    Quantization,
    QuantizedLayer,
    convolution_of,
    insert_quantized,
    pack_int4,
    rows_at_once,
    unpack_int4,
)

SHAPES = [(1,), (2,), (3,), (4, 5), (3, 3, 3, 3), (7, 64), (2, 32, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_codes_come_back(shape: tuple[int, ...]) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
        packed = pack_int4(codes)
        assert packed.dtype == torch.uint8
        assert packed.numel() == -(-codes.numel() // 2)
        assert torch.equal(unpack_int4(packed, shape), codes)


def test_every_pair_of_codes_packs_low_nibble_first() -> None:
    pairs = torch.tensor(list(itertools.product(range(-8, 8), repeat=2)), dtype=torch.int8)
    packed = pack_int4(pairs)
    assert torch.equal(packed & 0xF, pairs[:, 0].to(torch.uint8) & 0xF)
    assert len(set(packed.tolist())) == 256
    assert torch.equal(unpack_int4(packed, (256, 2)), pairs)


def layer(shape: tuple[int, ...], *, bias: bool) -> nn.Linear | nn.Conv2d:
    torch.manual_seed(0)
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=bias)
    return nn.Conv2d(shape[1], shape[0], shape[2], stride=2, padding=1, dilation=(1, 2), bias=bias)


def quantized(
    float_layer: nn.Linear | nn.Conv2d, form: Quantization, activation: str = "none"
) -> QuantizedLayer:
    """Codes are drawn; the float layer gets the weights that they stand for."""
    generator = torch.Generator().manual_seed(1)
    top = 7 if form.bits == 4 else 127
    shape = float_layer.weight.shape
    codes = torch.randint(-top, top + 1, shape, generator=generator, dtype=torch.int8)
    if form.group:
        scale = torch.rand((shape[0], shape[1] // form.group, *shape[2:]), generator=generator)
        weight = codes * scale.repeat_interleave(form.group, dim=1)
    else:
        scale = torch.rand(shape[0], generator=generator)
        weight = codes * scale.view(-1, *([1] * (len(shape) - 1)))
    float_layer.weight.data.copy_(weight)
    tensors: dict[str, Tensor] = {"codes": codes, "scale": scale}
    if float_layer.bias is not None:
        tensors["bias"] = float_layer.bias.detach()
    if activation != "none":
        tensors["activation_scale"] = torch.tensor(0.05)
    if activation == "affine":
        tensors["activation_zero_point"] = torch.tensor(30, dtype=torch.uint8)
    return QuantizedLayer(form, tensors, convolution_of(float_layer))


def inputs(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    size = (3, shape[1]) if len(shape) == 2 else (2, shape[1], 9, 11)
    return torch.randn(size, generator=generator)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("shape", [(6, 64), (6, 64, 3, 3)], ids=["linear", "convolution"])
def test_a_layer_computes_what_the_float_layer_of_its_weights_does(
    shape: tuple[int, ...], group: int, bias: bool
) -> None:
    float_layer = layer(shape, bias=bias)
    rounded = quantized(float_layer, Quantization("int8" if group == 0 else "int4", group))
    torch.testing.assert_close(rounded.dequantized, float_layer.weight.data)
    x = inputs(shape)
    torch.testing.assert_close(rounded(x), float_layer(x))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("group", [0, 32])
def test_a_large_linear_is_dequantized_in_parts_but_exported_whole(
    group: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    float_layer = layer((7, 64), bias=bias)
    rounded = quantized(float_layer, Quantization("int8" if group == 0 else "int4", group))
    rows: list[int] = []
    plain = QuantizedLayer._dequantized

    def watched(self: QuantizedLayer, part: slice | None = None) -> Tensor:
        found = plain(self, part)
        rows.append(len(found))
        return found

    monkeypatch.setattr(QuantizedLayer, "_dequantized", watched)
    monkeypatch.setattr("runners.quantized.rows_at_once", lambda width: 200 // width)
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(rounded(x), float_layer(x), rtol=1e-5, atol=1e-3)  # of hundreds
    assert rows == [3, 3, 1]
    rows.clear()
    torch.export.export(rounded, (x,), strict=False)
    assert rows == [7]


@pytest.mark.parametrize(("width", "rows"), [(4096, 1024), (10240, 384), (1 << 23, 64)])
def test_parts_are_of_whole_tiles_of_rows(width: int, rows: int) -> None:
    assert rows_at_once(width) == rows


def test_e4m3_stays_e4m3_when_floats_are_widened_or_narrowed() -> None:
    """Else an open engine's codes take four times their memory, and no fp8 product takes them."""
    codes = torch.randn(6, 64).to(torch.float8_e4m3fn)
    rounded = QuantizedLayer(Quantization("fp8"), {"codes": codes, "scale": torch.rand(6)}, None)
    wanted = codes.float() * rounded.scale[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        nn.Sequential(rounded).to(dtype)
        assert (rounded.codes.dtype, rounded.scale.dtype) == (torch.float8_e4m3fn, dtype)
        torch.testing.assert_close(rounded.dequantized.float(), wanted, rtol=1e-2, atol=1e-2)


def test_a_static_activation_is_rounded_before_the_product() -> None:
    float_layer = layer((6, 64), bias=True)
    rounded = quantized(float_layer, Quantization("int8"), "static")
    x = inputs((6, 64)) * 4
    steps = torch.clamp(torch.round(x / 0.05), -128, 127) * 0.05
    assert float((x - steps).abs().max()) > 1, "the test should clip too"
    torch.testing.assert_close(rounded(x), float_layer(steps))


def test_a_zero_point_moves_the_grid() -> None:
    float_layer = layer((6, 64), bias=True)
    rounded = quantized(float_layer, Quantization("int8"), "affine")
    x = inputs((6, 64)) * 4
    steps = (torch.clamp(torch.round(x / 0.05) + 30, 0, 255) - 30) * 0.05
    assert float(steps.min()) == pytest.approx(-1.5)
    torch.testing.assert_close(rounded(x), float_layer(steps))


def test_an_output_is_rounded_after_the_bias() -> None:
    float_layer = layer((6, 64), bias=True)
    rounded = quantized(float_layer, Quantization("int8"))
    rounded.output_scale = torch.tensor(0.25)
    x = inputs((6, 64))
    steps = torch.clamp(torch.round(float_layer(x) / 0.25), -128, 127) * 0.25
    torch.testing.assert_close(rounded(x), steps)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 5, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dynamic_layer_rounds_each_token_with_a_scale_of_its_own(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    rounded = quantized(layer((6, 64), bias=True), Quantization("int8", dynamic=True)).to(dtype)
    x = (torch.randn(shape) * 10 ** torch.randn(*shape[:-1], 1)).to(dtype)
    step = x.double().abs().amax(-1, keepdim=True) / 127
    weight = rounded.codes.double() * rounded.scale.double()[:, None]
    assert rounded.bias is not None
    expected = ((x.double() / step).round() * step) @ weight.T + rounded.bias.double()
    assert rounded(x).dtype == dtype
    torch.testing.assert_close(rounded(x), expected.to(dtype))


def test_a_dynamic_layer_takes_nothing_but_zeros_and_passes_nan_on() -> None:
    rounded = quantized(layer((6, 64), bias=True), Quantization("int8", dynamic=True))
    x = torch.zeros(3, 64)
    torch.testing.assert_close(rounded(x), rounded.bias.expand(3, 6))
    x[1, 5] = torch.nan
    assert rounded(x).isnan().any(1).tolist() == [False, True, False]


def test_halves_round_to_even_as_in_onnx() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    rounded = torch.ops.kiln.quantize_dequantize(x, torch.tensor(1.0))
    assert rounded.tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.ops.kiln.dequantize_channel(
            torch.zeros(4, 8, dtype=torch.int8), torch.ones(4)
        ),
        lambda: torch.ops.kiln.dequantize_group(
            torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 2), 4
        ),
        lambda: torch.ops.kiln.dequantize_group_affine(
            torch.zeros(4, 8, dtype=torch.uint8),
            torch.ones(4, 2),
            torch.ones(4, 2, dtype=torch.uint8),
            4,
        ),
        lambda: torch.ops.kiln.quantize_dequantize(torch.ones(4, 8), torch.tensor(0.5)),
        lambda: torch.ops.kiln.quantize_dequantize_fp8(torch.ones(4, 8), torch.tensor(0.5)),
        lambda: torch.ops.kiln.quantize_dequantize_affine(
            torch.ones(4, 8), torch.tensor(0.5), torch.tensor(3, dtype=torch.uint8)
        ),
    ],
    ids=["channel", "group", "group-affine", "activation", "fp8", "affine"],
)
def test_the_operators_fake_versions_give_the_real_shape_and_dtype(call: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = call()
    with FakeTensorMode():
        fake = call()
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_a_layer_takes_the_place_of_the_one_it_is_named_after() -> None:
    root = nn.Sequential(nn.Sequential(nn.Linear(64, 6)), nn.Linear(6, 2))
    rounded = quantized(layer((6, 64), bias=True), Quantization("int8"))
    insert_quantized(root, {"0.0": rounded})
    assert root.get_submodule("0.0") is rounded
    assert root(inputs((6, 64))).shape == (3, 2)


def test_a_convolution_says_its_arguments_as_plain_data() -> None:
    convolution = layer((6, 64, 3, 3), bias=True)
    assert convolution_of(convolution) == {
        "stride": [2, 2],
        "padding": [1, 1],
        "dilation": [1, 2],
        "groups": 1,
    }
    assert convolution_of(layer((6, 64), bias=True)) is None


@pytest.mark.parametrize("activation", ["none", "static", "affine"])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_the_eager_engine_stores_comes_back_the_same(bits: int, activation: str) -> None:
    from runners.engines.eager import _layer, eager_state

    form = Quantization("int4", 32) if bits == 4 else Quantization("int8")
    rounded = quantized(layer((6, 96, 3, 3), bias=True), form, activation)
    rounded.scale = rounded.scale.half().float()
    if activation == "static":
        rounded.output_scale = torch.tensor(0.25)
    layers, state = eager_state(nn.ModuleDict({"convolution": rounded}))
    again = _layer("convolution", layers["convolution"], dict(state))
    x = inputs((6, 96, 3, 3))
    assert torch.equal(again(x), rounded(x))
    stored = state["convolution.codes"]
    assert stored.numel() * stored.element_size() * 8 == bits * 6 * 96 * 9
