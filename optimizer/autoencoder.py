"""Another autoencoder in the VAE's place (`--vae`): a folder, or a hub id of one such."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from optimizer.component_source import ComponentSource, read_headers
from optimizer.configs import read_json
from optimizer.layout import AUTOENCODER, chosen_by, described_by, require_described
from optimizer.source import HUB_ID, ModelSource
from optimizer.vae_config import require_fitting
from profiles.errors import SpecError, UnsupportedError
from runners.console import Console

__all__ = [
    "inspect_autoencoder",
    "resolve_autoencoder",
    "with_autoencoder",
]


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
) -> ComponentSource:
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
) -> ComponentSource:
    used, class_name = inspect_autoencoder(folder, name=name)
    return ComponentSource.of_files(
        folder,
        used,
        name=name,
        kind=kind,
        revision=revision,
        class_name=class_name,
        always_hash=always_hash,
    )


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
    read_headers(folder, used)
    return used, str(config["_class_name"])
