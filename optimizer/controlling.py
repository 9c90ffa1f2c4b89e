"""Recorded calls of control networks, and of the denoiser with the residuals that they give.

Made of the recorded runs: their latents, times and prompts, and the edges of their pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from optimizer.calls import Array, Call, load_calls, save_calls
from optimizer.job import Job
from optimizer.load import load_module
from optimizer.plan import Plan
from optimizer.progress import Progress, Steps
from runners.control_tasks import CONTROL
from runners.controls import ControlledUNet, ControlNet, cells_of
from runners.signature import Signature

__all__ = ["CONTROLLED_CALLS", "record_controls"]

CONTROLLED_CALLS = f"denoiser-{CONTROL}.safetensors"
"""Calls of the denoiser with residuals."""

_CALLS = 8
"""Of each control network, evenly spread over the recorded ones."""
_CONTROLLED = 4
"""Of the denoiser with residuals, which take up ten times the latents' room."""
_EDGES = 0.9
"""The share of a picture's pixels that aren't edges."""


def record_controls(plan: Plan, recorded: Path, out: Path, progress: Progress) -> None:
    """Write NAME.safetensors of each control network and those of the controlled denoiser."""
    denoiser = plan.denoiser
    calls = list(load_calls(recorded / f"{denoiser.spec.name}.safetensors").values())
    pictures = [
        call.inputs[0] for call in load_calls(recorded / "vae_encoder.safetensors").values()
    ]
    count = min(_CALLS, len(calls))
    chosen = [i * len(calls) // count for i in range(count)]
    jobs = [job for job in plan.jobs if job.spec.role == "controlnet"]
    steps = Steps(progress, len(jobs) * len(chosen) + _CONTROLLED)
    given: dict[int, tuple[Array, ...]] = {}
    for job in jobs:
        module = ControlNet(load_module(plan.source, job.spec.folder))
        found = {}
        for index in steps.counting(chosen):
            feeds = calls[index].feeds(denoiser.signature)
            picture = pictures[index * len(pictures) // len(calls)]
            inputs = _control_inputs(job, feeds, picture)
            found[index] = _called(module, inputs)
            given.setdefault(index, found[index].outputs)
        save_calls(
            {f"{i:04}": call for i, call in found.items()}, out / f"{job.spec.name}.safetensors"
        )
        del module
    unet = ControlledUNet(load_module(plan.source, denoiser.spec.folder))
    some = chosen[:: max(1, len(chosen) // _CONTROLLED)][:_CONTROLLED]
    with_residuals = {
        f"{i:04}": _called(unet, (*calls[i].inputs, *given[i])) for i in steps.counting(some)
    }
    save_calls(with_residuals, out / CONTROLLED_CALLS)


@torch.inference_mode()
def _called(module: nn.Module, inputs: Sequence[Array]) -> Call:
    outputs = module(*(torch.from_numpy(array) for array in inputs))
    return Call(tuple(inputs), tuple(tensor.numpy() for tensor in outputs))


def _control_inputs(job: Job, feeds: Mapping[str, Array], picture: Array) -> tuple[Array, ...]:
    """The network's inputs in a call of the denoiser: `feeds`, and edges of a picture."""
    cells = _edge_cells(picture, job.signature, feeds["sample"].shape)
    channels = _channels(job.signature, "sample")
    own = {
        **feeds,
        "sample": feeds["sample"][:, :channels],  # an inpainting UNet takes more
        "controlnet_cells": cells,
        "conditioning_scale": np.ones(1, np.float32),
    }
    return tuple(np.ascontiguousarray(own[spec.name]) for spec in job.signature.inputs)


def _edge_cells(picture: Array, signature: Signature, latents: tuple[int, ...]) -> Array:
    """White edges on black of a picture [1, 3, height, width] in -1..1, as cells under latents."""
    grey = picture[0].mean(axis=0)
    slope = np.abs(np.gradient(grey, axis=0)) + np.abs(np.gradient(grey, axis=1))
    edges = (slope > np.quantile(slope, _EDGES)).astype(np.float32)
    factor = round((_channels(signature, "controlnet_cells") / 3) ** 0.5)
    batch, _, height, width = latents
    fitted = edges[: height * factor, : width * factor]
    image = torch.from_numpy(np.broadcast_to(fitted, (batch, 3, *fitted.shape)).copy())
    cells: Any = cells_of(image, factor).numpy()
    return cells  # type: ignore[no-any-return]


def _channels(signature: Signature, name: str) -> int:
    return int({spec.name: spec for spec in signature.inputs}[name].axes[1])
