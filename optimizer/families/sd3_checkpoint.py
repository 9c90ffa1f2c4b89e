"""Single-file Stable Diffusion 3 and 3.5 checkpoints (medium, large) -> diffusers folder.

What differs between them is read from the weights' shapes. Files without text encoders,
as Stability published most, are refused: three encoders can't be made up.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.families.base_checkpoint import (
    Config,
    Part,
    Shapes,
    assets,
    shapes_of,
    write_folder,
)
from optimizer.families.ldm_checkpoint import DENOISER, VAE, bare_shapes, count_blocks, side
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
    """A transformer whose blocks join text and picture."""
    shapes = bare_shapes(keys, _NAMES)
    patches = shapes.get("x_embedder.proj.weight", ())
    return "joint_blocks.0.context_block.attn.qkv.weight" in shapes and len(patches) == 4


def convert(checkpoint: Path, folder: Path) -> None:
    """Write the diffusers folder of a checkpoint that holds all parts, or all but T5, without which
    pipelines give the transformer zeros in the place of T5's tokens.

    Raises `SpecError` where a part or weights are missing, unknown or of another shape,
    `UnsupportedError` for a transformer that doesn't take 16 channels.
    """
    shapes = shapes_of(checkpoint)
    transformer = _transformer_config(bare_shapes(shapes, _NAMES))
    channels = transformer["in_channels"]
    if channels != 16:
        raise UnsupportedError(
            f"{checkpoint} has a transformer of {channels} input channels: give a text-to-image "
            "version of it, whose transformer has 16"
        )
    has_t5 = any(map(_T5.owns, shapes))
    changes: dict[str, Config] = {"transformer/config.json": transformer}
    if not has_t5:
        changes["model_index.json"] = dict.fromkeys(_OF_T5, (None, None))
    write_folder(
        checkpoint,
        folder,
        title="Stable Diffusion 3",
        configs=assets("sd3"),
        parts=(*_PARTS, _T5) if has_t5 else _PARTS,
        changes=changes,
        without=() if has_t5 else _OF_T5,
    )
    for tokenizer in ("tokenizer", "tokenizer_2"):
        write_clip_vocabulary(folder / tokenizer)
    if has_t5:
        write_t5_tokenizer(folder / "tokenizer_3")


def _transformer_config(shapes: Shapes) -> Config:
    """What the shapes tell of the transformer.

    A head is 64 wide unless the norms of queries and keys, which 3.5 has, say otherwise.
    """
    width = side(shapes, "x_embedder.proj.weight", 0)
    head = side(shapes, "joint_blocks.0.x_block.attn.ln_q.weight", 0)
    dual = [re.match(r"joint_blocks\.(\d+)\.x_block\.attn2\.", name) for name in shapes]
    told = {
        "attention_head_dim": head,
        "caption_projection_dim": width,
        "dual_attention_layers": sorted({int(match[1]) for match in dual if match}),
        "in_channels": side(shapes, "x_embedder.proj.weight", 1),
        "joint_attention_dim": side(shapes, "context_embedder.weight", 1),
        "num_attention_heads": width and width // (head or 64),
        "num_layers": count_blocks(shapes, "joint_blocks"),
        "patch_size": side(shapes, "x_embedder.proj.weight", 2),
        "pooled_projection_dim": side(shapes, "y_embedder.mlp.0.weight", 1),
        "pos_embed_max_size": math.isqrt(side(shapes, "pos_embed", 1) or 0) or None,
        "qk_norm": "rms_norm" if head else None,
    }
    return {name: value for name, value in told.items() if value is not None}


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
    Part("transformer", "transformer", (DENOISER, *_NAMES), _transformer_weights),
    VAE,
)
_T5 = t5("text_encoder_3", "text_encoders.t5xxl.transformer.")
_OF_T5 = ("text_encoder_3", "tokenizer_3")
