"""The noise that the LoRA benchmark tells is what an engine's outputs differ by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from benchmarks.lora import _Noise, measure_noise
from tests.conftest import MakeBundle
from tests.lora_files import peft_lora


class Doubling(nn.Module):
    def forward(self, x: Tensor, _t: Tensor, *, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        return (2 * x + encoder_hidden_states,)


def test_noise_is_counted_by_calls_and_starts_anew() -> None:
    off = 0.1

    def engine(x: Tensor, _t: Tensor, text: Tensor) -> tuple[Tensor]:
        return (2 * x + text + off,)

    module = Doubling()
    module.register_forward_hook(noise := _Noise(engine), with_kwargs=True)
    for off in (0.1, 0.001):
        for side in (3, 5):
            module(torch.zeros(side), torch.tensor(1), encoder_hidden_states=torch.ones(side))
        assert noise.taken_db() == pytest.approx(-20 * torch.tensor(off).log10().item(), abs=0.01)


def test_an_engine_of_fp32_has_next_to_no_noise_with_a_lora_and_without(
    bundle: MakeBundle, tiny_model: Path, tmp_path: Path
) -> None:
    reference = DiffusionPipeline.from_pretrained(tiny_model)
    lora = peft_lora(reference, tmp_path / "lora.safetensors", scale=0.1)
    made = bundle("onnxruntime", lora=True)
    measure_noise(made, tiny_model, lora, tmp_path / "noise.json", steps=2)
    found = json.loads((tmp_path / "noise.json").read_text("utf-8"))
    assert min(found["sqnr_db"].values()) > 80
    assert found["latents_changed_by"] > 0.01
