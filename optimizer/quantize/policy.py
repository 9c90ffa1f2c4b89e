"""Which layer is stored how: schemes, and policies as ordered patterns. Pure data, no torch."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict

from optimizer.families.base import ComponentSpec
from profiles.errors import SpecError

__all__ = ["KEEP", "LEVELS", "Policy", "Rule", "Scheme", "default_policy", "policy_names"]

_STRICT = ConfigDict(frozen=True, extra="forbid")


class Scheme(BaseModel):
    """How a weight, and perhaps its layer's input, is stored and rounded."""

    model_config = _STRICT

    bits: Literal[4, 8, 16]
    """16 keeps the layer as it is, at the bundle's compute dtype."""
    group: int = 0
    """Weights along the input axis that share a scale; 0 is one scale per output channel."""
    activation: Literal["none", "static", "affine"] = "none"
    """`static`: the layer's input is rounded to int8 with one calibrated scale; `affine`: to uint8
    with a zero point where that loses less."""
    output: Literal["none", "static"] = "none"
    """`static`: the layer's output is rounded to int8 with one calibrated scale, so that the matrix
    product that it is a factor of can run in 8 bits."""


KEEP = Scheme(bits=16)
W8A8 = Scheme(bits=8, activation="affine")
W8 = Scheme(bits=8)
W4 = Scheme(bits=4, group=64)


class Rule(BaseModel):
    """An fnmatch pattern over layer names, and what the layers it matches get."""

    model_config = _STRICT

    pattern: str
    scheme: Scheme


class Policy(BaseModel):
    """Ordered rules; the first whose pattern matches a layer's name decides."""

    model_config = _STRICT

    rules: tuple[Rule, ...] = ()

    def scheme(self, layer: str, in_features: int) -> Scheme:
        """The scheme of `layer`; groups that don't divide its inputs fall to a smaller group.

        A 4-bit layer whose inputs not even 32 divides is stored in 8 bits: one scale for a whole
        row of 4-bit codes loses 5 dB or more (FACTS.md, weight SQNR).
        """
        found = next((r.scheme for r in self.rules if fnmatchcase(layer, r.pattern)), KEEP)
        if not found.group or in_features % found.group == 0:
            return found
        if found.group > 32 and in_features % 32 == 0:
            return found.model_copy(update={"group": 32})
        return found.model_copy(update={"bits": 8, "group": 0})

    @property
    def calibrates(self) -> bool:
        """Whether any rule needs activation ranges."""
        return any(rule.scheme.activation != "none" for rule in self.rules)

    @property
    def quantizes(self) -> bool:
        """Whether any layer may get fewer than 16 bits."""
        return any(rule.scheme.bits < 16 for rule in self.rules)


LEVELS: dict[str, Scheme] = {"none": KEEP, "int8": W8A8, "int4": W4}
"""`--quant NAME` -> the scheme of the denoiser's ordinary layers."""


def policy_names() -> list[str]:
    """The legal values of --quant."""
    return list(LEVELS)


def default_policy(quant: str, component: ComponentSpec) -> Policy:
    """The policy that `--quant` stands for.

    The denoiser holds most weights and takes most time, so it gets the level's scheme; its fragile
    layers get 8-bit weights without rounded inputs, and its first and last convolutions are kept.
    Where inputs are rounded, so are the queries and keys of attention: their product takes most of
    a large picture's time.
    Text encoder and VAE run once a picture and are kept at the compute dtype.
    """
    if quant not in LEVELS:
        raise SpecError(f"--quant {quant} is not known: use one of {', '.join(LEVELS)}.")
    scheme = LEVELS[quant]
    if scheme == KEEP or component.role != "denoiser":
        return Policy()
    ends = tuple(name for name in component.fragile if "*" not in name)
    embeddings = tuple(name for name in component.fragile if "*" in name)
    factors = component.factors if scheme.activation != "none" else ()
    factor = scheme.model_copy(update={"output": "static"})
    return Policy(
        rules=(
            *(Rule(pattern=name, scheme=KEEP) for name in ends),
            *(Rule(pattern=name, scheme=W8) for name in embeddings),
            *(Rule(pattern=name, scheme=factor) for name in factors),
            Rule(pattern="*", scheme=scheme),
        )
    )
