"""A part of a VAE's half over tiles that fit together: as over the whole picture, but for what is
measured.

Tiles overlap by a margin beyond which convolutions hardly reach, and only their cores are used. All
norms use the statistics of the whole picture, which nobody knows at first: those of norm k depend
on those before it. They are found by a sketch, a tile put together from blocks of the picture: its
own statistics are a guess; all tiles run with the guess say by how much the sketch is wrong; run
again, and corrected by that at each norm, it gives the next guess. That takes three rounds, the
first of them without margins, where feeding back what the tiles saw takes ten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, Protocol

import torch
from torch import Tensor

from runners.spilled import Spilled
from runners.tiling import starts

__all__ = [
    "ROUNDS",
    "Grid",
    "Held",
    "Made",
    "Picture",
    "Result",
    "Stored",
    "in_seamless_tiles",
    "margins_of",
]

Tensors = tuple[Tensor, ...]
Run = Callable[[Tensors, Tensor, Tensor, Tensor, Tensor], tuple[Tensors, Tensor]]
"""A tile's part, as runners.vae_parts has it: part, rows, columns, own, given -> made, seen."""

_SETTLED = 0.005
"""Of a standard deviation, how far off statistics may be: below 0.2/255 of a picture on average."""
ROUNDS = 6
"""At most: latents of pure noise, which are far from any picture's, took four."""
_BLOCKS = 4
"""Of the sketch, along a side."""
_REACH = 0.6
_RESIDUAL = 2
"""Latents that one of the middle block's two residual blocks reaches."""
_MIDDLE = _RESIDUAL + 1
"""And with the convolution at its side of the half."""
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

    @property
    def core(self) -> int:
        """How long its core is."""
        return self.high - self.low


@dataclass(frozen=True)
class _Tile:
    """One tile: what it is along both sides."""

    down: _Span
    across: _Span


class Picture(Protocol):
    """What is cut."""

    def side(self, axis: int) -> int:
        """Places along its height (0) or width (1)."""

    def read(self, top: int, left: int, rows: int, columns: int) -> Tensors:
        """What is there, each [1, channels, rows, columns]."""


class Result(Protocol):
    """Where the tiles' cores are put together."""

    def write(self, made: Tensors, tile: _Tile) -> None:
        """Put what was made of the tile, each [1, channels, rows, columns], without its margins."""


class Held:
    """A picture, or latents, in memory."""

    def __init__(self, x: Tensor) -> None:
        """Take [1, channels, height, width]."""
        self._x = x

    def side(self, axis: int) -> int:
        """As Picture has it."""
        return self._x.shape[2 + axis]

    def read(self, top: int, left: int, rows: int, columns: int) -> Tensors:
        """As Picture has it."""
        return (self._x[:, :, top : top + rows, left : left + columns],)


class Stored:
    """Maps of one size in files, a place a latent: to be cut, and to be put together."""

    def __init__(self, *maps: Spilled) -> None:
        """Take them in the order in which they are read and made."""
        self._maps = maps

    def side(self, axis: int) -> int:
        """As Picture has it."""
        return (self._maps[0].height, self._maps[0].width)[axis]

    def read(self, top: int, left: int, rows: int, columns: int) -> Tensors:
        """As Picture has it."""
        return tuple(one.read(top, left, rows, columns)[None] for one in self._maps)

    def write(self, made: Tensors, tile: _Tile) -> None:
        """As Result has it."""
        rows, columns = (_inside(span, 1) for span in (tile.down, tile.across))
        for one, tensor in zip(self._maps, made, strict=True):
            one.write(tile.down.low, tile.across.low, tensor[0, :, rows, columns])


class Made:
    """What is put together in memory, with `scale` places a latent along a side."""

    def __init__(self, latents: tuple[int, int], scale: int) -> None:
        """Wait for the first tile."""
        self._sides, self._scale = tuple(scale * n for n in latents), scale
        self._x: Tensor | None = None

    def write(self, made: Tensors, tile: _Tile) -> None:
        """As Result has it."""
        (tensor,) = made
        if self._x is None:
            self._x = tensor.new_empty(1, tensor.shape[1], *self._sides)
        core, inside = (
            [which(span, self._scale) for span in (tile.down, tile.across)]
            for which in (_core, _inside)
        )
        self._x[:, :, core[0], core[1]] = tensor[:, :, inside[0], inside[1]]

    @property
    def tensor(self) -> Tensor:
        """[1, channels, height, width]."""
        assert self._x is not None, "a picture has a tile at least"
        return self._x


