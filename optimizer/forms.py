"""Forms of a component: the prepared graph once more, with further inputs, over the same weights.

A form is made from the prepared graph by adding to it, so the plain engine stays what it is to the
last byte, and each backend stores a form's graph alone: its weights are the plain engine's file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir

from optimizer.calls import Call
from optimizer.onnx_files import read_graph
from runners.control_tasks import CONTROL
from runners.engines.base import Array
from runners.part_names import PARTS
from runners.signature import Signature

__all__ = [
    "form_graph",
    "form_wrapper",
    "neutral_feeds",
    "prepared_forms",
    "save_form",
    "save_over",
    "share_tensors",
]

_FORMS = "forms.json"
_INLINE_BYTES = 1024
"""Tensors up to so many bytes are kept in a form's own graph."""


def form_graph(name: str) -> str:
    """The file of a form's prepared graph, beside the plain one."""
    return f"form-{name}.onnx"


def form_wrapper(wrapper: str, form: str) -> str:
    """The name in runners.modules.WRAPPERS that calls a component in a form, where `wrapper` calls
    the plain one. LoRA's inputs need no other.
    """
    changed = next((name for name in (CONTROL, *PARTS) if name in form.split("+")), None)
    return wrapper if changed is None else f"{wrapper}_{changed}"


def save_form(name: str, signature: Signature, out: Path, model: ir.Model | None = None) -> None:
    """Add a form to what is prepared in `out`.

    `model` is the graph where the backend builds from one: read by optimizer.onnx_files.read_graph
    from the plain graph, so that its weights are still those in the plain one's file.
    """
    if model is not None:
        ir.save(model, out / form_graph(name))
    there = {other: found.model_dump(mode="json") for other, found in prepared_forms(out).items()}
    document = {**there, name: signature.model_dump(mode="json")}
    (out / _FORMS).write_text(json.dumps(document), "utf-8")


def prepared_forms(prepared: Path) -> dict[str, Signature]:
    """The forms that were prepared, with their signatures."""
    path = prepared / _FORMS
    document = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return {name: Signature.model_validate(found) for name, found in document.items()}


def neutral_feeds(
    call: Call, plain: Signature, form: Signature, *, free: int = 0
) -> dict[str, Array]:
    """The call's inputs, and zeros for the further ones, whose free dims are of size `free`."""
    feeds = call.feeds(plain)
    sizes = {**plain.check(feeds), **dict.fromkeys(form.free, free)}
    sizes = {dim.name: dim.following(sizes) for dim in form.dims}
    for spec in form.inputs:
        if spec.name not in feeds:
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in spec.axes]
            feeds[spec.name] = np.zeros(shape, spec.dtype)
    return feeds


def save_over(model: ir.Model, out: Path, name: str, *, graph: str, weights: str) -> str:
    """Write NAME.onnx into `out`, over the tensors of the plain engine's `graph` there, which are
    in `weights`; what it is called.
    """
    plain = read_graph(out / graph)
    ir.external_data.set_base_dir(plain.graph, out)
    share_tensors(model, plain, out / weights)
    ir.save(model, out / f"{name}.onnx")
    return f"{name}.onnx"


def share_tensors(model: ir.Model, plain: ir.Model, weights: Path) -> None:
    """Let the tensors of `model` be those of `plain` in the file `weights`, where they are equal.

    Larger ones that aren't there are appended to the file.
    """
    known: dict[tuple[object, ...], ir.ExternalTensor] = {}
    for value in plain.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            known[_identity(value.const_value)] = value.const_value
    with weights.open("ab") as stream:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            if tensor.nbytes <= _INLINE_BYTES and not isinstance(tensor, ir.ExternalTensor):
                continue
            same = known.get(_identity(tensor))
            offset = stream.tell() if same is None else same.offset
            if same is None:
                stream.write(tensor.tobytes())
            value.const_value = ir.ExternalTensor(
                weights.name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=str(value.name),
                base_dir=weights.parent,
            )


def _identity(tensor: ir.TensorProtocol) -> tuple[object, ...]:
    digest = hashlib.sha256(tensor.tobytes()).digest()
    return (tensor.dtype, tuple(tensor.shape.numpy()), digest)
