"""Equal files are on the disk once: an entry's file and `blobs/sha256/xx/<sha256>` are hard links.

A blob is a name for bytes that an entry holds as well, so losing one costs nothing but sharing, and
one that has no other name is garbage. Where the disk has no hard links, entries keep own copies.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from optimizer.digests import FileDigest, sha256_file
from optimizer.folders import children, flush_folder

__all__ = ["Blobs"]

_TRIES = 3


class Blobs:
    """The blobs beneath one folder."""

    def __init__(self, folder: Path) -> None:
        """Nothing is created yet."""
        self._folder = folder / "sha256"

    def path(self, sha256: str) -> Path:
        """Where the blob of a digest is, or would be."""
        return self._folder / sha256[:2] / sha256

    def share(self, file: Path, found: FileDigest, *, spare: Path) -> None:
        """Make `file`, whose digest is `found`, the same file as the blob of its bytes.

        `spare` is a name that nobody else uses, on the same disk. A blob with a wrong byte is
        replaced by `file`. Where linking fails, `file` stays as it is.
        """
        if found.size == 0:
            return
        blob = self.path(found.sha256)
        with suppress(OSError):
            blob.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(_TRIES):  # a blob may go while we look at it
                if _linked(file, blob):
                    flush_folder(blob.parent)
                    return
                with suppress(FileNotFoundError):
                    _exchange(file, blob, found, spare)
                    return

    def all(self) -> Iterator[Path]:
        """Every blob."""
        for folder in children(self._folder):
            yield from children(folder)

    def garbage(self) -> Iterator[Path]:
        """Every blob that no entry holds.

        Removing one is safe at any time: who links to it in that moment has the bytes.
        """
        for blob in self.all():
            with suppress(OSError):
                if blob.lstat().st_nlink <= 1:
                    yield blob


def _linked(file: Path, blob: Path) -> bool:
    """Whether `file` became the blob; not where there is one already."""
    try:
        os.link(file, blob)
    except FileExistsError:
        return False
    return True


def _exchange(file: Path, blob: Path, found: FileDigest, spare: Path) -> None:
    """Put the blob in the file's place; or the file in the blob's, where that has a wrong byte."""
    good = _has(blob, found)
    giver, taker = (blob, file) if good else (file, blob)
    try:
        os.link(giver, spare)
        spare.replace(taker)
    finally:
        with suppress(OSError):  # renaming a file to another name of its own leaves both
            spare.unlink()


def _has(blob: Path, found: FileDigest) -> bool:
    status = blob.lstat()
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_size == found.size
        and sha256_file(blob) == found.sha256
    )
