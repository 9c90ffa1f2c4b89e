"""Install a bundle: lists, signature, disk, every file hashed while it is written, then a rename.

What is under the final name is whole and verified; work in progress lies in a private folder beside
it, which a later try takes over. Files that an installed version has already aren't fetched.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from profiles.errors import BundleError, DiskFullError, PartialError, SpecError, UnsupportedError
from profiles.hardware import free_disk_bytes
from profiles.target import parse_target
from runners.compatibility import compatibility
from runners.console import Console, Stage
from runners.fetching import PlacedFile
from runners.files import check_file
from runners.installed import Installed, Pointer, add_version, files_by_digest, require_name
from runners.manifest import FileEntry
from runners.offers import Verified, offer_of, verified
from runners.private import abandoned, flush_folder, flush_tree, private_folder, remove
from runners.selftest import facts_for
from runners.trust import Trust
from runners.writing import hash_and_link, write_verified

__all__ = ["Request", "Result", "install"]

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_BUNDLE = "bundle"
"""In the private folder: what gets the final name."""


@dataclass(frozen=True)
class Request:
    """What is to be installed, and where."""

    source: str
    root: Path
    only: str | None = None
    name: str | None = None
    """Instead of the name that it was packed under."""


@dataclass
class Result:
    """What was installed."""

    name: str
    version: str
    path: Path
    key_id: str
    bytes: int
    """Of all its files."""
    fetched: int = 0
    """Bytes that came from the source."""
    kept: int = 0
    """Bytes of an earlier try."""
    shared: int = 0
    """Bytes that other versions had."""
    pointer: Pointer | None = field(default=None, repr=False)


def install(request: Request, trust: Trust, console: Console) -> Result:
    """Install what `request` names if `trust` has the key that signed it.

    Raises UntrustedError, BundleError, DiskFullError, SpecError, and PartialError where a server
    stops answering; what was fetched by then is kept for the next try, and nothing else is left.
    """
    offer = offer_of(request.source, request.only)
    name = require_name(request.name or offer.name)
    if (request.root / name).is_symlink():
        raise SpecError(
            f"{request.root / name} is a link, which isn't followed: remove it, or give --name."
        )
    found = verified(offer, trust)
    _require_target(found, request.only)
    _say_fit(found, console)
    result = Result(
        name=name,
        version=found.version,
        path=request.root / name / found.version,
        key_id=found.key_id,
        bytes=sum(entry.size for entry in offer.files.values()),
    )
    if not _is_whole(result.path, found):
        try:
            _place(request.root, found, result, console)
        except OSError as error:
            if error.errno in _FULL:
                raise _disk_full(request.root, result.bytes) from error
            raise
    for left in abandoned(result.path.parent, found.version):  # killed after its last rename
        remove(left)
    record = Installed(key_id=result.key_id, bytes=result.bytes)
    result.pointer = add_version(request.root, name, found.version, record)
    return result


def _say_fit(found: Verified, console: Console) -> None:
    """Say, before gigabytes are fetched, that it won't run here; it may be for other machines."""
    verdict = compatibility(found.manifest, facts_for(found.manifest), bundle=found.offer.name)
    if not verdict.outcome.runs:
        console.info(f"Warning: {found.offer.name} won't run on this machine. {verdict.sentence}")


def _require_target(found: Verified, only: str | None) -> None:
    """Raise UnsupportedError where the signed manifest isn't for the target that was asked for."""
    if only in (None, found.offer.name, "cpu"):
        return
    built = found.manifest.component("denoiser").requires.capabilities
    if built is None or (built and not set(parse_target(str(only)).capabilities) <= set(built)):
        raise UnsupportedError(
            f"{found.offer.name} is listed for {only} and its signed manifest says "
            f"{', '.join(built or ()) or 'processors'}: choose another with --only."
        )


