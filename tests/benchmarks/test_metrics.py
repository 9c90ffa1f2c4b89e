"""Picture and denoiser distances: known values, caps, and what can't be measured."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks import metrics


def picture(seed: int = 0, size: int = 32) -> metrics.Picture:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def test_identical_pictures_reach_the_stated_caps() -> None:
    same = metrics.picture_distance(picture(), picture())
    assert (same.psnr_db, same.ssim, same.flip) == (metrics.PSNR_CAP_DB, 1.0, 0.0)
    assert same.slope_error in (0.0, None)
    assert same.high_band[0] == same.high_band[1]


def test_psnr_of_a_constant_offset_is_known() -> None:
    grey = np.full((16, 16, 3), 100, np.uint8)
    assert metrics.psnr_db(grey, grey + np.uint8(10)) == pytest.approx(20 * math.log10(25.5))


def test_psnr_does_not_wrap_around_in_eight_bits() -> None:
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    assert metrics.psnr_db(black, white) == pytest.approx(0)
    assert metrics.psnr_db(white, black) == pytest.approx(0)


def test_flip_of_black_against_white_is_almost_one_and_symmetric() -> None:
    black, white = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
    error = metrics.flip(black, white)
    assert error is not None
    assert 0.9 < error <= 1.0  # the paper maps maximal colour difference close to 1
    assert metrics.flip(white, black) == pytest.approx(error, abs=1e-6)


def test_every_figure_falls_as_noise_grows() -> None:
    base = np.full((48, 48, 3), 128, np.uint8)
    rng = np.random.default_rng(1)
    noisy = [
        np.clip(base + rng.normal(0, sigma, base.shape), 0, 255).astype(np.uint8)
        for sigma in (2, 8, 32)
    ]
    rows = [metrics.picture_distance(base, item) for item in noisy]
    assert [r.psnr_db for r in rows] == sorted((r.psnr_db for r in rows), reverse=True)
    assert [r.ssim or 0 for r in rows] == sorted((r.ssim or 0 for r in rows), reverse=True)
    assert [r.flip or 0 for r in rows] == sorted(r.flip or 0 for r in rows)


def test_ssim_is_null_for_pictures_smaller_than_its_window() -> None:
    assert metrics.ssim(picture(size=8), picture(size=8)) is None


def test_sizes_that_differ_are_refused_with_both_named() -> None:
    with pytest.raises(ValueError, match=r"\(32, 32, 3\) and \(16, 16, 3\)"):
        metrics.picture_distance(picture(), picture(size=16))


def test_difference_map_amplifies_and_clips() -> None:
    base = np.full((2, 2, 3), 100, np.uint8)
    other = base.copy()
    other[0, 0], other[1, 1] = 97, 255
    shown = metrics.difference_map(base, other)
    assert shown[0, 0, 0] == 3 * metrics.DIFFERENCE_GAIN
    assert shown[1, 1, 0] == 255
    assert shown[0, 1, 0] == 0


def test_sqnr_is_pooled_as_a_ratio_of_sums_and_not_as_a_mean_of_decibels() -> None:
    sqnr = metrics.StepSqnr()
    sqnr.add(0, signal=100, noise=1)
    sqnr.add(1, signal=1, noise=1)
    sqnr.add(0, signal=900, noise=0)
    assert sqnr.per_step_db == (pytest.approx(30.0), pytest.approx(0.0))
    assert sqnr.pooled_db == pytest.approx(10 * math.log10(1001 / 2))


def test_sqnr_of_equal_outputs_is_200_and_of_none_is_null() -> None:
    sqnr = metrics.StepSqnr()
    assert sqnr.pooled_db is None
    sqnr.add(0, signal=1.0, noise=0.0)
    assert sqnr.pooled_db == 200.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_or_infinite_output_gives_the_lowest_sqnr_whatever_else_was_added(
    bad: float,
) -> None:
    sqnr = metrics.StepSqnr()
    sqnr.add(0, signal=1.0, noise=bad)
    sqnr.add(1, signal=1.0, noise=0.0)
    assert sqnr.per_step_db == (-200.0, 200.0)
    assert sqnr.pooled_db == -200.0
    assert not sqnr.finite


def ramp(side: int = 64) -> metrics.Picture:
    """A horizontal gradient of 2 steps in 3 pixels."""
    row = np.arange(side) * 2 // 3
    return np.repeat(np.repeat(row[None, :, None], side, 0), 3, 2).astype(np.uint8)


def test_texture_is_lost_by_blurring_and_added_by_noise() -> None:
    rng = np.random.default_rng(0)
    textured = np.clip(128 + rng.normal(0, 20, (64, 64, 3)), 0, 255).astype(np.uint8)
    blurred = (
        (textured.astype(int) + np.roll(textured, 1, 0) + np.roll(textured, 1, 1)) // 3
    ).astype(np.uint8)
    power = metrics.high_band_power
    assert power(blurred) < 0.5 * power(textured)
    assert power(ramp()) < 0.01 * power(textured)
    assert power(np.full((64, 64, 3), 90, np.uint8)) == pytest.approx(0, abs=1e-6)


def test_bands_in_a_gradient_are_seen_and_edges_do_not_count() -> None:
    smooth = ramp()
    banded = smooth // 8 * 8
    shifted = smooth + np.uint8(5)
    assert metrics.slope_error(smooth, smooth) == 0
    assert metrics.slope_error(smooth, shifted) == pytest.approx(0, abs=1e-9)
    error = metrics.slope_error(smooth, banded)
    assert error is not None
    assert 0.3 < error < 1.5
    edges = np.zeros((64, 64, 3), np.uint8)
    edges[:, 32:] = 200
    assert metrics.slope_error(edges, np.zeros_like(edges)) is None


def test_an_interval_holds_the_mean_and_shrinks_with_more_pictures() -> None:
    rng = np.random.default_rng(1)
    few, many = rng.normal(30, 5, 10), rng.normal(30, 5, 1000)
    widths = []
    for values in (few, many):
        interval = metrics.bootstrap_interval(values.tolist())
        assert interval is not None
        assert interval[0] < values.mean() < interval[1]
        widths.append(interval[1] - interval[0])
    assert widths[1] == pytest.approx(2 * 1.96 * many.std() / np.sqrt(1000), rel=0.1)
    assert widths[0] > 3 * widths[1]
    assert metrics.bootstrap_interval([3.0]) is None
    assert metrics.bootstrap_interval(few.tolist()) == metrics.bootstrap_interval(few.tolist())
