"""What an engine needs of the machine that it runs on, and what a bundle was built on: data alone.

`runners.compatibility` compares the needs with a machine's facts; what was observed is advice.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from profiles.hardware import Cpu

__all__ = ["Groups", "Host", "LibraryNeed", "Observed", "Requires"]

_STRICT = ConfigDict(frozen=True, extra="forbid")
_Version = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)*$", max_length=40)]

Groups = tuple[tuple[str, ...], ...]
"""Names of `profiles.hardware.ISA`: of each group, one is needed."""


class LibraryNeed(BaseModel):
    """A library at a version."""

    model_config = _STRICT

    distribution: str = Field(pattern=r"^[a-z0-9-]+$", max_length=100)
    version: _Version
    rule: Literal["exact", "minimum"]


class Requires(BaseModel):
    """Of one engine; empty lists and None need nothing."""

    model_config = _STRICT

    systems: tuple[str, ...]
    """Names of `Hardware.os`, one of which is needed."""
    machines: tuple[str, ...]
    """Names of `Hardware.machine`, one of which is needed."""
    only_there: bool
    """Whether no build by this backend runs on other systems and machines."""
    glibc: _Version | None
    """The oldest, on Linux."""
    isa: Groups
    """What the engine's library can't do without."""
    build_isa: Groups
    """What this engine can't do without, though another build of the same model could."""
    fast_isa: Groups
    """Without these it runs, and slower."""
    capabilities: tuple[str, ...] | None
    """Compute capabilities, one of which the card must have; None runs on the processor."""
    buildable: tuple[str, ...]
    """Compute capabilities that another build could be for; empty: that of any card."""
    driver: _Version | None
    """The oldest."""
    library: LibraryNeed
    memory_bytes: int = Field(ge=0)
    """The engine's weights in what it runs on: the card's memory, or the machine's."""
    streams: bool
    """Whether weights may stay in the machine's memory where the card's is too small."""


class Host(BaseModel):
    """The machine that a bundle was built and measured on."""

    model_config = _STRICT

    os: str
    machine: str
    cpu: Cpu
    ram_bytes: int
    glibc: str | None


class Observed(BaseModel):
    """Advice: nothing is refused because of it."""

    model_config = _STRICT

    host: Host
    build_seconds: float = Field(ge=0)
    """What all stages took, whether they ran for this bundle or had been kept from before."""
