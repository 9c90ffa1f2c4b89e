"""A content-addressed store of finished folders that survives being killed at any moment.

    <root>/v1/<kind>/<24 hex digits>/    a finished entry, named by its key's digest, never changed
        entry.json                       the whole key, every file's digest
    <root>/v1/_tmp/<name>/               entries being made
    <root>/v1/_partial/<name>            what is done so far of an entry that takes long
    <root>/v1/_damaged/<name>/           entries with a wrong byte, set aside

An entry appears by one rename of a complete, flushed folder, so a reader sees all of it or nothing,
and two processes that make the same entry need no lock: the second one's copy is dropped. A
temporary carries its process in its name; those of dead processes are swept by the next `create`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optimizer.digests import (
    FileDigest,
    canonical,
    digest,
    file_digests,
    files_under,
    sha256_file,
)
from profiles.errors import DiskFullError, SpecError
from profiles.hardware import free_disk_bytes

__all__ = [
    "ENTRY_NAME",
    "FileDigest",
    "Store",
    "canonical",
    "digest",
    "file_digests",
    "sha256_file",
]

_SCHEMA = 1
ENTRY_NAME = "entry.json"
"""Of an entry's sidecar."""
_NAME_DIGITS = 24
_KEEP_SECONDS = 7 * 24 * 3600
"""How long a damaged entry, or a temporary made by another host, is kept."""


class Store:
    """Finished folders by kind and key, under `<root>/v1`."""

    def __init__(self, root: str | Path | None = None) -> None:
        """Use `root`, else $KILN_CACHE, else the user's cache directory; nothing is created yet."""
        self.root = Path(root or os.environ.get("KILN_CACHE") or _default_root()).expanduser()
        self._base = (self.root / "v1").absolute()

    def path(self, kind: str, key: Mapping[str, object]) -> Path:
        """Return where the entry of this key is, or would be."""
        return self._base / kind / digest(key)[:_NAME_DIGITS]

    def find(self, kind: str, key: Mapping[str, object], *, verify: bool = False) -> Path | None:
        """Return the finished entry of this key, or None.

        Names and sizes of its files are always checked, their sha256 with `verify`. A damaged entry
        is set aside and counts as absent.
        """
        path = self.path(kind, key)
        if not path.is_dir():
            return None
        if _is_intact(path, kind, key, verify=verify):
            return path
        self._set_aside(path)
        return None

    @contextmanager
    def create(
        self, kind: str, key: Mapping[str, object], *, needed_bytes: int | None = None
    ) -> Iterator[Path]:
        """Give an empty private folder; what the block leaves in it becomes the entry of this key.

        Where another process was first, its entry stays and this one is dropped. An exception in
        the block removes the folder. Raises `DiskFullError` when the disk runs full, and before
        the block when less than `needed_bytes` are free; `SpecError` when the store can't be
        written.
        """
        if not kind.isidentifier() or kind.startswith("_"):
            raise ValueError(f"{kind!r} is no kind of entry: use lower-case words joined by _")
        folder = self._private_folder(kind, key)
        try:
            _check_free(folder, needed_bytes)
            yield folder
            _seal(folder, kind, key)
            self._publish(folder, kind, key)
        except Exception as error:
            if _means_disk_full(error):
                raise _disk_full(folder, written=_bytes_under(folder)) from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def partial(self, key: Mapping[str, object]) -> Iterator[Path]:
        """A file for what is done so far of an entry that takes long: kept when killed.

        Whoever writes it must be able to read one that was cut short. Removed once the block ends
        without an error.
        """
        path = self._base / "_partial" / digest(key)[:_NAME_DIGITS]
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
        path.unlink(missing_ok=True)

    def _private_folder(self, kind: str, key: Mapping[str, object]) -> Path:
        name = f"{digest(key)[:_NAME_DIGITS]}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}"
        folder = self._base / "_tmp" / name
        try:
            (self._base / kind).mkdir(parents=True, exist_ok=True)
            folder.mkdir(parents=True)
        except OSError as error:
            if _means_disk_full(error):
                raise _disk_full(self._base, written=0) from error
            raise SpecError(
                f"the cache folder {self.root} cannot be written ({error.strerror}): set "
                "KILN_CACHE to a folder that you can write"
            ) from error
        self._sweep()
        return folder

    def _publish(self, folder: Path, kind: str, key: Mapping[str, object]) -> None:
        target = self.path(kind, key)
        for last_try in (False, True):
            try:
                folder.rename(target)
            except OSError:
                if self.find(kind, key) is not None:
                    return
                if last_try:
                    raise
            else:
                _flush_folder(target.parent)
                return

    def _set_aside(self, path: Path) -> None:
        aside = self._base / "_damaged" / f"{path.parent.name}-{path.name}-{secrets.token_hex(4)}"
        with suppress(OSError):  # another process was first, or (Windows) a file of it is open
            aside.parent.mkdir(parents=True, exist_ok=True)
            path.rename(aside)
            os.utime(aside)

    def _sweep(self) -> None:
        """Remove what dead processes left in `_tmp`, and damaged entries that are a week old."""
        for folder in _children(self._base / "_tmp"):
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
        for left in _children(self._base / "_partial"):
            if _age_seconds(left) > _KEEP_SECONDS:
                left.unlink(missing_ok=True)
        for folder in _children(self._base / "_damaged"):
            if _age_seconds(folder) > _KEEP_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _default_root() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("kiln", appauthor=False)


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _age_seconds(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _is_abandoned(temporary: Path) -> bool:
    """Whether the process that a temporary's name carries is gone, or is too young to own it."""
    import psutil

    _, host, pid, _ = [*temporary.name.split("."), "", "", "", ""][:4]
    if host != _host() or not pid.isdecimal():
        return _age_seconds(temporary) > _KEEP_SECONDS
    try:
        started = psutil.Process(int(pid)).create_time()
        # a process younger than its temporary has a reused number; a minute for clocks set back
        return bool(started > temporary.stat().st_mtime + 60)
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):
        return False


