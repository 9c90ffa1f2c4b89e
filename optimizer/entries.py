"""A finished folder and its sidecar: written once, and read by whoever doubts it.

entry.json holds the whole key, the digest of every file, and a digest of itself, so an entry that
was damaged, or lies in another one's place, is known without asking anybody.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
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
from optimizer.folders import flush, flush_folder, make_read_only
from profiles.errors import SpecError

__all__ = ["ENTRY_NAME", "Entry", "entry_name", "faults", "flush_tree", "read_entry", "seal"]

_SCHEMA = 1
ENTRY_NAME = "entry.json"
"""Of an entry's sidecar."""
_NAME_DIGITS = 24
_OUT_OF_MEANS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What says nothing about a file that couldn't be read."""


@dataclass(frozen=True)
class Entry:
    """What a sidecar states."""

    path: Path
    kind: str
    key: Mapping[str, Any]
    files: Mapping[str, FileDigest]


def entry_name(key: Mapping[str, object]) -> str:
    """The name of an entry's folder."""
    return digest(key)[:_NAME_DIGITS]


def seal(folder: Path, kind: str, key: Mapping[str, object]) -> dict[str, FileDigest]:
    """Flush every file to the disk and write the sidecar, itself flushed: the files' digests."""
    if (folder / ENTRY_NAME).exists():
        raise ValueError(f"{ENTRY_NAME} is the store's own name")
    files = file_digests(folder)
    document: dict[str, Any] = {
        "schema": _SCHEMA,
        "kind": kind,
        "key": json.loads(canonical(key)),
        "key_digest": digest(key),
        "files": {name: asdict(found) for name, found in files.items()},
    }
    document["sha256"] = digest(document)
    (folder / ENTRY_NAME).write_bytes(_sidecar(document))
    for path in files_under(folder).values():
        flush(path)
        make_read_only(path)
    return files


def _sidecar(document: object) -> bytes:
    """The one text of a sidecar."""
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    return text.encode()


def flush_tree(folder: Path) -> None:
    """Flush the names in a folder and in those beneath it."""
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        flush_folder(path)


def read_entry(path: Path) -> Entry | None:
    """What the sidecar at `path` states; None where it is damaged or lies in a wrong place."""
    try:
        raw = (path / ENTRY_NAME).read_bytes()
        document = json.loads(raw)
        if raw != _sidecar(document):
            return None
        if document.pop("sha256") != digest(document) or document["schema"] != _SCHEMA:
            return None
        kind, key = document["kind"], document["key"]
        named = (kind, document["key_digest"]) == (path.parent.name, digest(key))
        if not named or entry_name(key) != path.name:
            return None
        files = {name: FileDigest(**value) for name, value in document["files"].items()}
    except OSError as error:
        _raise_if_out_of_means(error)
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return Entry(path, kind, key, files)


def faults(entry: Entry, *, verify: bool, sha256: Callable[[Path], str] = sha256_file) -> list[str]:
    """The files that are missing, too many or of another size; with `verify`, of another digest."""
    try:
        found = files_under(entry.path)
    except SpecError as error:
        return [str(error)]
    except OSError as error:
        _raise_if_out_of_means(error)
        return [ENTRY_NAME]
    found.pop(ENTRY_NAME, None)
    wrong = [*(found.keys() ^ entry.files.keys())]
    for name in found.keys() & entry.files.keys():
        expected = entry.files[name]
        try:
            good = found[name].stat().st_size == expected.size and (
                not verify or sha256(found[name]) == expected.sha256
            )
        except OSError as error:
            _raise_if_out_of_means(error)
            good = False
        if not good:
            wrong.append(name)
    return sorted(wrong)


def _raise_if_out_of_means(error: OSError) -> None:
    if error.errno in _OUT_OF_MEANS:
        raise error
