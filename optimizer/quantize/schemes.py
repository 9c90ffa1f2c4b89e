"""The schemes: how a layer's weight, and perhaps its input, is stored and rounded.

Pure data, one class each, without torch: a scheme is printed, hashed and stored in the manifest.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "KEEP",
    "W4A16",
    "W8A8",
    "W8A16",
    "Fp8",
    "Keep",
    "LlmInt8",
    "Nf4",
    "Nvfp4",
    "Scheme",
    "TorchaoInt8",
]

Shape = tuple[int, ...]
"""Of a weight: [out, in] or [out, in, height, width]."""


class _Scheme(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: ClassVar[int]
    """Of a stored weight, without its scales; 16 is what counts as not quantized."""
    calibrates: ClassVar[bool] = False
    """Whether activation ranges are needed: they are static."""

    @property
    def format(self) -> str:
        """What a backend must be able to read."""
        return str(self.kind)  # type: ignore[attr-defined]

    @property
    def label(self) -> str:
        """The scheme in a word, unique among those of one policy."""
        return self.format

    def fitted(self, shape: Shape) -> Scheme:  # noqa: ARG002
        """The scheme that a layer of this shape gets where it is asked for this one."""
        return self  # type: ignore[return-value]

    def stored_bytes(self, shape: Shape, float_bytes: int) -> int:
        """Of codes, scales and whatever else belongs to the weight."""
        return math.ceil(math.prod(shape) * self.bits / 8) + self._scales(shape) * float_bytes

    def _scales(self, shape: Shape) -> int:
        return shape[0]


class Keep(_Scheme):
    """The layer as it is, at the bundle's compute dtype."""

    bits: ClassVar[int] = 16
    kind: Literal["keep"] = "keep"

    def stored_bytes(self, shape: Shape, float_bytes: int) -> int:
        """Of the weight itself."""
        return math.prod(shape) * float_bytes


class _Int8Weights(_Scheme):
    """int8 weights, one scale an output channel; no calibrated scale rounds the input."""

    bits: ClassVar[int] = 8

    def fitted(self, shape: Shape) -> Scheme:
        """Inputs of convolutions aren't rounded as they come."""
        return W8A16() if len(shape) > 2 else self  # type: ignore[return-value]


class W8A16(_Int8Weights):
    """int8 weights; the input stays what it is, or is rounded as it comes."""

    kind: Literal["w8a16"] = "w8a16"
    dynamic: bool = False
    """A linear's input is rounded to int8 as it comes, a token's values with a scale of its own."""

    @property
    def format(self) -> str:
        """Backends differ in which of the variants they take."""
        return "w8a16-dynamic" if self.dynamic else "w8a16"


class LlmInt8(_Int8Weights):
    """A linear's input is rounded as it comes, but for columns with outliers, by bitsandbytes.

    Dettmers et al. 2022, "LLM.int8()", section 3.2.
    """

    kind: Literal["llm-int8"] = "llm-int8"


class TorchaoInt8(_Int8Weights):
    """What a dynamic W8A16 is, on torchao's tensors."""

    kind: Literal["torchao-int8-dyn"] = "torchao-int8-dyn"


class W8A8(_Scheme):
    """int8 weights, one scale an output channel; the input is rounded with one calibrated scale."""

    bits: ClassVar[int] = 8
    calibrates: ClassVar[bool] = True
    kind: Literal["w8a8"] = "w8a8"
    zero_point: bool = True
    """Round the input to uint8 with a zero point where that loses less than int8 without."""
    output: bool = False
    """Round the output to int8 too, so that the product it is a factor of can run in 8 bits."""


