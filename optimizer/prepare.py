"""One component: loaded, quantized, run as the oracle, exported to what its backend builds from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from optimizer.backends import backend
from optimizer.calls import (
    Call,
    load_calls,
    resized,
    save_calls,
    smallest_sizes,
    traced_sizes,
    unseen_sizes,
)
from optimizer.control_form import prepare_control
from optimizer.job import Job
from optimizer.load import load_module
from optimizer.lora_form import prepare_lora
from optimizer.numerics import EXACT_DB, worst_sqnr_db
from optimizer.plan import Plan
from optimizer.progress import Progress, Steps
from optimizer.quantize.apply import planned_layers, quantized_layers
from optimizer.record import load_statistics
from optimizer.tile_form import prepare_tiles
from runners.control_tasks import CONTROL
from runners.modules import WRAPPERS
from runners.part_names import AFTER
from runners.quantized import insert_quantized

__all__ = ["prepare", "run_module"]


@torch.inference_mode()
def run_module(wrapper: nn.Module, call: Call) -> Call:
    """The call with the outputs that `wrapper` gives."""
    outputs = wrapper(*(torch.from_numpy(array) for array in call.inputs))
    return Call(call.inputs, tuple(tensor.float().numpy() for tensor in outputs))


def prepare(
    plan: Plan,
    job: Job,
    recorded: Path,
    statistics: Path | None,
    covariances: Path | None,
    out: Path,
    progress: Progress,
) -> None:
    """Write what the backend builds from, unseen.safetensors, smallest.safetensors and info.json.

    unseen.safetensors holds fp32 calls at two sizes that are never traced, smallest.safetensors
    one at the least legal size; info.json what the quantized module (the oracle) loses on them and
    on the recorded calls. Progress counts layers and calls; the export, which can't be looked into,
    counts as much as all of them.
    """
    module = load_module(plan.source, job.spec.folder)
    wrapper = WRAPPERS[job.spec.wrapper](module)
    calls = load_calls(recorded / f"{job.spec.name}.safetensors")
    schemes = planned_layers(module, job.policy)
    steps = Steps(progress, 2 * (3 + len(schemes) + (3 + len(calls) if schemes else 0)))
    unseen = _unseen_calls(wrapper, job, list(calls.values()))
    save_calls(unseen, out / "unseen.safetensors")
    smallest = _resized_call(
        wrapper, job, next(iter(calls.values())), smallest_sizes(job.signature)
    )
    save_calls({"smallest": smallest}, out / "smallest.safetensors")
    steps.advance(len(unseen) + 1)
    if schemes:
        found = load_statistics(statistics, covariances) if statistics is not None else {}
        solver = job.policy.solver
        insert_quantized(module, quantized_layers(module, schemes, found, solver, steps.advance))
    exact = not schemes
    info = {
        "layers_quantized": len(schemes),
        "layers_total": job.layers_total,
        "sqnr_db": EXACT_DB if exact else _oracle_db(wrapper, calls, steps),
        "unseen_sqnr_db": {
            name: EXACT_DB if exact else _oracle_db(wrapper, {name: call}, steps)
            for name, call in unseen.items()
        },
        "smallest_sqnr_db": EXACT_DB if exact else _oracle_db(wrapper, {"": smallest}, steps),
    }
    (out / "info.json").write_text(json.dumps(info), "utf-8")
    if plan.source.kind == "onnx":
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copyfile(plan.source.folder / job.spec.name / name, out / name)
    elif backend(job.backend).form == "onnx":
        _export(wrapper, job, next(iter(calls.values())), out)
    else:
        _store(module, plan, job, out)
    with_graph = backend(job.backend).form == "onnx"
    if "lora" in job.forms:
        prepare_lora(module, job.signature, out, with_graph=with_graph)
    if CONTROL in job.forms:
        config = plan.source.checked_config(job.spec.folder)
        prepare_control(module, job, config, out, with_graph=with_graph)
    if AFTER in job.forms:
        prepare_tiles(module, job, out, with_graph=with_graph)


def _unseen_calls(wrapper: nn.Module, job: Job, calls: list[Call]) -> dict[str, Call]:
    """fp32 calls at two unseen sizes, made of recorded ones from inside the run."""
    sizes = unseen_sizes(job.signature)
    found = {}
    for number, (name, size) in enumerate(sizes.items(), start=1):
        picked = calls[len(calls) * number // (len(sizes) + 1)]
        found[name] = _resized_call(wrapper, job, picked, size)
    return found


def _resized_call(wrapper: nn.Module, job: Job, call: Call, size: Mapping[str, int]) -> Call:
    inputs = resized(call.inputs, job.signature, size)
    return run_module(wrapper, Call(tuple(inputs), ()))


def _oracle_db(wrapper: nn.Module, calls: Mapping[str, Call], steps: Steps) -> float:
    return worst_sqnr_db(
        (call.outputs, run_module(wrapper, call).outputs) for call in steps.counting(calls.values())
    )


def _export(wrapper: nn.Module, job: Job, call: Call, out: Path) -> None:
    from optimizer.export import export_onnx

    inputs = resized(call.inputs, job.signature, traced_sizes(job.signature))
    tensors = [torch.from_numpy(array) for array in inputs]
    export_onnx(wrapper, tensors, job.signature, out / "model.onnx")


def _store(module: nn.Module, plan: Plan, job: Job, out: Path) -> None:
    from runners.engines.eager import eager_state

    layers, state = eager_state(module)
    if job.dtype == "bf16":
        state = {
            name: tensor.bfloat16() if tensor.dtype == torch.float32 else tensor
            for name, tensor in state.items()
        }
    safetensors.torch.save_file(state, out / "weights.safetensors")
    config = plan.source.component_config(job.spec.folder)
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    (out / "layers.json").write_text(json.dumps(layers), "utf-8")
