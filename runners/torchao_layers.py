"""Layers on torchao's tensors; the one file that imports it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profiles.errors import MissingError

__all__ = ["TorchaoInt8Layer"]


class TorchaoInt8Layer(nn.Module):
    """A linear whose input is rounded to int8 as it comes, a scale a token, by torchao.

    `codes`: int8 [out, in]; `scale`: fp32 [out]. Raises MissingError without torchao.
    """

    weight: None = None  # as that of QuantizedLayer
    dynamic = True

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Make the library's tensor of the codes as they are."""
        super().__init__()
        self.register_buffer("codes", codes, persistent=False)
        self._weight = _int8_tensor(codes, scale)  # of the same memory
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """What QuantizedLayer does of this form."""
        return F.linear(x, self._weight, None if self.bias is None else self.bias.to(x.dtype))


def _int8_tensor(codes: Tensor, scale: Tensor) -> Any:
    try:
        from torchao.quantization import Int8Tensor, PerRow
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs
    except ImportError as error:
        raise MissingError(
            "Layers of torchao-int8-dyn run on torchao, which isn't installed: run "
            'pip install "kiln-diffusion[torchao]".'
        ) from error
    rounding_inputs = QuantizeTensorToInt8Kwargs(PerRow())
    block = [1, codes.shape[1]]
    return Int8Tensor(codes, scale[:, None], block, torch.float32, act_quant_kwargs=rounding_inputs)
