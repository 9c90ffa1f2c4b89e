"""A diffusers pipeline with one component loaded at a time: text in, embeddings; those in, latents.

Models that repaint a part of a picture get one to repaint: a gradient, its middle masked. Those
that only change pictures get noise with the spectrum of photographs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from optimizer.load import load_module
from optimizer.plan import Plan
from runners.adapters import VaeAdapter
from runners.modules import WRAPPERS
from runners.pipeline import adapter_of, pipeline_of, tokenizer_in

__all__ = [
    "Embeddings",
    "denoise",
    "encoded",
    "load_embeddings",
    "loaded_denoiser",
    "pipeline_with",
    "save_embeddings",
]

Embeddings = dict[str, dict[str, Tensor]]
"""Prompt -> what the pipeline takes in its place, by name."""

_ENCODING = {
    "device": torch.device("cpu"),
    "num_images_per_prompt": 1,
    "do_classifier_free_guidance": True,
}


def encoded(plan: Plan, pipeline: Any, prompt: str) -> dict[str, Tensor]:
    """What the pipeline encodes a prompt to, and the empty one where it has guidance."""
    accepted = inspect.signature(pipeline.encode_prompt).parameters
    asked = {"prompt": prompt, "prompt_2": None, "prompt_3": None, **_ENCODING}
    found = pipeline.encode_prompt(**{k: v for k, v in asked.items() if k in accepted})
    names = plan.family.embeddings
    return {n: tensor for n, tensor in zip(names, found, strict=True) if n is not None}


_FILE = "prompts.safetensors"


def save_embeddings(embeddings: Embeddings, folder: Path) -> None:
    """Write prompts.safetensors."""
    tensors = {
        f"{name}/{prompt}": tensor.contiguous().clone()
        for prompt, found in embeddings.items()
        for name, tensor in found.items()
    }
    safetensors.torch.save_file(tensors, folder / _FILE)


def load_embeddings(folder: Path) -> Embeddings:
    """What `save_embeddings` wrote."""
    found: Embeddings = {}
    for key, tensor in safetensors.torch.load_file(folder / _FILE).items():
        name, _, prompt = key.partition("/")
        found.setdefault(prompt, {})[name] = tensor
    return found


def _absent() -> Any:
    raise AssertionError("only the loaded components run here")


def pipeline_with(plan: Plan, loaded: Mapping[str, nn.Module]) -> Any:
    """diffusers' pipeline with only some components loaded; latents come out undecoded."""
    source = plan.source
    cls = getattr(diffusers, source.pipeline_class)
    takes_pictures = "image" in inspect.signature(cls.__call__).parameters
    encoder = _vae_encoder(plan) if takes_pictures else None
    scheduler = plan.drawn.scheduler
    parts: dict[str, Any] = {
        "scheduler": getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
        "vae": _Undecoded(source.component_config("vae"), encoder),
    }
    for spec in plan.family.components:
        if spec.role in ("text_encoder", "denoiser"):
            adapter = adapter_of(spec.role, spec.wrapper)
            parts[spec.name] = loaded.get(spec.name) or adapter(
                source.component_config(spec.folder), _absent
            )
    for name in sorted({file.split("/")[0] for file in source.files}):
        if name.startswith("tokenizer"):
            parts[name] = tokenizer_in(source.folder / name)
    pipeline = pipeline_of(cls, parts, source.settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _vae_encoder(plan: Plan) -> nn.Module:
    [spec] = [spec for spec in plan.family.components if spec.role == "vae_encoder"]
    return WRAPPERS[spec.wrapper](load_module(plan.source, spec.folder))


class _Undecoded(VaeAdapter):
    """Keeps the latents that a pipeline would have decoded; encodes where there is an encoder."""

    latents: Tensor

    def __init__(self, config: dict[str, Any], encoder: nn.Module | None) -> None:
        super().__init__(config, encoder=_absent, decoder=_absent)
        self._wrapped = encoder

    @torch.no_grad()
    def _encode(self, x: Tensor) -> Tensor:
        assert self._wrapped is not None
        found: Tensor = self._wrapped(x)[0]
        return found

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
def loaded_denoiser(plan: Plan) -> Iterator[tuple[Any, nn.Module]]:
    """diffusers' pipeline with only the denoiser loaded, and that."""
    spec = plan.denoiser.spec
    module = load_module(plan.source, spec.folder)
    yield pipeline_with(plan, {spec.name: module}), module


def denoise(plan: Plan, pipeline: Any, embeddings: Embeddings, prompt: str, side: int) -> Tensor:
    """The latents that would be decoded, after the plan's number of denoiser calls."""
    seed = plan.calibration.seed + plan.calibration.all_prompts.index(prompt)
    parameters = inspect.signature(pipeline.__call__).parameters
    given: dict[str, Any] = {
        **embeddings[prompt],
        "num_inference_steps": plan.calibration.steps,
        "guidance_scale": plan.calibration.guidance,
        "height": side,
        "width": side,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": "pt",
    }
    if "mask_image" in parameters:
        given |= _to_repaint(side)
    elif "image" in parameters:
        steps = _scheduled(plan.calibration.steps, parameters["strength"].default)
        given |= {"image": _to_change(side, seed), "num_inference_steps": steps}
    pipeline(**{n: x for n, x in given.items() if n in parameters and x is not None})
    latents: Tensor = pipeline.vae.latents
    return latents


def _scheduled(steps: int, strength: float) -> int:
    """Of how many scheduled steps a pipeline runs `steps` at this strength: int(n * strength)."""
    found = math.ceil(steps / strength)
    return found if int(found * strength) >= steps else found + 1


def _to_change(side: int, seed: int) -> Image.Image:
    """Coloured noise whose amplitudes fall with frequency, as in photographs (Field 1987)."""
    rng = np.random.default_rng(seed)
    waves = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    waves[0, 0] = 1 / side
    white = np.fft.rfft2(rng.standard_normal((3, side, side)))
    field = np.fft.irfft2(white / waves, s=(side, side))
    levels = 128 + 64 * field / field.std()
    return Image.fromarray(np.moveaxis(levels, 0, -1).clip(0, 255).astype(np.uint8))


def _to_repaint(side: int) -> dict[str, Image.Image]:
    """A gradient of all colours, and its middle as the mask."""
    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    x, y = np.meshgrid(ramp, ramp)
    mask = np.zeros((side, side), np.uint8)
    mask[side // 4 : side - side // 4, side // 4 : side - side // 4] = 255
    picture = Image.fromarray(np.stack([x, y, 255 - x], axis=-1))
    return {"image": picture, "mask_image": Image.fromarray(mask)}
