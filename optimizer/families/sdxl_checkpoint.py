"""Single-file Stable Diffusion XL checkpoints (base, refiner, inpainting) -> diffusers folder.

Turbo, Lightning and what the community trained have the base's keys. The configs are in assets/.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from optimizer.families.base_checkpoint import Part, Shapes, assets, shapes_of, write_folder
from optimizer.families.ldm_checkpoint import DENOISER, UNET, VAE, side, unet_channels
from optimizer.families.text_checkpoint import clip, open_clip, write_clip_vocabulary
from profiles.errors import UnsupportedError

__all__ = ["convert", "owns_checkpoint"]

_REFINER_TEXT = "conditioner.embedders.0.model."
_PARTS: dict[str, tuple[Part, ...]] = {
    "sdxl": (
        clip("text_encoder", "CLIP-L text encoder", "conditioner.embedders.0.transformer."),
        open_clip("text_encoder_2", "OpenCLIP bigG text encoder", "conditioner.embedders.1.model."),
        UNET,
        VAE,
    ),
    "sdxl_refiner": (
        open_clip("text_encoder_2", "OpenCLIP bigG text encoder", _REFINER_TEXT),
        UNET,
        VAE,
    ),
}
_VECTORS = {"sdxl": 2816, "sdxl_refiner": 2560}
"""Numbers that size, crop and pooled text add up to: 1280 + 6 or 5 times 256."""


def owns_checkpoint(keys: Shapes) -> bool:
    """A latent-diffusion UNet that is told size and crop beside the text."""
    return side(keys, DENOISER + "label_emb.0.0.weight", 1) in _VECTORS.values()


def convert(checkpoint: Path, folder: Path) -> None:
    """Write the diffusers folder of a checkpoint with the configs of its kind.

    A UNet of 9 input channels is an inpainting model; the keys `v_pred` and `ztsnr` say that it
    predicts velocity, and from pure noise on. Raises `SpecError` where weights are missing, unknown
    or of another shape, `UnsupportedError` for UNets of other channels and EDM's noise schedule.
    """
    shapes = shapes_of(checkpoint)
    edm = [name for name in shapes if name.startswith("edm_")]
    if edm:
        raise UnsupportedError(
            f"{checkpoint} is trained with EDM's noise schedule (it has {edm[0]}, as Playground "
            "v2.5 and CosXL have): give the diffusers folder of the model, or another SDXL model"
        )
    channels = unet_channels(shapes)
    if channels not in (4, 9):
        raise UnsupportedError(
            f"{checkpoint} has a UNet of {channels} input channels (8: instruct-pix2pix): give a "
            "text-to-image version of it, whose UNet has 4, or an inpainting one, whose UNet has 9"
        )
    is_refiner = any(name.startswith(_REFINER_TEXT) for name in shapes)
    kind = "sdxl_refiner" if is_refiner else "sdxl"
    changes: dict[str, dict[str, Any]] = {"scheduler/scheduler_config.json": _schedule(shapes)}
    if channels == 9:
        changes["model_index.json"] = {"_class_name": "StableDiffusionXLInpaintPipeline"}
        changes["unet/config.json"] = {"in_channels": 9}
    write_folder(
        checkpoint,
        folder,
        title="Stable Diffusion XL's refiner" if is_refiner else "Stable Diffusion XL",
        configs=assets(kind),
        parts=_PARTS[kind],
        changes=changes,
    )
    for tokenizer in folder.glob("tokenizer*"):
        write_clip_vocabulary(tokenizer)


def _schedule(names: Collection[str]) -> dict[str, Any]:
    """What the marks of velocity prediction change in the scheduler's config."""
    if "v_pred" not in names:
        return {}
    velocity: dict[str, Any] = {"prediction_type": "v_prediction"}
    if "ztsnr" in names:  # Lin et al. 2023, "Common Diffusion Noise Schedules", section 3
        velocity |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return velocity
