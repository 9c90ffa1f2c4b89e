"""The component itself, as runners.engines.eager stores it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from optimizer.backends import Built, How
from optimizer.forms import form_wrapper
from optimizer.progress import Progress

__all__ = ["build", "build_form", "low_bit_layers"]


_FILES = {"config": "config.json", "layers": "layers.json", "weights": "weights.safetensors"}


def build(source: Path, out: Path, how: How, progress: Progress) -> Built:  # noqa: ARG001
    """Copy config, layer table and weights into `out`."""
    for name in _FILES.values():
        shutil.copyfile(source / name, out / name)
    return Built(files=dict(_FILES), properties=_properties(how, how.wrapper))


def build_form(source: Path, out: Path, how: How, name: str) -> Built:
    """Copy what the form needs beside the plain engine's files: a module needs no other graph."""
    own = {}
    if "lora" in name.split("+"):
        own["lora"] = "lora.safetensors"
        shutil.copyfile(source / own["lora"], out / own["lora"])
    wrapper = form_wrapper(how.wrapper, name)
    return Built(files={**_FILES, **own}, properties=_properties(how, wrapper))


def _properties(how: How, wrapper: str) -> dict[str, str | int | float | bool]:
    return {"wrapper": wrapper, "dtype": {"fp32": "f32"}.get(how.dtype, how.dtype)}


def low_bit_layers(engine: Any) -> int:
    """Those that round their inputs as they come; all others are products of floats."""
    return int(engine.low_bit_layers)
