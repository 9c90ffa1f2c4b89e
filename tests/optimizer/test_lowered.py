"""Lowered layers compute what the oracle's layers do, in torch's own operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from optimizer.quantize import floats
from optimizer.quantize.apply import quantized_layer
from optimizer.quantize.schemes import W4A16, W8A8, W8A16, Scheme
from runners.lowered import Product, card_product, lower_layers, processor_product
from runners.quantized import FP8_MAX, Quantization, QuantizedLayer, convolution_of

SCHEMES: dict[str, Scheme] = {
    "w8a16": W8A16(),
    "w4a16": W4A16(group=32),
    "w4a16 zero points": W4A16(group=32, symmetric=False),
    "w4a16 corrected": W4A16(group=32, rank=4),
    "w8a8": W8A8(zero_point=False),
    "w8a8 zero points": W8A8(),
}
LAYERS = {
    "linear": (nn.Linear(64, 48), (2, 33, 64)),
    "vector": (nn.Linear(64, 48, bias=False), (2, 64)),
    "odd": (nn.Linear(64, 20), (1, 5, 64)),
    "convolution": (nn.Conv2d(64, 24, 3, stride=2, padding=1), (2, 64, 9, 7)),
}


def oracle(layer: nn.Module, scheme: Scheme) -> QuantizedLayer:
    """The layer quantized, its input's grid as calibration would find it for unit noise."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    if isinstance(scheme, W8A8):
        plain = quantized_layer("layer", layer, W8A16(), {})
        found = {"codes": plain.codes, "scale": plain.scale, "activation_scale": torch.tensor(0.03)}
        if scheme.zero_point:
            found["activation_zero_point"] = torch.tensor(101, dtype=torch.uint8)
        if layer.bias is not None:
            found["bias"] = layer.bias.detach()
        return QuantizedLayer(Quantization("int8"), found, convolution_of(layer))
    return quantized_layer("layer", layer, scheme, {})


def both(layer: nn.Module, scheme: Scheme, product: Product) -> tuple[nn.Module, nn.Module]:
    rounded = oracle(layer, scheme)
    root = nn.ModuleDict({"layer": rounded})
    lower_layers(root, product)
    return rounded, root["layer"]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("product", [processor_product, card_product])
def test_it_gives_what_the_oracle_gives(name: str, scheme: str, product: Product) -> None:
    """To sums in another order and scales in 16 bits, which is how they are stored."""
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    rounded, lowered = both(layer, SCHEMES[scheme], product)
    x = torch.randn(shape)
    with torch.no_grad():
        wanted, found = rounded(x), lowered(x)
    error = float((found - wanted).square().sum() / wanted.square().sum())
    assert found.shape == wanted.shape
    assert error < 1e-6  # 2^-11 of fp16 scales, squared, is 2.4e-7


def test_fp8_products_give_what_the_oracle_gives() -> None:
    """To the bfloat16 that the product's sums come in."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    tensors = floats.fp8(layer.weight.detach()) | {"bias": layer.bias.detach()}
    tensors["activation_scale"] = torch.tensor(4 / FP8_MAX)
    rounded = QuantizedLayer(Quantization("fp8"), tensors, None)
    root = nn.ModuleDict({"layer": rounded})
    lower_layers(root, card_product)
    x = torch.randn(2, 33, 64)
    with torch.no_grad():
        wanted, found = rounded(x), root["layer"](x)
    assert float((found - wanted).square().sum() / wanted.square().sum()) < 2**-14


def test_codes_of_4_bits_stay_two_a_byte() -> None:
    _, lowered = both(LAYERS["convolution"][0], W4A16(group=32), processor_product)
    assert lowered.codes.numel() == 24 * 64 * 9 / 2
    assert lowered.scale.dtype == torch.float16


def test_its_tensors_are_those_of_the_eager_engines_file() -> None:
    from runners.engines.eager import eager_state

    rounded = oracle(LAYERS["linear"][0], W4A16(group=32))
    _, stored = eager_state(nn.ModuleDict({"layer": rounded}))
    root = nn.ModuleDict({"layer": oracle(LAYERS["linear"][0], W4A16(group=32))})
    lower_layers(root, processor_product)
    have: dict[str, Tensor] = {**dict(root.named_parameters()), **dict(root.named_buffers())}
    for name, tensor in stored.items():
        assert torch.equal(have[name], tensor), name
