"""A model as the user names it (hub id, diffusers folder, single file) -> a checked folder.

Whatever came in, what comes out is a diffusers folder, its family, and the digest of every file
that is used. Nothing here imports torch, except the conversion of a single file on its first use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from optimizer.configs import Config, read_json
from optimizer.digests import FileDigest, digest
from optimizer.layout import PICKLES, choose_files, family_of, variant_of
from optimizer.onnx_source import ABOUT, adopt, is_onnx_folder
from optimizer.store import ENTRY_NAME, Store
from optimizer.vae_config import completed
from optimizer.weights import Parameter, read_header
from profiles.errors import SpecError
from runners.console import Console
from runners.control_tasks import controlnet_names
from runners.receipts import sha256_of

if TYPE_CHECKING:
    from optimizer.component_source import ComponentSource

__all__ = [
    "HUB_ID",
    "Inspected",
    "ModelSource",
    "SourceKind",
    "inspect_folder",
    "resolve",
]

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""How an id of a hub model looks."""

SourceKind = Literal["folder", "hub", "single-file", "onnx"]
"""What the user gave; "onnx" is a folder that holds graphs and no torch weights."""


@dataclass(frozen=True)
class ModelSource:
    """A checked diffusers folder; equal digests mean equal models."""

    name: str
    """As the user gave it."""
    kind: SourceKind
    """What the user gave."""
    folder: Path
    """A diffusers folder, whatever came in."""
    revision: str | None
    """The hub's commit, for kind "hub" only."""
    family: str
    """A name of `optimizer.families.FAMILIES`."""
    pipeline_class: str
    """Of model_index.json."""
    files: Mapping[str, FileDigest]
    """Every file of the folder that is used, by its relative posix path."""
    vae: ComponentSource | None = None
    """In the place of the model's own VAE."""
    controls: tuple[ComponentSource, ...] = ()
    """Control networks beside it."""

    @property
    def digest(self) -> str:
        """The digest of all used files: the same wherever the folder lies; of the model's own."""
        return digest({name: [file.size, file.sha256] for name, file in self.files.items()})

    @property
    def settings(self) -> dict[str, Any]:
        """What model_index.json says of the pipeline beside its parts."""
        index = read_json(self.folder / "model_index.json")
        return {
            name: value
            for name, value in index.items()
            if not name.startswith("_") and (value is None or isinstance(value, str | int | float))
        }

    @property
    def control_folders(self) -> tuple[str, ...]:
        """What the control networks are called, as if each had a folder of the model's."""
        return controlnet_names(len(self.controls))

    def _given(self, name: str) -> ComponentSource | None:
        """What was given beside the model for a folder of this name."""
        if name == _VAE:
            return self.vae
        return dict(zip(self.control_folders, self.controls, strict=True)).get(name)

    def component_folder(self, name: str) -> Path:
        """Return where a component's config and weights lie."""
        given = self._given(name)
        return self.folder / name if given is None else given.folder

    @property
    def folders(self) -> frozenset[str]:
        """The folders that are used: those of components, of tokenizers and of the scheduler."""
        return frozenset(name.partition("/")[0] for name in self.files if "/" in name)

    def component_config(self, name: str) -> dict[str, Any]:
        """Return the config of a component's folder, such as "unet" or "scheduler".

        A VAE's has all keys that pipelines read.
        """
        return self.checked_config(name).document

    def checked_config(self, name: str) -> Config:
        """Return the same, what it lacks or has of a wrong type a SpecError where it is read."""
        folder, inside = self.component_folder(name), self._inside(name)
        for file in ("config.json", f"{name}_config.json", "preprocessor_config.json"):
            if file in inside:
                config = read_json(folder / file)
                if name == _VAE:
                    config = completed(config, where=str(folder))
                return Config(config, folder / file)
        raise SpecError(f"{folder} has no config.json: download the model again")

    def weight_files(self, component: str) -> tuple[Path, ...]:
        """Return the safetensors files of a component's folder, shards in order."""
        folder = self.component_folder(component)
        inside = self._inside(component)
        return tuple(folder / name for name in inside if name.endswith(".safetensors"))

    def _inside(self, component: str) -> list[str]:
        """The used files of a component's folder, by their names in it."""
        if (given := self._given(component)) is not None:
            return sorted(given.files)
        prefix = f"{component}/"
        return sorted(name.removeprefix(prefix) for name in self.files if name.startswith(prefix))

    def variant(self, component: str) -> str | None:
        """Return the variant ("fp16") to ask `from_pretrained` for, or None."""
        return next((variant_of(path.name) for path in self.weight_files(component)), None)

    @property
    def side_factor(self) -> int:
        """How many of its family's steps a side must be a multiple of: graphs may take fewer."""
        if self.kind != "onnx":
            return 1
        return int(read_json(self.folder / ABOUT)["side_factor"])

    def parameters(self, component: str) -> dict[str, Parameter]:
        """Return shape and type of every parameter of a component, as its files name them."""
        if self.kind == "onnx":
            shapes = read_json(self.folder / component / "parameters.json")
            return {name: Parameter(tuple(shape), "fp32") for name, shape in shapes.items()}
        return {
            name: parameter
            for path in self.weight_files(component)
            for name, parameter in read_header(path).items()
        }


