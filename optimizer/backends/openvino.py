"""ONNX -> OpenVINO IR: the graph gzipped, the weights as OpenVINO's own constants file."""

from __future__ import annotations

import gzip
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from optimizer.backends import Built, How
from optimizer.backends.openvino_weights import share_weights
from optimizer.forms import form_graph
from optimizer.progress import Progress
from profiles.errors import BuildError

__all__ = ["FILES", "build", "build_form", "low_bit_layers", "properties", "save"]

FILES = {"graph": "graph.xml.gz", "weights": "weights.bin"}
"""What a file is to the engine -> its name."""

_PRECISION = {"fp32": "f32", "bf16": "bf16"}
_DYNAMIC_GROUP = 32
"""OpenVINO's own default."""
_HEAVY = {"Convolution", "FullyConnected"}
_LOW = {"i8", "u8", "i4", "u4"}


def build(source: Path, out: Path, how: How, progress: Progress) -> Built:  # noqa: ARG001
    """Write graph.xml.gz and weights.bin into `out`."""
    save(_read(source / "model.onnx"), out, dtype=how.dtype)
    return Built(files=dict(FILES), properties=properties(how.dtype, dynamic=how.dynamic))


def build_form(source: Path, out: Path, how: How, name: str) -> Built:
    """Write NAME.xml.gz into `out`, over the plain engine's constants."""
    graph = f"{name}.xml.gz"
    with TemporaryDirectory(dir=out) as folder:
        own = Path(folder)
        save(_read(source / form_graph(name)), own, dtype=how.dtype)
        shared = share_weights(
            gzip.decompress((own / FILES["graph"]).read_bytes()),
            own / FILES["weights"],
            gzip.decompress((out / FILES["graph"]).read_bytes()),
            out / FILES["weights"],
        )
    (out / graph).write_bytes(gzip.compress(shared, mtime=0))
    return Built(
        files={**FILES, "graph": graph}, properties=properties(how.dtype, dynamic=how.dynamic)
    )


def _read(path: Path) -> ov.Model:
    try:
        return ov.Core().read_model(path)
    except RuntimeError as error:
        raise BuildError(
            f"OpenVINO can't read the exported graph: {str(error).splitlines()[0]}", log=str(error)
        ) from error


def save(model: ov.Model, out: Path, *, dtype: str) -> None:
    """Write a model's files into `out`.

    Float constants are stored in 16 bits unless the engine computes in fp32: with 16-bit constants
    the CPU plugin would run convolutions in f16 even under an f32 hint (seen in its runtime graph).
    The graph is text and shrinks 20 times; for a small model it would be a fifth of the engine.
    """
    if dtype != "fp32":
        _halve_floats(model)
    ov.save_model(model, out / "model.xml", compress_to_fp16=False)
    graph = (out / "model.xml").read_bytes()
    (out / FILES["graph"]).write_bytes(gzip.compress(graph, mtime=0))
    (out / "model.xml").unlink()
    (out / "model.bin").rename(out / FILES["weights"])


def _halve_floats(model: ov.Model) -> None:
    """Store fp32 constants in 16 bits, but for scalars (activation scales need all their bits) and
    for those that 16 bits can't hold: too large, or so small that their digits would go.

    `save_model` would do it too, but leaves the floats of a model alone that has 4-bit constants
    or 8-bit weights (seen in its files).
    """
    from openvino import opset13

    for op in model.get_ops():
        if op.get_type_name() != "Constant" or op.get_element_type() != ov.Type.f32:
            continue
        values = op.data
        if values.size == 1 or not _fits_16_bits(values):
            continue
        readers = op.output(0).get_target_inputs()
        half = opset13.constant(values.astype(np.float16), name=op.get_friendly_name())
        widened = opset13.convert(half, "f32")
        for reader in readers:
            reader.replace_source_output(widened.output(0))


def _fits_16_bits(values: NDArray[np.float32]) -> bool:
    """Whether fp16 holds the largest value, and at least half of them to all of its 11 bits."""
    limits = np.finfo(np.float16)
    sizes = np.abs(values[values != 0])
    if sizes.size == 0:
        return True
    return bool(sizes.max() <= limits.max and np.median(sizes) >= limits.tiny)


def properties(dtype: str, *, dynamic: bool = False) -> dict[str, str | int | float | bool]:
    """The runtime properties that an engine of this dtype is opened with.

    OpenVINO rounds the inputs of compressed layers to 8 bits unless it is told not to.
    """
    return {
        "INFERENCE_PRECISION_HINT": _PRECISION[dtype],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": _DYNAMIC_GROUP if dynamic else 0,
    }


def low_bit_layers(engine: Any) -> int:
    """Convolutions and matrix products that the plugin runs on weights of 8 bits or fewer."""
    return sum(
        count
        for (kind, precision), count in engine.precisions().items()
        if kind in _HEAVY and precision in _LOW
    )
