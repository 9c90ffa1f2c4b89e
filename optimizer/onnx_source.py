"""Folders that optimum exported -> a folder in the store, once: kiln's names, fp32, checked.

    given   COMPONENT/model.onnx [+ external data], COMPONENT/config.json, tokenizer/, scheduler/
    kept    COMPONENT/model.onnx + model.onnx.data, FOLDER/config.json, FOLDER/parameters.json, ...

A component is called as in the bundle (the VAE in halves), FOLDER is diffusers' (the VAE's halves
share one). There are no torch weights then, so nothing can be quantized.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from optimizer import families
from optimizer.backends import BACKENDS, backend
from optimizer.configs import Config
from optimizer.families.base import Family, Ranges
from optimizer.layout import family_of
from optimizer.store import Store
from optimizer.vae_config import TINY
from profiles.errors import SpecError, UnsupportedError
from runners.receipts import sha256_of
from runners.signature import Signature, TensorSpec

__all__ = [
    "ABOUT",
    "adopt",
    "as_exported",
    "coarser",
    "is_onnx_folder",
    "require_onnx_buildable",
    "wide_signatures",
]

ABOUT = "kiln-onnx.json"
"""Beside model_index.json of an adopted folder: which sides its graphs take."""

_VERSION = 1
"""Raised when anything else is written than before."""

_PREFIXES = ("ORT", "Onnx")
"""What optimum and diffusers put before the class of the pipeline that they exported."""

_ASSETS = ("scheduler", "tokenizer")
_PLAIN = (".json", ".txt", ".model")
_BESIDE = ("kiln.json", "prompts/calibration.txt")


def is_onnx_folder(folder: Path) -> bool:
    """Whether a pipeline's components are there as ONNX alone."""
    return (
        (folder / "model_index.json").is_file()
        and any(folder.glob("*/model.onnx"))
        and not any(folder.glob("*/*.safetensors"))
    )


