"""What an engine takes of memory, measured at a few shapes in the process that checked it.

Each shape gets a fresh engine, in a process whose libraries are warm, so that a rise is the
engine's alone. Shapes are in the engine's own units, places: latents, patches or pixels of one
picture; `optimizer.memory_entries` makes them pixels of the picture that is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import psutil

from optimizer.backends import Built
from optimizer.calls import Call, resized
from optimizer.job import Job
from optimizer.sizes import LARGE
from runners import gauge
from runners.engines import engine_class
from runners.engines.base import Array, Buffer
from runners.files import MAPPED_FROM, mapped
from runners.memory import Feature, PartMemory, Shape
from runners.signature import Signature

__all__ = ["Seen", "fitted", "measure", "measured", "sizes_at"]

_SQUARED_FROM = 0.02
"""Of the largest value: a fit with an attention matrix's term must be better by so much, for with
few points it would follow any curve, and be far off at larger sizes."""

_LARGE_AT: tuple[tuple[float, int], ...] = ((1, 1), (1.5, 1), (1, 2))
_SMALL_AT: tuple[tuple[float, int], ...] = ((1, 1), (2, 1), (4, 2), (8, 1), (8, 2))
"""(multiple of the smallest side, pictures) of the measured shapes: calls of large engines take
seconds."""

_QUICK = 10_000_000
"""Of a part's parameters: those of more are measured up to the native side. The decoder of Stable
Diffusion, whole at 2048 px, takes minutes and 14 GB."""


@dataclass(frozen=True)
class Seen:
    """What one fresh engine took at one shape, in bytes above what was there before."""

    shape: Shape
    stays: int
    peak: int


def measure(job: Job, built: Built, *, folder: Path, call: Call) -> PartMemory:
    """Open the engine in `folder` once for each shape, run it, and fit what it took.

    `call` is a recorded one: its inputs are tiled or cut to the shapes. Large files are mapped, as
    a bundle's are.
    """
    wanted = _LARGE_AT if job.parameters > LARGE else _SMALL_AT
    shapes = sizes_at(job.signature, wanted, beyond_native=job.parameters <= _QUICK)
    return measured(job.backend, built, job.signature, folder, call.inputs, shapes)


def measured(
    backend: str,
    built: Built,
    signature: Signature,
    folder: Path,
    inputs: Sequence[Array],
    shapes: Sequence[Mapping[str, int]],
) -> PartMemory:
    """The same of any engine in `folder`, at shapes that are given as sizes of its dims."""
    seen = []
    for sizes in shapes:
        # anew for each: what an engine read of a mapped file would be there for the next one
        buffers = {role: _buffer(folder / name) for role, name in built.files.items()}
        arrays = resized(inputs, signature, sizes)
        feeds = {spec.name: x for spec, x in zip(signature.inputs, arrays, strict=True)}
        gauge.trim()
        before = gauge.resident_bytes()
        gauge.reset_peak()
        engine = engine_class(backend)(
            buffers,
            signature=signature,
            properties=built.properties,
            threads=psutil.cpu_count(logical=False) or 1,
        )
        with engine:
            engine(feeds)
            stays, peak = gauge.resident_bytes(), gauge.peak_bytes()
        del engine, buffers
        seen.append(Seen(_shape(sizes), max(0, stays - before), max(0, peak - before)))
    return fitted(seen, per_shape=engine_class(backend).compiles_shapes)


def fitted(seen: Sequence[Seen], *, per_shape: bool = False) -> PartMemory:
    """The coefficients that explain what was seen, and predict none of it too low; no files are
    held.
    """
    features = _features(seen)
    stays = _fit([(one.shape, one.stays) for one in seen], features)
    peak = _fit([(one.shape, one.peak) for one in seen], features)
    resident = round(stays.pop("constant", 0))
    peak["constant"] = peak.get("constant", 0) - resident
    return PartMemory(
        held_bytes=0,
        resident_bytes=resident,
        stays=stays,
        peak=peak,
        per_shape=per_shape,
        source="measured",
    )


def _buffer(path: Path) -> Buffer:
    """As runners.files holds a bundle's files."""
    if path.stat().st_size < MAPPED_FROM:
        return bytearray(path.read_bytes())
    return mapped(path)


