"""OpenVINO on CPU: an IR whose weights are read from the very mapping that was hashed.

The IR is stored, not an exported blob: blobs are tied to one version and ISA, forget the precision
hint and swallow flipped bytes (FACTS.md).
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections import Counter, OrderedDict
from collections.abc import Mapping, Set
from typing import Any, final

import numpy as np
import openvino as ov
from openvino.preprocess import PrePostProcessor

from profiles.errors import BundleError
from runners.engines.base import Array, Engine
from runners.lora_inputs import UP, convolution_layers

__all__ = ["OpenVinoEngine"]

_PRECISION = "INFERENCE_PRECISION_HINT"
"""What products are computed in."""

_GRAPH_LIMIT = 1 << 28
"""No graph is larger than this when unpacked (a gzip bomb would be)."""

_SHAPES_KEPT = 2
"""Compiled shapes kept at once: a full batch and the last, smaller one."""


@final
class OpenVinoEngine(Engine):
    """files: `graph` (the IR's XML, gzip) and `weights`; properties: OpenVINO's own names.

    Each shape is compiled when it first comes (a static shape runs 10 % faster than a dynamic
    one, FACTS.md); the last two stay compiled.
    """

    compiles_shapes = True
    exhausted = ("bad_alloc", "failed to allocate", "cannot allocate memory", "out of memory")

    def _open(self) -> None:
        self._core = ov.Core()
        graph = _unpacked(bytes(self.files["graph"]))
        weights = np.frombuffer(self.files["weights"], dtype=np.uint8)
        try:
            self._model = self._core.read_model(graph, ov.Tensor(weights, shared_memory=True))
        except RuntimeError as error:
            raise BundleError(f"OpenVINO can't read the engine: {_first_line(error)}") from error
        ports = enumerate(self._model.inputs)
        self._places = {name: place for place, port in ports for name in port.get_names()}
        self._convolutions = convolution_layers(self.signature)
        free = self.signature.free
        self._low_rank = {s.name for s in self.signature.inputs if not free.isdisjoint(s.axes)}
        names = (spec.name for spec in self.signature.inputs)
        self._sized = [name for name in names if name not in self._low_rank]
        """The inputs whose shapes are compiled for."""
        self._bf16 = self.properties.get(_PRECISION) == "bf16"
        self._compiled: OrderedDict[tuple[Any, ...], ov.InferRequest] = OrderedDict()
        self._ready: dict[str, ov.Tensor] = {}
        self._ready_in: ov.InferRequest | None = None
        """The request that has what is held."""

    def _hold(self, feeds: Mapping[str, Array]) -> None:
        self._ready, self._ready_in = self._tensors(feeds), None

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        request = self._request(feeds)
        given = self._tensors({n: x for n, x in feeds.items() if n not in self._ready})
        if request is not self._ready_in:
            given |= self._ready
        # by place: names are looked for among all inputs, a LoRA's hundreds
        tensors = {self._places[name]: tensor for name, tensor in given.items()}
        request.infer(tensors, share_inputs=True, share_outputs=True)
        self._ready_in = request
        return {
            spec.name: np.array(request.get_output_tensor(i).data)
            for i, spec in enumerate(self.signature.outputs)
        }

    def _tensors(self, feeds: Mapping[str, Array]) -> dict[str, ov.Tensor]:
        """The library's own, over the arrays; low-rank inputs in what the engine computes in, or
        it would round them at each step.
        """
        return {
            name: _rounded(array)
            if self._bf16 and name in self._low_rank
            else ov.Tensor(array, shared_memory=array.flags.writeable)
            for name, array in feeds.items()
        }

    def _request(self, feeds: dict[str, Array]) -> ov.InferRequest:
        used = any(feeds[f"{layer}{UP}"].shape[0] for layer in self._convolutions)
        idle = frozenset() if used else self._convolutions
        key = (idle, *(feeds[name].shape for name in self._sized))
        if key not in self._compiled:
            while len(self._compiled) >= _SHAPES_KEPT:
                self._compiled.popitem(last=False)
            self._compiled[key] = self.compile(self._shapes(feeds, idle)).create_infer_request()
        self._compiled.move_to_end(key)
        return self._compiled[key]

    def _shapes(self, feeds: dict[str, Array], idle: frozenset[str]) -> dict[str, tuple[int, ...]]:
        """What is compiled for; -1 where a free dim is, which changes at no cost, and 0 where it
        belongs to an idle layer's part, which is left out.
        """
        free = self.signature.free
        return {
            spec.name: tuple(
                (0 if spec.name.rpartition(".")[0] in idle else -1) if axis in free else size
                for axis, size in zip(spec.axes, feeds[spec.name].shape, strict=True)
            )
            for spec in self.signature.inputs
        }

    def compile(self, shapes: dict[str, tuple[int, ...]]) -> ov.CompiledModel:
        """Select kernels for these input shapes, with every property set and read back.

        Low-rank parts of rank 0 are left out.
        """
        model = self._model.clone()
        _leave_out(model, {name for name, shape in shapes.items() if 0 in shape})
        model.reshape({name: list(shape) for name, shape in shapes.items()})
        if self._bf16:
            model = _taking_bf16(model, self._low_rank)
        config = {
            **self.properties,
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            compiled = self._core.compile_model(model, "CPU", config)
        except RuntimeError as error:
            raise BundleError(f"OpenVINO can't compile the engine: {_first_line(error)}") from error
        for name, value in self.properties.items():
            self._same(name, value, _readable(compiled.get_property(name)))
        return compiled

    def precisions(self) -> Counter[tuple[str, str]]:
        """(layer type, precision) -> count, from the plugin's runtime graph of the last shape."""
        request = next(reversed(self._compiled.values()))
        graph = request.get_compiled_model().get_runtime_model()
        return Counter(
            (str(info["layerType"].astype(str)), str(info["runtimePrecision"].astype(str)))
            for info in (node.get_rt_info() for node in graph.get_ops())
        )

    def _close(self) -> None:
        self._compiled.clear()
        self._ready, self._ready_in = {}, None
        del self._model


def _taking_bf16(model: ov.Model, inputs: Set[str]) -> ov.Model:
    """The model, to be given these inputs in bf16."""
    changed = PrePostProcessor(model)
    for name in inputs:
        changed.input(name).tensor().set_element_type(ov.Type.bf16)
    return changed.build()


def _rounded(array: Array) -> ov.Tensor:
    """A copy in bf16."""
    import torch

    bits = torch.from_numpy(array).bfloat16().view(torch.int16).numpy()
    tensor = ov.Tensor(ov.Type.bf16, list(array.shape))
    tensor.data[...] = bits.view(tensor.data.dtype)
    return tensor


def _leave_out(model: ov.Model, inputs: Set[str]) -> None:
    """Let layers whose low-rank part comes of these inputs give what they would without it."""
    for parameter in model.get_parameters():
        name = parameter.get_friendly_name()
        if name in inputs and name.endswith(UP):
            for added in _added(parameter):
                node = added.get_node()
                plain = node.input(1 - added.get_index()).get_source_output()
                for reader in node.output(0).get_target_inputs():
                    reader.replace_source_output(plain)


def _added(parameter: ov.Node) -> list[ov.Input]:
    """Where what comes of the parameter is added to something else."""
    found: dict[str, ov.Input] = {}
    waiting, seen = [parameter], set()
    while waiting:
        for reader in waiting.pop().output(0).get_target_inputs():
            node = reader.get_node()
            name = node.get_friendly_name()
            if node.get_type_name() == "Add":
                found[name] = reader
            elif name not in seen:
                seen.add(name)
                waiting.append(node)
    return list(found.values())


def _readable(value: object) -> object:
    """A property's value in the words that it is set with (types print as <Type: 'bfloat16'>)."""
    if isinstance(value, ov.Type):
        return {"bfloat16": "bf16", "float32": "f32", "float16": "f16"}.get(
            value.to_string(), value.to_string()
        )
    return value


def _unpacked(packed: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
            graph = stream.read(_GRAPH_LIMIT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BundleError(f"The engine's graph can't be unpacked: {error}.") from error
    if len(graph) > _GRAPH_LIMIT:
        raise BundleError(f"The engine's graph is larger than {_GRAPH_LIMIT} bytes: refused.")
    return graph


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[-1]
