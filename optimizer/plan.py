"""Recipe x profile x family -> a plan: every decision taken, and sizes and memory predicted.

All validation happens here, from configs and safetensors headers, without torch and without
reading a weight.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimizer.backends import backend as backend_named
from optimizer.families import family as family_named
from optimizer.families.base import ComponentSpec, Family, Ranges
from optimizer.quantize.policy import Policy, Scheme, default_policy
from optimizer.recipe import Recipe
from optimizer.source import ModelSource
from profiles.errors import SpecError, UnsupportedError
from profiles.hardware import Hardware
from profiles.profile import Profile
from runners.signature import Signature

__all__ = ["Calibration", "Job", "Plan", "make_plan"]

_LARGE = 50_000_000
"""Denoisers of more parameters are calibrated on few prompts: a step takes seconds, not ms."""


@dataclass(frozen=True)
class Calibration:
    """The denoising runs that ranges are taken from and quality is measured on."""

    prompts: tuple[str, ...]
    """Runs that activation ranges come from."""
    held_out: tuple[str, ...]
    """Runs that SQNR is measured on; never calibrated with."""
    steps: int
    guidance: float
    seed: int


@dataclass(frozen=True)
class Job:
    """One component to make."""

    spec: ComponentSpec
    backend: str
    quant: str
    dtype: str
    policy: Policy
    signature: Signature
    layers: dict[str, Scheme]
    """Planned low-bit layers, by name."""
    layers_total: int
    parameters: int
    predicted_bytes: int
    """Of the engine's weights, from the policy and the parameters' shapes."""


@dataclass(frozen=True)
class Plan:
    """What will be made, in order."""

    recipe: Recipe
    """With every None decided."""
    source: ModelSource
    family: Family
    profile: Profile
    jobs: tuple[Job, ...]
    calibration: Calibration
    native_size: int
    size_step: int
    defaults: dict[str, int | float] = field(default_factory=dict)

    @property
    def predicted_memory_bytes(self) -> int:
        """Peak of the largest stage: a component in fp32 is held up to three times while it is
        exported (module, graph, serialized), beside about 1 GiB of libraries (measured).
        """
        return max(3 * 4 * job.parameters for job in self.jobs) + (1 << 30)


def make_plan(recipe: Recipe, source: ModelSource, *, profile: Profile, hardware: Hardware) -> Plan:
    """Decide everything that the recipe leaves open, and check that it can be done here.

    Raises SpecError for illegal ranges, UnsupportedError for what backend or machine can't do.
    """
    if recipe.digest not in (None, source.digest):
        raise SpecError(
            f"{source.name} isn't the model that the recipe was made for (its files differ): give "
            "the right MODEL, or remove `digest` from the recipe."
        )
    known = family_named(source.family)
    configs = {
        folder: source.component_config(folder)
        for folder in dict.fromkeys(spec.folder for spec in known.components)
    }
    native, step = known.native_size(configs), known.size_step(configs)
    backend = recipe.backend or profile.backends[0]
    dtype = _dtype(recipe, backend, profile, hardware)
    quant = recipe.quant or profile.quant
    ranges = _ranges(recipe, native, step)
    defaults = _defaults(source.folder)
    steps = recipe.steps or int(defaults.get("steps", 20))
    resolved = recipe.model_copy(
        update={
            "quant": quant,
            "dtype": dtype,
            "backend": backend,
            "profile": profile.name,
            "size_min": ranges.size_min,
            "size_max": ranges.size_max,
            "steps": steps,
            "revision": source.revision,
            "digest": source.digest,
        }
    )
    signatures = known.signatures(configs, ranges)
    jobs = tuple(
        _job(spec, source, signatures[spec.name], (backend, quant, dtype))
        for spec in known.components
    )
    guidance = float(defaults.get("guidance", 7.5))
    size = max(job.parameters for job in jobs)
    calibration = _calibration(source.folder, size, (steps, guidance, recipe.seed))
    return Plan(resolved, source, known, profile, jobs, calibration, native, step, defaults)


def _dtype(recipe: Recipe, backend: str, profile: Profile, hardware: Hardware) -> str:
    legal = backend_named(backend).dtypes
    if recipe.dtype == "auto":
        return profile.dtype if profile.dtype in legal else "fp32"
    if recipe.dtype not in legal:
        raise UnsupportedError(
            f"--dtype {recipe.dtype} can't be used with the backend {backend} on a CPU: "
            f"use {' or '.join(legal)}."
        )
    if recipe.dtype == "bf16" and not hardware.cpu.has_bf16:
        raise UnsupportedError(
            f"--dtype bf16 needs a processor with bf16 products, which {hardware.cpu.name} lacks: "
            "use --dtype fp32."
        )
    return recipe.dtype


def _ranges(recipe: Recipe, native: int, step: int) -> Ranges:
    """The legal sides: half to four times the native one, unless the recipe says otherwise."""
    for option, value in (("smallest", recipe.size_min), ("largest", recipe.size_max)):
        if value is not None and value % step:
            legal = max(step, round(value / step) * step)
            raise SpecError(
                f"The {option} side {value} is not a multiple of {step}, which this model needs: "
                f"use {legal}."
            )
    low = recipe.size_min or max(step, math.ceil(native / 2 / step) * step)
    high = recipe.size_max or max(low, native * 4 // step * step)
    if low > high:
        raise SpecError(f"The sizes {low} to {high} are backwards: give the smaller side first.")
    return Ranges(low, min(max(native, low), high), high, recipe.batch)


def _job(
    spec: ComponentSpec, source: ModelSource, signature: Signature, how: tuple[str, str, str]
) -> Job:
    backend, quant, dtype = how
    policy = default_policy(quant, spec)
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in source.parameters(spec.folder).items()
        if name.startswith(spec.prefixes)
    }
    if not shapes:
        raise SpecError(f"{source.folder / spec.folder} has no weights for {spec.name}.")
    layers = _layers(shapes)
    planned = {name: policy.scheme(name, shape[1]) for name, shape in layers.items()}
    low_bit = {name: scheme for name, scheme in planned.items() if scheme.bits < 16}
    return Job(
        spec=spec,
        backend=backend,
        quant=quant if low_bit else "none",
        dtype=dtype,
        policy=policy,
        signature=signature,
        layers=low_bit,
        layers_total=len(layers),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        predicted_bytes=_predicted_bytes(shapes, low_bit, 4 if dtype == "fp32" else 2),
    )


def _layers(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The linears and 2-d convolutions among parameters: weights of 2 or 4 axes, no embeddings."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) in (2, 4) and "embedding.weight" not in name
    }


def _predicted_bytes(
    shapes: dict[str, tuple[int, ...]], low_bit: dict[str, Scheme], float_bytes: int
) -> int:
    total = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        scheme = low_bit.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if scheme is None:
            total += count * float_bytes
            continue
        scales = count // scheme.group if scheme.group else shape[0]
        total += math.ceil(count * scheme.bits / 8) + scales * float_bytes
    return total


def _defaults(folder: Path) -> dict[str, int | float]:
    """Steps and guidance that the model's own kiln.json recommends."""
    path = folder / "kiln.json"
    if not path.is_file():
        return {}
    document: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return {key: document[key] for key in ("steps", "guidance") if key in document}


def _calibration(folder: Path, parameters: int, how: tuple[int, float, int]) -> Calibration:
    """Prompts of the model's own list where it has one, else kiln's neutral ones."""
    own = folder / "prompts" / "calibration.txt"
    path = own if own.is_file() else Path(__file__).with_name("prompts.txt")
    prompts = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    runs, held_out = (2, 1) if parameters > _LARGE else (8, 4)
    steps, guidance, seed = how
    if len(prompts) < runs + held_out:
        raise SpecError(f"{path} holds {len(prompts)} prompts; {runs + held_out} are needed.")
    chosen = prompts[: runs + held_out]
    return Calibration(tuple(chosen[:runs]), tuple(chosen[runs:]), steps, guidance, seed)
