"""Two IRs over one file of constants: what the second has and the first has too is stored once."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

__all__ = ["share_weights"]

_ALIGNMENT = 64
"""Bytes, of what is appended: a cache line, as OpenVINO aligns its own buffers."""


def share_weights(graph: bytes, own: Path, first: bytes, weights: Path) -> bytes:
    """The IR `graph` with its constants in `weights`, the file of the IR `first`.

    `own` is the file that `graph` refers to so far. Constants that aren't in `weights` yet are
    appended to it, so `first` stays as it is.
    """
    root = ElementTree.fromstring(graph)
    known: dict[bytes, int] = {}
    with weights.open("r+b") as target, own.open("rb") as source:
        end = target.seek(0, 2)
        if end:
            with mmap.mmap(target.fileno(), end, access=mmap.ACCESS_READ) as there:
                for data in _constants(ElementTree.fromstring(first)):
                    start, size = _place(data)
                    known.setdefault(_digest(there[start : start + size]), start)
        for data in _constants(root):
            start, size = _place(data)
            source.seek(start)
            values = source.read(size)
            digest = _digest(values)
            if digest not in known:
                known[digest] = _append(target, values)
            data.set("offset", str(known[digest]))
    found: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return found


def _constants(root: ElementTree.Element) -> Iterator[ElementTree.Element]:
    for layer in root.iter("layer"):
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None and data.get("offset") is not None:
            yield data


def _place(data: ElementTree.Element) -> tuple[int, int]:
    return int(data.attrib["offset"]), int(data.attrib["size"])


def _digest(values: bytes) -> bytes:
    return hashlib.sha256(values).digest()


def _append(target: BinaryIO, values: bytes) -> int:
    end = target.seek(0, 2)
    start = -(-end // _ALIGNMENT) * _ALIGNMENT
    target.write(bytes(start - end))
    target.write(values)
    return start
