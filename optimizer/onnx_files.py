"""ONNX files: parsed by onnx alone, weights read from their own folder only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir

from profiles.errors import SpecError

__all__ = ["external_files", "read_graph", "read_stored"]


def read_graph(path: Path) -> ir.Model:
    """The graph, its external weights not read yet; SpecError where it is damaged."""
    try:
        model = ir.from_proto(onnx.load(path, load_external_data=False))
    except Exception as error:  # the protobuf library's own type
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise SpecError(f"{path} is damaged ({first}): export or copy it again") from error
    if not len(model.graph):
        raise SpecError(f"{path} is damaged (it holds no graph): export or copy it again")
    return model


def read_stored(path: Path) -> ir.Model:
    """A graph of the store, whose weights are read when they are needed.

    Their file may be a hard link (optimizer.blobs), which onnx_ir refuses as a possible way out of
    the graph's folder, unless whoever reads names the file itself.
    """
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(_inside(path.absolute(), entry.value))
    return ir.from_proto(proto)


def external_files(path: Path) -> list[str]:
    """The files beside `path` that hold its tensors, by their location in it.

    Raises `SpecError` where the graph is damaged, or a file is missing, too short, a link or
    outside the graph's folder.
    """
    ends: dict[str, int] = {}
    for tensor in _external_tensors(read_graph(path)):
        location = str(tensor.location)
        ends[location] = max(ends.get(location, 0), (tensor.offset or 0) + tensor.nbytes)
    for location, end in ends.items():
        file = _inside(path, location)
        size = file.stat().st_size if file.is_file() else 0
        if size < end:
            raise SpecError(
                f"{file} is truncated or missing: {path.name} needs {end} bytes of it and it has "
                f"{size}; export or copy it again"
            )
    return sorted(ends)


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Of the graph, its subgraphs and functions; of initializers and attributes."""
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for root in graphs:
        for graph in (root, *root.subgraphs()):
            values = graph.initializers.values()
            tensors = [value.const_value for value in values]
            for node in graph:
                for attribute in node.attributes.values():
                    if attribute.type == ir.AttributeType.TENSOR:
                        tensors.append(attribute.value)
                    elif attribute.type == ir.AttributeType.TENSORS:
                        tensors += attribute.value
            yield from (tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor))


def _inside(path: Path, location: str) -> Path:
    """The file at `location`, which must lie in the graph's own folder and be no link."""
    parts = PurePosixPath(location).parts
    file = path.parent
    legal = bool(parts) and not set(location) & set("\\:\0") and not location.startswith("/")
    for part in parts if legal and ".." not in parts else ():
        file /= part
        if file.is_symlink():
            raise SpecError(
                f"{path} keeps weights in {location}, which is a link: put the file itself there"
            )
    if file == path.parent:
        raise SpecError(
            f"{path} keeps weights in {location!r}, outside its folder, where nothing is read: "
            "export it again"
        )
    return file
