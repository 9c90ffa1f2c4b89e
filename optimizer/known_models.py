"""Where models were last seen on this machine, by digest: a recipe names no machine's path.

A note in the cache folder, never trusted: the model found there is digested like any other.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path

from optimizer.source import ModelSource
from optimizer.store import Store

__all__ = ["remember", "remembered"]


def remember(source: ModelSource) -> None:
    """Note where a model on disk lies; a cache that can't be written is no error here."""
    if source.kind == "hub":
        return
    note = _note(source.digest)
    temporary = note.with_suffix(f".{secrets.token_hex(4)}")
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(str(Path(source.name).expanduser().absolute()), "utf-8")
        temporary.replace(note)
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def remembered(digest: str) -> str | None:
    """The path where the model of this digest was last seen, if something still lies there."""
    try:
        path = _note(digest).read_text("utf-8")
    except OSError:
        return None
    return path if Path(path).exists() else None


def _note(digest: str) -> Path:
    return Store().root / "v1" / "known_models" / f"{digest[:24]}.txt"
