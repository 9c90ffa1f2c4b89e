"""The checks of an engine's needs against a machine's facts, each with its reason code.

Whatever isn't known of a machine is held against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import NamedTuple

from profiles.driver import Card
from profiles.facts import Facts
from profiles.hardware import BF16
from profiles.libraries import version_of
from profiles.target import sm
from runners.requires import Groups, Requires

__all__ = ["Finding", "Outcome", "Reason", "findings", "release"]


class Outcome(StrEnum):
    """What can be done with a bundle on a machine, the best first."""

    RUN = "run"
    RUN_SLOWER = "run-slower"
    REBUILD = "rebuild"
    """Another build of the same recipe would run there."""
    REFUSE = "refuse"
    """No build of the recipe runs there as the machine is."""

    @property
    def runs(self) -> bool:
        """Whether the engines can be opened."""
        return self in (Outcome.RUN, Outcome.RUN_SLOWER)


class Reason(StrEnum):
    """Why: stable codes, in the order in which they are given where several are true."""

    MEETS_ALL = "meets-all"
    NO_CARD = "no-card"
    DRIVER_TOO_OLD = "driver-too-old"
    CARD_UNSUPPORTED = "card-unsupported"
    OTHER_CARD = "other-card"
    OTHER_MACHINE = "other-machine"
    OTHER_SYSTEM = "other-system"
    GLIBC_TOO_OLD = "glibc-too-old"
    ISA_MISSING = "isa-missing"
    BUILD_ISA_MISSING = "build-isa-missing"
    LIBRARY_MISSING = "library-missing"
    LIBRARY_TOO_OLD = "library-too-old"
    LIBRARY_DIFFERS = "library-differs"
    MEMORY_TOO_SMALL = "memory-too-small"
    WEIGHTS_STREAMED = "weights-streamed"
    SLOW_ISA = "slow-isa"


class Finding(NamedTuple):
    """What a check found."""

    outcome: Outcome
    reason: Reason
    needed: str
    there: str
    """What is there instead, as a clause."""
    fix: str


def findings(needs: Mapping[str, Requires], facts: Facts) -> Iterator[tuple[str | None, Finding]]:
    """Everything that engines, by their names, need and `facts` doesn't have.

    What is true of all together comes without a name.
    """
    for name, need in needs.items():
        for check in _CHECKS:
            if (finding := check(need, facts)) is not None:
                yield name, finding
    if (finding := _memory(tuple(needs.values()), facts)) is not None:
        yield None, finding


def _card(need: Requires, facts: Facts) -> Finding | None:
    if need.capabilities is None:
        return None
    wanted = ", ".join(map(sm, need.capabilities)) or "any NVIDIA card"
    if not facts.cards:
        fix = "check the driver with nvidia-smi, or compile for this machine without --target"
        there = "no NVIDIA card is usable here"
        return Finding(Outcome.REFUSE, Reason.NO_CARD, wanted, there, fix)
    here = [card.capability for card in facts.cards if card.capability is not None]
    if (here and not need.capabilities) or set(here) & set(need.capabilities):
        return None
    best = next((one for one in here if not need.buildable or one in need.buildable), None)
    names = " and ".join(card.name for card in facts.cards)
    there = f"{sm(best) if best else ', '.join(map(sm, here)) or 'unknown'} ({names}) is here"
    if best is None:
        fix = "compile for the processor without --target, or use another card"
        return Finding(Outcome.REFUSE, Reason.CARD_UNSUPPORTED, wanted, there, fix)
    fix = f"compile with --target {sm(best)}" if need.buildable else "compile it again there"
    return Finding(Outcome.REBUILD, Reason.OTHER_CARD, wanted, there, fix)


def _driver(need: Requires, facts: Facts) -> Finding | None:
    if need.driver is None or not facts.cards or _since(facts.driver, need.driver):
        return None
    there = f"{facts.driver or 'an unknown one'} is here"
    fix = "update NVIDIA's driver"
    return Finding(
        Outcome.REFUSE, Reason.DRIVER_TOO_OLD, f"NVIDIA's driver {need.driver}", there, fix
    )


def _machine(need: Requires, facts: Facts) -> Finding | None:
    if not need.machines or facts.machine in need.machines:
        return None
    wanted, there = ", ".join(need.machines), f"the machine is {facts.machine}"
    return Finding(_elsewhere(need), Reason.OTHER_MACHINE, wanted, there, _elsewhere_fix(need))


def _system(need: Requires, facts: Facts) -> Finding | None:
    if not need.systems or facts.os in need.systems:
        return None
    wanted, there = ", ".join(need.systems), f"the system is {facts.os}"
    return Finding(_elsewhere(need), Reason.OTHER_SYSTEM, wanted, there, _elsewhere_fix(need))


def _elsewhere(need: Requires) -> Outcome:
    return Outcome.REFUSE if need.only_there else Outcome.REBUILD


def _elsewhere_fix(need: Requires) -> str:
    if need.only_there:
        return "compile for the processor without --target"
    return "compile it again there"


def _glibc(need: Requires, facts: Facts) -> Finding | None:
    if need.glibc is None or facts.os != "Linux" or _since(facts.glibc, need.glibc):
        return None
    there = f"{facts.glibc or 'another C library'} is here"
    fix = "use a newer release of the system"
    return Finding(Outcome.REFUSE, Reason.GLIBC_TOO_OLD, f"glibc {need.glibc}", there, fix)


def _isa(need: Requires, facts: Facts) -> Finding | None:
    if not (missing := _missing(need, need.isa, facts)):
        return None
    fix = "use a newer processor"
    return Finding(Outcome.REFUSE, Reason.ISA_MISSING, missing, f"{facts.cpu.name} lacks it", fix)


def _build_isa(need: Requires, facts: Facts) -> Finding | None:
    if not (missing := _missing(need, need.build_isa, facts)):
        return None
    there = f"{facts.cpu.name} lacks it"
    bf16 = missing == " or ".join(BF16)
    fix = "compile it again with --dtype fp32" if bf16 else "compile it again there"
    return Finding(Outcome.REBUILD, Reason.BUILD_ISA_MISSING, missing, there, fix)


def _fast_isa(need: Requires, facts: Facts) -> Finding | None:
    if not (missing := _missing(need, need.fast_isa, facts)):
        return None
    there = f"{facts.cpu.name} lacks it"
    fix = "it runs, and 8-bit layers take several instructions a product"
    return Finding(Outcome.RUN_SLOWER, Reason.SLOW_ISA, missing, there, fix)


def _library(need: Requires, facts: Facts) -> Finding | None:
    library, rule = need.library, need.library.rule
    name, wanted = library.distribution, f"{library.distribution} {library.version}"
    here = version_of(name, facts.libraries)
    there = f"{here or 'none'} is installed"
    if here is None:
        fix = f'run pip install "{name}{"==" if rule == "exact" else ">="}{library.version}"'
        return Finding(Outcome.REFUSE, Reason.LIBRARY_MISSING, wanted, there, fix)
    if rule == "exact" and release(here) != release(library.version):
        fix = f'run pip install "{name}=={library.version}", or compile the bundle again'
        return Finding(Outcome.REBUILD, Reason.LIBRARY_DIFFERS, wanted, there, fix)
    if not _since(here, library.version):
        fix = f'run pip install -U "{name}>={library.version}"'
        return Finding(Outcome.REFUSE, Reason.LIBRARY_TOO_OLD, f"{wanted} or later", there, fix)
    return None


_CHECKS: tuple[Callable[[Requires, Facts], Finding | None], ...] = (
    _card,
    _driver,
    _machine,
    _system,
    _glibc,
    _isa,
    _build_isa,
    _fast_isa,
    _library,
)


def _memory(needs: tuple[Requires, ...], facts: Facts) -> Finding | None:
    """All engines stay open together, so their sum counts; `_card` sees to its kind."""
    on_card = tuple(need for need in needs if need.capabilities is not None)
    fixed = sum(need.memory_bytes for need in on_card if not need.streams)
    whole = sum(need.memory_bytes for need in on_card)
    here = sum(need.memory_bytes for need in needs) - whole
    cards = [card for card in facts.cards if _fits(card, on_card)]
    room = max((card.memory_bytes or 0 for card in cards), default=whole)
    wanted = f"{_gib(whole)} of the card's memory"
    there = f"it has {_gib(room)}" if room else "how much it has isn't known"
    if fixed > room:
        fix = "use a card with more memory, or compile with fewer bits (--quant int4)"
        return Finding(Outcome.REFUSE, Reason.MEMORY_TOO_SMALL, wanted, there, fix)
    streamed = whole - fixed if whole > room else 0
    if here + streamed > facts.ram_bytes:
        wanted, there = f"{_gib(here + streamed)} of memory", f"there are {_gib(facts.ram_bytes)}"
        fix = "use a machine with more memory, or compile with fewer bits (--quant int4)"
        return Finding(Outcome.REFUSE, Reason.MEMORY_TOO_SMALL, wanted, there, fix)
    if not streamed:
        return None
    fix = "it runs, and reads weights from the machine's memory at each step"
    return Finding(Outcome.RUN_SLOWER, Reason.WEIGHTS_STREAMED, wanted, there, fix)


def _fits(card: Card, needs: tuple[Requires, ...]) -> bool:
    """Whether a card is of a kind that all the engines run on."""
    return all(not need.capabilities or card.capability in need.capabilities for need in needs)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _missing(need: Requires, groups: Groups, facts: Facts) -> str:
    """The instruction sets that a processor lacks, where it is of the kind that has such names."""
    if need.machines and facts.machine not in need.machines:
        return ""
    lacking = [group for group in groups if not set(group) & set(facts.cpu.isa)]
    return " and ".join(" or ".join(group) for group in lacking)


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, trailing zeros off: "2.13.0+cpu" is (2, 13).

    A release candidate counts as what comes before its first number that isn't one.
    """
    numbers = []
    for part in version.partition("+")[0].split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _since(here: str | None, floor: str) -> bool:
    return here is not None and release(here) >= release(floor)
