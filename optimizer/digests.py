"""Digests of documents and files: what the store's keys and a bundle's manifest are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from profiles.errors import SpecError

__all__ = ["FileDigest", "canonical", "digest", "file_digests", "files_under", "sha256_file"]


@dataclass(frozen=True)
class FileDigest:
    """What one file's bytes must be."""

    size: int
    sha256: str


def canonical(document: object) -> bytes:
    """Return the one JSON text of a document: keys sorted, no spaces, UTF-8.

    Raises TypeError for anything that isn't plain JSON (mapping, sequence, str, number, bool, None)
    and ValueError for NaN and infinity.
    """
    text = json.dumps(
        _plain(document),
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
    )
    return text.encode()


def _plain(value: object) -> object:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"the key {wrong[0]!r} of a document is no string")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no canonical JSON form")


def digest(document: object) -> str:
    """Return the sha256 of a document's canonical JSON, as 64 hex digits."""
    return hashlib.sha256(canonical(document)).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the sha256 of a file's bytes, as 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(folder: str | Path) -> dict[str, FileDigest]:
    """Return the digest of every file under a folder, by its relative posix path, sorted."""
    return {
        name: FileDigest(path.stat().st_size, sha256_file(path))
        for name, path in files_under(folder).items()
    }


def files_under(folder: str | Path) -> dict[str, Path]:
    """Return every file under a folder by its relative posix path, sorted.

    Raises `SpecError` for a symbolic link: what it points to may change or be elsewhere.
    """
    found: dict[str, Path] = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_symlink():
            raise SpecError(f"{path} is a symbolic link: put the file itself in its place")
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path
    return found
