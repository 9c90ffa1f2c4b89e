"""Where results go: checked before any work, so that nobody waits for what can't be kept."""

from __future__ import annotations

import secrets
from pathlib import Path

from profiles.errors import SpecError

__all__ = ["require_writable"]


def require_writable(out: Path) -> None:
    """Make the folder that will hold `out`; SpecError where nothing can be written there."""
    parent = out.absolute().parent
    probe = parent / f".kiln-{secrets.token_hex(4)}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SpecError(
            f"-o {out} can't be written ({error.strerror}): give a folder that you can write."
        ) from error
