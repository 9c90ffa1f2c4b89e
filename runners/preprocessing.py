"""What a ControlNet is shown, made from a picture: `--control canny:photo.png`.

One preprocessor so far: those of depth, pose and segmentation are networks of their own, whose
weights lie elsewhere (see the README).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from profiles.errors import MissingError

__all__ = ["MAPS", "canny"]

_SIGMA, _LOW, _HIGH = 1.0, 0.05, 0.1
"""Of skimage's canny: its default blur, and half its default limits, at which a step of about 50
grey levels is an edge (at the defaults it takes 100, and pale things have no outline)."""


def canny(picture: Image.Image) -> Image.Image:
    """The picture's edges (Canny 1986), white on black, one pixel wide, in RGB.

    Raises MissingError without scikit-image.
    """
    try:
        from skimage.feature import canny as edges_of
    except ImportError as error:
        raise MissingError(
            "--control canny: needs scikit-image: install it with `pip install "
            "'kiln-diffusion[control]'`, or give a ready map of edges."
        ) from error
    grey = np.asarray(picture.convert("L"), np.float64) / 255
    edges = edges_of(grey, sigma=_SIGMA, low_threshold=_LOW, high_threshold=_HIGH)
    return Image.fromarray(np.where(edges, 255, 0).astype(np.uint8)).convert("RGB")


MAPS: dict[str, Callable[[Image.Image], Image.Image]] = {"canny": canny}
"""A name of `runners.control_options.PREPROCESSORS` -> picture to map."""
