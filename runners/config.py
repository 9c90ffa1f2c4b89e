"""The user's config folder: trusted keys and this machine's own key. Never in the cache."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import platformdirs

from profiles.errors import SpecError

__all__ = ["config_folder", "write_private"]


def config_folder() -> Path:
    """KILN_CONFIG, or the system's folder for kiln's settings; not made here."""
    given = os.environ.get("KILN_CONFIG")
    return Path(given).expanduser() if given else platformdirs.user_config_path("kiln")


def write_private(path: Path, raw: bytes, *, replace: bool) -> bool:
    """Write `path` with mode 0600, whole or not at all; False where it exists and stays.

    A folder that has to be made for it gets mode 0700. Raises SpecError where nothing can be
    written.
    """
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            _write(fresh, raw)
            if replace:
                fresh.replace(path)
            else:
                _link(fresh, path, raw)
        finally:
            fresh.unlink(missing_ok=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise SpecError(
            f"{path} can't be written ({error.strerror}): make its folder writable, or set "
            "KILN_CONFIG to another folder if it is kiln's own."
        ) from error
    return True


def _link(fresh: Path, path: Path, raw: bytes) -> None:
    """Put `fresh` at `path`; FileExistsError where something is there, which a rename replaces."""
    try:
        os.link(fresh, path)
    except FileExistsError:
        raise
    except OSError:  # FAT has no links
        _write(path, raw)


def _write(path: Path, raw: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags, 0o600), "wb") as stream:
        stream.write(raw)
        stream.flush()
        os.fsync(stream.fileno())
