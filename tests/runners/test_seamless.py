"""Seamless tiles: what engines give in tiles is what they give of whole pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runners.seamless import Grid, in_seamless_tiles, margin_of

MakeBundle = Callable[..., Path]

BACKENDS = ("openvino", "onnxruntime", "eager")
SIDE = 128
"""Twice the tiny model's native side, and so twice a tile's."""


def _smooth(channels: int, side: int, *, batch: int = 1) -> torch.Tensor:
    """Bright on one side and dark on the other, with detail: tiles' own statistics differ."""
    made = torch.Generator().manual_seed(5)
    coarse = torch.randn(batch, channels, 5, 5, generator=made)
    fine = torch.randn(batch, channels, side, side, generator=made)
    wide = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return wide + torch.linspace(-1, 1, side) + 0.2 * fine


def _pixels(image: torch.Tensor) -> Any:
    return ((image.clamp(-1, 1) + 1) * 127.5).numpy()


@pytest.fixture(params=BACKENDS)
def pipeline(request: pytest.FixtureRequest, bundle: MakeBundle) -> Any:
    import runners

    with torch.no_grad():
        yield (found := runners.load(bundle(request.param, tiles=True), threads=1))
    found.kiln.close()


def test_pictures_are_decoded_as_whole_ones_are(pipeline: Any) -> None:
    vae = pipeline.vae
    latents = _smooth(4, SIDE // 4, batch=2)
    whole = _pixels(vae.decode(latents).sample)
    vae.enable_tiling()
    tiled = _pixels(vae.decode(latents).sample)
    differences = np.abs(tiled - whole)
    assert whole.std() > 1  # a picture, not one grey
    assert differences.mean() < 0.25  # the limit is 1
    near = _near_borders(SIDE)
    assert differences[..., near].mean() < 1
    assert _steps(tiled)[..., near[1:]].mean() == pytest.approx(
        _steps(whole)[..., near[1:]].mean(), rel=0.05
    )


def _near_borders(side: int) -> Any:
    """Which columns lie beside the border of two cores: tiles of 64 px with a margin of 16."""
    from runners.seamless import _spans

    spans = _spans(side // 4, 16, 4)
    ends = np.array([span.high * 4 for span in spans[:-1]])
    return (np.abs(np.arange(side)[:, None] + 0.5 - ends) < 2).any(axis=1)


def _steps(image: Any) -> Any:
    return np.abs(np.diff(image, axis=-1))


def test_pictures_are_encoded_as_whole_ones_are(pipeline: Any) -> None:
    vae = pipeline.vae
    images = _smooth(3, SIDE, batch=2).clamp(-1, 1)
    whole = vae.encode(images).latent_dist.mean.numpy()
    vae.enable_tiling()
    tiled = vae.encode(images).latent_dist.mean.numpy()
    assert np.abs(tiled - whole).mean() < 0.004 * whole.std()  # 1/255 of the range


def test_only_parts_are_open_in_tiles(pipeline: Any) -> None:
    vae = pipeline.vae
    vae.enable_tiling()
    vae.decode(_smooth(4, SIDE // 4))
    opened = set(pipeline.kiln._open._engines)
    assert opened == {("vae_decoder", "whole"), ("vae_decoder", "tile")}
    vae.decode(_smooth(4, 16))  # no larger than a tile
    assert set(pipeline.kiln._open._engines) == {("vae_decoder", "")}


def test_a_function_without_norms_is_exact_beyond_its_reach() -> None:
    x = torch.randn(1, 3, 37, 50, generator=torch.Generator().manual_seed(0))
    kernel = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(1))

    def decode(part: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = torch.nn.functional.conv2d(part, kernel, padding=1)
        return torch.nn.functional.interpolate(made, scale_factor=4), torch.ones(1, 2, 1)

    found = in_seamless_tiles(decode, x, Grid((16, 16), 1, 2), (1, 2, 1))
    torch.testing.assert_close(found, decode(x)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("layers", "encodes", "margin"), [(2, False, 7), (2, True, 5)])
def test_the_margin_is_half_of_what_convolutions_reach(
    layers: int, margin: int, *, encodes: bool
) -> None:
    config = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": layers}
    assert margin_of(config, encodes=encodes) == margin
