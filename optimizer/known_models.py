"""What was seen on this machine: where models lie, which bundles were made, licences of models.

Notes in the cache folder, never trusted: a model that is found by one is digested like any other,
and a bundle's manifest says what it was made from.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.digests import digest
from optimizer.source import ModelSource
from optimizer.store import Store

__all__ = [
    "KINDS",
    "OLD_PLACE",
    "SeenModel",
    "licence_of",
    "move_old_notes",
    "remember",
    "remember_bundle",
    "remember_licence",
    "remembered",
    "remembered_autoencoder",
    "remembered_controlnet",
    "seen_bundles",
    "seen_models",
]


@dataclass(frozen=True)
class SeenModel:
    """A model that isn't the hub's, as it was when it was compiled."""

    path: Path
    digest: str
    kind: str
    family: str


def remember(source: ModelSource) -> None:
    """Note where a model on disk, and an autoencoder beside it, lie.

    A cache that can't be written is no error here.
    """
    if source.kind != "hub":
        path = Path(source.name).expanduser().absolute()
        document = {
            "path": str(path),
            "digest": source.digest,
            "kind": source.kind,
            "family": source.family,
        }
        _write("known_models", source.digest, document)
    if source.vae is not None and source.vae.kind != "hub":
        place = str(Path(source.vae.name).expanduser().absolute())
        _write("known_autoencoders", source.vae.digest, {"path": place})
    for control in source.controls:
        if control.kind != "hub":
            place = str(Path(control.name).expanduser().absolute())
            _write("known_controlnets", control.digest, {"path": place})


def remembered(digest: str) -> str | None:
    """The path where the model of this digest was last seen, if something still lies there."""
    return _place("known_models", digest)


def remembered_autoencoder(digest: str) -> str | None:
    """The same of an autoencoder that was given beside a model."""
    return _place("known_autoencoders", digest)


def remembered_controlnet(digest: str) -> str | None:
    """The same of a control network."""
    return _place("known_controlnets", digest)


def _place(kind: str, digest: str) -> str | None:
    path = _read(kind, digest).get("path")
    return str(path) if path and Path(str(path)).exists() else None


def seen_models() -> list[SeenModel]:
    """The models that were compiled and are still where they were."""
    models = []
    for note in _all("known_models"):
        with suppress(KeyError, TypeError):
            path = Path(note["path"])
            if path.exists():
                models.append(SeenModel(path, note["digest"], note["kind"], note["family"]))
    return models


def remember_bundle(bundle: Path) -> None:
    """Note where a bundle was written."""
    path = str(bundle.absolute())
    _write("known_bundles", digest(path), {"path": path})


def seen_bundles() -> list[Path]:
    """Where bundles were written, if something still lies there."""
    paths = (Path(str(note.get("path"))) for note in _all("known_bundles"))
    return sorted(path for path in paths if path.exists())


def remember_licence(model: str, commit: str, licence: str | None) -> None:
    """Note what the card of a hub model named, for when there is no connection."""
    _write("known_licences", digest([model, commit]), {"licence": licence})


def licence_of(model: str, commit: str) -> str | None:
    """The licence that was noted for a commit of a hub model."""
    licence = _read("known_licences", digest([model, commit])).get("licence")
    return licence if isinstance(licence, str) else None


KINDS = ("known_bundles", "known_licences", "known_models")
"""The folders of notes in the cache folder."""

OLD_PLACE = "v1"
"""Where these folders lay before; what is there is still read."""


def _write(kind: str, key: str, document: dict[str, Any]) -> None:
    note = Store().root / kind / f"{key[:24]}.json"
    temporary = note.with_suffix(f".{secrets.token_hex(4)}")
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(document), "utf-8")
        temporary.replace(note)
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def _read(kind: str, key: str) -> dict[str, Any]:
    name = f"{key[:24]}.json"
    return next((found for note in _notes(kind, name) if (found := _parsed(note))), {})


def _all(kind: str) -> Iterator[dict[str, Any]]:
    notes = {note.name: note for note in reversed(_notes(kind, "*.json"))}
    return map(_parsed, sorted(notes.values()))


def _notes(kind: str, pattern: str) -> list[Path]:
    """The notes that are there, those of the old place last."""
    root, found = Store().root, list[Path]()
    for folder in (root / kind, root / OLD_PLACE / kind):
        with suppress(OSError):
            found += sorted(folder.glob(pattern))
    return found


def move_old_notes(root: Path) -> None:
    """Put notes of the old place where they lie now, unless there are newer ones."""
    for kind in KINDS:
        for note in sorted((root / OLD_PLACE / kind).glob("*.json")):
            target = root / kind / note.name
            with suppress(OSError):
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():
                    note.replace(target)


def _parsed(note: Path) -> dict[str, Any]:
    """What a note says; nothing where there is none or it is damaged."""
    try:
        document = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
