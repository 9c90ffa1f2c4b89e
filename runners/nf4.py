"""NF4 layers on bitsandbytes' kernels, where codes stay in 4 bits; the one file that imports it.

Its numbers are those of runners.quantized: the same quantiles, times the fp32 peak of each block.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profiles.errors import MissingError
from runners.quantized import NF4_BLOCK, NF4_VALUES

__all__ = ["Nf4Layer"]


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
        self._state = self._library.functional.QuantState(
            absmax=peaks.flatten(),
            shape=torch.Size(shape),
            code=torch.tensor(NF4_VALUES),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=torch.float32,
        )

    def forward(self, x: Tensor) -> Tensor:
        """What the float layer does, on dequantized weights."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self._convolution is None:
            product: Tensor = self._library.matmul_4bit(x, self.packed.t(), self._state, bias=bias)
            return product
        weight = self._library.functional.dequantize_4bit(self.packed, self._state)
        return F.conv2d(x, weight.to(x.dtype), bias, **self._convolution)


def _bitsandbytes() -> Any:
    """The library; MissingError, with the command that installs it, where it is absent."""
    try:
        with warnings.catch_warnings():  # its imports of torch's old names, 0.50
            warnings.simplefilter("ignore")
            import bitsandbytes
    except ImportError as error:
        raise MissingError(
            "NF4 layers run on bitsandbytes, which isn't installed: run "
            'pip install "kiln-diffusion[nf4]".'
        ) from error
    return bitsandbytes
