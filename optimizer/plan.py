"""Recipe x profile x family -> a plan: every decision taken, and sizes and memory predicted.

All validation happens here, from configs and safetensors headers, without torch and without
reading a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pydantic import ValidationError

from optimizer.backends import backend as backend_named
from optimizer.calibration import Calibration, calibration_of, default_steps
from optimizer.configs import Config
from optimizer.drawn import Drawn, drawn_with
from optimizer.families import family as family_named
from optimizer.families.base import Family, Ranges
from optimizer.families.controls import with_controls
from optimizer.families.parts import with_vae
from optimizer.job import Job, default_solver, job_of, parameters_of
from optimizer.legality import require_target
from optimizer.onnx_source import as_exported, coarser, require_onnx_buildable
from optimizer.quantize.budget import require_reachable
from optimizer.quantize.policy import (
    AUTO,
    Policy,
)
from optimizer.recipe import Recipe, parse_budget
from optimizer.source import ModelSource
from optimizer.vae_config import require_known
from profiles.errors import SpecError, UnsupportedError
from profiles.hardware import Hardware
from profiles.profile import Profile
from profiles.target import parse_target
from runners.signature import Dim, Signature

__all__ = ["Plan", "make_plan", "with_policy"]


@dataclass(frozen=True)
class Plan:
    """What will be made, in order; variants of the denoiser are the last jobs."""

    recipe: Recipe
    """With every None decided."""
    source: ModelSource
    family: Family
    profile: Profile
    jobs: tuple[Job, ...]
    calibration: Calibration
    native_size: int
    drawn_size: int
    """The side of the recorded runs: what the recipe asks for, else the legal one nearest to the
    native one."""
    size_step: int
    drawn: Drawn

    @property
    def undecided(self) -> bool:
        """Whether the denoiser's policy is still to be solved for."""
        return self.recipe.quant == AUTO and self.recipe.policy is None

    @property
    def draws_from_text(self) -> bool:
        """Whether the recorded runs start from noise and text alone; else the VAE encodes too."""
        return self.source.pipeline_class == self.family.pipeline_classes[0]

    @property
    def denoiser(self) -> Job:
        """The job of the component in this role."""
        return next(job for job in self.jobs if job.spec.role == "denoiser")

    @property
    def predicted_memory_bytes(self) -> int:
        """Peak of the largest stage."""
        return max(job.predicted_memory_bytes for job in self.jobs)


def make_plan(recipe: Recipe, source: ModelSource, *, profile: Profile, hardware: Hardware) -> Plan:
    """Decide everything that the recipe leaves open, and check that it can be done here.

    Raises SpecError for illegal ranges, UnsupportedError for what backend or machine can't do.
    """
    _require_digests(recipe, source)
    known = family_named(source.family).of(source.folders)
    if source.kind == "onnx":
        known = as_exported(known)
    known = with_controls(known, len(source.controls))
    configs = {
        folder: source.checked_config(folder)
        for folder in dict.fromkeys(spec.folder for spec in known.components)
    }
    require_known(configs["vae"], where=f"the VAE of {source.name}")
    known = with_vae(known, configs["vae"])
    native, step = known.native_size(configs), known.size_step(configs) * source.side_factor
    backend = recipe.backend or profile.backends[0]
    dtype = _dtype(recipe, backend, profile, hardware)
    target = parse_target(recipe.target) if recipe.target else None
    require_target(backend_named(backend), target, dtype)
    quant = recipe.quant or ("none" if source.kind == "onnx" else profile.quant)
    if source.kind == "onnx":
        require_onnx_buildable(source.name, quant, backend)
    ranges = _ranges(recipe, native, step)
    drawn = drawn_with(recipe, source, known, configs)
    largest = max(parameters_of(spec, source) for spec in known.components)
    resolved = recipe.model_copy(
        update={
            "quant": quant,
            "solver": recipe.solver or default_solver(quant),
            "dtype": dtype,
            "backend": backend,
            "profile": profile.name,
            "size_min": ranges.size_min,
            "size_max": ranges.size_max,
            "steps": drawn.steps or default_steps(largest),
            "revision": source.revision,
            "digest": source.digest,
            "vae_revision": source.vae and source.vae.revision,
            "vae_digest": source.vae and source.vae.digest,
            "controlnets": tuple(control.pinned for control in source.controls),
            "controlnet_digests": tuple(control.digest for control in source.controls),
        }
    )
    signatures = _signatures(known, source, configs, ranges)
    jobs = tuple(job_of(spec, source, signatures[spec.name], resolved) for spec in known.components)
    jobs += _variants(recipe, resolved, jobs, source)
    calibration = calibration_of(resolved, source.folder, largest, drawn)
    plan = Plan(
        recipe=resolved,
        source=source,
        family=known,
        profile=profile,
        jobs=jobs,
        calibration=calibration,
        native_size=native,
        drawn_size=_drawn_size(recipe.calibration_size, native, ranges.side(step)),
        size_step=step,
        drawn=drawn,
    )
    if plan.undecided and resolved.budget is not None:
        job = plan.denoiser
        wanted = parse_budget(resolved.budget, 4 * job.parameters)
        require_reachable(wanted, job.least_bytes, 4 * job.parameters)
    return plan


