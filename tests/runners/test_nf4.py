"""NF4 layers run on bitsandbytes' kernels: the oracle's numbers, from codes of 4 bits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizer.quantize.apply import quantized_layer
from optimizer.quantize.schemes import Nf4
from profiles.errors import MissingError
from runners.engines.eager import _layer, eager_state
from runners.nf4 import Nf4Layer

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
    monkeypatch.setattr("runners.nf4.DEQUANTIZED_AT_ONCE", 10 * 128)
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


def test_without_bitsandbytes_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingError, match=r'pip install "kiln-diffusion\[nf4\]"'):
        both("linear")


def test_compile_names_it_before_any_work(
    kiln: Kiln, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimizer import tools

    monkeypatch.setattr(tools, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    out = tmp_path / "out"
    ended = kiln("compile", tiny_model, "--backend", "eager", "--quant", "nf4", "-o", out)
    assert ended.code == 17
    assert "needs bitsandbytes, which isn't installed: run pip install \"kiln-diffusion[comp" in (
        ended.sentence
    )
