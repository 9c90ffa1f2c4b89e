"""A content-addressed store of finished folders that survives being killed at any moment.

    <root>/v2/<kind>/<24 hex digits>/    a finished entry, named by its key's digest, never changed
        entry.json                       the whole key, every file's digest
    <root>/v2/blobs/sha256/xx/<sha256>   the bytes of entries' files: hard links, equal ones once
    <root>/v2/_tmp/<name>/               entries being made, and those being removed
    <root>/v2/_partial/<name>            what is done so far of an entry that takes long
    <root>/v2/_damaged/<name>/           entries with a wrong byte, set aside
    <root>/v2/_leases/<name>             empty: a living process uses an entry
    <root>/v2/_condemned/<name>          empty: a living process is about to remove an entry

An entry appears by one rename of a complete, flushed folder, and goes by one, so a reader sees all
of it or nothing, and two processes that make the same entry need no lock: the second one's copy is
dropped. Temporaries carry their process in their names; those of dead ones are swept by `create`.

Nothing that is in use is removed. A user touches the entry and writes its lease, then looks whether
it is condemned; a remover condemns it, then looks for leases and the last touch. Whoever comes
second sees the other: a user waits until it is decided (then it is a hit or a miss), a remover lets
go. A touch counts for the remover's grace, a lease for as long as its process lives.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from optimizer import leases
from optimizer.blobs import Blobs
from optimizer.digests import FileDigest, canonical, digest, file_digests, sha256_file
from optimizer.entries import ENTRY_NAME, entry_name, faults, flush_tree, read_entry, seal
from optimizer.folders import age_seconds, children, flush_folder, remove
from optimizer.full_disk import bytes_under, check_free, disk_full, means_disk_full
from profiles.errors import SpecError
from runners.receipts import cache_root

__all__ = [
    "ENTRY_NAME",
    "FileDigest",
    "Store",
    "canonical",
    "digest",
    "file_digests",
    "identity",
    "sha256_file",
]

_TRIES = 5
"""How often an entry that others replace at the same time is looked at."""
_WAIT_SECONDS = 10.0
"""At most, for a process that is deciding whether an entry goes: it takes milliseconds."""


class Store:
    """Finished folders by kind and key, under `<root>/v2`."""

    def __init__(self, root: str | Path | None = None) -> None:
        """Use `root`, else $KILN_CACHE, else the user's cache directory; nothing is created yet."""
        self.root = Path(root).expanduser() if root else cache_root()
        self.base = (self.root / "v2").absolute()
        self.blobs = Blobs(self.base / "blobs")
        self._session: ExitStack | None = None

    def path(self, kind: str, key: Mapping[str, object]) -> Path:
        """Return where the entry of this key is, or would be."""
        return self.base / kind / entry_name(key)

    def find(self, kind: str, key: Mapping[str, object], *, verify: bool = False) -> Path | None:
        """Return the finished entry of this key, or None.

        Names and sizes of its files are always checked, their sha256 with `verify`. A damaged entry
        is set aside and counts as absent.
        """
        path = self.path(kind, key)
        for _ in range(_TRIES):
            before = identity(path)
            if before is None or not self.use(path):
                return None
            entry = read_entry(path)
            if entry is not None and not faults(entry, verify=verify):
                return path
            if identity(path) == before:  # else it was replaced while we read
                self.set_aside(path, before)
                return None
        return None

    @contextmanager
    def session(self, *used: Path) -> Iterator[None]:
        """What is found or made inside stays until the block ends, whoever collects garbage.

        So do those of the folders `used` that are entries.
        """
        if self._session is not None:
            yield
            return
        with ExitStack() as stack:
            self._session = stack
            try:
                for path in used:
                    self.use(path)
                yield
            finally:
                self._session = None

    def use(self, path: Path) -> bool:
        """Touch an entry, lease it in a session, and say whether it is there to be used.

        Any path may be given: one outside of this store is nobody's to remove.
        """
        if path.parent.parent != self.base:
            return True
        with suppress(OSError):  # a store of somebody else's
            os.utime(path)
        return self.hold(path)

    def hold(self, path: Path) -> bool:
        """The same without a touch: looking at an entry isn't using it."""
        if self._session is not None:
            self._keep(path)
        return self._is_decided(path) and path.is_dir()

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
        if not kind.isidentifier() or kind.startswith("_") or kind == "blobs":
            raise ValueError(f"{kind!r} is no kind of entry: use lower-case words joined by _")
        folder = self._private_folder(kind, key)
        try:
            with self._keep(self.path(kind, key)):
                check_free(folder, needed_bytes)
                yield folder
                for name, found in seal(folder, kind, key).items():
                    self.blobs.share(folder / name, found, spare=self._spare())
                flush_tree(folder)
                self._publish(folder, kind, key)
        except Exception as error:
            if means_disk_full(error):
                raise disk_full(folder, written=bytes_under(folder)) from error
            raise
        finally:
            remove(folder)

    @contextmanager
    def partial(self, key: Mapping[str, object]) -> Iterator[Path]:
        """A file for what is done so far of an entry that takes long: kept when killed.

        Whoever writes it must be able to read one that was cut short. Removed once the block ends
        without an error.
        """
        path = self.base / "_partial" / entry_name(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._lease(path):
            yield path
        path.unlink(missing_ok=True)

    def set_aside(self, path: Path, seen: tuple[int, int] | None) -> None:
        """Move the damaged entry that was `seen` at `path` out of the way.

        One that another process has just put in its place goes back.
        """
        aside = self.base / "_damaged" / f"{path.parent.name}-{path.name}-{secrets.token_hex(4)}"
        with suppress(OSError):  # another process was first, or (Windows) a file of it is open
            aside.parent.mkdir(parents=True, exist_ok=True)
            path.rename(aside)
            if identity(aside) != seen:
                aside.rename(path)
            else:
                os.utime(aside)

    def discard(self, path: Path, *, grace_seconds: float) -> bool:
        """Remove an entry or partial file unless a process uses it, or did within the grace."""
        what = _what(path)
        with leases.held(self.base / "_condemned", what):
            if what in self.leased() or age_seconds(path) < grace_seconds:
                return False
            grave = self._spare()
            try:
                grave.parent.mkdir(parents=True, exist_ok=True)
                path.rename(grave)
            except OSError:  # another process was first, or (Windows) a file of it is open
                return False
        remove(grave)
        return True

    def leased(self) -> set[str]:
        """`<kind>-<name>` of everything that living processes use."""
        return leases.holders(self.base / "_leases")

    def sweep(self) -> None:
        """Remove what dead processes left, and partial files and damaged entries of last week."""
        for folder in self.abandoned():
            remove(folder)
        for name in ("_leases", "_condemned"):
            leases.sweep(self.base / name)
        used = self.leased()
        for name in ("_partial", "_damaged"):
            for left in children(self.base / name):
                if age_seconds(left) > leases.KEEP_SECONDS and _what(left) not in used:
                    remove(left)

    def abandoned(self) -> list[Path]:
        """Temporaries of dead processes."""
        return [path for path in children(self.base / "_tmp") if leases.is_abandoned(path)]

    def _keep(self, path: Path) -> AbstractContextManager[object]:
        """A lease that the session ends, else the block that is given it."""
        lease = self._lease(path)
        if self._session is None:
            return lease
        self._session.enter_context(lease)
        return nullcontext()

    def _lease(self, path: Path) -> AbstractContextManager[object]:
        """This process's lease; none where the store can't be written, or has no room for it."""
        stack = ExitStack()
        with suppress(OSError):
            stack.enter_context(leases.held(self.base / "_leases", _what(path)))
        return stack

    def _spare(self) -> Path:
        return self.base / "_tmp" / leases.owned_name("spare")

    def _is_decided(self, path: Path) -> bool:
        """Wait until nobody is about to remove an entry; False where that takes too long."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while _what(path) in leases.holders(self.base / "_condemned"):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def _private_folder(self, kind: str, key: Mapping[str, object]) -> Path:
        folder = self.base / "_tmp" / leases.owned_name(entry_name(key))
        try:
            (self.base / kind).mkdir(parents=True, exist_ok=True)
            folder.mkdir(parents=True)
        except OSError as error:
            if means_disk_full(error):
                raise disk_full(self.base, written=0) from error
            raise SpecError(
                f"the cache folder {self.root} cannot be written ({error.strerror}): set "
                "KILN_CACHE to a folder that you can write"
            ) from error
        self.sweep()
        return folder

    def _publish(self, folder: Path, kind: str, key: Mapping[str, object]) -> None:
        target = self.path(kind, key)
        for left in reversed(range(_TRIES)):
            self._is_decided(target)
            try:
                folder.rename(target)
            except OSError:
                if self.find(kind, key) is not None:
                    return
                if not left:
                    raise
            else:
                flush_folder(target.parent)
                flush_folder(self.base)
                return


def _what(path: Path) -> str:
    """What leases call an entry or a partial file."""
    return f"{path.parent.name}-{path.name.partition('.')[0]}"


def identity(path: Path) -> tuple[int, int] | None:
    """Which folder lies at a path, None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
