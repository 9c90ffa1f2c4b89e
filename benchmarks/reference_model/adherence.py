"""Measure whether pictures show what their captions say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.reference_model.captions import Background, Scene, Thing, parse_caption
from benchmarks.reference_model.draw import SIDE
from benchmarks.reference_model.reader import Reading, SceneReader, read

ATTRIBUTES = ("count", "shape", "colour", "size", "position", "background", "background_colour")
"""What is judged; `background` is its kind and direction."""

_BATCH = 100


@dataclass(frozen=True)
class AdherenceScore:
    """How much of what the captions say is in the pictures."""

    mean: float
    """Mean over the attributes, 0..1."""

    attributes: dict[str, float]
    """Score of each of `ATTRIBUTES`, 0..1, mean over the pictures."""

    per_image: tuple[float, ...]
    """Mean over the attributes for each picture, 0..1."""


class Adherence:
    """The classifier, ready to judge."""

    def __init__(self, model: SceneReader) -> None:
        """Judge with a trained classifier."""
        self._model = model.eval()

    @classmethod
    def load(cls, folder: Path) -> Adherence:
        """Read the classifier from the `adherence/` folder, or from the model folder above it."""
        inner = folder / "adherence"
        source = inner if inner.is_dir() else folder
        config = json.loads((source / "config.json").read_text())
        model = SceneReader(width=int(config["width"]))
        weights = load_file(source / "model.safetensors")
        model.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
        )
        return cls(model)

    def score(self, images: Sequence[Image.Image], captions: Sequence[str]) -> AdherenceScore:
        """Judge pictures of any size by their captions.

        Raises `profiles.errors.SpecError` for a caption outside the grammar, or for lists of
        different lengths or without pictures.
        """
        if len(images) != len(captions) or not images:
            from profiles.errors import SpecError

            raise SpecError(
                f"adherence needs one caption for each picture and at least one picture, got "
                f"{len(images)} pictures and {len(captions)} captions; pass lists of one length"
            )
        scenes = [parse_caption(caption) for caption in captions]
        readings: list[Reading] = []
        for start in range(0, len(images), _BATCH):
            readings += read(self._model, _as_tensor(images[start : start + _BATCH]))
        pairs = zip(readings, scenes, strict=True)
        table = np.array([judge(reading, scene) for reading, scene in pairs])
        attributes = dict(zip(ATTRIBUTES, table.mean(axis=0).tolist(), strict=True))
        per_image = tuple(table.mean(axis=1).tolist())
        return AdherenceScore(float(table.mean()), attributes, per_image)


def save_reader(model: SceneReader, folder: Path, *, width: int = 32) -> None:
    """Write the classifier as config.json and fp16 model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"width": width}, indent=2) + "\n")
    weights = model.state_dict().items()
    save_file(
        {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in weights},
        folder / "model.safetensors",
    )


def judge(reading: Reading, scene: Scene) -> list[float]:
    """Return the score of each of `ATTRIBUTES` for one picture, 0..1."""
    count = float(len(reading.things) == len(scene.things))
    things = np.mean(_best_match(reading.things, scene.things), axis=0).tolist()
    return [count, *things, *_judge_background(reading.background, scene.background)]


def _best_match(seen: tuple[Thing, ...], named: tuple[Thing, ...]) -> list[list[float]]:
    """Pair the things that are named with those that are seen, to the most agreement.

    Returns shape, colour, size, position (0 or 1) of each named thing; a missing one has zeros.
    """
    slots: list[Thing | None] = [*seen, *[None] * len(named)]
    tables = (
        [_agreement(a, b) for a, b in zip(chosen, named, strict=True)]
        for chosen in permutations(slots, len(named))
    )
    return max(tables, key=lambda table: sum(map(sum, table)))


def _agreement(seen: Thing | None, named: Thing) -> list[float]:
    if seen is None:
        return [0.0] * 4
    return [
        float(getattr(seen, a) == getattr(named, a))
        for a in ("shape", "colour", "size", "position")
    ]


def _judge_background(seen: Background, named: Background) -> list[float]:
    """Kind and direction together, then the share of the colours that are right."""
    kind = float((seen.kind, seen.direction) == (named.kind, named.direction))
    right = [a == b for a, b in zip(seen.colours, named.colours, strict=False)]
    return [kind, sum(right) / len(named.colours)]


def _as_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """Return [n, 3, 64, 64] in -1..1."""
    small = [
        image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
        if image.size != (SIDE, SIDE)
        else image.convert("RGB")
        for image in images
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in small]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
