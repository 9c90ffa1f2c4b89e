"""Private folders beside a target: work in progress that nobody sees under the final name.

A folder carries its process in its name. What a dead process left can be taken over, or is swept.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = [
    "abandoned",
    "flush_file",
    "flush_folder",
    "flush_tree",
    "private_folder",
    "remove",
    "write_flushed",
]

_NAME = re.compile(r"\.(?P<stem>.+)\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.[0-9a-f]{8}\.kiln-part")
_KEEP_SECONDS = 7 * 24 * 3600
_at_work: set[Path] = set()


@contextmanager
def private_folder(
    parent: Path, stem: str, *, keep: Callable[[BaseException], bool] = lambda _: False
) -> Iterator[Path]:
    """A new folder of mode 0700 in `parent`, removed at the end.

    Where the block raises what `keep` says yes to, it stays for the next try.
    """
    parent.mkdir(parents=True, exist_ok=True)
    name = f".{stem}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.kiln-part"
    folder = parent.absolute() / name
    folder.mkdir(mode=0o700)
    _at_work.add(folder)
    kept = False
    try:
        yield folder
    except BaseException as error:
        kept = keep(error)
        raise
    finally:
        _at_work.discard(folder)
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def abandoned(parent: Path, stem: str) -> list[Path]:
    """Folders of `stem` whose process is gone; those that nobody took for a week are swept."""
    found = []
    for folder in sorted(parent.absolute().glob(".*.kiln-part")):
        match = _NAME.fullmatch(folder.name)
        if match is None or folder.is_symlink() or not folder.is_dir() or _is_alive(folder, match):
            continue
        if match["stem"] == stem and match["host"] == _host():
            found.append(folder)
            continue
        with suppress(OSError):
            if time.time() - folder.lstat().st_mtime > _KEEP_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
    return found


def _is_alive(folder: Path, match: re.Match[str]) -> bool:
    """Whether the folder's process is at work; one of another host is, as far as we know."""
    import psutil

    pid = int(match["pid"])
    if match["host"] == _host() and pid == os.getpid():
        return folder in _at_work
    return match["host"] == _host() and bool(psutil.pid_exists(pid))


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it, as far as it can be."""
    shutil.rmtree(folder, ignore_errors=True)


def write_flushed(path: Path, raw: bytes) -> None:
    """Put `raw` at `path` by one rename, on the disk before it is seen."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with fresh.open("xb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    flush_folder(path.parent)


def flush_tree(folder: Path) -> None:
    """Bring all files below `folder` to the disk, and then their names.

    All at once, at the end: the disk writes the first ones while later ones are still made.
    """
    every = list(folder.rglob("*"))
    for path in every:
        if path.is_file():
            flush_file(path)
    for path in (folder, *(path for path in every if path.is_dir())):
        flush_folder(path)


def flush_file(path: Path) -> None:
    """Bring a file to the disk."""
    flags = os.O_RDWR if os.name == "nt" else os.O_RDONLY  # Windows flushes what it may write
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk."""
    with suppress(OSError):  # Windows can't open a folder, and needs no flush for a rename
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
