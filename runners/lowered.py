"""Quantized layers as torch's own compiler understands them, in the place of the oracle's.

The oracle's custom operators exist only in Python, and a package can't call them in a process that
never imported us. A lowered layer says the same in torch's words: on processors the pattern of
`quantized_decomposed` that inductor fuses into int8 linears and convolutions, on cards the int8 and
fp8 products themselves. Codes stay as they are stored, 4-bit ones two a byte, in buffers of the
names that `eager_state` gives them: one weight file serves the eager engine and this one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, nn
from torch.nn import functional as F

from runners.quantized import FP8_MAX, QuantizedLayer, insert_quantized, pack_int4

__all__ = [
    "Lowered",
    "Product",
    "card_product",
    "lower_layers",
    "processor_product",
    "store_in",
]

_INT_MM_STEP = 8
"""cuBLASLt's int8 and fp8 products need inputs and outputs that these (int8) and 16 (fp8) divide
(torch's checks in _int_mm and _scaled_mm)."""
_SCALED_MM_STEP = 16


class Lowered(nn.Module):
    """What a QuantizedLayer computes; `product` says how the rounded input meets the codes."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    multiplier: Tensor | None
    down: Tensor | None
    up: Tensor | None
    zeros: Tensor
    code_sums: Tensor | None

    def __init__(self, layer: QuantizedLayer, product: Product) -> None:
        """Take the layer's tensors, in the types in which they are stored."""
        super().__init__()
        self.form, self.convolution = layer.quantization, layer.convolution
        self.shape = tuple(layer.codes.shape)
        self.rounds = layer.activation_scale is not None
        self.step = 1.0 if layer.activation_scale is None else float(layer.activation_scale)
        point = layer.activation_zero_point
        self.point = 128 if point is None else int(point)
        self.output_step = None if layer.output_scale is None else float(layer.output_scale)
        # inductor's pattern takes no cast between an int8 layer's scales and their use (torch 2.13)
        narrow = self.form.format in ("int8", "int4", "uint4") and not self.rounds
        stored = {
            "codes": pack_int4(layer.codes) if self.form.bits == 4 else layer.codes,
            "scale": layer.scale.half() if narrow else layer.scale,
            "zero": layer.zero,
            "multiplier": layer.multiplier,
            "down": layer.down,
            "up": layer.up,
            "zeros": torch.zeros(self.shape[0], dtype=torch.int64),
            "code_sums": _code_sums(layer) if self.rounds else None,
        }
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)
        self.bias = layer.bias
        self._product = product

    def forward(self, x: Tensor) -> Tensor:
        """What the oracle's layer does."""
        scaled = x if self.multiplier is None else x * self.multiplier
        y = self._product(self, scaled)
        if self.down is not None and self.up is not None:
            thin = self.plain(x, self.down, None)
            y = y + (
                F.linear(thin, self.up) if self.convolution is None else F.conv2d(thin, self.up)
            )
        if self.output_step is None:
            return y
        return torch.clamp(torch.round(y / self.output_step), -128, 127) * self.output_step

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's product with a float weight."""
        if self.convolution is None:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, **self.convolution)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, for the moment of one product."""
        if self.form.format == "fp8":
            scale = self.scale.view(-1, *([1] * (len(self.shape) - 1)))
            return _as(_as(self.codes, torch.float32) * scale, dtype)
        if not self.form.group:
            return _as(self._by_channel(), dtype)
        codes = self._unpacked().view(self.shape[0], -1, self.form.group, *self.shape[2:])
        values = _as(codes, torch.float32)
        if self.zero is not None:
            values = values - self.zero.unsqueeze(2)
        scale = _as(self.scale, torch.float32).unsqueeze(2)
        return _as((values * scale).view(self.shape), dtype)

    def _by_channel(self) -> Tensor:
        ops = torch.ops.quantized_decomposed
        found: Tensor = ops.dequantize_per_channel(
            self.codes, _as(self.scale, torch.float32), self.zeros, 0, -128, 127, torch.int8
        )
        return found

    def _unpacked(self) -> Tensor:
        """4-bit codes one a byte; of signed ones the sign comes from the top bit of four."""
        pairs = torch.stack((self.codes & 0xF, self.codes >> 4), dim=1).flatten()
        codes = pairs[: torch.Size(self.shape).numel()]
        if self.form.format == "uint4":
            return codes
        return ((_as(codes, torch.int8) + 8) % 16) - 8


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in another type. torch.export notes a check beside every `to`, also one that changes
    nothing, and a tensor with a second reader fits none of inductor's patterns (torch 2.13).
    """
    if x.dtype == dtype:
        return x
    found: Tensor = torch.ops.prims.convert_element_type(x, dtype)
    return found


