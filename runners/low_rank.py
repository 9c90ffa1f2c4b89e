"""Low-rank parts of a torch component's layers, taken from the engine's inputs.

Beside a low-bit weight they are products of their own; a weight of floats they are added to, once,
so that a step costs what it does without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial, reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runners.engines.base import Array, Buffer
from runners.lora_inputs import DOWN, UP, lora_inputs, lora_targets
from runners.merging import Factors, Merging, float_layers
from runners.signature import Signature

__all__ = ["LowRank"]

_ENDS = (DOWN, UP)


class LowRank:
    """Adds x @ A @ B to the outputs of the layers that a signature has A and B for."""

    def __init__(
        self,
        root: nn.Module,
        signature: Signature,
        factors: Buffer | None,
        stored: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Watch the layers; `factors` holds what quantizing multiplied their ends with.

        `stored` are the weights that the component was loaded from: layers with one of floats have
        A @ B added to it instead (`hold`). None: all layers are watched.
        """
        targets = lora_targets(signature)
        self._signature = signature
        self._inputs = {spec.name for spec in lora_inputs(targets)}
        self._factors = Factors(factors)
        floats = float_layers(targets, stored or {})
        self._merging = Merging(floats, stored or {}, self._factors)
        self._merged = {name: root.get_submodule(name) for name in floats}
        self._targets = {name: one for name, one in targets.items() if name not in floats}
        self._matrices: dict[str, tuple[Tensor, Tensor]] = {}
        self._layers = {root.get_submodule(name): name for name in self._targets}
        for layer, name in self._layers.items():
            layer.register_forward_hook(partial(self._added, name))

    def to(self, device: str) -> None:
        """Let it work there."""
        self._factors.to(device)

    @torch.no_grad()
    def hold(self, feeds: Mapping[str, Array], dtype: torch.dtype) -> None:
        """Take the low-rank inputs for all calls until this is called again: weights of floats are
        changed by them, others have them beside, in `dtype`.
        """
        for name, weight in self._merging.changes(feeds):
            self._merged[name].get_parameter("weight").copy_(weight)
        beside = {f"{name}{end}": feeds[f"{name}{end}"] for name in self._targets for end in _ENDS}
        cast = {name: torch.from_numpy(array).to(dtype) for name, array in beside.items()}
        self.take(cast, ())

    def held_in(self, held: Mapping[str, Any]) -> bool:
        """Whether all low-rank inputs are among what an engine holds."""
        return self._inputs <= held.keys()

    def take(self, feeds: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
        """Keep the low-rank inputs beside weights until this is called again; the names of those
        that aren't low-rank.
        """
        for name in self._targets:
            down, up = (feeds[f"{name}{end}"] for end in _ENDS)
            self._matrices[name] = self._factors.scaled(name, down, up)
        return [name for name in names if name not in self._inputs]

    def others(self, feeds: Mapping[str, Array], dtype: torch.dtype) -> list[Tensor]:
        """The inputs that aren't low-rank, in the signature's order, floats in `dtype`."""
        names = (spec.name for spec in self._signature.inputs if spec.name not in self._inputs)
        tensors = (torch.from_numpy(feeds[name]) for name in names)
        return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]

    def layers_in(self, block: nn.Module) -> dict[str, str]:
        """The watched layers below `block`: their names in it, and in all."""
        layers = block.named_modules()
        return {name: self._layers[layer] for name, layer in layers if layer in self._layers}

    def matrices(self, layers: Iterable[str]) -> list[Tensor]:
        """A and B of each of these layers in this call."""
        return [matrix for name in layers for matrix in self._matrices[name]]

    def give(self, layers: Iterable[str], matrices: Sequence[Tensor]) -> None:
        """Let `matrices(layers)` be these from now on."""
        pairs = zip(matrices[::2], matrices[1::2], strict=True)
        self._matrices.update(zip(layers, pairs, strict=True))

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
            thin = _convolved(x, down, _geometry(layer), output.shape[-2:])
            return output + (thin @ up).permute(0, 3, 1, 2)
        thin = F.conv2d(x, down.transpose(0, 1), **_geometry(layer))
        return output + torch.einsum("brhw,ro->bohw", thin, up)


def _convolved(
    x: Tensor, down: Tensor, geometry: Mapping[str, Sequence[int]], sides: Sequence[int]
) -> Tensor:
    """[batch, height, width, rank]: the convolution of x with A, whose sides are `sides`.

    Without a kernel of dynamic size: the products of all places first, which are then moved by
    their places and summed. Channels are last, as in packages, where no copy is needed then.
    """
    (dy, dx), (sy, sx), (py, px) = (geometry[n] for n in ("dilation", "stride", "padding"))
    height, width = (sy * (sides[0] - 1) + 1, sx * (sides[1] - 1) + 1)
    rows = [slice(start, start + height, sy) for start in range(0, dy * down.shape[2], dy)]
    columns = [slice(start, start + width, sx) for start in range(0, dx * down.shape[3], dx)]
    products = x.permute(0, 2, 3, 1) @ down.permute(0, 2, 3, 1).flatten(1)
    products = F.pad(products, (0, 0, px, px, py, py))
    products = torch.unflatten(products, -1, (len(rows) * len(columns), -1))
    places = enumerate(product(rows, columns))
    return reduce(torch.add, [products[:, *at, place] for place, at in places])


def _geometry(layer: nn.Module) -> dict[str, Any]:
    own = getattr(layer, "convolution", None)
    if own is not None:
        return {name: value for name, value in own.items() if name != "groups"}
    return {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
