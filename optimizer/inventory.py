"""What is in a store: its entries, what else takes room, and which bytes are wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.digests import digest, sha256_file
from optimizer.entries import ENTRY_NAME, Entry, faults, read_entry
from optimizer.folders import children
from optimizer.known_models import seen_bundles, seen_models
from optimizer.store import Store, identity
from profiles.errors import KilnError
from runners.bundle import read_manifest

__all__ = [
    "Damage",
    "Inodes",
    "StoredEntry",
    "damages",
    "entry_folders",
    "inodes_under",
    "model_names",
    "repair",
    "stored_entries",
]

Inodes = Mapping[tuple[int, int], int]
"""Device and number of a file -> its bytes: names of the same file are one."""


@dataclass(frozen=True)
class StoredEntry:
    """One entry as it lies there."""

    path: Path
    kind: str
    key: Mapping[str, Any]
    """Empty where the sidecar is damaged."""
    inodes: Inodes
    last_used: float
    """Seconds since 1970."""
    leased: bool
    """A living process uses it."""
    model: str | None
    """The digest of the model that it was made from."""

    @property
    def bytes(self) -> int:
        """Of all its files, shared ones too."""
        return sum(self.inodes.values())


@dataclass(frozen=True)
class Damage:
    """An entry or a blob with something wrong."""

    path: Path
    seen: tuple[int, int] | None
    """Which folder or file it was."""
    files: tuple[str, ...]
    """What is wrong in it; empty for a blob."""


def stored_entries(store: Store) -> list[StoredEntry]:
    """Every entry, the least recently used first."""
    leased = store.leased()
    found = []
    for path in entry_folders(store):
        with suppress(FileNotFoundError):  # it goes while we look
            used = path.stat().st_mtime
            entry = read_entry(path)
            in_use = f"{path.parent.name}-{path.name}" in leased
            key, model = (entry.key, _model(entry)) if entry else ({}, None)
            inodes = inodes_under(path)
            found.append(StoredEntry(path, path.parent.name, key, inodes, used, in_use, model))
    return sorted(found, key=lambda entry: (entry.last_used, entry.path))


def entry_folders(store: Store) -> Iterator[Path]:
    """Whatever lies where entries do."""
    for kind in children(store.base):
        if not kind.name.startswith("_") and kind.name != "blobs":
            yield from children(kind)


def inodes_under(path: Path) -> dict[tuple[int, int], int]:
    """Every file at and beneath a path; links aren't followed."""
    found = {}
    names = [path] if not path.is_dir() or path.is_symlink() else []
    for folder, _, files in os.walk(path):
        names += (Path(folder) / name for name in files)
    for name in names:
        with suppress(OSError):
            status = name.lstat()
            found[status.st_dev, status.st_ino] = status.st_size
    return found


def model_names() -> dict[str, str]:
    """Digest of a model -> what it is called, as far as notes and bundles tell."""
    names = {seen.digest: seen.path.name for seen in seen_models()}
    for bundle in seen_bundles():
        with suppress(KilnError):
            model = read_manifest(bundle).model
            names[model.digest] = model.name
    return names


def _model(entry: Entry) -> str | None:
    """What an entry's key says; a converted model's own digest, which its files give."""
    if entry.kind == "source":
        return digest({name: [file.size, file.sha256] for name, file in entry.files.items()})
    model = entry.key.get("model")
    return model if isinstance(model, str) else None


def damages(store: Store, progress: Callable[[int], None]) -> Iterator[Damage]:
    """Hash every byte of every entry and blob, each file once; `progress` gets bytes done.

    Nothing that is looked at is removed meanwhile. Blobs come last.
    """
    known: dict[tuple[int, int], str] = {}

    def sha256(path: Path) -> str:
        status = path.stat()
        inode = (status.st_dev, status.st_ino)
        if inode not in known:
            known[inode] = sha256_file(path)
            progress(status.st_size)
        return known[inode]

    for path in entry_folders(store):
        with store.session():
            seen = identity(path)
            wrong = _wrong_files(path, sha256) if store.hold(path) else ()
            if wrong and identity(path) == seen:  # else it was replaced while we read
                yield Damage(path, seen, wrong)
    for blob in store.blobs.all():
        seen = identity(blob)
        with suppress(FileNotFoundError):
            if (blob.is_symlink() or sha256(blob) != blob.name) and identity(blob) == seen:
                yield Damage(blob, seen, ())


def _wrong_files(path: Path, sha256: Callable[[Path], str]) -> tuple[str, ...]:
    entry = read_entry(path)
    if entry is None:
        return (ENTRY_NAME,)
    return tuple(faults(entry, verify=True, sha256=sha256))


def repair(store: Store, damage: Damage) -> None:
    """Put a damaged entry out of the way, so that the next compile makes it; drop a blob's name."""
    if damage.files:
        store.set_aside(damage.path, damage.seen)
    else:
        with suppress(OSError):
            damage.path.unlink()
