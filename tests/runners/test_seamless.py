"""Seamless tiles: what engines give in tiles is what they give of whole pictures."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from runners.adapters import VaeAdapter
from runners.metadata import read_metadata
from runners.seamless import Grid, Held, Made, in_seamless_tiles, margins_of
from runners.signature import Signature
from tests.conftest import Kiln, MakeBundle

REFERENCE = Path(__file__).parents[2] / "benchmarks" / "reference_model"
SIDE = 128
"""Twice the native side of both models here, and so twice a tile's."""


def _uneven(channels: int, side: int) -> Tensor:
    """Two pictures, darker to the left, with detail: each tile's statistics are others."""
    made = torch.Generator().manual_seed(5)
    coarse = torch.randn(2, channels, 5, 5, generator=made)
    wide = functional.interpolate(coarse, size=(side, side), mode="bicubic")
    detail = torch.randn(2, channels, side, side, generator=made)
    return wide + torch.linspace(-1, 1, side) + 0.2 * detail


def _pixels(image: Tensor) -> Any:
    """In 255ths of the range."""
    return (image.clamp(-1, 1) * 127.5).numpy()


@pytest.fixture(scope="module", params=("openvino", "onnxruntime", "eager"))
def pipeline(request: pytest.FixtureRequest, bundle: MakeBundle) -> Iterator[Any]:
    import runners

    loaded = runners.load(bundle(request.param, tiles=True), threads=1)
    yield loaded
    loaded.kiln.close()


@pytest.fixture
def vae(pipeline: Any) -> Iterator[Any]:
    yield pipeline.vae
    pipeline.vae.disable_tiling()


