"""torch.onnx.export that evaluates again only the operators that its conversions of types touch.

Before it translates a program the exporter writes conversions out: where an integer is added to a
float, it is made a float first. To know the types it evaluates every operator on tensors without
contents, a fifth of an export's time; but the program tells them, and few operators need any.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

__all__ = ["only_needed_evaluations"]


@contextmanager
def only_needed_evaluations() -> Iterator[None]:
    """Within, the exporter evaluates what it converts, and takes all other tensors as known.

    A torch whose exporter has no such interpreter exports as it always does.
    """
    try:
        from torch.onnx._internal.fx.passes import type_promotion
    except ImportError:
        yield
        return
    passes: Any = type_promotion
    plain = getattr(passes, "_TypePromotionInterpreter", None)
    if not (isinstance(plain, type) and issubclass(plain, fx.Interpreter)):
        yield
        return
    # by its own name, which it notes at the nodes that it makes
    passes._TypePromotionInterpreter = type(plain.__name__, (plain, _Sparing), {})
    try:
        yield
    finally:
        passes._TypePromotionInterpreter = plain


class _Sparing(fx.Interpreter):
    """The exporter's interpreter comes before it, and calls it to evaluate a node.

    That one makes conversions, which no tensor is known of yet, and lets nodes read them: those are
    evaluated, and so is what reads a result that isn't what the program says.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given = {node: _said(node) for node in self.graph.nodes}
        self._changed: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        known = n.meta.get("val")
        if n.op == "call_function" and isinstance(known, Tensor) and self._is_as_given(n):
            return known
        found = super().run_node(n)
        if known is not None and not _looks_like(found, known):
            self._changed.add(n)
        return found

    def _is_as_given(self, node: fx.Node) -> bool:
        given = self._given.get(node)
        return (
            given is not None
            and all(now is before for now, before in zip(_said(node), given, strict=True))
            and self._changed.isdisjoint(node.all_input_nodes)
        )


def _said(node: fx.Node) -> tuple[Any, ...]:
    return (node.target, node.args, node.kwargs)


def _looks_like(found: Any, known: Any) -> bool:
    """Whether a conversion could not tell one result from the other."""
    if isinstance(known, Tensor):
        return found is known or (
            isinstance(found, Tensor)
            and found.dtype == known.dtype
            and statically_known_true(sym_eq(found.shape, known.shape))
        )
    if isinstance(known, (list, tuple)):
        return (
            isinstance(found, (list, tuple))
            and len(found) == len(known)
            and all(map(_looks_like, found, known))
        )
    return type(found) is type(known)
