"""What a built, or planned, engine requires of a machine: from its backend's data and its job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from optimizer.backends import INT8_PRODUCTS, Backend, backend
from optimizer.job import Job
from profiles.hardware import BF16, INT8_DOT
from runners.needs import release
from runners.requires import LibraryNeed, Requires

__all__ = ["Native", "native_of", "requires_of"]

_SYSTEMS = ("Darwin", "Linux", "Windows")
_PROCESSOR = {"x86_64": (("sse4_2",),)}
"""Machine -> what torch and the processors' libraries can't do without (their requirements)."""


@dataclass(frozen=True)
class Native:
    """What an engine that is native code was compiled for."""

    isa: tuple[str, ...]
    """Names of `profiles.hardware.ISA`, all of which are needed."""
    glibc: str | None


def native_of(properties: Mapping[str, object]) -> Native:
    """What an engine's properties say of its own code."""
    isa = tuple(name for name in str(properties.get("isa", "")).split(",") if name)
    return Native(isa, str(properties.get("glibc", "")) or None)


def requires_of(
    job: Job,
    *,
    built_on: tuple[str, str],
    version: str,
    memory_bytes: int,
    capabilities: tuple[str, ...] | None = None,
    native: Native | None = None,
) -> Requires:
    """The needs of a job's engine.

    `built_on` is the system and the machine, `version` the library's that built it. Without
    `capabilities` the cards are the plan's; `native` says what the engine's own code needs.
    """
    known = backend(job.backend)
    runs, on_card = known.runs, known.device == "gpu"
    system, machine = built_on
    systems, machines = runs.only or ((system,) if runs.own_system else _SYSTEMS, (machine,))
    return Requires(
        systems=systems,
        machines=machines,
        only_there=runs.only is not None,
        glibc=max(runs.glibc, (native and native.glibc) or runs.glibc, key=release),
        isa=() if on_card else _PROCESSOR.get(machine, ()),
        build_isa=(
            *((BF16,) if job.dtype == "bf16" and not on_card else ()),
            *((name,) for name in (native.isa if native else ())),
        ),
        fast_isa=(INT8_DOT,) if _rounds_inputs(job) and not on_card else (),
        capabilities=(capabilities or job.capabilities or runs.portable) if on_card else None,
        buildable=known.capabilities,
        driver=runs.driver,
        library=_library(known, version),
        memory_bytes=memory_bytes,
        streams=job.weight_streaming,
    )


def _rounds_inputs(job: Job) -> bool:
    """Whether layers run on int8 products."""
    return any(scheme.format in INT8_PRODUCTS for scheme in job.layers.values())


def _library(known: Backend, built_by: str) -> LibraryNeed:
    """The library and its version; any, where it isn't known what will build."""
    numbers, rule = release(built_by), known.runs.rule
    if known.runs.floor is not None:
        version = known.runs.floor
    elif not numbers:
        version, rule = "0", "minimum"
    else:
        version = ".".join(map(str, numbers if rule == "exact" else numbers[:2]))
    return LibraryNeed(distribution=known.library, version=version, rule=rule)
