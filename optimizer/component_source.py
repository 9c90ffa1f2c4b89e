"""One component that is given beside a model: an autoencoder (`--vae`) or a control network.

What is used of it are config.json and the weights beside it, from a folder or a hub id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from optimizer.digests import FileDigest, digest
from optimizer.weights import read_header
from runners.receipts import sha256_of

__all__ = ["ComponentSource", "read_headers"]


def read_headers(folder: Path, used: Iterable[str]) -> None:
    """Raise SpecError where one of the files of weights in `folder` isn't whole."""
    for file in used:
        if file.endswith(".safetensors"):
            read_header(folder / file)


@dataclass(frozen=True)
class ComponentSource:
    """A checked folder of one component; equal digests mean equal components."""

    name: str
    """As the user gave it, without a revision."""
    kind: Literal["folder", "hub"]
    folder: Path
    revision: str | None
    """The hub's commit, for kind "hub" only."""
    class_name: str
    """Diffusers' class, as its config.json says."""
    files: Mapping[str, FileDigest]
    """Every file of the folder that is used, by its name."""

    @classmethod
    def of_files(
        cls,
        folder: Path,
        used: Iterable[str],
        *,
        name: str,
        kind: Literal["folder", "hub"],
        revision: str | None,
        class_name: str,
        always_hash: bool,
    ) -> ComponentSource:
        """Hash the `used` files: those that haven't changed since only with `always_hash`."""
        files = {
            file: FileDigest(
                (folder / file).stat().st_size, sha256_of(folder / file, always=always_hash)
            )
            for file in used
        }
        return cls(name, kind, folder, revision, class_name, files)

    @property
    def digest(self) -> str:
        """The digest of all used files: the same wherever the folder lies."""
        return digest({name: [file.size, file.sha256] for name, file in self.files.items()})

    @property
    def pinned(self) -> str:
        """Its name with the hub's commit, as a recipe keeps control networks."""
        return self.name if self.revision is None else f"{self.name}@{self.revision}"
