"""The small float types: their values are the standards', and NF4 is bitsandbytes' own."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from optimizer.quantize.apply import quantized_layer
from optimizer.quantize.observe import LayerStatistics, observing
from optimizer.quantize.schemes import Fp8, Nf4, Nvfp4
from runners.quantized import FP4_VALUES, QuantizedLayer


def linear(columns: int = 128) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, 24, bias=False)


def observed(layer: nn.Linear, x: Tensor) -> dict[str, LayerStatistics]:
    with torch.no_grad(), observing(nn.ModuleDict({"layer": layer}), ["layer"]) as found:
        layer(x)
    return found


def rounded(scheme: Nf4 | Nvfp4 | Fp8) -> tuple[nn.Linear, QuantizedLayer]:
    layer = linear()
    x = torch.randn(50, 128)
    return layer, quantized_layer("layer", layer, scheme, observed(layer, x))


def sqnr_db(found: Tensor, wanted: Tensor) -> float:
    ratio = wanted.square().sum() / (found - wanted).square().sum()
    return float(10 * torch.log10(ratio))


def test_nf4_is_what_bitsandbytes_makes_of_the_same_weight() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    layer, found = rounded(Nf4())
    packed, state = quantize_4bit(
        layer.weight.detach(), blocksize=64, quant_type="nf4", compress_statistics=False
    )
    torch.testing.assert_close(found.scale.flatten(), state.absmax)
    torch.testing.assert_close(
        found.dequantized, dequantize_4bit(packed, state), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(
    ("scheme", "least"),
    [(Nf4(), 19.0), (Nvfp4(), 18.5), (Fp8(), 30.0)],
    ids=["nf4", "nvfp4", "fp8"],
)
def test_a_uniform_weight_keeps_what_the_format_can(
    scheme: Nf4 | Nvfp4 | Fp8, least: float
) -> None:
    layer, found = rounded(scheme)
    assert sqnr_db(found.dequantized, layer.weight.detach()) > least


def test_nvfp4_has_e2m1_values_and_e4m3_scales_under_one() -> None:
    _, found = rounded(Nvfp4())
    assert found.scale.dtype == torch.float8_e4m3fn
    assert float(found.scale.float().max()) == 448
    assert found.whole is not None
    scale = (found.scale.float() * found.whole).repeat_interleave(16, dim=1)
    values = {round(float(v), 4) for v in (found.dequantized / scale).flatten()}
    assert values <= set(FP4_VALUES)


def test_fp8_rounds_weight_and_input_to_e4m3_and_clips_the_input() -> None:
    layer, found = rounded(Fp8())
    assert found.codes.dtype == torch.float8_e4m3fn
    assert found.activation_scale is not None
    x = torch.randn(10, 128) * 100
    steps = (x / found.activation_scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert float(steps.abs().max()) == 448
    wanted = nn.functional.linear(steps * found.activation_scale, found.dequantized)
    torch.testing.assert_close(found(x), wanted)
    small = torch.randn(10, 128)
    with torch.no_grad():
        assert sqnr_db(found(small), layer(small)) > 25
