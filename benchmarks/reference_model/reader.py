"""A small classifier that reads a picture back into its scene, trained on drawn pictures only.

It never sees the diffusion model's output, so that it can judge it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.reference_model.captions import (
    BACKGROUND_KINDS,
    BACKGROUND_RGB,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    STRIPE_DIRECTIONS,
    Background,
    Scene,
    Thing,
)

PAINTS = (*BACKGROUND_RGB, "")
DIRECTIONS = (*STRIPE_DIRECTIONS, "")
THING_HEADS = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}
BACKGROUND_HEADS = {
    "kind": BACKGROUND_KINDS,
    "direction": DIRECTIONS,
    "first": PAINTS,
    "second": PAINTS,
}
_CELLS = len(POSITIONS)


class SceneReader(nn.Module):
    """Convolutions down to 8x8, then one head for the 3x3 cells and one for the background."""

    def __init__(self, width: int = 32) -> None:
        """Make an untrained classifier; `width` is the channel count of its first layer."""
        super().__init__()
        channels = (3, width, 2 * width, 2 * width, 3 * width, 3 * width)
        strides = (2, 2, 1, 2, 1)
        self.trunk = nn.Sequential(
            *(
                _convolution(before, after, stride)
                for before, after, stride in zip(channels, channels[1:], strides, strict=False)
            )
        )
        last = channels[-1]
        answers = 1 + sum(len(names) for names in THING_HEADS.values())
        self.cells = nn.Sequential(
            nn.Conv2d(2 * last, 4 * width, 1), nn.ReLU(), nn.Conv2d(4 * width, answers, 1)
        )
        self.background = nn.Sequential(
            nn.Linear(6 * last, 4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, sum(len(names) for names in BACKGROUND_HEADS.values())),
        )

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """[n, 3, 64, 64] in -1..1 -> logits of the cells [n, 9, 19], of the background [n, 31]."""
        seen = self.trunk(pictures)
        pools = [functional.adaptive_avg_pool2d(seen, 3), functional.adaptive_max_pool2d(seen, 3)]
        cells = self.cells(torch.cat(pools, dim=1)).flatten(2).transpose(1, 2)
        corners = functional.adaptive_avg_pool2d(seen, 2).flatten(1)
        spread = [seen.amax(dim=(2, 3)), seen.std(dim=(2, 3))]
        return cells, self.background(torch.cat([corners, *spread], dim=1))


def _convolution(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
    )


@dataclass(frozen=True)
class Reading:
    """What the classifier sees: any number of things, one background."""

    things: tuple[Thing, ...]
    background: Background


def answers_of(scenes: list[Scene]) -> Tensor:
    """Return the right answers: [n, 9 * 4 + 4] int64.

    Each cell has presence, shape, colour, size (0 in empty cells); then the background's answers.
    """
    table = torch.zeros(len(scenes), 4 * _CELLS + len(BACKGROUND_HEADS), dtype=torch.int64)
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            values = [1, *(names.index(getattr(thing, k)) for k, names in THING_HEADS.items())]
            table[row, 4 * thing.cell : 4 * thing.cell + 4] = torch.tensor(values)
        paints = [*scene.background.paints, ""]
        background = (scene.background.kind, scene.background.direction, paints[0], paints[1])
        names = BACKGROUND_HEADS.values()
        found = [options.index(a) for options, a in zip(names, background, strict=True)]
        table[row, 4 * _CELLS :] = torch.tensor(found)
    return table


def reading_loss(cells: Tensor, background: Tensor, answers: Tensor) -> Tensor:
    """Cross entropy of every answer; shape, colour and size only where a thing is."""
    wanted = answers[:, : 4 * _CELLS].reshape(-1, _CELLS, 4)
    present = wanted[..., 0].bool()
    loss = 4 * functional.binary_cross_entropy_with_logits(cells[..., 0], wanted[..., 0].float())
    parts = _parts(cells[present][:, 1:], THING_HEADS)
    for index, part in enumerate(parts, start=1):
        loss = loss + functional.cross_entropy(part, wanted[present][:, index])
    for index, part in enumerate(_parts(background, BACKGROUND_HEADS)):
        loss = loss + functional.cross_entropy(part, answers[:, 4 * _CELLS + index])
    return loss


def _parts(logits: Tensor, heads: dict[str, tuple[str, ...]]) -> list[Tensor]:
    """Cut the last axis into the heads' logits."""
    return list(torch.split(logits, [len(names) for names in heads.values()], dim=-1))


@torch.no_grad()
def read(model: SceneReader, pictures: Tensor) -> list[Reading]:
    """Read pictures [n, 3, 64, 64] in -1..1."""
    cells, background = model(pictures)
    parts = _parts(cells[..., 1:], THING_HEADS)
    named = torch.stack([part.argmax(dim=2) for part in parts], dim=2).tolist()
    present = (cells[..., 0] > 0).tolist()
    behind = torch.stack(
        [p.argmax(dim=1) for p in _parts(background, BACKGROUND_HEADS)], dim=1
    ).tolist()
    return [
        Reading(_things(present[row], named[row]), _background(behind[row]))
        for row in range(len(pictures))
    ]


def _things(present: list[bool], named: list[list[int]]) -> tuple[Thing, ...]:
    return tuple(
        Thing(SHAPES[shape], COLOURS[colour], SIZES[size], POSITIONS[cell])
        for cell, (shape, colour, size) in enumerate(named)
        if present[cell]
    )


def _background(answers: list[int]) -> Background:
    """Only the answers that the kind has are kept."""
    kind, direction = BACKGROUND_KINDS[answers[0]], DIRECTIONS[answers[1]]
    colours = tuple(PAINTS[a].removesuffix(" wood") for a in answers[2:] if PAINTS[a])
    return Background(kind, colours, direction)
