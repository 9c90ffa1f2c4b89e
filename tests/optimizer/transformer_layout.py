"""Diffusers weights of SD3's and FLUX.1's transformers -> the names of their single files.

Written from the layout of Stability's and Black Forest Labs' modules, independently of converters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["flux_keys", "sd3_keys"]

_SD3_ENDS = {
    "context_embedder": "context_embedder",
    "pos_embed.proj": "x_embedder.proj",
    "proj_out": "final_layer.linear",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
}
_SD3_BLOCK = {
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}
_SD3_JOINED = {
    "attn.to_q": ("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    "attn.add_q_proj": (
        "context_block.attn.qkv",
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
    "attn2.to_q": ("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
}


def sd3_keys(weights: Mapping[str, Tensor], *, layers: int, prefix: str) -> dict[str, Tensor]:
    """`layers` is num_layers: the last block's modulation of the text is a final one."""
    keys: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        module, _, leaf = name.rpartition(".")
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
        if name == "pos_embed.pos_embed":
            keys["pos_embed"] = tensor
        elif module == "norm_out.linear":
            keys[f"final_layer.adaLN_modulation.1.{leaf}"] = _swapped(tensor)
        elif match is None:
            keys[f"{_SD3_ENDS[module]}.{leaf}"] = tensor
        elif match[2] in _SD3_JOINED:
            target, parts = _SD3_JOINED[match[2]]
            block = f"joint_blocks.{match[1]}.{target}.{leaf}"
            keys[block] = _joined(weights, match[1], parts, leaf)
        elif match[2] in _SD3_BLOCK:
            is_final = int(match[1]) == layers - 1 and match[2] == "norm1_context.linear"
            key = f"joint_blocks.{match[1]}.{_SD3_BLOCK[match[2]]}.{leaf}"
            keys[key] = _swapped(tensor) if is_final else tensor
    return {prefix + name: tensor for name, tensor in keys.items()}


def _swapped(tensor: Tensor) -> Tensor:
    """Scale and shift -> shift and scale."""
    import torch

    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def _joined(
    weights: Mapping[str, Tensor],
    block: str,
    parts: tuple[str, ...],
    leaf: str,
    stem: str = "transformer_blocks",
) -> Tensor:
    import torch

    return torch.cat([weights[f"{stem}.{block}.{part}.{leaf}"] for part in parts])


_FLUX_ENDS = {
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "x_embedder": "img_in",
}
_FLUX_BLOCK = {
    "transformer_blocks": {
        "attn.to_add_out": "txt_attn.proj",
        "attn.to_out.0": "img_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
    },
    "single_transformer_blocks": {"norm.linear": "modulation.lin", "proj_out": "linear2"},
}
_FLUX_NORMS = {
    "transformer_blocks": {
        "attn.norm_added_k": "txt_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_q": "img_attn.norm.query_norm",
    },
    "single_transformer_blocks": {
        "attn.norm_k": "norm.key_norm",
        "attn.norm_q": "norm.query_norm",
    },
}
_FLUX_JOINED = {
    "transformer_blocks": {
        "attn.to_q": ("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
        "attn.add_q_proj": (
            "txt_attn.qkv",
            ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        ),
    },
    "single_transformer_blocks": {
        "attn.to_q": ("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    },
}
_FLUX_STEMS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}


def flux_keys(weights: Mapping[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
    """The norms' weights are called scale."""
    keys: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        module, _, leaf = name.rpartition(".")
        match = re.fullmatch(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)", module)
        if module == "norm_out.linear":
            keys[f"final_layer.adaLN_modulation.1.{leaf}"] = _swapped(tensor)
            continue
        if match is None:
            keys[f"{_FLUX_ENDS[module]}.{leaf}"] = tensor
            continue
        stem, number, inside = match.groups()
        block = f"{_FLUX_STEMS[stem]}.{number}"
        if inside in _FLUX_JOINED[stem]:
            target, parts = _FLUX_JOINED[stem][inside]
            keys[f"{block}.{target}.{leaf}"] = _joined(weights, number, parts, leaf, stem)
        elif inside in _FLUX_NORMS[stem]:
            keys[f"{block}.{_FLUX_NORMS[stem][inside]}.scale"] = tensor
        elif inside in _FLUX_BLOCK[stem]:
            keys[f"{block}.{_FLUX_BLOCK[stem][inside]}.{leaf}"] = tensor
    return {prefix + name: tensor for name, tensor in keys.items()}
