"""Training runs through every stage and resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from benchmarks.reference_model import train as training
from benchmarks.reference_model.optimising import Average, Run, Settings, optimise


def test_smoke_training_writes_a_pipeline_that_loads_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--smoke", "--device", "cpu", "--work", str(tmp_path / "work")]
    arguments += ["--out", str(tmp_path / "out" / "model")]
    training.main(arguments)
    first = capsys.readouterr().out
    assert "diffusion: step 2/2" in first
    assert "| mean |" in first
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "model")
    assert pipeline.unet.dtype == torch.float32
    assert pipeline.safety_checker is None
    assert (tmp_path / "out" / "samples.png").exists()
    training.main(arguments)
    assert "step 2/2" not in capsys.readouterr().out


def _regression(tmp_path: Path, steps: int) -> tuple[torch.nn.Linear, Average]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    inputs = torch.randn(64, 3)
    wanted = inputs.sum(dim=1, keepdim=True)
    settings = Settings(steps=steps, batch=64, peak_rate=0.05, warmup=1, checkpoint_every=20)
    run = Run(tmp_path)
    average = optimise(
        run, "line", model, settings, lambda _: (model(inputs) - wanted).square().mean()
    )
    return model, average


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    first, _ = _regression(tmp_path, 200)
    again, _ = _regression(tmp_path, 200)
    assert torch.allclose(first.weight, torch.ones(1, 3), atol=0.1)
    assert torch.equal(first.weight, again.weight)


def test_swapping_the_average_twice_restores_the_weights(tmp_path: Path) -> None:
    model, average = _regression(tmp_path, 20)
    averaged = model.weight.clone()
    average.swap()
    assert not torch.equal(averaged, model.weight)
    average.swap()
    assert torch.equal(averaged, model.weight)
