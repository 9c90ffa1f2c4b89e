"""The way to draw a request: the best that fits into the memory that is free now, and its ladder.

The same rows, and the same choice among them, are what `kiln plan` prints.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from profiles.errors import SpecError
from profiles.facts import Facts
from profiles.tiers import Device
from runners import gauge
from runners.ladder import Ladder
from runners.memory import (
    Asked,
    Residency,
    Row,
    Way,
    choose,
    gib,
    is_guided,
    parts_of,
    rows,
    smaller,
    ways,
)
from runners.outlook import budget_of

if TYPE_CHECKING:
    from runners.manifest import Manifest
    from runners.requests import Request

__all__ = ["Choice", "Wanted", "chosen"]

Size = tuple[int, int]


@dataclass(frozen=True)
class Wanted:
    """What the user says of the way; None is left to kiln."""

    memory_bytes: int | None = None
    """The most that may be taken."""
    variant: str | None = None
    residency: Residency | None = None
    tiled: bool | None = None
    falls_back: bool = False
    """Whether a smaller variant may be taken when memory runs out."""


@dataclass(frozen=True)
class Choice:
    """The way that was taken, and why."""

    ladder: Ladder
    sentence: str


def chosen(
    manifest: Manifest,
    request: Request,
    size: Size,
    wanted: Wanted,
    *,
    facts: Callable[[], Facts],
    controls: Collection[str] = (),
) -> Choice:
    """The way to draw `request` at `size` (width, height), with these control networks.

    `facts` are read where the free memory counts. Raises SpecError for what contradicts the bundle
    or itself, OutOfMemory, saying what the smallest way needs, where none fits.
    """
    _check(manifest, size, wanted)
    asked = Asked(
        *size,
        batch=min(request.batch, request.count),
        count=request.count,
        guided=is_guided(manifest, request.guidance),
        from_picture=request.image is not None,
    )
    parts = parts_of(manifest, controls)
    if parts is None:
        return _unmeasured(manifest, asked, wanted)
    found = rows(
        parts, asked, variant=wanted.variant, residency=wanted.residency, tiled=wanted.tiled
    )
    device: Device = "card" if manifest.on_card else "processor"
    budget = budget_of(facts(), device, wanted.memory_bytes)
    free = budget.bytes
    if wanted.memory_bytes is None and device == "processor":
        free += gauge.resident_bytes()  # what this process has already is part of every row
    row = choose(found, free)
    sentence = (
        f"Draws with {row.way.describe()}: the best that fits, {gib(row.peak_bytes)} of the "
        f"{gib(free)} that {_whence(wanted)}."
    )
    return Choice(Ladder(_steps(found, row, wanted)), sentence)


def _whence(wanted: Wanted) -> str:
    return "are free" if wanted.memory_bytes is None else "--memory allows"


def _steps(found: tuple[Row, ...], row: Row, wanted: Wanted) -> list[Way]:
    """The way of `row` and those after it that take less and less."""
    steps, here = [row.way], row
    while (after := smaller(found, here, same_variant=not wanted.falls_back)) is not None:
        steps.append(after.way)
        here = after
    return steps


def _unmeasured(manifest: Manifest, asked: Asked, wanted: Wanted) -> Choice:
    """Of a bundle that says nothing of memory: the fastest way, and all others behind it."""
    if wanted.memory_bytes is not None:
        raise SpecError(
            "The bundle says nothing of memory (it was compiled by an older kiln, or for a machine "
            "that wasn't there), so --memory can't be held: leave it out, or compile it again."
        )
    found = [
        way
        for way in ways(
            tuple(manifest.denoisers), asked, manifest.native_size, seamless=manifest.seamless
        )
        if wanted.variant in (None, way.variant)
        and wanted.residency in (None, way.residency)
        and wanted.tiled in (None, way.tiled)
    ]
    first = found[0]
    left = [way for way in found if wanted.falls_back or way.variant == first.variant]
    sentence = f"Draws with {first.describe()}; what that takes wasn't measured."
    return Choice(Ladder(left), sentence)


def _check(manifest: Manifest, size: Size, wanted: Wanted) -> None:
    manifest.denoiser(wanted.variant)
    if wanted.variant is not None and wanted.falls_back:
        raise SpecError(
            f"--variant {wanted.variant} and --allow-variant-fallback contradict each other: leave "
            "out one of them."
        )
    if wanted.tiled and max(size) <= manifest.native_size:
        raise SpecError(
            f"--tiled is for pictures larger than a tile ({manifest.native_size} px), and "
            f"{size[0]}x{size[1]} is not: leave it out, or give a larger --size."
        )
