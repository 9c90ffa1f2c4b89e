"""A LoRA file -> low-rank parts for the layers of a bundle's components, or a refusal by name.

safetensors only. The layouts (peft's and diffusers', kohya's, older ones) are brought into one by
diffusers' own functions; what is left must fit the engines' inputs, key by key and shape by shape.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import SafetensorError
from torch import Tensor

from profiles.errors import SpecError, UnsupportedError
from runners.lora_inputs import Target

__all__ = ["Lora", "Pair", "RawLora", "fitted", "read_lora"]

State = dict[str, Tensor]

_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
}
"""Parts of keys -> the methods that use them, which aren't sums of a product of two matrices."""

_OLD_TEXT = re.compile(r"\.to_(q|k|v|out)_lora\.")
"""Of a text encoder, in diffusers' oldest layout, into which kohya's is brought; diffusers 0.42
itself misses it where a file has no part for the output."""

_SHOWN = 3


@dataclass(frozen=True)
class RawLora:
    """A file's tensors, not looked at yet."""

    name: str
    sha256: str | None
    """None where the tensors were given, not a file."""
    state: State
    metadata: dict[str, Any]
    """What diffusers writes of peft's settings."""


@dataclass(frozen=True)
class Pair:
    """`down` [in, rank(, height, width)] and `up` [rank, out], scaled by alpha / rank."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class Lora:
    """Component -> layer -> its two matrices."""

    name: str
    sha256: str | None
    parts: dict[str, dict[str, Pair]]


def read_lora(path: Path) -> RawLora:
    """The tensors of a .safetensors file; SpecError for anything else."""
    if path.suffix != ".safetensors":
        raise SpecError(
            f"--lora {path} isn't a .safetensors file, the only kind that is read: convert it "
            "first."
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SpecError(f"--lora {path} can't be read: {error.strerror}.") from error
    try:
        state = safetensors.torch.load(raw)
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size]).get("__metadata__") or {}
        metadata = json.loads(header.get("lora_adapter_metadata", "{}"))
    except (SafetensorError, ValueError) as error:
        raise SpecError(
            f"--lora {path} is damaged ({error}): copy or download it again."
        ) from error
    return RawLora(path.name, hashlib.sha256(raw).hexdigest(), state, metadata)


def fitted(raw: RawLora, pipeline: Any, targets: Mapping[str, Mapping[str, Target]]) -> Lora:
    """The file's parts for the components of `targets`, each of which fits its layer.

    Raises UnsupportedError for other methods than LoRA, SpecError, with the names of what doesn't
    match, for a file that isn't of this model's kind.
    """
    _require_lora(raw)
    state, alphas = _as_diffusers(raw, pipeline)
    parts: dict[str, dict[str, Pair]] = {}
    wrong: list[str] = []
    for component, keys in _by_component(state, targets, wrong).items():
        own = {
            key.removeprefix(f"{component}."): float(value)
            for key, value in alphas.items()
            if key.startswith(f"{component}.")
        }
        try:
            pairs = _pairs(component, keys, own, _settings(raw.metadata, component))
        except _OddKeysError as error:
            wrong += error.keys
            continue
        parts[component] = _for_layers(component, pairs, targets[component], wrong)
    if wrong or not any(parts.values()):
        raise SpecError(_misfit(raw, pipeline, sorted(wrong)))
    return Lora(raw.name, raw.sha256, parts)


class _OddKeysError(Exception):
    """Keys of a component that aren't of a product of two matrices."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__(keys)
        self.keys = keys


def _misfit(raw: RawLora, pipeline: Any, wrong: list[str]) -> str:
    model = pipeline.kiln.manifest.model
    if not wrong:
        return f"The LoRA {raw.name} holds nothing for {model.name}: give a LoRA made for it."
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return (
        f"The LoRA {raw.name} doesn't fit {model.name} ({model.family}): "
        f"{', '.join(wrong[:_SHOWN])}{more} don't match its layers; give a LoRA made for "
        f"{model.family}."
    )


def _require_lora(raw: RawLora) -> None:
    for key, tensor in raw.state.items():
        for part, kind in _OTHER_KINDS.items():
            if part in key:
                raise UnsupportedError(
                    f"{raw.name} is a {kind} ({key}), which can't be added beside an engine's "
                    "weights: give a LoRA."
                )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise SpecError(
                f"{raw.name} holds NaN or infinity in {key}: it is damaged; download it again."
            )
    if any(key.endswith("use_dora") and value for key, value in raw.metadata.items()):
        raise UnsupportedError(f"{raw.name} is a DoRA, which engines can't add: give a LoRA.")


def _as_diffusers(raw: RawLora, pipeline: Any) -> tuple[State, dict[str, float]]:
    """The tensors under diffusers' names, each component's behind its own prefix, and alphas."""
    denoiser = getattr(pipeline, "unet", None)
    more = {} if denoiser is None else {"unet_config": denoiser.config}
    try:
        found = type(pipeline).lora_state_dict(dict(raw.state), return_alphas=True, **more)
    except (ValueError, KeyError, IndexError, AttributeError, RuntimeError, TypeError) as error:
        keys = sorted(raw.state)
        raise SpecError(_misfit(raw, pipeline, keys)) from error
    if not isinstance(found, tuple):
        return found, {}
    return found[0], dict(found[1] or {})