def _seal(folder: Path, kind: str, key: Mapping[str, object]) -> None:
    """Flush every file to the disk and write the entry's sidecar, itself flushed."""
    if (folder / ENTRY_NAME).exists():
        raise ValueError(f"{ENTRY_NAME} is the store's own name")
    document: dict[str, Any] = {
        "schema": _SCHEMA,
        "kind": kind,
        "key": json.loads(canonical(key)),
        "key_digest": digest(key),
        "files": {name: asdict(found) for name, found in file_digests(folder).items()},
    }
    document["sha256"] = digest(document)
    sidecar = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / ENTRY_NAME).write_text(sidecar, encoding="utf-8", newline="\n")
    for path in files_under(folder).values():
        with path.open("rb+") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _flush_folder(path)


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # Windows can't open a folder, and needs no flush for a rename
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_intact(path: Path, kind: str, key: Mapping[str, object], *, verify: bool) -> bool:
    try:
        document = json.loads((path / ENTRY_NAME).read_bytes())
        stated = document.pop("sha256")
        if stated != digest(document) or document["key_digest"] != digest(key):
            return False
        if document["schema"] != _SCHEMA or document["kind"] != kind:
            return False
        found = files_under(path)
        del found[ENTRY_NAME]
        expected = {name: FileDigest(**value) for name, value in document["files"].items()}
        if found.keys() != expected.keys():
            return False
        return all(
            found[name].stat().st_size == file.size
            and (not verify or sha256_file(found[name]) == file.sha256)
            for name, file in expected.items()
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SpecError):
        return False


def _means_disk_full(error: BaseException | None) -> bool:
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


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _check_free(folder: Path, needed_bytes: int | None) -> None:
    free = free_disk_bytes(folder)
    if needed_bytes is not None and needed_bytes > free:
        raise DiskFullError(
            f"the disk of {folder} has {_gib(free)} free and {_gib(needed_bytes)} are needed: "
            "make room, or set KILN_CACHE to a folder on another disk"
        )


def _bytes_under(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _disk_full(folder: Path, *, written: int) -> DiskFullError:
    return DiskFullError(
        f"the disk of {folder} is full: {_gib(free_disk_bytes(folder))} were left after "
        f"{_gib(written)} of an entry that needs more; make room, or set KILN_CACHE to a folder "
        "on another disk"
    )
