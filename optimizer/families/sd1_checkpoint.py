"""Single-file Stable Diffusion 1.x and 2.x checkpoints (latent-diffusion keys) -> diffusers folder.

The configs are in assets/, so that no network is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimizer.families.base_checkpoint import Part, Shapes, assets, read, shapes_of, write_folder
from optimizer.families.ldm_checkpoint import DENOISER, UNET, VAE, unet_channels
from optimizer.families.text_checkpoint import clip, open_clip, write_clip_vocabulary
from profiles.errors import UnsupportedError
from runners.console import Console

__all__ = ["convert"]

_TURBO_TEXT = "conditioner.embedders.0.model."
"""SD Turbo's text encoder is named as Stable Diffusion XL's."""


_V_PROBE = DENOISER + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_LIMIT = 0.09
"""Keys don't tell a 2.x model that predicts velocity (768 pixels) from one that predicts noise (512
pixels). Its last attention's norm does in practice: ComfyUI's limit for the standard deviation
(comfy/supported_models.py, class SD20), which it applies to UNets of 4 channels only."""


def convert(checkpoint: Path, folder: Path) -> None:
    """Write the diffusers folder of a checkpoint with the configs of its version.

    A UNet of 9 input channels is an inpainting model. Raises `SpecError` where weights are missing,
    unknown or of another shape, `UnsupportedError` for UNets of other channels.
    """
    shapes = shapes_of(checkpoint)
    channels = unet_channels(shapes)
    if channels not in (4, 9):
        raise UnsupportedError(
            f"{checkpoint} has a UNet of {channels} input channels (8: instruct-pix2pix, 5: depth, "
            "7: upscaler): give a text-to-image version of it, whose UNet has 4, or an inpainting "
            "one, whose UNet has 9"
        )
    version = _version(shapes)
    changes: dict[str, dict[str, Any]] = {}
    if channels == 9:
        changes = {
            "model_index.json": {"_class_name": "StableDiffusionInpaintPipeline"},
            "unet/config.json": {"in_channels": 9},
        }
    elif version == "sd2" and _predicts_velocity(checkpoint):
        Console().info(
            f"{checkpoint}: its weights tell that it predicts velocity and draws 768 pixels; where "
            "that is wrong, --prediction-type epsilon"
        )
        changes = {
            "scheduler/scheduler_config.json": {"prediction_type": "v_prediction"},
            "unet/config.json": {"sample_size": 96},
            "vae/config.json": {"sample_size": 768},
        }
    write_folder(
        checkpoint,
        folder,
        title=f"Stable Diffusion {version[2]}.x",
        configs=assets(version),
        parts=(_text_encoder(shapes, version), UNET, VAE),
        changes=changes,
    )
    write_clip_vocabulary(folder / "tokenizer")


def _text_encoder(shapes: Shapes, version: str) -> Part:
    if version == "sd1":
        return clip("text_encoder", "CLIP text encoder", "cond_stage_model.transformer.")
    is_turbo = any(name.startswith(_TURBO_TEXT) for name in shapes)
    prefix = _TURBO_TEXT if is_turbo else "cond_stage_model.model."
    return open_clip("text_encoder", "OpenCLIP text encoder", prefix, layers=23)


def _version(shapes: Shapes) -> str:
    """1.x attends to 768 numbers a token, 2.x to 1024."""
    probe = DENOISER + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    return "sd1" if shapes[probe][1] == 768 else "sd2"


def _predicts_velocity(checkpoint: Path) -> bool:
    probe = read(checkpoint, _V_PROBE).get(_V_PROBE)
    return probe is not None and float(probe.float().std(unbiased=False)) > _V_LIMIT
