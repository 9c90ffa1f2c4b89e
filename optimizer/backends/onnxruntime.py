"""ONNX -> ONNX Runtime: the exported graph with its low-bit products as ONNX Runtime's kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from optimizer.backends import Built, How
from optimizer.backends.onnxruntime_attention import use_blocks
from optimizer.backends.onnxruntime_kernels import KERNELS, use_kernels
from optimizer.forms import form_graph, save_over
from optimizer.onnx_files import read_stored
from optimizer.progress import Progress
from runners.engines.onnxruntime import ACCURACY

__all__ = ["build", "build_form", "low_bit_layers"]

_GRAPH, _WEIGHTS = "model.onnx", "model.onnx.data"


def build(source: Path, out: Path, how: How, progress: Progress) -> Built:  # noqa: ARG001
    """Write graph and weights into `out`; the session optimizes when it opens."""
    model = read_stored(source / _GRAPH)
    use_kernels(model)
    use_blocks(model)
    ir.save(model, out / _GRAPH, external_data=_WEIGHTS)
    if not (out / _WEIGHTS).is_file():
        (out / _WEIGHTS).touch()
    return _built(_GRAPH)


def build_form(source: Path, out: Path, how: How, name: str) -> Built:  # noqa: ARG001
    """Write NAME.onnx into `out`, over the plain engine's tensors."""
    model = read_stored(source / form_graph(name))
    use_kernels(model)
    use_blocks(model)
    return _built(save_over(model, out, name, graph=_GRAPH, weights=_WEIGHTS))


def _built(graph: str) -> Built:
    return Built(
        files={"graph": graph, "weights": _WEIGHTS},
        properties={"weights_location": _WEIGHTS, ACCURACY: "1"},
    )


def low_bit_layers(engine: Any) -> int:
    """The kernels of the graph: nothing else of ours runs in 8 bits or fewer there."""
    graph = ir.from_proto(_proto(bytes(engine.files["graph"]))).graph
    return sum(node.op_type in KERNELS for node in graph)


def _proto(raw: bytes) -> Any:
    import onnx

    return onnx.load_from_string(raw)
