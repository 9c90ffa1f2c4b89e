"""Graphics cards: a TOML file each with the published numbers and where each comes from."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from profiles.errors import SpecError
from profiles.toml_file import parse_toml

__all__ = [
    "PEAKS",
    "SINCE",
    "Gpu",
    "lacking",
    "load",
    "names",
    "nearest",
    "numbers",
    "of_card",
    "parse",
]

SINCE = {
    "fp16": "7.5",
    "bf16": "8.0",
    "w8a8": "7.5",
    "w8a16": "8.0",
    "w4a16": "8.0",
    "fp8": "8.9",
    "nvfp4": "12.0",
}
"""Format -> the first compute capability that has it; every card computes fp32.

docs.nvidia.com, TensorRT-RTX: 7.5 (Turing) is the first that it builds for (CPU-Only AOT); bf16
since Ampere and fp8 since Ada (support matrix of 1.5); FP4 since Blackwell (Working with Quantized
Types), of which 12.0 is the first among the cards here, though the data centre's 10.0 has it too.
Turing has int8 tensor cores, but that matrix says No to weights of 8 or 4 bits alone on 7.5 and
doesn't list w8a8: what is quantized was not run on 7.5.
"""

PEAKS = ("fp32", "fp16", "bf16", "int8", "fp8", "fp4")
"""The types whose peaks a file may give, in the order in which they are shown."""

_Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_SOURCED = frozenset({"capability", "memory_gib", "bandwidth_gb_s", "peak"})
_FOLDER = Path(__file__).parent / "gpu"
_TOLERANCE = 0.12
"""How far a card's memory may be from its file's: ECC takes 6 % (the data sheets of the RTX A
series), the driver 1 to 2 %; variants of one name differ by 17 % (10 and 12 GB) or more."""


class Gpu(BaseModel):
    """One card, or one memory variant of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """The file's own name without its ending."""
    description: str
    """The card in words, with its architecture and chip."""
    cards: tuple[str, ...] = Field(min_length=1)
    """What the driver calls it; memory variants share one of these."""
    capability: str = Field(pattern=r"^[1-9][0-9]?\.[0-9]$")
    """CUDA's compute capability, "8.6"; compare the `numbers` of it, never the text."""
    memory_gib: _Positive
    """Memory as it is sold, in GiB (where that is decimal, as the driver counts it); the driver
    reports up to 6 % less."""
    bandwidth_gb_s: _Positive
    """Bandwidth of the memory in 10^9 bytes a second."""
    peak: dict[str, _Positive]
    """Type of `PEAKS` -> 10^12 dense operations a second, with fp32 sums (int32 for int8); fp32 is
    without tensor cores. fp16 is always there; a type that is absent has no tensor cores."""
    sources: dict[str, str]
    """Where capability, memory_gib, bandwidth_gb_s and peak each come from."""

    @field_validator("peak")
    @classmethod
    def _known_peak(cls, value: dict[str, float]) -> dict[str, float]:
        if unknown := sorted(value.keys() - PEAKS):
            raise ValueError(f"unknown types {unknown}; known: {', '.join(PEAKS)}")
        if "fp16" not in value:
            raise ValueError("needs fp16, which the others are compared with")
        return value

    @field_validator("sources")
    @classmethod
    def _complete_sources(cls, value: dict[str, str]) -> dict[str, str]:
        if value.keys() != _SOURCED or not all(value.values()):
            raise ValueError(f"needs a source for each of {', '.join(sorted(_SOURCED))}")
        return value

    @property
    def formats(self) -> tuple[str, ...]:
        """The legal formats of quantized layers and of the rest, in the order of `SINCE`."""
        return tuple(name for name in SINCE if not lacking((self.capability,), name))

    @property
    def fast(self) -> tuple[str, ...]:
        """The types that do more operations a second than fp16 does, in the order of `PEAKS`."""
        return tuple(name for name in PEAKS if self.peak.get(name, 0.0) > self.peak["fp16"])


def numbers(capability: str) -> tuple[int, int]:
    """Return a compute capability as numbers that compare rightly: "12.0" is after "8.9"."""
    major, minor = capability.split(".")
    return int(major), int(minor)


def lacking(capabilities: Iterable[str], format_: str) -> tuple[str, ...]:
    """Return those of the compute capabilities that lack a format, in their order.

    Raises `SpecError` for a format that isn't in `SINCE`.
    """
    if format_ not in SINCE:
        raise SpecError(f"No format of cards is called {format_!r}: use one of {', '.join(SINCE)}.")
    first = numbers(SINCE[format_])
    return tuple(capability for capability in capabilities if numbers(capability) < first)


def names() -> tuple[str, ...]:
    """Return the names of all cards' files, sorted."""
    return tuple(sorted(_paths()))


def load(name: str) -> Gpu:
    """Return the card of this name.

    Raises `SpecError` with the nearest names for an unknown one.
    """
    path = _paths().get(name)
    if path is None:
        near = nearest(name, names())
        raise SpecError(f"No card is called {name!r}{near}: `kiln profiles` lists them all.")
    return _read(path)


def of_card(device_name: str, memory_bytes: int) -> Gpu | None:
    """Return what is known of a live card, None for an unknown one.

    `device_name` is the driver's own and must be equal; of several variants of that name the one
    whose memory is nearest is taken, and none that is off by more than 12 %.
    """
    gib = memory_bytes / 2**30
    variants = (gpu for gpu in map(load, names()) if device_name in gpu.cards)
    best = min(variants, key=lambda gpu: abs(gpu.memory_gib - gib), default=None)
    if best is None or abs(best.memory_gib - gib) > _TOLERANCE * best.memory_gib:
        return None
    return best


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " (nearest: a, b, c)" of the known names most like `name`, "" where none is."""
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    return f" (nearest: {', '.join(near)})" if near else ""


def parse(text: str, *, name: str) -> Gpu:
    """Parse a card's file strictly; `name` is what it is called and must be said in it too.

    Raises `SpecError` naming every wrong entry.
    """
    return parse_toml(Gpu, text, what="card", name=name)


@cache
def _paths() -> dict[str, Path]:
    return {path.stem: path for path in _FOLDER.glob("*.toml")}


@cache
def _read(path: Path) -> Gpu:
    return parse(path.read_text(encoding="utf-8"), name=path.stem)
