"""Plain torch: the component itself, quantized layers included. The oracle of all other engines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from profiles.errors import BundleError, SpecError
from runners.bitsandbytes_layers import LlmInt8Layer, Nf4Layer
from runners.engines.base import Array, Buffer, Engine
from runners.low_rank import LowRank
from runners.modules import WRAPPERS, component_from_config
from runners.quantized import (
    Quantization,
    QuantizedLayer,
    insert_quantized,
    pack_int4,
    unpack_int4,
)
from runners.stored_tensors import read_tensors
from runners.torchao_layers import TorchaoInt8Layer

__all__ = ["EagerEngine", "eager_module", "eager_state"]

_OF_LIBRARIES = {"bitsandbytes": LlmInt8Layer, "torchao": TorchaoInt8Layer}
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@final
class EagerEngine(Engine):
    """files: `config`, `layers` (JSON) and `weights` (safetensors); properties: `wrapper`, `dtype`.

    With a file `lora`, which holds what quantizing multiplied layers' ends with, it takes low-rank
    inputs as well: added to weights of floats, products of their own beside low-bit ones.

    Raises MissingError for layers of a library that isn't installed.
    """

    exhausted = ("can't allocate memory", "not enough memory", "out of memory")

    def _open(self) -> None:
        try:
            config = json.loads(bytes(self.files["config"]))
            layers = json.loads(bytes(self.files["layers"]))
            dtype = _DTYPES[str(self.properties["dtype"])]
            wrapper = WRAPPERS[str(self.properties["wrapper"])]
            component = eager_module(config, layers, self.files["weights"])
        except (ValueError, KeyError, SafetensorError, SpecError) as error:
            raise BundleError(f"torch can't open the engine: {error}.") from error
        self._module = wrapper(component).to(dtype)
        self._dtype = dtype
        factors = self.files.get("lora")
        weights = None if factors is None else read_tensors(self.files["weights"])
        self._low_rank = LowRank(component, self.signature, factors, weights)
        torch.set_num_threads(self.threads)
        self._same("dtype", dtype, next(self._module.parameters()).dtype)

    @property
    def low_bit_layers(self) -> int:
        """Linears whose products are of int8: those that round their inputs as they come."""
        return sum(bool(getattr(layer, "dynamic", False)) for layer in self._module.modules())

    def _hold(self, feeds: Mapping[str, Array]) -> None:
        self._low_rank.hold(feeds, self._dtype)

    @torch.inference_mode()
    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        if not self._low_rank.held_in(self.held):
            self._hold(feeds)
        outputs = self._module(*self._low_rank.others(feeds, self._dtype))
        specs = self.signature.outputs
        return {s.name: t.float().numpy() for s, t in zip(specs, outputs, strict=True)}

    def _close(self) -> None:
        del self._module, self._low_rank


def eager_state(component: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The quantized layers' table and all tensors of a component, as the eager engine reads them.

    4-bit codes are packed two a byte; a tensor of several names has one of them.
    """
    layers: dict[str, Any] = {}
    state = {name: tensor.contiguous() for name, tensor in component.state_dict().items()}
    for name in _tied(component):
        del state[name]
    for name, layer in component.named_modules():
        if isinstance(layer, QuantizedLayer):
            form = layer.quantization
            layers[name] = {
                "format": form.format,
                "group": form.group,
                "dynamic": form.dynamic,
                "library": form.library,
                "convolution": layer.convolution,
                "shape": list(layer.codes.shape),
            }
            if form.bits == 4:
                state[f"{name}.codes"] = pack_int4(layer.codes)
            if form.format in ("int8", "int4", "uint4"):  # whose solvers see to it that they fit
                state[f"{name}.scale"] = layer.scale.half()
    return layers, state


def eager_module(
    config: Mapping[str, Any], layers: Mapping[str, Any], weights: Buffer
) -> nn.Module:
    """The component that `eager_state` was taken from."""
    state = safetensors.torch.load(bytes(weights))
    component = component_from_config(config)
    tied = _tied(component)
    insert_quantized(component, {name: _layer(name, form, state) for name, form in layers.items()})
    component.load_state_dict(state, strict=False, assign=True)
    for name, kept in tied.items():
        if name in state:
            continue
        owner, _, last = name.rpartition(".")
        component.get_submodule(owner).register_parameter(last, component.get_parameter(kept))
    missing = [name for name, tensor in component.state_dict().items() if tensor.is_meta]
    for name in missing:
        _drop(component, name)
    return component.float().eval()


def _tied(component: nn.Module) -> dict[str, str]:
    """Further names of parameters that have several (T5's embeddings have two) -> the first."""
    first: dict[nn.Parameter, str] = {}
    names = component.named_parameters(remove_duplicate=False)
    return {name: kept for name, one in names if (kept := first.setdefault(one, name)) != name}


def _layer(name: str, form: Mapping[str, Any], state: dict[str, Tensor]) -> nn.Module:
    prefix = f"{name}."
    keys = [key for key in state if key.startswith(prefix)]
    tensors = {key.removeprefix(prefix): state.pop(key) for key in keys}
    if form["format"] == "nf4":
        codes, peaks, bias = tensors["codes"], tensors["scale"].float(), tensors.get("bias")
        convolution = form["convolution"]
        return Nf4Layer(codes, peaks, tuple(form["shape"]), bias=bias, convolution=convolution)
    library = form.get("library", "")
    quantization = Quantization(form["format"], form["group"], form.get("dynamic", False), library)
    if quantization.bits == 4:
        signed = quantization.format == "int4"
        tensors["codes"] = unpack_int4(tensors["codes"], tuple(form["shape"]), signed=signed)
    if tensors["scale"].dtype == torch.float16:
        tensors["scale"] = tensors["scale"].float()
    if library:
        made = _OF_LIBRARIES[library]
        return made(tensors["codes"], tensors["scale"], tensors.get("bias"))
    return QuantizedLayer(quantization, tensors, form["convolution"])


def _drop(component: nn.Module, name: str) -> None:
    """Remove the top-level part that a half (of the VAE) doesn't have."""
    top = name.split(".")[0]
    if getattr(component, top, None) is not None:
        setattr(component, top, None)