def _by_component(
    state: State, targets: Mapping[str, Mapping[str, Target]], wrong: list[str]
) -> dict[str, State]:
    """Component -> its tensors without the prefix; keys of no component are `wrong`."""
    found: dict[str, State] = {}
    for key, tensor in state.items():
        component, _, rest = key.partition(".")
        if component in targets:
            found.setdefault(component, {})[rest] = tensor
        else:
            wrong.append(key)
    return found


def _settings(metadata: Mapping[str, Any], component: str) -> dict[str, Any]:
    prefix = f"{component}."
    return {
        key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)
    }


def _to_peft(component: str, state: dict[str, Any]) -> dict[str, Any]:
    """Under peft's names, as diffusers' own loaders do it."""
    if not state or all(".lora_A." in key or ".lora_B." in key for key in state):
        return state
    try:
        if not component.startswith("text_encoder"):
            return dict(convert_unet_state_dict_to_peft(state))
        named = {_OLD_TEXT.sub(r".\1_proj.lora_linear_layer.", key): x for key, x in state.items()}
        return dict(convert_state_dict_to_peft(convert_state_dict_to_diffusers(named)))
    except ValueError as error:
        raise _OddKeysError([f"{component}.{key}" for key in state]) from error


def _pairs(
    component: str, state: State, alphas: dict[str, float], settings: dict[str, Any]
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Layer -> A as stored, B as stored, and the factor of their product."""
    state = _to_peft(component, state)
    ends = (".lora_A.weight", ".lora_B.weight")
    if odd := [key for key in state if not key.endswith(ends)]:
        raise _OddKeysError([f"{component}.{key}" for key in odd])
    layers = {key.removesuffix(end) for key in state for end in ends if key.endswith(end)}
    if alone := [
        f"{layer}{end}" for layer in sorted(layers) for end in ends if f"{layer}{end}" not in state
    ]:
        raise _OddKeysError([f"{component}.{key} (missing)" for key in alone])
    by_layer = _alphas_by_layer(component, alphas)
    found = {}
    for layer in layers:
        down, up = (state[f"{layer}{end}"].float() for end in ends)
        rank = max(down.shape[0], 1) if down.dim() else 1
        found[layer] = (down, up, _factor(layer, rank, by_layer, settings))
    return found


def _alphas_by_layer(component: str, alphas: dict[str, float]) -> dict[str, float]:
    """Their keys are a layer's, or those of its first matrix, before it had peft's names."""
    named = {key.removesuffix(".alpha"): value for key, value in alphas.items()}
    weights = {key: value for key, value in named.items() if key.endswith(".weight")}
    found = {key: value for key, value in named.items() if key not in weights}
    for key, value in _to_peft(component, weights).items():
        found[key.removesuffix(".lora_A.weight")] = value
    return found


def _factor(
    layer: str, rank: int, alphas: Mapping[str, float], settings: Mapping[str, Any]
) -> float:
    """alpha / rank; 1 where the file has no alpha, as peft's and diffusers' files mean it."""
    if layer in alphas:
        return alphas[layer] / rank
    alpha = settings.get("lora_alpha")
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if layer == pattern or layer.endswith(f".{pattern}"):
            alpha = value
    if alpha is None:
        return 1.0
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


def _for_layers(
    component: str,
    pairs: Mapping[str, tuple[Tensor, Tensor, float]],
    targets: Mapping[str, Target],
    wrong: list[str],
) -> dict[str, Pair]:
    """The pairs under the engine's names; those that don't fit are `wrong`."""
    found = {}
    for layer, (down, up, factor) in pairs.items():
        bare = layer.removeprefix("text_model.")
        name = next((n for n in (layer, bare, f"text_model.{bare}") if n in targets), None)
        if name is None:
            wrong.append(f"{component}.{layer}")
            continue
        pair = _pair(down, up * factor, targets[name])
        if pair is None:
            shapes = "x".join(map(str, down.shape)), "x".join(map(str, up.shape))
            wrong.append(f"{component}.{layer} ({' and '.join(shapes)})")
            continue
        found[name] = pair
    return found


def _pair(down: Tensor, up: Tensor, target: Target) -> Pair | None:
    """The matrices as the engine takes them; None where a shape is another."""
    sides = target.kernel
    if down.dim() not in (2, 4) or up.dim() not in (2, 4):
        return None
    if up.dim() == 4 and up.shape[2:] != (1, 1):
        return None
    up = up.flatten(1)
    if not sides and down.dim() == 4 and down.shape[2:] == (1, 1):
        down = down.flatten(1)
    if sides == (1, 1) and down.dim() == 2:
        down = down[:, :, None, None]
    rank = down.shape[0]
    if tuple(down.shape) != (rank, target.inputs, *sides) or not rank:
        return None
    if tuple(up.shape) != (target.outputs, rank):
        return None
    return Pair(down.transpose(0, 1).contiguous(), up.T.contiguous())
