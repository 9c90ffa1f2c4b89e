"""Files of a bundle, written while they are hashed: wrong bytes never get a final name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from profiles.errors import BundleError
from runners.fetching import CHUNK, Chunk
from runners.files import opened
from runners.manifest import FileEntry

__all__ = ["hash_and_link", "write_verified"]

_FLUSH = 64 << 20
"""Bytes that are flushed at a time."""


def write_verified(
    target: Path, entry: FileEntry, stream: Callable[[int], Iterator[Chunk]], *, name: str
) -> int:
    """Write `target` from `stream(start)`, flushed to the disk; how many bytes were taken from it.

    What `target` holds already of an earlier try is kept if the whole then has the right digest,
    and fetched again if it hasn't. Raises BundleError, and removes it, where the bytes are wrong.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = target.stat().st_size if target.exists() else 0
    if kept > entry.size:
        target.unlink()
        kept = 0
    if _write(target, kept, stream(kept), entry.size) == entry.sha256:
        return entry.size - kept
    target.unlink()
    if kept and _write(target, 0, stream(0), entry.size) == entry.sha256:
        return entry.size
    target.unlink(missing_ok=True)
    raise BundleError(f"{name} has other bytes than were signed: it is damaged; pack it again.")


def _write(target: Path, kept: int, chunks: Iterator[Chunk], size: int) -> str:
    """Append `chunks` after `kept` bytes; the digest of the whole file, "" for another size.

    The disk is busy from the first megabytes on: they are flushed while later ones are hashed.
    """
    digest, unflushed = hashlib.sha256(), 0
    with target.open("r+b" if kept else "wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        while kept and (piece := file.read(CHUNK)):
            digest.update(piece)
        flushed = []
        for chunk in chunks:
            digest.update(chunk)
            _write_all(file.fileno(), chunk)
            unflushed += len(chunk)
            if unflushed >= _FLUSH:
                flushed.append(pool.submit(os.fsync, file.fileno()))
                unflushed = 0
        for one in flushed:
            one.result()
        os.fsync(file.fileno())
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
