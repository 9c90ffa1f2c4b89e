"""The training set: scenes, their captions as token ids, their pictures, their latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.reference_model.captions import Scene, sample_scenes
from benchmarks.reference_model.draw import SIDE, draw_scene

TRAINING_SEED = 1
"""Seed of the scenes and, scene by scene, of the pictures."""


def training_scenes(count: int) -> list[Scene]:
    """Return the first `count` scenes of the training set."""
    return sample_scenes(TRAINING_SEED, count, held_out=False)


def pictures_of(scenes: list[Scene], first_seed: int) -> NDArray[np.uint8]:
    """Draw the scenes: [n, 64, 64, 3] uint8; scene i is drawn with seed first_seed + i."""
    pictures = np.empty((len(scenes), SIDE, SIDE, 3), np.uint8)
    for index, scene in enumerate(scenes):
        pictures[index] = draw_scene(scene, first_seed + index)
    return pictures


def stored_pictures(path: Path, scenes: list[Scene]) -> NDArray[np.uint8]:
    """Return the scenes' pictures from the file, drawing them first if it is missing."""
    if not path.exists():
        partial = path.with_suffix(".partial.npy")
        np.save(partial, pictures_of(scenes, first_seed=0))
        partial.replace(path)
    pictures: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return pictures
