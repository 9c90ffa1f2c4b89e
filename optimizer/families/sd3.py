"""Stable Diffusion 3 and 3.5: two CLIP text encoders and a T5, a transformer, a VAE."""

from __future__ import annotations

from optimizer.families.base import ComponentSpec, Family, FewStep, Ranges
from optimizer.families.outlines import (
    Outline,
    clip_outline,
    convolution,
    linear,
    plain,
    t5_outline,
    total,
    vae_outlines,
)
from optimizer.families.parts import (
    VAE,
    WAVES,
    Config,
    Configs,
    clip_signature,
    floats,
    guided_batch,
    sides,
    t5_signature,
    vae_factor,
    vae_signatures,
)
from optimizer.families.sd3_checkpoint import owns_checkpoint
from runners.signature import Dim, Signature

__all__ = ["SD3"]

_T5_TOKENS = (1, 256, 512)
"""diffusers' StableDiffusion3Pipeline: max_sequence_length, at most 512."""

_CLIP_TOKENS = 77

_FEW_STEP = {"turbo": FewStep(4, 0.0)}
"""The card of stabilityai/stable-diffusion-3.5-large-turbo; its scheduler is the others'."""


def few_step(configs: Configs, kind: str | None) -> FewStep | None:  # noqa: ARG001
    """How the turbo is drawn with; no config tells it from the others."""
    return None if kind is None else _FEW_STEP[kind]


def native_size(configs: Configs) -> int:
    """The transformer's sample_size in pixels."""
    return int(configs["transformer"]["sample_size"]) * vae_factor(configs)


def size_step(configs: Configs) -> int:
    """Latents are cut into patches."""
    return vae_factor(configs) * int(configs["transformer"]["patch_size"])


def signatures(configs: Configs, ranges: Ranges) -> dict[str, Signature]:
    """The signatures of all components.

    `hidden_states`: [batch, channels, height/f, width/f]; `encoder_hidden_states`: [batch, tokens,
    width], a CLIP's tokens and then T5's (zeros without one); `pooled_projections`: [batch,
    projections].
    """
    transformer, step = configs["transformer"], size_step(configs)
    channels = int(transformer["in_channels"])
    clip = int(configs["text_encoder"]["max_position_embeddings"])
    low, best, high = _T5_TOKENS
    tokens = Dim(name="tokens", min=clip + low, opt=clip + best, max=clip + high)
    t5 = Dim(name="tokens", min=low, opt=best, max=high)
    third = configs.get("text_encoder_3")
    return {
        "text_encoder": clip_signature(configs["text_encoder"], ranges, hidden_first=True),
        "text_encoder_2": clip_signature(configs["text_encoder_2"], ranges, hidden_first=True),
        **({} if third is None else {"text_encoder_3": t5_signature(third, ranges, t5)}),
        "transformer": Signature(
            inputs=(
                floats("hidden_states", "batch", channels, "height", "width"),
                floats(
                    "encoder_hidden_states",
                    "batch",
                    "tokens",
                    int(transformer["joint_attention_dim"]),
                ),
                floats("pooled_projections", "batch", int(transformer["pooled_projection_dim"])),
                floats("time_features", "batch", WAVES),
            ),
            outputs=(floats("out", "batch", int(transformer["out_channels"]), "height", "width"),),
            dims=(guided_batch(ranges), *sides(ranges, step, vae_factor(configs)), tokens),
        ),
        **vae_signatures(configs, ranges, step),
    }


_LIVE = 10
"""Live numbers of a token within the feed-forward, in widths: input, norm's, twice 4."""


def outlines(configs: Configs) -> dict[str, Outline]:
    """What the components weigh and hold."""
    found = {
        "text_encoder": clip_outline(configs["text_encoder"]),
        "text_encoder_2": clip_outline(configs["text_encoder_2"]),
        "transformer": _transformer(configs["transformer"], vae_factor(configs)),
        **vae_outlines(configs["vae"]),
    }
    if "text_encoder_3" in configs:
        found["text_encoder_3"] = t5_outline(configs["text_encoder_3"])
    return found


def _transformer(config: Config, factor: int) -> Outline:
    head, patch = int(config["attention_head_dim"]), int(config["patch_size"])
    width, layers = int(config["num_attention_heads"]) * head, int(config["num_layers"])
    dual = len(config.get("dual_attention_layers") or ())
    norms = head if config.get("qk_norm") else 0
    feed = linear(width, 4 * width) + linear(4 * width, width)
    block = linear(width, 6 * width) * 2 + linear(width, width) * 8 + feed * 2 + plain(4 * norms)
    # the last block's text goes nowhere: no output, no feed-forward, a shorter norm
    last = linear(width, 6 * width) + linear(width, 2 * width) + linear(width, width) * 7 + feed
    second = linear(width, width) * 4 + plain(2 * norms + 3 * (width * width + width))
    embedding = linear(width, width) * 2 + linear(WAVES, width)
    counted = total(
        [
            block * (layers - 1) + last + plain(4 * norms) + second * dual,
            embedding + linear(int(config["pooled_projection_dim"]), width),
            convolution(int(config["in_channels"]), width, patch),
            plain(int(config["pos_embed_max_size"]) ** 2 * width),
            linear(int(config["joint_attention_dim"]), int(config["caption_projection_dim"])),
            linear(width, 2 * width) + linear(width, patch**2 * int(config["out_channels"])),
        ]
    )
    live = _LIVE * width
    return Outline(counted, {"pixels": live / (patch * factor) ** 2, "tokens": live})


SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    pipeline_classes=("StableDiffusion3Pipeline",),
    embeddings=(
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    components=(
        ComponentSpec("text_encoder", "text_encoder", "text_encoder", "clip_hidden"),
        ComponentSpec("text_encoder_2", "text_encoder", "text_encoder_2", "clip_hidden"),
        ComponentSpec("text_encoder_3", "text_encoder", "text_encoder_3", "t5_text", optional=True),
        ComponentSpec(
            "transformer",
            "denoiser",
            "transformer",
            "sd3_transformer",
            fragile=(
                "pos_embed.proj",
                "proj_out",
                "norm_out.linear",
                "context_embedder",
                "time_text_embed.*",
                "*.norm1.linear",
                "*.norm1_context.linear",
            ),
        ),
        *VAE,
    ),
    signatures=signatures,
    native_size=native_size,
    size_step=size_step,
    owns_checkpoint=owns_checkpoint,
    few_step=few_step,
    outlines=outlines,
    text_tokens=_CLIP_TOKENS + _T5_TOKENS[1],
    few_step_kinds=tuple(_FEW_STEP),
)
