"""Quantized torch modules: codes and scales, run in eager as the oracle of the numerics.

A layer's forward calls three small custom operators. They exist only here: every backend replaces
them by the one pattern that its own compiler fuses. The format that is stored (`state`,
`layer_from_state`) is what the `eager` backend runs, so it belongs to the readers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "FP4_VALUES",
    "FP8_MAX",
    "LLM_INT8_OUTLIER",
    "NF4_BLOCK",
    "NF4_VALUES",
    "Format",
    "Quantization",
    "QuantizedLayer",
    "insert_quantized",
    "pack_int4",
    "rows_at_once",
    "unpack_int4",
]


Format = Literal["int8", "int4", "uint4", "fp8", "nf4", "nvfp4"]
"""int4: -7..7; uint4: 0..15 around a zero point a group; fp8: e4m3; nf4, nvfp4: indices."""

NF4_BLOCK = 64
"""Weights along a row (the kernel's places included) that share a peak, as in bitsandbytes."""


LLM_INT8_OUTLIER = 6.0
"""Size of an input from which on its column is multiplied in floats: Dettmers et al. 2022,
"LLM.int8()", section 3.2."""

_DEQUANTIZED_AT_ONCE = 1 << 22
"""Weights of a large linear: 8 or 16 MiB, of which a processor's caches hold most."""
_ROWS_STEP = 64
"""Rows at once are a multiple of it: four of AMX's tiles, which hold 16."""


@dataclass(frozen=True)
class Quantization:
    """How one layer's weight is stored."""

    format: Format
    group: int = 0
    """Weights that share a scale along the input axis; 0 is one scale per output channel."""
    dynamic: bool = False
    """Whether a linear's input is rounded to int8 as it comes, with a scale a row (a token), and
    multiplied by the int8 codes in integers."""
    library: Literal["", "bitsandbytes", "torchao"] = ""
    """Whose kernels the eager engine runs a dynamic layer on; "": torch's own. bitsandbytes'
    multiplies columns that have outliers in floats."""

    @property
    def bits(self) -> int:
        """Of a code."""
        return 8 if self.format in ("int8", "fp8") else 4


@torch.library.custom_op("kiln::dequantize_channel", mutates_args=())
def dequantize_channel(codes: Tensor, scale: Tensor) -> Tensor:
    """Weights from int8 or e4m3 `codes` [out, ...] and `scale` [out]."""
    return codes.to(scale.dtype, copy=True).mul_(scale.view(-1, *([1] * (codes.dim() - 1))))


@dequantize_channel.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


def _grouped(codes: Tensor, dtype: torch.dtype, group: int) -> Tensor:
    """A copy in floats, [out, in/group, group, ...], to be changed in place."""
    return codes.to(dtype, copy=True).contiguous().view(codes.shape[0], -1, group, *codes.shape[2:])


@torch.library.custom_op("kiln::dequantize_group", mutates_args=())
def dequantize_group(codes: Tensor, scale: Tensor, group: int) -> Tensor:
    """Weights from `codes` [out, in, ...] and `scale` [out, in/group, ...]: groups along axis 1."""
    return _grouped(codes, scale.dtype, group).mul_(scale.unsqueeze(2)).view(codes.shape)


@dequantize_group.register_fake
def _(codes: Tensor, scale: Tensor, group: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.custom_op("kiln::dequantize_group_affine", mutates_args=())
def dequantize_group_affine(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """The same from uint8 `codes` (0..15) around `zero`, shaped as `scale`."""
    centred = _grouped(codes, scale.dtype, group).sub_(zero.unsqueeze(2))
    return centred.mul_(scale.unsqueeze(2)).view(codes.shape)


@dequantize_group_affine.register_fake
def _(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.custom_op("kiln::dequantize_fp4", mutates_args=())
def dequantize_fp4(codes: Tensor, scale: Tensor, whole: Tensor, group: int) -> Tensor:
    """Weights from e2m1's bits in uint8 `codes`; e4m3 `scale` as a group's, times 0-d `whole`."""
    values = torch.tensor(FP4_VALUES, dtype=whole.dtype)[codes.long()]
    return values * (scale.to(whole.dtype) * whole).repeat_interleave(group, dim=1)


@dequantize_fp4.register_fake
def _(codes: Tensor, scale: Tensor, whole: Tensor, group: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(codes, dtype=whole.dtype)


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


@torch.library.custom_op("kiln::quantize_dequantize_fp8", mutates_args=())
def quantize_dequantize_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Round `x` to e4m3 multiples of the 0-d `scale`, which stay within +-448."""
    steps = torch.clamp(x / scale, -FP8_MAX, FP8_MAX)
    return steps.to(torch.float8_e4m3fn).to(x.dtype) * scale


@quantize_dequantize_fp8.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


FP8_MAX = 448.0
"""The largest finite value of float8 e4m3 (Micikevicius et al. 2022, table 1)."""

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Dettmers et al. 2023, "QLoRA", appendix E."""

FP4_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)
"""e2m1 by its bits (OCP Microscaling Formats 1.0, table 5)."""


class QuantizedLayer(nn.Module):
    """A linear or 2-d convolution whose weight is `codes` and `scale`.

    `codes`: [out, in, ...], int8 (int8, int4), uint8 (uint4, nf4, nvfp4) or float8_e4m3fn; `scale`:
    [out] or [out, in/group, ...] (nf4: [out, in * places / 64]; nvfp4: e4m3, times the 0-d
    `whole`); `zero`: uint8, as scale (uint4);
    `activation_scale`: 0-d, present where the input is rounded, and `activation_zero_point`: 0-d
    uint8, where that is not around zero; `multiplier` [in] or, of a convolution, [in, 1, 1]: powers
    of two that the input is multiplied with before it is rounded (the codes are of the weight
    divided by them); `output_scale`: 0-d, where the output is rounded to int8;
    `down` [rank, in, ...] and `up` [out, rank, ...]: what is added to the product; `bias`: [out].
    """

    weight: None = None  # T5's code asks whether it is a tensor, to bring the input to its type
    codes: Tensor
    scale: Tensor
    whole: Tensor | None
    zero: Tensor | None
    activation_scale: Tensor | None
    activation_zero_point: Tensor | None
    multiplier: Tensor | None
    output_scale: Tensor | None
    down: Tensor | None
    up: Tensor | None

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
        for name in _BUFFERS:
            self.register_buffer(name, tensors.get(name))
        bias = tensors.get("bias")
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        """As torch's, which takes e4m3 for floats to be widened: it stays what it is."""
        narrow = {n: b for n, b in self.named_buffers() if b.dtype == torch.float8_e4m3fn}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in narrow.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    @property
    def dequantized(self) -> Tensor:
        """The weight, as the forward uses it."""
        return self._dequantized()

    def _dequantized(self, rows: slice | None = None) -> Tensor:
        form, ops = self.quantization, torch.ops.kiln
        codes, scale, zero = self.codes, self.scale, self.zero
        if rows is not None:  # a slice of all is an operator more in what is exported
            codes, scale = codes[rows], scale[rows]
            zero = None if zero is None else zero[rows]
        found: Tensor
        if form.format == "nf4":
            found = _looked_up(NF4_VALUES, codes, scale, NF4_BLOCK)
        elif form.format == "nvfp4":
            found = ops.dequantize_fp4(codes, scale, self.whole, form.group)
        elif zero is not None:
            found = ops.dequantize_group_affine(codes, scale, zero, form.group)
        elif form.group:
            found = ops.dequantize_group(codes, scale, form.group)
        else:
            found = ops.dequantize_channel(codes, scale)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """What the float layer does, on rounded weights and (where planned) rounded ends."""
        if self.quantization.dynamic:
            return self._rows_product(x)
        y = self._weighted(self._rounded_input(x))
        if self.down is not None and self.up is not None:
            y = y + self._correction(x, self.down, self.up)
        if self.output_scale is None:
            return y
        rounded: Tensor = torch.ops.kiln.quantize_dequantize(y, self.output_scale)
        return rounded

    @property
    def dynamic(self) -> bool:
        """Whether it is a linear whose product is of int8, from inputs of any range."""
        return self.quantization.dynamic

    def _rows_product(self, x: Tensor) -> Tensor:
        """`x` [..., in], its rows rounded to -127..127, times int8 codes, in integers."""
        rows, scale = x.reshape(-1, x.shape[-1]).float(), self.scale.float()
        if self.quantization.library == "bitsandbytes":
            y = self._product_but_outliers(rows, scale)
        else:
            rounded, step = _rounded_rows(rows)
            y = torch._int_mm(rounded, self.codes.t()) * step * scale
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    def _product_but_outliers(self, rows: Tensor, scale: Tensor) -> Tensor:
        """The same of LLM.int8: columns of `rows` that hold an outlier are multiplied in floats."""
        outliers = rows.abs() >= LLM_INT8_OUTLIER
        columns = outliers.any(0)
        rounded, step = _rounded_rows(rows.masked_fill(outliers, 0))
        y = torch._int_mm(rounded.masked_fill(columns, 0), self.codes.t()) * step * scale
        return y + rows[:, columns] @ (self.codes[:, columns] * scale[:, None]).t()

    def _rounded_input(self, x: Tensor) -> Tensor:
        ops, scale = torch.ops.kiln, self.activation_scale
        if self.multiplier is not None:
            x = x * self.multiplier
        found = x
        if scale is not None and self.quantization.format == "fp8":
            found = ops.quantize_dequantize_fp8(x, scale)
        elif scale is not None and self.activation_zero_point is not None:
            found = ops.quantize_dequantize_affine(x, scale, self.activation_zero_point)
        elif scale is not None:
            found = ops.quantize_dequantize(x, scale)
        return found

    def _weighted(self, x: Tensor) -> Tensor:
        """The product with the weight, and the bias: of a large linear in parts, whose dequantized
        weights stay in the processor's caches.
        """
        rows, bias = rows_at_once(self.codes[0].numel()), self.bias
        whole = self.convolution is not None or torch.compiler.is_exporting()
        if whole or rows >= len(self.codes):
            return self._product(x, self.dequantized, bias)
        y = x.new_empty(*x.shape[:-1], len(self.codes))
        for start in range(0, len(self.codes), rows):
            part = slice(start, start + rows)
            own = None if bias is None else bias[part]
            y[..., part] = F.linear(x, self._dequantized(part), own)
        return y

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.convolution is None:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, **self.convolution)

    def _correction(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        thin = self._product(x, down, None)
        return F.linear(thin, up) if self.convolution is None else F.conv2d(thin, up)


_BUFFERS = (
    "codes",
    "scale",
    "whole",
    "zero",
    "activation_scale",
    "activation_zero_point",
    "multiplier",
    "output_scale",
    "down",
    "up",
)


def _rounded_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes -127..127, and the step of each row [rows, 1]."""
    tiny = torch.finfo(torch.float32).tiny
    step = rows.abs().amax(1, keepdim=True).clamp(min=tiny) / 127
    return (rows / step).round().to(torch.int8), step


def _looked_up(values: tuple[float, ...], codes: Tensor, scale: Tensor, block: int) -> Tensor:
    """`values[codes]` times the scale of each block along the rows."""
    table = torch.tensor(values, dtype=scale.dtype)
    rows = table[codes.long()].view(codes.shape[0], -1, block)
    return (rows * scale[..., None]).view(codes.shape)


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


def rows_at_once(width: int) -> int:
    """How many rows of a large linear's weight, of `width` each, are dequantized at once."""
    return max(_DEQUANTIZED_AT_ONCE // width // _ROWS_STEP, 1) * _ROWS_STEP


def insert_quantized(root: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put each layer where `root` has the float layer of that name."""
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, layer)


def pack_int4(codes: Tensor) -> Tensor:
    """Two codes (-8..7 or 0..15) a byte, low nibble first, flattened and padded by zero."""
    flat = codes.flatten().to(torch.uint8) & 0xF
    flat = F.pad(flat, (0, flat.numel() % 2))
    return flat[0::2] | (flat[1::2] << 4)


def unpack_int4(packed: Tensor, shape: tuple[int, ...], *, signed: bool = True) -> Tensor:
    """The inverse of `pack_int4`: codes of `shape`, int8, or uint8 where they aren't signed."""
    flat = torch.stack((packed & 0xF, packed >> 4), dim=1).flatten()
    count = int(torch.Size(shape).numel())
    if not signed:
        return flat[:count].view(shape)
    codes = ((flat[:count].to(torch.int8) + 8) % 16) - 8
    return codes.view(shape)
