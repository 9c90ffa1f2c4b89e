"""What to build for one kind of machine: a TOML file each, every choice with its source."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from profiles.errors import SpecError, UnsupportedError
from profiles.toml_file import parse_toml

if TYPE_CHECKING:
    from profiles.hardware import Hardware

__all__ = ["Profile", "load", "match", "names", "parse"]

_FOLDER = Path(__file__).parent
_KINDS = ("cpu", "nvidia")
"""The folders of profiles; `profiles/gpu` has cards, which `profiles.gpu` reads."""
_CHOICES = frozenset({"backends", "quant", "dtype"})


class Profile(BaseModel):
    """What to build for one kind of machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """The file's own name without its ending."""
    description: str
    """The machines meant, in words."""
    machine: Literal["any", "x86_64", "aarch64"]
    """`Hardware.machine` of the machines meant."""
    requires: tuple[str, ...]
    """Names of `profiles.hardware.ISA` that the machine must all have."""
    rank: int
    """Of the profiles that fit a machine, the one of the highest rank is chosen; a negative one
    only by name, because `generic` has 0 and fits every machine."""
    backends: tuple[str, ...]
    """Names of backends, best first."""
    quant: Literal["none", "int8", "int4"]
    """The quantization where the user asks for none in particular."""
    dtype: Literal["fp32", "bf16", "fp16"]
    """What `--dtype auto` means: the type of whatever isn't quantized."""
    sources: dict[str, str]
    """Where each of backends, quant and dtype comes from: a measurement or a vendor's document."""

    @field_validator("requires")
    @classmethod
    def _known_isa(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from profiles.hardware import ISA

        if unknown := sorted(set(value) - set(ISA)):
            raise ValueError(f"unknown instruction sets {unknown}; known: {', '.join(ISA)}")
        return value

    @field_validator("sources")
    @classmethod
    def _complete_sources(cls, value: dict[str, str]) -> dict[str, str]:
        if value.keys() != _CHOICES or not all(value.values()):
            raise ValueError(f"needs a source for each of {', '.join(sorted(_CHOICES))}")
        return value

    def fits(self, hardware: Hardware) -> bool:
        """Whether a machine has what this profile requires."""
        return self.machine in ("any", hardware.machine) and set(self.requires) <= set(
            hardware.cpu.isa
        )


def names() -> tuple[str, ...]:
    """Return the names of all profiles, sorted."""
    return tuple(sorted(_paths()))


def load(name: str) -> Profile:
    """Return the profile of this name.

    Raises `SpecError` with the nearest names for an unknown one.
    """
    path = _paths().get(name)
    if path is None:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise SpecError(f"no profile is called {name!r}; {hint}profiles: {', '.join(names())}")
    return _read(path)


def match(hardware: Hardware) -> Profile:
    """Return the profile that fits a machine best.

    Raises `UnsupportedError` where none fits.
    """
    fitting = [profile for profile in map(load, names()) if profile.fits(hardware)]
    if not fitting:
        raise UnsupportedError(
            f"no profile fits this machine ({hardware.machine}, {hardware.cpu.name}); name one "
            f"with --profile: {', '.join(names())}"
        )
    return max(fitting, key=lambda profile: profile.rank)


def parse(text: str, *, name: str) -> Profile:
    """Parse a profile strictly; `name` is what the file is called and must be said in it too.

    Raises `SpecError` naming every wrong entry.
    """
    return parse_toml(Profile, text, what="profile", name=name)


@cache
def _paths() -> dict[str, Path]:
    return {path.stem: path for kind in _KINDS for path in (_FOLDER / kind).glob("*.toml")}


@cache
def _read(path: Path) -> Profile:
    return parse(path.read_text(encoding="utf-8"), name=path.stem)
