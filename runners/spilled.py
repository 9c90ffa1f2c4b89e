"""Numbers of a whole picture in a file: what is needed of them is read, so memory doesn't grow.

The file has no name, is read and written and never mapped (mapped pages count as the process's),
and lies in TMPDIR, else in /var/tmp where there is one: /tmp is memory on many machines.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Spilled"]

_LASTS = "/var/tmp"
_BYTES = 4


class Spilled:
    """A tensor [height, width, channels] of float32, whose rows and places are read and written.

    Where the disk is full, writing raises OSError (ENOSPC), which the command line explains.
    """

    def __init__(self, height: int, width: int, channels: int) -> None:
        """Make an empty one."""
        self.height, self.width, self.channels = height, width, channels
        self._file = tempfile.TemporaryFile(buffering=0, dir=_folder())  # noqa: SIM115

    def write(self, top: int, left: int, tile: Tensor) -> None:
        """Put [channels, rows, columns] there."""
        for row, line in enumerate(tile.permute(1, 2, 0)):
            self._put((top + row) * self.width + left, line)

    def read(self, top: int, left: int, rows: int, columns: int) -> Tensor:
        """What is there, [channels, rows, columns]."""
        lines = [self._get((top + row) * self.width + left, columns) for row in range(rows)]
        return torch.stack(lines).permute(2, 0, 1)

    def write_places(self, start: int, places: Tensor) -> None:
        """Put [places, channels] there, `start` places, row by row, from the beginning."""
        self._put(start, places)

    def places(self, count: int) -> Iterator[tuple[int, Tensor]]:
        """All places in order, up to so many at a time: where they begin, [places, channels]."""
        whole = self.height * self.width
        for start in range(0, whole, count):
            yield start, self._get(start, min(count, whole - start))

    def close(self) -> None:
        """Remove it."""
        self._file.close()

    def _put(self, start: int, places: Tensor) -> None:
        raw = places.to(torch.float32).contiguous().numpy().data.cast("B")
        self._file.seek(start * self.channels * _BYTES)
        try:
            while raw:
                raw = raw[self._file.write(raw) :]
        except OSError as error:
            folder = _folder() or tempfile.gettempdir()
            raise OSError(error.errno, error.strerror, folder) from error

    def _get(self, start: int, count: int) -> Tensor:
        found = torch.empty(count, self.channels)
        raw = found.numpy().data.cast("B")
        self._file.seek(start * self.channels * _BYTES)
        while raw:
            read = self._file.readinto(raw)
            if not read:
                raise OSError("a part of the picture was read that hasn't been written")
            raw = raw[read:]
        return found


def _folder() -> str | None:
    """None: Python's own choice."""
    if "TMPDIR" not in os.environ and Path(_LASTS).is_dir() and os.access(_LASTS, os.W_OK):
        return _LASTS
    return None
