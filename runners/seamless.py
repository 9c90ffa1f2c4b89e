"""A VAE's half over tiles that fit together: as over the whole picture, but for what is measured.

Tiles overlap by a margin beyond which convolutions hardly reach, and only their cores are used. All
norms use the statistics of the whole picture, which nobody knows at first: those of norm k depend
on those before it. They are found by a sketch, a tile put together from blocks of the picture: its
own statistics are a guess; all tiles run with the guess say by how much the sketch is wrong; run
again, and corrected by that at each norm, it gives the next guess. That takes three rounds, the
first of them without margins, where feeding back what the tiles saw takes ten.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from runners.tiling import starts

__all__ = ["ROUNDS", "Grid", "in_seamless_tiles", "margin_of"]

Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A tile's part, as runners.vae_parts has it: part, rows, columns, own, given -> made, seen."""

_SETTLED = 0.005
"""Of a standard deviation, how far off statistics may be: below 0.2/255 of a picture on average."""
ROUNDS = 6
"""At most: latents of pure noise, which are far from any picture's, took four."""
_BLOCKS = 4
"""Of the sketch, along a side."""
_REACH = 0.6
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
    """Latents around a tile's core, by an AutoencoderKL's config: 0.6 of how far convolutions of
    that part reach. What lies further away hardly counts (on the reference model's VAE 0.6/255 at
    most beyond the half, 0.02/255 beyond three quarters); a tile's quarter is the most that is
    taken.
    """
    levels: int = len(config["block_out_channels"])
    layers = int(config["layers_per_block"])
    if encodes:  # from pixels to latents: one more convolution at the beginning and after a level
        reach = sum((2 * layers + 1) / 2.0 ** (levels - 1 - level) for level in range(levels))
    else:
        reach = sum((2 * layers + 3) / 2.0**level for level in range(levels))
    return math.ceil(_REACH * reach)


def in_seamless_tiles(run: Run, x: Tensor, grid: Grid, norms: tuple[int, ...]) -> Tensor:
    """What `run` makes of one picture, [1, channels, height, width], in tiles.

    `norms`: the shape of the statistics, [norms, 2, groups].
    """
    sides = [min(*pair) for pair in zip(grid.tile, x.shape[-2:], strict=True)]
    cut = Grid((sides[0], sides[1]), grid.unit, grid.margin)
    rough, spans = (_grid(x, cut, margin=margin) for margin in (0, grid.margin))
    sketch = _sketched(x, cut)
    correction = torch.stack((torch.zeros(norms[0], norms[2]), torch.ones(norms[0], norms[2])), 1)
    statistics = expected = _sketch_saw(run, sketch, cut, correction)
    for wanted in (rough, *[spans] * ROUNDS):
        made, seen = _round(run, x, cut, wanted, statistics)
        correction = _difference(seen, expected)
        expected = _sketch_saw(run, sketch, cut, correction)
        before, statistics = statistics, _corrected(expected, correction)
        if wanted is spans and _distance(before, statistics) < _SETTLED:
            break
    return made


def _sketch_saw(run: Run, sketch: Tensor, grid: Grid, correction: Tensor) -> Tensor:
    """The sketch's own statistics, where each norm works with them as corrected."""
    rows, columns = (torch.ones(side // grid.unit) for side in grid.tile)
    return run(sketch, rows, columns, torch.ones(1), correction)[1]


def _grid(x: Tensor, grid: Grid, *, margin: int) -> list[list[_Span]]:
    """The tiles along both sides."""
    sides = zip(x.shape[-2:], grid.tile, strict=True)
    return [_spans(n // grid.unit, tile // grid.unit, margin) for n, tile in sides]


def _round(
    run: Run, x: Tensor, grid: Grid, spans: list[list[_Span]], statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """All tiles once with given statistics: what they make, and what all their cores saw."""
    total: Tensor | None = None
    means = squares = torch.zeros(())
    unit = grid.unit
    latents = [n // unit for n in x.shape[-2:]]
    theirs = torch.zeros(1)
    for down, across in product(*spans):
        top, left = down.start * unit, across.start * unit
        part = x[:, :, top : top + grid.tile[0], left : left + grid.tile[1]]
        rows, columns = (
            _weights(span, side // unit)
            for span, side in zip((down, across), grid.tile, strict=True)
        )
        made, seen = run(part, rows, columns, theirs, statistics)
        scale = made.shape[-1] * unit // part.shape[-1]
        if total is None:
            total = made.new_empty(1, made.shape[1], *(scale * n for n in latents))
        core = made[:, :, _inside(down, scale), _inside(across, scale)]
        total[:, :, _core(down, scale), _core(across, scale)] = core
        share = (down.high - down.low) * (across.high - across.low) / math.prod(latents)
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
    """Which of a tile's latents along a side are its core's."""
    found = torch.zeros(tile)
    found[_inside(span, 1)] = 1
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
