"""What a ControlNet is shown, made from a picture: `--control canny:photo.png`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from profiles.errors import MissingError, SpecError
from runners.control_options import Control

__all__ = ["canny", "depth", "map_of"]

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


def depth(picture: Image.Image, model: Path) -> Image.Image:
    """How near everything is, near white and far black, over the picture's own range, in RGB.

    `model` is a folder of one of transformers' depth estimators that predict nearness (DPT, Depth
    Anything); only its configs and safetensors are read. Raises SpecError where it is no such
    folder.
    """
    import torch
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    try:
        processor = AutoImageProcessor.from_pretrained(model, local_files_only=True)
        network = AutoModelForDepthEstimation.from_pretrained(
            model, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise SpecError(
            f"--depth-model {model} holds no depth estimator that transformers can read: give the "
            f"folder of a DPT or Depth Anything with safetensors ({first})."
        ) from error
    rgb = picture.convert("RGB")
    with torch.inference_mode():
        found = network(**processor(images=rgb, return_tensors="pt"))
    size = [(rgb.height, rgb.width)]
    near = processor.post_process_depth_estimation(found, size)[0]["predicted_depth"].numpy()
    low, high = near.min(), near.max()
    grey = (near - low) / max(high - low, np.finfo(np.float32).tiny) * 255
    return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")


def map_of(control: Control, picture: Image.Image) -> Image.Image:
    """What the control's network is shown of `picture`: itself, where nothing is asked for."""
    if control.preprocessor == "canny":
        return canny(picture)
    if control.preprocessor == "depth":
        assert control.model is not None, "refused where it was parsed"
        return depth(picture, control.model)
    return picture
