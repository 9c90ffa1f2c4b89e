"""torch's ahead-of-time compiled packages on an NVIDIA card, replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from profiles.errors import DeviceMismatch
from profiles.target import sm
from runners.engines.aoti import load_constants, opened_package
from runners.engines.base import DeviceEngine, Properties
from runners.engines.replaying import Replaying
from runners.lora_inputs import compiled_rank_tensors

__all__ = ["AotiCudaEngine", "card_capability"]


@final
class AotiCudaEngine(DeviceEngine):
    """files: `package`, and beside it `weights`, `constants` and `table`: see AotiEngine.

    Properties: `torch`, `isa` and `cuda`, `capabilities` (the card's), `low_bit_kernels`.
    Raises DeviceMismatch where torch, its CUDA or the card isn't what the package was built for.
    """

    @classmethod
    def usable_here(cls, properties: Properties) -> bool:
        """Whether the card here is of the very architecture that the kernels are for."""
        return torch.cuda.is_available() and card_capability() == str(properties["capabilities"])

    @classmethod
    def require_here(cls, properties: Properties) -> None:
        """Raise DeviceMismatch, with both values, for another CUDA or card."""
        wanted = str(properties["capabilities"])
        if not torch.cuda.is_available():
            raise DeviceMismatch(
                f"The engine was built for {sm(wanted)}, and no NVIDIA card is usable here: check "
                "the driver with nvidia-smi, or compile for the processor (--backend aoti)."
            )
        if str(properties["cuda"]) != str(torch.version.cuda):
            raise DeviceMismatch(
                f"The engine was built with CUDA {properties['cuda']}, and torch here has "
                f"{torch.version.cuda}: install that build of torch, or compile the bundle again."
            )
        if not cls.usable_here(properties):
            here = f"{sm(card_capability())} ({torch.cuda.get_device_name()})"
            raise DeviceMismatch(
                f"The engine was built for {sm(wanted)}, and the card here is {here}: compile the "
                "bundle again here."
            )

    def machine(self) -> str:
        """The card and torch's version."""
        name = torch.cuda.get_device_name()
        return f"{name} ({sm(card_capability())}, torch {torch.__version__})"

    def _open(self) -> None:
        self.require_here(self.properties)
        # a package's own locks and events can't be captured (torch's load_package says so)
        package = opened_package(self.files["package"], self.properties, single_threaded=True)
        load_constants(package, self.files, device="cuda")
        self._package, self._replaying = package, Replaying(package)

    def _run_tensors(self, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
        given = compiled_rank_tensors(feeds, self.signature)
        ordered = {spec.name: given[spec.name] for spec in self.signature.inputs}
        outputs = self._replaying(ordered)
        specs = self.signature.outputs
        return {spec.name: found for spec, found in zip(specs, outputs, strict=True)}

    def _close(self) -> None:
        self._replaying.forget()
        del self._package


def card_capability() -> str:
    """The compute capability of the card here, "9.0"."""
    return ".".join(str(number) for number in torch.cuda.get_device_capability())
