"""A disk that is full, or would be: recognised, and said with the fix."""

from __future__ import annotations

import errno
from pathlib import Path

from profiles.errors import DiskFullError
from profiles.hardware import free_disk_bytes

__all__ = ["bytes_under", "check_free", "disk_full", "means_disk_full"]


def means_disk_full(error: BaseException | None) -> bool:
    """Whether the disk being full is what an error, or one of its causes, says.

    Libraries that write through native code (safetensors, OpenVINO) give it only as text.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "no space left on device" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def check_free(folder: Path, needed_bytes: int | None) -> None:
    """Raise `DiskFullError` where less than `needed_bytes` are free."""
    free = free_disk_bytes(folder)
    if needed_bytes is not None and needed_bytes > free:
        raise DiskFullError(
            f"the disk of {folder} has {_gib(free)} free and {_gib(needed_bytes)} are needed: "
            "make room (`kiln cache gc`), or set KILN_CACHE to a folder on another disk"
        )


def disk_full(folder: Path, *, written: int) -> DiskFullError:
    """The error for a disk that ran full while something was written into `folder`."""
    return DiskFullError(
        f"the disk of {folder} is full: {_gib(free_disk_bytes(folder))} were left after "
        f"{_gib(written)} of an entry that needs more; make room (`kiln cache gc`), or set "
        "KILN_CACHE to a folder on another disk"
    )


def bytes_under(folder: Path) -> int:
    """The sizes of all files beneath a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
