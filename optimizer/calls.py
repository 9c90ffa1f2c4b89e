"""Recorded calls of a component: its wrapper's inputs and fp32 outputs, as plain arrays.

Read without torch, so that an engine is checked in a process that holds the engine alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from runners.signature import Dim, Signature

__all__ = [
    "Call",
    "load_calls",
    "resized",
    "save_calls",
    "smallest_sizes",
    "traced_sizes",
    "unseen_sizes",
]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Call:
    """One call: inputs and outputs in the signature's order."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]

    def feeds(self, signature: Signature) -> dict[str, Array]:
        """The inputs by name, as an engine takes them."""
        return {s.name: array for s, array in zip(signature.inputs, self.inputs, strict=True)}


def save_calls(calls: Mapping[str, Call], path: Path) -> None:
    """Write calls as tensors "NAME/i/K" and "NAME/o/K"."""
    tensors = {
        f"{name}/{kind}/{k}": np.ascontiguousarray(array)
        for name, call in calls.items()
        for kind, arrays in (("i", call.inputs), ("o", call.outputs))
        for k, array in enumerate(arrays)
    }
    safetensors.numpy.save_file(tensors, path)


def load_calls(path: Path) -> dict[str, Call]:
    """The inverse of `save_calls`, in the order of the names."""
    groups: dict[str, dict[tuple[str, int], Array]] = {}
    for key, array in safetensors.numpy.load_file(path).items():
        name, kind, position = key.split("/")
        groups.setdefault(name, {})[kind, int(position)] = array
    return {name: _call(group) for name, group in sorted(groups.items())}


def _call(group: dict[tuple[str, int], Array]) -> Call:
    ordered = [(kind, group[kind, k]) for kind, k in sorted(group)]
    return Call(
        tuple(array for kind, array in ordered if kind == "i"),
        tuple(array for kind, array in ordered if kind == "o"),
    )


def resized(inputs: Sequence[Array], signature: Signature, sizes: Mapping[str, int]) -> list[Array]:
    """The inputs tiled or cut to other sizes of the signature's dims: statistics stay real."""
    found = []
    for spec, array in zip(signature.inputs, inputs, strict=True):
        for axis, name in enumerate(spec.axes):
            if isinstance(name, str):
                index = np.arange(sizes[name]) % array.shape[axis]
                array = np.take(array, index, axis=axis)
        found.append(np.ascontiguousarray(array))
    return found


def traced_sizes(signature: Signature) -> dict[str, int]:
    """Sizes to trace an export with: primes times the step, so no size is special in the graph.

    Sides that the model's downsampling divides would be traced as if all did (FACTS.md, UNets).
    """
    primes = {"height": 17, "width": 23, "sequence": 37}
    sizes = {
        dim.name: dim.min if dim.fixed else primes.get(dim.name, 3) * dim.multiple_of
        for dim in signature.dims
    }
    return _following(signature, sizes)


def unseen_sizes(signature: Signature) -> dict[str, dict[str, int]]:
    """Two legal sizes, neither traced nor native: a wide single one and three tall ones."""
    factors = (
        {"batch": 1.0, "height": 0.75, "width": 1.25, "sequence": 1.4, "tokens": 0.5},
        {"batch": 3.0, "height": 1.5, "width": 0.5, "sequence": 0.7, "tokens": 2.0},
    )
    found = {}
    for factor in factors:
        sizes = {dim.name: _scaled(dim, factor.get(dim.name, 1.0)) for dim in signature.dims}
        free = [str(sizes[dim.name]) for dim in signature.dims if dim.of is None]
        found["x".join(free)] = _following(signature, sizes)
    return found


def smallest_sizes(signature: Signature) -> dict[str, int]:
    """The least legal value of every dim: what a self-test in a bundle is recorded at."""
    return _following(signature, {dim.name: dim.nearest(dim.min) for dim in signature.dims})


def _following(signature: Signature, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes, where dims that follow from others have what follows."""
    return {dim.name: dim.following(sizes) for dim in signature.dims}


def _scaled(dim: Dim, factor: float) -> int:
    wanted = factor if dim.name == "batch" else dim.opt * factor
    return dim.nearest(round(wanted))
