"""Which layer is stored how: ordered patterns, and how codes are found. Pure data, no torch."""

from __future__ import annotations

from fnmatch import fnmatchcase

from pydantic import BaseModel, ConfigDict

from optimizer.backends import Backend
from optimizer.families.base import ComponentSpec
from optimizer.quantize.schemes import (
    KEEP,
    W4A16,
    W8A8,
    W8A16,
    Fp8,
    Keep,
    LlmInt8,
    Nf4,
    Nvfp4,
    Scheme,
    Shape,
    TorchaoInt8,
)
from profiles.errors import SpecError

__all__ = [
    "AUTO",
    "LEVELS",
    "Policy",
    "Rule",
    "default_policy",
    "legal_policy",
    "legal_scheme",
    "policy_names",
]

_STRICT = ConfigDict(frozen=True, extra="forbid")

AUTO = "auto"
"""`--quant auto`: the policy is solved for from measured sensitivities."""


class Rule(BaseModel):
    """An fnmatch pattern over layer names, and what the layers it matches get."""

    model_config = _STRICT

    pattern: str
    scheme: Scheme


class Policy(BaseModel):
    """Ordered rules; the first whose pattern matches a layer's name decides."""

    model_config = _STRICT

    rules: tuple[Rule, ...] = ()
    solver: str = "mse"
    """How codes and scales are found: a name of optimizer.quantize.solvers.SOLVERS."""

    def scheme(self, layer: str, shape: Shape) -> Scheme:
        """The scheme of `layer`, whose weight has this shape."""
        found = next((r.scheme for r in self.rules if fnmatchcase(layer, r.pattern)), KEEP)
        return found.fitted(shape)

    @property
    def calibrates(self) -> bool:
        """Whether any rule needs activation ranges."""
        return any(rule.scheme.calibrates for rule in self.rules)

    @property
    def quantizes(self) -> bool:
        """Whether any layer may get fewer than 16 bits."""
        return any(rule.scheme.bits < 16 for rule in self.rules)


LEVELS: dict[str, Scheme] = {
    "none": KEEP,
    "int8": W8A8(),
    "int8w": W8A16(),
    "int8-dyn": W8A16(dynamic=True),
    "llm-int8": LlmInt8(),
    "torchao-int8-dyn": TorchaoInt8(),
    "int4": W4A16(),
    "int4-dyn": W4A16(dynamic=True),
    "fp8": Fp8(),
    "nf4": Nf4(),
    "nvfp4": Nvfp4(),
}
"""`--quant NAME` -> the scheme of the denoiser's ordinary layers."""


def policy_names() -> list[str]:
    """The legal values of --quant."""
    return [*LEVELS, AUTO]


def default_policy(quant: str, component: ComponentSpec, solver: str = "mse") -> Policy:
    """The policy that `--quant` (any but auto) stands for.

    The denoiser holds most weights and takes most time, so it gets the level's scheme; its fragile
    layers get 8-bit weights without rounded inputs, and its first and last convolutions are kept.
    Where inputs are rounded to int8, so are the queries and keys of self-attention: their product
    takes most of a large picture's time. Text encoder and VAE run once a picture and are kept at
    the compute dtype.
    """
    if quant not in LEVELS:
        raise SpecError(f"--quant {quant} is not known: use one of {', '.join(policy_names())}.")
    scheme = LEVELS[quant]
    if isinstance(scheme, Keep) or component.role != "denoiser":
        return Policy()  # whatever the solver: an equal policy is an equal stage
    return Policy(
        rules=(*guarding_rules(component, scheme), Rule(pattern="*", scheme=scheme)), solver=solver
    )


def legal_policy(policy: Policy, backend: Backend) -> Policy:
    """The policy with each scheme in the variant that the backend takes."""
    rules = tuple(
        rule.model_copy(update={"scheme": legal_scheme(rule.scheme, backend)})
        for rule in policy.rules
    )
    return policy.model_copy(update={"rules": rules})


def legal_scheme(scheme: Scheme, backend: Backend) -> Scheme:
    """Codes around 0 where the backend takes no others, 8 bits for convolutions where it takes no
    fewer, and no rounding of factors that it wouldn't multiply in 8 bits.
    """
    if isinstance(scheme, W8A8):
        changed = {
            "zero_point": scheme.zero_point and backend.zero_points,
            "output": scheme.output and backend.factors,
        }
        return scheme.model_copy(update=changed)
    if isinstance(scheme, W4A16 | Nvfp4) and 4 not in backend.int4_axes:
        return scheme.model_copy(update={"linears_only": True})
    return scheme


def guarding_rules(component: ComponentSpec, scheme: Scheme) -> tuple[Rule, ...]:
    """The rules that come before a scheme for all: fragile layers, and factors of products."""
    ends = tuple(name for name in component.fragile if "*" not in name)
    embeddings = tuple(name for name in component.fragile if "*" in name)
    factors = component.factors if isinstance(scheme, W8A8) else ()
    return (
        *(Rule(pattern=name, scheme=KEEP) for name in ends),
        *(Rule(pattern=name, scheme=W8A16()) for name in embeddings),
        *(Rule(pattern=name, scheme=W8A8(output=True)) for name in factors),
    )
