"""LoRAs on a pipeline of engines: loaded, weighted, stacked and taken away between two pictures.

The methods that diffusers' users know are replaced on the pipeline itself: diffusers' own would
change a module's layers, and an engine's are compiled. What changes here is what engines are fed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from profiles.errors import SpecError, UnsupportedError
from runners.adapters import Adapter
from runners.engines import engine_class
from runners.engines.base import DeviceEngine
from runners.lora import Lora, RawLora, fitted, read_lora
from runners.lora_choices import LoraChoice
from runners.lora_inputs import MOST_RANK, lora_targets
from runners.signature import TensorSpec

__all__ = ["LoraAdapters", "offer_lora", "use_loras"]

Weights = Mapping[str, float]

_NOT_OFFERED = (
    "fuse_lora",
    "unfuse_lora",
    "save_lora_weights",
    "enable_lora_hotswap",
    "set_lora_device",
)


class LoraAdapters:
    """The LoRAs of one pipeline by name, and which of them are active with what weights."""

    def __init__(self, pipeline: Any) -> None:
        """Nothing is loaded yet; no engine opens."""
        self._pipeline = pipeline
        self._loaded: dict[str, Lora] = {}
        self._active: dict[str, Weights] = {}
        self._off = False

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
    ) -> None:
        """Load a .safetensors file, or the one called `weight_name` in a folder, or its tensors.

        It becomes the one active LoRA. Raises SpecError, and changes nothing, where it doesn't fit.
        """
        name = adapter_name or self._new_name()
        if name in self._loaded:
            raise SpecError(f"A LoRA called {name} is loaded already: give another adapter_name.")
        raw = _raw(pretrained_model_name_or_path_or_dict, weight_name)
        self.add(name, raw)
        self.set_adapters(name)

    def add(self, name: str, raw: RawLora) -> None:
        """Load without making active."""
        targets = {part: lora_targets(form.signature) for part, form in self._forms().items()}
        if not targets:
            raise UnsupportedError(_no_inputs(self._pipeline))
        self._loaded[name] = fitted(raw, self._pipeline, targets)

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float
        | Mapping[str, float]
        | Sequence[float | Mapping[str, float] | None]
        | None = None,
    ) -> None:
        """Make these LoRAs the active ones, with a weight each (any number; default 1).

        A weight may be a dict by component ("unet", "transformer", "text_encoder", ...).
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if missing := [name for name in names if name not in self._loaded]:
            raise SpecError(
                f"No LoRA called {missing[0]} is loaded: "
                f"{', '.join(self._loaded) or 'none'} are; load it first."
            )
        given = (
            [adapter_weights] * len(names)
            if adapter_weights is None or isinstance(adapter_weights, int | float | Mapping)
            else list(adapter_weights)
        )
        if len(given) != len(names):
            raise SpecError(f"{len(names)} LoRAs need as many weights, and {len(given)} are given.")
        parts = list(self._forms())
        active: dict[str, Weights] = {
            name: _by_part(name, one, parts) for name, one in zip(names, given, strict=True)
        }
        self._feed({} if self._off else active)
        self._active = active

    def unload_lora_weights(self) -> None:
        """Take all LoRAs away: the plain engines again."""
        self._feed({})
        self._loaded, self._active = {}, {}

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take these LoRAs away."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        kept = {name: weights for name, weights in self._active.items() if name not in names}
        self._feed({} if self._off else kept)
        self._active = kept
        for name in names:
            self._loaded.pop(name, None)

    def disable_lora(self) -> None:
        """Run without, until `enable_lora`."""
        self._feed({})
        self._off = True

    def enable_lora(self) -> None:
        """Run with the active LoRAs again."""
        self._feed(self._active)
        self._off = False

    def get_active_adapters(self) -> list[str]:
        """The names of the active LoRAs."""
        return list(self._active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Component -> the names of the LoRAs that have parts for it."""
        found: dict[str, list[str]] = {}
        for name, lora in self._loaded.items():
            for part in lora.parts:
                found.setdefault(part, []).append(name)
        return found

    def _new_name(self) -> str:
        number = 0
        while f"default_{number}" in self._loaded:
            number += 1
        return f"default_{number}"

    def _forms(self) -> dict[str, Any]:
        """Component -> its form with low-rank inputs."""
        entries = self._pipeline.kiln.manifest.components
        return {entry.name: entry.forms["lora"] for entry in entries if "lora" in entry.forms}

    def _placed(self, part: str, feeds: dict[str, Tensor]) -> dict[str, Any]:
        """The feeds where the component's engine holds them, so that no step copies them."""
        used = self._pipeline.kiln.manifest.named(part).backend
        if issubclass(engine_class(used), DeviceEngine):
            return {name: tensor.to("cuda") for name, tensor in feeds.items()}
        return {name: tensor.numpy() for name, tensor in feeds.items()}

    def _feed(self, active: Mapping[str, Weights]) -> None:
        """Let the engines run with these from the next call on; none: the plain engines."""
        made = {}
        for part, form in self._forms().items():
            mine = [
                (lora.parts[part], weights[part])
                for name, weights in active.items()
                if part in (lora := self._loaded[name]).parts and weights[part] != 0
            ]
            made[part] = _stacked(form.signature.inputs, mine) if mine else {}
        for part, feeds in made.items():
            adapter = getattr(self._pipeline, part)
            assert isinstance(adapter, Adapter)
            adapter.low_rank = self._placed(part, feeds)
        self._pipeline.kiln.prompts.clear()  # what prompts became without these


def offer_lora(pipeline: Any) -> None:
    """Give a pipeline of `runners.load` diffusers' LoRA methods, on its engines."""
    adapters = LoraAdapters(pipeline)
    pipeline.kiln.loras = adapters
    for name in (
        "load_lora_weights",
        "set_adapters",
        "unload_lora_weights",
        "delete_adapters",
        "disable_lora",
        "enable_lora",
        "get_active_adapters",
        "get_list_adapters",
    ):
        setattr(pipeline, name, getattr(adapters, name))
    for name in _NOT_OFFERED:
        setattr(pipeline, name, _refusal(name))


def use_loras(pipeline: Any, choices: Sequence[LoraChoice]) -> dict[str, Any]:
    """Let the pipeline draw with these LoRAs and no others; what the metadata says of them.

    Where none is chosen, the pipeline stays as it is.
    """
    if not choices:
        return {}
    loras: LoraAdapters = pipeline.kiln.loras
    raws = [read_lora(choice.path) for choice in choices]
    loras.unload_lora_weights()
    for choice, raw in zip(choices, raws, strict=True):
        loras.add(choice.name, raw)
    loras.set_adapters([c.name for c in choices], [c.weight for c in choices])
    described = zip(choices, raws, strict=True)
    return {
        "loras": [
            {"name": c.name, "file": raw.name, "sha256": raw.sha256, "weight": c.weight}
            for c, raw in described
        ]
    }


def _refusal(name: str) -> Any:
    def refused(*_args: Any, **_kwargs: Any) -> None:
        raise UnsupportedError(
            f"{name} isn't possible here: an engine's weights are never changed; use "
            "load_lora_weights, set_adapters and unload_lora_weights."
        )

    return refused


def _raw(given: str | Path | Mapping[str, Tensor], weight_name: str | None) -> RawLora:
    if isinstance(given, Mapping):
        return RawLora("(tensors)", None, dict(given), {})
    path = Path(given)
    if path.is_dir():
        path = path / (weight_name or "pytorch_lora_weights.safetensors")
    return read_lora(path)


def _no_inputs(pipeline: Any) -> str:
    manifest = pipeline.kiln.manifest
    backend = manifest.component("denoiser").backend
    return (
        f"The {backend} engines of {manifest.model.name} were compiled without inputs for LoRAs: "
        "compile it from its own weights for a processor, without --no-lora."
    )


def _by_part(name: str, given: Any, parts: Sequence[str]) -> dict[str, float]:
    """Component -> weight; diffusers' default is 1."""
    weights = given if isinstance(given, Mapping) else dict.fromkeys(parts, given)
    found = {part: weights.get(part, 1.0) for part in parts}
    found = {part: 1.0 if weight is None else weight for part, weight in found.items()}
    for weight in found.values():
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise SpecError(f"The weight {weight} of the LoRA {name} is no number: use one.")
    return {part: float(weight) for part, weight in found.items()}


def _stacked(
    inputs: Sequence[TensorSpec], loras: Sequence[tuple[Mapping[str, Any], float]]
) -> dict[str, Tensor]:
    """All low-rank inputs: the LoRAs' matrices side by side, and none of a layer of no LoRA."""
    found: dict[str, Tensor] = {}
    for spec in inputs:
        layer, _, end = spec.name.rpartition(".")
        if end not in ("lora_A", "lora_B"):
            continue
        pairs = [(parts[layer], weight) for parts, weight in loras if layer in parts]
        if not pairs:
            shape = [axis if isinstance(axis, int) else 0 for axis in spec.axes]
            found[spec.name] = torch.zeros(shape)
        elif end == "lora_A":
            found[spec.name] = torch.cat([pair.down for pair, _ in pairs], 1)
        else:
            found[spec.name] = torch.cat([pair.up * weight for pair, weight in pairs], 0)
        if (rank := found[spec.name].shape[int(end == "lora_A")]) > MOST_RANK:
            raise SpecError(
                f"The LoRAs together have rank {rank} at {layer}, and {MOST_RANK} is the most: "
                "use fewer at once."
            )
    return found
