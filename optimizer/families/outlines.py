"""Closed formulas of what components weigh and hold, from configs alone, without torch.

Weights are counted layer by layer, as diffusers' and transformers' classes build them. Live numbers
are those that the widest point of a pass needs at once; attention matrices aren't among them, for
the backends fuse attention or run it in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimizer.vae_config import TINY
from runners.memory import Feature

__all__ = [
    "Counted",
    "Outline",
    "clip_outline",
    "convolution",
    "linear",
    "plain",
    "resnet",
    "t5_outline",
    "total",
    "vae_outlines",
]

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Counted:
    """Weights, and linears and convolutions among the modules that hold them."""

    parameters: int = 0
    in_layers: int = 0
    """Of the parameters: weights of linears and convolutions, which may be quantized."""
    layers: int = 0

    def __add__(self, other: Counted) -> Counted:
        """Both."""
        return Counted(
            self.parameters + other.parameters,
            self.in_layers + other.in_layers,
            self.layers + other.layers,
        )

    def __mul__(self, times: int) -> Counted:
        """So many of it."""
        return Counted(self.parameters * times, self.in_layers * times, self.layers * times)


@dataclass(frozen=True)
class Outline:
    """One component, as far as its config tells."""

    counted: Counted
    live: Mapping[Feature, float] = field(default_factory=dict)
    """Numbers alive at the widest point, by feature; pixels are the picture's."""
    parts: tuple[Outline, ...] = ()
    """Of a VAE's half in seamless tiles: before its attention, and after it."""


def plain(parameters: int) -> Counted:
    """Norms, biases and tables."""
    return Counted(parameters)


def linear(inputs: int, outputs: int, *, bias: bool = True) -> Counted:
    """One linear."""
    return Counted(inputs * outputs + bias * outputs, inputs * outputs, 1)


def convolution(inputs: int, outputs: int, side: int = 3) -> Counted:
    """One convolution with a bias."""
    return linear(inputs * side**2, outputs)


def total(parts: Sequence[Counted]) -> Counted:
    """All of them."""
    return sum(parts, Counted())


_CLIP = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "max_position_embeddings": 77,
    "num_hidden_layers": 12,
    "projection_dim": 512,
    "vocab_size": 49408,
}
_T5 = {
    "d_ff": 2048,
    "d_kv": 64,
    "d_model": 512,
    "num_heads": 8,
    "num_layers": 6,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
"""transformers' values of keys that configs may lack."""


def clip_outline(config: Config) -> Outline:
    """A CLIP text encoder; a projection where its class has one."""
    config = {**_CLIP, **config}
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    tokens = int(config["max_position_embeddings"])
    layer = total(
        [linear(width, width) * 4, linear(width, inner), linear(inner, width), plain(4 * width)]
    )
    counted = total(
        [
            plain((int(config["vocab_size"]) + tokens) * width),
            layer * int(config["num_hidden_layers"]),
            plain(2 * width),
        ]
    )
    if (config.get("architectures") or [""])[0] == "CLIPTextModelWithProjection":
        counted += linear(width, int(config["projection_dim"]), bias=False)
    states = (int(config["num_hidden_layers"]) + 1) * width
    return Outline(counted, {"batch": tokens * (states + 2 * inner + 4 * width)})


def t5_outline(config: Config) -> Outline:
    """A T5 encoder; the gated feed-forward of version 1.1 where it has one."""
    config = {**_T5, **config}
    width, inner = int(config["d_model"]), int(config["d_ff"])
    heads = int(config["num_heads"]) * int(config["d_kv"])
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    layer = total(
        [
            linear(width, heads, bias=False) * 3,
            linear(heads, width, bias=False),
            linear(width, inner, bias=False) * (2 if gated else 1),
            linear(inner, width, bias=False),
            plain(2 * width),
        ]
    )
    tables = int(config["vocab_size"]) * width
    tables += int(config["relative_attention_num_buckets"]) * int(config["num_heads"])
    counted = layer * int(config["num_layers"]) + plain(tables + width)
    return Outline(counted, {"tokens": 3 * inner + 3 * heads + 3 * width})


def resnet(inputs: int, outputs: int, time: int = 0) -> Counted:
    """Two convolutions between norms; with the timestep's linear and a shortcut where needed."""
    parts = [
        plain(2 * inputs + 2 * outputs),
        convolution(inputs, outputs),
        convolution(outputs, outputs),
    ]
    if time:
        parts.append(linear(time, outputs))
    if inputs != outputs:
        parts.append(convolution(inputs, outputs, 1))
    return total(parts)


def vae_outlines(vae: Config) -> dict[str, Outline]:
    """Both halves of an AutoencoderKL or an AutoencoderTiny.

    The widest point is at the picture's own resolution: what the decoder's last block is given by
    the level before, upsampled, convolved and normed; in the encoder's first block the like. That
    of the middle block is before its attention, at a latent's: what it is given, normed, and
    queries, keys and values.
    """
    if vae.get("_class_name") == TINY:
        return _tiny_outlines(vae)
    channels = [int(width) for width in vae["block_out_channels"]]
    latents, layers = int(vae["latent_channels"]), int(vae.get("layers_per_block", 1))
    pictures, top = int(vae.get("out_channels", 3)), channels[-1]
    above = below = resnet(top, top)
    if vae.get("mid_block_add_attention", True):
        above, below = above + linear(top, top) * 3 + plain(2 * top), below + linear(top, top)
    first = convolution(latents, top)
    last = plain(2 * top) + convolution(top, 2 * latents)
    if vae.get("use_post_quant_conv", True):
        first += convolution(latents, latents, 1)
    if vae.get("use_quant_conv", True):
        last += convolution(2 * latents, 2 * latents, 1)
    decoder = [plain(2 * channels[0]), convolution(channels[0], pictures)]
    encoder = [convolution(int(vae.get("in_channels", 3)), channels[0])]
    for widths, blocks, resnets in (
        (channels[::-1], decoder, layers + 1),
        (channels, encoder, layers),
    ):
        before = widths[0]
        for index, width in enumerate(widths):
            blocks += [resnet(before, width), resnet(width, width) * (resnets - 1)]
            if index < len(widths) - 1:
                blocks.append(convolution(width, width))
            before = width
    wide = channels[min(1, len(channels) - 1)]
    seen: dict[Feature, float] = {"pixels": 5 * top / 4 ** (len(channels) - 1)}
    images: list[dict[Feature, float]] = [
        {"pixels": 3 * width + pictures} for width in (wide, channels[0])
    ]
    return {
        "vae_decoder": _halved(
            Outline(above + first, seen), Outline(below + total(decoder), images[0])
        ),
        "vae_encoder": _halved(
            Outline(above + total(encoder), images[1]), Outline(below + last, seen)
        ),
    }


def _halved(before: Outline, after: Outline) -> Outline:
    """Both parts at once; at the picture's own resolution most is alive."""
    live = max(before.live, after.live, key=lambda one: one["pixels"])
    return Outline(before.counted + after.counted, live, (before, after))


def _tiny_outlines(vae: Config) -> dict[str, Outline]:
    """About: blocks of three convolutions of one width."""
    found = {}
    for name, half in (("vae_decoder", "decoder"), ("vae_encoder", "encoder")):
        widths = [int(width) for width in vae[f"{half}_block_out_channels"]]
        counts = vae.get(f"num_{half}_blocks") or [3] * len(widths)
        blocks = [
            convolution(width, width) * (3 * int(count) + 1)
            for width, count in zip(widths, counts, strict=False)
        ]
        found[name] = Outline(total(blocks), {"pixels": 3 * widths[0] + 3})
    return found
