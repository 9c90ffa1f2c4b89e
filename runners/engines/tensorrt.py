"""TensorRT and TensorRT-RTX on an NVIDIA card: an engine from verified bytes, on torch's tensors.

The two libraries have one API; what differs is data (`LIBRARIES`). All engines of a process take
their scratch memory from one arena, because a pipeline runs one of them at a time: its size is the
largest need, not the sum.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, final

import platformdirs
import torch
from torch import Tensor

from profiles.errors import (
    BundleError,
    DeviceMismatch,
    MissingError,
    OutOfMemory,
)
from profiles.target import sm
from runners.engines.base import DeviceEngine, Properties
from runners.engines.tensorrt_plan import read_header
from runners.lora_inputs import compiled_rank_tensors
from runners.refitting import Refitting

__all__ = ["LIBRARIES", "Library", "TensorRtEngine", "card_capability", "import_library"]


@dataclass(frozen=True)
class Library:
    """One of the two libraries, where they differ."""

    module: str
    distribution: str
    cross: bool
    """Whether it builds for cards that aren't there, and says in an engine's header for which."""
    tunes_for_best: bool
    """Whether kernels are chosen when it builds, so that the commonest shape gets its own."""
    compiles_at_run: bool
    """Whether kernels are compiled when an engine first runs (kept in the user's cache), and the
    library itself records CUDA graphs; else torch does."""
    refits: bool
    """Whether its engines' weights can be replaced: TensorRT-RTX 1.7 needs a driver to build such
    engines, and ours are built for cards that aren't there."""


_TYPES = {torch.float16: "HALF", torch.bfloat16: "BF16", torch.float32: "FLOAT"}
"""Of weights that can be replaced -> the library's DataType."""

LIBRARIES = {
    "tensorrt-rtx": Library(
        "tensorrt_rtx",
        "tensorrt-rtx",
        cross=True,
        tunes_for_best=False,
        compiles_at_run=True,
        refits=False,
    ),
    "tensorrt": Library(
        "tensorrt",
        "tensorrt",
        cross=False,
        tunes_for_best=True,
        compiles_at_run=False,
        refits=True,
    ),
}
"""Backend -> its library."""


def import_library(backend: str) -> Any:
    """The library's module; ImportError where it isn't installed."""
    return import_module(LIBRARIES[backend].module)


class _Arena:
    """Scratch memory on the card that all engines share; it grows and never shrinks."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self.generation = 0
        """Counts growths: whoever holds the address must take it again."""

    def at_least(self, size: int) -> tuple[int, int]:
        """Address and size in bytes of enough memory."""
        if self._memory is None or self._memory.numel() < size:
            self._memory = None  # given back first: both at once might not fit
            self._memory = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
            self.generation += 1
        return self._memory.data_ptr(), self._memory.numel()


_ARENA = _Arena()


@final
class TensorRtEngine(DeviceEngine):
    """files: `engine`. Properties: `library`, `version`, `capabilities`, `weight_streaming`.

    With a file `weights` (safetensors, by their names in the graph) low-rank inputs are added to
    these of its weights when they are held.
    Raises DeviceMismatch where the library's version, or the card, isn't what the engine is for.
    """

    exhausted = ("out of memory", "outofmemory", "cuda error 2")

    @classmethod
    def usable_here(cls, properties: Properties) -> bool:
        """Whether there is a card, of an architecture that the engine was built for."""
        if not torch.cuda.is_available():
            return False
        built_for = _capabilities(properties)
        return not built_for or card_capability() in built_for

    @classmethod
    def require_here(cls, properties: Properties) -> None:
        """Raise DeviceMismatch, with both values, for another version or card."""
        trt, wanted = _imported(properties), str(properties["version"])
        if str(trt.__version__) != wanted:
            raise DeviceMismatch(
                f"The engine was built by {properties['library']} {wanted} and {trt.__version__} "
                "is installed: install that version, or compile the bundle again."
            )
        if cls.usable_here(properties):
            return
        built_for = ", ".join(map(sm, _capabilities(properties))) or "any NVIDIA card"
        if not torch.cuda.is_available():
            raise DeviceMismatch(
                f"The engine was built for {built_for}, and no NVIDIA card is usable here: check "
                "the driver with nvidia-smi, or compile for this machine without --target."
            )
        raise DeviceMismatch(
            f"The engine was built for {built_for}, and the card here is {sm(card_capability())} "
            f"({torch.cuda.get_device_name()}): compile with --target {sm(card_capability())}."
        )

    def machine(self) -> str:
        """The card and torch's version, which brings CUDA's libraries."""
        card, architecture = torch.cuda.get_device_name(), sm(card_capability())
        return f"{card} ({architecture}, torch {torch.__version__})"

    def _open(self) -> None:
        library, trt = _library(self.properties), _imported(self.properties)
        self.require_here(self.properties)
        self._require_whole()
        self._words: list[str] = []
        self._trt, self._library, self._logger = trt, library, _logger(trt, self._words)
        runtime = trt.Runtime(self._logger)
        runtime.engine_host_code_allowed = False
        self._engine = self._made(runtime.deserialize_cuda_engine(self.files["engine"]), "load")
        self._runtime = runtime
        if self.properties["weight_streaming"]:
            self._stream_weights()
        self._context = self._made(self._create_context(), "prepare")
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._bound: tuple[Any, ...] = ()
        self._graph: Any = None
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        weights = self.files.get("weights")
        self._refitting = None if weights is None else Refitting(weights, self.signature)

    def _require_whole(self) -> None:
        """Raise BundleError where the file's own header and the manifest contradict."""
        plan, wanted = self.files["engine"], str(self.properties["version"])
        header = read_header(plan)
        if header is not None and (header.version, header.size) != (wanted, len(plan)):
            raise BundleError(
                f"The engine's file says version {header.version} and {header.size} bytes, the "
                f"manifest {wanted} and {len(plan)}: compile the bundle again."
            )

    def _made(self, found: Any, what: str) -> Any:
        """What the library gave; BundleError with its own words where that is nothing."""
        if found is None:
            words = "; ".join(self._words[-3:]) or "no reason given"
            raise BundleError(f"{self.properties['library']} can't {what} the engine: {words}.")
        return found

    def _stream_weights(self) -> None:
        """Keep as many weights on the card as fit beside what the engine needs to run."""
        free, _ = torch.cuda.mem_get_info()
        room = max(0, free - int(1.1 * self._engine.device_memory_size_v2))
        self._engine.weight_streaming_budget_v2 = min(self._engine.streamable_weights_size, room)

    def _create_context(self) -> Any:
        trt = self._trt
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self._library.compiles_at_run:
            self._kernels = config.create_runtime_cache()
            if (path := self._kernels_path()).is_file():
                self._kernels.deserialize(path.read_bytes())
            config.set_runtime_cache(self._kernels)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self._engine.create_execution_context(config)

    def _kernels_path(self) -> Path:
        """The user's own cache of compiled kernels, one for each version and architecture."""
        root = Path(os.environ.get("KILN_CACHE") or platformdirs.user_cache_path("kiln"))
        name = f"{self._library.distribution}-{self._trt.__version__}-{sm(card_capability())}"
        return root / "kernels" / name

    def _hold(self, feeds: Mapping[str, Tensor]) -> None:
        if self._refitting is not None:
            self._refit(self._refitting, feeds)

    def _refit(self, refitting: Refitting, feeds: Mapping[str, Tensor]) -> None:
        """Let the engine's weights be those to which these are added; BundleError where it refuses.

        What the library fused with a changed weight is given again, unchanged. A recorded graph may
        have read weights where they no longer are: it is recorded anew.
        """
        changed = refitting.changes(feeds)
        if not changed:
            return
        refitter = self._trt.Refitter(self._engine, self._logger)
        self._give(refitter, changed)
        beside = set(refitter.get_missing_weights()) & refitting.stored.keys()
        self._give(refitter, {name: refitting.stored[name] for name in beside})
        torch.cuda.synchronize()  # no step reads the old ones, and all sums are made
        if not refitter.refit_cuda_engine():
            self._made(None, "refit")
        self._bound, self._graph = (), None

    def _give(self, refitter: Any, weights: Mapping[str, Tensor]) -> None:
        """Let the refitter know weights, which stay where they are until it is done with them."""
        for name, tensor in weights.items():
            kind = getattr(self._trt.DataType, _TYPES[tensor.dtype])
            given = self._trt.Weights(kind, tensor.data_ptr(), tensor.numel())
            where = getattr(self._trt.TensorLocation, "DEVICE" if tensor.is_cuda else "HOST")
            if not refitter.set_named_weights(name, given, where):
                self._made(None, f"replace {name} in")

    def _run_tensors(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._refitting is not None:
            if not self._refitting.inputs <= self.held.keys():
                self._refit(self._refitting, feeds)
            feeds = {n: x for n, x in feeds.items() if n not in self._refitting.inputs}
        feeds = compiled_rank_tensors(feeds, self.signature)
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in feeds.items())
        caller = torch.cuda.current_stream()
        with torch.cuda.stream(self._stream):
            self._stream.wait_stream(caller)
            if self._bound != (shapes, _ARENA.generation):
                self._bind(feeds)
                self._bound = (shapes, _ARENA.generation)
                self._graph = None if self._library.compiles_at_run else self._recorded()
            for name, tensor in feeds.items():  # a captured graph reads fixed addresses
                self._inputs[name].copy_(tensor, non_blocking=True)
            if self._graph is None:
                self._enqueue()
            else:
                self._graph.replay()
            found = {name: tensor.clone() for name, tensor in self._outputs.items()}
        caller.wait_stream(self._stream)
        return found

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            words = "; ".join(self._words[-3:]) or "no reason given"
            raise BundleError(f"{self.properties['library']} can't run the engine: {words}.")

    def _recorded(self) -> Any:
        """The engine's work for the bound shapes as a CUDA graph; it has to run once before."""
        self._enqueue()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._enqueue()
        return graph

    def _bind(self, feeds: Mapping[str, Tensor]) -> None:
        """Fixed buffers for these shapes, and scratch memory of the size that they need."""
        context = self._context
        self._choose_profile(feeds)
        self._inputs = {name: torch.empty_like(x, device="cuda") for name, x in feeds.items()}
        for name, buffer in self._inputs.items():
            context.set_input_shape(name, tuple(buffer.shape))
            context.set_tensor_address(name, buffer.data_ptr())
        try:
            address, size = _ARENA.at_least(context.update_device_memory_size_for_shapes())
            context.set_device_memory(address, size)
            self._outputs = {}
            for spec in self.signature.outputs:
                shape = tuple(context.get_tensor_shape(spec.name))
                buffer = torch.empty(shape, dtype=getattr(torch, spec.dtype), device="cuda")
                context.set_tensor_address(spec.name, buffer.data_ptr())
                self._outputs[spec.name] = buffer
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info()
            raise OutOfMemory(
                f"The card has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, and the engine "
                "needs more for this size: close other programs, or take a smaller size or batch."
            ) from error

    def _choose_profile(self, feeds: Mapping[str, Tensor]) -> None:
        """The first of the engine's profiles that has these shapes: the best one comes first."""
        for index in range(self._engine.num_optimization_profiles):
            if all(
                low <= size <= high
                for name, tensor in feeds.items()
                for low, size, high in _sides(self._engine, name, index, tensor)
            ):
                self._context.set_optimization_profile_async(index, self._stream.cuda_stream)
                return

    def _close(self) -> None:
        if self._library.compiles_at_run:
            _replace(self._kernels_path(), bytes(self._kernels.serialize()))
        self._inputs, self._outputs, self._bound = {}, {}, ()
        self._graph = None
        del self._context, self._engine, self._runtime, self._refitting


def _library(properties: Properties) -> Library:
    """The library that the manifest names; BundleError where it isn't one of ours."""
    for library in LIBRARIES.values():
        if library.module == properties["library"]:
            return library
    raise BundleError(f"The engine names the library {properties['library']}: nothing is loaded.")


def _imported(properties: Properties) -> Any:
    """The library's module; MissingError, with the command that installs it, where it is absent."""
    library = _library(properties)
    try:
        return import_module(library.module)
    except ImportError as error:
        raise MissingError(
            f"The engine needs {library.distribution}, which isn't installed: run pip install "
            f'"{library.distribution}=={properties["version"]}".'
        ) from error


def _capabilities(properties: Properties) -> list[str]:
    """Of the cards that the engine was built for; none is any card."""
    return [name for name in str(properties["capabilities"]).split(",") if name]


def card_capability() -> str:
    """The compute capability of the card here, "8.6"."""
    return ".".join(str(number) for number in torch.cuda.get_device_capability())


def _sides(engine: Any, name: str, index: int, tensor: Tensor) -> list[tuple[int, int, int]]:
    low, _, high = engine.get_tensor_profile_shape(name, index)
    return list(zip(tuple(low), tuple(tensor.shape), tuple(high), strict=True))


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_bytes(content)
    fresh.replace(path)


def _logger(trt: Any, words: list[str]) -> Any:
    """Keeps what the library says of errors; its warnings are about how engines were built."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                words.append(message)

    return Logger()
