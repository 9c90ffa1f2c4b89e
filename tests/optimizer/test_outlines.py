"""Closed formulas of what components weigh: the same as the modules that diffusers builds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from optimizer.families import family
from optimizer.source import resolve
from optimizer.vae_config import completed
from tests import tiny_pipelines

ASSETS = Path(__file__).parents[2] / "optimizer/families/assets"
TINY: dict[str, Callable[..., Path]] = {
    "sd1": tiny_pipelines.tiny_sd,
    "sd2": tiny_pipelines.tiny_sd2,
    "lcm": tiny_pipelines.tiny_lcm,
    "sdxl": tiny_pipelines.tiny_sdxl,
    "refiner": tiny_pipelines.tiny_refiner,
    "sd3": tiny_pipelines.tiny_sd3,
    "flux": tiny_pipelines.tiny_flux,
}
PUBLISHED = {
    ("sd1", "unet"): 859_520_964,
    ("sd1", "text_encoder"): 123_060_480,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "text_encoder_2"): 694_659_840,
    ("flux", "transformer"): 11_901_408_320,
    ("flux", "text_encoder_2"): 4_762_310_656,
    ("sd3", "transformer"): 2_084_951_104,
}
"""Of the published models, by their safetensors headers (sd3's with its table of places)."""


def configs(folder: Path) -> dict[str, dict[str, object]]:
    found = {
        path.parent.name: json.loads(path.read_bytes()) for path in folder.glob("*/config.json")
    }
    return {**found, "vae": completed(found["vae"], where="here")}


@pytest.mark.parametrize("kind", sorted(TINY))
def test_weights_are_counted_as_the_files_have_them(kind: str, tmp_path: Path) -> None:
    source = resolve(str(TINY[kind](tmp_path / "model")))
    known = family(source.family).of(source.folders)
    found = family(source.family).outlines(configs(source.folder))
    for spec in known.components:
        names = {
            name: parameter.shape
            for name, parameter in source.parameters(spec.folder).items()
            if name.startswith(spec.prefixes)
        }
        count = sum(map(_product, names.values()))
        assert found[spec.name].counted.parameters == count, spec.name


@pytest.mark.parametrize("half", ["vae_decoder", "vae_encoder"])
def test_a_half_in_seamless_tiles_is_its_two_parts(half: str) -> None:
    outline = family("sd1").outlines(configs(ASSETS / "sd1"))[half]
    before, after = outline.parts
    assert before.counted + after.counted == outline.counted
    wide, narrow = (after, before) if half == "vae_decoder" else (before, after)
    assert wide.live == outline.live
    assert narrow.live["pixels"] < outline.live["pixels"] / 8  # 512 channels of an eighth's side


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for axis in shape:
        result *= axis
    return result


@pytest.mark.parametrize(("model", "component"), sorted(PUBLISHED))
def test_published_models_weigh_what_they_weigh(model: str, component: str) -> None:
    found = family(model).outlines(configs(ASSETS / model))[component]
    assert found.counted.parameters == PUBLISHED[model, component]
