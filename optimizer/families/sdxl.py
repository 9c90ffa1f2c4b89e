"""Stable Diffusion XL: two CLIP text encoders, a UNet that also takes sizes, a VAE.

The refiner has the second text encoder alone, and its UNet takes an aesthetic score. Turbo,
Lightning and LCM checkpoints are the same network; their schedulers make the difference.
"""

from __future__ import annotations

from optimizer.families.base import ComponentSpec, Family, Ranges
from optimizer.families.few_step import FEW_STEP, unet_few_step
from optimizer.families.outlines import Outline, clip_outline, vae_outlines
from optimizer.families.parts import (
    VAE,
    Configs,
    clip_signature,
    floats,
    guided_batch,
    sides,
    text_tokens,
    vae_factor,
    vae_signatures,
)
from optimizer.families.sd1 import (
    UNET_FACTORS,
    UNET_FRAGILE,
    guidance_input,
    native_size,
    size_step,
)
from optimizer.families.sdxl_checkpoint import owns_checkpoint
from optimizer.families.unet_outline import unet_outline
from runners.signature import Signature

__all__ = ["SDXL"]


def signatures(configs: Configs, ranges: Ranges) -> dict[str, Signature]:
    """The signatures of all components.

    `sample`: [batch, channels, height/f, width/f]; `time_features`: [batch, width],
    sines and cosines; `encoder_hidden_states`: [batch, tokens,
    width]; `text_embeds`: [batch, projection]; `size_features`: [batch, width], of the sizes and,
    of a refiner, the score.
    """
    second, unet = configs["text_encoder_2"], configs["unet"]
    step, width = size_step(configs), int(unet["cross_attention_dim"])
    projection = int(second["projection_dim"])
    sizes = int(unet["projection_class_embeddings_input_dim"]) - projection
    return {
        **{
            name: clip_signature(configs[name], ranges, hidden_first=True)
            for name in ("text_encoder", "text_encoder_2")
            if name in configs
        },
        "unet": Signature(
            inputs=(
                floats("sample", "batch", int(unet["in_channels"]), "height", "width"),
                floats("time_features", "batch", int(unet["block_out_channels"][0])),
                *guidance_input(unet),
                floats("encoder_hidden_states", "batch", "tokens", width),
                floats("text_embeds", "batch", projection),
                floats("size_features", "batch", sizes),
            ),
            outputs=(floats("out_sample", "batch", int(unet["out_channels"]), "height", "width"),),
            dims=(
                guided_batch(ranges),
                *sides(ranges, step, vae_factor(configs)),
                text_tokens(second),
            ),
        ),
        **vae_signatures(configs, ranges, step),
    }


def outlines(configs: Configs) -> dict[str, Outline]:
    """What the components weigh and hold; a refiner has no first text encoder."""
    return {
        **{
            name: clip_outline(configs[name])
            for name in ("text_encoder", "text_encoder_2")
            if name in configs
        },
        "unet": unet_outline(configs["unet"], vae_factor(configs)),
        **vae_outlines(configs["vae"]),
    }


SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    pipeline_classes=(
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    ),
    embeddings=(
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    components=(
        ComponentSpec("text_encoder", "text_encoder", "text_encoder", "clip_hidden", optional=True),
        ComponentSpec("text_encoder_2", "text_encoder", "text_encoder_2", "clip_hidden"),
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
