"""The local mark: a bundle that was compiled here says so, to this machine alone.

`local.mark` in the bundle's folder is an HMAC-SHA256 over the manifest's digest, with a key that is
made at first use in the user's config folder (mode 0600) and never leaves it. The digests don't
cover the mark, so a bundle is copied or moved with it, and on another machine it says nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from profiles.errors import SpecError
from runners.config import config_folder, write_private
from runners.files import read_optional
from runners.manifest_file import MARK_NAME, RawManifest, read_raw

__all__ = ["is_marked", "local_key", "mark_bundle"]

_KEY_BYTES = 32
_BEGIN = b"kiln-local-mark-1 "


def local_key() -> bytes:
    """This user's key, made where there is none; SpecError where it can't be written or read."""
    path = _path()
    if not path.exists():
        write_private(path, secrets.token_bytes(_KEY_BYTES), replace=False)
    key = _existing()
    if key is None:
        raise SpecError(
            f"{path} isn't this machine's key ({_KEY_BYTES} bytes): remove it, and compile again "
            "what was compiled here."
        )
    return key


def mark_bundle(folder: str | Path) -> None:
    """Say that the bundle at `folder`, whose manifest is written, was made here."""
    found = read_raw(folder)
    (found.folder / MARK_NAME).write_bytes(_mark(local_key(), found))


def is_marked(found: RawManifest) -> bool:
    """Whether this machine's key has marked this manifest."""
    key = _existing()
    wanted = b"" if key is None else _mark(key, found)
    raw = read_optional(found.folder, MARK_NAME, limit=1 << 10)
    return bool(wanted) and raw is not None and hmac.compare_digest(raw, wanted)


def _path() -> Path:
    return config_folder() / "local.key"


def _existing() -> bytes | None:
    try:
        key = _path().read_bytes()
    except OSError:
        return None
    return key if len(key) == _KEY_BYTES else None


def _mark(key: bytes, found: RawManifest) -> bytes:
    code = hmac.new(key, _BEGIN + found.sha256.encode(), hashlib.sha256)
    return _BEGIN + code.hexdigest().encode() + b"\n"
