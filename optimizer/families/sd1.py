"""Stable Diffusion 1.x and 2.x: a CLIP text encoder, a UNet with cross-attention, a VAE."""

from __future__ import annotations

import math
from collections.abc import Mapping

from optimizer.families.base import ComponentSpec, Family, Ranges
from optimizer.families.few_step import FEW_STEP, unet_few_step
from optimizer.families.outlines import Outline, clip_outline, vae_outlines
from optimizer.families.parts import (
    VAE,
    Config,
    Configs,
    clip_signature,
    floats,
    guided_batch,
    sides,
    text_tokens,
    vae_factor,
    vae_signatures,
)
from optimizer.families.unet_outline import unet_outline
from runners.signature import Signature, TensorSpec

__all__ = [
    "PIPELINE_STEP",
    "SD1",
    "UNET_FACTORS",
    "UNET_FRAGILE",
    "guidance_input",
    "native_size",
    "size_step",
]

PIPELINE_STEP = 8
"""diffusers' check_inputs refuses sides that 8 doesn't divide."""

UNET_FRAGILE = (
    "conv_in",
    "conv_out",
    "time_embedding.*",
    "add_embedding.*",
    "*.time_emb_proj",
    "*.conv_shortcut",
    "up_blocks.[23].*.ff.net.2",
)
UNET_FACTORS = ("*.attn1.to_q", "*.attn1.to_k")


def native_size(configs: Configs) -> int:
    """The UNet's sample_size in pixels."""
    return int(configs["unet"]["sample_size"]) * vae_factor(configs)


def size_step(configs: Configs) -> int:
    """Sides must suit both the VAE and diffusers' own check."""
    return math.lcm(vae_factor(configs), PIPELINE_STEP)


def guidance_input(unet: Config) -> tuple[TensorSpec, ...]:
    """`timestep_cond` [batch, width], sines and cosines of the guidance scale, where a distilled
    UNet takes it as an input.
    """
    width = unet.get("time_cond_proj_dim")
    return () if width is None else (floats("timestep_cond", "batch", int(width)),)


def signatures(configs: Configs, ranges: Ranges) -> dict[str, Signature]:
    """The signatures of all components.

    `sample`: [batch, channels, height/f, width/f]; `time_features`: [batch, width],
    sines and cosines; `encoder_hidden_states`: [batch, tokens,
    width]; an LCM's `timestep_cond` comes before them.
    """
    text, unet, step = configs["text_encoder"], configs["unet"], size_step(configs)
    return {
        "text_encoder": clip_signature(text, ranges),
        "unet": Signature(
            inputs=(
                floats("sample", "batch", int(unet["in_channels"]), "height", "width"),
                floats("time_features", "batch", int(unet["block_out_channels"][0])),
                *guidance_input(unet),
                floats(
                    "encoder_hidden_states", "batch", "tokens", int(unet["cross_attention_dim"])
                ),
            ),
            outputs=(floats("out_sample", "batch", int(unet["out_channels"]), "height", "width"),),
            dims=(
                guided_batch(ranges),
                *sides(ranges, step, vae_factor(configs)),
                text_tokens(text),
            ),
        ),
        **vae_signatures(configs, ranges, step),
    }


def outlines(configs: Configs) -> dict[str, Outline]:
    """What the components weigh and hold."""
    return {
        "text_encoder": clip_outline(configs["text_encoder"]),
        "unet": unet_outline(configs["unet"], vae_factor(configs)),
        **vae_outlines(configs["vae"]),
    }


def owns_checkpoint(keys: Mapping[str, tuple[int, ...]]) -> bool:
    """A latent-diffusion UNet whose cross-attention is 768 (1.x) or 1024 (2.x) wide."""
    probe = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    return probe in keys and keys[probe][1] in (768, 1024)


SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1.x and 2.x",
    pipeline_classes=(
        "StableDiffusionPipeline",
        "StableDiffusionInpaintPipeline",
        "LatentConsistencyModelPipeline",
    ),
    embeddings=("prompt_embeds", "negative_prompt_embeds"),
    components=(
        ComponentSpec("text_encoder", "text_encoder", "text_encoder", "clip_text"),
        ComponentSpec(
            "unet", "denoiser", "unet", "unet", fragile=UNET_FRAGILE, factors=UNET_FACTORS
        ),
        *VAE,
    ),
    signatures=signatures,
    native_size=native_size,
    size_step=size_step,
    owns_checkpoint=owns_checkpoint,
    few_step=unet_few_step,
    outlines=outlines,
    text_tokens=77,
    few_step_kinds=tuple(FEW_STEP),
)
