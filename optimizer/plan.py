"""Recipe x profile x family -> a plan: every decision taken, and sizes and memory predicted.

All validation happens here, from configs and safetensors headers, without torch and without
reading a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pydantic import ValidationError

from optimizer.backends import BACKENDS, How
from optimizer.backends import backend as backend_named
from optimizer.calibration import Calibration, calibration_of, default_steps
from optimizer.configs import Config
from optimizer.drawn import Drawn, drawn_with
from optimizer.families import family as family_named
from optimizer.families.base import ComponentSpec, Family, Ranges
from optimizer.families.controls import with_controls
from optimizer.families.parts import with_vae
from optimizer.legality import require_formats, require_target
from optimizer.onnx_source import as_exported, coarser, require_onnx_buildable
from optimizer.quantize.budget import require_reachable
from optimizer.quantize.candidates import candidates
from optimizer.quantize.policy import (
    AUTO,
    LEVELS,
    Policy,
    Rule,
    default_policy,
    legal_policy,
)
from optimizer.quantize.schemes import KEEP, W4A16, Scheme, Shape
from optimizer.recipe import Recipe, parse_budget
from optimizer.sizes import compile_bytes, layer_shapes, predicted_bytes
from optimizer.source import ModelSource
from optimizer.vae_config import require_known, splits
from profiles.errors import SpecError, UnsupportedError
from profiles.hardware import Hardware
from profiles.profile import Profile
from profiles.target import parse_target
from runners.control_tasks import CONTROL
from runners.part_names import PARTS
from runners.signature import Dim, Signature

__all__ = ["Job", "Plan", "default_solver", "make_plan", "with_policy"]

_GPTQ = ("int4", "int4-dyn", AUTO)
"""Levels whose codes GPTQ finds where no solver is named; the others gain nothing from it."""


_STREAMED = 0.5
"""Of the card's memory: a component of more weights may stream them."""


@dataclass(frozen=True)
class Job:
    """One component to make."""

    spec: ComponentSpec
    backend: str
    quant: str
    dtype: str
    capabilities: tuple[str, ...]
    """Of the cards that the engine is built for."""
    weight_streaming: bool
    """Whether the engine may leave weights in the host's memory: where they would take more than
    half of the smallest card's."""
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
    is_variant: bool = False
    """Whether it is a further level of the denoiser."""

    @property
    def name(self) -> str:
        """Of the engine in the bundle: the component's, and a variant's level."""
        return f"{self.spec.name}-{self.quant}" if self.is_variant else self.spec.name

    forms: tuple[str, ...] = ()
    """Further graphs over the same weights that are made (optimizer.forms)."""

    @property
    def bundle_bytes(self) -> int:
        """Predicted of all its files: forms that hold the weights once more are as large."""
        whole = backend_named(self.backend).whole_forms
        return self.predicted_bytes * (1 + len(self.forms) if whole else 1)

    @property
    def candidates(self) -> tuple[Scheme, ...]:
        """The schemes that `--quant auto` tries every layer with, beside keeping it."""
        return candidates(self.parameters, backend_named(self.backend))

    @property
    def dynamic(self) -> bool:
        """Whether the runtime may round inputs of 4-bit layers."""
        return any(isinstance(s, W4A16) and s.dynamic for s in self.layers.values())

    @property
    def how(self) -> How:
        """What the builder needs to know."""
        return How(
            backend=self.backend,
            dtype=self.dtype,
            role=self.spec.role,
            wrapper=self.spec.wrapper,
            signature=self.signature,
            dynamic=self.dynamic,
            capabilities=self.capabilities,
            weight_streaming=self.weight_streaming,
        )

    @property
    def build_memory_bytes(self) -> int:
        """What the builder needs at its peak, where that is more than the export did."""
        return int(backend_named(self.backend).build_memory * self.predicted_bytes)

    @property
    def predicted_memory_bytes(self) -> int:
        """The peak of compiling it."""
        solver = self.policy.solver if self.layers else None
        return compile_bytes(self.parameters, solver, self.build_memory_bytes)

    @property
    def float_bytes(self) -> int:
        """Of a stored number that isn't quantized."""
        return 4 if self.dtype == "fp32" else 2


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
    largest = max(_parameters(_shapes(spec, source)) for spec in known.components)
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
    jobs = tuple(_job(spec, source, signatures[spec.name], resolved) for spec in known.components)
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
    jobs = tuple(_job(job.spec, plan.source, job.signature, recipe) for job in plan.jobs)
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


