"""The tensors of a safetensors file, as views of bytes that were verified."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from profiles.errors import BundleError
from runners.engines.base import Buffer

__all__ = ["read_tensors"]

_DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def read_tensors(raw: Buffer) -> dict[str, Tensor]:
    """The tensors of a safetensors file as views of the very bytes; BundleError for another file.

    The library's own loader copies them, and weights in a mapping needn't be in memory twice.
    """
    if not len(raw):
        return {}
    view = memoryview(raw)
    try:
        start = 8 + int.from_bytes(view[:8], "little")
        header = json.loads(bytes(view[8:start]))
        header.pop("__metadata__", None)
        return {name: _view(raw, start, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BundleError(f"The engine's weights can't be read: {error}.") from error


def _view(raw: Buffer, start: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, (low, high) = _DTYPES[entry["dtype"]], entry["data_offsets"]
    if not 0 <= low <= high <= len(raw) - start:
        raise ValueError("a tensor lies outside of the file")
    if low == high:
        return torch.empty(entry["shape"], dtype=dtype)
    count = (high - low) // dtype.itemsize
    writable: Any = bytearray(raw) if isinstance(raw, bytes) else raw
    return torch.frombuffer(writable, dtype=dtype, count=count, offset=start + low).view(
        entry["shape"]
    )
