"""Activation statistics, streamed: a histogram, and of every channel energy, peak and a sample."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from optimizer.quantize.ranges import BINS, edges
from optimizer.quantize.solvers.grid import Inputs

__all__ = ["LayerStatistics", "observing", "output_of"]

_HALF_MAX = 65504.0
_SAMPLE, _PLACES, _EXTREMES = 1024, 32, 128
"""Rows of a layer's sample, those that a call gives at most, and rows of extremes: together 2.9 MB
for 1,280 channels."""


class LayerStatistics:
    """What one layer's inputs looked like, over all calls.

    `histogram`: counts of x in equal bins from -limit to limit, which doubles as needed;
    `energy`: the sum of squares per input channel [in]; `count`: values per channel; `peaks`: the
    largest sizes [in]; `sample`: some inputs [n, in], fp16, from evenly spread calls and places,
    512 to 1,024 of them in the end; `extremes`: those with the largest values, which clipping would
    hit and a sample misses; `parts`: the channels of what the input was concatenated from.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.histogram = torch.zeros(BINS, dtype=torch.float64)
        self.limit = 0.0
        self.energy: Tensor | None = None
        self.count = 0
        self.peaks = torch.zeros(0)
        self.sample = torch.zeros(0)
        self.extremes = torch.zeros(0)
        self.parts: tuple[int, ...] = ()
        self._calls = 0
        self._every = 1
        self._leader: LayerStatistics | None = None
        self.covariance: Callable[[], Tensor] | None = None
        """Loads what was collected beside, where a solver needs it."""

    def add(self, x: Tensor, channel_axis: int) -> None:
        """Take one call's input."""
        values = x.detach().float()
        channels = values.movedim(channel_axis, -1).flatten(0, -2)
        sizes = channels.abs()
        peaks = sizes.amax(0)
        peak = float(peaks.max())
        if self.limit == 0.0:
            self.limit = max(peak, 1e-12)
        while peak > self.limit:
            merged = self.histogram.view(-1, 2).sum(1)
            quarter = torch.zeros(BINS // 4, dtype=torch.float64)
            self.histogram = torch.cat((quarter, merged, quarter))
            self.limit *= 2
        counts = torch.histc(values, BINS, -self.limit, self.limit).double()
        self.histogram = self.histogram + counts  # not in place: others may have taken it over
        energy = channels.square().sum(0).double()
        self.energy = energy if self.energy is None else self.energy + energy
        self.peaks = torch.maximum(self.peaks, peaks) if len(self.peaks) else peaks
        self.count += channels.shape[0]
        self._pick(channels)
        if peak > self._least:
            self._keep_extremes(channels, sizes.amax(1))
        self._leader = None

    @property
    def _least(self) -> float:
        """What a place must exceed to be among the extremes, which are in falling order."""
        return float(self.extremes[-1].abs().max()) if len(self.extremes) == _EXTREMES else -1.0

    def follow(self, leader: LayerStatistics) -> bool:
        """Take over all that `leader` knows, which has just taken the very input that comes here.

        False, and nothing is taken, unless the inputs of both were the same from the first on.
        """
        if self._calls + 1 != leader._calls or (self._calls and self._leader is not leader):
            return False
        parts, load = self.parts, self.covariance
        vars(self).update(vars(leader))
        self.parts, self.covariance, self._leader = parts, load, leader
        return True

    def _pick(self, channels: Tensor) -> None:
        """Add places of every so many calls to the sample, other places each time."""
        if self._calls % self._every == 0:
            step = -(-len(channels) // _PLACES)
            picked = _half(channels[self._calls % step :: step])
            self.sample = torch.cat((self.sample, picked)) if len(self.sample) else picked
            if len(self.sample) > _SAMPLE:
                self.sample, self._every = self.sample[::2].contiguous(), 2 * self._every
        self._calls += 1

    def _keep_extremes(self, channels: Tensor, sizes: Tensor) -> None:
        """Keep the places with the largest values of all calls so far."""
        top = _half(channels[sizes.topk(min(_EXTREMES, len(sizes))).indices])
        if len(self.extremes):
            top = torch.cat((self.extremes, top))
            order = top.abs().amax(1).topk(min(_EXTREMES, len(top))).indices
            top = top[order]
        self.extremes = top

    @property
    def typical(self) -> tuple[Tensor, Tensor]:
        """Sample and extremes [n, in], and how many places each of them stands for [n]."""
        extremes = min(len(self.extremes), self.count)
        share = max(self.count - extremes, 0) / max(len(self.sample), 1)
        weights = torch.cat((torch.full((len(self.sample),), share), torch.ones(extremes)))
        return torch.cat((self.sample, self.extremes[:extremes])).float(), weights

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors, for safetensors."""
        if self.energy is None:
            raise ValueError("the layer was never called")
        state = {
            "histogram": self.histogram,
            "limit": torch.tensor(self.limit, dtype=torch.float64),
            "energy": self.energy,
            "count": torch.tensor(self.count),
            "peaks": self.peaks,
            "sample": self.sample,
            "extremes": self.extremes,
            "parts": torch.tensor(self.parts, dtype=torch.int64),
            "calls": torch.tensor([self._calls, self._every]),
        }
        followed = self._leader is not None  # a file takes no tensor under two names
        return {name: x.clone() for name, x in state.items()} if followed else state

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """The inverse of `state`."""
        found = cls()
        found.restore(state)
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Be what `state` was taken of."""
        self.histogram, self.energy = state["histogram"], state["energy"]
        self.limit, self.count = float(state["limit"]), int(state["count"])
        self.peaks = state["peaks"]
        self.sample, self.extremes = state["sample"], state["extremes"]
        self.parts = tuple(state["parts"].tolist())
        self._calls, self._every = state["calls"].tolist()

    @property
    def peak(self) -> float:
        """The largest size of a value, to the width of a bin."""
        _, low, high = edges(self)
        return max(-low, high)

    def inputs(self, columns: int, *, covariance: bool = True) -> Inputs:
        """What solvers may know of the inputs of a weight with so many columns.

        A convolution's columns are the kernel's places, each with all channels.
        """
        power = self.channel_power
        load = self.covariance if covariance else None
        return Inputs(power.repeat(columns // len(power)), None if load is None else load())

    @property
    def channel_power(self) -> Tensor:
        """The mean square of each input channel [in]."""
        if self.energy is None:
            raise ValueError("the layer was never called")
        return (self.energy / max(self.count, 1)).float()


def _half(values: Tensor) -> Tensor:
    """In fp16, the largest of which stands for what is larger."""
    return values.clamp(-_HALF_MAX, _HALF_MAX).half()


def output_of(layer: str) -> str:
    """What the statistics of a layer's output are called."""
    return f"{layer}.output"


@contextmanager
def observing(
    root: nn.Module, layers: Iterable[str], outputs: Iterable[str] = ()
) -> Iterator[dict[str, LayerStatistics]]:
    """Collect statistics of the named `layers`' inputs while the context is open.

    The layers that a pattern of `outputs` (fnmatch) matches have those of their outputs collected
    too, under `output_of(layer)`.
    """
    found: dict[str, LayerStatistics] = {}
    handles = []
    joined, latest = _Concatenations(), _Latest()
    for name in layers:
        layer = root.get_submodule(name)
        axis = 1 if isinstance(layer, nn.Conv2d) else -1
        found[name] = LayerStatistics()
        handles.append(
            layer.register_forward_pre_hook(_input_hook(found[name], axis, joined, latest))
        )
        if any(fnmatchcase(name, pattern) for pattern in outputs):
            found[output_of(name)] = LayerStatistics()
            handles.append(layer.register_forward_hook(_output_hook(found[output_of(name)], axis)))
    try:
        with joined:
            yield found
    finally:
        for handle in handles:
            handle.remove()


class _Concatenations(TorchFunctionMode):
    """Remembers what living tensors were concatenated from."""

    def __init__(self) -> None:
        super().__init__()
        self._made: Any = WeakTensorKeyDictionary()

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        result = func(*args, **(kwargs or {}))
        if func is torch.cat:
            self._made[result] = [part.shape for part in args[0]]
        return result

    def parts(self, x: Tensor, channel_axis: int) -> tuple[int, ...]:
        """The channels of what `x` was concatenated from along its channels; () where it wasn't."""
        made = self._made.get(x, ())
        sizes = tuple(shape[channel_axis] for shape in made if len(shape) == x.dim())
        return sizes if sum(sizes) == x.shape[channel_axis] else ()


class _Latest:
    """The input that was counted last, and where: queries, keys and values read the same one."""

    def __init__(self) -> None:
        self._read: tuple[Any, ...] = ()
        self._by: LayerStatistics | None = None

    def count(self, x: Tensor, axis: int, into: LayerStatistics) -> None:
        """Add `x` to the statistics, or take over what others made of it just before."""
        if self._by is not None and self._is(x, axis) and into.follow(self._by):
            return
        into.add(x, axis)
        # torch counts no changes of a tensor that was made in inference mode
        self._read = () if x.is_inference() else (weakref.ref(x), axis, x._version)
        self._by = into

    def _is(self, x: Tensor, axis: int) -> bool:
        """Whether `x` is that input, unchanged."""
        if not self._read or self._read[0]() is not x:
            return False
        return bool(self._read[1:] == (axis, x._version))


def _input_hook(
    statistics: LayerStatistics, axis: int, joined: _Concatenations, latest: _Latest
) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        latest.count(inputs[0], axis, statistics)
        statistics.parts = joined.parts(inputs[0], axis)

    return hook


def _output_hook(statistics: LayerStatistics, axis: int) -> Any:
    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        statistics.add(output, axis)

    return hook
