"""Headers of safetensors files: names, shapes and types without reading a weight, without torch.

The format is 8 bytes of header length, a JSON header, and the tensors' bytes without a gap
(its specification: the README of the safetensors repository).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from profiles.errors import SpecError

__all__ = ["Parameter", "read_header"]

_HEADER_LIMIT = 100_000_000
"""Bytes; the safetensors library refuses longer headers too."""

_TYPES = {
    "F64": ("fp64", 64),
    "F32": ("fp32", 32),
    "F16": ("fp16", 16),
    "BF16": ("bf16", 16),
    "F8_E4M3": ("fp8_e4m3", 8),
    "F8_E5M2": ("fp8_e5m2", 8),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
}


class Parameter(NamedTuple):
    """One tensor of a file."""

    shape: tuple[int, ...]
    dtype: str
    """As kiln names types: fp32, bf16, fp16, int64, ..."""


def read_header(path: Path) -> dict[str, Parameter]:
    """Return every tensor of a safetensors file by its name.

    Raises `SpecError` when the file is truncated, damaged, or no safetensors file at all.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version " or size < 8:
            raise SpecError(_explain_no_weights(path, size, is_pointer=size >= 8))
        if length > _HEADER_LIMIT:
            raise SpecError(f"{path} is no safetensors file: its first bytes are {start!r}")
        header = file.read(length)
    if len(header) < length:
        raise SpecError(_truncated(path, expected=8 + length, size=size))
    try:
        tensors: dict[str, Any] = json.loads(header)
        tensors.pop("__metadata__", None)
        parameters = {name: _parameter(entry) for name, entry in tensors.items()}
        ends = [entry["data_offsets"][1] for entry in tensors.values()]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise SpecError(
            f"{path} is damaged: its header cannot be read ({error}); download it again"
        ) from error
    expected = 8 + length + max(ends, default=0)
    if expected > size:
        raise SpecError(_truncated(path, expected=expected, size=size))
    return parameters


def _parameter(entry: dict[str, Any]) -> Parameter:
    if entry["dtype"] not in _TYPES:
        raise ValueError(f"unknown type {entry['dtype']!r}")
    dtype, bits = _TYPES[entry["dtype"]]
    shape = tuple(int(side) for side in entry["shape"])
    begin, end = entry["data_offsets"]
    if 8 * (end - begin) != math.prod(shape) * bits:
        raise ValueError(f"shape {shape} in {dtype} does not fill {end - begin} bytes")
    return Parameter(shape, dtype)


def _truncated(path: Path, *, expected: int, size: int) -> str:
    return (
        f"{path} is truncated: its header promises {expected} bytes and it has {size}; "
        "download it again"
    )


def _explain_no_weights(path: Path, size: int, *, is_pointer: bool) -> str:
    if is_pointer:
        return f"{path} is a Git LFS pointer and not the weights: run `git lfs pull` in its folder"
    return f"{path} is truncated: it has {size} bytes; download it again"
