"""Single-file checkpoints of community hubs -> a diffusers folder in the store, once, offline."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path

from optimizer import families
from optimizer.digests import sha256_file
from optimizer.layout import PICKLES, known_families
from optimizer.store import Store
from optimizer.weights import read_header
from profiles.errors import SpecError, UnsupportedError

__all__ = ["CONVERTERS", "convert"]

CONVERTERS: dict[str, str] = {
    "flux": "optimizer.families.flux_checkpoint:convert",
    "sd1": "optimizer.families.sd1_checkpoint:convert",
    "sd3": "optimizer.families.sd3_checkpoint:convert",
    "sdxl": "optimizer.families.sdxl_checkpoint:convert",
}
"""Family -> function(checkpoint: Path, folder: Path) that writes a diffusers folder."""

_VERSION = 1
"""Raised when a converter writes anything else than before."""


def convert(checkpoint: Path, store: Store) -> Path:
    """Return the diffusers folder of a .safetensors checkpoint; it is kept in the store.

    Weights keep their type. Raises `SpecError` for another kind of file, `UnsupportedError` for an
    unknown family.
    """
    family = _detect(checkpoint)
    key = {
        "checkpoint": sha256_file(checkpoint),
        "converter": [CONVERTERS[family], _VERSION],
    }
    found = store.find("source", key)
    if found is None:
        module, function = CONVERTERS[family].split(":")
        write: Callable[[Path, Path], None] = getattr(importlib.import_module(module), function)
        with store.create("source", key, needed_bytes=checkpoint.stat().st_size) as folder:
            write(checkpoint, folder)
        found = store.find("source", key)
        assert found is not None
    return found


def _detect(checkpoint: Path) -> str:
    if checkpoint.suffix in PICKLES:
        raise SpecError(
            f"{checkpoint} is a pickle, which can run code when it is loaded: convert it with "
            f"`python -m optimizer.unpickle {checkpoint}`, or use the .safetensors version of it"
        )
    if checkpoint.suffix != ".safetensors":
        raise SpecError(
            f"{checkpoint} is no model: give a diffusers folder, a .safetensors checkpoint, or a "
            "hub id such as owner/name"
        )
    shapes = {name: parameter.shape for name, parameter in read_header(checkpoint).items()}
    family = families.detect_checkpoint(shapes)
    if family is None:
        raise UnsupportedError(f"{checkpoint} {_describe(shapes)}: give one of {known_families()}")
    return family


def _describe(names: Iterable[str]) -> str:
    """Say what a file that is no known checkpoint is, where its names tell."""
    names = list(names)
    if any("lora" in name for name in names):
        return "holds a LoRA and no whole model"
    if any(name.startswith(("down_blocks.", "text_model.", "decoder.")) for name in names):
        return "holds one component and no whole model"
    first = f"its first tensor is {names[0]}" if names else "it holds no tensor"
    return f"is of a family that kiln does not know ({first})"
