"""The model families, one file each; `FAMILIES` is the only list of them.

A family's file holds everything that is known of it: class names, checkpoint keys, components,
signatures, sample inputs, and which layers are fragile. To add one: a file, and a line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optimizer.families.base import Family

__all__ = ["FAMILIES", "detect_checkpoint", "detect_pipeline", "family"]

FAMILIES: dict[str, str] = {
    "sd1": "optimizer.families.sd1:SD1",
    "sdxl": "optimizer.families.sdxl:SDXL",
    "sd3": "optimizer.families.sd3:SD3",
    "flux": "optimizer.families.flux:FLUX",
}


def family(name: str) -> Family:
    """The family called `name`; KeyError where there is none."""
    module, attribute = FAMILIES[name].split(":")
    found: Family = getattr(import_module(module), attribute)
    return found


def detect_pipeline(class_name: str) -> str | None:
    """The family whose pipelines include `class_name` (of model_index.json), or None."""
    return next((n for n in FAMILIES if class_name in family(n).pipeline_classes), None)


def detect_checkpoint(keys: Mapping[str, tuple[int, ...]]) -> str | None:
    """The family that a single-file checkpoint's keys and shapes belong to, or None."""
    return next((n for n in FAMILIES if family(n).owns_checkpoint(keys)), None)
