from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from runners.fitting import Fit, fit_around, fit_covering, fit_inside, fit_whole
from runners.signature import Dim

SIDE = Dim(name="side", min=32, opt=64, max=130, multiple_of=8)
"""The largest legal side is 128."""


@pytest.mark.parametrize(
    ("size", "scaled", "canvas"),
    [
        ((64, 64), (64, 64), (64, 64)),
        ((61, 75), (61, 75), (64, 80)),
        ((128, 40), (128, 40), (128, 40)),
        ((1280, 640), (128, 64), (128, 64)),
        ((130, 129), (128, 127), (128, 128)),
        ((20, 30), (32, 48), (32, 48)),
        ((10, 100), (13, 128), (32, 128)),
        ((1, 1), (32, 32), (32, 32)),
        ((5000, 3), (128, 1), (128, 32)),
    ],
)
def test_a_whole_picture_keeps_its_scale_where_it_can(
    size: tuple[int, int], scaled: tuple[int, int], canvas: tuple[int, int]
) -> None:
    fit = fit_whole(size, SIDE)
    assert (fit.window, fit.scaled, fit.canvas) == ((0, 0, *size), scaled, canvas)
    assert all(SIDE.legal(pixels) for pixels in canvas)


@pytest.mark.parametrize(
    ("size", "box", "expected"),
    [
        ((100, 100), (5, 5, 9, 9), Fit((0, 0, 100, 100), (100, 100), (104, 104))),
        ((1000, 800), (500, 400, 560, 440), Fit((466, 356, 594, 484), (128, 128), (128, 128))),
        ((1000, 800), (0, 0, 10, 10), Fit((0, 0, 128, 128), (128, 128), (128, 128))),
        ((1000, 100), (990, 0, 1000, 9), Fit((872, 0, 1000, 100), (128, 100), (128, 104))),
        ((1000, 800), (0, 0, 1000, 800), Fit((0, 0, 1000, 800), (128, 102), (128, 104))),
        ((1000, 800), (200, 200, 400, 240), Fit((150, 70, 450, 370), (128, 128), (128, 128))),
    ],
)
def test_of_a_large_picture_only_what_is_around_the_mask_is_drawn(
    size: tuple[int, int], box: tuple[int, int, int, int], expected: Fit
) -> None:
    assert fit_around(size, box, SIDE) == expected


def test_a_size_that_was_asked_for_is_kept() -> None:
    assert fit_inside((50, 100), (64, 64)) == Fit((0, 0, 50, 100), (32, 64), (64, 64))
    assert fit_inside((1000, 2), (64, 64)) == Fit((0, 0, 1000, 2), (64, 1), (64, 64))
    assert fit_covering((50, 100), (64, 64)) == Fit((0, 25, 50, 75), (64, 64), (64, 64))
    assert fit_covering((1000, 2), (64, 64)) == Fit((499, 0, 501, 2), (64, 64), (64, 64))


def test_a_picture_that_is_not_scaled_comes_back_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (75, 61, 3), dtype=np.uint8))
    fit = fit_whole(picture.size, SIDE)
    canvas = fit.canvas_of(picture)
    assert canvas.size == fit.canvas
    assert fit.window_of(canvas).tobytes() == picture.tobytes()
    beyond = np.asarray(canvas)[:75, 61:]
    np.testing.assert_array_equal(beyond, np.asarray(picture)[:, 60:].repeat(3, axis=1))


def test_a_thin_stroke_is_not_lost_when_a_mask_is_scaled_down() -> None:
    mask = Image.new("L", (1280, 640))
    mask.paste(255, (637, 0, 639, 640))
    canvas = np.asarray(fit_whole(mask.size, SIDE).canvas_of_mask(mask))
    assert canvas.shape == (64, 128)
    assert set(np.unique(canvas)) == {0, 255}
    assert (canvas == 255).sum(axis=1).tolist() == [1] * 64