def _place(root: Path, found: Verified, result: Result, console: Console) -> None:
    """Fill a private folder beside the final name, and rename what is in it."""
    parent = result.path.parent
    left = abandoned(parent, found.version)
    with private_folder(parent, found.version, keep=_may_go_on) as private:
        folder = private / _BUNDLE
        folder.mkdir()
        for old in left:
            _take_over(old, folder, found)
        missing = _missing(folder, found)
        have = files_by_digest(root)
        new = {entry.sha256: entry.size for entry in missing.values() if entry.sha256 not in have}
        _require_disk(root, sum(new.values()), result.bytes)
        with console.stage(f"Install {result.name}", sum(new.values()), in_bytes=True) as stage:
            for path in sorted(found.offer.files):
                _file(path, folder, found, have, result, stage)
            stage.note(f"{result.fetched} bytes fetched, {result.shared} were here")
        flush_tree(folder)
        _publish(folder, result.path, found, private)


def _file(
    path: str,
    folder: Path,
    found: Verified,
    have: dict[str, list[tuple[Path, str]]],
    result: Result,
    stage: Stage,
) -> None:
    """Put one file in its place: from another version, or from the source."""
    entry, target = found.offer.files[path], folder / path
    if not target.exists():
        for other, name in have.get(entry.sha256, ()):
            if hash_and_link(other, name, target, entry):
                result.shared += entry.size
                return

    where = found.offer.where[path]
    source = PlacedFile(found.offer.place, where, entry.size, stage.advance)
    fetched = write_verified(target, entry, source, name=f"{path} of {found.offer.name}")
    result.fetched += fetched
    result.kept += entry.size - fetched
    if os.name == "posix":  # Windows can't remove what is read-only
        target.chmod(0o444)
    have.setdefault(entry.sha256, []).append((folder, path))


def _missing(folder: Path, found: Verified) -> dict[str, FileEntry]:
    return {
        path: entry
        for path, entry in found.offer.files.items()
        if not (folder / path).exists() or (folder / path).stat().st_size < entry.size
    }


def _take_over(old: Path, folder: Path, found: Verified) -> None:
    """Move what an earlier try has fetched to `folder`: plain files that nobody else links to."""
    for where, folders, names in os.walk(old / _BUNDLE, followlinks=False):
        folders[:] = [one for one in folders if not (Path(where) / one).is_symlink()]
        for name in names:
            path = Path(where) / name
            inside = path.relative_to(old / _BUNDLE).as_posix()
            target = folder / inside
            if inside not in found.offer.files or target.exists():
                continue
            if path.is_symlink() or not path.is_file() or path.stat().st_nlink != 1:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # another process was first
                path.chmod(0o644)
                path.rename(target)
    remove(old)


def _publish(folder: Path, path: Path, found: Verified, private: Path) -> None:
    """Give the whole folder its final name; one that is there and damaged is replaced."""
    with suppress(OSError):
        folder.rename(path)
        flush_folder(path.parent)
        return
    if _is_whole(path, found):  # another process was first
        return
    path.rename(private / "damaged")
    folder.rename(path)
    flush_folder(path.parent)


def _is_whole(path: Path, found: Verified) -> bool:
    """Whether every file of the version is there with the right bytes, and no other."""
    if not path.is_dir():
        return False
    files = (one for one in path.rglob("*") if one.is_symlink() or not one.is_dir())
    there = {one.relative_to(path).as_posix() for one in files}
    return there == set(found.offer.files) and all(
        _is_right(path, name, entry) for name, entry in found.offer.files.items()
    )


def _is_right(path: Path, name: str, entry: FileEntry) -> bool:
    try:
        check_file(path, name, entry)
    except BundleError:
        return False
    return True


def _may_go_on(error: BaseException) -> bool:
    """Whether what was fetched is worth keeping: not where bytes were wrong."""
    full = isinstance(error, OSError) and error.errno in _FULL
    return full or isinstance(error, PartialError | KeyboardInterrupt)


def _require_disk(root: Path, needed: int, whole: int) -> None:
    if needed > free_disk_bytes(root):
        raise _disk_full(root, needed or whole)


def _disk_full(root: Path, needed: int) -> DiskFullError:
    return DiskFullError(
        f"{root} has {free_disk_bytes(root) / 1e6:.1f} MB free and {needed / 1e6:.1f} MB are "
        "needed: free some, and run it again (what was fetched is kept), or give --to DIR on "
        "another disk."
    )
