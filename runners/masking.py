"""Repainting a part of a canvas: which cells of the latent that is, and how the seam disappears."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

__all__ = ["extended", "grown_to_cells", "without_seam"]

Array = np.ndarray[Any, Any]


def extended(
    picture: Image.Image, mask: Image.Image | None, by: tuple[int, int, int, int]
) -> tuple[Image.Image, Image.Image]:
    """A picture with `by` (left, top, right, bottom) pixels more, its edges continued, and the mask
    of what is new; what `mask` repaints of the picture itself stays repainted.
    """
    left, top, right, bottom = by
    beside = ((top, bottom), (left, right))
    canvas = np.pad(np.asarray(picture), (*beside, (0, 0)), mode="edge")
    inner = np.zeros(picture.size[::-1], np.uint8) if mask is None else np.asarray(mask)
    outer = np.pad(inner, beside, constant_values=255)
    return Image.fromarray(canvas), Image.fromarray(outer)


def grown_to_cells(mask: Image.Image, cell: int) -> Image.Image:
    """The mask with every cell of `cell` pixels a side white that holds a white pixel.

    A latent's value stands for a whole cell, so what is repainted is always whole cells; diffusers
    takes the value of one pixel of each.
    """
    array = np.asarray(mask)
    height, width = array.shape
    cells = array.reshape(height // cell, cell, width // cell, cell).max(axis=(1, 3))
    return Image.fromarray(cells.repeat(cell, axis=0).repeat(cell, axis=1))


def without_seam(drawn: Image.Image, canvas: Image.Image, mask: Image.Image) -> Image.Image:
    """A drawn canvas whose repainted part meets the colours of what stays around it.

    Even where nothing is repainted, a VAE gives colours back a little changed. That error, averaged
    over the kept pixels around a repainted one, is subtracted from it, less so the farther it is
    from the seam. `mask` is white where it was repainted.
    """
    kept = np.asarray(mask)[:, :, None] == 0
    picture = np.asarray(drawn, dtype=np.float32)
    error = (np.asarray(canvas, dtype=np.float32) - picture) * kept
    radius = max(_LEAST_RADIUS, min(drawn.size) // _SIDE_PER_RADIUS)
    near = _box_mean(kept.astype(np.float32), radius)
    correction = _box_mean(error, radius) / np.maximum(near, 1e-9)
    weight = np.minimum(1.0, 2.0 * near) * ~kept  # half of a box over a straight seam is kept
    return Image.fromarray(np.round(picture + weight * correction).clip(0, 255).astype(np.uint8))


_LEAST_RADIUS = 4
_SIDE_PER_RADIUS = 32
"""16 pixels of 512: two cells of an 8x VAE, whose errors are a cell wide."""


def _box_mean(array: Array, radius: int) -> Array:
    """The mean over a square around each pixel, zeros beyond the edges: [height, width, any]."""
    for axis in (0, 1):
        sums = np.cumsum(array, axis=axis)
        pad = [(0, 0)] * array.ndim
        pad[axis] = (radius + 1, radius)
        sums = np.pad(sums, pad, mode="edge")
        first = [slice(None)] * array.ndim
        first[axis] = slice(0, radius + 1)
        sums[tuple(first)] = 0
        length = array.shape[axis]
        array = _take(sums, 2 * radius + 1, length, axis) - _take(sums, 0, length, axis)
    return array / (2 * radius + 1) ** 2


def _take(array: Array, start: int, length: int, axis: int) -> Array:
    return array.take(range(start, start + length), axis=axis)
