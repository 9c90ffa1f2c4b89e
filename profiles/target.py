"""What engines are built for when the cards aren't here: `--target rtx-4090,sm86` or `portable`."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict

from profiles import gpu
from profiles.errors import SpecError

__all__ = ["SUPPORTED", "Target", "parse_target", "sm"]

SUPPORTED = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""The compute capabilities that TensorRT-RTX 1.7 builds for (its enumeration ComputeCapability)."""

_OTHERS = ("8.7", "9.0", "10.0", "10.3", "11.0")
"""The rest of NVIDIA's CUDA GPUs list (developer.nvidia.com/cuda-gpus): legal, for a backend that
builds for them. Older ones are on its legacy list, and no format of ours is for them."""

_PORTABLE = "portable"


class Target(BaseModel):
    """One or several architectures that the same engines are to run on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """What the user wrote: lower case, parts joined by commas without blanks, none twice."""
    capabilities: tuple[str, ...]
    """Compute capabilities, "8.6", ascending, none twice; empty: portable, whatever the backend
    means by that."""
    memory_gib: float | None
    """GiB of the smallest card where every part names a card, else None."""


def parse_target(text: str) -> Target:
    """Parse names of cards and architectures ("sm86") separated by commas, or "portable" alone.

    Raises `SpecError` naming the part that is wrong, with the nearest names for an unknown one.
    """
    parts = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",")))
    if parts == (_PORTABLE,):
        return Target(name=_PORTABLE, capabilities=(), memory_gib=None)
    if _PORTABLE in parts:
        raise SpecError(
            f"The target {text!r} names {_PORTABLE} among others: use {_PORTABLE} alone, or name "
            "the cards and architectures only."
        )
    cards = tuple(gpu.load(part) for part in parts if part in gpu.names())
    found = {card.capability for card in cards}
    found.update(_capability(part) for part in parts if part not in gpu.names())
    return Target(
        name=",".join(parts),
        capabilities=tuple(sorted(found, key=gpu.numbers)),
        memory_gib=min(card.memory_gib for card in cards) if len(cards) == len(parts) else None,
    )


def sm(capability: str) -> str:
    """Return NVIDIA's short name of a compute capability: "8.6" is "sm86", "12.0" is "sm120"."""
    major, minor = gpu.numbers(capability)
    return f"sm{major}{minor}"


def _capability(part: str) -> str:
    """Return "8.6" for "sm86": the last digit is the minor number."""
    match = re.fullmatch(r"sm([0-9]+)([0-9])", part)
    capability = f"{match[1]}.{match[2]}" if match else ""
    if capability in SUPPORTED or capability in _OTHERS:
        return capability
    known = (*gpu.names(), *map(sm, SUPPORTED), _PORTABLE)
    raise SpecError(
        f"The target's part {part!r} is neither a card that `kiln profiles` lists nor an "
        f"architecture such as sm86{gpu.nearest(part, known)}: name one or several, separated by "
        f"commas, or {_PORTABLE} alone."
    )
