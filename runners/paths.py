"""Paths inside a bundle: legal, and one and the same file, on every system that may read it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

__all__ = ["plain_path", "require_distinct"]

_PORTS = (f"{port}{n}" for port in ("com", "lpt") for n in "0123456789¹²³")
_RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$", *_PORTS}
"""Devices on Windows, with any ending (Microsoft: Naming Files, Paths, and Namespaces)."""
_ILLEGAL = set('\\:*?"<>|')
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of controls, formats (bidi, zero width), surrogates, line separators."""
_SHORT = re.compile(r"[^.]{1,7}~\d+(\.[^.]{0,3})?")
"""What Windows may know another file by ("MANIFE~1.JSO")."""

_LONGEST = 180
"""Characters: Windows' 260 less a folder to install in."""
_LONGEST_PART = 255
"""Bytes: of ext4, XFS, APFS and NTFS."""
_DEEPEST = 12


def plain_path(path: str) -> str:
    """`path` if it is a relative path that means the same on every system; else ValueError."""
    parts = PurePosixPath(path).parts
    legal = (
        parts
        and str(PurePosixPath(*parts)) == path
        and not path.startswith("/")
        and len(path) <= _LONGEST
        and len(parts) <= _DEEPEST
        and not any(unicodedata.category(letter) in _UNSEEN for letter in path)
        and unicodedata.is_normalized("NFC", path)
        and all(map(_legal_part, parts))
    )
    if not legal:
        raise ValueError(f"{path!r} is not a plain relative path")
    return path


def _legal_part(part: str) -> bool:
    return (
        part not in {".", ".."}
        and not set(part) & _ILLEGAL
        and part == part.rstrip(". ")
        and part.split(".")[0].rstrip(" ").lower() not in _RESERVED
        and not _SHORT.fullmatch(part)
        and len(part.encode()) <= _LONGEST_PART
    )


def require_distinct(paths: Iterable[str]) -> None:
    """Raise ValueError where two of the paths may be one on some system, or a file is a folder."""
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    for path in paths:
        if (other := files.setdefault(_folded(path), path)) != path:
            raise ValueError(f"{path!r} and {other!r} are one file on some systems")
        for parent in list(PurePosixPath(path).parents)[:-1]:
            other = folders.setdefault(_folded(str(parent)), str(parent))
            if other != str(parent):
                raise ValueError(f"{str(parent)!r} and {other!r} are one folder on some systems")
    if both := sorted(files.keys() & folders.keys()):
        raise ValueError(f"{files[both[0]]!r} is both a file and a folder")


def _folded(path: str) -> str:
    """What file systems that ignore case, or rewrite Unicode, may compare."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", path).casefold())
