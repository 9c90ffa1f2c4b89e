"""Schemes say what they fit and what they weigh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from optimizer.quantize.apply import quantized_layer
from optimizer.quantize.observe import observing, output_of
from optimizer.quantize.policy import LEVELS
from optimizer.quantize.schemes import KEEP, W4A16, W8A8, W8A16, Fp8, Keep, Nf4, Nvfp4, Scheme
from runners.engines.eager import eager_state

ALL: list[Any] = [
    W8A16(),
    W8A16(dynamic=True),
    W8A8(),
    W8A8(output=True),
    W4A16(group=32),
    W4A16(),
    W4A16(symmetric=False),
    W4A16(rank=8),
    Fp8(),
    Nf4(),
    Nvfp4(),
]


def name_of(scheme: Any) -> str:
    return "-".join(str(value) for value in scheme.model_dump().values())


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (64, W4A16()),
        (320, W4A16()),
        (96, W4A16(group=32)),
        (32, W4A16(group=32)),
        (48, W8A16()),
        (4, W8A16()),
    ],
)
def test_groups_that_do_not_divide_fall_to_32_and_then_to_8_bits(
    inputs: int, found: object
) -> None:
    assert W4A16().fitted((8, inputs)) == found
    assert W4A16().fitted((8, inputs, 3, 3)) == found


def test_what_fits_stays_and_a_rank_is_at_most_full() -> None:
    assert W4A16(group=16).fitted((8, 48)) == W4A16(group=16)
    assert W4A16(rank=32).fitted((8, 64)) == W4A16(rank=8)
    assert Nf4().fitted((8, 7, 3, 3)) == W8A16()
    assert Nf4().fitted((8, 64)) == Nf4()
    assert W8A16(dynamic=True).fitted((8, 64)) == W8A16(dynamic=True)
    assert W8A16(dynamic=True).fitted((8, 64, 3, 3)) == W8A16()
    assert Nvfp4().fitted((8, 40)) == W8A16()
    assert KEEP.fitted((3, 5)) == KEEP


@pytest.mark.parametrize("scheme", [KEEP, *ALL], ids=name_of)
def test_a_scheme_comes_back_from_its_json(scheme: Scheme) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Scheme)
    assert adapter.validate_json(adapter.dump_json(scheme)) == scheme


def test_every_level_but_none_has_fewer_than_16_bits() -> None:
    assert {name for name, scheme in LEVELS.items() if isinstance(scheme, Keep)} == {"none"}
    assert all(scheme.bits < 16 for name, scheme in LEVELS.items() if name != "none")


@pytest.mark.parametrize("shape", [(24, 128), (24, 64, 3, 3)], ids=str)
@pytest.mark.parametrize("scheme", ALL, ids=name_of)
def test_a_weight_is_stored_in_the_bytes_that_the_scheme_predicts(
    scheme: Any, shape: tuple[int, ...]
) -> None:
    """As the eager engine stores it in fp32; scales that fit in 16 bits are stored so."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 24) if len(shape) == 2 else nn.Conv2d(64, 24, 3)
    root = nn.ModuleDict({"layer": layer})
    x = torch.randn(4, 128) if len(shape) == 2 else torch.randn(2, 64, 6, 6)
    with torch.no_grad(), observing(root, ["layer"], ["layer"]) as found:
        layer(x)
    assert set(found) == {"layer", output_of("layer")}
    rounded = quantized_layer("layer", layer, scheme.fitted(shape), found)
    state = eager_state(nn.ModuleDict({"layer": rounded}))[1]
    ends = {"activation_scale", "activation_zero_point", "output_scale", "bias"}
    stored = 0
    for name, tensor in state.items():
        part = name.removeprefix("layer.")
        if part in ends:
            continue
        if part == "zero":  # a byte each in the eager engine, 4 bits in the others
            stored += -(-tensor.numel() // 2)
            continue
        thin = part in ("down", "up")
        stored += tensor.numel() * (2 if thin else tensor.element_size())
    if isinstance(scheme, Fp8):
        scales = state["layer.scale"]
        stored += scales.numel() * (2 - scales.element_size())
    assert stored == scheme.stored_bytes(shape, 2)
