"""Train the denoiser in the VAE's latent space, with a text encoder that stays as it is."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTextModel

from benchmarks.reference_model.optimising import Run, Settings, optimise
from benchmarks.reference_model.understanding import WIDTH

_UNCAPTIONED = 0.1
_SNR_CAP = 5.0
_LAYOUT_FROM = 700
_EARLY_SHARE = 0.35
"""The last 300 of 1000 times get 65 % of the batch: only there, below an SNR of 0.06, does the
layout come from the caption; later on it shows in the noisy latent itself."""


def build_unet() -> UNet2DConditionModel:
    """Return the untrained denoiser: 16x16x4 latents, every channel count a multiple of 64."""
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 4, 4),
        time_embedding_dim=128,
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    """Return the scheduler: v-prediction, zero terminal SNR, trailing steps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


class Conditioned(nn.Module):
    """The denoiser and its frozen text encoder as one module to train."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        """Join the two, which stay usable alone."""
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder.requires_grad_(False)

    def forward(self, latent: Tensor, time: Tensor, ids: Tensor) -> Tensor:
        """Predict v: latent [n, 4, 16, 16], time [n], ids [n, 32] -> [n, 4, 16, 16]."""
        with torch.no_grad():
            words = self.text_encoder(input_ids=ids).last_hidden_state
        predicted: Tensor = self.unet(latent, time, encoder_hidden_states=words).sample
        return predicted


def train_diffusion(
    run: Run,
    text_encoder: CLIPTextModel,
    latents: NDArray[np.float16],
    ids: Tensor,
    empty: Tensor,
    settings: Settings,
) -> Conditioned:
    """Train on scaled latents [n, 4, 16, 16] and token ids [n, phrasings, 32].

    `empty` [32] is the empty caption, which replaces one caption in ten.
    """
    torch.manual_seed(12)
    model = Conditioned(build_unet(), text_encoder).to(run.device)
    model.unet.set_attn_processor(_training_attention(run.device))
    kept = build_scheduler().alphas_cumprod.to(run.device)

    def loss_at(step: int) -> Tensor:
        latent, noise, time, words = _batch(
            (step, run.rank), latents, ids, empty, settings.batch, run.device
        )
        signal, spread = _levels(kept[time])
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            predicted = model(signal * latent + spread * noise, time, words)
        wrong = (predicted.float() - (signal * noise - spread * latent)).square()
        loss: Tensor = (wrong.mean(dim=(1, 2, 3)) * _weight(kept[time])).mean()
        return loss

    optimise(run, "diffusion", model, settings, loss_at)
    return model.eval()


def _training_attention(device: torch.device) -> AttnProcessor | AttnProcessor2_0:
    """On the CPU, attention by plain products: the fused kernel's backward pass is slower."""
    return AttnProcessor() if device.type == "cpu" else AttnProcessor2_0()


def _batch(
    turn: tuple[int, int],
    latents: NDArray[np.float16],
    ids: Tensor,
    empty: Tensor,
    size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents, noise, times (stratified) and token ids of a step and a process."""
    rng = np.random.default_rng([31, *turn])
    chosen = rng.integers(len(latents), size=size)
    words = ids[torch.from_numpy(chosen), torch.from_numpy(rng.integers(ids.shape[1], size=size))]
    words[torch.from_numpy(rng.random(size) < _UNCAPTIONED)] = empty
    spread = (np.arange(size) + rng.random(size)) / size
    time = np.interp(spread, (0, _EARLY_SHARE, 1), (0, _LAYOUT_FROM, 1000)).astype(np.int64)
    parts = (
        torch.from_numpy(latents[chosen].astype(np.float32)),
        torch.from_numpy(rng.standard_normal((size, *latents.shape[1:]), np.float32)),
        torch.from_numpy(time),
        words,
    )
    latent, noise, times, tokens = (part.to(device) for part in parts)
    return latent, noise, times, tokens


def _levels(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Amplitudes of signal and noise, each [n, 1, 1, 1]."""
    kept = kept[:, None, None, None]
    return kept.sqrt(), (1 - kept).sqrt()


def _weight(kept: Tensor) -> Tensor:
    """Weight of the v loss: 1 up to an SNR of 5, then falling.

    It is min-SNR-5 (arXiv 2303.09556, section 3.4) plus one, so that the pure noise of a zero
    terminal SNR, where min-SNR is zero, is trained too.
    """
    ratio = kept / (1 - kept)
    return (ratio.clamp(max=_SNR_CAP) + 1) / (ratio + 1)
