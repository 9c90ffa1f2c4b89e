"""Single-file FLUX.1 checkpoints (dev, schnell, fill) that hold all parts -> diffusers folder.

What differs between them is read from the weights' shapes. Most files hold the transformer alone
and are refused: two text encoders and a VAE can't be made up.

The transformer is renamed by a table of our own. diffusers' converter has the width 3072 written
down, so that no small model can be tested with it, and it copies what it splits; here weights stay
mapped until they are written, one at a time.
"""

from __future__ import annotations

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
from optimizer.families.ldm_checkpoint import DENOISER, VAE, bare_shapes, count_blocks, side
from optimizer.families.text_checkpoint import clip, t5, write_clip_vocabulary, write_t5_tokenizer
from profiles.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[str, Tensor]

__all__ = ["convert", "owns_checkpoint"]

_NAMES = (
    "double_blocks.",
    "single_blocks.",
    "final_layer.",
    "guidance_in.",
    "img_in.",
    "time_in.",
    "txt_in.",
    "vector_in.",
)
"""Beginnings of the transformer's names, with or without the prefix."""

_OWN = {
    "double_blocks.0.img_attn.qkv.weight",
    "img_in.weight",
    "single_blocks.0.linear1.weight",
    "vector_in.in_layer.weight",
}
"""Not all together in FLUX.2 and Chroma (no vector_in), HunyuanVideo (no img_attn.qkv) and FLUX.1's
ControlNets (no single_blocks)."""


def owns_checkpoint(keys: Shapes) -> bool:
    """A transformer of double and single blocks that is told a pooled text vector."""
    shapes = bare_shapes(keys, _NAMES)
    return set(shapes) >= _OWN and len(shapes["img_in.weight"]) == 2


def convert(checkpoint: Path, folder: Path) -> None:
    """Write the diffusers folder of a checkpoint that holds all parts.

    Raises `SpecError` where a part or weights are missing, unknown or of another shape,
    `UnsupportedError` for transformers of other inputs (depth, canny).
    """
    shapes = bare_shapes(shapes_of(checkpoint), _NAMES)
    transformer = _transformer_config(shapes)
    channels, out_channels = transformer["in_channels"], transformer.get("out_channels", 64)
    if channels not in (out_channels, 6 * out_channels):
        raise UnsupportedError(
            f"{checkpoint} has a transformer of {channels} input channels (128: FLUX.1 depth and "
            "canny): give FLUX.1 dev or schnell, whose transformer has 64, or fill, whose has 384"
        )
    changes: dict[str, dict[str, Any]] = {"transformer/config.json": transformer}
    if channels != out_channels:
        changes["model_index.json"] = {"_class_name": "FluxFillPipeline"}
    if not transformer["guidance_embeds"]:  # schnell
        changes["scheduler/scheduler_config.json"] = {"shift": 1.0, "use_dynamic_shifting": False}
    write_folder(
        checkpoint,
        folder,
        title="FLUX.1",
        configs=assets("flux"),
        parts=_PARTS,
        changes=changes,
    )
    write_clip_vocabulary(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer_2")


def _transformer_config(shapes: Shapes) -> Config:
    """What the shapes tell of the transformer."""
    width = side(shapes, "img_in.weight", 0)
    head = side(shapes, "double_blocks.0.img_attn.norm.query_norm.scale", 0)
    told = {
        "attention_head_dim": head,
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "in_channels": side(shapes, "img_in.weight", 1),
        "joint_attention_dim": side(shapes, "txt_in.weight", 1),
        "num_attention_heads": width and head and width // head,
        "num_layers": count_blocks(shapes, "double_blocks"),
        "num_single_layers": count_blocks(shapes, "single_blocks"),
        "out_channels": side(shapes, "final_layer.linear.weight", 0),
        "pooled_projection_dim": side(shapes, "vector_in.in_layer.weight", 1),
    }
    return {name: value for name, value in told.items() if value is not None}


_ENDS = {
    "final_layer.linear": "proj_out",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "img_in": "x_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "txt_in": "context_embedder",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
}
_DOUBLE = {
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "txt_mod.lin": "norm1_context.linear",
}
_SINGLE = {
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
    "norm.key_norm": "attn.norm_k",
    "norm.query_norm": "attn.norm_q",
}
_SPLIT = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
"""Rows of one matrix -> several; the MLP gets what the three others leave."""


def _transformer_weights(weights: Weights, config: Config) -> Weights:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    renamed: Weights = {}
    for full in list(weights):
        module, _, leaf = full.removeprefix(DENOISER).rpartition(".")
        leaf = "weight" if leaf == "scale" else leaf
        targets = _targets(module)
        if targets:
            pieces = _pieces(weights.pop(full), module, width, len(targets))
            renamed |= {f"{name}.{leaf}": p for name, p in zip(targets, pieces, strict=True)}
    return renamed


def _targets(module: str) -> tuple[str, ...]:
    """The names of diffusers' modules that a module's tensor goes to; none where it is unknown."""
    if module == "final_layer.adaLN_modulation.1":
        return ("norm_out.linear",)
    if module in _ENDS:
        return (_ENDS[module],)
    match = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", module)
    if match is None:
        return ()
    block, inside = "" if match[1] == "double" else "single_", match[3]
    table = _SINGLE if block else _DOUBLE
    names = _SPLIT.get(inside) or ((table[inside],) if inside in table else ())
    return tuple(f"{block}transformer_blocks.{match[2]}.{name}" for name in names)


def _pieces(tensor: Tensor, module: str, width: int, count: int) -> list[Tensor]:
    """The tensor's rows for each of `count` targets, without a copy.

    The last modulation is shift before scale here and scale before shift in diffusers.
    """
    if module.startswith("final_layer.adaLN"):
        import torch

        shift, scale = tensor.chunk(2)
        return [torch.cat([scale, shift])]
    starts = [width * i for i in range(count)]
    ends = [*starts[1:], len(tensor)]
    return [tensor[start:end] for start, end in zip(starts, ends, strict=True)]


_PARTS = (
    clip("text_encoder", "CLIP-L text encoder", "text_encoders.clip_l.transformer."),
    t5("text_encoder_2", "text_encoders.t5xxl.transformer."),
    Part("transformer", "transformer", (DENOISER, *_NAMES), _transformer_weights),
    VAE,
)
