"""One component's part of the plan: its policy and layers, its forms, and what it will weigh."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from optimizer.backends import How
from optimizer.backends import backend as backend_named
from optimizer.families.base import ComponentSpec
from optimizer.legality import require_formats
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
from optimizer.recipe import Recipe
from optimizer.sizes import compile_bytes, layer_shapes, predicted_bytes
from optimizer.source import ModelSource
from optimizer.vae_config import splits
from profiles.errors import SpecError
from profiles.target import parse_target
from runners.control_tasks import CONTROL
from runners.part_names import PARTS
from runners.signature import Signature

__all__ = ["Job", "default_solver", "job_of", "parameters_of"]

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


def job_of(spec: ComponentSpec, source: ModelSource, signature: Signature, recipe: Recipe) -> Job:
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


def parameters_of(spec: ComponentSpec, source: ModelSource) -> int:
    """How many a component has; SpecError where there are none."""
    return _parameters(_shapes(spec, source))


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
    able = backend_named(str(recipe.backend)).tiles and source.kind != "onnx"
    larger = any(dim.max > dim.opt for dim in map(signature.dim, ("height", "width")))
    wanted = recipe.tiles and able and larger and splits(source.checked_config(spec.folder))
    return PARTS if wanted else ()


def _forms(
    spec: ComponentSpec, source: ModelSource, signature: Signature, recipe: Recipe
) -> tuple[str, ...]:
    """LoRA's, for denoisers and CLIPs whose layers are known; control networks' for a denoiser that
    has any; a VAE's parts, where there are pictures larger than a tile.
    """
    if spec.role.startswith("vae"):
        return _parts(spec, source, signature, recipe)
    takes = spec.role == "denoiser" or spec.wrapper in _TAKE_LORA
    lora = recipe.lora and takes and source.kind != "onnx"
    if spec.role == "denoiser" and source.controls:
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
