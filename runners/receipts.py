"""What a file's sha256 was when it was last hashed: gigabytes aren't hashed at each start.

A receipt lies in the user's cache and holds for one state of one file: device, inode, size, and
the times of its last change, which the system keeps (writing back an old time changes st_ctime).
It counts for 30 days, so that bytes which a disk loses without any write are found as well.

    <cache>/receipts/xx/<name>    one small file each, written at once and never changed in place

So any number of processes write and are killed; a receipt that was cut short is none.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path

__all__ = ["FOLDER", "KEEP_SECONDS", "cache_root", "known", "note", "same_state", "sha256_of"]

FOLDER = "receipts"
"""Of receipts, in the cache folder."""

KEEP_SECONDS = 30 * 24 * 3600
"""How long a receipt counts."""

_RACY_NS = 2_000_000_000
"""A file that changed so recently may change again within the same tick of its times; FAT's, the
coarsest, are 2 s."""

_HAS_CHANGE_TIME = os.name != "nt"
"""On Windows st_ctime is the time of creation: a changed file can look unchanged there."""


def cache_root() -> Path:
    """$KILN_CACHE, else the user's cache directory."""
    import platformdirs

    given = os.environ.get("KILN_CACHE")
    return (
        Path(given).expanduser() if given else platformdirs.user_cache_path("kiln", appauthor=False)
    )


def sha256_of(file: int | str | Path, *, always: bool) -> str:
    """The sha256 of a file, given as a path or open for reading, as 64 hex digits.

    From its receipt where there is one, unless `always`; otherwise hashed, from the first byte, and
    noted. A descriptor's position is left as it was.
    """
    descriptor = file if isinstance(file, int) else os.open(file, os.O_RDONLY | _BINARY)
    try:
        before = os.fstat(descriptor)
        if not always and (found := known(before)) is not None:
            return found
        sha256 = _hashed(descriptor)
        if same_state(before, os.fstat(descriptor)):
            note(before, sha256)
        return sha256
    finally:
        if not isinstance(file, int):
            os.close(descriptor)


_BINARY = getattr(os, "O_BINARY", 0)


def known(status: os.stat_result) -> str | None:
    """The sha256 of the file that `status` is of, if it was noted in this very state."""
    if not _HAS_CHANGE_TIME:
        return None
    path = _receipt(status)
    try:
        if time.time() - path.stat().st_mtime > KEEP_SECONDS:
            return None
        document = json.loads(path.read_bytes())
        state, sha256, check = document
    except (OSError, ValueError, TypeError):
        return None
    if state != _state(status) or check != _check(state, sha256):
        return None
    return str(sha256)


def note(status: os.stat_result, sha256: str) -> None:
    """Keep what a file's bytes were while it was in the state that `status` says.

    `status` must have been taken before they were read, and be the same after. A file that changed
    within the last two seconds gets no receipt. A cache that can't be written is no error here.
    """
    newest = max(status.st_mtime_ns, status.st_ctime_ns)
    regular = stat.S_ISREG(status.st_mode)
    if not (_HAS_CHANGE_TIME and regular) or time.time_ns() - newest < _RACY_NS:
        return
    state = _state(status)
    path = _receipt(status)
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh.write_text(json.dumps([state, sha256, _check(state, sha256)]), "utf-8")
        fresh.replace(path)
    except OSError:
        with suppress(OSError):
            fresh.unlink()


def same_state(before: os.stat_result, after: os.stat_result) -> bool:
    """Whether both are of one file that nobody has changed in between."""
    return _state(before) == _state(after)


def _state(status: os.stat_result) -> list[int]:
    return [
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    ]


def _receipt(status: os.stat_result) -> Path:
    """One for each file: a newer state replaces the older one's."""
    name = hashlib.sha256(f"{status.st_dev} {status.st_ino}".encode()).hexdigest()[:32]
    return cache_root() / FOLDER / name[:2] / name


def _check(state: object, sha256: object) -> str:
    return hashlib.sha256(json.dumps([state, sha256]).encode()).hexdigest()


def _hashed(descriptor: int) -> str:
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False, buffering=0) as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    os.lseek(descriptor, position, os.SEEK_SET)
    return sha256
