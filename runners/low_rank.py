"""Low-rank parts beside a torch component's layers, taken from the engine's inputs at each call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runners.engines.base import Buffer
from runners.lora_inputs import DOWN, UP, lora_inputs, lora_targets
from runners.signature import Signature

__all__ = ["LowRank"]


class LowRank:
    """Adds (x @ A) @ B to the outputs of the layers that a signature has A and B for."""

    def __init__(self, root: nn.Module, signature: Signature, factors: Buffer | None) -> None:
        """Watch the layers; `factors` holds what quantizing multiplied their ends with."""
        self._targets = lora_targets(signature)
        self._inputs = {spec.name for spec in lora_inputs(self._targets)}
        self._matrices: dict[str, tuple[Tensor, Tensor]] = {}
        self._factors = {} if factors is None else safetensors.torch.load(bytes(factors))
        self._layers = {root.get_submodule(name): name for name in self._targets}
        for layer, name in self._layers.items():
            layer.register_forward_hook(partial(self._added, name))

    def to(self, device: str) -> None:
        """Let it work there."""
        self._factors = {name: factor.to(device) for name, factor in self._factors.items()}

    def take(self, feeds: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
        """Keep the low-rank inputs for this call; the names of the others."""
        for name in self._targets:
            self._matrices[name] = self._scaled(name, feeds[f"{name}{DOWN}"], feeds[f"{name}{UP}"])
        return [name for name in names if name not in self._inputs]

    def layers_in(self, block: nn.Module) -> dict[str, str]:
        """The layers below `block`: their names in it, and in all."""
        layers = block.named_modules()
        return {name: self._layers[layer] for name, layer in layers if layer in self._layers}

    def matrices(self, layers: Iterable[str]) -> list[Tensor]:
        """A and B of each of these layers in this call."""
        return [matrix for name in layers for matrix in self._matrices[name]]

    def give(self, layers: Iterable[str], matrices: Sequence[Tensor]) -> None:
        """Let `matrices(layers)` be these from now on."""
        pairs = zip(matrices[::2], matrices[1::2], strict=True)
        self._matrices.update(zip(layers, pairs, strict=True))

    def _scaled(self, name: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """A and B for the layer as quantizing left it."""
        if (factor := self._factors.get(f"{name}.input")) is not None:
            down = down / factor.to(down.dtype).view(-1, *([1] * (down.dim() - 1)))
        if (factor := self._factors.get(f"{name}.output")) is not None:
            up = up * factor.to(up.dtype)
        return down, up

    def _added(
        self, name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        down, up = self._matrices[name]
        if not down.shape[1]:
            return output
        x: Tensor = inputs[0]
        if not self._targets[name].kernel:
            return output + (x @ down) @ up
        if torch.compiler.is_exporting():
            # inductor compiles convolutions for the traced number of filters alone (torch 2.13)
            patches = F.unfold(x, self._targets[name].kernel, **_geometry(layer))
            thin = down.transpose(0, 1).flatten(1) @ patches
            return output + (up.t() @ thin).view_as(output)
        thin = F.conv2d(x, down.transpose(0, 1), **_geometry(layer))
        return output + torch.einsum("brhw,ro->bohw", thin, up)


def _geometry(layer: nn.Module) -> dict[str, Any]:
    own = getattr(layer, "convolution", None)
    if own is not None:
        return {name: value for name, value in own.items() if name != "groups"}
    return {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
