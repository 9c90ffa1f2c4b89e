"""The builders, one file a backend (its runner is the twin file); `BACKENDS` is the only list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from optimizer.progress import Progress
from runners.signature import Signature

__all__ = ["BACKENDS", "INT8_PRODUCTS", "Backend", "Built", "How", "Runs", "backend", "builder"]


@dataclass(frozen=True)
class Runs:
    """What a backend's engines need of the machine that runs them."""

    rule: Literal["exact", "minimum"]
    """Whether the library must be the very version that built them, or no older one."""
    floor: str | None = None
    """The oldest version that reads them; None: the release (year or major, and minor) that built
    them."""
    only: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    """The systems and machines that there is a library for; None: any of the three systems, and the
    machine that it was built on, where its numbers were checked."""
    own_system: bool = False
    """Whether engines run on the system that they were built on alone."""
    glibc: str = "2.28"
    """That of the library's wheels (their tag is manylinux_2_28)."""
    driver: str | None = None
    """The oldest of NVIDIA's."""
    portable: tuple[str, ...] = ()
    """Compute capabilities that an engine for no card in particular runs on; empty: the one that
    it was built on."""


@dataclass(frozen=True)
class Backend:
    """What a backend accepts; the plan refuses the rest."""

    name: str
    form: Literal["onnx", "torch"]
    """What it builds from: an ONNX file, or the component as runners.engines.eager stores it."""
    dtypes: tuple[str, ...]
    """Legal compute dtypes, the first of which is what a profile's illegal one becomes."""
    library: str
    """The distribution whose version decides what comes out."""
    module: str
    formats: frozenset[str]
    """Of quantized layers (`Scheme.format`) that it reads; "keep" is read by all."""
    computes: frozenset[tuple[str, int]] = frozenset()
    """(format, weight's number of axes: 2 of a linear, 4 of a convolution) of the layers of which
    each must be seen to run on a low-bit kernel."""
    device: Literal["cpu", "gpu"] = "cpu"
    """What its engines run on."""
    capabilities: tuple[str, ...] = ()
    """Compute capabilities of the cards that it builds for without having one; empty: it builds
    for the machine it runs on."""
    zero_points: bool = True
    """Whether it takes quantizations around another code than 0."""
    int4_axes: frozenset[int] = frozenset({2, 4})
    """Axes of the weights that it takes in 4 bits."""
    factors: bool = True
    """Whether rounding the factors of attention's products lets it run them in 8 bits."""
    attention: Literal["fused", "blocks"] = "fused"
    """How products of attention are kept from filling their whole matrix: by the library itself, or
    in blocks by a kernel that the builder puts in place."""
    kernel_bytes: int = 0
    """Of an engine's files beside weights and graph."""
    low_bit_kernel_bytes: int = 0
    """And as many more where inputs are rounded."""
    build_memory: float = 0.0
    """Peak while building, as a multiple of the engine's bytes; 0: no more than the export."""
    weight_bytes: Mapping[str, float] = field(default_factory=dict)
    """Compute dtype -> bytes that an open engine holds for a float weight, what it reads and what
    its kernels want of it together; what isn't named takes its own size."""
    low_bit_copies: float = 1.0
    """Copies of a quantized weight that it holds."""
    expands: frozenset[str] = frozenset()
    """Formats whose weights become fp32 when an engine opens."""
    layer_bytes: int = 0
    """Of an open engine for each linear or convolution beside its weights: graph and kernels."""
    tiles: bool = True
    """Whether it builds the graphs of a VAE's two parts, for seamless tiles: four more packages of
    compiled code would take minutes, and on cards tiles are blended.
    """
    whole_forms: bool = False
    """Whether a form's file holds the weights once more."""
    compiler: bool = False
    """Whether it needs a C++ compiler where it builds."""
    runs: Runs = field(kw_only=True)


