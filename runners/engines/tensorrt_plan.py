"""The first bytes of a TensorRT engine file: what it was built by and for, read without TensorRT.

NVIDIA documents no such header; magic, size and version were read off files of TensorRT-RTX 1.7 and
the mask off files for each architecture alone and for several (FACTS.md), so a file that has
another layout gives None and is judged by the library itself. A portable file's mask was 0x7e: all
of these but 7.5, and a bit whose meaning isn't known.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from runners.engines.base import Buffer

__all__ = ["HEADER_BYTES", "PlanHeader", "read_header"]

_MAGIC = b"vtrt"
HEADER_BYTES = 64
_SIZE_AT, _VERSION_AT, _MASK_AT = 16, 24, 32
_BITS = {"7.5": 0x1, "8.0": 0x2, "8.6": 0x4, "8.9": 0x8, "12.0": 0x10, "12.1": 0x20}


@dataclass(frozen=True)
class PlanHeader:
    """What an engine file says of itself."""

    size: int
    """Bytes of the whole file."""
    version: str
    """Of the library that built it: "1.7.1.116"."""
    capabilities: tuple[str, ...]
    """Compute capabilities that it runs on, those that are known here."""


def read_header(plan: Buffer) -> PlanHeader | None:
    """The header, or None where the bytes aren't laid out so."""
    head = bytes(plan[:HEADER_BYTES])
    if len(head) < HEADER_BYTES or not head.startswith(_MAGIC):
        return None
    (size,) = struct.unpack_from("<Q", head, _SIZE_AT)
    (mask,) = struct.unpack_from("<I", head, _MASK_AT)
    version = ".".join(str(part) for part in head[_VERSION_AT : _VERSION_AT + 4])
    return PlanHeader(
        size=size,
        version=version,
        capabilities=tuple(name for name, bit in _BITS.items() if mask & bit),
    )
