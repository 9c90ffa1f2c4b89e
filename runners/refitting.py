"""LoRAs added to the weights that an engine's library can replace, under their names in its graph.

A linear's weight may be stored there as it is multiplied, [in, out], which its name says
(optimizer.export).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from profiles.errors import BundleError
from runners.engines.base import Buffer
from runners.lora_inputs import lora_inputs, lora_targets
from runners.merging import Factors, Merging
from runners.signature import Signature
from runners.stored_tensors import read_tensors

__all__ = ["TRANSPOSED", "Refitting", "weight_layer"]

TRANSPOSED = ".transposed"
"""How the name of a weight ends that is stored as [in, out]."""


def weight_layer(name: str) -> str | None:
    """The layer whose weight, or codes of it, are called so in a graph; None: something else is."""
    layer, _, leaf = name.removesuffix(TRANSPOSED).removeprefix("module.").rpartition(".")
    return layer if leaf in ("weight", "codes") else None


class Refitting:
    """What becomes of an engine's weights as LoRAs come and go."""

    def __init__(self, weights: Buffer, signature: Signature) -> None:
        """Take the weights (safetensors) by their names in the graph, one for each layer that the
        form's signature has low-rank inputs for; BundleError where one is missing.
        """
        targets = lora_targets(signature)
        self.inputs = frozenset(spec.name for spec in lora_inputs(targets))
        """What is added to weights; no input of the engine."""
        self.stored = read_tensors(weights)
        """The base's, as the engine has them."""
        self._names = {weight_layer(name): name for name in self.stored}
        if missing := sorted(targets.keys() - self._names.keys()):
            raise BundleError(
                f"The engine's weights have none of {missing[0]}: compile the bundle again."
            )
        self._merging = Merging(
            targets,
            {f"{layer}.weight": self._turned(self._names[layer]) for layer in targets},
            Factors(None),
        )

    def _turned(self, name: str) -> Tensor:
        stored = self.stored[name]
        return stored.T if name.endswith(TRANSPOSED) else stored

    def changes(self, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
        """Name -> weight as the graph has it, where it may be another than after the last call.

        On the device of the feeds where it is a sum, else as it is stored.
        """
        found = {}
        for layer, weight in self._merging.changes(feeds):
            name = self._names[layer]
            turned = weight.T if name.endswith(TRANSPOSED) else weight
            found[name] = turned.to(self.stored[name].dtype).contiguous()
        return found
