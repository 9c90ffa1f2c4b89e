"""Layers on bitsandbytes' kernels, NF4's and LLM.int8's; the one file that imports it.

Their numbers are those of runners.quantized, which is their oracle.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profiles.errors import MissingError
from runners.quantized import LLM_INT8_OUTLIER, NF4_BLOCK, NF4_VALUES, rows_at_once

__all__ = ["LlmInt8Layer", "Nf4Layer"]


class Nf4Layer(nn.Module):
    """A linear or 2-d convolution whose weight is dequantized a call, then used as any other.

    `packed`: [ceil(weights / 2)], two codes a byte, low nibble first; `peaks`: fp32, one for each
    64 weights along the rows; `shape`: of the weight. Raises MissingError without bitsandbytes.
    """

    weight: None = None  # as that of QuantizedLayer
    packed: Tensor

    def __init__(
        self,
        packed: Tensor,
        peaks: Tensor,
        shape: tuple[int, ...],
        *,
        bias: Tensor | None,
        convolution: Mapping[str, Any] | None,
    ) -> None:
        """Bring the codes into bitsandbytes' order: high nibble first, a column."""
        super().__init__()
        self._library = _bitsandbytes()
        swapped = (packed << 4) | (packed >> 4)
        self.register_buffer("packed", swapped[:, None], persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._convolution = None if convolution is None else dict(convolution)
        width = int(torch.Size(shape[1:]).numel())
        rows = shape[0] if convolution else rows_at_once(width)
        self._parts = [
            (codes, self._state(scales.flatten(), (len(scales), *shape[1:])))
            for codes, scales in zip(
                torch.split(self.packed, rows * width // 2),
                torch.split(peaks.view(shape[0], -1), rows),
                strict=True,
            )
        ]
        """The packed codes of some rows, and the library's state: all of a convolution's."""

    def _state(self, peaks: Tensor, shape: tuple[int, ...]) -> Any:
        return self._library.functional.QuantState(
            absmax=peaks,
            shape=torch.Size(shape),
            code=torch.tensor(NF4_VALUES),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=torch.float32,
        )

    def forward(self, x: Tensor) -> Tensor:
        """What the float layer does, on dequantized weights: a large linear's in parts, as
        QuantizedLayer has them.
        """
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self._convolution is not None:
            ((codes, state),) = self._parts
            weight = self._library.functional.dequantize_4bit(codes, state)
            return F.conv2d(x, weight.to(x.dtype), bias, **self._convolution)
        product = self._library.matmul_4bit
        y = torch.cat([product(x, codes.t(), state) for codes, state in self._parts], -1)
        return y if bias is None else y.add_(bias)


class LlmInt8Layer(nn.Module):
    """A linear whose input is rounded to int8 as it comes, but for columns with outliers.

    `codes`: int8 [out, in]; `scale`: fp32 [out]. Raises MissingError without bitsandbytes.
    """

    weight: None = None  # as that of QuantizedLayer
    dynamic = True
    codes: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Say the scales as the library does: what code 127 stands for."""
        super().__init__()
        self._library = _bitsandbytes()
        self.register_buffer("codes", codes, persistent=False)
        self._peaks = 127 * scale
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """What QuantizedLayer does of this form."""
        rows = x.reshape(-1, x.shape[-1])
        rounded, peaks, outliers = self._library.functional.int8_vectorwise_quant(
            rows, threshold=LLM_INT8_OUTLIER
        )
        y: Tensor
        y, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            rows, rounded, self.codes, peaks, self._peaks, outliers, self.bias
        )
        return y.view(*x.shape[:-1], -1)


def _bitsandbytes() -> Any:
    """The library; MissingError, with the command that installs it, where it is absent."""
    try:
        with warnings.catch_warnings():  # its imports of torch's old names, 0.50
            warnings.simplefilter("ignore")
            import bitsandbytes
    except ImportError as error:
        raise MissingError(
            "NF4 and LLM.int8 layers run on bitsandbytes, which isn't installed: run "
            'pip install "kiln-diffusion[bitsandbytes]".'
        ) from error
    return bitsandbytes
