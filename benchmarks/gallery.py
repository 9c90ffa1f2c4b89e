"""The pictures of the report: which are shown, and each as a data URI with its difference map."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.comparison import Comparison, Picture, Shot
from benchmarks.metrics import Picture as Pixels
from benchmarks.metrics import difference_map

__all__ = ["Cell", "Group", "gallery"]

_MOST = 48
_PIXELS = 40_000_000
"""Pixels on one page: about 10 MB of WebP, which a phone still opens."""
_LOSSLESS_SIDE = 256
"""Pictures up to this side are embedded as PNG, larger ones as WebP of quality 90."""


@dataclass(frozen=True)
class Cell:
    """One contestant's picture."""

    name: str
    level: int | None
    """Index of the level's colour; None for the reference."""
    shot: Shot
    picture: str
    """Data URI."""
    difference: str | None
    """Data URI of the difference map; the reference has none."""
    worst: bool
    """Whether no other picture of this level is as far from the reference."""


@dataclass(frozen=True)
class Group:
    """One prompt and seed by everybody."""

    index: int
    prompt: str
    seed: int
    width: int
    height: int
    cells: tuple[Cell, ...]


def gallery(comparison: Comparison, folder: Path) -> list[Group]:
    """The pictures to show, in order: each level's worst, then from the start as many as fit."""
    if not comparison.pictures:
        return []
    worst = sorted({row.worst for row in comparison.levels if row.worst is not None})
    others = (index for index in range(len(comparison.pictures)) if index not in worst)
    most = _most(comparison, folder)
    return [_group(comparison, index, folder) for index in sorted([*worst, *others][:most])]


def _most(comparison: Comparison, folder: Path) -> int:
    height, width = _pixels(folder, comparison.pictures[0], comparison.levels[0].name).shape[:2]
    a_group = height * width * (2 * len(comparison.levels) - 1)
    return max(len(comparison.levels), min(_MOST, int(_PIXELS // a_group)))


def _group(comparison: Comparison, index: int, folder: Path) -> Group:
    picture = comparison.pictures[index]
    reference = _pixels(folder, picture, comparison.levels[0].name)
    cells = []
    for position, row in enumerate(comparison.levels):
        own = _pixels(folder, picture, row.name)
        cells.append(
            Cell(
                name=row.name,
                level=None if row.reference else position - 1,
                shot=picture.shots[row.name],
                picture=_data_uri(own),
                difference=None if row.reference else _data_uri(difference_map(reference, own)),
                worst=row.worst == index,
            )
        )
    height, width = reference.shape[:2]
    return Group(index, picture.prompt, picture.seed, width, height, tuple(cells))


def _pixels(folder: Path, picture: Picture, name: str) -> Pixels:
    with Image.open(folder / picture.shots[name].file) as image:
        return np.asarray(image.convert("RGB"))


def _data_uri(pixels: Pixels) -> str:
    small = max(pixels.shape[:2]) <= _LOSSLESS_SIDE
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG" if small else "WEBP", quality=90, optimize=True)
    kind = "png" if small else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
