"""ONNX -> an engine of TensorRT-RTX or TensorRT, for cards that needn't be in this machine.

The graph is narrowed first, with every type written out, and nothing is left to the builder's own
choice of precision. On a machine without a card, ONNX Runtime runs the graph that went in, in the
engine's place, when it is checked (`prove`).

A form (optimizer.forms) is an engine of its own, whose weights are in its file once more. Where all
weights are of floats and the library can replace them (TensorRT, which builds on the card itself;
TensorRT-RTX wants a driver where it builds such engines), LoRAs are added to the weights instead:
their form is the engine without them, with its weights beside it.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import onnx_ir as ir
import safetensors.numpy

from optimizer.backends import Built, How
from optimizer.forms import form_graph, prepared_forms
from optimizer.graph import fold_fp4
from optimizer.narrow import narrow
from optimizer.onnx_files import read_graph, read_stored
from optimizer.progress import Progress
from profiles.errors import BuildError
from runners.engines.tensorrt import LIBRARIES, card_capability, import_library
from runners.engines.tensorrt_plan import HEADER_BYTES, read_header
from runners.lora_inputs import LEAST_COMPILED_RANK, lora_targets
from runners.refitting import TRANSPOSED, weight_layer
from runners.signature import Dim, TensorSpec

__all__ = ["build", "build_form", "low_bit_layers", "mark_refitted", "prove", "refitted_weights"]

_GRAPH = "model.onnx"
_WEIGHTS = "weights.safetensors"
_LOW = {"Int8", "Int4", "FP8", "FP4"}
_PRODUCTS = {"MatMul", "Gemm", "Conv"}
_SHOWN = 5


def build(source: Path, out: Path, how: How, progress: Progress) -> Built:
    """Write engine.plan, exactly the builder's bytes.

    Raises BuildError with the library's own words.
    """
    return _build(source, out, how, "", progress)


def build_form(source: Path, out: Path, how: How, name: str) -> Built:
    """Write NAME.plan, or the weights that LoRAs are added to; raises as `build`."""
    rest = "+".join(part for part in name.split("+") if part != "lora")
    if rest == name or not refitted_weights(source, how):
        return _build(source, out, replace(how, signature=prepared_forms(source)[name]), name, None)
    if not (out / _plan_name(rest)).is_file():
        build_form(source, out, how, rest)
    if not (out / _WEIGHTS).is_file():
        _write_weights(source, out / _WEIGHTS, how)
    return Built({"engine": _plan_name(rest), "weights": _WEIGHTS}, _properties(how))


def _plan_name(form: str) -> str:
    return f"{form or 'engine'}.plan"


def _build(source: Path, out: Path, how: How, form: str, progress: Progress | None) -> Built:
    log, plan = _Log(), out / _plan_name(form)
    with TemporaryDirectory(dir=out) as private:
        graph = Path(private) / "narrow.onnx"
        products = _write_narrow(source / (form_graph(form) if form else _GRAPH), how, graph)
        gc.collect()  # graphs are full of cycles, and would keep the exported file mapped
        _build_plan(graph, how, log, progress, plan, refitted_weights(source, how))
    _check_header(plan, how)
    return Built(
        files={"engine": plan.name},
        properties=_properties(how),
        low_bit_layers=_seen_low_bits(log.lines, products),
    )


def _properties(how: How) -> dict[str, str | int | float | bool]:
    return {
        "library": LIBRARIES[how.backend].module,
        "version": str(import_library(how.backend).__version__),
        "capabilities": ",".join(how.capabilities or _own_card(how)),
        "weight_streaming": how.weight_streaming,
    }


def refitted_weights(source: Path, how: How) -> list[str]:
    """The names of the weights in the prepared graph that LoRAs are added to in the engine; none
    where the library can't replace them, they stream (nobody has tried both at once), or one of the
    layers that take LoRAs has no floats.
    """
    form = prepared_forms(source).get("lora")
    if form is None or how.weight_streaming or not LIBRARIES[how.backend].refits:
        return []
    there = read_graph(source / _GRAPH).graph.initializers
    floats = (name for name in there if name.removesuffix(TRANSPOSED).endswith(".weight"))
    found = {weight_layer(name): name for name in floats}
    targets = lora_targets(form)
    return [found[layer] for layer in targets] if targets.keys() <= found.keys() else []


def _write_weights(source: Path, path: Path, how: How) -> None:
    """The weights as the engine has them, to be added to."""
    model = read_stored(source / _GRAPH)
    narrow(model, how.dtype)
    tensors = {}
    for name in refitted_weights(source, how):
        weight = model.graph.initializers[name].const_value
        assert weight is not None
        tensors[name] = weight.numpy()
    safetensors.numpy.save_file(tensors, path)


def _own_card(how: How) -> tuple[str, ...]:
    """What an engine without a target is for: the card here, or any card."""
    return () if LIBRARIES[how.backend].cross else (card_capability(),)


def low_bit_layers(engine: Any) -> int | None:  # noqa: ARG001
    """None: a loaded engine doesn't say it of a card's kernels; the builder's log does."""
    return None


