"""Running a module again with one layer changed, without what comes before that layer.

A module's blocks (its children, and the items of its module lists) run in an order. A block that
ran before the changed layer's block gives what it gave the first time, so on average half of the
work is saved. Blocks that run more than once in a call are always run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from optimizer.calls import Call
from optimizer.prepare import run_module

__all__ = ["Replay"]


class Replay:
    """One call of a wrapper around `root`, run once in full and then from any layer on."""

    def __init__(self, wrapper: nn.Module, root: nn.Module, call: Call) -> None:
        """Run the call and keep what every block gave."""
        self._wrapper, self._root, self._call = wrapper, root, call
        self._order: list[str] = []
        self._given: dict[str, Any] = {}
        handles = [
            block.register_forward_hook(self._keeper(name)) for name, block in _blocks(root).items()
        ]
        try:
            self.output = run_module(wrapper, call).outputs[0]
        finally:
            for handle in handles:
                handle.remove()

    def _keeper(self, name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if name in self._order:
                self._given.pop(name, None)
            else:
                self._order.append(name)
                self._given[name] = output

        return keep

    def run_from(self, layer: str) -> Any:
        """The first output as a numpy array, with whatever `layer` is now."""
        blocks = _blocks(self._root)
        own = next(name for name in blocks if layer == name or layer.startswith(f"{name}."))
        earlier = self._order[: self._order.index(own)] if own in self._order else []
        with _standing_in({blocks[n]: self._given[n] for n in earlier if n in self._given}):
            return run_module(self._wrapper, self._call).outputs[0]


def _blocks(root: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, child in root.named_children():
        if isinstance(child, nn.ModuleList):
            found.update({f"{name}.{i}": item for i, item in enumerate(child)})
        else:
            found[name] = child
    return found


@contextmanager
def _standing_in(given: dict[nn.Module, Any]) -> Iterator[None]:
    """Let modules give what is given, without running."""
    for module, output in given.items():

        def forward(*_: Any, output: Any = output, **__: Any) -> Any:
            return output

        module.forward = forward
    try:
        yield
    finally:
        for module in given:
            del module.forward
