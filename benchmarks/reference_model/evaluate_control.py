"""Measure how well the shapes of controlled pictures follow their control.

Run `python -m benchmarks.reference_model.evaluate_control BUNDLE...`: bundles that were compiled
with `--controlnet benchmarks/reference_model/controlnet`, beside diffusers itself and, for chance,
the same captions and seeds without control.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from numpy.typing import NDArray
from PIL import Image

import runners
from benchmarks.reference_model.captions import Scene, sample_scenes
from benchmarks.reference_model.controlled import found_shape, iou, open_caption, shape_of
from benchmarks.reference_model.draw import draw_coverage, draw_scene
from benchmarks.reference_model.evaluate import MODEL, load_pipeline
from benchmarks.reference_model.train_controlnet import CONTROLNET
from runners.preprocessing import canny

__all__ = ["controls_of", "draw_all", "held_out_scenes", "mean_iou"]

_SCENES_SEED = 91
_DRAWING_SEED = 60_000_000
_BATCH = 4
_SHOWN = 8


def held_out_scenes(count: int) -> list[Scene]:
    """Scenes of one thing, none of them in the training set."""
    return sample_scenes(_SCENES_SEED, count, held_out=True, two_things=0)


def controls_of(scenes: Sequence[Scene]) -> list[Image.Image]:
    """The edges of the scenes' shapes, 64x64, in RGB."""
    covered = [draw_coverage(scene, _DRAWING_SEED + i) for i, scene in enumerate(scenes)]
    return [canny(Image.fromarray(np.uint8(255 * part))) for part in covered]


def mean_iou(scenes: Sequence[Scene], pictures: Sequence[NDArray[np.uint8]]) -> float:
    """Of the shapes found in the pictures with those that the controls show."""
    pairs = [
        (
            found_shape(picture, scene.things[0], scene.background),
            shape_of(scene, _DRAWING_SEED + i),
        )
        for i, (scene, picture) in enumerate(zip(scenes, pictures, strict=True))
    ]
    return float(np.mean([iou(found, shown) for found, shown in pairs]))


def _drawn(scenes: Sequence[Scene]) -> list[NDArray[np.uint8]]:
    return [draw_scene(scene, _DRAWING_SEED + i) for i, scene in enumerate(scenes)]


def _generated(
    pipeline: Any, scenes: Sequence[Scene], shown: Sequence[Image.Image] | None, steps: int
) -> list[NDArray[np.uint8]]:
    """A picture for each scene's open caption; picture i has seed i."""
    settings = json.loads((MODEL / "kiln.json").read_text("utf-8"))
    found: list[NDArray[np.uint8]] = []
    for start in range(0, len(scenes), _BATCH):
        part = scenes[start : start + _BATCH]
        generators = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(part))]
        control = {} if shown is None else {"image": list(shown[start : start + len(part)])}
        with torch.inference_mode():
            images = pipeline(
                [open_caption(scene) for scene in part],
                num_inference_steps=steps,
                guidance_scale=settings["guidance"],
                generator=generators,
                **control,
            ).images
        found += [np.asarray(image) for image in images]
    return found


def _eager(controlnet: Path) -> Any:
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        MODEL,
        controlnet=ControlNetModel.from_pretrained(controlnet, torch_dtype=torch.float32),
        safety_checker=None,
        dtype=torch.float32,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


Pictures = list[NDArray[np.uint8]]


def draw_all(
    bundles: Sequence[Path], controlnet: Path, scenes: Sequence[Scene], steps: int
) -> dict[str, Pictures]:
    """The pictures of every contestant: "drawn" are right ones, "without control" are chance."""
    shown = controls_of(scenes)
    found = {
        "drawn": _drawn(scenes),
        "without control": _generated(load_pipeline(MODEL, "cpu"), scenes, None, steps),
        "diffusers fp32": _generated(_eager(controlnet), scenes, shown, steps),
    }
    for bundle in bundles:
        pipeline = runners.load(bundle, task="control")
        entry = pipeline.kiln.manifest.component("denoiser")
        name = f"{entry.backend} {entry.quant}/{entry.dtype}"
        found[name] = _generated(pipeline, scenes, shown, steps)
        pipeline.kiln.close()
    return found


def _write_sheet(path: Path, scenes: Sequence[Scene], columns: Sequence[Pictures]) -> None:
    """Edges, then a column a contestant, two scenes a row."""
    shown = [np.asarray(image) for image in controls_of(scenes)]
    rows = [np.concatenate(row, axis=1) for row in zip(shown, *columns, strict=True)]
    half = len(rows) // 2
    sheet = [np.concatenate(pair, axis=1) for pair in zip(rows[:half], rows[half:], strict=False)]
    image = Image.fromarray(np.concatenate(sheet))
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="*")
    parser.add_argument("--controlnet", type=Path, default=CONTROLNET)
    parser.add_argument("--count", type=int, default=64, help="captions, default 64")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sheet", type=Path, help="PNG of the first eight scenes to write")
    parser.add_argument("-o", "--out", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    scenes = held_out_scenes(given.count)
    found = draw_all(given.bundles, given.controlnet, scenes, given.steps)
    means = {name: round(mean_iou(scenes, pictures), 4) for name, pictures in found.items()}
    print(
        f"{given.count} held-out captions, {given.steps} steps, mean IoU with the control's shape:"
    )
    for name, value in means.items():
        print(f"| {name} | {value:.3f} |")
    if given.sheet is not None:
        chosen = [found[name][:_SHOWN] for name in ("diffusers fp32", "without control")]
        _write_sheet(given.sheet, scenes[:_SHOWN], chosen)
    if given.out is not None:
        document = {"prompts": given.count, "steps": given.steps, "mean_iou": means}
        given.out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
