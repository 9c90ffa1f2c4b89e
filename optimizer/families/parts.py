"""What families share: sizes, and the signatures of text encoders and of the VAE's halves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from optimizer.families.base import ComponentSpec, Family, Ranges
from optimizer.vae_config import TINY
from runners.signature import Dim, Signature, TensorSpec

__all__ = [
    "VAE",
    "WAVES",
    "Config",
    "Configs",
    "batch",
    "clip_signature",
    "floats",
    "guided_batch",
    "sides",
    "t5_signature",
    "text_tokens",
    "vae_factor",
    "vae_signatures",
    "with_vae",
]

Config = Mapping[str, Any]
Configs = Mapping[str, Config]

VAE = (
    ComponentSpec(
        "vae_decoder", "vae_decoder", "vae", "vae_decoder", ("decoder.", "post_quant_conv.")
    ),
    ComponentSpec("vae_encoder", "vae_encoder", "vae", "vae_encoder", ("encoder.", "quant_conv.")),
)
"""An autoencoder in halves, wrapped as an AutoencoderKL's are: see `with_vae`."""

_TINY_WRAPPERS = {"vae_encoder": "tiny_vae_encoder"}
"""Where an AutoencoderTiny's halves are called otherwise: its encoder gives latents."""

WAVES = 256
"""Sines and cosines of a timestep, of diffusers' CombinedTimestepTextProjEmbeddings."""

_LONGEST = 3
"""Prompts of so many times a CLIP's tokens fit into a denoiser."""


def floats(name: str, *axes: int | str) -> TensorSpec:
    """A float32 array."""
    return TensorSpec(name=name, dtype="float32", axes=axes)


def batch(ranges: Ranges) -> Dim:
    """Pictures at once."""
    return Dim(name="batch", min=1, opt=1, max=ranges.batch_max)


def guided_batch(ranges: Ranges) -> Dim:
    """Twice as many: classifier-free guidance runs both halves at once."""
    return Dim(name="batch", min=1, opt=2, max=2 * ranges.batch_max)


def text_tokens(text_encoder: Config) -> Dim:
    """Whole chunks of the tokens that a CLIP takes."""
    tokens = int(text_encoder["max_position_embeddings"])
    return Dim(name="tokens", min=tokens, opt=tokens, max=_LONGEST * tokens, multiple_of=tokens)


def vae_factor(configs: Configs) -> int:
    """Pixels per latent: each level of the VAE but the last halves the side.

    An AutoencoderTiny's levels are its decoder's (`optimizer.vae_config.completed`).
    """
    return int(2 ** (len(configs["vae"]["block_out_channels"]) - 1))


def sides(ranges: Ranges, step: int, unit: int) -> tuple[Dim, Dim]:
    """Height and width in units of so many pixels, in steps of so many pixels."""
    low, opt, high = (n // unit for n in (ranges.size_min, ranges.size_opt, ranges.size_max))
    multiple = math.lcm(step, unit) // unit
    return (
        Dim(name="height", min=low, opt=opt, max=high, multiple_of=multiple),
        Dim(name="width", min=low, opt=opt, max=high, multiple_of=multiple),
    )


def clip_signature(config: Config, ranges: Ranges, *, hidden_first: bool = False) -> Signature:
    """Of the wrappers clip_text and, where hidden states come first, clip_hidden."""
    tokens, width = int(config["max_position_embeddings"]), int(config["hidden_size"])
    states = floats("hidden_states", "batch", int(config["num_hidden_layers"]) + 1, tokens, width)
    last = floats("last_hidden_state", "batch", tokens, width)
    pooled = floats("pooler_output", "batch", width)
    if (config.get("architectures") or [""])[0] == "CLIPTextModelWithProjection":
        pooled = floats("text_embeds", "batch", int(config["projection_dim"]))
    return Signature(
        inputs=(TensorSpec(name="input_ids", dtype="int64", axes=("batch", tokens)),),
        outputs=(states, last, pooled) if hidden_first else (last, pooled, states),
        dims=(batch(ranges),),
    )


def t5_signature(config: Config, ranges: Ranges, tokens: Dim) -> Signature:
    """Of the wrapper t5_text: prompts are padded to as many tokens as the caller likes."""
    return Signature(
        inputs=(TensorSpec(name="input_ids", dtype="int64", axes=("batch", "tokens")),),
        outputs=(floats("last_hidden_state", "batch", "tokens", int(config["d_model"])),),
        dims=(batch(ranges), tokens),
    )


def with_vae(known: Family, vae: Config) -> Family:
    """The family with the calling conventions of its VAE's class."""
    if not _is_tiny(vae):
        return known
    components = tuple(
        replace(spec, wrapper=_TINY_WRAPPERS.get(spec.wrapper, spec.wrapper))
        for spec in known.components
    )
    return replace(known, components=components)


def _is_tiny(vae: Config) -> bool:
    return vae.get("_class_name") == TINY


def vae_signatures(configs: Configs, ranges: Ranges, step: int) -> dict[str, Signature]:
    """`latent`: [batch, channels, height/f, width/f]; `image`: [batch, 3, height, width].

    Encoders give `moments`, a mean and a log-variance a channel; that of an AutoencoderTiny
    `latents`.
    """
    vae, factor = configs["vae"], vae_factor(configs)
    latents = int(vae["latent_channels"])
    encoded = ("latents", latents) if _is_tiny(vae) else ("moments", 2 * latents)
    return {
        "vae_decoder": Signature(
            inputs=(floats("latent", "batch", latents, "height", "width"),),
            outputs=(floats("image", "batch", int(vae["out_channels"]), *_OUT),),
            dims=(batch(ranges), *sides(ranges, step, factor)),
        ),
        "vae_encoder": Signature(
            inputs=(floats("image", "batch", int(vae["in_channels"]), "height", "width"),),
            outputs=(floats(encoded[0], "batch", encoded[1], *_OUT),),
            dims=(batch(ranges), *sides(ranges, step, 1)),
        ),
    }


_OUT = ("out_height", "out_width")
