from __future__ import annotations

import numpy as np
from PIL import Image

from runners.masking import extended, grown_to_cells, without_seam


def test_an_extension_continues_the_edges_and_is_repainted() -> None:
    picture = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3))
    canvas, mask = extended(picture, None, (1, 2, 0, 3))
    assert canvas.size == mask.size == (4, 7)
    np.testing.assert_array_equal(np.asarray(canvas)[2:4, 1:], np.asarray(picture))
    np.testing.assert_array_equal(np.asarray(canvas)[0, 1:], np.asarray(picture)[0])
    kept = np.asarray(mask) == 0
    assert kept[2:4, 1:].all()
    assert kept.sum() == 6


def test_an_extension_keeps_what_a_mask_repaints() -> None:
    inner = Image.new("L", (3, 2))
    inner.putpixel((1, 0), 255)
    _, mask = extended(Image.new("RGB", (3, 2)), inner, (1, 0, 0, 0))
    assert np.asarray(mask).tolist() == [[255, 0, 255, 0], [255, 0, 0, 0]]


def test_a_cell_is_repainted_where_any_of_its_pixels_is() -> None:
    mask = Image.new("L", (16, 8))
    mask.putpixel((5, 7), 255)
    grown = np.asarray(grown_to_cells(mask, 4))
    assert (grown[4:8, 4:8] == 255).all()
    assert (grown == 255).sum() == 16


def scene() -> tuple[np.ndarray, np.ndarray]:
    """A canvas of one colour with some noise, and a mask of its right half."""
    noise = np.random.default_rng(0).integers(-3, 4, (64, 64, 3))
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    return (np.array([60, 120, 180]) + noise).astype(np.uint8), mask


def test_colours_that_decoding_moved_are_moved_back() -> None:
    canvas, mask = scene()
    drawn = (canvas + np.array([6, -8, 4])).astype(np.uint8)
    found = without_seam(*map(Image.fromarray, (drawn, canvas, mask)))
    kept = mask == 0
    np.testing.assert_array_equal(np.asarray(found)[kept], drawn[kept])
    error = np.asarray(found, dtype=int)[~kept] - canvas[~kept]
    assert np.abs(error).max() <= 1


def test_a_thing_that_was_drawn_differently_moves_no_colours() -> None:
    canvas, mask = scene()
    drawn = canvas.copy()
    drawn[20:40, 20:32] = [250, 10, 10]
    drawn[20:40, 32:44] = [250, 10, 10]
    found = without_seam(*map(Image.fromarray, (drawn, canvas, mask)))
    np.testing.assert_array_equal(np.asarray(found), drawn)


def test_a_mask_of_everything_leaves_what_was_drawn() -> None:
    canvas, _ = scene()
    drawn = canvas[::-1].copy()
    mask = Image.new("L", (64, 64), 255)
    found = without_seam(Image.fromarray(drawn), Image.fromarray(canvas), mask)
    np.testing.assert_array_equal(np.asarray(found), drawn)
