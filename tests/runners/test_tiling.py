"""Tiles: where they lie, that they blend without seams, and that engines see one size only."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d, conv2d, interpolate

from profiles.errors import UnsupportedError
from runners.adapters import VaeAdapter
from runners.engines.base import Array, Engine
from runners.signature import Dim, Signature, TensorSpec
from runners.tiling import in_tiles, starts

CONFIG = {"_class_name": "AutoencoderKL", "block_out_channels": (8, 8, 8), "latent_channels": 4}


@pytest.mark.parametrize(
    ("length", "tile", "unit"), [(16, 16, 1), (17, 16, 1), (64, 16, 1), (100, 24, 4), (512, 64, 8)]
)
def test_tiles_cover_the_side_and_overlap(length: int, tile: int, unit: int) -> None:
    found = starts(length, tile, unit=unit)
    assert found[0] == 0
    assert found[-1] + tile == length or (length <= tile and found == [0])
    assert all(start % unit == 0 for start in found[:-1])
    gaps = [b - a for a, b in pairwise(found)]
    assert all(0 < gap <= tile * 3 / 4 + unit for gap in gaps)


@pytest.mark.parametrize("size", [(16, 40), (37, 16), (50, 61)], ids=str)
def test_what_sees_no_further_than_the_ignored_edge_is_exact(size: tuple[int, int]) -> None:
    """A 3x3 kernel errs in a tile's outermost place alone, which counts for nothing."""
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    kernel = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(1))

    def decode(part: torch.Tensor) -> torch.Tensor:
        return interpolate(conv2d(part, kernel, padding=1), scale_factor=4)

    torch.testing.assert_close(in_tiles(decode, x, (16, 16)), decode(x), rtol=0, atol=1e-5)


def test_encoders_are_tiled_at_multiples_of_a_latent() -> None:
    x = torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    found = in_tiles(lambda part: avg_pool2d(part, 4), x, (64, 64), unit=4)
    torch.testing.assert_close(found, avg_pool2d(x, 4), rtol=0, atol=1e-6)


def test_tiles_that_differ_blend_without_a_step() -> None:
    """Each tile gives another constant: between neighbours the result rises evenly."""
    values = iter(range(100))

    def constant(part: torch.Tensor) -> torch.Tensor:
        return torch.full_like(part, float(next(values)))

    row = in_tiles(constant, torch.zeros(1, 1, 16, 64), (16, 16))[0, 0, 0]
    steps = row.diff()
    assert (steps >= -1e-6).all()
    assert steps.max() < 0.6


class _Decoder(Engine):
    """Latents [batch, 4, h, w] -> [batch, 3, 4h, 4w], and the shapes that it was called with."""

    seen: list[tuple[int, ...]]

    def _open(self) -> None:
        self.seen = []

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        latent = feeds["latent"]
        self.seen.append(latent.shape)
        return {"image": latent[:, :3].repeat(4, axis=2).repeat(4, axis=3)}

    def _close(self) -> None: ...


def _decoder() -> _Decoder:
    dims = [Dim(name=name, min=4, opt=8, max=64, multiple_of=4) for name in ("height", "width")]
    signature = Signature(
        inputs=(TensorSpec(name="latent", dtype="float32", axes=("batch", 4, "height", "width")),),
        outputs=(TensorSpec(name="image", dtype="float32", axes=("batch", 3, "out_h", "out_w")),),
        dims=(Dim(name="batch", min=1, opt=1, max=4), *dims),
    )
    return _Decoder({}, signature=signature, properties={}, threads=1)


def _vae(engine: Engine, tile_side: int | None = 64) -> VaeAdapter:
    return VaeAdapter(
        dict(CONFIG), encoder=lambda: engine, decoder=lambda: engine, tile_side=tile_side
    )


@pytest.mark.parametrize("side", [20, 32, 64])
def test_the_engine_sees_one_tile_of_one_picture_whatever_the_size(side: int) -> None:
    latent = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(0))
    with _decoder() as engine:
        vae = _vae(engine)
        whole: Any = vae.decode(latent).sample
        assert engine.seen == [tuple(latent.shape)]
        engine.seen.clear()
        vae.enable_tiling()
        tiled: Any = vae.decode(latent).sample
        assert set(engine.seen) == {(1, 4, 16, 16)}
        engine.seen.clear()
        vae.disable_tiling()
        vae.decode(latent)
        assert engine.seen == [tuple(latent.shape)]
    np.testing.assert_allclose(tiled.numpy(), whole.numpy(), atol=1e-5)


def test_a_picture_no_larger_than_a_tile_is_decoded_as_a_whole() -> None:
    with _decoder() as engine:
        vae = _vae(engine)
        vae.enable_tiling()
        vae.decode(torch.zeros(2, 4, 16, 16))
        assert engine.seen == [(2, 4, 16, 16)]


def test_without_a_size_of_tiles_there_are_none() -> None:
    with pytest.raises(UnsupportedError, match="has no size of tiles"):
        _vae(_decoder(), tile_side=None).enable_tiling()
