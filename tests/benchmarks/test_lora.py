"""What the LoRA benchmark says of noise is what its engine's outputs differ by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import runners
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


def test_a_quantized_bundles_noise_is_measured_with_and_without(
    bundle: MakeBundle, tiny_model: Path, tmp_path: Path
) -> None:
    made = bundle("eager", "int8", lora=True)
    entry = runners.load(made).kiln.manifest.component("denoiser")
    from diffusers import DiffusionPipeline

    reference = DiffusionPipeline.from_pretrained(tiny_model)
    lora = peft_lora(reference, tmp_path / "lora.safetensors", scale=0.1)
    measure_noise(made, tiny_model, lora, tmp_path / "noise.json", steps=2)
    found = json.loads((tmp_path / "noise.json").read_text("utf-8"))
    assert found["sqnr_db"]["without"] == pytest.approx(entry.sqnr_db, abs=4)
    assert found["sqnr_db"]["with"] == pytest.approx(found["sqnr_db"]["without"], abs=4)
    assert found["latents_changed_by"] > 0.01
