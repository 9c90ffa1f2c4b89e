"""The closed formula of a UNet2DConditionModel, which Stable Diffusion 1.x, 2.x and XL share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimizer.families.outlines import Counted, Outline, convolution, linear, plain, resnet, total

__all__ = ["unet_outline"]

Config = Mapping[str, Any]

_TIMES = 4
"""diffusers' time_embed_dim: so many times the first level's width."""

_BLOCK, _CONCATENATED = 13, 5
"""Live numbers of a place, in widths: within a transformer's gated feed-forward (input, its norm's,
twice 4 and their product, residual), and where a resnet reads two levels side by side."""


def unet_outline(unet: Config, factor: int) -> Outline:
    """Of a UNet whose latents are `factor` pixels wide and high."""
    channels = [int(width) for width in unet["block_out_channels"]]
    count, time, cross = len(channels), _TIMES * channels[0], int(unet["cross_attention_dim"])
    layers, depths = _each(unet.get("layers_per_block") or 2, count), _depths(unet, count)
    parts = [
        convolution(int(unet["in_channels"]), channels[0]),
        linear(channels[0], time) + linear(time, time) + _conditions(unet, time, channels[0]),
        resnet(channels[-1], channels[-1], time) * 2,
        _transformer(channels[-1], depths[-1] or _each_depth(unet, count)[-1], cross),
        plain(2 * channels[0]),
        convolution(channels[0], int(unet["out_channels"])),
    ]
    skips = [channels[0]]  # widths of what the way down keeps for the way up, in order
    for index, width in enumerate(channels):
        for place in range(layers[index]):
            before = width if place else channels[max(index - 1, 0)]
            parts += [resnet(before, width, time), _transformer(width, depths[index], cross)]
            skips.append(width)
        if index < count - 1:
            parts.append(convolution(width, width))
            skips.append(width)
    up_depths = _up_depths(unet, count)
    before = channels[-1]
    for index, width in enumerate(reversed(channels)):
        for _ in range(layers[count - 1 - index] + 1):
            parts.append(resnet(before + skips.pop(), width, time))
            parts.append(_transformer(width, up_depths[index], cross))
            before = width
        if index < count - 1:
            parts.append(convolution(width, width))
    return Outline(total(parts), {"pixels": _live(channels, layers, depths) / factor**2})


def _live(channels: Sequence[int], layers: Sequence[int], depths: Sequence[int]) -> float:
    """Numbers for each latent at the widest level: what is kept for the way up, and the level's
    own.
    """
    kept, widest = 0.0, 0.0
    for index, (width, depth) in enumerate(zip(channels, depths, strict=True)):
        places = 0.25**index
        kept += (layers[index] + 1) * width * places
        own = (_BLOCK if depth else _CONCATENATED) * width * places
        widest = max(widest, kept + own)
    return widest


def _transformer(width: int, depth: int, cross: int) -> Counted:
    """Blocks of self-attention, cross-attention and a gated feed-forward between two projections.

    The projections are linears or 1x1 convolutions, which weigh the same.
    """
    if not depth:
        return Counted()
    block = total(
        [
            plain(6 * width),
            linear(width, width, bias=False) * 4,
            linear(cross, width, bias=False) * 2,
            linear(width, width) * 2,
            linear(width, 8 * width),
            linear(4 * width, width),
        ]
    )
    return block * depth + linear(width, width) * 2 + plain(2 * width)


def _conditions(unet: Config, time: int, first: int) -> Counted:
    """The linears of sizes (SDXL) and of a distilled guidance."""
    found = Counted()
    if unet.get("addition_embed_type") == "text_time":
        width = int(unet["projection_class_embeddings_input_dim"])
        found += linear(width, time) + linear(time, time)
    if unet.get("time_cond_proj_dim"):
        found += linear(int(unet["time_cond_proj_dim"]), first, bias=False)
    return found


def _each(value: int | Sequence[int], count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else [int(one) for one in value]


def _each_depth(unet: Config, count: int) -> list[int]:
    return _each(unet.get("transformer_layers_per_block") or 1, count)


def _depths(unet: Config, count: int) -> list[int]:
    """Transformer blocks of each level's transformers on the way down; 0 where it has none."""
    return [
        depth if "Attn" in str(kind) else 0
        for depth, kind in zip(_each_depth(unet, count), unet["down_block_types"], strict=True)
    ]


def _up_depths(unet: Config, count: int) -> list[int]:
    found = unet.get("reverse_transformer_layers_per_block")
    depths = _each(found, count) if found else _each_depth(unet, count)[::-1]
    return [
        depth if "Attn" in str(kind) else 0
        for depth, kind in zip(depths, unet["up_block_types"], strict=True)
    ]
