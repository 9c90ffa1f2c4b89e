"""The facts of a machine as one versioned document: `kiln doctor --json` writes it.

Every command that has to know a machine that isn't this one reads it (`kiln check --host`, `kiln
fleet plan`). A fact that can't be read is named in `unread` and left empty; nothing else depends on
it. No library of a backend is imported: versions come from the installed packages' metadata.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from profiles import profile as profiles
from profiles.disk import Disk, read_disk
from profiles.driver import Card, Driver, read_driver
from profiles.errors import SpecError, UnsupportedError
from profiles.hardware import Cpu, Hardware, read_cpu, read_glibc, read_machine, read_memory
from profiles.libraries import BESIDE, LIBRARIES, version_of
from profiles.tiers import matching

__all__ = [
    "BackendFacts",
    "Facts",
    "installed_libraries",
    "load_facts",
    "read_facts",
    "tier_of",
]

_T = TypeVar("_T")


class BackendFacts(BaseModel):
    """Whether a backend's engines could run on the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str | None
    """Of its library; None where that isn't installed."""
    usable: bool
    fix: str | None
    """What makes it usable where it isn't: a command, or what the machine lacks."""


class Facts(Hardware):
    """What one machine is and has, when it was read."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    glibc: str | None
    """Its version; None where the system has another C library."""
    disk: Disk | None
    """The one that bundles would be written to."""
    cards: tuple[Card, ...]
    driver: str | None
    cuda: str | None
    """The newest version of CUDA that the driver runs."""
    libraries: dict[str, str]
    """Distribution -> installed version, of those that engines run on."""
    backends: tuple[BackendFacts, ...]
    profile: str | None
    """Of profiles/cpu, the one that fits the processor best."""
    tier: str
    """A card's of `profiles.tiers` by the largest card's memory, "below entry", or "processor"
    without a card."""
    unread: tuple[str, ...] = ()
    """Facts that couldn't be read, with the reason; they are empty or 0 above."""

    def document(self) -> dict[str, object]:
        """As `kiln doctor --json` prints it."""
        return self.model_dump(mode="json", by_alias=True)


class _Reader:
    """Reads facts one by one, and keeps the names of those that can't be."""

    def __init__(self) -> None:
        self.unread: list[str] = []

    def __call__(self, name: str, read: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return read()
        except Exception as error:  # whatever a broken system raises, the other facts are still due
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            self.unread.append(f"{name}: {reason}")
            return otherwise


def read_facts(where: str | Path = ".", *, ask_driver: bool = True) -> Facts:
    """The facts of this machine and of the disk at `where`.

    Takes some milliseconds, and as long as nvidia-smi does where nvidia-ml-py isn't installed;
    without `ask_driver` the machine is described as one without cards.
    """
    read = _Reader()
    found = read("NVIDIA driver", read_driver, None) if ask_driver else None
    total, available = read("memory", read_memory, (0, 0))
    installed = installed_libraries()
    facts = Facts(
        os=platform.system(),
        machine=read_machine(),
        cpu=read("processor", read_cpu, Cpu(name="unknown", cores=1, isa=())),
        ram_bytes=total,
        ram_available_bytes=available,
        glibc=read("glibc", read_glibc, None),
        disk=read("disk", lambda: read_disk(where), None),
        cards=found.cards if found else (),
        driver=found.version if found else None,
        cuda=found.cuda if found else None,
        libraries=installed,
        backends=_backends(installed, found),
        profile=None,
        tier=tier_of(found.cards if found else ()),
    )
    profile = read("profile", lambda: _profile(facts), None)
    return facts.model_copy(update={"profile": profile, "unread": tuple(read.unread)})


def load_facts(path: Path) -> Facts:
    """The facts that `kiln doctor --json` wrote to `path`; SpecError where it holds none."""
    try:
        return Facts.model_validate_json(path.read_bytes())
    except OSError as error:
        reason = error.strerror or "can't be read"
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the top"
        reason = f"wrong at {where}: {first['msg']}"
    raise SpecError(
        f"{path} holds no facts of a machine ({reason}): write them there with "
        f"`kiln doctor --json > {path.name}`."
    )


def installed_libraries() -> dict[str, str]:
    """Distribution -> version of what engines run on, from metadata alone."""
    names = [name for library in LIBRARIES.values() for name in library.distributions]
    found = {}
    for name in sorted({*names, *BESIDE}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def tier_of(cards: tuple[Card, ...]) -> str:
    """The tier of the largest card's memory."""
    if not cards:
        return "processor"
    found = matching(max(card.memory_bytes or 0 for card in cards), "card")
    return found.name if found else "below entry"


def _backends(installed: Mapping[str, str], driver: Driver | None) -> tuple[BackendFacts, ...]:
    found = []
    for name, library in LIBRARIES.items():
        here = version_of(library.distributions[0], installed)
        fix = None if here else library.install
        if library.on_card and driver is None:
            fix = "needs an NVIDIA card and its driver, which this machine doesn't show"
        found.append(BackendFacts(name=name, version=here, usable=fix is None, fix=fix))
    return tuple(found)


def _profile(facts: Hardware) -> str | None:
    try:
        return profiles.match(facts).name
    except UnsupportedError:
        return None
