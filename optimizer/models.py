"""`kiln models`: the models that are on this machine, and the bundles that were made from them.

Looked up from names, sizes and headers; nothing is digested.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optimizer import families
from optimizer.hub_files import byte_text
from optimizer.known_models import licence_of, seen_bundles, seen_models
from optimizer.source import inspect_folder
from optimizer.weights import read_header
from profiles.errors import KilnError
from runners.bundle import read_manifest
from runners.console import Console, quiet_libraries

if TYPE_CHECKING:
    from runners.manifest import Manifest

__all__ = ["LocalBundle", "LocalModel", "local_models", "models_command"]


@dataclass(frozen=True)
class LocalBundle:
    """A bundle that is still where it was written."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine."""

    name: str
    """A hub id, or the path that `kiln compile` takes."""
    kind: str
    """hub, folder, single-file, ...: as `ModelSource` calls it."""
    path: Path
    family: str | None
    """None where kiln can't compile it."""
    problem: str | None
    """Why not, in one sentence."""
    revision: str | None = None
    digest: str | None = None
    """As it was when it was last compiled; None where it wasn't."""
    licence: str | None = None
    bundles: tuple[LocalBundle, ...] = ()

    @property
    def bytes(self) -> int:
        """On disk, everything beneath its folder; links are followed, each file counts once."""
        paths = self.path.rglob("*") if self.path.is_dir() else (self.path,)
        files = {path.resolve() for path in paths if path.is_file()}
        return sum(file.stat().st_size for file in files)

    def made(self, bundle: LocalBundle) -> bool:
        """Whether a bundle was made from it."""
        model = bundle.manifest.model
        if self.revision and (model.name, model.revision) == (self.name, self.revision):
            return True
        return model.digest == self.digest


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
def models_command(
    as_json: bool,  # noqa: FBT001
) -> None:
    """List the models on this machine: of the hub's cache, of $KILN_MODELS, and compiled before."""
    quiet_libraries()
    found = local_models()
    document = {"models": [_document(model) for model in found]}
    Console(json_output=as_json).result(_text(found), document)


def local_models() -> list[LocalModel]:
    """Every model that is found, by name, with its bundles."""
    bundles = [bundle for path in seen_bundles() if (bundle := _bundle(path)) is not None]
    found: dict[Path, LocalModel] = {}
    for model in (*_of_hub(), *_compiled(), *_of_folders()):
        first = found.setdefault(model.path.resolve(), model)
        if first.digest is None and model.digest is not None:
            found[model.path.resolve()] = replace(first, digest=model.digest)
    return [
        replace(model, bundles=tuple(bundle for bundle in bundles if model.made(bundle)))
        for model in sorted(found.values(), key=lambda model: (model.name, model.revision or ""))
    ]


def _bundle(path: Path) -> LocalBundle | None:
    try:
        return LocalBundle(path, read_manifest(path))
    except KilnError:
        return None


def _of_hub() -> Iterator[LocalModel]:
    """Every commit of a diffusers pipeline in the hub library's cache."""
    from huggingface_hub import constants

    for index in Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/model_index.json"):
        folder = index.parent
        name = folder.parents[1].name.removeprefix("models--").replace("--", "/")
        family, problem = _family(folder, name)
        licence = licence_of(name, folder.name)
        yield LocalModel(
            name, "hub", folder, family, problem, revision=folder.name, licence=licence
        )


def _compiled() -> Iterator[LocalModel]:
    """What was compiled before and is still where it was."""
    for seen in seen_models():
        name = str(seen.path)
        whole = seen.kind in ("single-file", "onnx")
        family, problem = (seen.family, None) if whole else _family(seen.path, name)
        yield LocalModel(name, seen.kind, seen.path, family, problem, digest=seen.digest)


def _of_folders() -> Iterator[LocalModel]:
    """Models in the folders of $KILN_MODELS, which are separated as those of $PATH are."""
    for root in filter(None, os.environ.get("KILN_MODELS", "").split(os.pathsep)):
        for folder, folders, files in os.walk(Path(root).expanduser()):
            here = Path(folder)
            if "model_index.json" in files:
                folders.clear()
                yield LocalModel(str(here), "folder", here, *_family(here, str(here)))
                continue
            for name in files:
                if name.endswith(".safetensors") and (family := _family_of_file(here / name)):
                    yield LocalModel(str(here / name), "single-file", here / name, family, None)


def _family(folder: Path, name: str) -> tuple[str | None, str | None]:
    """The family of a diffusers folder, or why it can't be compiled."""
    try:
        return inspect_folder(folder, name=name).family, None
    except KilnError as error:
        return None, str(error)


def _family_of_file(path: Path) -> str | None:
    """The family of a single-file checkpoint; None for LoRAs, parts and what isn't known."""
    try:
        shapes = {name: parameter.shape for name, parameter in read_header(path).items()}
    except (KilnError, OSError):
        return None
    return families.detect_checkpoint(shapes)


def _document(model: LocalModel) -> dict[str, Any]:
    return {
        "model": model.name,
        "kind": model.kind,
        "family": model.family,
        "revision": model.revision,
        "licence": model.licence,
        "bytes": model.bytes,
        "path": str(model.path),
        "problem": model.problem,
        "bundles": [_bundle_document(bundle) for bundle in model.bundles],
    }


def _bundle_document(bundle: LocalBundle) -> dict[str, Any]:
    denoiser = bundle.manifest.component("denoiser")
    return {
        "path": str(bundle.path),
        "quant": denoiser.quant,
        "dtype": denoiser.dtype,
        "backend": denoiser.backend,
        "bytes": sum(file.size for file in bundle.manifest.files.values()),
    }


def _text(models: list[LocalModel]) -> str:
    if not models:
        return (
            "No model is known here: `kiln pull owner/name` fetches one, and `kiln compile` takes "
            "any diffusers folder or .safetensors checkpoint."
        )
    return "\n".join(line for model in models for line in _lines(model))


def _lines(model: LocalModel) -> Iterator[str]:
    revision = f" at {model.revision[:12]}" if model.revision else ""
    licence = f", licence {model.licence}" if model.licence else ""
    size = byte_text(model.bytes)
    yield f"{model.name}{revision}: {model.family or 'not usable'}, {size}{licence}"
    if model.kind == "hub":
        yield f"  in {model.path}"
    if model.problem:
        yield f"  {model.problem}"
    for bundle in model.bundles:
        made = _bundle_document(bundle)
        yield (
            f"  bundle {made['path']}: {made['quant']}/{made['dtype']} on {made['backend']}, "
            f"{byte_text(made['bytes'])}"
        )
