"""Train the VAE: 64x64 RGB pictures <-> 16x16 latents of 4 channels."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.reference_model.optimising import Run, Settings, optimise

_KL_WEIGHT = 2e-6
_FIRST_LOGVAR = -4.0
_LATENT_NOISE = 0.06


def build_autoencoder() -> AutoencoderKL:
    """Return the untrained VAE: 4x downsampling, 4 latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )


def as_input(pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    """[n, 64, 64, 3] uint8 -> [n, 3, 64, 64] float32 in -1..1."""
    return (
        torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float().contiguous()
        / 127.5
        - 1
    )


def train_autoencoder(run: Run, pictures: NDArray[np.uint8], settings: Settings) -> AutoencoderKL:
    """Train on drawn pictures [n, 64, 64, 3] and set `scaling_factor` to unit latents."""
    torch.manual_seed(11)
    vae = build_autoencoder()
    nn.init.constant_(vae.quant_conv.bias[4:].data, _FIRST_LOGVAR)
    vae.to(run.device)

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([21, step, run.rank])
        chosen = rng.integers(len(pictures), size=settings.batch)
        target = as_input(pictures[chosen], run.device)
        noise = torch.from_numpy(rng.standard_normal((settings.batch, 4, 16, 16), np.float32))
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            picture, mean, logvar = _reconstruct(vae, target, noise.to(run.device))
        return _loss(picture.float(), target, mean.float(), logvar.float())

    optimise(run, "vae", vae, settings, loss_at)
    vae.eval()
    sample = encode(vae, pictures[:: max(1, len(pictures) // 512)], run.device)
    vae.register_to_config(scaling_factor=round(float(1 / sample.std()), 5))
    return vae


def train_decoder(
    run: Run, vae: AutoencoderKL, pictures: NDArray[np.uint8], settings: Settings
) -> None:
    """Train the decoder alone, which leaves all latents as they are, on slightly wrong latents."""
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder])
    noise_scale = _LATENT_NOISE / vae.config.scaling_factor

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([61, step, run.rank])
        chosen = pictures[rng.integers(len(pictures), size=settings.batch)]
        target, latent = as_input(chosen, run.device), encode(vae, chosen, run.device)
        noise = torch.from_numpy(rng.standard_normal(latent.shape, np.float32))
        noisy = (latent + noise * noise_scale).to(run.device)
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            picture = vae.decoder(vae.post_quant_conv(noisy))
        return _picture_loss(picture.float() - target)

    optimise(run, "decoder", decoder, settings, loss_at)


def _reconstruct(
    vae: AutoencoderKL, target: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    mean, logvar = vae.quant_conv(vae.encoder(target)).chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    latent = mean + torch.exp(0.5 * logvar) * noise
    return vae.decoder(vae.post_quant_conv(latent)), mean, logvar


def _loss(picture: Tensor, target: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """The pictures' loss and a tiny KL."""
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
    return _picture_loss(picture - target) + _KL_WEIGHT * kl


def _picture_loss(wrong: Tensor) -> Tensor:
    """L1 + 2 MSE, the L1 of the edges, the L1 at half and quarter size."""
    loss = wrong.abs().mean() + 2 * wrong.square().mean()
    loss = loss + wrong.diff(dim=2).abs().mean() + wrong.diff(dim=3).abs().mean()
    for size in (2, 4):
        loss = loss + functional.avg_pool2d(wrong, size).abs().mean()
    return loss


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Return unscaled mean latents [n, 4, 16, 16] float32 on the CPU."""
    parts = []
    for start in range(0, len(pictures), 128):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            posterior = vae.encode(as_input(pictures[start : start + 128], device)).latent_dist
        parts.append(posterior.mean.float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, device: torch.device) -> NDArray[np.uint8]:
    """Return pictures [n, 64, 64, 3] uint8 of unscaled latents [n, 4, 16, 16]."""
    parts = []
    for start in range(0, len(latents), 128):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            picture = vae.decode(latents[start : start + 128].to(device)).sample
        parts.append(((picture.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
    return torch.cat(parts).permute(0, 2, 3, 1).numpy()


def psnr_by_background(
    vae: AutoencoderKL, pictures: NDArray[np.uint8], kinds: list[str], device: torch.device
) -> dict[str, float]:
    """PSNR in dB of the reconstruction, for each kind of background."""
    again = decode(vae, encode(vae, pictures, device), device).astype(np.float32)
    error = np.square(again - pictures.astype(np.float32)).mean(axis=(1, 2, 3))
    names = np.asarray(kinds)
    return {
        kind: float(10 * np.log10(255**2 / error[names == kind].mean()))
        for kind in sorted(set(kinds))
    }
