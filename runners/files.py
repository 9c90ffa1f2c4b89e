"""Files of a bundle: opened without following links, held so that no swap reaches a loader."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from profiles.errors import BundleError, KilnError, OutOfMemory
from runners import receipts
from runners.engines.base import Buffer
from runners.manifest import FileEntry

__all__ = [
    "MAPPED_FROM",
    "check_file",
    "mapped",
    "opened",
    "read_optional",
    "verified_buffer",
]

_CHUNK = 1 << 22
MAPPED_FROM = 64 << 20
"""Bytes: smaller files are copied into private memory, larger ones mapped where that is safe."""

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_FLAGS = (
    os.O_RDONLY
    | _NOFOLLOW
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)  # a pipe would wait for a writer
)
_WALKS = bool(_NOFOLLOW) and os.open in os.supports_dir_fd
"""Whether this system opens a path part by part from an open folder."""


def verified_buffer(
    folder: Path, name: str, entry: FileEntry, *, private: bool, always_hash: bool = False
) -> Buffer:
    """The bytes of `name` below `folder`; BundleError unless they are what `entry` says.

    What was hashed is what is returned: the file is opened once, and another one put in its place
    is never seen. A mapping would still show what is written into the very same file, so `private`
    (for code), small files and those that another user may write are copied into memory of this
    process first; a large file that only its owner, who runs this, can write is mapped. One of
    these that hasn't changed since it was last hashed isn't hashed again, unless `always_hash`.
    """
    with opened(folder, name) as file:
        facts = os.fstat(file)
        _require((facts.st_size, entry.sha256), entry, folder, name)  # before gigabytes are read
        if private or facts.st_size < MAPPED_FROM or _others_write(facts):
            buffer, digest = _copied(file, entry.size)
        else:
            buffer = mmap.mmap(file, entry.size, access=mmap.ACCESS_COPY)
            digest = _digest(file, buffer, facts, always_hash=always_hash)
    _require((entry.size, digest), entry, folder, name)
    return buffer


def mapped(path: Path) -> mmap.mmap:
    """A file of this machine's own cache, mapped as a bundle's large files are."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def check_file(folder: Path, name: str, entry: FileEntry) -> None:
    """Hash `name` below `folder`, a piece at a time; BundleError unless it is what `entry` says."""
    digest, size = hashlib.sha256(), 0
    with opened(folder, name) as file:
        while piece := os.read(file, _CHUNK):
            digest.update(piece)
            size += len(piece)
    _require((size, digest.hexdigest()), entry, folder, name)


def read_optional(folder: Path, name: str, *, limit: int) -> bytes | None:
    """A small file's bytes, None where it is absent; BundleError for a link or over `limit`."""
    raw = b""
    try:
        with _plain(folder, name) as file:
            while len(raw) <= limit and (piece := os.read(file, _CHUNK)):
                raw += piece
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(folder, name, error) from error
    if len(raw) > limit:
        raise BundleError(
            f"{name} of {folder} is larger than {limit} bytes, which none is: refused; copy the "
            "bundle again."
        )
    return raw


@contextmanager
def opened(folder: Path, name: str) -> Iterator[int]:
    """The descriptor of the plain file `name` below `folder`, none of whose parts is a link.

    `folder` itself may be reached by one: the user named it. Raises BundleError for a link, for
    what is no file (a folder, a device, a pipe) and for what can't be read.
    """
    try:
        with _plain(folder, name) as file:
            yield file
    except OSError as error:
        raise _unreadable(folder, name, error) from error


def _unreadable(folder: Path, name: str, error: OSError) -> KilnError:
    if error.errno == errno.ENOMEM:
        return OutOfMemory(
            f"{name} in {folder} needs more memory than is free: close other programs."
        )
    return BundleError(
        f"{name} in {folder} can't be read ({error.strerror}): copy or compile it again."
    )


@contextmanager
def _plain(folder: Path, name: str) -> Iterator[int]:
    """As `opened`, with the system's own errors."""
    file = _walked(folder, name) if _WALKS else _checked(folder, name)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise BundleError(
                f"{name} in {folder} can't be read (it is no plain file): copy or compile it again."
            )
        yield file
    finally:
        os.close(file)


def _walked(folder: Path, name: str) -> int:
    """Open part by part, each from the folder before it: no part can become a link in between."""
    *parents, last = name.split("/")
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parents:
            below = _at(here, part, _FLAGS | os.O_DIRECTORY, folder, name)
            os.close(here)
            here = below
        return _at(here, last, _FLAGS, folder, name)
    finally:
        os.close(here)


def _at(here: int, part: str, flags: int, folder: Path, name: str) -> int:
    try:
        return os.open(part, flags, dir_fd=here)
    except OSError:
        with suppress(OSError):
            if stat.S_ISLNK(os.stat(part, dir_fd=here, follow_symlinks=False).st_mode):
                raise _link(folder, name) from None
        raise


def _checked(folder: Path, name: str) -> int:
    """Where nothing opens relative to a folder: the opened file is the one that is no link."""
    path = folder
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise _link(folder, name)
    file = os.open(path, _FLAGS)
    if not os.path.samestat(os.fstat(file), path.lstat()):
        os.close(file)
        raise _link(folder, name)
    return file


def _link(folder: Path, name: str) -> BundleError:
    return BundleError(f"{name} in {folder} is a link: a bundle holds plain files only.")


def _others_write(facts: os.stat_result) -> bool:
    """Whether another user than this process's, and root, may write the file."""
    if not hasattr(os, "geteuid"):
        return False
    mine = getattr(os, "geteuid")()  # noqa: B009 (not on Windows)
    return facts.st_uid not in {0, mine} or bool(facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _copied(file: int, size: int) -> tuple[Buffer, str]:
    """The file's first `size` bytes in this process's own memory, and their digest there."""
    if not size:
        return b"", hashlib.sha256().hexdigest()
    buffer = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)  # writable, as OpenVINO wants
    digest = hashlib.sha256()
    with FileIO(file, closefd=False) as stream, memoryview(buffer) as view:
        start = 0
        while start < size:
            with view[start : start + _CHUNK] as piece:
                got = stream.readinto(piece)
                digest.update(piece[:got])
            if not got:
                break
            start += got
    return buffer, digest.hexdigest()


def _digest(file: int, buffer: Buffer, before: os.stat_result, *, always_hash: bool) -> str:
    """Of the mapped file: from its receipt, else hashed and noted."""
    if not always_hash and (known := receipts.known(before)) is not None:
        return known
    digest, after = _sha256(buffer), os.fstat(file)
    _untouch(buffer)
    if receipts.same_state(before, after):
        receipts.note(before, digest)
    return digest


def _untouch(buffer: Buffer) -> None:
    """Let go of a mapping's pages that hashing has touched: they come back from the system's cache
    when an engine reads them, and count for nothing before.
    """
    if isinstance(buffer, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        buffer.madvise(mmap.MADV_DONTNEED)


def _sha256(buffer: Buffer) -> str:
    digest = hashlib.sha256()
    with memoryview(buffer) as view:
        for start in range(0, len(view), _CHUNK):
            digest.update(view[start : start + _CHUNK])
    return digest.hexdigest()


def _require(found: tuple[int, str], entry: FileEntry, folder: Path, name: str) -> None:
    if found != (entry.size, entry.sha256):
        raise BundleError(
            f"{name} in {folder} isn't what the manifest says (digest differs): the bundle is "
            "damaged; copy or compile it again."
        )
