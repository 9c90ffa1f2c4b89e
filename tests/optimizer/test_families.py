"""Every family, as a tiny pipeline: detected, compiled, and drawing what diffusers draws."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import runners
from optimizer.families import FAMILIES, family
from optimizer.source import resolve
from profiles.errors import SpecError
from runners.bundle import read_manifest
from tests.tiny_pipelines import TINY, tiny_flux, tiny_refiner, tiny_sd, tiny_sd2, tiny_sd3

Kiln = Callable[..., Any]
MakeBundle = Callable[..., Path]
LIMIT = 1
"""In 255: fp32 sums in another order move a picture by 1e-5, which crosses at most one rounding."""

MADE = {**{name: make for name, make in TINY.items() if name != "sd1"}}
MADE["flux-schnell"] = partial(tiny_flux, guided=False)
MADE["sd1-inpaint"] = partial(tiny_sd, inpaints=True)
MADE["sd1-v2"] = tiny_sd2
MADE["sd3-clips"] = partial(tiny_sd3, t5=False)
MADE["sdxl-refiner"] = tiny_refiner
"""sd1 has tests of its own."""
TASK = {"sd1-inpaint": "inpaint", "sdxl-refiner": "img2img"}
"""That of the pipeline's own class, where it isn't text-to-image."""
ABSENT = {"sd3-clips": {"text_encoder_3": None, "tokenizer_3": None}}
"""What diffusers wants to be told beside the folder."""
QUICK: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("sdxl", "flux"),
    "eager": ("sd3", "sd1-inpaint", "sd1-v2", "sdxl-refiner"),
    "aoti": (),
    "aoti-blocks": (),
}
"""Backend -> whose pictures are drawn in every run; the others' with -m slow."""


