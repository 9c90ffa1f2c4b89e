"""torch.onnx.export without decompositions that a program doesn't need.

Before it translates a program the exporter traces it a second time, to replace operators that it
has no translation for by smaller ones. Diffusers' models have none of those but casts, for which
optimizer.export has translations; with symbolic sizes the second trace is half of an export's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _decomp, _fx_passes

__all__ = ["only_needed_decompositions"]

_ASSERTIONS = (
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_tensor_metadata.default,
)
"""The exporter removes them."""

Decompose = Callable[[ExportedProgram, Any], ExportedProgram]


@contextmanager
def only_needed_decompositions() -> Iterator[None]:
    """Within, the exporter decomposes programs that need it, and leaves the others as they are."""
    passes: Any = _fx_passes
    plain: Decompose = passes.decompose_with_registry

    def decompose(program: ExportedProgram, registry: Any) -> ExportedProgram:
        known = set(_decomp.get_onnx_implemented_overloads(registry))
        return program if _translates(program, known) else plain(program, registry)

    passes.decompose_with_registry = decompose
    try:
        yield
    finally:
        passes.decompose_with_registry = plain


def _translates(program: ExportedProgram, known: set[Any]) -> bool:
    """Whether each of the program's operators has a translation, and changes none of its inputs."""
    nodes = [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]
    return all(
        node.op == "call_function"
        and (node.target in known or node.target in _ASSERTIONS)
        and not getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        for node in nodes
    )
