"""Real denoising runs of the fp32 model, recorded: engines are checked on them.

The runs are diffusers' own pipeline's, with one component's weights in memory at a time: prompts
are encoded first, then denoised, then decoded, and the pictures encoded again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from optimizer.calls import Call, save_calls
from optimizer.load import load_module
from optimizer.plan import Plan
from optimizer.progress import Progress
from optimizer.quantize.apply import quantizable_layers
from optimizer.quantize.observe import LayerStatistics, observing
from runners.adapters import TextEncoderAdapter, VaeAdapter
from runners.modules import WRAPPERS

__all__ = ["load_statistics", "record", "record_statistics"]


def record(plan: Plan, out: Path, progress: Progress) -> None:
    """Write prompts.safetensors and, per component, NAME.safetensors into `out`.

    Each holds calls of the component's wrapper, in fp32, on the held-out prompts;
    prompts.safetensors the embeddings of all prompts.
    """
    prompts = (*plan.calibration.held_out, *plan.calibration.prompts)
    total = len(plan.calibration.held_out) * plan.calibration.steps
    embeddings = _encode(plan, prompts, out)
    calls, latents = [], []
    with _denoiser(plan) as pipeline:
        for prompt in plan.calibration.held_out:
            with _calls(pipeline.unet) as found:
                latents.append(_denoise(plan, pipeline, embeddings, prompt))
            calls += found
            progress(len(calls), total)
    _save(calls, out / "unet.safetensors")
    _record_vae(plan, latents, out)


def record_statistics(plan: Plan, recorded: Path, out: Path, progress: Progress) -> None:
    """Write statistics.safetensors: of every layer's inputs over all calibration runs."""
    embeddings = safetensors.torch.load_file(recorded / "prompts.safetensors")
    done, total = 0, len(plan.calibration.prompts)
    factors = plan.family.component("unet").factors
    with (
        _denoiser(plan) as pipeline,
        observing(pipeline.unet, quantizable_layers(pipeline.unet), factors) as statistics,
    ):
        for prompt in plan.calibration.prompts:
            _denoise(plan, pipeline, embeddings, prompt)
            done += 1
            progress(done, total)
    tensors = {
        f"{name}.{part}": tensor
        for name, found in statistics.items()
        for part, tensor in found.state().items()
    }
    safetensors.torch.save_file(tensors, out / "statistics.safetensors")


def load_statistics(folder: Path) -> dict[str, LayerStatistics]:
    """What `record_statistics` wrote, by layer."""
    tensors = safetensors.torch.load_file(folder / "statistics.safetensors")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        parts.setdefault(layer, {})[part] = tensor
    return {layer: LayerStatistics.from_state(state) for layer, state in parts.items()}


@torch.inference_mode()
def _encode(plan: Plan, prompts: tuple[str, ...], out: Path) -> dict[str, Tensor]:
    """The embeddings of "" and all prompts [1, tokens, width]; records the text encoder's calls."""
    tokenizer = CLIPTokenizer.from_pretrained(plan.source.folder / "tokenizer")
    encoder = WRAPPERS["text_encoder"](load_module(plan.source, "text_encoder"))
    embeddings, calls = {}, []
    for prompt in ("", *prompts):
        ids = tokenizer(
            prompt,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        outputs = encoder(ids)
        embeddings[prompt] = outputs[0]
        calls.append(((ids,), outputs))
    _save(calls[: 1 + len(plan.calibration.held_out)], out / "text_encoder.safetensors")
    safetensors.torch.save_file(
        {prompt: tensor.contiguous() for prompt, tensor in embeddings.items()},
        out / "prompts.safetensors",
    )
    return embeddings


@contextmanager
def _denoiser(plan: Plan) -> Iterator[Any]:
    """diffusers' pipeline with only the denoiser loaded; embeddings in, latents out."""

    def absent() -> Any:
        raise AssertionError("only the denoiser runs here")

    source = plan.source
    scheduler = source.component_config("scheduler")
    cls = getattr(diffusers, source.pipeline_class)
    pipeline = cls(
        vae=VaeAdapter(source.component_config("vae"), encoder=absent, decoder=absent),
        text_encoder=TextEncoderAdapter(source.component_config("text_encoder"), absent),
        tokenizer=CLIPTokenizer.from_pretrained(source.folder / "tokenizer"),
        unet=load_module(source, "unet"),
        scheduler=getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    yield pipeline


def _denoise(plan: Plan, pipeline: Any, embeddings: dict[str, Tensor], prompt: str) -> Tensor:
    result = pipeline(
        prompt_embeds=embeddings[prompt],
        negative_prompt_embeds=embeddings[""],
        num_inference_steps=plan.calibration.steps,
        guidance_scale=plan.calibration.guidance,
        height=plan.native_size,
        width=plan.native_size,
        generator=torch.Generator("cpu").manual_seed(plan.calibration.seed),
        output_type="latent",
    )
    latents: Tensor = result.images
    return latents


@contextmanager
def _calls(denoiser: nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """Collect the inputs and outputs of a denoiser, as its wrapper takes and gives them."""
    found: list[tuple[Any, Any]] = []

    def hook(_module: nn.Module, args: Any, keywords: dict[str, Any], output: Any) -> None:
        sample, timestep = args
        steps = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
        inputs = (sample, steps.expand(sample.shape[0]), keywords["encoder_hidden_states"])
        found.append((inputs, (output[0],)))

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@torch.inference_mode()
def _record_vae(plan: Plan, latents: list[Tensor], out: Path) -> None:
    vae = load_module(plan.source, "vae")
    decoder = WRAPPERS["vae_decoder"](load_module(plan.source, "vae"))
    inputs = [latent / vae.config.scaling_factor for latent in latents]  # type: ignore[union-attr,operator]
    decoded = [((latent,), decoder(latent)) for latent in inputs]
    _save(decoded, out / "vae_decoder.safetensors")
    encoder = WRAPPERS["vae_encoder"](vae)
    images = [outputs[0].clamp(-1, 1) for _, outputs in decoded]
    _save([((image,), encoder(image)) for image in images], out / "vae_encoder.safetensors")


def _save(calls: list[tuple[Any, Any]], path: Path) -> None:
    arrays = {
        f"{index:04}": Call(*(tuple(tensor.detach().numpy() for tensor in side) for side in call))
        for index, call in enumerate(calls)
    }
    save_calls(arrays, path)
