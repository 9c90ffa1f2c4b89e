"""T5 in eager torch at the levels of `--text-quant`: its code looks at its layers' weights."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save
from torch import nn
from transformers import T5Config, T5EncoderModel

from optimizer.quantize.apply import planned_layers, quantized_layers
from optimizer.quantize.policy import LEVELS, Policy, Rule
from runners.engines.eager import eager_module, eager_state
from runners.quantized import QuantizedLayer, insert_quantized

SIZES = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 99}


def dequantized(module: nn.Module) -> nn.Module:
    """The same module with floats, rounded ones, in the place of codes."""
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, QuantizedLayer):
            weight = layer.dequantized
            found[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            found[name].weight = nn.Parameter(weight)
    insert_quantized(module, found)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["int8w", "int8-dyn", "llm-int8", "int4", "nf4"])
@torch.no_grad()
def test_a_t5_of_low_bits_is_the_float_one_with_rounded_weights(
    level: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    module = T5EncoderModel(T5Config(**SIZES, feed_forward_proj="gated-gelu")).eval()
    policy = Policy(rules=(Rule(pattern="*", scheme=LEVELS[level]),), solver="hqq")
    schemes = planned_layers(module, policy)
    assert len(schemes) == 2 * 7
    insert_quantized(module, quantized_layers(module, schemes, {}, "hqq"))
    layers, state = eager_state(module)
    config = {**module.config.to_dict(), "_class_name": "T5EncoderModel"}
    engine = eager_module(config, layers, save(state)).to(dtype)
    tokens = torch.randint(0, 99, (2, 11))
    expected = dequantized(copy.deepcopy(module))(tokens).last_hidden_state
    found = engine(tokens).last_hidden_state
    assert found.dtype == dtype
    error = float((found.float() - expected).norm() / expected.norm())
    inputs = level.endswith(("-dyn", "int8"))  # are rounded to 127ths; scales are stored in 16 bits
    rounds = 0.02 if inputs else 1e-3
    assert error < (rounds if dtype == torch.float32 else 0.05)
