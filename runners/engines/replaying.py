"""Work on a card recorded once for each shape and replayed: fixed buffers in, fixed buffers out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Recorder", "Replaying", "cuda_graph"]

Work = Callable[[], list[Tensor]]
Recorder = Callable[[Work], tuple[Callable[[], None], list[Tensor]]]
"""(work) -> (what does it again, the buffers in which its outputs then lie)."""

_KEPT = 4
"""Shapes whose recordings are kept: a full batch, the last smaller one, and two sizes of each."""
_WARM = 2
"""Runs before one is recorded: libraries allocate and choose kernels in the first."""


def cuda_graph(work: Work) -> tuple[Callable[[], None], list[Tensor]]:
    """Record `work` as a CUDA graph, on a stream of its own as capturing demands."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    return graph.replay, outputs


class Replaying:
    """Calls `run` with tensors in the given order, recorded anew where a shape first comes.

    Nothing waits for the card: inputs are copied into the recording's buffers and outputs out of
    them on the caller's own stream.
    """

    def __init__(
        self,
        run: Callable[..., list[Tensor]],
        *,
        recorder: Recorder = cuda_graph,
        kept: int = _KEPT,
    ) -> None:
        """Record nothing yet."""
        self._run, self._record, self._most = run, recorder, kept
        self._recorded: OrderedDict[Any, tuple[list[Tensor], Callable[[], None], list[Tensor]]] = (
            OrderedDict()
        )

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs, the caller's to keep."""
        key = tuple((name, tuple(x.shape), x.dtype) for name, x in feeds.items())
        if key not in self._recorded:
            while len(self._recorded) >= self._most:
                self._recorded.popitem(last=False)
            self._recorded[key] = self._made(list(feeds.values()))
        self._recorded.move_to_end(key)
        buffers, replay, outputs = self._recorded[key]
        for buffer, tensor in zip(buffers, feeds.values(), strict=True):
            buffer.copy_(tensor, non_blocking=True)
        replay()
        return [tensor.clone() for tensor in outputs]

    def _made(self, inputs: list[Tensor]) -> tuple[list[Tensor], Callable[[], None], list[Tensor]]:
        buffers = [tensor.clone() for tensor in inputs]
        replay, outputs = self._record(lambda: self._run(*buffers))
        return buffers, replay, outputs

    def forget(self) -> None:
        """Drop all recordings: the weights that they read are about to go."""
        self._recorded.clear()
