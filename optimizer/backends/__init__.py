"""The builders, one file a backend (its runner is the twin file); `BACKENDS` is the only list."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

__all__ = ["BACKENDS", "Backend", "Built", "backend", "builder"]


@dataclass(frozen=True)
class Backend:
    """What a backend accepts; the plan refuses the rest."""

    name: str
    form: Literal["onnx", "torch"]
    """What it builds from: an ONNX file, or the component as runners.engines.eager stores it."""
    dtypes: tuple[str, ...]
    """Legal compute dtypes on a CPU."""
    library: str
    """The distribution whose version decides what comes out."""
    module: str
    formats: frozenset[str]
    """Of quantized layers (`Scheme.format`) that it reads; "keep" is read by all."""
    computes: frozenset[tuple[str, int]] = frozenset()
    """(format, weight's number of axes: 2 of a linear, 4 of a convolution) of the layers of which
    each must be seen to run on a low-bit kernel."""


_INTEGERS = frozenset({"w8a16", "w8a8", "w4a16", "w4a16-zero-points"})
_FLOATS = frozenset({"fp8", "nf4", "nvfp4"})

BACKENDS: dict[str, Backend] = {
    item.name: item
    for item in (
        Backend(
            "openvino",
            "onnx",
            ("fp32", "bf16"),
            "openvino",
            "optimizer.backends.openvino",
            _INTEGERS | {"w4a16-dynamic"},
            frozenset({("w8a8", 2), ("w8a8", 4)}),
        ),
        Backend(
            "onnxruntime",
            "onnx",
            ("fp32",),
            "onnxruntime",
            "optimizer.backends.onnxruntime",
            _INTEGERS,
            frozenset({("w4a16", 2), ("w4a16-zero-points", 2), ("w8a8", 2), ("w8a8", 4)}),
        ),
        Backend(
            "eager",
            "torch",
            ("fp32", "bf16"),
            "torch",
            "optimizer.backends.eager",
            _INTEGERS | _FLOATS,
        ),
    )
}


@dataclass(frozen=True)
class Built:
    """What a builder wrote: files by their role in the backend, and the engine's properties."""

    files: dict[str, str]
    properties: dict[str, str | int | float | bool]


class Builder(Protocol):
    """The one function that a backend's file has."""

    def build(
        self, source: Path, out: Path, *, dtype: str, role: str, dynamic: bool = False
    ) -> Built:
        """Turn the files in `source` into an engine's files in `out`.

        With `dynamic`, inputs of 4-bit layers may be rounded to 8 bits as they come.
        """

    def low_bit_layers(self, engine: Any) -> int | None:
        """How many linears and convolutions the open engine runs in 8 bits or fewer, if known."""


def backend(name: str) -> Backend:
    """The backend called `name`; KeyError where there is none."""
    return BACKENDS[name]


def builder(name: str) -> Builder:
    """The builder of a backend; ImportError where its library is missing."""
    module: Builder = import_module(BACKENDS[name].module)
    return module
