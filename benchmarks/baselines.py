"""Plain diffusers in other people's ways: the baseline rows of `kiln compare`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from profiles.errors import MissingError

__all__ = ["Baseline", "change_linears", "require_library", "speed_up"]

Baseline = Literal[
    "torch.compile", "torchao-int8", "torchao-int8-dyn", "bitsandbytes-int8", "bitsandbytes-nf4"
]

_EXTRAS = ("torchao", "bitsandbytes")
"""Libraries, which are extras too."""


def require_library(baseline: Baseline) -> None:
    """Raise MissingError, with the command that installs it, where its library is absent."""
    library = baseline.split("-")[0]
    if library in _EXTRAS and find_spec(library) is None:
        raise MissingError(
            f"The baseline {baseline} needs {library}, which isn't installed: run "
            f'pip install "kiln-diffusion[{library}]".'
        )


def speed_up(denoiser: Any, baseline: Baseline) -> None:
    """Change the module in place; what torch.compile makes stays in this machine's cache."""
    if baseline == "torch.compile":
        denoiser.compile()
    else:
        change_linears(denoiser, baseline)


def change_linears(module: Any, baseline: str, kept: tuple[str, ...] = ()) -> None:
    """Give each linear of the module the weights, and the product, of another library.

    `kept`: the last part of the names of those that bitsandbytes is to leave alone.
    """
    library, _, form = baseline.partition("-")
    if library == "torchao":
        from torchao import quantization

        weights_alone = quantization.Int8WeightOnlyConfig()
        rounding_inputs = quantization.Int8DynamicActivationInt8WeightConfig()
        quantization.quantize_(module, rounding_inputs if form == "int8-dyn" else weights_alone)
        return
    from torch import nn

    made = _of_bitsandbytes(form)
    for name, layer in list(module.named_modules()):
        owner, _, last = name.rpartition(".")
        if type(layer) is nn.Linear and last not in kept:
            setattr(module.get_submodule(owner), last, made(layer))


def _of_bitsandbytes(form: str) -> Callable[[Any], Any]:
    """What turns a linear into bitsandbytes' own: diffusers' loader refuses to without a card."""
    from runners.quantized import LLM_INT8_OUTLIER  # diffusers' default too

    library: Any = import_module("bitsandbytes.nn")
    # which says at every call that it reads float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

    def made(layer: Any) -> Any:
        sides, weight = (layer.in_features, layer.out_features), layer.weight.detach()
        changed: Any
        if form == "int8":
            fixed: dict[str, Any] = {"has_fp16_weights": False}
            changed = library.Linear8bitLt(*sides, bias=False, threshold=LLM_INT8_OUTLIER, **fixed)
            changed.weight = library.Int8Params(weight, requires_grad=False, **fixed)
        else:
            fixed = {"quant_type": "nf4", "compress_statistics": False}  # diffusers' defaults
            changed = library.Linear4bit(*sides, bias=False, compute_dtype=weight.dtype, **fixed)
            changed.weight = library.Params4bit(weight, requires_grad=False, **fixed)
        changed.bias = layer.bias
        return changed.to("cpu").eval()  # which rounds the weight; training has other kernels

    return made
