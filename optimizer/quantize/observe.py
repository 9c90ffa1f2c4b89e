"""Activation statistics, streamed: a histogram and channel energies per layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

__all__ = ["LayerStatistics", "best_activation_scale", "observing"]

_BINS = 2048


class LayerStatistics:
    """What one layer's inputs looked like, over all calls.

    `histogram`: counts of |x| in equal bins from 0 to `limit`, which doubles as needed;
    `energy`: the sum of squares per input channel [in]; `count`: values per channel.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.histogram = torch.zeros(_BINS, dtype=torch.float64)
        self.limit = 0.0
        self.energy: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor, channel_axis: int) -> None:
        """Take one call's input."""
        magnitude = x.detach().abs().float()
        peak = float(magnitude.max())
        if self.limit == 0.0:
            self.limit = max(peak, 1e-12)
        while peak > self.limit:
            merged = self.histogram.view(-1, 2).sum(1)
            self.histogram = torch.cat((merged, torch.zeros_like(merged)))
            self.limit *= 2
        self.histogram += torch.histc(magnitude, _BINS, 0.0, self.limit).double()
        channels = magnitude.movedim(channel_axis, -1).flatten(0, -2)
        energy = channels.square().sum(0).double()
        self.energy = energy if self.energy is None else self.energy + energy
        self.count += channels.shape[0]

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors, for safetensors."""
        if self.energy is None:
            raise ValueError("the layer was never called")
        return {
            "histogram": self.histogram,
            "limit": torch.tensor(self.limit, dtype=torch.float64),
            "energy": self.energy,
            "count": torch.tensor(self.count),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """The inverse of `state`."""
        found = cls()
        found.histogram, found.energy = state["histogram"], state["energy"]
        found.limit, found.count = float(state["limit"]), int(state["count"])
        return found

    @property
    def channel_power(self) -> Tensor:
        """The mean square of each input channel [in]."""
        if self.energy is None:
            raise ValueError("the layer was never called")
        return (self.energy / max(self.count, 1)).float()


def best_activation_scale(statistics: LayerStatistics, *, candidates: int = 96) -> float:
    """The int8 step that loses least squared error on the observed histogram.

    Rounding costs step^2/12 for each value inside +-127 steps, clipping its squared excess
    (Sung, Shin and Hwang 2015, "Resiliency of deep neural networks under quantization").
    """
    width = statistics.limit / _BINS
    centres = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * width
    filled = statistics.histogram.nonzero()
    peak = float(centres[filled[-1]] + width / 2) if len(filled) else statistics.limit
    clips = peak * torch.linspace(0.1, 1.0, candidates, dtype=torch.float64)
    steps = (clips / 127).view(-1, 1)
    excess = (centres - clips.view(-1, 1)).clamp_min(0)
    inside = (centres <= clips.view(-1, 1)).double()
    loss = (statistics.histogram * (inside * steps.square() / 12 + excess.square())).sum(1)
    return float(steps[int(loss.argmin())])


@contextmanager
def observing(root: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, LayerStatistics]]:
    """Collect the statistics of the named layers' inputs while the context is open."""
    found = {name: LayerStatistics() for name in layers}
    handles = []
    for name, statistics in found.items():
        layer = root.get_submodule(name)
        axis = 1 if isinstance(layer, nn.Conv2d) else -1

        def hook(
            _module: nn.Module,
            inputs: tuple[Tensor, ...],
            statistics: LayerStatistics = statistics,
            axis: int = axis,
        ) -> None:
            statistics.add(inputs[0], axis)

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
