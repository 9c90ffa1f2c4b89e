"""The user's whole request, serializable: the same recipe makes the same bundle again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from optimizer.families.few_step import FEW_STEP
from optimizer.quantize.policy import AUTO, Policy, policy_names
from optimizer.quantize.solvers import SOLVERS
from profiles.errors import SpecError
from profiles.target import parse_target
from runners.engines import ENGINES

__all__ = ["DTYPES", "Recipe", "checked", "load_recipe", "parse_budget"]

DTYPES = ("auto", "fp32", "fp16", "bf16")
"""The legal values of --dtype."""


class Recipe(BaseModel):
    """What to compile, and how; None is decided by the profile or the model itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """A diffusers folder, a hub id or a single-file checkpoint."""
    revision: str | None = None
    digest: str | None = None
    """Of the model's files, where it is known: another model is then refused."""
    vae: str | None = None
    """An autoencoder in the place of the model's own: a folder or a hub id."""
    vae_revision: str | None = None
    vae_digest: str | None = None
    """Of the autoencoder's files, where it is known: another one is then refused."""
    controlnets: tuple[str, ...] = ()
    """Control networks beside the model: folders, or hub ids with or without @REVISION."""
    controlnet_digests: tuple[str, ...] = ()
    """Of their files, where they are known: others are then refused."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """Of a single-file checkpoint, where it isn't what its marks and weights tell."""
    quant: str | None = None
    variants: tuple[str, ...] = ()
    """Further levels of the denoiser in the same bundle, beside `quant`; best first."""
    text_quant: (
        Literal["int8w", "int8-dyn", "llm-int8", "torchao-int8-dyn", "int4", "nf4"] | None
    ) = None
    """Of the text encoders' linears; None keeps them, as small ones deserve."""
    solver: str | None = None
    """How codes are found; by default what suits the level."""
    budget: str | None = None
    """With quant auto: the denoiser's bytes, as 0.25x of its fp32 bytes or as a number."""
    min_quality: float | None = Field(default=None, ge=1, le=100)
    """With quant auto: the least SQNR in dB, at the fewest bytes."""
    policy: Policy | None = None
    """With quant auto: the solved policy, where it is known already."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    backend: str | None = None
    target: str | None = None
    """The cards to build for, where they needn't be here: names, architectures, or "portable"."""
    profile: str | None = None
    size_min: int | None = Field(default=None, ge=1)
    size_max: int | None = Field(default=None, ge=1)
    """The sides in pixels that must work; by default half and four times the native one."""
    batch: int = Field(default=4, ge=1, le=64)
    """The pictures at once that must work."""
    lora: bool = True
    """Whether the engines take LoRAs, where their backend can: a second graph each."""
    tiles: bool = True
    """Whether the VAE is cut for seamless tiles, where it and its backend can: two graphs each."""
    few_step: str | None = None
    """What the model was distilled with, where its files don't say it."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Of calibration and measurement, and the bundle's default where the model takes few; by
    default what the model's kiln.json says, else 20."""
    calibration: tuple[str, ...] | None = None
    """Prompts; by default the model's own list where it has one, else kiln's neutral one."""
    calibration_size: int | None = Field(default=None, ge=1)
    """The side in pixels of calibration and measurement; by default the native one. Half takes
    a quarter of the time."""
    seed: int = 0
    """Of calibration and measurement."""

    @field_validator("quant")
    @classmethod
    def _known_quant(cls, value: str | None) -> str | None:
        if value is not None and value not in policy_names():
            raise ValueError(f"--quant {value} is not known: use one of {_list(policy_names())}")
        return value

    @field_validator("variants")
    @classmethod
    def _known_variants(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        legal = [name for name in policy_names() if name != AUTO]
        for value in values:
            if value not in legal:
                raise ValueError(f"--quant with {value} is not known: list some of {_list(legal)}")
        return values

    @field_validator("solver")
    @classmethod
    def _known_solver(cls, value: str | None) -> str | None:
        if value is not None and value not in SOLVERS:
            raise ValueError(f"--solver {value} is not known: use one of {_list(SOLVERS)}")
        return value

    @field_validator("budget")
    @classmethod
    def _legal_budget(cls, value: str | None) -> str | None:
        if value is not None:
            parse_budget(value, 1)
        return value

    @field_validator("few_step")
    @classmethod
    def _known_few_step(cls, value: str | None) -> str | None:
        if value is not None and value not in FEW_STEP:
            raise ValueError(f"--few-step {value} is not known: use one of {_list(FEW_STEP)}")
        return value

    @field_validator("backend")
    @classmethod
    def _known_backend(cls, value: str | None) -> str | None:
        if value is not None and value not in ENGINES:
            raise ValueError(f"--backend {value} is not known: use one of {_list(ENGINES)}")
        return value

    @field_validator("target")
    @classmethod
    def _known_target(cls, value: str | None) -> str | None:
        return None if value is None else parse_target(value).name

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.size_min and self.size_max and self.size_min > self.size_max:
            raise ValueError(
                f"--size-range {self.size_min}:{self.size_max} is backwards: the smaller side first"
            )
        return self

    @model_validator(mode="after")
    def _distinct_levels(self) -> Self:
        levels = (self.quant, *self.variants)
        if self.variants and (self.quant in (None, AUTO) or len(set(levels)) < len(levels)):
            raise ValueError(
                f"--quant {','.join(map(str, levels))} can't be several variants: list different "
                f"levels, best first, and none of them {AUTO}, such as none,int8,int4"
            )
        return self

    @model_validator(mode="after")
    def _autoencoder(self) -> Self:
        if self.vae is None and (self.vae_revision or self.vae_digest):
            raise ValueError("--vae-revision needs --vae, whose hub id it belongs to")
        return self

    @model_validator(mode="after")
    def _controls(self) -> Self:
        if self.controlnet_digests and len(self.controlnet_digests) != len(self.controlnets):
            raise ValueError(
                f"controlnet_digests holds {len(self.controlnet_digests)} digests and controlnets "
                f"{len(self.controlnets)} networks: give a digest each, or none"
            )
        return self

    @model_validator(mode="after")
    def _goal(self) -> Self:
        goals = [name for name in ("budget", "min_quality") if getattr(self, name) is not None]
        if self.quant != AUTO and (goals or self.policy is not None):
            raise ValueError("--budget and --min-quality need --quant auto")
        if self.quant == AUTO and len(goals) != 1:
            raise ValueError(
                "--quant auto needs a goal: add --budget 0.25x (of the denoiser's fp32 bytes) or "
                "--min-quality 30 (dB), not both"
            )
        return self


def parse_budget(text: str, fp32_bytes: int) -> int:
    """A budget in bytes: "0.25x" of so many, or a number of bytes; ValueError for anything else."""
    number, share = text.strip().lower(), text.strip().lower().endswith("x")
    try:
        value = float(number.removesuffix("x"))
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"--budget {text} is not possible: write it as 0.25x or in bytes")
    return int(value * fp32_bytes if share else value)


def _list(names: object) -> str:
    return ", ".join(str(name) for name in names)  # type: ignore[attr-defined]


def checked(fields: dict[str, object]) -> Recipe:
    """The recipe of these fields; SpecError in one sentence where one is wrong."""
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        prefix = "" if first["type"] == "value_error" else f"The recipe's {where} is wrong: "
        raise SpecError(f"{prefix}{message}.") from error


def load_recipe(path: Path) -> Recipe:
    """The recipe that `kiln inspect --recipe` wrote; SpecError where it isn't one."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(
            f"{path} is no recipe ({error}): write one with `kiln inspect BUNDLE --recipe`."
        ) from error
    if not isinstance(document, dict):
        raise SpecError(f"{path} is no recipe: write one with `kiln inspect BUNDLE --recipe`.")
    return checked(document)
