"""torch's ahead-of-time compiled packages on a processor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, final

import torch

from profiles.errors import BundleError
from runners.engines.aoti_package import Package, read_tensors, require_platform, scan_package
from runners.engines.base import Array, Engine, Properties
from runners.lora_inputs import compiled_ranks

__all__ = ["AotiEngine", "load_constants", "opened_package"]


@final
class AotiEngine(Engine):
    """files: `package`; where the weights are beside it, `weights` and `constants` (safetensors)
    and `table` (JSON: the package's name of a weight -> file, name, type and shape).

    Properties: `torch`, `isa`, `frozen` (the weights are inside), `low_bit_kernels`.
    Raises DeviceMismatch where torch or the processor isn't what the package was built for.
    """

    def _open(self) -> None:
        torch.set_num_threads(self.threads)
        self._package = opened_package(self.files["package"], self.properties)
        if self.properties["frozen"]:
            self._package.hold_own()
        else:
            load_constants(self._package, self.files, device="cpu")

    @torch.inference_mode()
    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        given = compiled_ranks(feeds, self.signature)
        inputs = [torch.from_numpy(given[spec.name]) for spec in self.signature.inputs]
        outputs = self._package(*inputs)
        specs = self.signature.outputs
        return {spec.name: found.numpy() for spec, found in zip(specs, outputs, strict=True)}

    def _close(self) -> None:
        del self._package


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
