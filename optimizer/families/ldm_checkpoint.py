"""Names that CompVis' latent-diffusion gave and later families kept: denoisers, UNets, VAEs.

UNets and VAEs are renamed by diffusers' own converters.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from optimizer.families.base_checkpoint import Config, Part, Shapes

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[str, Tensor]

__all__ = ["DENOISER", "UNET", "VAE", "bare_shapes", "count_blocks", "side", "unet_channels"]

DENOISER = "model.diffusion_model."
"""What a denoiser's names begin with."""


def bare_shapes(shapes: Shapes, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of a transformer whose own names begin with `names`, with or without DENOISER."""
    bare = {name.removeprefix(DENOISER): shape for name, shape in shapes.items()}
    return {name: shape for name, shape in bare.items() if name.startswith(names)}


def count_blocks(shapes: Shapes, stem: str) -> int:
    """How many blocks `stem`.0, `stem`.1, ... there are, gaps counted too."""
    matches = (re.match(rf"{stem}\.(\d+)\.", name) for name in shapes)
    return 1 + max(int(match[1]) for match in matches if match)


def side(shapes: Shapes, name: str, axis: int) -> int | None:
    """A tensor's length along an axis; None where it is missing, which `write_folder` says."""
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) else None


def unet_channels(shapes: Shapes) -> int:
    """A UNet's input channels: 4 latents, and 5 more for inpainting (masked latents and mask)."""
    return side(shapes, DENOISER + "input_blocks.0.0.weight", 1) or 4


def _unet_weights(weights: Weights, config: Config) -> Weights:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    for stem in ("input_blocks", "middle_block", "output_blocks"):
        _fill_gaps(weights, DENOISER + stem)
    return _there(convert_ldm_unet_checkpoint(weights, config))


def _fill_gaps(weights: Weights, stem: str) -> None:
    """Let a block that is missing as a whole be counted: diffusers (0.42) counts those there."""
    import torch

    matches = [re.match(rf"{re.escape(stem)}\.(\d+)\.", name) for name in weights]
    there = {int(match[1]) for match in matches if match}
    for gap in set(range(max(there, default=0))) - there:
        weights[f"{stem}.{gap}.gap"] = torch.empty(0)


def _vae_weights(weights: Weights, config: Config) -> Weights:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    return _there(convert_ldm_vae_checkpoint(weights, config))


def _there(weights: dict[str, Tensor | None]) -> Weights:
    """Without the names that a converter has from one tensor of a pair and lacks in the file."""
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


UNET = Part("unet", "UNet", (DENOISER,), _unet_weights)
VAE = Part(
    "vae",
    "VAE",
    ("first_stage_model.", "vae."),
    _vae_weights,
    leftovers=("first_stage_model.loss.*", "first_stage_model.model_ema.*"),
)
