"""What the manifest says of memory: each engine's by pixels of the picture, and the process's base.

The base is what a real drawing process took beyond what its engines' measurements explain, so that
prediction and reality agree where the bundle was made. So is what closed engines leave behind, of a
process that opens them in turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runners.files import MAPPED_FROM
from runners.manifest import Manifest
from runners.memory import (
    Asked,
    Feature,
    PartMemory,
    PipelineMemory,
    Residency,
    is_guided,
    parts_of,
    rows,
)
from runners.signature import Signature

__all__ = [
    "PEAK_NAME",
    "PIXEL_BYTES",
    "calibrated",
    "form_memory",
    "part_memory",
    "per_pixel",
    "places_per_pixel",
]

PEAK_NAME = "peak.json"
"""Beside the self-test's picture: the most that the process that drew it had resident."""

PIXEL_BYTES = 60.0
"""Of each pixel while a picture is made of what the decoder gave: five arrays of three floats
(diffusers' VaeImageProcessor: scaled, clamped, permuted, times 255, rounded); 50 were measured."""

_GROWTH = 1.08
"""What grows with the shape is taken as so much larger: an engine that is measured beside freed
memory reuses it where a fresh process asks for more (3 to 5 % more were seen)."""

_SPARE = 0.005
"""Of the peak, added to the base: a prediction should be over rather than under. Two runs of the
same differ by as much (5 MB of 750)."""


def part_memory(
    measured: Mapping[str, Any] | None, folder: Path, signature: Signature, *, side_min: int
) -> PartMemory | None:
    """Of an engine whose files lie in the bundle's `folder`; None where it wasn't measured.

    `side_min`: the smallest side in pixels, whose places the signature's dims begin with.
    """
    if measured is None:
        return None
    sizes = (path.stat().st_size for path in folder.iterdir())
    held = sum(size for size in sizes if size < MAPPED_FROM)
    part = form_memory(measured, signature, side_min=side_min)
    return part and part.model_copy(update={"held_bytes": held})


def form_memory(
    measured: Mapping[str, Any] | None, signature: Signature, *, side_min: int
) -> PartMemory | None:
    """The same of a form, whose files are counted with those of its component."""
    if measured is None:
        return None
    part = PartMemory.model_validate(measured)
    return _grown(per_pixel(part, places_per_pixel(signature, side_min)))


def calibrated(
    manifest: Manifest, *, side: int, kept_bytes: int, in_turn_bytes: int
) -> PipelineMemory | None:
    """What a process has beside its engines, by what two that drew a picture of `side` x `side`
    pixels took at most: one kept its engines open, one opened them in turn.

    None where an engine wasn't measured.
    """
    memory = PipelineMemory(base_bytes=0, pixel_bytes=PIXEL_BYTES, source="measured")
    # a task of the pipeline's own that starts from a picture encodes first, which is the smaller
    asked = Asked(side, side, guided=is_guided(manifest))
    seen: tuple[tuple[Residency, str, int], ...] = (
        ("keep", "base_bytes", kept_bytes),
        ("sequential", "left_bytes", in_turn_bytes),
    )
    for residency, name, peak in seen:
        parts = parts_of(manifest.model_copy(update={"memory": memory}))
        if parts is None:
            return None
        explained = rows(parts, asked, residency=residency, tiled=False)[0].peak_bytes
        unexplained = round((1 + _SPARE) * peak) - explained
        memory = memory.model_copy(update={name: max(0, unexplained)})
    return memory


def places_per_pixel(signature: Signature, side_min: int) -> float:
    """How many places an engine sees for each pixel of the picture; 0 for a text encoder."""
    least = {dim.name: dim.min for dim in signature.dims}
    places = least.get("sequence") or least.get("height", 0) * least.get("width", 0)
    return places / side_min**2


def per_pixel(part: PartMemory, ratio: float) -> PartMemory:
    """The same by pixels of the picture, of which `ratio` places are made."""
    return _scaled(part, {"pixels": ratio, "pixels_squared": ratio**2})


def _grown(part: PartMemory) -> PartMemory:
    growing: tuple[Feature, ...] = ("pixels", "pixels_squared", "tokens")
    return _scaled(part, dict.fromkeys(growing, _GROWTH))


def _scaled(part: PartMemory, factors: Mapping[Feature, float]) -> PartMemory:
    def scaled(given: Mapping[Feature, float]) -> dict[Feature, float]:
        return {name: value * factors.get(name, 1) for name, value in given.items()}

    return part.model_copy(update={"stays": scaled(part.stays), "peak": scaled(part.peak)})
