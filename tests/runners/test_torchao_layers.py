"""Layers on torchao's tensors. It lies beside the environment, where `make test` puts it: processes
of these tests alone find it, since diffusers imports all of it where it can.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimizer.quantize.apply import quantized_layer
from optimizer.quantize.schemes import TorchaoInt8
from profiles.errors import MissingError
from runners.engines.eager import _layer, eager_state
from runners.quantized import QuantizedLayer

Kiln = Callable[..., Any]
BESIDE = Path(sys.prefix) / "torchao"
COMPARED = """
import torch
from torch.nn import functional as F
from tests.runners.test_torchao_layers import layers
from runners.torchao_layers import TorchaoInt8Layer

for bias in (True, False):
    rounded, made = layers(bias=bias)
    found = made()
    assert isinstance(found, TorchaoInt8Layer) and found.dynamic
    with torch.inference_mode():
        for shape in ((2, 5, 128), (7, 128), (50, 128)):
            x = 10 * torch.randn(shape)
            exact = F.linear(x, rounded.dequantized, rounded.bias)
            lost, wanted = ((one(x) - exact).norm() for one in (found, rounded))
            assert 0.8 < lost / wanted < 1.25, "its steps are 255ths of the whole range, not 254ths"
            assert lost / exact.norm() < 0.02
        y = found.to(torch.bfloat16)(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() / exact.norm() < 0.02
"""


def layers(*, bias: bool) -> tuple[QuantizedLayer, Callable[[], nn.Module]]:
    """The oracle's layer, and what makes the eager engine's of the same codes."""
    torch.manual_seed(0)
    rounded = quantized_layer("layer", nn.Linear(128, 24, bias=bias), TorchaoInt8(), {})
    table, state = eager_state(nn.ModuleDict({"layer": rounded}))
    rounded.scale = state["layer.scale"].float()  # which is stored in 16 bits
    return rounded, lambda: _layer("layer", table["layer"], state)


@pytest.mark.skipif(not BESIDE.is_dir(), reason="`make test` puts torchao beside the environment")
def test_it_loses_what_the_oracle_loses() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(BESIDE), str(Path.cwd())))}
    command = [sys.executable, "-c", COMPARED]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_without_torchao_the_command_that_installs_it_is_named() -> None:
    _, made = layers(bias=True)
    with pytest.raises(MissingError, match=r'pip install "kiln-diffusion\[torchao\]"'):
        made()


def test_compile_names_it_before_any_work(kiln: Kiln, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("--backend", "eager", "--text-quant", "torchao-int8-dyn", "-o", out)
    ended = kiln("compile", tiny_model, *asked)
    assert ended.code == 17
    assert "needs torchao, which isn't installed: run pip install" in ended.sentence
    assert not out.exists()
