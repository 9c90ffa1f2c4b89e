"""The low-rank inputs of an engine's "lora" form: names and shapes, and the layers they are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runners.signature import Dim, Signature, TensorSpec

__all__ = [
    "DOWN",
    "LEAST_COMPILED_RANK",
    "MOST_RANK",
    "UP",
    "Target",
    "compiled_rank_tensors",
    "convolution_layers",
    "lora_inputs",
    "lora_targets",
    "with_lora",
]

MOST_RANK = 4096
"""Of all LoRAs together; a layer's own width is the most that makes a difference."""

LEAST_COMPILED_RANK = 2
"""Of an input of code that is compiled for a card, where no axis is empty."""

_RANK = "rank"
DOWN = ".lora_A"
UP = ".lora_B"
"""What a layer's inputs are called after its name."""


@dataclass(frozen=True)
class Target:
    """A layer that takes low-rank parts."""

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    """Height and width of a convolution's kernel; empty: a linear."""


def lora_inputs(targets: Mapping[str, Target]) -> list[TensorSpec]:
    """Two a layer, in order: A [in, rank(, height, width)] and B [rank, out]."""
    found = []
    for name, target in targets.items():
        down = (target.inputs, _RANK, *target.kernel)
        found.append(TensorSpec(name=f"{name}{DOWN}", dtype="float32", axes=down))
        up = (_RANK, target.outputs)
        found.append(TensorSpec(name=f"{name}{UP}", dtype="float32", axes=up))
    return found


def with_lora(signature: Signature, targets: Mapping[str, Target]) -> Signature:
    """The signature, and the inputs of all targets; ranks are free."""
    rank = Dim(name=_RANK, min=0, opt=0, max=MOST_RANK, free=True)
    return Signature(
        inputs=(*signature.inputs, *lora_inputs(targets)),
        outputs=signature.outputs,
        dims=(*signature.dims, rank),
    )


def lora_targets(signature: Signature) -> dict[str, Target]:
    """The layers that an engine of this signature has low-rank inputs for."""
    axes = {spec.name: spec.axes for spec in signature.inputs}
    found = {}
    for name, down in axes.items():
        layer = name.removesuffix(DOWN)
        up = axes.get(f"{layer}{UP}")
        if layer != name and up is not None:
            kernel = tuple(side for side in down[2:] if isinstance(side, int))
            found[layer] = Target(int(down[0]), int(up[1]), kernel)
    return found


def convolution_layers(signature: Signature) -> frozenset[str]:
    """The layers with kernels of more than one place, and those of the same blocks.

    Their outputs are the largest, and most LoRAs leave them alone: adding nothing to them takes
    time, which engines spare that can.
    """
    targets = lora_targets(signature)
    blocks = {_block(name) for name, target in targets.items() if max(target.kernel, default=1) > 1}
    return frozenset(name for name in targets if _block(name) in blocks)


def _block(layer: str) -> str:
    return layer.rpartition(".")[0]


def compiled_rank_tensors(feeds: Mapping[str, Any], signature: Signature) -> dict[str, Any]:
    """The feeds, some or all; matrices of ranks below `LEAST_COMPILED_RANK` have zeros up to it."""
    from torch.nn.functional import pad

    short = {}
    for spec in signature.inputs:
        if _RANK in spec.axes and spec.name in feeds:
            axis = spec.axes.index(_RANK)
            if (missing := LEAST_COMPILED_RANK - feeds[spec.name].shape[axis]) > 0:
                behind = [0, 0] * (len(spec.axes) - axis - 1)  # pad counts from the last axis
                short[spec.name] = pad(feeds[spec.name], [*behind, 0, missing])
    return {**feeds, **short}