def _job(spec: ComponentSpec, source: ModelSource, signature: Signature, recipe: Recipe) -> Job:
    """The job of one component, by a recipe with every None decided."""
    known = backend_named(str(recipe.backend))
    shapes = _shapes(spec, source)
    layers = layer_shapes(shapes)
    policy = _policy(spec, recipe)
    planned = {name: policy.scheme(name, shape) for name, shape in layers.items()}
    low_bit = {name: scheme for name, scheme in planned.items() if scheme.bits < 16}
    target = parse_target(recipe.target) if recipe.target else parse_target("portable")
    require_formats(low_bit, layers, known, target)
    float_bytes = 4 if recipe.dtype == "fp32" else 2
    parameters = _parameters(shapes)
    fixed = predicted_bytes(shapes, {}, float_bytes, known) - float_bytes * sum(
        math.prod(shape) for shape in layers.values()
    )
    tried = (*candidates(parameters, known), KEEP)
    predicted = predicted_bytes(shapes, low_bit, float_bytes, known)
    return Job(
        spec=spec,
        backend=known.name,
        quant=(_text_quant(spec, recipe) or str(recipe.quant)) if low_bit else "none",
        dtype=recipe.dtype,
        capabilities=target.capabilities,
        weight_streaming=predicted > _STREAMED * (target.memory_gib or math.inf) * 2**30,
        policy=policy,
        signature=signature,
        layers=low_bit,
        layers_total=len(layers),
        low_bit_kernels=sum(
            (scheme.format, len(layers[name])) in known.computes for name, scheme in low_bit.items()
        ),
        parameters=parameters,
        predicted_bytes=predicted,
        fixed_bytes=fixed,
        forms=_forms(spec, source, signature, recipe),
        least_bytes=fixed
        + sum(
            min(scheme.fitted(shape).stored_bytes(shape, float_bytes) for scheme in tried)
            for shape in layers.values()
        ),
    )


def _variants(
    recipe: Recipe, resolved: Recipe, jobs: tuple[Job, ...], source: ModelSource
) -> tuple[Job, ...]:
    """The denoiser at the recipe's further levels; SpecError where two would be the same."""
    denoiser = next(job for job in jobs if job.spec.role == "denoiser")
    made = []
    for level in recipe.variants:
        own = {"quant": level, "solver": recipe.solver or default_solver(level)}
        job = _job(denoiser.spec, source, denoiser.signature, resolved.model_copy(update=own))
        made.append(replace(job, is_variant=True))
    levels = [job.quant for job in (denoiser, *made)]
    if len(set(levels)) < len(levels):
        raise SpecError(
            f"--quant {','.join((str(resolved.quant), *recipe.variants))} has variants that are "
            f"the same here ({', '.join(levels)}): list others."
        )
    return tuple(made)


def default_solver(quant: str) -> str:
    """The solver that suits a level."""
    return "gptq" if quant in _GPTQ else "mse"


_TAKE_LORA = ("clip_text", "clip_hidden")
"""Wrappers of text encoders that LoRAs are made for."""


def _parts(
    spec: ComponentSpec, source: ModelSource, signature: Signature, recipe: Recipe
) -> tuple[str, ...]:
    """Those that half of a VAE is cut into, where it can be and larger pictures than a tile, which
    is of the native size, may come.
    """
    able = "tiles" in backend_named(str(recipe.backend)).forms and source.kind != "onnx"
    larger = any(dim.max > dim.opt for dim in map(signature.dim, ("height", "width")))
    wanted = recipe.tiles and able and larger and splits(source.checked_config(spec.folder))
    return PARTS if wanted else ()


def _forms(
    spec: ComponentSpec, source: ModelSource, signature: Signature, recipe: Recipe
) -> tuple[str, ...]:
    """LoRA's, for denoisers and CLIPs, where the backend builds forms and the layers are known; and
    control networks' for a denoiser that has any, for which UnsupportedError is raised elsewhere;
    a VAE's parts, where there are pictures larger than a tile.
    """
    if spec.role.startswith("vae"):
        return _parts(spec, source, signature, recipe)
    takes = spec.role == "denoiser" or spec.wrapper in _TAKE_LORA
    known = backend_named(str(recipe.backend))
    lora = recipe.lora and takes and "lora" in known.forms and source.kind != "onnx"
    if spec.role == "denoiser" and source.controls:
        if CONTROL not in known.forms:
            raise UnsupportedError(
                f"--controlnet can't be used with the backend {known.name} yet: use "
                f"{' or '.join(item.name for item in BACKENDS.values() if CONTROL in item.forms)}."
            )
        return ("lora", CONTROL, f"{CONTROL}+lora") if lora else (CONTROL,)
    return ("lora",) if lora else ()


def _shapes(spec: ComponentSpec, source: ModelSource) -> dict[str, Shape]:
    """Of the component's parameters; SpecError where there are none."""
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in source.parameters(spec.folder).items()
        if name.startswith(spec.prefixes)
    }
    if not shapes:
        raise SpecError(f"{source.component_folder(spec.folder)} has no weights for {spec.name}.")
    return shapes


def _parameters(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _text_quant(spec: ComponentSpec, recipe: Recipe) -> str | None:
    """The level of a text encoder's linears: weights alone, which needs no calibration."""
    return recipe.text_quant if spec.role == "text_encoder" else None


def _policy(spec: ComponentSpec, recipe: Recipe) -> Policy:
    """The component's policy; where it is still to be solved for, that of int8 stands in."""
    if (text_quant := _text_quant(spec, recipe)) is not None:
        rule = Rule(pattern="*", scheme=LEVELS[text_quant])
        return legal_policy(Policy(rules=(rule,), solver="hqq"), backend_named(str(recipe.backend)))
    quant, solver = str(recipe.quant), str(recipe.solver)
    if quant == AUTO and recipe.policy is not None and spec.role == "denoiser":
        return recipe.policy
    policy = default_policy("int8" if quant == AUTO else quant, spec, solver)
    return legal_policy(policy, backend_named(str(recipe.backend)))
