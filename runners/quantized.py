"""Quantized torch modules: codes and scales, run in eager as the oracle of the numerics.

A layer's forward calls three small custom operators. They exist only here: every backend replaces
them by the one pattern that its own compiler fuses. The format that is stored (`state`,
`layer_from_state`) is what the `eager` backend runs, so it belongs to the readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Quantization",
    "QuantizedLayer",
    "insert_quantized",
    "pack_int4",
    "unpack_int4",
]


@dataclass(frozen=True)
class Quantization:
    """How one layer is stored: the resolved scheme of its weight and of its input."""

    bits: Literal[4, 8]
    group: int
    """Weights that share a scale along the input axis; 0 is one scale per output channel."""
    activation: Literal["none", "static", "affine"]
    """`static`: the input is rounded to int8 with one scale, found by calibration; `affine`: to
    uint8 with a zero point where that loses less."""


@torch.library.custom_op("kiln::dequantize_channel", mutates_args=())
def dequantize_channel(codes: Tensor, scale: Tensor) -> Tensor:
    """Weights from int8 `codes` [out, ...] and `scale` [out]."""
    return codes.to(scale.dtype) * scale.view(-1, *([1] * (codes.dim() - 1)))


@dequantize_channel.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.custom_op("kiln::dequantize_group", mutates_args=())
def dequantize_group(codes: Tensor, scale: Tensor, group: int) -> Tensor:
    """Weights from `codes` [out, in, ...] and `scale` [out, in/group, ...]: groups along axis 1."""
    return codes.to(scale.dtype) * scale.repeat_interleave(group, dim=1)


@dequantize_group.register_fake
def _(codes: Tensor, scale: Tensor, group: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.custom_op("kiln::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor) -> Tensor:
    """Round `x` to int8 steps of the 0-d `scale`, halves to even as ONNX's QuantizeLinear does."""
    return torch.clamp(torch.round(x / scale), -128, 127) * scale


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


@torch.library.custom_op("kiln::quantize_dequantize_affine", mutates_args=())
def quantize_dequantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Round `x` to uint8 steps of the 0-d `scale` around the 0-d uint8 `zero_point`."""
    zero = zero_point.to(x.dtype)
    return (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale


@quantize_dequantize_affine.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


class QuantizedLayer(nn.Module):
    """A linear or 2-d convolution whose weight is `codes` and `scale`.

    `codes`: int8 [out, in, ...]; `scale`: [out] or [out, in/group, ...]; `activation_scale`: 0-d,
    present where the input is quantized, and `activation_zero_point`: 0-d uint8, where it is not
    int8 around zero; `output_scale`: 0-d, where the output is rounded to int8; `bias`: [out] or
    None.
    """

    codes: Tensor
    scale: Tensor
    activation_scale: Tensor | None
    activation_zero_point: Tensor | None
    output_scale: Tensor | None

    def __init__(
        self,
        quantization: Quantization,
        tensors: Mapping[str, Tensor],
        convolution: Mapping[str, Any] | None,
    ) -> None:
        """Take `tensors` codes and scale, and what there is of the others, by their names."""
        super().__init__()
        self.quantization = quantization
        self.convolution = dict(convolution) if convolution is not None else None
        self.register_buffer("codes", tensors["codes"])
        self.register_buffer("scale", tensors["scale"])
        self.register_buffer("activation_scale", tensors.get("activation_scale"))
        self.register_buffer("activation_zero_point", tensors.get("activation_zero_point"))
        self.register_buffer("output_scale", tensors.get("output_scale"))
        bias = tensors.get("bias")
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, as the forward uses it."""
        if self.quantization.group:
            return torch.ops.kiln.dequantize_group(  # type: ignore[no-any-return]
                self.codes, self.scale, self.quantization.group
            )
        return torch.ops.kiln.dequantize_channel(  # type: ignore[no-any-return]
            self.codes, self.scale
        )

    def forward(self, x: Tensor) -> Tensor:
        """What the float layer does, on rounded weights and (where planned) a rounded input."""
        if self.activation_zero_point is not None:
            x = torch.ops.kiln.quantize_dequantize_affine(
                x, self.activation_scale, self.activation_zero_point
            )
        elif self.activation_scale is not None:
            x = torch.ops.kiln.quantize_dequantize(x, self.activation_scale)
        if self.convolution is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            y = F.conv2d(x, self.weight, self.bias, **self.convolution)
        if self.output_scale is None:
            return y
        rounded: Tensor = torch.ops.kiln.quantize_dequantize(y, self.output_scale)
        return rounded


def convolution_of(layer: nn.Module) -> dict[str, Any] | None:
    """The arguments of a convolution's forward as JSON-able data; None for a linear."""
    if not isinstance(layer, nn.Conv2d):
        return None
    return {
        "stride": list(layer.stride),
        "padding": list(layer.padding),
        "dilation": list(layer.dilation),
        "groups": layer.groups,
    }


def insert_quantized(root: nn.Module, layers: Mapping[str, QuantizedLayer]) -> None:
    """Put each layer where `root` has the float layer of that name."""
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, layer)


def pack_int4(codes: Tensor) -> Tensor:
    """Two codes (-8..7) a byte, low nibble first, flattened; an odd count is padded by zero."""
    flat = codes.flatten().to(torch.uint8) & 0xF
    flat = F.pad(flat, (0, flat.numel() % 2))
    return flat[0::2] | (flat[1::2] << 4)


def unpack_int4(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_int4`: int8 codes of `shape`."""
    flat = torch.stack((packed & 0xF, packed >> 4), dim=1).flatten()
    count = int(torch.Size(shape).numel())
    signed = ((flat[:count].to(torch.int8) + 8) % 16) - 8
    return signed.view(shape)