def _require_digests(recipe: Recipe, source: ModelSource) -> None:
    """Raise SpecError where the files aren't those that the recipe was made for."""
    if recipe.digest not in (None, source.digest):
        raise SpecError(
            f"{source.name} isn't the model that the recipe was made for (its files differ): give "
            "the right MODEL, or remove `digest` from the recipe."
        )
    if source.vae is not None and recipe.vae_digest not in (None, source.vae.digest):
        raise SpecError(
            f"{source.vae.name} isn't the autoencoder that the recipe was made for (its files "
            "differ): give the right one with --vae, or remove `vae_digest` from the recipe."
        )
    for control, wanted in zip(source.controls, recipe.controlnet_digests, strict=False):
        if wanted != control.digest:
            raise SpecError(
                f"{control.name} isn't the control network that the recipe was made for (its files "
                "differ): give the right one with --controlnet, or remove `controlnet_digests` "
                "from the recipe."
            )


def _signatures(
    known: Family, source: ModelSource, configs: Mapping[str, Config], ranges: Ranges
) -> dict[str, Signature]:
    """Each component's; SpecError where the configs contradict each other."""
    try:
        made = known.signatures(configs, ranges)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise SpecError(
            f"The configs of {source.name} don't fit together ({reason}): download the model again."
        ) from error
    return {name: coarser(signature, source.side_factor) for name, signature in made.items()}


def with_policy(plan: Plan, policy: Policy) -> Plan:
    """The plan with the denoiser's policy decided."""
    recipe = plan.recipe.model_copy(update={"policy": policy})
    jobs = tuple(job_of(job.spec, plan.source, job.signature, recipe) for job in plan.jobs)
    return replace(plan, recipe=recipe, jobs=jobs)


def _dtype(recipe: Recipe, backend: str, profile: Profile, hardware: Hardware) -> str:
    known = backend_named(backend)
    legal = known.dtypes
    if recipe.dtype == "auto":
        return profile.dtype if profile.dtype in legal else legal[0]
    if recipe.dtype not in legal:
        where = " on a CPU" if known.device == "cpu" else ""
        raise UnsupportedError(
            f"--dtype {recipe.dtype} can't be used with the backend {backend}{where}: "
            f"use {' or '.join(legal)}."
        )
    if recipe.dtype == "bf16" and known.device == "cpu" and not hardware.cpu.has_bf16:
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


def _drawn_size(asked: int | None, native: int, side: Dim) -> int:
    """What the recipe asks for, else the legal side that is nearest to the native one."""
    if asked is not None and not side.legal(asked):
        raise SpecError(
            f"--calibration-size {asked} is not among the sides that must work "
            f"({side.describe()}): use {side.nearest(asked)}."
        )
    return asked or side.nearest(native)


def _variants(
    recipe: Recipe, resolved: Recipe, jobs: tuple[Job, ...], source: ModelSource
) -> tuple[Job, ...]:
    """The denoiser at the recipe's further levels; SpecError where two would be the same."""
    denoiser = next(job for job in jobs if job.spec.role == "denoiser")
    made = []
    for level in recipe.variants:
        own = {"quant": level, "solver": recipe.solver or default_solver(level)}
        job = job_of(denoiser.spec, source, denoiser.signature, resolved.model_copy(update=own))
        made.append(replace(job, is_variant=True))
    levels = [job.quant for job in (denoiser, *made)]
    if len(set(levels)) < len(levels):
        raise SpecError(
            f"--quant {','.join((str(resolved.quant), *recipe.variants))} has variants that are "
            f"the same here ({', '.join(levels)}): list others."
        )
    return tuple(made)
