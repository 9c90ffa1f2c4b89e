"""Low-rank parts beside a torch component's layers, taken from the engine's inputs at each call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runners.engines.base import Buffer
from runners.lora_inputs import lora_inputs, lora_targets
from runners.signature import Signature

__all__ = ["LowRank"]


class LowRank:
    """Adds (x @ A) @ B to the outputs of the layers that a signature has A and B for."""

    def __init__(self, root: nn.Module, signature: Signature, factors: Buffer | None) -> None:
        """Watch the layers; `factors` holds what quantizing multiplied their ends with."""
        self._targets = lora_targets(signature)
        self._names = {spec.name for spec in lora_inputs(self._targets)}
        self._given: Mapping[str, Tensor] = {}
        self._factors = {} if factors is None else safetensors.torch.load(bytes(factors))
        for name in self._targets:
            root.get_submodule(name).register_forward_hook(partial(self._added, name))

    def take(self, feeds: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
        """Keep the low-rank inputs for this call; the names of the others."""
        self._given = {name: feeds[name] for name in names if name in self._names}
        return [name for name in names if name not in self._names]

    def _added(
        self, name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        down, up = self._given[f"{name}.lora_A"], self._given[f"{name}.lora_B"]
        if not down.shape[1]:
            return output
        if (factor := self._factors.get(f"{name}.input")) is not None:
            down = down / factor.to(down.dtype).view(-1, *([1] * (down.dim() - 1)))
        if (factor := self._factors.get(f"{name}.output")) is not None:
            up = up * factor.to(up.dtype)
        x: Tensor = inputs[0]
        if not self._targets[name].kernel:
            return output + (x @ down) @ up
        thin = F.conv2d(x, down.transpose(0, 1), **_geometry(layer))
        return output + torch.einsum("brhw,ro->bohw", thin, up)


def _geometry(layer: nn.Module) -> dict[str, Any]:
    own = getattr(layer, "convolution", None)
    if own is not None:
        return {name: value for name, value in own.items() if name != "groups"}
    return {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
