"""ONNX -> ONNX Runtime on cards: the exported graph in 16 bits; the session picks its kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from optimizer.backends import Built, How
from optimizer.forms import form_graph, save_over
from optimizer.narrow import narrow
from optimizer.onnx_files import read_stored
from optimizer.progress import Progress
from runners.engines.onnxruntime import ACCURACY

__all__ = ["build", "build_form", "low_bit_layers"]

_GRAPH, _WEIGHTS = "model.onnx", "model.onnx.data"


def build(source: Path, out: Path, how: How, progress: Progress) -> Built:  # noqa: ARG001
    """Write graph and weights into `out`, computing in `how.dtype` between fp32 ends."""
    model = read_stored(source / _GRAPH)
    narrow(model, how.dtype)
    ir.save(model, out / _GRAPH, external_data=_WEIGHTS)
    (out / _WEIGHTS).touch()
    return _built(_GRAPH)


def build_form(source: Path, out: Path, how: How, name: str) -> Built:
    """Write NAME.onnx into `out`, over the plain engine's tensors."""
    model = read_stored(source / form_graph(name))
    narrow(model, how.dtype)
    return _built(save_over(model, out, name, graph=_GRAPH, weights=_WEIGHTS))


def _built(graph: str) -> Built:
    return Built(
        files={"graph": graph, "weights": _WEIGHTS},
        properties={"weights_location": _WEIGHTS, ACCURACY: "1"},
    )


def low_bit_layers(engine: Any) -> int | None:  # noqa: ARG001
    """None: the session doesn't say which kernels its products run on."""
    return None
