"""ONNX -> ONNX Runtime: the exported graph with its low-bit products as ONNX Runtime's kernels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from optimizer.backends import Built, How
from optimizer.backends.onnxruntime_kernels import KERNELS, use_kernels
from optimizer.backends.sharing import require_shared
from optimizer.onnx_files import read_stored
from optimizer.progress import Progress
from runners.engines.onnxruntime import ACCURACY

__all__ = ["build", "build_form", "low_bit_layers"]

FORM_GRAPH = "model-control.onnx"
_GRAPH, _WEIGHTS = "model.onnx", "model.onnx.data"


def build(source: Path, out: Path, how: How, progress: Progress) -> Built:  # noqa: ARG001
    """Write graph and weights into `out`; the session optimizes when it opens."""
    model = read_stored(source / _GRAPH)
    use_kernels(model)
    ir.save(model, out / _GRAPH, external_data=_WEIGHTS)
    if not (out / _WEIGHTS).is_file():
        (out / _WEIGHTS).touch()
    return Built(
        files={"graph": _GRAPH, "weights": _WEIGHTS},
        properties={"weights_location": _WEIGHTS, ACCURACY: "1"},
    )


def build_form(source: Path, engine: Path, out: Path, how: How) -> Built:  # noqa: ARG001
    """Write a graph into `out` whose weights are those of the engine in `engine`."""
    model = read_stored(source / _GRAPH)
    use_kernels(model)
    plain = {
        tensor.name: tensor
        for tensor in (value.const_value for value in _initializers(engine / _GRAPH))
        if isinstance(tensor, ir.ExternalTensor)
    }
    own = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        known = plain.get(str(value.name))
        if known is not None and known.tobytes() == tensor.tobytes():
            value.const_value = ir.ExternalTensor(
                _WEIGHTS,
                known.offset,
                known.length,
                known.dtype,
                shape=known.shape,
                name=str(value.name),
            )
        else:
            own += tensor.nbytes
    require_shared(own)
    (out / FORM_GRAPH).write_bytes(ir.to_proto(model).SerializeToString())
    return Built(
        files={"graph": FORM_GRAPH, "weights": _WEIGHTS},
        properties={"weights_location": _WEIGHTS, ACCURACY: "1"},
    )


def _initializers(path: Path) -> Iterable[ir.Value]:
    return read_stored(path).graph.initializers.values()


def low_bit_layers(engine: Any) -> int:
    """The kernels of the graph: nothing else of ours runs in 8 bits or fewer there."""
    graph = ir.from_proto(_proto(bytes(engine.files["graph"]))).graph
    return sum(node.op_type in KERNELS for node in graph)


def _proto(raw: bytes) -> Any:
    import onnx

    return onnx.load_from_string(raw)
