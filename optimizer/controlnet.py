"""Control networks beside a model (`--controlnet`): folders, or hub ids, of a ControlNet each.

What is used of one are config.json and the weights beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from optimizer.configs import read_json
from optimizer.digests import FileDigest, digest
from optimizer.families import family
from optimizer.families.controls import require_control_fitting, require_control_known
from optimizer.layout import COMPONENT, chosen_by
from optimizer.source import HUB_ID, ModelSource
from optimizer.weights import read_header
from profiles.errors import SpecError, UnsupportedError
from runners.console import Console
from runners.control_tasks import CONTROL_TASKS
from runners.receipts import sha256_of

__all__ = ["MOST_CONTROLS", "ControlSource", "resolve_controlnet", "with_controlnets"]

MOST_CONTROLS = 8
"""Beside one model: each is an engine of about half of its denoiser's size."""


@dataclass(frozen=True)
class ControlSource:
    """A checked folder of one control network; equal digests mean equal networks."""

    name: str
    """As the user gave it, without a revision."""
    kind: Literal["folder", "hub"]
    folder: Path
    revision: str | None
    """The hub's commit, for kind "hub" only."""
    class_name: str
    """One of `optimizer.families.controls.CONTROLNETS`."""
    files: Mapping[str, FileDigest]
    """Every file of the folder that is used, by its name."""

    @property
    def digest(self) -> str:
        """The digest of all used files: the same wherever the folder lies."""
        return digest({name: [file.size, file.sha256] for name, file in self.files.items()})

    @property
    def pinned(self) -> str:
        """Its name with the hub's commit, as a recipe keeps it."""
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def with_controlnets(
    source: ModelSource, names: Sequence[str], *, console: Console | None = None
) -> ModelSource:
    """The model with these control networks, in this order.

    Raises `UnsupportedError` for a model that can't have any here, `SpecError` for a network that
    was made for another kind of model, and what `resolve_controlnet` raises.
    """
    if not names:
        return source
    _require_controllable(source)
    if len(names) > MOST_CONTROLS:
        raise SpecError(f"--controlnet names {len(names)} networks: give {MOST_CONTROLS} or fewer.")
    controls = tuple(resolve_controlnet(name, console=console) for name in names)
    found = replace(source, controls=controls)
    configs = {name: source.checked_config(name) for name in ("unet", "vae")}
    for control, folder in zip(controls, found.control_folders, strict=True):
        where = f"--controlnet {control.name}"
        require_control_fitting(found.checked_config(folder), configs, where=where)
    return found


def _require_controllable(source: ModelSource) -> None:
    if source.kind == "onnx":
        raise UnsupportedError(
            f"{source.name} is an ONNX export, which takes no control networks: compile from the "
            "model that it was exported from, or leave --controlnet out."
        )
    if source.pipeline_class not in CONTROL_TASKS:
        raise UnsupportedError(
            f"{source.name} ({family(source.family).title}, {source.pipeline_class}) takes no "
            f"control networks here: those of {', '.join(CONTROL_TASKS)} do; leave --controlnet "
            "out."
        )


def resolve_controlnet(name: str, *, console: Console | None = None) -> ControlSource:
    """Find or fetch a control network, and check every file of it that is used.

    `name` is a folder, or a hub id with or without @REVISION. Raises what
    `optimizer.source.resolve` raises for a model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _source(path, name=name, kind="folder", revision=None)
    hub_id, _, revision = name.partition("@")
    if path.is_file() or not HUB_ID.fullmatch(hub_id):
        seen = "a file" if path.is_file() else "no folder here and no hub id"
        raise SpecError(
            f"--controlnet {name} is {seen}: give a folder of one ControlNet (config.json and "
            ".safetensors), or a hub id such as owner/name"
        )
    from optimizer.hub import fetch

    found = fetch(hub_id, revision=revision or None, accepted=(COMPONENT,), console=console)
    return _source(found.folder, name=hub_id, kind="hub", revision=found.revision)


def _source(
    folder: Path, *, name: str, kind: Literal["folder", "hub"], revision: str | None
) -> ControlSource:
    where = f"--controlnet {name}"
    names = [path.name for path in folder.iterdir() if path.is_file()]
    if COMPONENT not in names:
        raise SpecError(
            f"{where} is no ControlNet: it has no {COMPONENT}; give a folder that has it, or the "
            "hub id of a ControlNet alone"
        )
    config = read_json(folder / COMPONENT)
    require_control_known(config, where=where)
    used = chosen_by(COMPONENT, names, document=config, where=where)
    for file in used:
        if file.endswith(".safetensors"):
            read_header(folder / file)
    files = {
        file: FileDigest((folder / file).stat().st_size, sha256_of(folder / file, always=False))
        for file in used
    }
    return ControlSource(name, kind, folder, revision, str(config["_class_name"]), files)
