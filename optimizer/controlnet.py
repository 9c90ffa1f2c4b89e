"""Control networks beside a model (`--controlnet`): folders, or hub ids, of a ControlNet each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from optimizer.component_source import ComponentSource, read_headers
from optimizer.configs import read_json
from optimizer.families import family
from optimizer.families.controls import require_control_fitting, require_control_known
from optimizer.layout import COMPONENT, chosen_by
from optimizer.source import HUB_ID, ModelSource
from profiles.errors import SpecError, UnsupportedError
from runners.console import Console
from runners.control_tasks import CONTROL_TASKS

__all__ = ["MOST_CONTROLS", "resolve_controlnet", "with_controlnets"]

MOST_CONTROLS = 8
"""Beside one model: each is an engine of about half of its denoiser's size."""


def with_controlnets(
    source: ModelSource,
    names: Sequence[str],
    *,
    console: Console | None = None,
    always_hash: bool = False,
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
    controls = tuple(
        resolve_controlnet(name, console=console, always_hash=always_hash) for name in names
    )
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


def resolve_controlnet(
    name: str, *, console: Console | None = None, always_hash: bool = False
) -> ComponentSource:
    """Find or fetch a control network, and check every file of it that is used.

    `name` is a folder, or a hub id with or without @REVISION. Files that haven't changed since they
    were last hashed are hashed with `always_hash` only. Raises what
    `optimizer.source.resolve` raises for a model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _source(path, name=name, kind="folder", revision=None, always_hash=always_hash)
    hub_id, _, revision = name.partition("@")
    if path.is_file() or not HUB_ID.fullmatch(hub_id):
        seen = "a file" if path.is_file() else "no folder here and no hub id"
        raise SpecError(
            f"--controlnet {name} is {seen}: give a folder of one ControlNet (config.json and "
            ".safetensors), or a hub id such as owner/name"
        )
    from optimizer.hub import fetch

    found = fetch(hub_id, revision=revision or None, accepted=(COMPONENT,), console=console)
    return _source(
        found.folder, name=hub_id, kind="hub", revision=found.revision, always_hash=always_hash
    )


def _source(
    folder: Path,
    *,
    name: str,
    kind: Literal["folder", "hub"],
    revision: str | None,
    always_hash: bool,
) -> ComponentSource:
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
    read_headers(folder, used)
    return ComponentSource.of_files(
        folder,
        used,
        name=name,
        kind=kind,
        revision=revision,
        class_name=str(config["_class_name"]),
        always_hash=always_hash,
    )
