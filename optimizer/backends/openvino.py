"""ONNX -> OpenVINO IR: the graph gzipped, the weights as OpenVINO's own constants file."""

from __future__ import annotations

import gzip
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from optimizer.backends import Built, How
from optimizer.backends.sharing import require_shared
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
    try:
        model = ov.Core().read_model(source / "model.onnx")
    except RuntimeError as error:
        raise BuildError(
            f"OpenVINO can't read the exported graph: {str(error).splitlines()[0]}", log=str(error)
        ) from error
    save(model, out, dtype=how.dtype)
    return Built(files=dict(FILES), properties=properties(how.dtype, dynamic=how.dynamic))


def build_form(source: Path, engine: Path, out: Path, how: How) -> Built:
    """Write a graph into `out` whose constants lie in the weights of the engine in `engine`."""
    made = out / "form"
    made.mkdir()
    save(ov.Core().read_model(source / "model.onnx"), made, dtype=how.dtype)
    graph = _unpacked(made / FILES["graph"])
    places = _places(_unpacked(engine / FILES["graph"]), engine / FILES["weights"])
    require_shared(_moved(graph, made / FILES["weights"], places))
    raw = ElementTree.tostring(graph.getroot(), encoding="utf-8", xml_declaration=True)
    (out / _FORM_GRAPH).write_bytes(gzip.compress(raw, mtime=0))
    shutil.rmtree(made)
    files = {**FILES, "graph": _FORM_GRAPH}
    return Built(files=files, properties=properties(how.dtype, dynamic=how.dynamic))


_FORM_GRAPH = "graph-control.xml.gz"


def _unpacked(path: Path) -> ElementTree.ElementTree[ElementTree.Element]:
    root = ElementTree.fromstring(gzip.decompress(path.read_bytes()))
    return ElementTree.ElementTree(root)


def _constants(
    graph: ElementTree.ElementTree[ElementTree.Element], weights: Path
) -> Iterator[tuple[ElementTree.Element, bytes]]:
    """The place of every constant in an IR's graph, and the digest of its bytes."""
    whole = np.memmap(weights, np.uint8, "r")
    for layer in graph.iter("layer"):
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None:
            start, size = int(data.attrib["offset"]), int(data.attrib["size"])
            yield data, hashlib.sha256(whole[start : start + size]).digest()


def _places(graph: ElementTree.ElementTree[ElementTree.Element], weights: Path) -> dict[bytes, str]:
    """Digest -> where these bytes lie in the weights."""
    return {found: data.attrib["offset"] for data, found in _constants(graph, weights)}


def _moved(
    graph: ElementTree.ElementTree[ElementTree.Element], weights: Path, places: dict[bytes, str]
) -> int:
    """Let the graph's constants lie at these places; the bytes of those that lie nowhere."""
    missing = 0
    for data, found in _constants(graph, weights):
        if found in places:
            data.set("offset", places[found])
        else:
            missing += int(data.attrib["size"])
    return missing


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
