"""Train the classifier that measures adherence, on drawn pictures made worse in many ways."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from benchmarks.reference_model.autoencoder import as_input, decode, encode
from benchmarks.reference_model.captions import Scene
from benchmarks.reference_model.optimising import Run, Settings, optimise
from benchmarks.reference_model.reader import SceneReader, answers_of, reading_loss

_LATENT_NOISE = 0.12


def train_reader(
    run: Run,
    vae: AutoencoderKL,
    scenes: list[Scene],
    pictures: NDArray[np.uint8],
    rebuilt_count: int,
    settings: Settings,
) -> SceneReader:
    """Train on drawn pictures [n, 64, 64, 3] and on the VAE's copies of `rebuilt_count` of them."""
    torch.manual_seed(13)
    model = SceneReader().to(run.device)
    answers = answers_of(scenes)
    rebuilt = cache(lambda: _rebuilt(vae, pictures[:rebuilt_count], run))
    half = settings.batch // 2

    def loss_at(step: int) -> Tensor:
        model.train()
        rng = np.random.default_rng([41, step, run.rank])
        drawn, copied = (
            rng.integers(len(pictures), size=half),
            rng.integers(rebuilt_count, size=half),
        )
        batch = np.concatenate([pictures[drawn], rebuilt()[copied]])
        wanted = answers[torch.from_numpy(np.concatenate([drawn, copied]))].to(run.device)
        inputs = worsen(as_input(batch, run.device), rng)
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            cells, background = model(inputs)
        return reading_loss(cells.float(), background.float(), wanted)

    optimise(run, "adherence", model, settings, loss_at)
    return model.eval()


def _rebuilt(vae: AutoencoderKL, pictures: NDArray[np.uint8], run: Run) -> NDArray[np.uint8]:
    """Return the VAE's copies, decoded from slightly wrong latents."""
    latents = encode(vae, pictures, run.device)
    generator = torch.Generator().manual_seed(14)
    noise = torch.randn(latents.shape, generator=generator)
    return decode(vae, latents + noise * _LATENT_NOISE / vae.config.scaling_factor, run.device)


def worsen(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur, shift, retint and add noise: [n, 3, 64, 64] in -1..1, each by its own amount."""
    count, device = len(pictures), pictures.device

    def amounts(low: float, high: float, *shape: int) -> Tensor:
        values = rng.uniform(low, high, (count, *shape)).astype(np.float32)
        return torch.from_numpy(values).to(device)

    blurred = functional.avg_pool2d(functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mixed = torch.lerp(pictures, blurred, amounts(-0.3, 1.0, 1, 1, 1).clamp(min=0))
    shift = [int(s) for s in rng.integers(-1, 2, size=2)]
    moved = functional.pad(mixed, (1, 1, 1, 1), mode="replicate")
    moved = moved[:, :, 1 + shift[0] : 65 + shift[0], 1 + shift[1] : 65 + shift[1]]
    tinted = moved * amounts(0.92, 1.06, 1, 1, 1) + amounts(-0.05, 0.05, 3, 1, 1)
    noise = torch.from_numpy(rng.standard_normal(tinted.shape, np.float32)).to(device)
    return (tinted + noise * amounts(-0.04, 0.08, 1, 1, 1).clamp(min=0)).clamp(-1, 1)