_VAE = "vae"
"""The folder of the autoencoder in every family's pipelines."""


def resolve(
    model: str,
    *,
    revision: str | None = None,
    prediction_type: str | None = None,
    store: Store | None = None,
    console: Console | None = None,
    always_hash: bool = False,
) -> ModelSource:
    """Find, fetch or convert a model, and check every file of it that is used.

    `prediction_type` is that of a single file, `store` keeps converted ones, `console` shows a
    download's progress. Files that haven't changed since they were last hashed are hashed again
    with `always_hash` only. Raises `SpecError` for what is wrong with the input, `UnsupportedError`
    for a family that isn't known, `MissingError` for a model that is neither on disk nor can be
    fetched.
    """
    path = Path(model).expanduser()
    if revision is not None and path.exists():
        raise SpecError(f"{model} is on disk and has no revisions: leave --revision out")
    if path.is_file():
        from optimizer.single_file import convert

        folder = convert(
            path, store or Store(), prediction_type=prediction_type, always_hash=always_hash
        )
        return _source(folder, model, "single-file", always_hash=always_hash)
    _check_name(model, path, prediction_type)
    if path.is_dir() and is_onnx_folder(path):
        folder = adopt(path, _read_index(path), store or Store(), always_hash=always_hash)
        return _source(folder, model, "onnx", always_hash=always_hash)
    if path.is_dir():
        return _source(path, model, "folder", always_hash=always_hash)
    from optimizer.hub import fetch

    found = fetch(model, revision=revision, console=console)
    source = _source(found.folder, model, "hub", always_hash=always_hash)
    return replace(source, revision=found.revision)


def _check_name(model: str, path: Path, prediction_type: str | None) -> None:
    """Raise SpecError for what is neither a folder nor a hub id, and for a single file's option."""
    is_hub = HUB_ID.fullmatch(model) and path.suffix not in (*PICKLES, ".safetensors")
    if not path.is_dir() and not is_hub:
        raise SpecError(
            f"{model} is no file or folder here and no hub id: give a diffusers folder, a "
            ".safetensors checkpoint, or a hub id such as owner/name"
        )
    if prediction_type is not None:
        raise SpecError(
            f"{model} says in scheduler/scheduler_config.json what it predicts: leave "
            "--prediction-type out, which is for single files, or change prediction_type there"
        )


class Inspected(NamedTuple):
    """A diffusers folder whose used files are all there and whole, as far as headers tell."""

    family: str
    pipeline_class: str
    used: list[str]
    """Relative posix paths, sorted."""


def inspect_folder(folder: Path, *, name: str) -> Inspected:
    """What a diffusers folder holds; `name` is what the user calls it.

    Raises `SpecError` for what is wrong with it, `UnsupportedError` for an unknown family.
    """
    index = _read_index(folder)
    family = family_of(index, where=name)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if {ABOUT, ENTRY_NAME} <= set(names):  # one that `adopt` wrote: all of it is used
        used = sorted(set(names) - {ENTRY_NAME})
        return Inspected(family, str(index["_class_name"]), used)
    used = choose_files(names, index=index, where=str(folder))
    for file in used:
        if file.endswith(".safetensors"):
            read_header(folder / file)
    return Inspected(family, str(index["_class_name"]), used)


def _source(folder: Path, name: str, kind: SourceKind, *, always_hash: bool) -> ModelSource:
    found = inspect_folder(folder, name=name)
    return ModelSource(
        name=name,
        kind=kind,
        folder=folder,
        revision=None,
        family=found.family,
        pipeline_class=found.pipeline_class,
        files={
            file: FileDigest(
                (folder / file).stat().st_size, sha256_of(folder / file, always=always_hash)
            )
            for file in found.used
        },
    )


def _read_index(folder: Path) -> dict[str, Any]:
    if (folder / "model_index.json").is_file():
        return read_json(folder / "model_index.json")
    if (folder / "manifest.json").is_file():
        raise SpecError(
            f"{folder} is a kiln bundle: give the model that it was made from, which `kiln inspect "
            f"{folder}` names"
        )
    raise SpecError(
        f"{folder} is not a diffusers pipeline: it has no model_index.json; {_hint(folder)}"
    )


def _hint(folder: Path) -> str:
    if (folder / "config.json").is_file():
        return (
            f"it may be one component: give the whole model, such as {folder.parent}, and an "
            "autoencoder with --vae"
        )
    checkpoints = sorted(path.name for path in folder.glob("*.safetensors"))
    return (
        f"give {folder / checkpoints[0]} itself" if checkpoints else "give the folder that has it"
    )
