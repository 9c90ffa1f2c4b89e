"""Diffusers weights -> the keys of a single-file checkpoint (CompVis' latent-diffusion layout).

Written from the layout of CompVis' modules, independently of diffusers' converters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DENOISER", "clip_keys", "open_clip_keys", "unet_keys", "vae_keys"]

DENOISER = "model.diffusion_model."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def unet_keys(
    weights: Mapping[str, Tensor], *, layers: int, up_types: list[str]
) -> dict[str, Tensor]:
    """`layers` is the UNet's layers_per_block, `up_types` its up_block_types."""
    return {
        DENOISER + _unet_key(name, layers, up_types): tensor for name, tensor in weights.items()
    }


def _unet_key(name: str, layers: int, up_types: list[str]) -> str:
    module, _, leaf = name.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        part, j, rest = match.groups()
        number = 1 if part == "attentions" else 2 * int(j)
        return f"middle_block.{number}.{_inside(part, rest)}"
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    assert match is not None, name
    way, block, part, j, rest = match.groups()
    i, per_block = int(block), layers + 1
    if way == "down":
        if part == "downsamplers":
            return f"input_blocks.{per_block * (i + 1)}.0.op.{leaf}"
        return f"input_blocks.{per_block * i + int(j) + 1}.{_slot(part)}.{_inside(part, rest)}"
    if part == "upsamplers":
        slot = 2 if "Attn" in up_types[i] else 1
        return f"output_blocks.{per_block * i + layers}.{slot}.conv.{leaf}"
    return f"output_blocks.{per_block * i + int(j)}.{_slot(part)}.{_inside(part, rest)}"


def _slot(part: str) -> int:
    return 1 if part == "attentions" else 0


def _inside(part: str, rest: str) -> str:
    if part == "attentions":
        return rest
    module, _, leaf = rest.rpartition(".")
    return f"{_RESNET[module]}.{leaf}"


def vae_keys(
    weights: Mapping[str, Tensor], *, levels: int, prefix: str = "first_stage_model."
) -> dict[str, Tensor]:
    """`levels` is the length of the VAE's block_out_channels; attention is 1x1 convolutions."""
    keys: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        key = re.sub(
            r"up_blocks\.(\d+)\.(resnets|upsamplers)",
            lambda m: f"up.{levels - 1 - int(m[1])}.{'block' if m[2] == 'resnets' else m[2]}",
            key,
        )
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = key.replace("upsamplers.0", "upsample").replace("conv_shortcut", "nin_shortcut")
        key = key.replace("mid_block.resnets.0", "mid.block_1")
        key = key.replace("mid_block.resnets.1", "mid.block_2")
        key = key.replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in key:
            key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            key = re.sub(r"to_([qkv])\.", r"\1.", key).replace("to_out.0", "proj_out")
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        keys[prefix + key] = tensor
    return keys


def clip_keys(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """transformers' own names of version 4, with the buffer that they had."""
    import torch

    keys = {}
    for name, tensor in weights.items():
        inner = "" if name.startswith("text_projection") else "text_model."
        keys[prefix + inner + name.removeprefix("text_model.")] = tensor
    return {**keys, f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


_OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip_keys(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """OpenCLIP's names, q, k and v in one matrix, and a projection, used or not."""
    import torch

    keys: dict[str, Tensor] = {}
    for full_name, tensor in weights.items():
        name = full_name.removeprefix("text_model.")
        match = re.match(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == "text_projection.weight":
            keys["text_projection"] = tensor.T
            continue
        if match is None:
            keys[_OPEN_CLIP[name]] = tensor
            continue
        layer, module, leaf = match.groups()
        block = f"transformer.resblocks.{layer}"
        if module in _OPEN_CLIP_LAYER:
            keys[f"{block}.{_OPEN_CLIP_LAYER[module]}.{leaf}"] = tensor
        elif module == "self_attn.q_proj":
            parts = [weights[full_name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            keys[f"{block}.attn.in_proj_{leaf}"] = torch.cat(parts)
    width = weights[next(name for name in weights if "token_embedding" in name)].shape[1]
    keys.setdefault("text_projection", torch.zeros(width, width))
    keys["logit_scale"] = torch.zeros(())
    return {prefix + name: tensor for name, tensor in keys.items()}
