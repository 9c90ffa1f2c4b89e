"""Further forms of a component: another graph over the weights of its plain engine, built and
checked. Those who use none pay nothing: the plain engine is the same with and without.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import psutil

from optimizer.backends import backend, builder
from optimizer.calls import Call, load_calls
from optimizer.check import engine_db, limit_db
from optimizer.control_graph import add_residuals
from optimizer.controlling import CONTROLLED_CALLS
from optimizer.numerics import EXACT_DB
from optimizer.plan import Job
from profiles.errors import ParityError
from runners.control_tasks import CONTROL
from runners.engines import engine_class
from runners.signature import Signature

__all__ = ["BUILT", "build_control"]

BUILT = "form.json"
"""What was built and measured."""

_GRAPH, _WEIGHTS = "model.onnx", "model.onnx.data"
_UNCALIBRATED_DB = 6.0
"""How much more than without residuals a quantized denoiser may lose with them, which its ranges
were not taken from."""
_PLAIN_CALLS = 2
"""Recorded calls that are repeated with residuals of zero."""


def build_control(
    job: Job, prepared: Path, engine: Path, recorded: Path, controlled: Path, out: Path
) -> None:
    """Build the form of a denoiser that takes control networks' residuals into `out`.

    `engine` is the plain one, over whose weights it runs. It is checked with residuals of zero on
    what the plain one was checked on, and with real ones on recorded calls. Raises ParityError
    where it is worse than it may be.
    """
    signature = job.forms[CONTROL]
    source = out / "source"
    source.mkdir()
    if backend(job.backend).form == "onnx":
        _write_graph(prepared, source, signature)
    how = job.how_form(CONTROL)
    built = builder(job.backend).build_form(source, engine, out, how)
    shutil.rmtree(source)
    files = {role: _where(name, out, engine) for role, name in built.files.items()}
    opened = engine_class(job.backend)(
        {role: bytearray(path.read_bytes()) for role, path in files.items()},
        signature=signature,
        properties=built.properties,
        threads=psutil.cpu_count(logical=False) or 1,
    )
    oracle = json.loads((prepared / "info.json").read_text("utf-8"))
    calls = load_calls(recorded / f"{job.spec.name}.safetensors")
    some = dict(list(calls.items())[:_PLAIN_CALLS])
    with opened as live:
        for name, call in load_calls(prepared / "unseen.safetensors").items():
            db = engine_db(live, [_without(call, job.signature, signature)])
            _require(job, f"residuals of zero at {name}", db, oracle["unseen_sqnr_db"][name])
        db = engine_db(live, [_without(c, job.signature, signature) for c in some.values()])
        _require(job, "residuals of zero on recorded runs", db, oracle["sqnr_db"])
        real = engine_db(live, load_calls(controlled / CONTROLLED_CALLS).values())
    oracle_db = oracle["sqnr_db"]
    lenient = oracle_db if oracle_db == EXACT_DB else oracle_db - _UNCALIBRATED_DB
    _require(job, "recorded residuals", real, lenient)
    document = {"files": built.files, "properties": built.properties, "sqnr_db": real}
    (out / BUILT).write_text(json.dumps(document), "utf-8")


def _where(name: str, out: Path, engine: Path) -> Path:
    return out / name if (out / name).is_file() else engine / name


def _write_graph(prepared: Path, source: Path, signature: Signature) -> None:
    """Write the form's graph, whose weights are those of the plain one, into `source`."""
    model = ir.from_proto(onnx.load(prepared / _GRAPH, load_external_data=False))
    add_residuals(model, signature)
    onnx.save(ir.to_proto(model), source / _GRAPH)
    try:
        os.link(prepared / _WEIGHTS, source / _WEIGHTS)
    except OSError:
        shutil.copyfile(prepared / _WEIGHTS, source / _WEIGHTS)


def _without(call: Call, plain: Signature, form: Signature) -> Call:
    """The plain call, with residuals of zero."""
    sizes = plain.check(call.feeds(plain))
    sizes = {dim.name: dim.following(sizes) for dim in form.dims}
    more = form.inputs[len(plain.inputs) :]
    zeros = [np.zeros(_shape(spec.axes, sizes), np.float32) for spec in more]
    return Call((*call.inputs, *zeros), call.outputs)


def _shape(axes: tuple[int | str, ...], sizes: Mapping[str, int]) -> tuple[Any, ...]:
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)


def _require(job: Job, where: str, db: float, oracle_db: float) -> None:
    limit = limit_db(oracle_db, job.dtype)
    if not db >= limit:
        raise ParityError(
            f"The {job.backend} engine of {job.spec.name} for control networks reaches {db:.1f} dB "
            f"SQNR with {where}, and {limit:.1f} dB are needed: compile with --dtype fp32 or "
            "another --backend, and report the model."
        )
