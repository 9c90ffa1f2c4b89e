"""The header of an engine file, read without the library."""

from __future__ import annotations

import struct

import pytest

from runners.engines.tensorrt_plan import read_header


def plan(*, size: int = 128, mask: int = 0x1C) -> bytes:
    head = bytearray(size)
    head[:4] = b"vtrt"
    struct.pack_into("<Q", head, 16, size)
    head[24:28] = bytes([1, 7, 1, 116])
    struct.pack_into("<I", head, 32, mask)
    return bytes(head)


def test_size_version_and_cards_are_read() -> None:
    header = read_header(plan())
    assert header is not None
    assert (header.size, header.version) == (128, "1.7.1.116")
    assert header.capabilities == ("8.6", "8.9", "12.0")


def test_bits_that_nobody_knows_are_left_out() -> None:
    header = read_header(plan(mask=0x7E))
    assert header is not None
    assert header.capabilities == ("8.0", "8.6", "8.9", "12.0", "12.1")


@pytest.mark.parametrize("raw", [b"", b"vtrt", b"ftrt" + bytes(124), plan()[:63]])
def test_other_bytes_have_none(raw: bytes) -> None:
    assert read_header(raw) is None
