"""torch's ahead-of-time compiled packages on a processor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from profiles.errors import BundleError
from runners.engines.aoti_package import Package, require_platform, scan_package
from runners.engines.base import Array, Engine, Properties
from runners.lora_inputs import lora_inputs, lora_targets
from runners.merging import Factors, Merging
from runners.signature import Signature
from runners.stored_tensors import read_tensors

__all__ = ["AotiEngine", "load_constants", "opened_package"]


@final
class AotiEngine(Engine):
    """files: `package`; where the weights are beside it, `weights` and `constants` (safetensors)
    and `table` (JSON: the package's name of a weight -> file, name, type and shape).

    Properties: `torch`, `isa`, `frozen` (the weights are inside), `low_bit_kernels`. With a file
    `lora` (the eager engine's) the package is the plain one: low-rank inputs are added to its
    weights, all of floats, when they are held.
    Raises DeviceMismatch where torch or the processor isn't what the package was built for.
    """

    def _open(self) -> None:
        torch.set_num_threads(self.threads)
        self._package = opened_package(self.files["package"], self.properties)
        if self.properties["frozen"]:
            self._package.hold_own()
        else:
            load_constants(self._package, self.files, device="cpu")
        self._merging: _MergedConstants | None = None
        if "lora" in self.files:
            self._merging = _MergedConstants(self._package, self.files, self.signature)
        merged = self._merging.inputs if self._merging else frozenset()
        self._names = [s.name for s in self.signature.inputs if s.name not in merged]
        """What the package is called with, in order."""
        self._ready: dict[str, Tensor] = {}

    def _hold(self, feeds: Mapping[str, Array]) -> None:
        if self._merging is not None:
            self._merging.hold(feeds)
        self._ready = self._tensors(feeds)

    @torch.inference_mode()
    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        if self._merging is not None and not self._merging.inputs <= self.held.keys():
            self._merging.hold(feeds)
        given = {name: array for name, array in feeds.items() if name not in self._ready}
        inputs = {**self._ready, **self._tensors(given)}
        outputs = self._package(*(inputs[name] for name in self._names))
        specs = self.signature.outputs
        return {spec.name: found.numpy() for spec, found in zip(specs, outputs, strict=True)}

    def _tensors(self, feeds: Mapping[str, Array]) -> dict[str, Tensor]:
        """As the package takes them, but for those that it doesn't take."""
        return {name: torch.from_numpy(feeds[name]) for name in self._names if name in feeds}

    def _close(self) -> None:
        del self._package, self._merging


class _MergedConstants:
    """A package's weights, to which low-rank inputs are added."""

    def __init__(self, package: Package, files: Mapping[str, Any], signature: Signature) -> None:
        """Take a package that has its weights."""
        targets = lora_targets(signature)
        self.inputs = frozenset(spec.name for spec in lora_inputs(targets))
        stored = read_tensors(files["weights"])
        self._package = package
        self._merging = Merging(targets, stored, Factors(files["lora"]))
        self._names = {layer: _constant_of(layer, package.constants) for layer in targets}

    @torch.no_grad()
    def hold(self, feeds: Mapping[str, Array]) -> None:
        """Let the package read weights to which these are added, until this is called again."""
        changed = {}
        for layer, weight in self._merging.changes(feeds):
            name = self._names[layer]
            changed[name] = weight.to(self._package.constants[name].dtype)
        self._package.change(changed)


def _constant_of(layer: str, constants: Mapping[str, Tensor]) -> str:
    """The package's name of a layer's weight: that of the layer behind those of what wraps it."""
    ends = [name for name in constants if f".{name}".endswith(f".{layer}.weight")]
    if not ends:
        raise BundleError(f"The package has no weight of {layer}: compile the bundle again.")
    return min(ends, key=len)


def opened_package(raw: Any, properties: Properties, *, single_threaded: bool = False) -> Package:
    """The package, scanned and found to be for this machine before it is loaded."""
    require_platform(properties, scan_package(raw))
    return Package(raw, single_threaded=single_threaded)


def load_constants(package: Package, files: Mapping[str, Any], *, device: str) -> None:
    """Give a package the weights that lie beside it."""
    try:
        table = json.loads(bytes(files["table"]))
        stores = {role: read_tensors(files[role]) for role in ("weights", "constants")}
        constants = {name: stores[entry[0]][entry[1]].to(device) for name, entry in table.items()}
        facts = {name: entry[2:] for name, entry in table.items()}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BundleError(f"The engine's table of weights is wrong: {error}.") from error
    package.give(constants, facts)
