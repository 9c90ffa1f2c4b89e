"""Bundles that are installed: versions in folders of their own, and which of them is current.

    ROOT/NAME/<12 digits of the key>-<8 of the content>/    a version; never changed
    ROOT/NAME/current.json                                  which one runs, and which ran before

ROOT is $KILN_BUNDLES, else the user's data folder. A version that needs a self-test waits while
another one runs; it is promoted when its result says that it has passed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from profiles.errors import BundleError, KilnError, MissingError, SpecError
from runners.bundle import Bundle
from runners.manifest_file import MANIFEST_NAME, read_manifest
from runners.paths import plain_path
from runners.private import write_flushed

__all__ = [
    "Installed",
    "Pointer",
    "add_version",
    "bundles_root",
    "files_by_digest",
    "forget",
    "located",
    "names",
    "read_pointer",
    "require_name",
    "roll_back",
    "selftest_passed",
    "versions",
]

_POINTER = "current.json"
_Version = Annotated[str, Field(pattern=r"^[0-9a-f]{1,12}-[0-9a-f]{8}$")]


class Installed(BaseModel):
    """What is recorded of one version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key_id: str
    """Of the key that had signed it."""
    bytes: int


class Pointer(BaseModel):
    """current.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Annotated[int, Field(ge=1, le=1)] = 1
    current: _Version
    waiting: _Version | None = None
    """Becomes current when its self-test has passed."""
    before: tuple[_Version, ...] = ()
    """What was current, the latest last."""
    installed: dict[_Version, Installed]


def bundles_root(to: Path | None = None) -> Path:
    """`to`, else $KILN_BUNDLES, else the user's data folder; nothing is created."""
    if to is not None:
        return Path(os.path.abspath(to))  # noqa: PTH100 (resolve would follow links)
    if given := os.environ.get("KILN_BUNDLES"):
        return Path(os.path.abspath(Path(given).expanduser()))  # noqa: PTH100
    from platformdirs import user_data_path

    return user_data_path("kiln", appauthor=False) / "bundles"


def require_name(name: str) -> str:
    """`name` if it can be a folder's on every system; SpecError where it can't."""
    with suppress(ValueError):
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            return plain_path(name)
    raise SpecError(
        f"{name!r} can't be a bundle's name: take up to 64 letters, digits, dots, dashes and "
        "underscores with --name."
    )


def names(root: Path) -> list[str]:
    """Names under which something is installed."""
    return sorted(path.parent.name for path in root.glob(f"*/{_POINTER}"))


def versions(root: Path, name: str) -> list[str]:
    """The recorded versions of `name` whose folders are there."""
    pointer = read_pointer(root, name)
    return [one for one in pointer.installed if (root / name / one / MANIFEST_NAME).is_file()]


def read_pointer(root: Path, name: str) -> Pointer:
    """What is current of `name`; a waiting version that has passed by now is promoted.

    Raises MissingError where nothing of that name is installed.
    """
    path = root / name / _POINTER
    try:
        pointer = Pointer.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        known = ", ".join(names(root)) or "nothing"
        raise MissingError(
            f"No bundle {name!r} is installed in {root} (there is {known}): run "
            "`kiln install SRC --trust NAME.pub`."
        ) from error
    except ValidationError as error:
        raise BundleError(f"{path} is damaged: install {name} again.") from error
    if pointer.waiting and selftest_passed(root / name / pointer.waiting):
        pointer = _promoted(pointer, pointer.waiting)
        _write(root, name, pointer)
    return pointer


def _promoted(pointer: Pointer, version: str) -> Pointer:
    before = [*(one for one in pointer.before if one != version), pointer.current]
    if version == pointer.current:
        before.pop()
    return pointer.model_copy(update={"current": version, "waiting": None, "before": tuple(before)})


def _write(root: Path, name: str, pointer: Pointer) -> None:
    write_flushed(root / name / _POINTER, pointer.model_dump_json(indent=1).encode())


