"""FLUX.1: a CLIP text encoder and a T5, a transformer on patches of latents, a VAE."""

from __future__ import annotations

from optimizer.families.base import ComponentSpec, Family, FewStep, Ranges
from optimizer.families.flux_checkpoint import owns_checkpoint
from optimizer.families.outlines import (
    Counted,
    Outline,
    clip_outline,
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
    batch,
    clip_signature,
    floats,
    t5_signature,
    vae_factor,
    vae_signatures,
)
from runners.signature import Dim, Signature

__all__ = ["FLUX"]

_PATCH = 2
"""Latents a side of a patch, in diffusers' FluxPipeline."""

_NATIVE = 128
"""Latents a side that FluxPipeline draws by default; the transformer's config has no size."""

_TOKENS = Dim(name="tokens", min=1, opt=512, max=512)
"""Of the T5: FluxPipeline's max_sequence_length, at most 512."""

_SCHNELL = FewStep(4, 0.0)
"""The card of black-forest-labs/FLUX.1-schnell: 1 to 4 steps, no guidance."""


def few_step(configs: Configs, kind: str | None) -> FewStep | None:  # noqa: ARG001
    """How schnell is drawn with: it is the one whose transformer takes no guidance."""
    return None if configs["transformer"]["guidance_embeds"] else _SCHNELL


def native_size(configs: Configs) -> int:
    """The pipeline's default, in pixels."""
    return _NATIVE * vae_factor(configs)


def size_step(configs: Configs) -> int:
    """Latents are cut into patches."""
    return _PATCH * vae_factor(configs)


def signatures(configs: Configs, ranges: Ranges) -> dict[str, Signature]:
    """The signatures of all components.

    `hidden_states`: [batch, sequence, channels], a patch of latents each; `img_rope`: [sequence,
    2 * width], cosines and sines of where it is; `txt_rope`: [tokens, 2 * width];
    `guidance_features`: [batch, width], of distilled models.
    """
    transformer, step = configs["transformer"], size_step(configs)
    channels, rope = int(transformer["in_channels"]), 2 * sum(transformer["axes_dims_rope"])
    low, best, high = (
        (n // step) ** 2 for n in (ranges.size_min, ranges.size_opt, ranges.size_max)
    )
    guidance = (
        (floats("guidance_features", "batch", WAVES),) if transformer["guidance_embeds"] else ()
    )
    return {
        "text_encoder": clip_signature(configs["text_encoder"], ranges, hidden_first=True),
        "text_encoder_2": t5_signature(configs["text_encoder_2"], ranges, _TOKENS),
        "transformer": Signature(
            inputs=(
                floats("hidden_states", "batch", "sequence", channels),
                floats(
                    "encoder_hidden_states",
                    "batch",
                    "tokens",
                    int(transformer["joint_attention_dim"]),
                ),
                floats("pooled_projections", "batch", int(transformer["pooled_projection_dim"])),
                floats("time_features", "batch", WAVES),
                floats("img_rope", "sequence", rope),
                floats("txt_rope", "tokens", rope),
                *guidance,
            ),
            outputs=(
                floats("out", "batch", "sequence", int(transformer["out_channels"] or channels)),
            ),
            dims=(batch(ranges), Dim(name="sequence", min=low, opt=best, max=high), _TOKENS),
        ),
        **vae_signatures(configs, ranges, step),
    }


_LIVE = 14
"""Live numbers of a token within a single block, in widths: input and norm's, queries, keys and
values, the feed-forward's twice 4, and its 4 beside attention's output."""


def outlines(configs: Configs) -> dict[str, Outline]:
    """What the components weigh and hold."""
    return {
        "text_encoder": clip_outline(configs["text_encoder"]),
        "text_encoder_2": t5_outline(configs["text_encoder_2"]),
        "transformer": _transformer(configs["transformer"], size_step(configs)),
        **vae_outlines(configs["vae"]),
    }


def _transformer(config: Config, step: int) -> Outline:
    head, channels = int(config["attention_head_dim"]), int(config["in_channels"])
    width = int(config["num_attention_heads"]) * head
    feed = linear(width, 4 * width) + linear(4 * width, width)
    double = linear(width, 6 * width) * 2 + linear(width, width) * 8 + feed * 2 + plain(4 * head)
    single = total(
        [
            linear(width, 3 * width) * 2,  # the norm's, and queries, keys and values
            linear(width, 4 * width),
            linear(5 * width, width),
            plain(2 * head),
        ]
    )
    single = Counted(single.parameters, single.in_layers, single.layers + 2)
    waves = (linear(WAVES, width) + linear(width, width)) * (2 if config["guidance_embeds"] else 1)
    counted = total(
        [
            double * int(config["num_layers"]) + single * int(config["num_single_layers"]),
            waves + linear(int(config["pooled_projection_dim"]), width) + linear(width, width),
            linear(int(config["joint_attention_dim"]), width) + linear(channels, width),
            linear(width, 2 * width) + linear(width, int(config["out_channels"] or channels)),
        ]
    )
    live = _LIVE * width
    return Outline(counted, {"pixels": live / step**2, "tokens": live})


FLUX = Family(
    name="flux",
    title="FLUX.1",
    pipeline_classes=("FluxPipeline", "FluxFillPipeline"),
    embeddings=("prompt_embeds", "pooled_prompt_embeds", None),
    components=(
        ComponentSpec("text_encoder", "text_encoder", "text_encoder", "clip_hidden"),
        ComponentSpec("text_encoder_2", "text_encoder", "text_encoder_2", "t5_text"),
        ComponentSpec(
            "transformer",
            "denoiser",
            "transformer",
            "flux_transformer",
            fragile=(
                "x_embedder",
                "context_embedder",
                "proj_out",
                "norm_out.linear",
                "time_text_embed.*",
                "*.norm.linear",
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
    text_tokens=_TOKENS.opt,
)
