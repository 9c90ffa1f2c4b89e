"""Real denoising runs of the fp32 model, recorded: engines are checked on them.

The runs are diffusers' own pipeline's, with one component's weights in memory at a time: prompts
are encoded first, then denoised, then decoded, and the pictures encoded again.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from optimizer.calls import Call, save_calls
from optimizer.load import load_module
from optimizer.plan import Plan
from optimizer.progress import Progress
from optimizer.quantize.apply import quantizable_layers
from optimizer.quantize.covariance import Covariance, observing_covariance
from optimizer.quantize.observe import LayerStatistics, observing
from optimizer.sizes import LARGE
from runners.adapters import VaeAdapter
from runners.denoisers import FEEDS
from runners.modules import WRAPPERS
from runners.pipeline import adapter_of, pipeline_of, tokenizer_in

Embeddings = dict[str, dict[str, Tensor]]
"""Prompt -> what the pipeline takes in its place, by name."""

__all__ = ["load_statistics", "record", "record_covariances", "record_statistics", "trial_calls"]


def record(plan: Plan, out: Path, progress: Progress) -> None:
    """Write prompts.safetensors and, per component, NAME.safetensors into `out`.

    Each holds calls of the component's wrapper, in fp32, on the held-out prompts;
    prompts.safetensors the embeddings of all prompts.
    """
    prompts = plan.calibration.all_prompts
    total = len(plan.calibration.held_out) * plan.calibration.steps
    embeddings = _encode(plan, prompts, out)
    calls, latents = [], []
    with _denoiser(plan) as (pipeline, module):
        for prompt in plan.calibration.held_out:
            with _calls(plan, module) as found:
                latents.append(_denoise(plan, pipeline, embeddings, prompt, plan.drawn_size))
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
    with _denoiser(plan) as (pipeline, module):
        layers = quantizable_layers(module)
        with observing(module, layers, factors) as statistics:
            observed = _Observed(statistics, partial)
            _run_all(plan, pipeline, recorded, plan.calibration.prompts, progress, observed)
    safetensors.torch.save_file(observed.tensors(), out / "statistics.safetensors")


def record_covariances(
    plan: Plan, recorded: Path, partial: Path, out: Path, progress: Progress
) -> None:
    """Write covariances.safetensors: of every layer's inputs, over more runs than the ranges."""
    with _denoiser(plan) as (pipeline, module):
        layers = quantizable_layers(module)
        with observing_covariance(module, layers) as covariances:
            observed = _Observed(covariances, partial)
            prompts = plan.calibration.covariance_prompts
            _run_all(plan, pipeline, recorded, prompts, progress, observed)
    tensors = {name: found.mean for name, found in covariances.items()}
    safetensors.torch.save_file(tensors, out / "covariances.safetensors")


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
                for name, state in _by_layer(reader).items():
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
    embeddings = _embeddings(recorded)
    side = plan.drawn_size
    if plan.denoiser.parameters > LARGE:
        side = max(1, side // 2 // plan.size_step) * plan.size_step
    with _denoiser(plan) as (pipeline, module):
        for prompt in plan.calibration.trial:
            with _calls(plan, module) as calls:
                _denoise(plan, pipeline, embeddings, prompt, side)
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
    embeddings = _embeddings(recorded)
    done = observed.runs
    for number, prompt in enumerate(prompts[done:], start=done + 1):
        _denoise(plan, pipeline, embeddings, prompt, plan.drawn_size)
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
        path = covariances / "covariances.safetensors"
        with safetensors.safe_open(path, "pt") as reader:
            layers = list(reader.keys())
        for layer in layers:
            found[layer].covariance = partial(_load_tensor, path, layer)
    return found


@torch.inference_mode()
def _encode(plan: Plan, prompts: tuple[str, ...], out: Path) -> Embeddings:
    """What the pipeline encodes "" and all prompts to; records the text encoders' calls."""
    specs = [spec for spec in plan.family.components if spec.role == "text_encoder"]
    encoders = {spec.name: load_module(plan.source, spec.folder) for spec in specs}
    pipeline = _pipeline(plan, encoders)
    accepted = inspect.signature(pipeline.encode_prompt).parameters
    embeddings: Embeddings = {}
    with ExitStack() as stack:
        given = {n: stack.enter_context(_token_ids(module)) for n, module in encoders.items()}
        for prompt in ("", *prompts):
            asked = {"prompt": prompt, "prompt_2": None, "prompt_3": None, **_ENCODING}
            found = pipeline.encode_prompt(**{k: v for k, v in asked.items() if k in accepted})
            embeddings[prompt] = {
                name: tensor
                for name, tensor in zip(plan.family.embeddings, found, strict=True)
                if name is not None
            }
    for spec in specs:
        wrapper = WRAPPERS[spec.wrapper](encoders[spec.name])
        kept = given[spec.name][: 1 + len(plan.calibration.held_out)]
        _save([((ids,), wrapper(ids)) for ids in kept], out / f"{spec.name}.safetensors")
    tensors = {
        f"{name}/{prompt}": tensor.contiguous().clone()
        for prompt, found in embeddings.items()
        for name, tensor in found.items()
    }
    safetensors.torch.save_file(tensors, out / _EMBEDDINGS)
    return embeddings


_EMBEDDINGS = "prompts.safetensors"
_ENCODING = {
    "device": torch.device("cpu"),
    "num_images_per_prompt": 1,
    "do_classifier_free_guidance": True,
}


def _embeddings(recorded: Path) -> Embeddings:
    """What `_encode` saved."""
    found: Embeddings = {}
    for key, tensor in safetensors.torch.load_file(recorded / _EMBEDDINGS).items():
        name, _, prompt = key.partition("/")
        found.setdefault(prompt, {})[name] = tensor
    return found


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


def _pipeline(plan: Plan, loaded: Mapping[str, nn.Module]) -> Any:
    """diffusers' pipeline with only some components loaded; latents come out undecoded."""

    def absent() -> Any:
        raise AssertionError("only the loaded components run here")

    source = plan.source
    scheduler = source.component_config("scheduler")
    parts: dict[str, Any] = {
        "scheduler": getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
        "vae": _Undecoded(source.component_config("vae"), encoder=absent, decoder=absent),
    }
    for spec in plan.family.components:
        if not spec.role.startswith("vae"):
            adapter = adapter_of(spec.role, spec.wrapper)
            parts[spec.name] = loaded.get(spec.name) or adapter(
                source.component_config(spec.folder), absent
            )
    for name in sorted({file.split("/")[0] for file in source.files}):
        if name.startswith("tokenizer"):
            parts[name] = tokenizer_in(source.folder / name)
    pipeline = pipeline_of(getattr(diffusers, source.pipeline_class), parts, source.settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _Undecoded(VaeAdapter):
    """Keeps the latents that a pipeline would have decoded."""

    latents: Tensor

    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,  # noqa: FBT001, FBT002, ARG002 (diffusers' signature)
        generator: torch.Generator | None = None,  # noqa: ARG002 (diffusers' signature)
    ) -> tuple[Tensor]:
        """An empty picture [batch, 3, 1, 1]."""
        self.latents = z
        return (torch.zeros(len(z), 3, 1, 1),)


@contextmanager
def _denoiser(plan: Plan) -> Iterator[tuple[Any, nn.Module]]:
    """diffusers' pipeline with only the denoiser loaded, and that."""
    spec = plan.denoiser.spec
    module = load_module(plan.source, spec.folder)
    yield _pipeline(plan, {spec.name: module}), module


def _denoise(plan: Plan, pipeline: Any, embeddings: Embeddings, prompt: str, side: int) -> Tensor:
    """The latents that would be decoded."""
    seed = plan.calibration.seed + plan.calibration.all_prompts.index(prompt)
    pipeline(
        **embeddings[prompt],
        num_inference_steps=plan.calibration.steps,
        guidance_scale=plan.calibration.guidance,
        height=side,
        width=side,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="pt",
    )
    latents: Tensor = pipeline.vae.latents
    return latents


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
    decoder = WRAPPERS["vae_decoder"](load_module(plan.source, "vae"))
    decoded = [((latent,), decoder(latent)) for latent in latents]
    _save(decoded, out / "vae_decoder.safetensors")
    encoder = WRAPPERS["vae_encoder"](load_module(plan.source, "vae"))
    images = [outputs[0].clamp(-1, 1) for _, outputs in decoded]
    _save([((image,), encoder(image)) for image in images], out / "vae_encoder.safetensors")


def _save(calls: list[tuple[Any, Any]], path: Path) -> None:
    save_calls({f"{index:04}": _as_call(call) for index, call in enumerate(calls)}, path)


def _as_call(call: tuple[Any, Any]) -> Call:
    return Call(*(tuple(tensor.detach().numpy() for tensor in side) for side in call))