def quick(name: str) -> str:
    """The backend that every run compiles it for anyway."""
    return next(backend for backend, names in QUICK.items() if name in names)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`models(name)`: the tiny pipeline of MADE, made once."""
    root = tmp_path_factory.mktemp("families")

    def get(name: str) -> Path:
        return root / name if (root / name).exists() else MADE[name](root / name)

    return get


def drawn(pipeline: Any, width: int, height: int, seeds: list[int]) -> np.ndarray[Any, Any]:
    taken = signature(pipeline.__call__).parameters
    given = {"width": width, "height": height, "strength": 0.6, **to_repaint(width, height)}
    images = pipeline(
        prompt=["a red circle"] * len(seeds),
        **{name: value for name, value in given.items() if name in taken},
        num_inference_steps=4,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
    ).images
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def to_repaint(width: int, height: int) -> dict[str, Image.Image]:
    rng = np.random.default_rng(0)
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 3 :] = 255
    picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return {"image": Image.fromarray(picture), "mask_image": Image.fromarray(mask)}


def test_every_family_has_a_tiny_pipeline() -> None:
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("name", MADE)
def test_a_folder_is_detected_by_its_index(models: Callable[[str], Path], name: str) -> None:
    source = resolve(str(models(name)))
    assert source.family == name.split("-")[0]
    assert source.pipeline_class in family(source.family).pipeline_classes


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=() if name in names else pytest.mark.slow)
        for backend, names in QUICK.items()
        for name in MADE
    ],
)
def test_pictures_are_diffusers_own(
    models: Callable[[str], Path], bundle: MakeBundle, name: str, backend: str
) -> None:
    """Alone at a wide size, and two together at a tall one; neither is traced or recorded."""
    plain = diffusers.DiffusionPipeline.from_pretrained(
        models(name), local_files_only=True, **ABSENT.get(name, {})
    )
    plain.set_progress_bar_config(disable=True)
    task = TASK.get(name, "text-to-image")
    ours = runners.load(bundle(backend, model=models(name)), task=task)
    try:
        assert type(ours) is type(plain)
        for width, height, seeds in ((96, 64, [3]), (48, 80, [4, 5])):
            wanted = drawn(plain, width, height, seeds)
            found = drawn(ours, width, height, seeds)
            assert wanted.std() > 1, "a flat picture proves nothing"
            assert np.abs(wanted - found).max() <= LIMIT
    finally:
        ours.kiln.close()


EDITS = [(name, task) for name in ("sdxl", "sd3", "flux") for task in ("img2img", "inpaint")]


@pytest.mark.parametrize(("name", "task"), [*EDITS, ("sdxl-refiner", "inpaint")])
def test_edits_are_diffusers_own(
    models: Callable[[str], Path], bundle: MakeBundle, name: str, task: str
) -> None:
    plain = diffusers.DiffusionPipeline.from_pretrained(models(name), local_files_only=True)
    ours = runners.load(bundle(quick(name), model=models(name)), task=task)
    theirs = type(ours).from_pipe(plain)
    theirs.set_progress_bar_config(disable=True)
    try:
        assert np.abs(drawn(theirs, 64, 64, [3]) - drawn(ours, 64, 64, [3])).max() <= LIMIT
    finally:
        ours.kiln.close()


@pytest.mark.parametrize(
    "name",
    ["sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "flux"))],
)
def test_quantized_denoisers_lose_no_more_than_their_oracle(
    models: Callable[[str], Path], bundle: MakeBundle, name: str
) -> None:
    """Within 1 dB and what bf16 loses by itself: compiling refuses what is worse."""
    manifest = read_manifest(bundle("openvino", "int8", model=models(name)))
    entry = manifest.component("denoiser")
    fragile = family(name).component(entry.name).fragile
    kept = [pattern for pattern in fragile if "*" not in pattern]
    assert entry.layers_quantized == entry.layers_total - len(kept)
    assert entry.sqnr_db is not None
    assert entry.oracle_sqnr_db is not None
    assert entry.sqnr_db > min(entry.oracle_sqnr_db, 80) - 1
    texts = [item.name for item in manifest.components if item.role == "text_encoder"]
    assert len(texts) == len({f"text_encoder{end}" for end in ("", "_2", "_3")} & set(texts)) > 1


@pytest.mark.parametrize("name", MADE)
def test_a_plan_needs_no_weights_and_names_every_component(
    kiln: Kiln, models: Callable[[str], Path], name: str
) -> None:
    ended = kiln("compile", models(name), "--quant", "int4", "--dry-run", "--json")
    components = json.loads(ended.out)["components"]
    known = family(name.split("-")[0]).of(resolve(str(models(name))).folders)
    names = [component["name"] for component in components]
    assert names == [spec.name for spec in known.components]
    assert ("text_encoder" in names) == (name != "sdxl-refiner")
    assert ("text_encoder_3" in names) == (name == "sd3")


def test_a_part_that_no_pipeline_goes_without_is_missed(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(models("sdxl-refiner"), tmp_path / "model"))
    index = json.loads((model / "model_index.json").read_text())
    index["text_encoder_2"] = [None, None]
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(SpecError, match="names no text_encoder_2: give a whole pipeline"):
        resolve(str(model))


def test_the_refiner_goes_on_where_the_base_stopped(
    models: Callable[[str], Path], bundle: MakeBundle
) -> None:
    """Noisy latents are handed over: the base draws the first part of the steps, it the rest."""
    names = ("sdxl", "sdxl-refiner")
    theirs = [
        diffusers.DiffusionPipeline.from_pretrained(models(name), local_files_only=True)
        for name in names
    ]
    ours = [
        runners.load(bundle(quick(name), model=models(name)), task=task)
        for name, task in zip(names, ("text-to-image", "img2img"), strict=True)
    ]

    def finished(base: Any, refiner: Any) -> np.ndarray[Any, Any]:
        how = {"prompt": "a red circle", "num_inference_steps": 5}
        for pipeline in (base, refiner):
            pipeline.set_progress_bar_config(disable=True)
        latents = base(
            **how,
            width=96,
            height=64,
            denoising_end=0.6,
            output_type="latent",
            generator=torch.Generator("cpu").manual_seed(3),
        ).images
        assert latents.shape == (1, 4, 16, 24)
        image = refiner(**how, image=latents, denoising_start=0.6).images[0]
        assert refiner.num_timesteps == 2
        return np.asarray(image, dtype=np.int16)

    try:
        wanted = finished(*theirs)
        assert wanted.std() > 1, "a flat picture proves nothing"
        assert np.abs(wanted - finished(*ours)).max() <= LIMIT
    finally:
        for pipeline in ours:
            pipeline.kiln.close()


_CARDS = "sm86,sm89,sm120"


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        pytest.param(
            name, quant, marks=() if (name, quant) == ("sd3", "int8") else pytest.mark.slow
        )
        for name in ("sdxl", "sd3", "flux")
        for quant in ("none", "int8", "int4")
    ],
)
def test_every_component_builds_for_three_architectures_at_once(
    models: Callable[[str], Path], bundle: MakeBundle, name: str, quant: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    manifest = read_manifest(bundle("tensorrt-rtx", quant, "fp16", _CARDS, model=models(name)))
    assert {entry.name for entry in manifest.components} == {
        spec.name for spec in family(name).components
    }
    for entry in manifest.components:
        assert entry.requires.capabilities == ("8.6", "8.9", "12.0")
        assert entry.oracle_sqnr_db is not None
        assert entry.sqnr_db is not None
        assert entry.sqnr_db > min(entry.oracle_sqnr_db, 40) - 1
    denoiser = manifest.component("denoiser")
    assert denoiser.layers_low_bit is not None
    assert bool(denoiser.layers_low_bit) == (quant != "none")
