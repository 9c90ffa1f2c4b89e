"""What an engine's files weigh, from the parameters' shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from optimizer.backends import Backend
from optimizer.quantize.schemes import Scheme, Shape

__all__ = ["GRAPH_BYTES", "LARGE", "compile_bytes", "layer_shapes", "predicted_bytes"]

GRAPH_BYTES = 500
"""Of graph, small constants and padding for each parameter (seen: 0.2 MB for 440)."""

LARGE = 50_000_000
"""Denoisers of more parameters are calibrated and measured on little: a step takes seconds, not
ms."""


_LIBRARIES_BYTES = 1 << 30
_KEPT, _QUANTIZED = 12.0, 9.0
_SOLVED = {"gptq": 10.5, "hqq": 7.0}
"""Bytes a parameter at the peak of compiling one component: in fp32 up to three times while it is
exported (module, graph, serialized); quantized, in fp32 beside its codes or its engine (int8: SDXL
8.7, Stable Diffusion 1.5 7.1), for GPTQ beside covariances (SD 1.5: 10.3), with HQQ without any
statistics (int4: SDXL 6.5)."""

_TABLES = ("embedding.weight", "embed_tokens.weight", "shared.weight", "attention_bias.weight")
"""Ends of the names of look-up tables, which are no linears."""


def layer_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The linears and 2-d convolutions among parameters: weights of 2 or 4 axes, no embeddings."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) in (2, 4) and not name.endswith(_TABLES)
    }


def predicted_bytes(
    shapes: Mapping[str, Shape], low_bit: Mapping[str, Scheme], float_bytes: int, backend: Backend
) -> int:
    """Of an engine's files: weights by their schemes, the graph, and the backend's kernels."""
    total = GRAPH_BYTES * len(shapes) + backend.kernel_bytes
    if any(scheme.calibrates for scheme in low_bit.values()):
        total += backend.low_bit_kernel_bytes
    for name, shape in shapes.items():
        scheme = low_bit.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if scheme is None:
            total += math.prod(shape) * float_bytes
        else:
            total += scheme.stored_bytes(shape, float_bytes)
    return total


def compile_bytes(parameters: int, solver: str | None, built_bytes: float) -> int:
    """The peak of memory while a component is compiled; `solver` None: it isn't quantized.

    `built_bytes` is what the backend's builder takes at its own peak, 0 where that is less.
    """
    each = _KEPT if solver is None else _SOLVED.get(solver, _QUANTIZED)
    return round(max(each * parameters, built_bytes)) + _LIBRARIES_BYTES