def _write_narrow(source: Path, how: How, path: Path) -> dict[str, bool]:
    """What the library gets; the products of quantized weights, as `_quantized_products` says."""
    model = read_stored(source)
    products = _quantized_products(model.graph)
    narrow(model, how.dtype)
    ir.save(model, path, external_data=f"{path.name}.data")
    return products


def prove(source: Path, out: Path, how: How, name: str = "") -> dict[str, str]:
    """Write the graph that the engine, or its form `name`, is built from, as far as ONNX Runtime
    has kernels on a processor: in fp16 where that is asked for, but bf16 as fp32, and e2m1 weights
    as what they stand for.
    """
    model = read_stored(source / (form_graph(name) if name else _GRAPH))
    fold_fp4(model)
    if how.dtype == "fp16":
        narrow(model, "fp16")
    path = out / "proof.onnx"
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    ir.save(model, path, external_data=data.name)
    data.touch()
    return {"graph": path.name, "weights": data.name}


def _quantized_products(graph: ir.Graph) -> dict[str, bool]:
    """Products whose weights are dequantized constants -> whether their inputs are rounded too."""
    found = {}
    for node in graph:
        if node.op_type in _PRODUCTS:
            sources = [_dequantized(value) for value in node.inputs[:2]]
            if any(value is not None and value.is_initializer() for value in sources):
                found[node.name or ""] = all(value is not None for value in sources)
    return found


def _dequantized(value: ir.Value | None) -> ir.Value | None:
    """The codes that a value is dequantized from, transposed or not."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Transpose", "Cast"):
        first = node.inputs[0]
        node = first.producer() if first is not None else None
    return node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None


class _Log:
    """What the builder says, kept: a line each, with its severity."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []

    def text(self) -> str:
        """The last lines, for `-v`."""
        return "\n".join([*self.lines[-200:], *self.errors])


def _build_plan(
    graph: Path,
    how: How,
    log: _Log,
    progress: Progress | None,
    out: Path,
    refitted: Sequence[str],
) -> None:
    """Read the graph, build, and write the engine to `out` as it comes: a copy of it in memory
    would be the peak. The weights called `refitted` can be replaced in it.
    """
    trt = import_library(how.backend)
    logger = _logger(trt, log)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        first = _parser_words(errors[0]) if errors else "no reason given"
        raise BuildError(f"{how.backend} can't read the exported graph: {first}.", log=log.text())
    _let_attention_decompose(trt, network)
    config = _configured(trt, builder, how)
    if refitted:
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
        mark_refitted(network, refitted)
    if progress is not None:
        config.progress_monitor = _monitor(trt, progress)
    with out.open("wb") as stream:
        writer = _writer(trt, stream)
        if not builder.build_serialized_network_to_stream(network, config, writer):
            words = "; ".join(log.errors[-_SHOWN:]) or "no reason given"
            raise BuildError(f"{how.backend} can't build {how.role}: {words}.", log=log.text())


def mark_refitted(network: Any, names: Sequence[str]) -> None:
    """Let the engine's weights of these names be replaced, and no others: what must be replaceable
    can't be folded into something else. BuildError where the network has none of that name.
    """
    for name in names:
        if not network.mark_weights_refittable(name):
            raise BuildError(f"The network has no weights called {name}: report the model.")


def _parser_words(error: Any) -> str:
    """What the parser found wrong, and where."""
    return f"{error.node_operator()} at {error.node_name()}: {error.desc()}"


