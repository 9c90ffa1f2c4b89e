"""Scenes for a ControlNet: what it is shown, captions that leave shapes open, shapes found again.

It is shown edges, as `kiln generate --control canny:FILE` makes them of a picture.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.reference_model.captions import (
    BACKGROUND_RGB,
    RGB,
    Background,
    Scene,
    Thing,
    caption_of,
)
from benchmarks.reference_model.draw import draw_before, draw_coverage, edge_of
from runners.preprocessing import canny

__all__ = ["edges_of", "found_shape", "iou", "open_caption", "shape_of"]

_GROUNDS = ((128, 128, 128), (242, 241, 236), (52, 54, 64))
"""Grey, white and black: what a thing's colour stands out from varies."""

Bits = NDArray[np.bool_]


def open_caption(scene: Scene) -> str:
    """Say a scene without the sizes, shapes and positions of its things: a control decides them."""
    things = " and ".join(f"a {thing.colour} thing" for thing in scene.things)
    return f"{things}, {caption_of(scene).rpartition(', ')[2]}"


def edges_of(scene: Scene, seed: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The edges of a scene's things where `draw_scene` paints them: [64, 64], 0 or 255.

    Of every second picture they are those of silhouettes, else of the things in their colours
    before a plain ground, whose rims are edges too.
    """
    kind = rng.integers(2 * len(_GROUNDS))
    if kind < len(_GROUNDS):
        picture = Image.fromarray(draw_before(scene, seed, _GROUNDS[kind]))
    else:
        picture = Image.fromarray(np.uint8(255 * draw_coverage(scene, seed)))
    edges: NDArray[np.uint8] = np.asarray(canny(picture))[..., 0]
    return edges


def shape_of(scene: Scene, seed: int) -> Bits:
    """The pixels that the things of `draw_scene` cover, [64, 64]."""
    covered: Bits = draw_coverage(scene, seed) >= 0.5
    return covered


def found_shape(picture: NDArray[np.uint8], thing: Thing, background: Background) -> Bits:
    """The pixels of a picture [64, 64, 3] that look like the thing rather than the background.

    Each is on either side by its distance in RGB: to the colours between a thing's rim and its
    body, or to those between the background's.
    """
    pixels = picture.astype(np.float32)
    body = np.asarray(RGB[thing.colour], np.float32)
    paints = [np.asarray(BACKGROUND_RGB[paint], np.float32) for paint in background.paints]
    found: Bits = _distance(pixels, edge_of(thing.colour), body) < _distance(
        pixels, paints[0], paints[-1]
    )
    return found


def _distance(
    pixels: NDArray[np.float32], start: NDArray[np.float32], end: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Of every pixel to the line between two colours."""
    way = end - start
    along = ((pixels - start) @ way) / max(float(way @ way), 1.0)
    nearest = start + np.clip(along, 0, 1)[..., None] * way
    distance: NDArray[np.float32] = np.linalg.norm(pixels - nearest, axis=-1)
    return distance


def iou(first: Bits, second: Bits) -> float:
    """Intersection over union."""
    return float((first & second).sum() / max(1, (first | second).sum()))
