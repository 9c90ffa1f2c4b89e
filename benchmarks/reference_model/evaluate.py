"""Print how well the model's pictures show their captions, and how reliable that measure is.

Run `python -m benchmarks.reference_model.evaluate`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from benchmarks.reference_model.adherence import Adherence, AdherenceScore
from benchmarks.reference_model.captions import parse_caption
from benchmarks.reference_model.dataset import pictures_of

MODEL = Path(__file__).with_name("model")
"""The committed pipeline folder."""

_BATCH = 25
_DRAWING_SEED = 50_000_000


def load_pipeline(folder: Path, device: torch.device | str) -> StableDiffusionPipeline:
    """Load the pipeline in float32, without progress bars."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def captions_of(folder: Path, name: str = "evaluation") -> list[str]:
    """Return the captions of `prompts/<name>.txt` in the model folder."""
    return (folder / "prompts" / f"{name}.txt").read_text().splitlines()


def generate(
    pipeline: StableDiffusionPipeline,
    captions: list[str],
    *,
    steps: int,
    guidance: float,
    first_seed: int = 0,
) -> list[Image.Image]:
    """Return one picture for each caption; picture i has seed first_seed + i, on the CPU."""
    images: list[Image.Image] = []
    for start in range(0, len(captions), _BATCH):
        batch = captions[start : start + _BATCH]
        seeds = [first_seed + start + i for i in range(len(batch))]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.inference_mode():
            images += pipeline(
                batch, num_inference_steps=steps, guidance_scale=guidance, generator=generators
            ).images
    return images


def drawn(captions: list[str]) -> list[Image.Image]:
    """Return the drawn pictures of captions, which training has not seen."""
    scenes = [parse_caption(caption) for caption in captions]
    return [Image.fromarray(picture) for picture in pictures_of(scenes, _DRAWING_SEED)]


def table(columns: dict[str, AdherenceScore]) -> str:
    """Return the scores in per cent as a Markdown table, one column each."""
    names = list(columns)
    lines = ["| attribute | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    rows = {a: [columns[n].attributes[a] for n in names] for a in columns[names[0]].attributes}
    rows["mean"] = [columns[n].mean for n in names]
    for row, values in rows.items():
        lines.append(f"| {row} | " + " | ".join(f"{100 * v:.1f}" for v in values) + " |")
    return "\n".join(lines)


def evaluate(
    folder: Path, device: torch.device, *, limit: int, steps: int, guidance: float
) -> dict[str, AdherenceScore]:
    """Score generated and drawn pictures of the first `limit` held-out captions."""
    adherence = Adherence.load(folder)
    captions = captions_of(folder)[:limit]
    images = generate(load_pipeline(folder, device), captions, steps=steps, guidance=guidance)
    return {
        "generated": adherence.score(images, captions),
        "drawn": adherence.score(drawn(captions), captions),
    }


def main() -> None:
    """Read the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, default=200, help="captions, default 200")
    parser.add_argument("--steps", type=int, help="default: the model's kiln.json")
    parser.add_argument("--guidance", type=float, help="default: the model's kiln.json")
    given = parser.parse_args()
    settings = json.loads((given.model / "kiln.json").read_text())
    steps = given.steps or settings["steps"]
    guidance = settings["guidance"] if given.guidance is None else given.guidance
    scores = evaluate(
        given.model, torch.device(given.device), limit=given.limit, steps=steps, guidance=guidance
    )
    print(f"{given.limit} held-out captions, {steps} steps, guidance {guidance}, in per cent:")
    print(table(scores))


if __name__ == "__main__":
    main()
