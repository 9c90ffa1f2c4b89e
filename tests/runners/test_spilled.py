"""Maps in files, and attention that reads them a few places at a time."""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from runners import streamed_attention
from runners.spilled import Spilled
from runners.streamed_attention import attend


def test_tiles_are_read_as_they_were_written() -> None:
    whole = torch.randn(3, 7, 9)
    with closing(Spilled(7, 9, 3)) as kept:
        for top, left in ((0, 0), (0, 5), (4, 0), (4, 5)):
            kept.write(top, left, whole[:, top : top + 4, left : left + 5])
        assert torch.equal(kept.read(2, 3, 4, 5), whole[:, 2:6, 3:8])
        places = torch.cat([some for _, some in kept.places(10)])
        assert torch.equal(places, whole.flatten(1).T)


def test_no_file_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with closing(Spilled(4, 4, 2)) as kept:
        kept.write(0, 0, torch.ones(2, 4, 4))
    assert list(tmp_path.iterdir()) == []


def test_what_was_never_written_is_said() -> None:
    with closing(Spilled(4, 4, 2)) as kept, pytest.raises(OSError, match="hasn't been written"):
        kept.read(0, 0, 1, 1)


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with closing(Spilled(4, 4, 2)) as kept:
        kept.close()
        kept._file = open("/dev/full", "wb", buffering=0)  # noqa: PTH123, SIM115
        with pytest.raises(OSError, match="No space left") as caught:
            kept.write(0, 0, torch.ones(2, 4, 4))
    assert caught.value.filename == str(tmp_path)


@pytest.mark.parametrize("spread", [1.0, 30.0])  # the latter's largest scores come one by one
def test_attention_in_pieces_is_attention(monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    monkeypatch.setattr(streamed_attention, "_QUERIES", 10)
    monkeypatch.setattr(streamed_attention, "_KEYS", 7)
    query, key, value = (spread * torch.randn(8, 6, 5) for _ in range(3))
    maps = []
    for x in (query, key, value):
        maps.append(Spilled(6, 5, 8))
        maps[-1].write(0, 0, x)
    attend(*maps)
    tokens = (x.flatten(1).T[None] for x in (query, key, value))
    wanted = scaled_dot_product_attention(*tokens)[0].T.reshape(8, 6, 5)
    torch.testing.assert_close(maps[0].read(0, 0, 6, 5), wanted, rtol=1e-4, atol=1e-4)
    for each in maps:
        each.close()
