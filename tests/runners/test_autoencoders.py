"""Pictures through an AutoencoderTiny against plain diffusers' with the same one."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import runners
from optimizer.families.base import Ranges
from optimizer.families.parts import vae_signatures
from optimizer.vae_config import completed
from runners.adapters import VaeAdapter
from runners.engines.eager import EagerEngine
from runners.pipeline import TASKS, pipeline_of
from tests.conftest import HERE
from tests.tiny_pipelines import TINY, tiny_autoencoder, tiny_taesd

MakeBundle = Callable[..., Path]
EDITS = ("text-to-image", "img2img", "inpaint")
LIMIT = 1
"""In 255: fp32 sums in another order move a picture by 1e-5, which crosses at most one rounding."""


def drawn(pipeline: Any, width: int, height: int) -> np.ndarray[Any, Any]:
    """Pictures [n, height, width, 3] as 0-255: two from text alone, one where it edits."""
    rng = np.random.default_rng(0)
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 3 :] = 255
    given = {
        "width": width,
        "height": height,
        "strength": 0.6,
        "image": Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)),
        "mask_image": Image.fromarray(mask),
    }
    taken = signature(pipeline.__call__).parameters
    seeds = [3] if "image" in taken else [3, 4]
    images = pipeline(
        prompt=["a red circle"] * len(seeds),
        **{name: value for name, value in given.items() if name in taken},
        num_inference_steps=4,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
    ).images
    found = np.stack([np.asarray(image, dtype=np.int16) for image in images])
    assert found.shape == (len(seeds), height, width, 3)
    assert found.std() > 1, "a flat picture proves nothing"
    return found


def as_task(pipeline: Any, cls: Any, vae: Any) -> Any:
    """The same parts as another pipeline; diffusers' from_pipe refuses an AutoencoderTiny."""
    made = pipeline_of(cls, {**pipeline.components, "vae": vae}, {})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def plain(tiny_model: Path, taesd: Path) -> Any:
    """diffusers' own pipeline with the AutoencoderTiny."""
    vae = diffusers.AutoencoderTiny.from_pretrained(taesd, local_files_only=True)
    return diffusers.StableDiffusionPipeline.from_pretrained(
        tiny_model, vae=vae, local_files_only=True
    )


@pytest.fixture(scope="module")
def wanted(plain: Any) -> Callable[[str, int, int], np.ndarray[Any, Any]]:
    """`wanted(task, width, height)`: what diffusers draws, once."""

    @cache
    def draw(task: str, width: int, height: int) -> np.ndarray[Any, Any]:
        cls = getattr(diffusers, TASKS[type(plain).__name__][task])
        return drawn(as_task(plain, cls, plain.vae), width, height)

    return draw


@pytest.mark.parametrize("backend", HERE)
def test_pictures_and_edits_are_diffusers_own(
    bundle: MakeBundle, wanted: Callable[..., Any], taesd: Path, backend: str
) -> None:
    """At a wide and a tall size, neither of which is traced or recorded."""
    ours = runners.load(bundle(backend, vae=taesd))
    try:
        for task, size in zip(EDITS, ((96, 64), (48, 80), (96, 64)), strict=True):
            cls = getattr(diffusers, TASKS[type(ours).__name__][task])
            found = drawn(as_task(ours, cls, ours.vae), *size)
            assert np.abs(found - wanted(task, *size)).max() <= LIMIT
    finally:
        ours.kiln.close()


def adapted(folder: Path, vae: Any) -> VaeAdapter:
    """What stands for `vae`, on eager engines of its halves."""
    config = completed(json.loads((folder / "config.json").read_text()), where="it")
    kinds = {"AutoencoderTiny": "tiny_vae_encoder", "AutoencoderKL": "vae_encoder"}
    wrappers = {"vae_encoder": kinds[config["_class_name"]], "vae_decoder": "vae_decoder"}
    signatures = vae_signatures({"vae": config}, Ranges(32, 64, 128, 2), 8)

    def engine(name: str) -> Any:
        made = EagerEngine(
            {
                "config": json.dumps(config).encode(),
                "layers": b"{}",
                "weights": safetensors.torch.save(vae.state_dict()),
            },
            signature=signatures[name],
            properties={"wrapper": wrappers[name], "dtype": "f32"},
            threads=1,
        )
        return made.__enter__()

    encoder, decoder = engine("vae_encoder"), engine("vae_decoder")
    return VaeAdapter(config, encoder=lambda: encoder, decoder=lambda: decoder)


@pytest.fixture(scope="module")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """`tiny_of(family)`: its tiny pipeline with an AutoencoderTiny that fits, and that one's
    folder.

    The config is an old file's, which lacks what diffusers adds.
    """
    root = tmp_path_factory.mktemp("tiny")

    def make(family: str) -> tuple[Any, Path]:
        model, folder = root / family, root / f"{family}-taesd"
        if not model.exists():
            channels = json.loads((TINY[family](model) / "vae/config.json").read_text())
            tiny_taesd(folder, latent_channels=channels["latent_channels"])
            config = json.loads((folder / "config.json").read_text())
            for name in ("block_out_channels", "shift_factor", "force_upcast"):
                del config[name]
            (folder / "config.json").write_text(json.dumps(config))
        vae = diffusers.AutoencoderTiny.from_pretrained(folder, local_files_only=True)
        return diffusers.DiffusionPipeline.from_pretrained(
            model, vae=vae, local_files_only=True
        ), folder

    return make


@pytest.mark.parametrize("task", EDITS)
@pytest.mark.parametrize("family", [name for name in TINY if name != "sd1"])
def test_pipelines_of_every_family_take_it_for_an_autoencoder_tiny(
    tiny_of: Callable[[str], tuple[Any, Path]], family: str, task: str
) -> None:
    plain, folder = tiny_of(family)
    cls = getattr(diffusers, TASKS[type(plain).__name__][task])
    theirs, ours = (as_task(plain, cls, vae) for vae in (plain.vae, adapted(folder, plain.vae)))
    assert np.abs(drawn(ours, 96, 64) - drawn(theirs, 96, 64)).max() <= LIMIT


@pytest.mark.parametrize("make", [tiny_taesd, tiny_autoencoder])
def test_the_adapter_gives_what_its_class_gives(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    folder = make(tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    plain = getattr(diffusers, config["_class_name"]).from_pretrained(folder).eval()
    ours = adapted(folder, plain)
    image, latents = torch.rand(1, 3, 32, 48) * 2 - 1, torch.randn(1, 4, 8, 12)
    with torch.no_grad():
        pairs = [
            (ours.encode(image), plain.encode(image)),
            (ours.decode(latents), plain.decode(latents)),
        ]
        [bare], [theirs] = (vae.encode(image, return_dict=False) for vae in (ours, plain))
    for found, wanted in pairs:
        assert type(found) is type(wanted)
    assert type(bare) is type(theirs)
    encoded = [
        output.latents if hasattr(output, "latents") else output.latent_dist.mean
        for output in pairs[0]
    ]
    torch.testing.assert_close(*encoded, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*(output.sample for output in pairs[1]), rtol=1e-4, atol=1e-5)
