"""Another autoencoder in the VAE's place (`--vae`): a folder, or a hub id of one such.

What is used of it are config.json and the weights beside it, as in a pipeline's own vae folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from optimizer.configs import read_json
from optimizer.digests import FileDigest, digest
from optimizer.layout import AUTOENCODER, chosen_by, described_by, require_described
from optimizer.source import HUB_ID, ModelSource
from optimizer.vae_config import require_fitting
from optimizer.weights import read_header
from profiles.errors import SpecError, UnsupportedError
from runners.console import Console
from runners.receipts import sha256_of

__all__ = [
    "AutoencoderSource",
    "inspect_autoencoder",
    "resolve_autoencoder",
    "with_autoencoder",
]


@dataclass(frozen=True)
class AutoencoderSource:
    """A checked folder of one autoencoder; equal digests mean equal autoencoders."""

    name: str
    """As the user gave it."""
    kind: Literal["folder", "hub"]
    folder: Path
    revision: str | None
    """The hub's commit, for kind "hub" only."""
    class_name: str
    """One of `optimizer.vae_config.AUTOENCODERS`."""
    files: Mapping[str, FileDigest]
    """Every file of the folder that is used, by its name."""

    @property
    def digest(self) -> str:
        """The digest of all used files: the same wherever the folder lies."""
        return digest({name: [file.size, file.sha256] for name, file in self.files.items()})


def with_autoencoder(
    source: ModelSource,
    name: str,
    *,
    revision: str | None,
    console: Console | None = None,
    always_hash: bool = False,
) -> ModelSource:
    """The model with the autoencoder `name` in the place of its own VAE.

    Raises `UnsupportedError` for a model that is there as ONNX only, `SpecError` for an autoencoder
    that doesn't fit it, and what `resolve_autoencoder` raises.
    """
    if source.kind == "onnx":
        raise UnsupportedError(
            f"{source.name} is an ONNX export, whose VAE can't be replaced (--vae {name}): compile "
            "from the model that it was exported from, or leave --vae out."
        )
    own = source.component_config("vae")
    vae = resolve_autoencoder(name, revision=revision, console=console, always_hash=always_hash)
    found = replace(source, vae=vae)
    require_fitting(found.component_config("vae"), own, where=f"--vae {name}")
    return found


def resolve_autoencoder(
    name: str,
    *,
    revision: str | None,
    console: Console | None = None,
    always_hash: bool = False,
) -> AutoencoderSource:
    """Find or fetch an autoencoder, and check every file of it that is used.

    Files that haven't changed since they were last hashed are hashed with `always_hash` only.
    Raises what `optimizer.source.resolve` raises for a model.
    """
    path = Path(name).expanduser()
    if revision is not None and path.exists():
        raise SpecError(f"--vae {name} is on disk and has no revisions: leave --vae-revision out")
    if path.is_dir():
        return _source(path, name=name, kind="folder", revision=None, always_hash=always_hash)
    if path.is_file() or not HUB_ID.fullmatch(name):
        seen = "a file" if path.is_file() else "no folder here and no hub id"
        raise SpecError(
            f"--vae {name} is {seen}: give a folder of one autoencoder (config.json and "
            ".safetensors), or a hub id such as owner/name"
        )
    from optimizer.hub import fetch

    found = fetch(name, revision=revision, accepted=(AUTOENCODER,), console=console)
    return _source(
        found.folder, name=name, kind="hub", revision=found.revision, always_hash=always_hash
    )


def _source(
    folder: Path,
    *,
    name: str,
    kind: Literal["folder", "hub"],
    revision: str | None,
    always_hash: bool,
) -> AutoencoderSource:
    used, class_name = inspect_autoencoder(folder, name=name)
    files = {
        file: FileDigest(
            (folder / file).stat().st_size, sha256_of(folder / file, always=always_hash)
        )
        for file in used
    }
    return AutoencoderSource(name, kind, folder, revision, class_name, files)


def inspect_autoencoder(folder: Path, *, name: str) -> tuple[list[str], str]:
    """The used files of an autoencoder's folder, whose weights are seen to be whole; its class.

    `name` is what the user calls it. Raises SpecError for what is wrong with it.
    """
    accepted = (AUTOENCODER,)
    names = [path.name for path in folder.iterdir() if path.is_file()]
    marker = described_by(names, accepted=accepted, where=name)
    config = read_json(folder / marker)
    require_described(marker, config, accepted=accepted, where=name)
    used = chosen_by(marker, names, document=config, where=name)
    for file in used:
        if file.endswith(".safetensors"):
            read_header(folder / file)
    return used, str(config["_class_name"])