def sizes_at(
    signature: Signature, wanted: Sequence[tuple[float, int]], *, beyond_native: bool = True
) -> list[dict[str, int]]:
    """Sizes of the dims at multiples of the smallest side and so many pictures.

    Unless `beyond_native`, sides beyond the native one, and 1.5 times the smallest, become that.
    """
    dims = {dim.name: dim for dim in signature.dims}
    base = {name: dim.nearest(dim.opt) for name, dim in dims.items()}
    growing: list[str] = [name for name in ("height", "width", "sequence") if name in dims]
    if not growing:
        tokens = dims.get("tokens")
        base["batch"] = 1
        if tokens is None or tokens.fixed:
            return [base]
        return [{**base, "tokens": tokens.nearest(n)} for n in (tokens.max // 4, tokens.max // 2)]

    native = max(dims[name].opt / dims[name].min for name in growing)
    native = math.sqrt(native) if "sequence" in growing else native
    most = math.inf if beyond_native else max(native, 1.5)

    def at(scale: float, pictures: int) -> dict[str, int]:
        scale = min(scale, most)
        by = scale**2 if "sequence" in growing else scale
        start = {name: dims[name].nearest(dims[name].min) for name in growing}
        sizes = {n: dims[n].nearest(round(start[n] * by)) for n in growing}
        return {**base, **sizes, "batch": dims["batch"].nearest(pictures * dims["batch"].opt)}

    return [dict(sizes) for sizes in dict.fromkeys(tuple(at(*one).items()) for one in wanted)]


def _shape(sizes: Mapping[str, int]) -> Shape:
    places = sizes.get("sequence") or sizes.get("height", 0) * sizes.get("width", 0)
    return Shape(sizes.get("batch", 1), places, sizes.get("tokens", 0))


def _features(seen: Sequence[Seen]) -> list[tuple[Feature, ...]]:
    """Which features may explain what was seen, the simplest first: as many as there are shapes
    that tell them apart.
    """
    grows = len({one.shape.feature("pixels") for one in seen}) > 1
    if not grows:
        tokens = len({one.shape.tokens for one in seen}) > 1
        return [("constant", "tokens")] if tokens else [("constant",)]
    simple: tuple[Feature, ...] = ("constant", "pixels")
    return [simple, (*simple, "pixels_squared")] if len(seen) > 2 else [simple]


def _fit(
    points: Sequence[tuple[Shape, int]], choices: Sequence[tuple[Feature, ...]]
) -> dict[Feature, float]:
    """Least squares with no negative coefficient; the constant is raised until no point is under
    what was measured.
    """
    wanted = np.array([value for _, value in points], dtype=np.float64)
    best: dict[Feature, float] = {"constant": float(wanted.max())}
    least = np.inf
    for features in choices:
        found, error = _positive(points, wanted, features)
        if error < least - _SQUARED_FROM * wanted.max():
            best, least = found, error
    short = max(value - shape.bytes(best) for shape, value in points)
    best["constant"] = best.get("constant", 0.0) + max(0.0, float(short))
    return {name: value for name, value in best.items() if value}


def _positive(
    points: Sequence[tuple[Shape, int]], wanted: Array, features: tuple[Feature, ...]
) -> tuple[dict[Feature, float], float]:
    """The best fit with some of the features, none negative, and its largest error."""
    best: dict[Feature, float] = {}
    least = np.inf
    for count in range(1, len(features) + 1):
        for some in combinations(features, count):
            table = np.array([[shape.feature(name) for name in some] for shape, _ in points])
            scale = np.abs(table).max(axis=0)
            found = np.linalg.lstsq(table / scale, wanted, rcond=None)[0] / scale
            error = float(np.abs(table @ found - wanted).max())
            if (found >= 0).all() and error < least:
                best, least = dict(zip(some, map(float, found), strict=True)), error
    return best, least
