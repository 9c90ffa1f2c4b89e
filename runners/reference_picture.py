"""The picture that a bundle draws where it is built, and draws again in its self-test."""

from __future__ import annotations

import inspect
import io
import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from runners.bundle import Bundle
from runners.manifest import Picture
from runners.memory import Residency
from runners.pipeline import TASKS, load

__all__ = ["draw", "picture_psnr_db", "psnr_db"]

_MOST = 256
"""Pixels a side that are kept."""


def draw(
    bundle: Bundle,
    *,
    prompt: str,
    seed: int,
    steps: int,
    side: int,
    residency: Residency = "keep",
) -> Image.Image:
    """The bundle's picture, at most 256 pixels wide and high, from noise drawn on the CPU.

    Drawn with the first task of its pipeline's; those that change pictures get a grey one.
    """
    tasks = TASKS[bundle.manifest.model.pipeline_class]
    pipeline = load(bundle, task=next(iter(tasks)), residency=residency)
    wanted: dict[str, Any] = {
        "width": side,
        "height": side,
        "image": Image.new("RGB", (side, side), (127, 127, 127)),
        "strength": 1.0,
        "mask_image": Image.new("L", (side, side), 255),
    }
    taken = inspect.signature(type(pipeline).__call__).parameters
    try:
        picture: Image.Image = pipeline(
            prompt,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(seed),
            **{name: value for name, value in wanted.items() if name in taken},
        ).images[0]
    finally:
        pipeline.kiln.close()
    kept = min(side, _MOST)
    return picture.convert("RGB").resize((kept, kept), Image.Resampling.BOX)


def picture_psnr_db(bundle: Bundle, picture: Picture) -> float:
    """PSNR of the bundle's picture, drawn now, to the one in it; equal ones have 200 dB."""
    with Image.open(io.BytesIO(bytes(bundle.file(picture.file)))) as kept:
        wanted = np.asarray(kept.convert("RGB"))
    drawn = draw(
        bundle, prompt=picture.prompt, seed=picture.seed, steps=picture.steps, side=picture.side
    )
    return psnr_db(wanted, np.asarray(drawn))


def psnr_db(wanted: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    """Of two arrays of 0 to 255; -200 where their shapes differ, 200 where they are equal."""
    if wanted.shape != got.shape:
        return -200.0
    error = float(np.square(wanted.astype(np.float64) - got.astype(np.float64)).mean())
    return 200.0 if error == 0 else round(10 * math.log10(255**2 / error), 2)
