"""Real denoising runs of the fp32 model, recorded: engines are checked on them.

The runs are diffusers' own pipeline's, with one component's weights in memory at a time: prompts
are encoded first, then denoised, then decoded, and the pictures encoded again.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from optimizer.calls import Call, save_calls
from optimizer.denoising import (
    Embeddings,
    denoise,
    encoded,
    load_embeddings,
    loaded_denoiser,
    pipeline_with,
    save_embeddings,
)
from optimizer.load import load_module
from optimizer.plan import Plan
from optimizer.progress import Progress
from optimizer.quantize.apply import quantizable_layers
from optimizer.quantize.covariance import Covariance, in_passes, observing_covariance
from optimizer.quantize.observe import LayerStatistics, observing
from optimizer.sizes import LARGE
from runners.denoisers import FEEDS
from runners.modules import WRAPPERS

__all__ = ["load_statistics", "record", "record_covariances", "record_statistics", "trial_calls"]


def record(plan: Plan, out: Path, progress: Progress) -> None:
    """Write prompts.safetensors and, per component, NAME.safetensors into `out`.

    Each holds calls of the component's wrapper, in fp32, on the held-out prompts;
    prompts.safetensors the embeddings of all prompts.
    """
    if plan.source.vae is not None:
        load_module(plan.source, "vae")  # what is wrong with it is said before the long runs
    prompts = plan.calibration.all_prompts
    total = len(plan.calibration.held_out) * plan.calibration.steps
    embeddings = _encode(plan, prompts, out)
    calls, latents = [], []
    with loaded_denoiser(plan) as (pipeline, module):
        for prompt in plan.calibration.held_out:
            with _calls(plan, module) as found:
                latents.append(denoise(plan, pipeline, embeddings, prompt, plan.drawn_size))
            calls += found
            progress(len(calls), total)
    _save(calls, out / f"{plan.denoiser.spec.name}.safetensors")
    _record_vae(plan, latents, out)


def record_statistics(
    plan: Plan, recorded: Path, partial: Path, out: Path, progress: Progress
) -> None:
    """Write statistics.safetensors: of every layer's inputs over the calibration runs.

    `partial` holds the runs so far, should this be killed.
    """
    factors = plan.denoiser.spec.factors
    with loaded_denoiser(plan) as (pipeline, module):
        layers = quantizable_layers(module)
        with observing(module, layers, factors) as statistics:
            observed = _Observed(statistics, partial)
            _run_all(plan, pipeline, recorded, plan.calibration.prompts, progress, observed)
    safetensors.torch.save_file(observed.tensors(), out / "statistics.safetensors")


def record_covariances(
    plan: Plan, recorded: Path, partial: Path, out: Path, progress: Progress
) -> None:
    """Write covariances*.safetensors: of every layer's inputs, over more runs than the ranges.

    The runs are made several times, for some of the layers each, where memory can't hold all.
    """
    prompts = plan.calibration.covariance_prompts
    with loaded_denoiser(plan) as (pipeline, module):
        room = int(_SHARE * psutil.virtual_memory().available)
        passes = in_passes(quantizable_layers(module), room)
        total = len(passes) * len(prompts)
        for number, names in enumerate(passes):
            kept = partial.with_name(f"{partial.name}.{number}") if number else partial
            after = functools.partial(_counted, progress, number * len(prompts), total)
            with observing_covariance(module, names) as covariances:
                observed = _Observed(covariances, kept)
                _run_all(plan, pipeline, recorded, prompts, after, observed)
            tensors = {name: found.finished() for name, found in covariances.items()}
            safetensors.torch.save_file(tensors, out / f"covariances-{number}.safetensors")
    for number in range(1, len(passes)):
        partial.with_name(f"{partial.name}.{number}").unlink(missing_ok=True)


def _counted(progress: Progress, before: int, total: int, done: float, _part: float) -> None:
    """Pass on what one of several passes has done."""
    progress(before + done, total)


_SHARE = 0.6
"""Of the free memory, beside the denoiser, that covariances may take; files are written from it."""


class _Observed:
    """What hooks collect, kept in a file now and then, and read back by whoever goes on."""

    def __init__(self, found: Mapping[str, LayerStatistics | Covariance], partial: Path) -> None:
        self._found, self._partial = found, partial
        self.runs = self._restore()
        self._saved = time.monotonic()

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{part}": tensor
            for name, found in self._found.items()
            for part, tensor in found.state().items()
        }

    def keep(self, runs: int) -> None:
        """Say that so many runs are in; written at most every `_KEEP_SECONDS`."""
        if time.monotonic() - self._saved < _KEEP_SECONDS:
            return
        fresh = self._partial.with_name(f"{self._partial.name}.new")
        safetensors.torch.save_file(self.tensors(), fresh, metadata={"runs": str(runs)})
        fresh.replace(self._partial)
        self._saved = time.monotonic()

    def _restore(self) -> int:
        """How many runs the file holds; what it holds is collected already."""
        try:
            with safetensors.safe_open(self._partial, "pt") as reader:
                runs = int(reader.metadata()["runs"])
                parts = _by_layer(reader)
                if parts.keys() != self._found.keys():  # of a machine with another room
                    return 0
                for name, state in parts.items():
                    self._found[name].restore(state)
        except (OSError, SafetensorError):
            return 0
        return runs


_KEEP_SECONDS = 30.0


def _by_layer(reader: Any) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key in reader.keys():  # noqa: SIM118 (it isn't a mapping)
        layer, _, part = key.rpartition(".")
        parts.setdefault(layer, {})[part] = reader.get_tensor(key)
    return parts


def trial_calls(plan: Plan, recorded: Path) -> list[Call]:
    """Some denoiser calls of the trial runs, evenly spread over the steps.

    A large model's runs are of half its native side.
    """
    kept: list[Call] = []
    embeddings = load_embeddings(recorded)
    side = plan.drawn_size
    if plan.denoiser.parameters > LARGE:
        side = max(1, side // 2 // plan.size_step) * plan.size_step
    with loaded_denoiser(plan) as (pipeline, module):
        for prompt in plan.calibration.trial:
            with _calls(plan, module) as calls:
                denoise(plan, pipeline, embeddings, prompt, side)
            count = min(_TRIAL_CALLS, len(calls))
            kept += [_as_call(calls[(2 * i + 1) * len(calls) // (2 * count)]) for i in range(count)]
    return kept


_TRIAL_CALLS = 4
"""Of each trial run."""


def _run_all(
    plan: Plan,
    pipeline: Any,
    recorded: Path,
    prompts: tuple[str, ...],
    progress: Progress,
    observed: _Observed,
) -> None:
    """Run the prompts that weren't run before."""
    embeddings = load_embeddings(recorded)
    done = observed.runs
    for number, prompt in enumerate(prompts[done:], start=done + 1):
        denoise(plan, pipeline, embeddings, prompt, plan.drawn_size)
        progress(number, len(prompts))
        observed.keep(number)