class W4A16(_Scheme):
    """4-bit weights, a scale for every `group` of them along the input axis."""

    bits: ClassVar[int] = 4
    kind: Literal["w4a16"] = "w4a16"
    group: Literal[16, 32, 64, 128] = 64
    symmetric: bool = True
    """Codes -7..7; else 0..15 around a zero point that each group has of its own."""
    rank: int = Field(default=0, ge=0, le=256)
    """Of the 16-bit correction of what rounding loses: two thin matrices beside the codes."""
    dynamic: bool = False
    """The runtime may round the input to 8 bits as it comes (OpenVINO's dynamic quantization)."""
    linears_only: bool = False
    """Convolutions get 8 bits, for backends that have no others in fewer."""

    @property
    def format(self) -> str:
        """Backends differ in which of the variants they take."""
        if self.dynamic:
            return "w4a16-dynamic"
        return "w4a16" if self.symmetric else "w4a16-zero-points"

    @property
    def label(self) -> str:
        """With the group, and what else is out of the ordinary."""
        more = ("" if self.symmetric else "z") + (f"-r{self.rank}" if self.rank else "")
        return f"w4a16-g{self.group}{more}" + ("-dyn" if self.dynamic else "")

    def fitted(self, shape: Shape) -> Scheme:
        """A smaller group where this one doesn't divide the inputs; 8 bits where not even 32 does.

        One scale for a whole row of 4-bit codes would lose 5 dB or more (FACTS.md, weight SQNR).
        """
        if self.linears_only and len(shape) > 2:
            return W8A16()
        smaller = [g for g in (128, 64, 32, 16) if g <= self.group and shape[1] % g == 0]
        if not smaller or (smaller[0] < 32 and self.group >= 32):
            return W8A16()
        rank = min(self.rank, shape[0], shape[1])
        return self.model_copy(update={"group": smaller[0], "rank": rank})

    def stored_bytes(self, shape: Shape, float_bytes: int) -> int:
        """Codes, scales, zero points of 4 bits, and the correction's two matrices."""
        zeros = 0 if self.symmetric else math.ceil(self._scales(shape) / 2)
        thin = self.rank * (shape[0] + math.prod(shape[1:]))
        return super().stored_bytes(shape, float_bytes) + zeros + thin * float_bytes

    def _scales(self, shape: Shape) -> int:
        return math.prod(shape) // self.group


class Fp8(_Scheme):
    """float8 e4m3 weights, one scale an output channel; the input is rounded with one scale."""

    bits: ClassVar[int] = 8
    calibrates: ClassVar[bool] = True
    kind: Literal["fp8"] = "fp8"


class Nf4(_Scheme):
    """QLoRA's 4-bit quantiles of a Gaussian, blocks of 64, as bitsandbytes stores them.

    Dettmers et al. 2023, "QLoRA", section 3.
    """

    bits: ClassVar[int] = 4
    kind: Literal["nf4"] = "nf4"

    def fitted(self, shape: Shape) -> Scheme:
        """8 bits where blocks of 64 don't divide the weight's rows."""
        return self if math.prod(shape[1:]) % 64 == 0 else W8A16()

    def stored_bytes(self, shape: Shape, float_bytes: int) -> int:  # noqa: ARG002
        """Codes, and the fp32 peak of each block."""
        return math.ceil(math.prod(shape) / 2) + 4 * (math.prod(shape) // 64)


class Nvfp4(_Scheme):
    """e2m1 weights, an e4m3 scale for 16 along the input axis, one fp32 scale over all.

    NVIDIA, "Introducing NVFP4" (2025), and ONNX's float4e2m1 type.
    """

    bits: ClassVar[int] = 4
    kind: Literal["nvfp4"] = "nvfp4"
    linears_only: bool = False
    """Convolutions get 8 bits, for backends that have no others in fewer."""

    def fitted(self, shape: Shape) -> Scheme:
        """8 bits where 16 doesn't divide the inputs."""
        if self.linears_only and len(shape) > 2:
            return W8A16()
        return self if shape[1] % 16 == 0 else W8A16()

    def stored_bytes(self, shape: Shape, float_bytes: int) -> int:  # noqa: ARG002
        """Codes, a byte a block, and the tensor's scale."""
        return math.ceil(math.prod(shape) / 2) + math.prod(shape) // 16 + 4


Scheme = Annotated[
    Keep | W8A16 | LlmInt8 | TorchaoInt8 | W8A8 | W4A16 | Fp8 | Nf4 | Nvfp4,
    Field(discriminator="kind"),
]

KEEP = Keep()
