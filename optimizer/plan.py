"""Recipe x profile x family -> a plan: every decision taken, and sizes and memory predicted.

All validation happens here, from configs and safetensors headers, without torch and without
reading a weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optimizer.backends import BACKENDS
from optimizer.backends import backend as backend_named
from optimizer.calibration import Calibration, calibration_of, default_steps
from optimizer.families import family as family_named
from optimizer.families.base import ComponentSpec, Family, Ranges
from optimizer.quantize.budget import require_reachable
from optimizer.quantize.candidates import candidates
from optimizer.quantize.policy import AUTO, Policy, default_policy
from optimizer.quantize.schemes import KEEP, W4A16, Scheme, Shape
from optimizer.recipe import Recipe, parse_budget
from optimizer.sizes import layer_shapes, predicted_bytes
from optimizer.source import ModelSource
from profiles.errors import SpecError, UnsupportedError
from profiles.hardware import Hardware
from profiles.profile import Profile
from runners.signature import Signature

__all__ = ["Job", "Plan", "make_plan", "with_policy"]

_GPTQ = ("int4", "int4-dyn", AUTO)
"""Levels whose codes GPTQ finds where no solver is named; the others gain nothing from it."""


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
    low_bit_kernels: int
    """How many layers the backend must be seen to run on kernels of 8 bits or fewer."""
    parameters: int
    predicted_bytes: int
    """Of the engine's files, from the policy and the parameters' shapes."""
    fixed_bytes: int
    """The part of it that isn't a layer's weight."""
    least_bytes: int
    """What `--quant auto` could shrink it to."""

    @property
    def candidates(self) -> tuple[Scheme, ...]:
        """The schemes that `--quant auto` tries every layer with, beside keeping it."""
        return candidates(self.parameters, self.backend)

    @property
    def dynamic(self) -> bool:
        """Whether the runtime may round inputs of 4-bit layers."""
        return any(isinstance(s, W4A16) and s.dynamic for s in self.layers.values())

    @property
    def float_bytes(self) -> int:
        """Of a stored number that isn't quantized."""
        return 4 if self.dtype == "fp32" else 2


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
    def undecided(self) -> bool:
        """Whether the denoiser's policy is still to be solved for."""
        return self.recipe.quant == AUTO and self.recipe.policy is None

    @property
    def denoiser(self) -> Job:
        """The job of the component in this role."""
        return next(job for job in self.jobs if job.spec.role == "denoiser")

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
    largest = max(_parameters(_shapes(spec, source)) for spec in known.components)
    steps = recipe.steps or int(defaults.get("steps", default_steps(largest)))
    resolved = recipe.model_copy(
        update={
            "quant": quant,
            "solver": recipe.solver or ("gptq" if quant in _GPTQ else "mse"),
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
    jobs = tuple(_job(spec, source, signatures[spec.name], resolved) for spec in known.components)
    guidance = float(defaults.get("guidance", 7.5))
    calibration = calibration_of(resolved, source.folder, largest, guidance)
    plan = Plan(resolved, source, known, profile, jobs, calibration, native, step, defaults)
    if plan.undecided and resolved.budget is not None:
        job = plan.denoiser
        wanted = parse_budget(resolved.budget, 4 * job.parameters)
        require_reachable(wanted, job.least_bytes, 4 * job.parameters)
    return plan


def with_policy(plan: Plan, policy: Policy) -> Plan:
    """The plan with the denoiser's policy decided."""
    recipe = plan.recipe.model_copy(update={"policy": policy})
    jobs = tuple(_job(job.spec, plan.source, job.signature, recipe) for job in plan.jobs)
    return replace(plan, recipe=recipe, jobs=jobs)


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


def _job(spec: ComponentSpec, source: ModelSource, signature: Signature, recipe: Recipe) -> Job:
    """The job of one component, by a recipe with every None decided."""
    assert recipe.backend is not None
    shapes = _shapes(spec, source)
    layers = layer_shapes(shapes)
    policy = _policy(spec, recipe)
    planned = {name: policy.scheme(name, shape) for name, shape in layers.items()}
    low_bit = {name: scheme for name, scheme in planned.items() if scheme.bits < 16}
    _require_formats(low_bit.values(), recipe)
    float_bytes = 4 if recipe.dtype == "fp32" else 2
    parameters = _parameters(shapes)
    fixed = predicted_bytes(shapes, {}, float_bytes) - float_bytes * sum(
        math.prod(shape) for shape in layers.values()
    )
    tried = (*candidates(parameters, recipe.backend), KEEP)
    return Job(
        spec=spec,
        backend=recipe.backend,
        quant=str(recipe.quant) if low_bit else "none",
        dtype=recipe.dtype,
        policy=policy,
        signature=signature,
        layers=low_bit,
        layers_total=len(layers),
        low_bit_kernels=sum(
            (scheme.format, len(layers[name])) in backend_named(recipe.backend).computes
            for name, scheme in low_bit.items()
        ),
        parameters=parameters,
        predicted_bytes=predicted_bytes(shapes, low_bit, float_bytes),
        fixed_bytes=fixed,
        least_bytes=fixed
        + sum(
            min(scheme.fitted(shape).stored_bytes(shape, float_bytes) for scheme in tried)
            for shape in layers.values()
        ),
    )


def _shapes(spec: ComponentSpec, source: ModelSource) -> dict[str, Shape]:
    """Of the component's parameters; SpecError where there are none."""
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in source.parameters(spec.folder).items()
        if name.startswith(spec.prefixes)
    }
    if not shapes:
        raise SpecError(f"{source.folder / spec.folder} has no weights for {spec.name}.")
    return shapes


def _parameters(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _policy(spec: ComponentSpec, recipe: Recipe) -> Policy:
    """The component's policy; where it is still to be solved for, that of int8 stands in."""
    quant, solver = str(recipe.quant), str(recipe.solver)
    if quant != AUTO:
        return default_policy(quant, spec, solver)
    if recipe.policy is not None and spec.role == "denoiser":
        return recipe.policy
    return default_policy("int8", spec, solver)


def _require_formats(schemes: Iterable[Scheme], recipe: Recipe) -> None:
    """Raise UnsupportedError where the backend can't read what the policy asks for."""
    backend = backend_named(str(recipe.backend))
    wanted = {scheme.format for scheme in schemes}
    if unread := sorted(wanted - backend.formats):
        able = [other.name for other in BACKENDS.values() if wanted <= other.formats]
        raise UnsupportedError(
            f"--quant {recipe.quant} can't be used with the backend {backend.name}, which doesn't "
            f"read {unread[0]}: use --backend {' or '.join(able)}, or another --quant."
        )


def _defaults(folder: Path) -> dict[str, int | float]:
    """Steps and guidance that the model's own kiln.json recommends."""
    path = folder / "kiln.json"
    if not path.is_file():
        return {}
    document: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return {key: document[key] for key in ("steps", "guidance") if key in document}
