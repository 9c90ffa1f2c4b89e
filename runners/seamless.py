"""A VAE's half over tiles that fit together: as over the whole picture, but for what is measured.

Tiles overlap by a margin beyond which convolutions hardly reach, and only their cores are used. All
norms use the statistics of the whole picture, which nobody knows at first: those of norm k depend
on those before it. They are found by a sketch, a tile put together from blocks of the picture: its
own statistics are a guess; all tiles run with the guess say by how much the sketch is wrong; run
again, and corrected by that at each norm, it gives the next guess. That takes two or three rounds
where feeding back what the tiles saw takes ten (README, Ways to draw).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from runners.tiling import starts

__all__ = ["Grid", "in_seamless_tiles", "margin_of"]

Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A tile's part, as runners.vae_parts has it: part, rows, columns, own, given -> made, seen."""

_SETTLED = 0.005
"""Of a standard deviation, how far off statistics may be: below 0.2/255 of a picture on average."""
_ROUNDS = 6
"""At most: latents of pure noise, which are far from any picture's, took four."""
_BLOCKS = 4
"""Of the sketch, along a side."""
_LEAST = 1e-12
"""Of a variance that is divided by."""


@dataclass(frozen=True)
class Grid:
    """How a picture is cut."""

    tile: tuple[int, int]
    """Height and width in places of what is cut."""
    unit: int
    """Places of it a latent, along a side."""
    margin: int
    """Latents around a core that are computed and left out."""


@dataclass(frozen=True)
class _Span:
    """One tile along one side, in latents."""

    start: int
    """Where it begins."""
    low: int
    """Where its core begins."""
    high: int
    """Where its core ends."""


def margin_of(config: Any, *, encodes: bool) -> int:
    """Latents around a tile's core, by an AutoencoderKL's config: half of how far the convolutions
    of that part reach. Beyond, what is left of a value is too little to be seen (0.6/255 at most on
    the reference model's).
    """
    levels, layers = len(config["block_out_channels"]), int(config["layers_per_block"])
    if encodes:  # from pixels to latents: one more convolution at the beginning and after a level
        reach = sum((2 * layers + 1) / 2 ** (levels - 1 - level) for level in range(levels))
    else:
        reach = sum((2 * layers + 3) / 2**level for level in range(levels))
    return -(-int(reach) // 2)


def in_seamless_tiles(run: Run, x: Tensor, grid: Grid, norms: tuple[int, ...]) -> Tensor:
    """What `run` makes of one picture, [1, channels, height, width], in tiles.

    `norms`: the shape of the statistics, [norms, 2, groups].
    """
    sides = [min(*pair) for pair in zip(grid.tile, x.shape[-2:], strict=True)]
    cut = Grid((sides[0], sides[1]), grid.unit, grid.margin)
    spans = [
        _spans(n // grid.unit, side // grid.unit, grid.margin)
        for n, side in zip(x.shape[-2:], sides, strict=True)
    ]
    sketch = _sketched(x, cut)
    even = [torch.full((side // grid.unit,), grid.unit / side) for side in sides]
    own, theirs = torch.ones(1), torch.zeros(1)
    correction = torch.stack((torch.zeros(norms[0], norms[2]), torch.ones(norms[0], norms[2])), 1)
    expected = run(sketch, even[0], even[1], own, correction)[1]
    statistics = expected
    for _ in range(_ROUNDS):
        made, seen = _round(lambda *tile: run(*tile, theirs, statistics), x, cut, spans)  # noqa: B023
        correction = _difference(seen, expected)
        expected = run(sketch, even[0], even[1], own, correction)[1]
        before, statistics = statistics, _corrected(expected, correction)
        if _distance(before, statistics) < _SETTLED:
            break
    return made


def _round(
    run: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    grid: Grid,
    spans: list[list[_Span]],
) -> tuple[Tensor, Tensor]:
    """All tiles once: what they make, and the statistics over all their cores."""
    total: Tensor | None = None
    means = squares = torch.zeros(())
    unit = grid.unit
    latents = [n // unit for n in x.shape[-2:]]
    for down in spans[0]:
        for across in spans[1]:
            top, left = down.start * unit, across.start * unit
            part = x[:, :, top : top + grid.tile[0], left : left + grid.tile[1]]
            rows, columns = _weights(down, grid.tile[0] // unit), _weights(across, grid.tile[1] // unit)
            made, seen = run(part, rows, columns)
            scale = made.shape[-1] * unit // part.shape[-1]
            if total is None:
                total = made.new_empty(1, made.shape[1], *(scale * n for n in latents))
            total[:, :, _core(down, scale), _core(across, scale)] = made[
                :, :, _inside(down, scale), _inside(across, scale)
            ]
            share = (down.high - down.low) * (across.high - across.low) / (latents[0] * latents[1])
            mean, variance = seen.double().unbind(1)
            means, squares = means + share * mean, squares + share * (variance + mean.square())
    assert total is not None, "a picture has a tile at least"
    return total, torch.stack((means, squares - means.square()), 1).float()


def _spans(length: int, tile: int, margin: int) -> list[_Span]:
    """The tiles along a side of so many latents; cores meet in the middle of overlaps."""
    margin = min(margin, tile // 4)  # of a tile that is small, half is used
    found = starts(length, tile, overlap=2 * margin)
    meets = [0, *((a + tile + b) // 2 for a, b in pairwise(found)), length]
    return [_Span(start, *ends) for start, ends in zip(found, pairwise(meets), strict=True)]


def _weights(span: _Span, tile: int) -> Tensor:
    """What each of a tile's latents along a side counts for: those of its core, and evenly."""
    found = torch.zeros(tile)
    found[_inside(span, 1)] = 1 / (span.high - span.low)
    return found


def _core(span: _Span, scale: int) -> slice:
    return slice(span.low * scale, span.high * scale)


def _inside(span: _Span, scale: int) -> slice:
    return slice((span.low - span.start) * scale, (span.high - span.start) * scale)


def _sketched(x: Tensor, grid: Grid) -> Tensor:
    """A tile of blocks from all over the picture, in their order."""
    for axis, side in zip((-2, -1), grid.tile, strict=True):
        latents, length = side // grid.unit, x.shape[axis] // grid.unit
        count = min(_BLOCKS, latents)
        ends = [i * latents // count for i in range(count + 1)]
        moved = [i * (length - latents) // max(1, count - 1) for i in range(count)]
        places = [
            torch.arange((low + by) * grid.unit, (high + by) * grid.unit)
            for (low, high), by in zip(pairwise(ends), moved, strict=True)
        ]
        x = x.index_select(axis, torch.cat(places))
    return x


def _difference(seen: Tensor, expected: Tensor) -> Tensor:
    """By how much one's means are larger, and how many times its variances."""
    (mean, variance), (other, least) = seen.unbind(1), expected.unbind(1)
    return torch.stack((mean - other, variance.clamp_min(_LEAST) / least.clamp_min(_LEAST)), 1)


def _corrected(expected: Tensor, correction: Tensor) -> Tensor:
    (mean, variance), (added, factor) = expected.unbind(1), correction.unbind(1)
    return torch.stack((mean + added, variance * factor), 1)


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, in standard deviations."""
    (mean, variance), (second, spread) = one.unbind(1), other.unbind(1)
    deviation, other_deviation = (v.clamp_min(_LEAST).sqrt() for v in (variance, spread))
    apart = torch.maximum((mean - second).abs(), (deviation - other_deviation).abs())
    return float((apart / other_deviation).max())
