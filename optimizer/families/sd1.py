"""Stable Diffusion 1.x and 2.x: a CLIP text encoder, a UNet with cross-attention, a VAE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optimizer.families.base import ComponentSpec, Family, Ranges
from runners.signature import Dim, Signature, TensorSpec

__all__ = ["SD1"]

Configs = Mapping[str, Mapping[str, Any]]

_PIPELINE_STEP = 8
"""diffusers' StableDiffusionPipeline.check_inputs refuses sides that 8 doesn't divide."""


def vae_factor(configs: Configs) -> int:
    """Pixels per latent: each level of the VAE but the last halves the side."""
    return int(2 ** (len(configs["vae"]["block_out_channels"]) - 1))


def native_size(configs: Configs) -> int:
    """The UNet's sample_size in pixels."""
    return int(configs["unet"]["sample_size"]) * vae_factor(configs)


def size_step(configs: Configs) -> int:
    """Sides must suit both the VAE and diffusers' own check."""
    return math.lcm(vae_factor(configs), _PIPELINE_STEP)


def signatures(configs: Configs, ranges: Ranges) -> dict[str, Signature]:
    """The signatures of all components.

    `sample`, `latent`: [batch, channels, height/f, width/f]; `image`: [batch, 3, height, width];
    `timestep`: [batch]; `encoder_hidden_states`: [batch, tokens, width]. The denoiser's batch is
    doubled, because classifier-free guidance runs both halves at once.
    """
    return {
        "text_encoder": _text_encoder(configs["text_encoder"], ranges),
        "unet": _unet(configs, ranges),
        "vae_decoder": _vae_decoder(configs, ranges),
        "vae_encoder": _vae_encoder(configs, ranges),
    }


def _text_encoder(config: Mapping[str, Any], ranges: Ranges) -> Signature:
    tokens, width = int(config["max_position_embeddings"]), int(config["hidden_size"])
    states = int(config["num_hidden_layers"]) + 1
    return Signature(
        inputs=(TensorSpec(name="input_ids", dtype="int64", axes=("batch", tokens)),),
        outputs=(
            _float("last_hidden_state", "batch", tokens, width),
            _float("pooler_output", "batch", width),
            _float("hidden_states", "batch", states, tokens, width),
        ),
        dims=(_batch(ranges),),
    )


def _unet(configs: Configs, ranges: Ranges) -> Signature:
    unet, tokens = configs["unet"], int(configs["text_encoder"]["max_position_embeddings"])
    guided = Dim(name="batch", min=1, opt=2, max=2 * ranges.batch_max)
    return Signature(
        inputs=(
            _float("sample", "batch", int(unet["in_channels"]), "height", "width"),
            _float("timestep", "batch"),
            _float("encoder_hidden_states", "batch", tokens, int(unet["cross_attention_dim"])),
        ),
        outputs=(_float("out_sample", "batch", int(unet["out_channels"]), "height", "width"),),
        dims=(guided, *_sides(configs, ranges, vae_factor(configs))),
    )


def _vae_decoder(configs: Configs, ranges: Ranges) -> Signature:
    vae = configs["vae"]
    channels, latents = int(vae["out_channels"]), int(vae["latent_channels"])
    return Signature(
        inputs=(_float("latent", "batch", latents, "height", "width"),),
        outputs=(_float("image", "batch", channels, "out_height", "out_width"),),
        dims=(_batch(ranges), *_sides(configs, ranges, vae_factor(configs))),
    )


def _vae_encoder(configs: Configs, ranges: Ranges) -> Signature:
    vae = configs["vae"]
    channels, latents = int(vae["in_channels"]), int(vae["latent_channels"])
    return Signature(
        inputs=(_float("image", "batch", channels, "height", "width"),),
        outputs=(_float("moments", "batch", 2 * latents, "out_height", "out_width"),),
        dims=(_batch(ranges), *_sides(configs, ranges, 1)),
    )


def _batch(ranges: Ranges) -> Dim:
    return Dim(name="batch", min=1, opt=1, max=ranges.batch_max)


def _sides(configs: Configs, ranges: Ranges, unit: int) -> tuple[Dim, Dim]:
    """Height and width in units of so many pixels."""
    low, opt, high = (n // unit for n in (ranges.size_min, ranges.size_opt, ranges.size_max))
    step = size_step(configs) // unit
    return (
        Dim(name="height", min=low, opt=opt, max=high, multiple_of=step),
        Dim(name="width", min=low, opt=opt, max=high, multiple_of=step),
    )


def _float(name: str, *axes: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", axes=axes)


def owns_checkpoint(keys: Mapping[str, tuple[int, ...]]) -> bool:
    """A latent-diffusion UNet whose cross-attention is 768 (1.x) or 1024 (2.x) wide."""
    probe = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    return probe in keys and keys[probe][1] in (768, 1024)


SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1.x and 2.x",
    pipeline_classes=("StableDiffusionPipeline",),
    components=(
        ComponentSpec("text_encoder", "text_encoder", "text_encoder", ("",)),
        ComponentSpec(
            "unet",
            "denoiser",
            "unet",
            ("",),
            fragile=(
                "conv_in",
                "conv_out",
                "time_embedding.*",
                "*.time_emb_proj",
                "*.conv_shortcut",
                "up_blocks.[23].*.ff.net.2",
            ),
            factors=("*.attn1.to_q", "*.attn1.to_k"),
        ),
        ComponentSpec("vae_decoder", "vae_decoder", "vae", ("decoder.", "post_quant_conv.")),
        ComponentSpec("vae_encoder", "vae_encoder", "vae", ("encoder.", "quant_conv.")),
    ),
    signatures=signatures,
    native_size=native_size,
    size_step=size_step,
    owns_checkpoint=owns_checkpoint,
)
