"""A picture or its latents through a VAE's half in tiles of one size, blended where they overlap.

An engine sees one tile of one picture at a time, so what it takes doesn't grow with the picture.
Tiles are spread evenly, and overlap by a quarter or more. Near its edge a tile doesn't know what
lies beyond: there it counts for nothing, further in for more and more.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

__all__ = ["in_tiles", "starts"]

_OVERLAP = 0.25
"""Of a tile's side, at least; diffusers' AutoencoderKL has the same."""
_IGNORED = 0.25
"""Of the overlap, at a tile's edge."""


def starts(length: int, tile: int, *, unit: int = 1, overlap: int | None = None) -> list[int]:
    """Where tiles begin on a side of so many places, spread evenly, at multiples of `unit`.

    They overlap by `overlap` places at least, a quarter of a tile by default.
    """
    if length <= tile:
        return [0]
    kept = int(tile * (1 - _OVERLAP)) if overlap is None else tile - overlap
    step = max(unit, kept // unit * unit)
    count = -(-(length - tile) // step)
    return [i * (length - tile) // (count * unit) * unit for i in range(count + 1)]


def in_tiles(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: tuple[int, int], *, unit: int = 1
) -> Tensor:
    """`function` of [batch, channels, height, width], from its values for tiles of that size.

    `tile` is height and width; `unit` is how many places of `x` become one of the result, 1 where
    one place becomes one or more.
    """
    sides = [min(*pair) for pair in zip(tile, x.shape[-2:], strict=True)]
    rows, columns = (
        starts(length, side, unit=unit) for length, side in zip(x.shape[-2:], sides, strict=True)
    )
    total: Tensor | None = None
    weight = torch.zeros(())
    for picture, top, left in product(range(len(x)), rows, columns):
        given = x[picture : picture + 1, :, top : top + sides[0], left : left + sides[1]]
        made = function(given)
        up, down = made.shape[-1], given.shape[-1]  # both axes are scaled by the same factor
        if total is None:
            height, width = (length * up // down for length in x.shape[-2:])
            total = made.new_zeros(len(x), made.shape[1], height, width)
            weight = made.new_zeros(len(x), 1, height, width)
        share = torch.outer(
            _share(sides[0], rows, top, up / down),
            _share(sides[1], columns, left, up / down),
        ).to(made)
        y, x0 = top * up // down, left * up // down
        place = (
            slice(picture, picture + 1),
            slice(None),
            slice(y, y + made.shape[-2]),
            slice(x0, x0 + made.shape[-1]),
        )
        total[place] += made * share
        weight[place] += share
    assert total is not None, "a picture has a tile at least"
    return total.div_(weight)


def _share(tile: int, all_starts: list[int], start: int, factor: float) -> Tensor:
    """What a tile counts for along one side, place by place of the result.

    Whole where no other tile reaches; across an overlap it rises from nothing to whole, and what it
    falls by is what its neighbour rises by.
    """
    index = all_starts.index(start)
    places = torch.arange(round(tile * factor), dtype=torch.float32) + 0.5
    share = torch.ones_like(places)
    if index > 0:
        share *= _ramp(places, (all_starts[index - 1] + tile - start) * factor)
    if index + 1 < len(all_starts):
        share *= _ramp(places.flip(0), (start + tile - all_starts[index + 1]) * factor)
    return share


def _ramp(places: Tensor, overlap: float) -> Tensor:
    """From 0 to 1 across an overlap, its first and last part left out."""
    ignored = _IGNORED * overlap
    return ((places - ignored) / (overlap - 2 * ignored)).clamp(0, 1)
