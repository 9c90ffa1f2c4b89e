"""Measured sensitivities: one layer quantized at a time, the denoiser run on recorded calls.

It stays cheap because (a) the calls run as one batch, (b) whatever runs before the layer's block
is replayed from memory (optimizer/replay.py), half of the work on average, and (c) a large model is
run at half its native side, on fewer calls, without the unconditional half and with fewer schemes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from optimizer.backends import backend
from optimizer.calls import Call
from optimizer.job import Job
from optimizer.load import load_module
from optimizer.numerics import Sqnr
from optimizer.plan import Plan
from optimizer.progress import Progress, Steps
from optimizer.quantize.apply import quantizable_layers, quantized_layer
from optimizer.quantize.observe import LayerStatistics
from optimizer.quantize.policy import legal_scheme
from optimizer.quantize.schemes import W8A8, Scheme
from optimizer.quantize.sensitivity import SENSITIVITY_NAME, LayerLosses, Loss, Sensitivity
from optimizer.record import load_statistics, trial_calls
from optimizer.replay import Replay
from optimizer.sizes import LARGE
from runners.modules import WRAPPERS
from runners.quantized import insert_quantized

__all__ = ["measure"]

_LARGE_CALLS = 3


def measure(
    plan: Plan,
    job: Job,
    recorded: Path,
    statistics: Path,
    covariances: Path | None,
    partial: Path,
    out: Path,
    progress: Progress,
) -> None:
    """Write sensitivity.json into `out`; `partial` holds finished layers, should this be killed."""
    call = batched(_chosen(trial_calls(plan, recorded), job))
    module = load_module(plan.source, job.spec.folder)
    wrapper = WRAPPERS[job.spec.wrapper](module)
    found = load_statistics(statistics, covariances)
    layers = quantizable_layers(module)
    done = _finished(partial)
    steps = Steps(progress, len(layers))
    replay = Replay(wrapper, module, call)
    with partial.open("a", encoding="utf-8") as stream:
        for name, layer in layers.items():
            if name not in done:
                done[name] = _losses(name, layer, module, replay, (job, found))
                stream.write(json.dumps([name, done[name].model_dump(mode="json")]) + "\n")
                stream.flush()
            steps.advance()
    document = Sensitivity(
        model_digest=plan.source.digest,
        component=job.spec.name,
        solver=job.policy.solver,
        calls=len(call.inputs[0]),
        layers={name: done[name] for name in layers},
    )
    (out / SENSITIVITY_NAME).write_text(document.model_dump_json(indent=1), "utf-8")


def _losses(
    name: str,
    layer: nn.Linear | nn.Conv2d,
    module: nn.Module,
    replay: Replay,
    how: tuple[Job, Mapping[str, LayerStatistics]],
) -> LayerLosses:
    job, found = how
    shape = tuple(layer.weight.shape)
    losses = []
    for scheme in _fitting(name, shape, job):
        rounded = quantized_layer(name, layer, scheme, found, job.policy.solver)
        insert_quantized(module, {name: rounded})
        try:
            pooled = Sqnr()
            pooled.add(replay.output, replay.run_from(name))
        finally:
            _put_back(module, name, layer)
        losses.append(Loss(scheme=scheme, noise=pooled.error / pooled.signal))
    return LayerLosses(shape=shape, losses=tuple(losses))


def _fitting(name: str, shape: tuple[int, ...], job: Job) -> list[Scheme]:
    """The candidates as this layer can have them, each once; factors get their outputs rounded."""
    found: list[Scheme] = []
    for scheme in job.candidates:
        fitted = scheme.fitted(shape)
        if isinstance(fitted, W8A8) and any(fnmatchcase(name, p) for p in job.spec.factors):
            fitted = legal_scheme(W8A8(output=True), backend(job.backend))
        if fitted not in found:
            found.append(fitted)
    return found


def _put_back(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, layer)


def _chosen(calls: list[Call], job: Job) -> list[Call]:
    """All calls; of a large model some, and their last (conditional) half."""
    if job.parameters <= LARGE:
        return calls
    some = calls[:: max(1, len(calls) // _LARGE_CALLS)][:_LARGE_CALLS]
    return [Call(tuple(array[len(array) // 2 :] for array in call.inputs), ()) for call in some]


def batched(calls: Sequence[Call]) -> Call:
    """Several calls' inputs as one call."""
    inputs: tuple[Any, ...] = tuple(
        np.concatenate(arrays) for arrays in zip(*(call.inputs for call in calls), strict=True)
    )
    return Call(inputs, ())


def _finished(partial: Path) -> dict[str, LayerLosses]:
    """What an earlier, killed run wrote; a last line cut short is left out."""
    found = {}
    if partial.is_file():
        for line in partial.read_text("utf-8").splitlines():
            try:
                name, losses = json.loads(line)
            except ValueError:
                break
            found[name] = LayerLosses.model_validate(losses)
    return found
