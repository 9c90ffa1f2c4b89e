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
    """A drawn canvas whose repainted part has the colours of what stays around it.

    Decoding changes the colours of everything a little, also of what stays, where it can be seen by
    how much: that error, averaged over what stays around a repainted pixel, is taken from it.
    `mask` is white where the canvas is repainted.
    """
    kept = np.asarray(mask)[:, :, None] == 0
    picture = np.asarray(drawn, dtype=np.float32)
    error = np.asarray(canvas, dtype=np.float32) - picture
    largest = np.abs(error).max(axis=2, keepdims=True)
    trust = (kept * np.exp(-((largest / _LARGEST_ERROR) ** 2))).astype(np.float32)
    radius = max(1, min(drawn.size) // _SIDES_PER_RADIUS)
    everywhere = (error * trust).mean(axis=(0, 1)) / max(float(trust.mean()), 1e-6)
    share = _box_mean(trust, radius) + _EVERYWHERE
    around = (_box_mean(error * trust, radius) + _EVERYWHERE * everywhere) / share
    corrected = picture + around * ~kept
    return Image.fromarray(np.round(corrected).clip(0, 255).astype(np.uint8))


_LARGEST_ERROR = 32.0
"""In 255: a VAE's errors in even areas were 3 to 15; larger ones are edges, redrawn elsewhere."""

_SIDES_PER_RADIUS = 4
"""Wide, because the error is smooth: a VAE's group norms couple the whole picture."""

_EVERYWHERE = 0.02
"""The weight of the mean over the whole canvas: it decides where nothing around stays."""


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
