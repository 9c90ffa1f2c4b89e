"""What is done to a store's files and folders: flushed, made read-only, removed, measured."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["age_seconds", "children", "flush", "flush_folder", "make_read_only", "remove"]


def children(folder: Path) -> list[Path]:
    """What lies in a folder, sorted; nothing where there is none, also when it goes meanwhile."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def age_seconds(path: Path) -> float:
    """How long ago a file or folder was last written or touched; 0 where it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def flush(file: Path) -> None:
    """Have a file's bytes on the disk before anything says that they are there."""
    with file.open("rb+") as stream:  # Windows flushes only what is open for writing
        os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """The same for the names in a folder."""
    with suppress(OSError):  # Windows can't open a folder, and needs no flush for a rename
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_read_only(file: Path) -> None:
    """Mode 0444; not on Windows, which refuses to remove what is read-only."""
    if os.name != "nt":
        file.chmod(0o444)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it.

    What others remove at the same time, or hold open on Windows, is passed over.
    """
    for file in _files_first(path):
        with suppress(OSError):
            if stat.S_ISDIR(file.lstat().st_mode):
                file.rmdir()
            else:
                file.unlink()


def _files_first(path: Path) -> Iterator[Path]:
    """Everything at and beneath a path, a folder after what is in it; links aren't followed."""
    if path.is_dir() and not path.is_symlink():
        for folder, folders, files in os.walk(path, topdown=False):
            yield from (Path(folder) / name for name in (*files, *folders))
    yield path