def add_version(root: Path, name: str, version: str, record: Installed) -> Pointer:
    """Record a version that lies in its folder; it becomes current, or waits for its self-test."""
    try:
        pointer = read_pointer(root, name)
    except (MissingError, BundleError):
        pointer = Pointer(current=version, installed={version: record})
    pointer = pointer.model_copy(update={"installed": {**pointer.installed, version: record}})
    path, current = root / name / version, root / name / pointer.current
    needs = any(entry.selftest is not None for entry in read_manifest(path).engines)
    if not needs or selftest_passed(path) or not _may_run(current):
        pointer = _promoted(pointer, version)
    elif pointer.current != version:
        pointer = pointer.model_copy(update={"waiting": version})
    _write(root, name, pointer)
    return pointer


def _may_run(path: Path) -> bool:
    """Whether a version is there and hasn't failed its self-test."""
    return (path / MANIFEST_NAME).is_file() and selftest_passed(path) is not False


def selftest_passed(path: Path) -> bool | None:
    """What the self-test's result says of the bundle at `path`; None where it says nothing.

    The file is that of runners.selftest, and has to be of these very bytes: True where every
    component that needs a self-test is among the `passed`, False where one is among the `failed`.
    """
    from runners.selftest import result_paths, state_of

    try:
        bundle = Bundle(path, read_manifest(path))
    except KilnError:
        return None
    needed = {entry.name for entry in bundle.manifest.engines if entry.selftest is not None}
    for file in result_paths(bundle):
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            document = json.loads(file.read_text("utf-8"))
            if document["bundle"] != state_of(bundle):
                continue
            if document.get("failed"):
                return False
            done = {str(key).partition(" on ")[0] for key in document["passed"]}
            return needed <= done or None
    return None


def roll_back(root: Path, name: str) -> Pointer:
    """Make the version before the current one; BundleError unless it is there and whole."""
    pointer = read_pointer(root, name)
    there = [one for one in pointer.before if (root / name / one / MANIFEST_NAME).is_file()]
    if not there:
        raise SpecError(
            f"{name} has no version before {pointer.current}: `kiln bundles` lists what is there."
        )
    read_manifest(root / name / there[-1])
    pointer = pointer.model_copy(
        update={"current": there[-1], "waiting": None, "before": tuple(there[:-1])}
    )
    _write(root, name, pointer)
    return pointer


def forget(root: Path, name: str, gone: list[str]) -> None:
    """Take versions off the list; with the last one the list itself goes.

    The current one may be among them only if all are.
    """
    pointer = read_pointer(root, name)
    left = {one: record for one, record in pointer.installed.items() if one not in gone}
    if not left:
        (root / name / _POINTER).unlink()
        return
    assert pointer.current in left, "what runs stays"
    waiting = pointer.waiting if pointer.waiting in left else None
    before = tuple(one for one in pointer.before if one in left)
    update = {"installed": left, "waiting": waiting, "before": before}
    _write(root, name, pointer.model_copy(update=update))


def located(path: Path) -> Path:
    """The bundle's folder that a user means: itself, or the current version of an installed one.

    `path` may be a bundle, an installed bundle's folder (ROOT/NAME), or its name.
    """
    if (path / MANIFEST_NAME).exists():
        return path
    if (path / _POINTER).is_file():
        root, name = path.absolute().parent, path.absolute().name
        return root / name / read_pointer(root, name).current
    root, name = bundles_root(), str(path)
    if not path.exists() and len(path.parts) == 1 and (root / name / _POINTER).is_file():
        return root / name / read_pointer(root, name).current
    return path


def files_by_digest(root: Path) -> dict[str, list[tuple[Path, str]]]:
    """sha256 -> where an installed version says that it has such a file: its folder and path.

    Nothing is hashed here: whoever takes a file hashes it.
    """
    found: dict[str, list[tuple[Path, str]]] = {}
    for folder in _folders(root):
        with suppress(KilnError, OSError):
            for name, entry in read_manifest(folder).files.items():
                found.setdefault(entry.sha256, []).append((folder, name))
    return found


def _folders(root: Path) -> Iterator[Path]:
    for name in names(root):
        with suppress(KilnError):
            yield from (root / name / version for version in versions(root, name))