Product = Callable[[Lowered, Tensor], Tensor]
"""(layer, its input times the multiplier) -> its output without the low-rank correction."""


def _code_sums(layer: QuantizedLayer) -> Tensor | None:
    """Of each output's codes: what a zero point of the input has to be multiplied with."""
    if layer.quantization.format != "int8" or layer.convolution is not None:
        return None
    return layer.codes.sum(1, dtype=torch.float32)


def lower_layers(root: nn.Module, product: Product) -> dict[str, Lowered]:
    """Replace every quantized layer of `root`; the new ones by their names."""
    found = {
        name: Lowered(layer, product)
        for name, layer in root.named_modules()
        if isinstance(layer, QuantizedLayer)
    }
    insert_quantized(root, found)
    return found


def store_in(root: nn.Module, dtype: torch.dtype) -> None:
    """Bring fp32 weights to `dtype`; scales and codes of lowered layers stay as they are."""
    for holder in root.modules():
        for tensors in (holder._parameters, holder._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.dtype == torch.float32:
                    tensor.data = tensor.data.to(dtype)


def processor_product(layer: Lowered, x: Tensor) -> Tensor:
    """The pattern that inductor's freezing turns into oneDNN's int8 linear or convolution.

    Inputs are rounded to uint8 around 128 where the oracle has int8 around 0: the same steps, and
    oneDNN's fast case. Rows are flattened, because torch 2.13 fails on the pattern of a transposed
    input with dynamic sizes.
    """
    flat = x.reshape(-1, x.shape[-1]) if layer.convolution is None else x
    if layer.rounds:
        ops, grid = torch.ops.quantized_decomposed, (layer.step, layer.point, 0, 255, torch.uint8)
        codes = ops.quantize_per_tensor(_as(flat, torch.float32), *grid)
        flat = _as(ops.dequantize_per_tensor(codes, *grid), x.dtype)
    y = layer.plain(flat, layer.weight(x.dtype), layer.bias)
    return y.view(*x.shape[:-1], layer.shape[0]) if layer.convolution is None else y


def card_product(layer: Lowered, x: Tensor) -> Tensor:
    """int8 and fp8 products on tensor cores where torch has them: linears over tokens.

    Others (convolutions, conditioning vectors, odd widths) run on the dequantized weight.
    """
    if layer.convolution is None and layer.rounds and x.dim() == 3:
        rows = x.reshape(-1, x.shape[-1])
        y = None
        if layer.form.format == "int8" and _divided(layer, _INT_MM_STEP):
            y = _int8_product(layer, rows)
        elif layer.form.format == "fp8" and _divided(layer, _SCALED_MM_STEP):
            y = _fp8_product(layer, rows)
        if y is not None:
            y = y.to(x.dtype) if layer.bias is None else (y + layer.bias.float()).to(x.dtype)
            return y.view(*x.shape[:-1], layer.shape[0])
    return layer.plain(_rounded(layer, x), layer.weight(x.dtype), layer.bias)


def _divided(layer: Lowered, step: int) -> bool:
    return layer.shape[0] % step == 0 and layer.shape[1] % step == 0


def _int8_product(layer: Lowered, rows: Tensor) -> Tensor:
    """[rows, out] in fp32, of int8 codes on both sides summed in int32."""
    point = layer.point - 128
    codes = torch.clamp(torch.round(rows.float() / layer.step) + point, -128, 127).to(torch.int8)
    sums = torch._int_mm(codes, layer.codes.t()).float()
    if point and layer.code_sums is not None:
        sums = sums - point * layer.code_sums
    return sums * (layer.scale.float() * layer.step)


def _fp8_product(layer: Lowered, rows: Tensor) -> Tensor:
    """[rows, out] in fp32: e4m3 on both sides; the channels' scales come after the product."""
    steps = torch.clamp(rows.float() / layer.step, -FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    one = layer.scale.new_ones((), dtype=torch.float32)
    sums = torch._scaled_mm(
        steps, layer.codes.t(), scale_a=one * layer.step, scale_b=one, out_dtype=torch.bfloat16
    )
    return sums.float() * layer.scale.float()


def _rounded(layer: Lowered, x: Tensor) -> Tensor:
    """The input on its grid, as floats."""
    if not layer.rounds:
        return x
    wide = x.float() / layer.step
    if layer.form.format == "fp8":
        steps = torch.clamp(wide, -FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
    else:
        point = layer.point - 128
        steps = torch.clamp(torch.round(wide) + point, -128, 127) - point
    return (steps * layer.step).to(x.dtype)
