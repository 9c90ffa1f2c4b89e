"""Who is at work in a store, told by the names of empty files: no lock, and nothing to release.

    <what>.<host>.<process>.<its start in ms>.<random>

A name counts for as long as its process lives, so kill -9 needs no clean-up. Two sides that each
write their own name before they look for the other's can't miss each other: see `optimizer.store`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from optimizer.folders import age_seconds, children

__all__ = ["KEEP_SECONDS", "held", "holders", "is_abandoned", "owned_name", "sweep"]

KEEP_SECONDS = 7 * 24 * 3600
"""How long what another host's processes own is kept: whether they live can't be seen from here."""

_START_TOLERANCE_MS = 60_000
"""A process's start is told in the system's clock, which may be set while it runs."""


def owned_name(what: str) -> str:
    """A name, never used before, that says that this process owns `what`."""
    return f"{what}.{_host()}.{os.getpid()}.{_started_ms(os.getpid())}.{secrets.token_hex(4)}"


def is_abandoned(path: Path) -> bool:
    """Whether the process that a path's name carries is gone; another host's: whether it is old."""
    _, host, pid, started, _ = [*path.name.split("."), "", "", "", ""][:5]
    if host != _host() or not pid.isdecimal() or not started.isdecimal():
        return age_seconds(path) > KEEP_SECONDS
    if int(pid) == os.getpid():
        return abs(int(started) - _started_ms(os.getpid())) > _START_TOLERANCE_MS
    return not _lives(int(pid), int(started))


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Say in `folder` that this process holds `what`, until the block ends or the process does."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / owned_name(what)
    path.touch()
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()


def holders(folder: Path) -> set[str]:
    """Everything that some living process holds in `folder`."""
    return {path.name.split(".")[0] for path in children(folder) if not is_abandoned(path)}


def sweep(folder: Path) -> None:
    """Remove the names of dead processes."""
    for path in children(folder):
        if is_abandoned(path):
            path.unlink(missing_ok=True)


@cache
def _host() -> str:
    """This host; containers that share a cache, and a host name, number their processes apart."""
    space = ""
    with suppress(OSError):
        space = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


@cache
def _started_ms(pid: int) -> int:
    """When this process started; by its number, because a forked child is another one."""
    import psutil

    return int(psutil.Process(pid).create_time() * 1000)


def _lives(pid: int, started_ms: int) -> bool:
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return bool(abs(process.create_time() * 1000 - started_ms) <= _START_TOLERANCE_MS)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
