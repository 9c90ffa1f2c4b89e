"""A hub model's files on their way into the hub library's cache; a cut-off download goes on.

huggingface_hub 2.x throws a file away that was cut off, however much of it had arrived: its partial
files belong to one process. So what the hub gives a sha256 of (all weights) is fetched here, into
`blobs/<sha256>.incomplete`, is compared with its digest, and lies then where the library finds it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.digests import sha256_file
from profiles import hardware as facts
from profiles.errors import DiskFullError, SpecError

__all__ = ["HubFile", "HubFolder", "byte_text", "require_free"]


@dataclass(frozen=True)
class HubFile:
    """One file of a hub model, as its listing describes it."""

    name: str
    size: int
    sha256: str | None
    """None where the hub gives none: small files, kept in git itself."""


@dataclass(frozen=True)
class HubFolder:
    """Where the hub library keeps one commit of a model."""

    model: str
    commit: str

    def missing(self, files: Iterable[HubFile]) -> list[HubFile]:
        """Those that aren't in the cache yet."""
        return [file for file in files if not self._is_here(file)]

    def arrived_bytes(self, file: HubFile) -> int:
        """How much of a missing file an earlier download left."""
        partial = self._partial(file)
        return min(file.size, partial.stat().st_size) if partial and partial.is_file() else 0

    def download(self, file: HubFile, progress: Callable[[int], None]) -> None:
        """Fetch one file that has a sha256, from where an earlier download stopped.

        `progress` is told the bytes of the file that are here. Raises `SpecError` where its digest
        is wrong, and what the hub library raises.
        """
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

        partial, target = self._partial(file), self._target(file)
        assert partial is not None, "only files with a sha256 are downloaded here"
        lock = self._cache / ".locks" / self._storage.name / f"{file.sha256}.lock"
        for folder in (lock.parent, partial.parent, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if target.exists():  # another process was first
                progress(file.size)
                return
            self._receive(file, partial, progress)
            if sha256_file(partial) != file.sha256:
                partial.unlink()
                raise SpecError(
                    f"what arrived as {file.name} of {self.model} isn't what the hub promised: run "
                    f"`kiln pull {self.model}` again, which fetches that file anew"
                )
            partial.replace(target)

    def _receive(self, file: HubFile, partial: Path, progress: Callable[[int], None]) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        if partial.is_file() and partial.stat().st_size > file.size:
            partial.unlink()
        with _Counted(partial, progress) as stream:
            http_get(
                hf_hub_url(self.model, file.name, revision=self.commit),
                stream,
                resume_size=stream.tell(),
                headers=build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.name,
            )

    @property
    def _cache(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    @property
    def _storage(self) -> Path:
        from huggingface_hub.file_download import repo_folder_name

        return self._cache / repo_folder_name(repo_id=self.model, repo_type="model")

    def _snapshot(self, file: HubFile) -> Path:
        return self._storage / "snapshots" / self.commit / file.name

    def _is_here(self, file: HubFile) -> bool:
        blob = self._storage / "blobs" / (file.sha256 or "")
        return self._snapshot(file).exists() or (file.sha256 is not None and blob.exists())

    def _partial(self, file: HubFile) -> Path | None:
        return self._storage / "blobs" / f"{file.sha256}.incomplete" if file.sha256 else None

    def _target(self, file: HubFile) -> Path:
        """The blob that the library links to, or the file itself where there are no links."""
        from huggingface_hub.file_download import are_symlinks_supported

        if not are_symlinks_supported(self._cache):
            return self._snapshot(file)
        return self._storage / "blobs" / str(file.sha256)


class _Counted(io.BufferedWriter):
    """A file that is appended to and says how much of it there is."""

    def __init__(self, path: Path, progress: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._progress = progress

    def write(self, buffer: Any) -> int:
        """Append, and say where that ends."""
        written = super().write(buffer)
        self._progress(self.tell())
        return written


def require_free(folder: HubFolder, needed: int, cache: str) -> None:
    """Raise DiskFullError before anything is downloaded where the disk can't hold it."""
    free = facts.free_disk_bytes(cache)
    if needed > free:
        raise DiskFullError(
            f"{folder.model} needs {byte_text(needed)} more in {cache} and {byte_text(free)} are "
            "free: make room, or set HF_HOME to a folder on another disk"
        )


def byte_text(size: int) -> str:
    """A number of bytes for people."""
    value, units = float(size), ["bytes", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{size} bytes" if units[0] == "bytes" else f"{value:.1f} {units[0]}"