def _load_tensor(path: Path, name: str) -> Tensor:
    with safetensors.safe_open(path, "pt") as reader:
        tensor: Tensor = reader.get_tensor(name)
    return tensor


def load_statistics(folder: Path, covariances: Path | None = None) -> dict[str, LayerStatistics]:
    """What `record_statistics` and, where given, `record_covariances` wrote, by layer."""
    with safetensors.safe_open(folder / "statistics.safetensors", "pt") as reader:
        parts = _by_layer(reader)
    found = {layer: LayerStatistics.from_state(state) for layer, state in parts.items()}
    if covariances is not None:
        for path in sorted(covariances.glob("covariances-*.safetensors")):
            with safetensors.safe_open(path, "pt") as reader:
                layers = list(reader.keys())
            for layer in layers:
                found[layer].covariance = functools.partial(_load_tensor, path, layer)
    return found


@torch.inference_mode()
def _encode(plan: Plan, prompts: tuple[str, ...], out: Path) -> Embeddings:
    """What the pipeline encodes "" and all prompts to; records the text encoders' calls."""
    specs = [spec for spec in plan.family.components if spec.role == "text_encoder"]
    encoders = {spec.name: load_module(plan.source, spec.folder) for spec in specs}
    pipeline = pipeline_with(plan, encoders)
    with ExitStack() as stack:
        given = {n: stack.enter_context(_token_ids(module)) for n, module in encoders.items()}
        embeddings = {prompt: encoded(plan, pipeline, prompt) for prompt in ("", *prompts)}
    for spec in specs:
        wrapper = WRAPPERS[spec.wrapper](encoders[spec.name])
        kept = given[spec.name][: 1 + len(plan.calibration.held_out)]
        _save([((ids,), wrapper(ids)) for ids in kept], out / f"{spec.name}.safetensors")
    save_embeddings(embeddings, out)
    return embeddings


@contextmanager
def _token_ids(encoder: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the ids [1, tokens] that a text encoder is called with, each once."""
    found: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not any(torch.equal(args[0], known) for known in found):
            found.append(args[0])

    handle = encoder.register_forward_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _calls(plan: Plan, denoiser: nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """Collect the inputs and outputs of a denoiser, as its wrapper takes and gives them."""
    job = plan.denoiser
    found: list[tuple[Any, Any]] = []

    def hook(_module: nn.Module, args: Any, keywords: dict[str, Any], output: Any) -> None:
        named = dict(zip(("sample", "timestep"), args, strict=False)) | keywords
        feeds = FEEDS[job.spec.wrapper](denoiser.config, named)  # type: ignore[arg-type]
        inputs = tuple(feeds[spec.name] for spec in job.signature.inputs)
        found.append((inputs, (output[0],)))

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@torch.inference_mode()
def _record_vae(plan: Plan, latents: list[Tensor], out: Path) -> None:
    specs = {spec.role: spec for spec in plan.family.components}
    inputs = latents
    for spec in (specs["vae_decoder"], specs["vae_encoder"]):
        half = WRAPPERS[spec.wrapper](load_module(plan.source, spec.folder))
        calls = [((given,), half(given)) for given in inputs]
        _save(calls, out / f"{spec.name}.safetensors")
        inputs = [outputs[0].clamp(-1, 1) for _, outputs in calls]  # pictures, then encoded


def _save(calls: list[tuple[Any, Any]], path: Path) -> None:
    save_calls({f"{index:04}": _as_call(call) for index, call in enumerate(calls)}, path)


def _as_call(call: tuple[Any, Any]) -> Call:
    return Call(*(tuple(tensor.detach().numpy() for tensor in side) for side in call))
