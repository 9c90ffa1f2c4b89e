"""Single-file Stable Diffusion 3 and 3.5 checkpoints (medium, large) -> diffusers folder.

What differs between them is read from the weights' shapes. Files without text encoders, as Stability
published most, are refused: three encoders can't be made up.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.families.base_checkpoint import (
    Config,
    Part,
    Shapes,
    assets,
    shapes_of,
    write_folder,
)
from optimizer.families.ldm_checkpoint import DENOISER, VAE, bare_shapes, count_blocks
from optimizer.families.text_checkpoint import clip, t5, write_clip_vocabulary, write_t5_tokenizer
from profiles.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[str, Tensor]

__all__ = ["convert", "owns_checkpoint"]

_NAMES = (
    "joint_blocks.",
    "context_embedder.",
    "final_layer.",
    "pos_embed",
    "t_embedder.",
    "x_embedder.",
    "y_embedder.",
)
"""Beginnings of the transformer's names, with or without the prefix."""


def owns_checkpoint(keys: Shapes) -> bool:
    """A transformer whose blocks join text and picture, with a patch embedding that has no mask."""
    shapes = bare_shapes(keys, _NAMES)
    return {"joint_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.weight"} <= set(shapes)


def convert(checkpoint: Path, folder: Path) -> None:
    """Write the diffusers folder of a checkpoint that holds all parts.

    Raises `SpecError` where a part or weights are missing, unknown or of another shape,
    `UnsupportedError` for a transformer that doesn't take 16 channels.
    """
    transformer = _transformer_config(bare_shapes(shapes_of(checkpoint), _NAMES))
    if transformer["in_channels"] != 16:
        raise UnsupportedError(
            f"{checkpoint} has a transformer of {transformer['in_channels']} input channels: give "
            "a text-to-image version of it, whose transformer has 16"
        )
    write_folder(
        checkpoint,
        folder,
        title="Stable Diffusion 3",
        configs=assets("sd3"),
        parts=_PARTS,
        changes={"transformer/config.json": transformer},
    )
    for tokenizer in ("tokenizer", "tokenizer_2"):
        write_clip_vocabulary(folder / tokenizer)
    write_t5_tokenizer(folder / "tokenizer_3")


def _transformer_config(shapes: Shapes) -> Config:
    """What the shapes tell of the transformer; where one is missing, `write_folder` says so.

    A head is 64 wide unless the norms of queries and keys (3.5) say otherwise.
    """
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    config: Config = {
        "caption_projection_dim": width,
        "in_channels": channels,
        "num_layers": count_blocks(shapes, "joint_blocks"),
        "patch_size": patch,
    }
    head = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    if head:
        config |= {"attention_head_dim": head[0], "qk_norm": "rms_norm"}
    config["num_attention_heads"] = width // config.get("attention_head_dim", 64)
    dual = {re.match(r"joint_blocks\.(\d+)\.x_block\.attn2\.", name) for name in shapes}
    config["dual_attention_layers"] = sorted({int(match[1]) for match in dual if match})
    if position := shapes.get("pos_embed"):
        config["pos_embed_max_size"] = math.isqrt(position[1])
    if context := shapes.get("context_embedder.weight"):
        config["joint_attention_dim"] = context[1]
    if pooled := shapes.get("y_embedder.mlp.0.weight"):
        config["pooled_projection_dim"] = pooled[1]
    return config


def _transformer_weights(weights: Weights, config: Config) -> Weights:  # noqa: ARG001
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    renamed: Weights = convert_sd3_transformer_checkpoint_to_diffusers(weights)
    return renamed


_PARTS = (
    clip(
        "text_encoder",
        "CLIP-L text encoder",
        "text_encoders.clip_l.transformer.",
        projection="identity",
    ),
    clip(
        "text_encoder_2",
        "OpenCLIP bigG text encoder",
        "text_encoders.clip_g.transformer.",
        projection="file",
    ),
    t5("text_encoder_3", "text_encoders.t5xxl.transformer."),
    Part("transformer", "transformer", (DENOISER, *_NAMES), _transformer_weights),
    VAE,
)