def adopt(
    folder: Path, index: Mapping[str, Any], store: Store, *, always_hash: bool = False
) -> Path:
    """The checked copy of an optimum folder in the store.

    `index` is its model_index.json; with `always_hash`, receipts are ignored. Raises `SpecError`
    for what is missing or damaged in it, `UnsupportedError` for what kiln can't build from.
    """
    name = str(index.get("_class_name"))
    plain = next(
        (name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name
    )
    known = as_exported(families.family(family_of({"_class_name": plain}, where=str(folder))))
    files = _given_files(folder, known)
    key = {
        "files": {file: sha256_of(path, always=always_hash) for file, path in files.items()},
        "adopter": _VERSION,
    }
    found = store.find("source", key)
    if found is None:
        size = sum(path.stat().st_size for path in files.values())
        with store.create("source", key, needed_bytes=2 * size) as out:
            _write(folder, known, plain, files, out)
        found = store.find("source", key)
        assert found is not None
    return found


def _given_files(folder: Path, known: Family) -> dict[str, Path]:
    """Every file that is read, by its relative posix path."""
    from optimizer.onnx_files import external_files

    files = {name: folder / name for name in _BESIDE if (folder / name).is_file()}
    for spec in known.components:
        for name in (f"{spec.name}/config.json", f"{spec.name}/model.onnx"):
            if not (folder / name).is_file():
                raise SpecError(f"{folder} has no {name}: export the whole pipeline again")
            files[name] = folder / name
        for location in external_files(folder / spec.name / "model.onnx"):
            files[f"{spec.name}/{location}"] = folder / spec.name / location
    for asset in _ASSETS:
        inside = [path for path in sorted((folder / asset).glob("*")) if path.suffix in _PLAIN]
        if not inside:
            raise SpecError(f"{folder} has no {asset}: export the whole pipeline again")
        files |= {f"{asset}/{path.name}": path for path in inside}
    return files


def _write(folder: Path, known: Family, plain: str, files: Mapping[str, Path], out: Path) -> None:
    from optimizer.onnx_graph import normalized, resizes, save

    configs: dict[str, Config] = {}
    for spec in known.components:
        path = folder / spec.name / "config.json"
        configs[spec.folder] = Config(_read_config(path), path)
    if configs["vae"].get("_class_name") == TINY:
        raise UnsupportedError(
            f"{folder} has an {TINY}, whose ONNX export isn't read: compile from the model that it "
            "was exported from."
        )
    signatures = wide_signatures(known, configs)
    parameters: dict[str, dict[str, tuple[int, ...]]] = {}
    factor = 1
    for spec in known.components:
        model = normalized(
            folder / spec.name / "model.onnx", role=spec.role, signature=signatures[spec.name]
        )
        if spec.role == "denoiser":
            factor = 2 ** resizes(model)
        (out / spec.name).mkdir(exist_ok=True)
        shapes = save(model, out / spec.name / "model.onnx")
        prefix = spec.prefixes[0]
        found = parameters.setdefault(spec.folder, {})
        found |= {f"{prefix}{name}": shape for name, shape in shapes.items()}
    for name, config in configs.items():
        (out / name).mkdir(exist_ok=True)
        _dump(config.document, out / name / "config.json")
        _dump(parameters[name], out / name / "parameters.json")
    for name in (*_BESIDE, *(name for name in files if name.startswith(_ASSETS))):
        if name in files:
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(files[name], out / name)
    _dump({"_class_name": plain}, out / "model_index.json")
    _dump({"side_factor": factor}, out / ABOUT)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise SpecError(f"{path} is damaged: {error}; export it again") from error
    if not isinstance(document, dict):
        raise SpecError(f"{path} is damaged: it holds no JSON object; export it again")
    return document


def _dump(document: object, path: Path) -> None:
    path.write_text(json.dumps(document), "utf-8")


def wide_signatures(
    known: Family, configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Signature]:
    """The signatures of a family's components with ranges that exclude nothing."""
    native, step = known.native_size(configs), known.size_step(configs)
    return known.signatures(configs, Ranges(step, native, 1 << 16, 1 << 10))


_AS_EXPORTED = {"clip_text": "clip_plain", "unet": "unet_timestep"}
"""A wrapper -> that of the graph that optimum makes of the same module."""


def as_exported(known: Family) -> Family:
    """The family with the calling conventions of optimum's graphs.

    Raises UnsupportedError for a family whose graphs aren't read.
    """
    wrappers = {
        spec.name: _AS_EXPORTED.get(spec.wrapper, spec.wrapper) for spec in known.components
    }
    if any(
        spec.wrapper == wrappers[spec.name] and not spec.role.startswith("vae")
        for spec in known.components
    ):
        raise UnsupportedError(
            f"ONNX exports of {known.title} aren't read: compile from the model that it was "
            "exported from."
        )

    components = tuple(replace(spec, wrapper=wrappers[spec.name]) for spec in known.components)
    signatures = partial(_exported_signatures, known.signatures, wrappers)
    return replace(known, components=components, signatures=signatures)


def _exported_signatures(
    made: Callable[..., dict[str, Signature]],
    wrappers: Mapping[str, str],
    configs: Mapping[str, Mapping[str, Any]],
    ranges: Ranges,
) -> dict[str, Signature]:
    found = made(configs, ranges)
    return {name: _exported_signature(found[name], wrappers[name]) for name in found}


def _exported_signature(signature: Signature, wrapper: str) -> Signature:
    """Timesteps as numbers, one length of prompts, the last hidden state alone."""
    timestep = TensorSpec(name="timestep", dtype="float32", axes=("batch",))
    changed: dict[str, Any] = {}
    if wrapper == "unet_timestep":
        changed["inputs"] = tuple(
            timestep if spec.name == "time_features" else spec for spec in signature.inputs
        )
        changed["dims"] = tuple(
            dim.model_copy(update={"max": dim.min}) if dim.name == "tokens" else dim
            for dim in signature.dims
        )
    if wrapper == "clip_plain":
        changed["outputs"] = tuple(s for s in signature.outputs if s.name != "hidden_states")
    return signature.model_copy(update=changed)


def coarser(signature: Signature, factor: int) -> Signature:
    """The signature with sides in steps `factor` times as wide.

    A UNet that was traced at sides that all its levels divide takes no others (FACTS.md).
    """
    dims = tuple(
        dim.model_copy(update={"multiple_of": dim.multiple_of * factor})
        if dim.name in ("height", "width")
        else dim
        for dim in signature.dims
    )
    return signature.model_copy(update={"dims": dims})


def require_onnx_buildable(name: str, quant: str, backend_name: str) -> None:
    """Raise UnsupportedError for what can't be made of a model that is there as ONNX only."""
    if quant != "none":
        raise UnsupportedError(
            f"{name} is an ONNX export, which can't be quantized (--quant {quant}): compile from "
            "the model that it was exported from, or use --quant none."
        )
    if backend(backend_name).form != "onnx":
        able = [item.name for item in BACKENDS.values() if item.form == "onnx"]
        raise UnsupportedError(
            f"{name} is an ONNX export, which the backend {backend_name} can't build from: use "
            f"--backend {', '.join(able[:-1])} or {able[-1]}, or compile from the model that it "
            "was exported from."
        )