_INTEGERS = frozenset({"w8a16", "w8a8", "w4a16", "w4a16-zero-points"})
_ON_CARDS = frozenset({"w8a16", "w8a8", "w4a16", "fp8", "nvfp4"})
_FLOATS = frozenset({"fp8", "nf4", "nvfp4"})
_AS_THEY_COME = frozenset({"w8a16-dynamic", "llm-int8", "torchao-int8-dyn"})
INT8_PRODUCTS = _AS_THEY_COME | {"w8a8"}
"""Formats whose linears multiply int8 with int8."""
_CUDA_13 = "580"
"""The first driver for CUDA 13 (its release notes), which the wheels of both TensorRTs are built
for."""

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
            # 32 linears of 134 M weights: fp32 8.1 bytes; fp16 (how bf16 is stored) widened and
            # repacked 8.1; int8 2.1 to 2.2. Convolutions of 4 bits, or 8 alone, expand: a small
            # UNet took 4.4 (FACTS.md)
            weight_bytes={"fp32": 8.1, "bf16": 8.1},
            low_bit_copies=2.1,
            expands=frozenset({"w4a16", "w4a16-zero-points", "w8a16"}),
            layer_bytes=700_000,  # the reference model's engines: 114, 27 and 13 MB
            runs=Runs("minimum"),  # IR version 11 is read by every later release (so far)
        ),
        Backend(
            "onnxruntime",
            "onnx",
            ("fp32",),
            "onnxruntime",
            "optimizer.backends.onnxruntime",
            _INTEGERS,
            frozenset({("w4a16", 2), ("w4a16-zero-points", 2), ("w8a8", 2), ("w8a8", 4)}),
            attention="blocks",
            weight_bytes={"fp32": 8.0},  # the file in memory, and packed for its kernels
            low_bit_copies=2.0,
            runs=Runs("minimum"),  # an older one may lack an operator, or run it otherwise
        ),
        Backend(
            "tensorrt-rtx",
            "onnx",
            ("fp16", "bf16"),
            "tensorrt-rtx",
            "optimizer.backends.tensorrt",
            _ON_CARDS,
            frozenset({("w8a8", 2), ("w8a8", 4), ("fp8", 2), ("fp8", 4)}),
            device="gpu",
            capabilities=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
            zero_points=False,
            int4_axes=frozenset({2}),
            factors=False,
            kernel_bytes=20_000_000,
            low_bit_kernel_bytes=22_000_000,
            build_memory=3.2,
            tiles=False,
            whole_forms=True,
            runs=Runs(
                "exact",  # engines don't survive a release (FACTS.md)
                only=(("Linux", "Windows"), ("x86_64",)),  # the support matrix; portable over both
                driver=_CUDA_13,
                portable=("8.0", "8.6", "8.9", "12.0", "12.1"),  # the mask in such a file's header
            ),
        ),
        Backend(
            "tensorrt",
            "onnx",
            ("fp16", "bf16"),
            "tensorrt",
            "optimizer.backends.tensorrt",
            _ON_CARDS,
            frozenset({("w8a8", 2), ("w8a8", 4), ("fp8", 2), ("fp8", 4)}),
            device="gpu",
            zero_points=False,
            int4_axes=frozenset({2}),
            factors=False,
            kernel_bytes=20_000_000,
            low_bit_kernel_bytes=22_000_000,
            build_memory=3.2,
            tiles=False,
            whole_forms=True,
            runs=Runs("exact", own_system=True, driver=_CUDA_13),
        ),
        Backend(
            "onnxruntime-cuda",
            "onnx",
            ("fp16", "bf16"),
            "onnxruntime-gpu",
            "optimizer.backends.onnxruntime_cuda",
            frozenset({"w8a16", "w4a16"}),
            device="gpu",
            zero_points=False,
            int4_axes=frozenset({2}),
            factors=False,
            tiles=False,
            runs=Runs("minimum", driver=_CUDA_13),
        ),
        Backend(
            "aoti-cuda",
            "torch",
            ("bf16", "fp32"),
            "torch",
            "optimizer.backends.aoti_cuda",
            _INTEGERS | {"fp8"},
            device="gpu",
            factors=False,
            kernel_bytes=20_000_000,
            compiler=True,
            tiles=False,
            runs=Runs("exact", own_system=True, driver=_CUDA_13),
        ),
        Backend(
            "aoti",
            "torch",
            ("fp32", "bf16"),
            "torch",
            "optimizer.backends.aoti",
            _INTEGERS,
            frozenset({("w8a8", 2), ("w8a8", 4)}),
            factors=False,  # attention runs in one fused kernel of floats
            kernel_bytes=2_500_000,
            compiler=True,
            tiles=False,
            runs=Runs("exact", own_system=True),  # native code, against torch's own C interface
        ),
        Backend(
            "aoti-blocks",
            "torch",
            ("fp32", "bf16"),
            "torch",
            "optimizer.backends.aoti_blocks",
            _INTEGERS - {"w8a8"},
            factors=False,
            kernel_bytes=2_500_000,
            compiler=True,
            tiles=False,
            runs=Runs("exact", own_system=True),
        ),
        Backend(
            "eager",
            "torch",
            ("fp32", "bf16"),
            "torch",
            "optimizer.backends.eager",
            _INTEGERS | _FLOATS | _AS_THEY_COME,
            frozenset((name, 2) for name in _AS_THEY_COME),
            weight_bytes={"fp32": 8.0, "bf16": 4.0},  # the file, and the module's own
            low_bit_copies=2.0,
            runs=Runs("minimum", floor="2.11"),  # weights alone, for the code of any torch we take
        ),
    )
}


@dataclass(frozen=True)
class How:
    """What a builder needs to know beside the files."""

    backend: str
    dtype: str
    role: str
    wrapper: str
    """How the component is called: a name of runners.modules.WRAPPERS."""
    signature: Signature
    dynamic: bool = False
    """Whether the runtime may round inputs of 4-bit layers to 8 bits as they come."""
    capabilities: tuple[str, ...] = ()
    """Of the cards to build for; empty: whatever the backend's engines run on by themselves."""
    weight_streaming: bool = False
    """Whether weights may stay in the host's memory, where the card's is too small."""


@dataclass(frozen=True)
class Built:
    """What a builder wrote: files by their role in the backend, and the engine's properties."""

    files: dict[str, str]
    properties: dict[str, str | int | float | bool]
    low_bit_layers: int | None = None
    """How many linears and convolutions the builder says will run in 8 bits or fewer; None where
    the open engine is asked, or nobody knows."""


class Builder(Protocol):
    """The functions that a backend's file has."""

    def build(self, source: Path, out: Path, how: How, progress: Progress) -> Built:
        """Turn the files in `source` into an engine's files in `out`."""

    def build_form(self, source: Path, out: Path, how: How, name: str) -> Built:
        """The form `name` of the engine that `build` made in `out` from the same `source`."""

    def prove(self, source: Path, out: Path, how: How, name: str = "") -> dict[str, str]:
        """Write files of an ONNX Runtime engine (`graph`, `weights`) of the same graph as the
        engine's, or its form's, on which its numbers are proved where it can't run itself.

        Only of backends that build for cards that aren't there.
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
