"""How far one picture is from another, and one denoiser's output from another's.

Pictures are uint8 arrays [height, width, 3] in sRGB. Nothing here is NaN or infinite: equality
has a stated cap, and what can't be measured is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from optimizer.numerics import Sqnr

__all__ = [
    "DIFFERENCE_GAIN",
    "FLIP_PIXELS_PER_DEGREE",
    "PSNR_CAP_DB",
    "PictureDistance",
    "StepSqnr",
    "bootstrap_interval",
    "difference_map",
    "flip",
    "high_band_power",
    "picture_distance",
    "psnr_db",
    "slope_error",
    "ssim",
]

Picture = npt.NDArray[np.uint8]

PSNR_CAP_DB = 100.0
"""Identical pictures. One step of one channel of one pixel is 89 dB at 64x64 and 113 dB at
1024x1024, so the cap is reached by pictures that no eye tells apart, and a mean stays readable."""

FLIP_PIXELS_PER_DEGREE = 67.0
"""FLIP's own default: 0.7 m from a 0.7 m wide display of 3840 pixels (Andersson et al. 2020)."""

DIFFERENCE_GAIN = 8
"""Difference maps show 8 x |a - b|: one step of 255 is just visible, 32 steps saturate."""

_SSIM_WINDOW = 11


def psnr_db(reference: Picture, picture: Picture) -> float:
    """Peak signal-to-noise ratio over all pixels and channels, 255 being the peak; capped."""
    error = _signed(reference) - _signed(picture)
    mse = float(np.mean(np.square(error, dtype=np.float64)))
    return PSNR_CAP_DB if mse == 0 else min(PSNR_CAP_DB, 10 * math.log10(255.0**2 / mse))


def ssim(reference: Picture, picture: Picture) -> float | None:
    """Structural similarity, -1..1, with the 11x11 Gaussian window of Wang et al. 2004.

    None where a side is shorter than the window.
    """
    if min(reference.shape[:2]) < _SSIM_WINDOW:
        return None
    from skimage.metrics import structural_similarity

    value = structural_similarity(
        reference,
        picture,
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(value)


def flip(reference: Picture, picture: Picture) -> float | None:
    """Mean LDR-FLIP error, 0 (same) to 1, by NVIDIA's flip-evaluator; None where it is absent.

    What an observer who flips between the two pictures sees, at `FLIP_PIXELS_PER_DEGREE`.
    """
    try:
        import flip_evaluator
    except ImportError:
        return None
    evaluated = flip_evaluator.evaluate(
        _unit(reference),
        _unit(picture),
        "LDR",
        applyMagma=False,
        parameters={"ppd": FLIP_PIXELS_PER_DEGREE},
    )
    return float(evaluated[1])


def high_band_power(picture: Picture) -> float:
    """The power of the luminance above a quarter of a cycle a pixel, under a Hann window."""
    light = _luminance(picture)
    window = np.outer(np.hanning(light.shape[0]), np.hanning(light.shape[1]))
    spectrum = np.abs(np.fft.fft2((light - light.mean()) * window)) ** 2
    rows, columns = (np.fft.fftfreq(side) for side in light.shape)
    return float(spectrum[np.hypot(rows[:, None], columns[None]) >= _HIGH_BAND].sum())


def slope_error(reference: Picture, picture: Picture) -> float | None:
    """Mean |difference of slopes| between neighbours where the reference is smooth, in 255ths.

    Smooth is what changes, but by at most `_SMOOTH` within a window of five pixels: gradients,
    where too few levels show as bands. None where nothing is smooth.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    ours, theirs = _luminance(picture), _luminance(reference)
    spread = maximum_filter(theirs, 5) - minimum_filter(theirs, 5)
    smooth = (spread > 0) & (spread <= _SMOOTH)
    errors = [
        np.abs(np.diff(ours, axis=axis) - np.diff(theirs, axis=axis))[
            np.delete(smooth, -1, axis=axis)
        ]
        for axis in (0, 1)
    ]
    found = np.concatenate(errors)
    return float(found.mean()) if found.size else None


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % percentile interval of the mean (Efron 1979), of 2,000 resamples; None below two."""
    if len(values) < 2:
        return None
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(data), (_RESAMPLES, len(data)))
    low, high = np.quantile(data[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


_HIGH_BAND = 0.25
_SMOOTH = 12.0
_RESAMPLES = 2000


def _luminance(picture: Picture) -> npt.NDArray[np.float64]:
    """Rec. 709 luma of the values as they are, 0..255."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    light: npt.NDArray[np.float64] = picture.astype(np.float64) @ weights
    return light


@dataclass(frozen=True)
class PictureDistance:
    """The figures for one picture against the reference picture."""

    psnr_db: float
    ssim: float | None
    flip: float | None
    slope_error: float | None
    high_band: tuple[float, float]
    """High-band power of the picture and of the reference."""


def picture_distance(reference: Picture, picture: Picture) -> PictureDistance:
    """Measure one picture against its reference of the same size; ValueError where sizes differ."""
    if reference.shape != picture.shape:
        raise ValueError(f"pictures of {reference.shape} and {picture.shape} can't be compared")
    return PictureDistance(
        psnr_db=psnr_db(reference, picture),
        ssim=ssim(reference, picture),
        flip=flip(reference, picture),
        slope_error=slope_error(reference, picture),
        high_band=(high_band_power(picture), high_band_power(reference)),
    )


def difference_map(reference: Picture, picture: Picture) -> Picture:
    """|reference - picture| x `DIFFERENCE_GAIN` per channel, clipped to 255: black where equal."""
    error: npt.NDArray[np.int32] = np.abs(_signed(reference) - _signed(picture)) * DIFFERENCE_GAIN
    return np.clip(error, 0, 255).astype(np.uint8)


@dataclass
class StepSqnr:
    """A denoiser's SQNR by step, pooled over prompts; `optimizer.numerics` says what SQNR is."""

    steps: list[Sqnr] = field(default_factory=list)

    def add(self, step: int, *, signal: float, noise: float) -> None:
        """Add one denoiser call's sums of squares to those of its step."""
        while len(self.steps) <= step:
            self.steps.append(Sqnr())
        self.steps[step].signal += signal
        self.steps[step].error += noise if math.isfinite(noise) else math.inf

    @property
    def per_step_db(self) -> tuple[float, ...]:
        """Of each step."""
        return tuple(step.db for step in self.steps)

    @property
    def pooled_db(self) -> float | None:
        """Pooled over the steps as well; None before anything was added."""
        pooled = Sqnr()
        for step in self.steps:
            pooled.signal += step.signal
            pooled.error += step.error
        return pooled.db if self.steps else None

    @property
    def finite(self) -> bool:
        """Whether no output had a NaN or an infinity in it."""
        return not any(math.isinf(step.error) for step in self.steps)


def _signed(picture: Picture) -> npt.NDArray[np.int32]:
    return picture.astype(np.int32)


def _unit(picture: Picture) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(picture, dtype=np.float32) / np.float32(255)