def test_pictures_are_decoded_as_whole_ones_are(vae: Any) -> None:
    """Random weights see as far as convolutions reach, trained ones hardly: those are below."""
    latents = _uneven(4, SIDE // 4)
    whole = _pixels(vae.decode(latents).sample)
    vae.enable_tiling()
    tiled = _pixels(vae.decode(latents).sample)
    assert whole.std() > 10  # no even grey
    assert np.abs(tiled - whole).mean() < 1


def test_pictures_are_encoded_as_whole_ones_are(vae: Any) -> None:
    images = _uneven(3, SIDE).clamp(-1, 1)
    whole = vae.encode(images).latent_dist.mean.numpy()
    vae.enable_tiling()
    tiled = vae.encode(images).latent_dist.mean.numpy()
    assert np.abs(tiled - whole).mean() < np.ptp(whole) / 255


def test_sides_needn_t_be_whole_tiles(vae: Any) -> None:
    latents = _uneven(4, SIDE // 4)[:1, :, :14, :26]  # lower than a tile, and wider
    whole = _pixels(vae.decode(latents).sample)
    vae.enable_tiling()
    tiled = _pixels(vae.decode(latents).sample)
    assert tiled.shape == whole.shape
    assert np.abs(tiled - whole).mean() < 1


def test_one_part_is_open_at_a_time(pipeline: Any, vae: Any) -> None:
    forms = pipeline.kiln._open._forms
    vae.enable_tiling()
    vae.decode(_uneven(4, SIDE // 4)[:1])
    assert forms["vae_decoder"] == "after"
    vae.decode(_uneven(4, 16)[:1])  # no larger than a tile
    assert forms["vae_decoder"] == ""


@pytest.mark.parametrize("more", [(), ("--image", "start.png", "--strength", 0.5)], ids=len)
def test_the_command_draws_in_tiles_what_it_draws_whole(
    bundle: MakeBundle, kiln: Kiln, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: Any
) -> None:
    """From noise, and from a picture that is encoded in tiles too."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(_pixels(_sheet(SIDE))[0].transpose(1, 2, 0).astype(np.uint8)).save("start.png")
    made, pictures = bundle("onnxruntime", tiles=True), []
    for name, way in (("whole.png", "--no-tiled"), ("tiles.png", "--tiled")):
        fixed = ("--prompt", "a house", "--seed", 3, "--steps", 2, "--size", f"{SIDE}x{SIDE}")
        ended = kiln("generate", made, *fixed, way, "-o", name, *more)
        assert ended.code == 0, ended.err
        assert read_metadata(tmp_path / name)["way"]["tiled"] is (way == "--tiled")
        with Image.open(name) as image:
            pictures.append(np.asarray(image, np.float32))
    assert pictures[0].std() > 10
    assert np.abs(pictures[1] - pictures[0]).mean() < 1


class _ModuleEngine:
    """A part of a half in torch, called as an engine is."""

    def __init__(self, module: Any, signature: Signature) -> None:
        self.module, self.signature = module, signature

    def __call__(self, feeds: dict[str, Any]) -> dict[str, Any]:
        tensors = (torch.from_numpy(feeds[spec.name]) for spec in self.signature.inputs)
        with torch.inference_mode():
            found = self.module(*tensors)
        names = (spec.name for spec in self.signature.outputs)
        return {name: each.numpy() for name, each in zip(names, found, strict=True)}


def _in_torch(model: Any, folder: Path, side: int) -> VaeAdapter:
    """The decoder of an AutoencoderKL in its two parts, in tiles of `side` px."""
    from optimizer.compile import plan_recipe
    from optimizer.recipe import Recipe
    from optimizer.tile_form import part_signatures
    from runners.vae_parts import DecoderAfter, DecoderBefore, part_norms
    from tests.tiny_pipelines import tiny_sd

    plan, *_ = plan_recipe(Recipe.model_validate({"model": str(tiny_sd(folder))}))
    job = next(job for job in plan.jobs if job.spec.role == "vae_decoder")
    norms = {name: len(found) for name, found in part_norms(model.decoder).items()}
    signatures = part_signatures(job, model.config, norms=norms)
    engines = {
        form: _ModuleEngine(wrapper(copy.deepcopy(model)), signatures[form])
        for form, wrapper in (("before", DecoderBefore), ("after", DecoderAfter))
    }

    def opened(form: str = "") -> Any:
        return engines[form]

    config = {**model.config, "_class_name": "AutoencoderKL"}
    vae = VaeAdapter(config, encoder=opened, decoder=opened, tile_side=side, seamless=True)
    vae.enable_tiling()
    return vae


def test_latents_of_16_channels_without_convolutions_around_them(tmp_path: Path) -> None:
    """As those of SD3 and FLUX.1 are."""
    from tests.tiny_pipelines import tiny_vae

    torch.manual_seed(0)
    model = tiny_vae(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False).eval()
    latents = _uneven(16, SIDE // 4)[:1]
    with torch.inference_mode():
        whole = _pixels(model.decode(latents).sample)
    tiled = _pixels(_in_torch(model, tmp_path / "tiny", SIDE // 2).decode(latents).sample)
    assert whole.std() > 10
    assert np.abs(tiled - whole).mean() < 1


def test_trained_weights_leave_no_seams(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(REFERENCE / "model" / "vae").eval()
    with torch.inference_mode():
        latents = model.encode(_sheet(SIDE)).latent_dist.mean
        whole = _pixels(model.decode(latents).sample)
    tiled = _pixels(_in_torch(model, tmp_path / "tiny", SIDE // 2).decode(latents).sample)
    apart = np.abs(tiled - whole)
    assert apart.mean() < 0.15
    assert apart.max() < 3
    steps, plain = (np.abs(np.diff(image, axis=-1)) for image in (tiled, whole))
    across = [39, 59, 83]  # tiles of 64 px begin at 0, 20, 40 and 64: where their cores meet
    assert np.abs(steps - plain)[..., across].mean() < 0.15
    assert plain[..., across].mean() > 1  # there was something to see


def _sheet(side: int) -> Tensor:
    with Image.open(REFERENCE / "samples.png") as sheet:
        crop = sheet.convert("RGB").crop((40, 40, 40 + 2 * side, 40 + 2 * side))
        pixels = np.asarray(crop.resize((side, side)), np.float32)
    return torch.from_numpy(pixels.transpose(2, 0, 1)[None] / 127.5 - 1)


def test_without_norms_it_is_exact_beyond_what_convolutions_reach() -> None:
    x = torch.randn(1, 3, 37, 50, generator=torch.Generator().manual_seed(0))
    kernel = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(1))

    def decode(part: tuple[Tensor], *_: Tensor) -> tuple[tuple[Tensor], Tensor]:
        made = functional.conv2d(part[0], kernel, padding=1)
        return (functional.interpolate(made, scale_factor=4),), torch.ones(1, 2, 1)

    found = Made((37, 50), 4)
    in_seamless_tiles(decode, Held(x), Grid((16, 16), 1, 2), (1, 2, 1), found)
    torch.testing.assert_close(found.tensor, decode((x,))[0][0], rtol=0, atol=1e-5)


def test_statistics_that_never_settle_end_after_some_rounds() -> None:
    rounds = 0

    def decode(part: tuple[Tensor], *_: Tensor) -> tuple[tuple[Tensor], Tensor]:
        nonlocal rounds
        rounds += 1
        return part, torch.tensor([[[float(rounds)], [1.0]]])

    x, found = torch.zeros(1, 1, 20, 20), Made((20, 20), 1)
    in_seamless_tiles(decode, Held(x), Grid((16, 16), 1, 4), (1, 2, 1), found)
    torch.testing.assert_close(found.tensor, x)
    assert rounds <= 40


@pytest.mark.parametrize(("encodes", "margins"), [(False, (3, 10)), (True, (7, 3))])
def test_the_margins_go_by_how_far_convolutions_reach(
    margins: tuple[int, int], *, encodes: bool
) -> None:
    """Stable Diffusion's reach 15 latents in the decoder, 11 in the encoder, 2 in the middle."""
    config = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    assert margins_of(config, encodes=encodes) == margins
