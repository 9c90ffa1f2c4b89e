"""Remove installed versions: first from the list of what runs, then from the disk."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from profiles.errors import SpecError
from runners.installed import forget, read_pointer, versions
from runners.private import private_folder

__all__ = ["uninstall"]


def uninstall(root: Path, name: str, *, version: str | None = None, old: bool = False) -> list[str]:
    """Remove versions of `name`, and return which: all, one, or with `old` those that neither run
    nor wait for their self-test.

    Raises SpecError for a version that isn't there or runs while others are there, MissingError
    where nothing of that name is installed.
    """
    pointer = read_pointer(root, name)
    there = list(pointer.installed)
    if version is None and not old:
        gone = there
    elif old:
        gone = [one for one in there if one not in (pointer.current, pointer.waiting)]
    else:
        gone = _one(root, name, str(version), there, pointer.current)
    forget(root, name, gone)
    for one in gone:
        _remove(root / name / one)
    if gone == there:
        with suppress(OSError):  # what isn't kiln's stays, and so does its folder
            (root / name).rmdir()
    return gone


def _one(root: Path, name: str, version: str, there: list[str], current: str) -> list[str]:
    if version not in there:
        raise SpecError(
            f"{name} has no version {version} in {root}: it has "
            f"{', '.join(versions(root, name)) or 'none'}."
        )
    if version == current and len(there) > 1:
        raise SpecError(
            f"{name} runs {version}: go back with `kiln rollback {name}` first, or remove "
            "all of it by leaving --version out."
        )
    return [version]


def _remove(folder: Path) -> None:
    """By a rename first, so that nobody sees a part of it."""
    with private_folder(folder.parent, folder.name) as private:
        if folder.exists():
            folder.rename(private / folder.name)
