"""How a picture of any size lies on a canvas that engines were compiled for, and how it comes back.

A picture within the compiled range is never resampled: its edges are continued to the next legal
size, and cut off again. Of a larger one, only the window around what is repainted is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from runners.signature import Dim

__all__ = ["Box", "Fit", "fit_around", "fit_covering", "fit_inside", "fit_whole"]

Size = tuple[int, int]
"""Width and height."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom; the last two are just outside."""

_CONTEXT = 1.5
"""The least side of a window, in sides of what is repainted: a model needs to see around it."""


@dataclass(frozen=True)
class Fit:
    """The `window` of a picture, scaled to `scaled` pixels, at the top left of the canvas."""

    window: Box
    scaled: Size
    canvas: Size
    """What the engines draw; beyond `scaled`, the window's edges go on."""

    @property
    def window_size(self) -> Size:
        """Of the window, in the picture's pixels."""
        left, top, right, bottom = self.window
        return right - left, bottom - top

    def canvas_of(self, picture: Image.Image) -> Image.Image:
        """The canvas with the picture on it."""
        piece = picture.crop(self.window)
        if piece.size != self.scaled:
            piece = piece.resize(self.scaled, Image.Resampling.LANCZOS)
        return self._continued(piece)

    def canvas_of_mask(self, mask: Image.Image) -> Image.Image:
        """The canvas's mask: white wherever a pixel of the picture's is."""
        piece = mask.crop(self.window)
        if piece.size != self.scaled:
            piece = piece.resize(self.scaled, Image.Resampling.BOX)
        return self._continued(piece.point([0, *[255] * 255]))

    def window_of(self, canvas: Image.Image) -> Image.Image:
        """A drawn canvas, back at the window's size."""
        piece = canvas.crop((0, 0, *self.scaled))
        if piece.size != self.window_size:
            piece = piece.resize(self.window_size, Image.Resampling.LANCZOS)
        return piece

    def _continued(self, piece: Image.Image) -> Image.Image:
        array = np.asarray(piece)
        more = [(0, self.canvas[1] - array.shape[0]), (0, self.canvas[0] - array.shape[1])]
        more += [(0, 0)] * (array.ndim - 2)
        return Image.fromarray(np.pad(array, more, mode="edge"))


def fit_whole(size: Size, side: Dim) -> Fit:
    """All of a picture of `size` on the smallest canvas of legal sides, at its own scale if it can.

    A picture larger than the largest side is scaled down, one smaller than the smallest up.
    """
    scale = min(1.0, *(_largest(side) / pixels for pixels in size))
    if min(size) < side.min:
        scale = min(side.min / min(size), _largest(side) / max(size))
    return _on_canvas((0, 0, *size), scale, side)


def fit_around(size: Size, box: Box, side: Dim) -> Fit:
    """What fits around `box` of a picture of `size`, at the picture's own scale if it can."""
    largest = _largest(side)
    if max(size) <= largest:
        return fit_whole(size, side)
    needed = [min(whole, _CONTEXT * (box[axis + 2] - box[axis])) for axis, whole in enumerate(size)]
    scale = min(1.0, *(largest / pixels for pixels in needed))
    spans = []
    for axis, whole in enumerate(size):
        length = min(whole, round(largest / scale))
        middle = (box[axis] + box[axis + 2]) // 2
        start = max(0, min(whole - length, middle - length // 2))
        spans.append((start, start + length))
    (left, right), (top, bottom) = spans
    return _on_canvas((left, top, right, bottom), scale, side)


def fit_inside(size: Size, canvas: Size) -> Fit:
    """All of a picture as large as it can be on a canvas that was asked for."""
    scale = min(wanted / pixels for wanted, pixels in zip(canvas, size, strict=True))
    scaled = (_scaled(size[0], scale, canvas[0]), _scaled(size[1], scale, canvas[1]))
    return Fit((0, 0, *size), scaled, canvas)


def fit_covering(size: Size, canvas: Size) -> Fit:
    """The middle of a picture that fills a canvas that was asked for."""
    scale = max(wanted / pixels for wanted, pixels in zip(canvas, size, strict=True))
    width, height = (
        max(1, min(pixels, round(wanted / scale)))
        for wanted, pixels in zip(canvas, size, strict=True)
    )
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return Fit((left, top, left + width, top + height), canvas, canvas)


def _on_canvas(window: Box, scale: float, side: Dim) -> Fit:
    largest = _largest(side)
    scaled = (
        _scaled(window[2] - window[0], scale, largest),
        _scaled(window[3] - window[1], scale, largest),
    )
    return Fit(window, scaled, (_legal(scaled[0], side), _legal(scaled[1], side)))


def _scaled(pixels: int, scale: float, most: int) -> int:
    return max(1, min(most, round(pixels * scale)))


def _largest(side: Dim) -> int:
    return side.nearest(side.max)


def _legal(pixels: int, side: Dim) -> int:
    """The smallest legal side that holds so many pixels."""
    step = side.multiple_of
    return side.nearest(-(-pixels // step) * step)