def _configured(trt: Any, builder: Any, how: How) -> Any:
    """The builder's configuration: cards, shapes, and a description of every layer in the log."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if how.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if LIBRARIES[how.backend].cross:
        wanted = [getattr(trt.ComputeCapability, _sm(name)) for name in how.capabilities]
        config.num_compute_capabilities = len(wanted)
        for index, capability in enumerate(wanted):
            config.set_compute_capability(capability, index)
    for ranges in _profiles(how):
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in ranges.items():
            profile.set_shape(name, low, best, high)
        config.add_optimization_profile(profile)
    return config


def _writer(trt: Any, stream: BinaryIO) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def write(self, data: bytes) -> int:
            return stream.write(data)

    return Writer()


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Let attention that no dedicated kernel fits (small heads) run as its parts, not fail."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # how the bindings give the subclass
            layer.attention.decomposable = True


def _sm(capability: str) -> str:
    return "SM" + capability.replace(".", "")


def _logger(trt: Any, log: _Log) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            log.lines.extend(message.splitlines())
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                log.errors.append(message)

    return Logger()


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes on the steps of the outermost phase."""

        def __init__(self) -> None:
            super().__init__()
            self.outer: tuple[str, int] | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outer = (phase, max(1, steps))

        def step_complete(self, phase: str, step: int) -> bool:
            if self.outer is not None and phase == self.outer[0]:
                progress(step + 1, self.outer[1])
            return True

        def phase_finish(self, phase: str) -> None:
            if self.outer is not None and phase == self.outer[0]:
                progress(self.outer[1], self.outer[1])

    return Monitor()


Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def _profiles(how: How) -> Iterator[Shapes]:
    """Smallest, best and largest shape of every input; TensorRT tunes one more for the best alone.

    TensorRT-RTX compiles kernels for the shapes that come when it runs, so one is enough there.
    """
    signature = how.signature
    if LIBRARIES[how.backend].tunes_for_best:
        best = {dim.name: _limits(dim)[1] for dim in signature.dims}
        yield {spec.name: (_shape(spec, best),) * 3 for spec in signature.inputs}
    limits = [{d.name: _limits(d)[i] for d in signature.dims} for i in range(3)]
    yield {
        spec.name: (_shape(spec, limits[0]), _shape(spec, limits[1]), _shape(spec, limits[2]))
        for spec in signature.inputs
    }


_COMMON_RANK = 32


def _limits(dim: Dim) -> tuple[int, int, int]:
    if dim.free:  # each LoRA matrix's own
        return LEAST_COMPILED_RANK, _COMMON_RANK, dim.max
    return dim.nearest(dim.min), dim.nearest(dim.opt), dim.nearest(dim.max)


def _shape(spec: TensorSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes)


def _check_header(plan: Path, how: How) -> None:
    """Raise BuildError where the file says that it is for other cards than were asked for."""
    with plan.open("rb") as stream:
        header = read_header(stream.read(HEADER_BYTES))
    size = plan.stat().st_size
    if header is None or not LIBRARIES[how.backend].cross:
        return
    asked = (
        how.capabilities or header.capabilities
    )  # a portable one lists what it happens to run on
    if header.size != size or header.capabilities != asked:
        raise BuildError(
            f"{how.backend} wrote {size} bytes for {', '.join(asked)}, and the file says "
            f"{header.size} for {', '.join(header.capabilities)}: report the model."
        )


_LAYER = re.compile(
    r"Name: .*?, LayerType: \w+, Inputs: \[(?P<inputs>.*?)\], (?:Constants|Outputs): (?P<rest>.*)"
)
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_TYPE = re.compile(r"Datatype: (\w+)")


def _seen_low_bits(lines: list[str], products: Mapping[str, bool]) -> int | None:
    """How many of these products the builder gave a kernel of low bits.

    That reads 8-bit inputs where the product's are rounded, else weights of 8 or 4 bits as they are
    stored. From its description of the engine's layers, each with the nodes that went into it;
    None where the log has none.
    """
    described = [match for line in lines if (match := _LAYER.search(line)) is not None]
    if not described:
        return None
    low: set[str] = set()
    for match in described:
        rounded = not _LOW.isdisjoint(_TYPE.findall(match["inputs"]))
        stored = not _LOW.isdisjoint(_TYPE.findall(match["rest"].split("Outputs:")[0]))
        for name in _NODE.findall(match["rest"]):
            if name in products and (rounded if products[name] else stored):
                low.add(name)
    return len(low)
