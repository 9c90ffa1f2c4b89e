"""Files of a bundle, written while they are hashed: wrong bytes never get a final name."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Protocol

from profiles.errors import BundleError
from runners.fetching import CHUNK, Chunk
from runners.files import opened
from runners.manifest import FileEntry

__all__ = ["Source", "hash_and_link", "write_verified"]

_PIECE = 1 << 24
"""Bytes that the system copies at a time."""
_COPIED_FROM = 1 << 20
"""Bytes: smaller files are streamed."""
_CANNOT = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
"""What systems and network shares answer that can't copy from one file to another."""


class Source(Protocol):
    """Where one file's bytes come from."""

    def advance(self, count: int, /) -> None:
        """Hear that so many bytes more were copied."""

    def stream(self, start: int) -> Iterator[Chunk]:
        """The bytes from `start` on."""

    def descriptor(self) -> AbstractContextManager[int | None]:
        """The open file, where it is one of this machine's."""


def write_verified(target: Path, entry: FileEntry, source: Source, *, name: str) -> int:
    """Write `target` from `source`, not yet flushed; how many bytes were taken from it.

    What `target` holds already of an earlier try is kept if the whole then has the right digest,
    and fetched again if it hasn't. Raises BundleError, and removes it, where the bytes are wrong.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = target.stat().st_size if target.exists() else 0
    if 0 < kept <= entry.size and _write(target, kept, source, entry.size) == entry.sha256:
        return entry.size - kept
    if entry.size >= _COPIED_FROM and _copy(target, source, entry.size) == entry.sha256:
        return entry.size
    if _write(target, 0, source, entry.size) == entry.sha256:
        return entry.size
    target.unlink()
    raise BundleError(f"{name} has other bytes than were signed: it is damaged; pack it again.")


def _copy(target: Path, source: Source, size: int) -> str | None:
    """Let the system copy the file (by reference on Btrfs and XFS), and hash what it wrote.

    None where it can't. While one piece is hashed the next ones are copied.
    """
    sizes = [min(_PIECE, size - start) for start in range(0, size, _PIECE)]
    with source.descriptor() as given, target.open("wb") as file, ThreadPoolExecutor(1) as pool:
        if given is None or not hasattr(os, "copy_file_range"):
            return None
        copied = [pool.submit(_copy_piece, given, file.fileno(), one) for one in sizes]
        digest = hashlib.sha256()
        try:
            with target.open("rb", buffering=0) as written:
                for one, work in zip(sizes, copied, strict=True):
                    if work.result() != one:
                        return None
                    source.advance(one)
                    for _ in range(0, one, CHUNK):
                        digest.update(written.read(CHUNK))
        except OSError as error:
            if error.errno in _CANNOT:
                return None
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return digest.hexdigest()


def _copy_piece(source: int, target: int, count: int) -> int:
    """Copy `count` bytes on from where both files are; how many it were."""
    copy, left = getattr(os, "copy_file_range"), count  # noqa: B009 (Linux alone has it)
    while left and (got := copy(source, target, left)):
        left -= got
    return count - left


def _write(target: Path, kept: int, source: Source, size: int) -> str:
    """Append what comes after `kept` bytes; the digest of the whole file, "" for another size."""
    digest = hashlib.sha256()
    with target.open("r+b" if kept else "wb", buffering=0) as file:
        while kept and (piece := file.read(CHUNK)):
            digest.update(piece)
        for chunk in source.stream(kept):
            digest.update(chunk)
            _write_all(file.fileno(), chunk)
        return digest.hexdigest() if file.tell() == size else ""


def _write_all(descriptor: int, chunk: Chunk) -> None:
    left = memoryview(chunk)
    while left:
        left = left[os.write(descriptor, left) :]


def hash_and_link(folder: Path, name: str, target: Path, entry: FileEntry) -> bool:
    """Give the file `name` below `folder` the name `target` too, if its bytes are the entry's.

    A hard link where the disk has them: versions then share unchanged weights. The file that was
    hashed is the one that is linked, else nothing is.
    """
    with suppress(OSError, BundleError), opened(folder, name) as descriptor:
        digest = hashlib.sha256()
        while piece := os.read(descriptor, CHUNK):
            digest.update(piece)
        if digest.hexdigest() != entry.sha256:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / name, target, follow_symlinks=False)
        if os.path.samestat(target.lstat(), os.fstat(descriptor)):
            return True
        target.unlink()
    return False
