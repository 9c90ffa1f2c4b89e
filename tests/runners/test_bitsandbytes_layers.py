"""Layers on bitsandbytes' kernels: the oracle's numbers, from codes of 4 or 8 bits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizer.quantize.apply import quantized_layer
from optimizer.quantize.schemes import W8A16, LlmInt8, Nf4
from profiles.errors import MissingError
from runners.bitsandbytes_layers import LlmInt8Layer, Nf4Layer
from runners.engines.eager import _layer, eager_state

Kiln = Callable[..., Any]
LAYERS = {
    "linear": (nn.Linear(128, 24), (2, 5, 128)),
    "one row": (nn.Linear(128, 24, bias=False), (1, 128)),
    "convolution": (nn.Conv2d(64, 24, 3, stride=2, padding=1), (2, 64, 9, 7)),
}


def both(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The oracle's layer, what the eager engine makes of it, and an input."""
    layer, shape = LAYERS[name]
    rounded = quantized_layer("layer", layer, Nf4(), {})
    layers, state = eager_state(nn.ModuleDict({"layer": rounded}))
    return rounded, _layer("layer", layers["layer"], state), torch.randn(shape)


@pytest.mark.parametrize("name", LAYERS)
def test_it_gives_what_the_oracle_gives(name: str) -> None:
    rounded, found, x = both(name)
    assert isinstance(found, Nf4Layer)
    torch.testing.assert_close(found(x), rounded(x), rtol=1e-5, atol=1e-5)


def test_a_large_linear_is_dequantized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runners.bitsandbytes_layers.rows_at_once", lambda width: 1280 // width)
    rounded, found, x = both("linear")
    assert isinstance(found, Nf4Layer)
    assert [len(codes) for codes, _ in found._parts] == [640, 640, 256]
    torch.testing.assert_close(found(x), rounded(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_peaks_stay_in_fp32_where_the_engine_computes_in_bf16(name: str) -> None:
    rounded, found, x = both(name)
    wanted = rounded(x)
    error = found.to(torch.bfloat16)(x.bfloat16()).float() - wanted
    assert float(error.square().sum() / wanted.square().sum()) < 1e-4  # bf16: 2^-9 an operand


def test_codes_stay_in_4_bits_in_memory() -> None:
    _, found, _ = both("convolution")
    stored = sum(t.numel() * t.element_size() for t in found.buffers())
    assert stored == 24 * 64 * 9 / 2


def int8_layers(*, bias: bool = True) -> tuple[nn.Linear, nn.Module, nn.Module]:
    """A float layer, the oracle's, and what the eager engine makes of it."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 24, bias=bias)
    rounded = quantized_layer("layer", layer, LlmInt8(), {})
    layers, state = eager_state(nn.ModuleDict({"layer": rounded}))
    rounded.scale = state["layer.scale"].float()  # which is stored in 16 bits
    return layer, rounded, _layer("layer", layers["layer"], state)


def with_outliers(*shape: int) -> Tensor:
    """Inputs as trained transformers have them: a few columns are a hundred times the others."""
    x = torch.randn(shape)
    x[..., (5, 77)] *= 100
    return x


@pytest.mark.parametrize("shape", [(2, 5, 128), (7, 128), (1, 128)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_llm_int8_gives_what_the_oracle_gives(shape: tuple[int, ...], bias: bool) -> None:
    _, rounded, found = int8_layers(bias=bias)
    assert isinstance(found, LlmInt8Layer)
    silent = with_outliers(*shape)
    silent[..., 0, :] = 0
    for x in (torch.randn(shape), with_outliers(*shape), silent):
        torch.testing.assert_close(found(x), rounded(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_llm_int8_keeps_what_outliers_would_take_from_the_others() -> None:
    layer, _, found = int8_layers()
    plain = quantized_layer("layer", layer, W8A16(dynamic=True), {})
    x = with_outliers(50, 128)
    exact, lost = layer(x), {}
    for name, one in (("outliers in floats", found), ("all rounded", plain)):
        lost[name] = float((one(x) - exact).square().sum())
    assert lost["outliers in floats"] < lost["all rounded"] / 4
    bf16 = found.to(torch.bfloat16)(x.bfloat16()).float()
    assert float((bf16 - exact).norm() / exact.norm()) < 0.02


def test_llm_int8_rounds_no_inputs_of_convolutions() -> None:
    assert LlmInt8().fitted((24, 64, 3, 3)) == W8A16()
    assert LlmInt8().fitted((24, 64)) == LlmInt8()


def test_without_bitsandbytes_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingError, match=r'pip install "kiln-diffusion\[bitsandbytes\]"'):
        both("linear")


def test_compile_names_it_before_any_work(
    kiln: Kiln, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimizer import tools

    monkeypatch.setattr(tools, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    out = tmp_path / "out"
    ended = kiln("compile", tiny_model, "--backend", "eager", "--quant", "nf4", "-o", out)
    assert ended.code == 17
    assert "needs bitsandbytes, which isn't installed: run pip install \"kiln-diffusion[bits" in (
        ended.sentence
    )
