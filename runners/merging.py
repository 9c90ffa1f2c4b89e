"""Low-rank inputs added to weights of floats: a step then costs what it does without them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import safetensors.torch
import torch
from torch import Tensor

from runners.engines.base import Array, Buffer
from runners.lora_inputs import DOWN, UP

__all__ = ["Factors", "Merging", "float_layers"]

_WEIGHT = ".weight"


class Factors:
    """What quantizing multiplied layers' inputs and outputs with."""

    def __init__(self, prepared: Buffer | None) -> None:
        """Read the prepared file; None: nothing was."""
        self._factors = {} if prepared is None else safetensors.torch.load(bytes(prepared))

    def to(self, device: str) -> None:
        """Let them be used there."""
        self._factors = {name: factor.to(device) for name, factor in self._factors.items()}

    def scaled(self, layer: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """A [in, rank, ...] and B [rank, out] for the layer as quantizing left it."""
        if (factor := self._factors.get(f"{layer}.input")) is not None:
            down = down / factor.to(down.dtype).view(-1, *([1] * (down.dim() - 1)))
        if (factor := self._factors.get(f"{layer}.output")) is not None:
            up = up * factor.to(up.dtype)
        return down, up


def float_layers(layers: Iterable[str], stored: Mapping[str, Tensor]) -> list[str]:
    """Those of the layers whose weights are stored as floats."""
    return [name for name in layers if f"{name}{_WEIGHT}" in stored]


class Merging:
    """What becomes of stored weights [out, in, ...] as LoRAs come and go: W + (A @ B).T."""

    def __init__(
        self, layers: Iterable[str], stored: Mapping[str, Tensor], factors: Factors
    ) -> None:
        """Take `float_layers`; no weight is changed yet."""
        self._weights = {name: stored[f"{name}{_WEIGHT}"] for name in layers}
        self._factors = factors
        self._changed: set[str] = set()

    def changes(self, feeds: Mapping[str, Array | Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Layer and weight, where it may be another than after the last call: the sum in float32,
        on the device of the feeds, or as it is stored.
        """
        for name, stored in self._weights.items():
            down, up = (torch.as_tensor(feeds[f"{name}{end}"]) for end in (DOWN, UP))
            if up.shape[0]:
                self._changed.add(name)
                down, up = self._factors.scaled(name, down, up)
                added = torch.einsum("ir...,ro->oi...", down, up)
                yield name, added.add_(stored.to(added.device))
            elif name in self._changed:
                self._changed.remove(name)
                yield name, stored