def margins_of(config: Any, *, encodes: bool) -> tuple[int, int]:
    """Latents around a tile's core, before and after the attention, by an AutoencoderKL's config.

    Of a part that is all in the middle block, how far its convolutions reach; of the other one, 0.6
    of that. What lies further away hardly counts (on the reference model's VAE 0.6/255 at most
    beyond the half, 0.02/255 beyond three quarters); a tile's third is the most that is taken.
    """
    levels: int = len(config["block_out_channels"])
    layers = int(config["layers_per_block"])
    if encodes:  # from pixels to latents: one more convolution at the beginning and after a level
        reach = sum((2 * layers + 1) / 2.0 ** (levels - 1 - level) for level in range(levels))
    else:
        reach = sum((2 * layers + 3) / 2.0**level for level in range(levels))
    blocks = math.ceil(_REACH * (reach + _RESIDUAL))
    return (blocks, _MIDDLE) if encodes else (_MIDDLE, blocks)


def in_seamless_tiles(
    run: Run, picture: Picture, grid: Grid, norms: tuple[int, ...], result: Result
) -> None:
    """Put what `run` makes of a picture into `result`, tile by tile.

    `norms`: the shape of the statistics, [norms, 2, groups].
    """
    sides = [min(tile, picture.side(axis)) for axis, tile in enumerate(grid.tile)]
    cut = Grid((sides[0], sides[1]), grid.unit, grid.margin)
    rough, tiles = (_tiles(picture, cut, margin=margin) for margin in (0, grid.margin))
    sketch = _sketched(picture, cut)
    correction = torch.stack((torch.zeros(norms[0], norms[2]), torch.ones(norms[0], norms[2])), 1)
    statistics = expected = _sketch_saw(run, sketch, cut, correction)
    for wanted in (rough, *[tiles] * ROUNDS):
        seen = _round(run, picture, cut, wanted, statistics, result)
        correction = _difference(seen, expected)
        expected = _sketch_saw(run, sketch, cut, correction)
        before, statistics = statistics, _corrected(expected, correction)
        if wanted is tiles and _distance(before, statistics) < _SETTLED:
            break


def _sketch_saw(run: Run, sketch: Tensors, grid: Grid, correction: Tensor) -> Tensor:
    """The sketch's own statistics, where each norm works with them as corrected."""
    rows, columns = (torch.ones(side // grid.unit) for side in grid.tile)
    return run(sketch, rows, columns, torch.ones(1), correction)[1]


def _tiles(picture: Picture, grid: Grid, *, margin: int) -> list[_Tile]:
    """All of them, row by row."""
    spans = (
        _spans(picture.side(axis) // grid.unit, tile // grid.unit, margin)
        for axis, tile in enumerate(grid.tile)
    )
    return [_Tile(*pair) for pair in product(*spans)]


def _round(
    run: Run, picture: Picture, grid: Grid, tiles: Sequence[_Tile], given: Tensor, result: Result
) -> Tensor:
    """All tiles once with given statistics: what all their cores saw."""
    means = squares = torch.zeros(())
    total = sum(tile.down.core * tile.across.core for tile in tiles)
    for tile in tiles:
        corner = (tile.down.start * grid.unit, tile.across.start * grid.unit)
        rows, columns = (
            _weights(span, side // grid.unit)
            for span, side in zip((tile.down, tile.across), grid.tile, strict=True)
        )
        made, seen = run(picture.read(*corner, *grid.tile), rows, columns, torch.zeros(1), given)
        result.write(made, tile)
        share = tile.down.core * tile.across.core / total
        mean, variance = seen.double().unbind(1)
        means, squares = means + share * mean, squares + share * (variance + mean.square())
    return torch.stack((means, squares - means.square()), 1).float()


def _spans(length: int, tile: int, margin: int) -> list[_Span]:
    """The tiles along a side of so many latents; cores meet in the middle of overlaps."""
    margin = min(margin, tile // 3)  # of a tile that is small, a third is used
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


def _sketched(picture: Picture, grid: Grid) -> Tensors:
    """A tile of blocks from all over the picture, in their order."""
    rows, columns = (_blocks(picture.side(axis), grid, axis) for axis in (0, 1))
    lines = [
        [picture.read(top, left, height, width) for left, width in columns] for top, height in rows
    ]
    bands = ([torch.cat(each, -1) for each in zip(*line, strict=True)] for line in lines)
    return tuple(torch.cat(each, -2) for each in zip(*bands, strict=True))


def _blocks(side: int, grid: Grid, axis: int) -> list[tuple[int, int]]:
    """Where the sketch's blocks begin along a side, and how long they are, in places."""
    latents, length = grid.tile[axis] // grid.unit, side // grid.unit
    count = min(_BLOCKS, latents)
    ends = [i * latents // count for i in range(count + 1)]
    moved = [i * (length - latents) // max(1, count - 1) for i in range(count)]
    return [
        ((low + by) * grid.unit, (high - low) * grid.unit)
        for (low, high), by in zip(pairwise(ends), moved, strict=True)
    ]


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
