"""The "lora" form of a prepared component: low-rank inputs for all its linears and convolutions."""

from __future__ import annotations

from pathlib import Path

import safetensors.numpy
from torch import nn

from optimizer.forms import save_form
from optimizer.lora_graph import add_low_rank, factors, targets
from optimizer.onnx_files import read_graph
from runners.lora_inputs import with_lora
from runners.quantized import QuantizedLayer
from runners.signature import Signature

__all__ = ["prepare_lora"]


def prepare_lora(module: nn.Module, signature: Signature, out: Path, *, with_graph: bool) -> None:
    """Add the form to what is prepared in `out`: a graph, or the factors that torch needs."""
    wanted, scaled = targets(module), factors(module)
    if with_graph:
        model = read_graph(out / "model.onnx")
        there = add_low_rank(model, wanted, scaled)
        save_form("lora", with_lora(signature, there), out, model)
        return
    tensors = {}
    for name, factor in scaled.items():
        layer = module.get_submodule(name)
        inside = isinstance(layer, QuantizedLayer) and layer.multiplier is not None
        if factor.input is not None and not inside:
            tensors[f"{name}.input"] = factor.input
        if factor.output is not None:
            tensors[f"{name}.output"] = factor.output
    safetensors.numpy.save_file(tensors, out / "lora.safetensors")
    save_form("lora", with_lora(signature, wanted), out)
