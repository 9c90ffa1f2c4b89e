"""`kiln doctor`: what this machine is and has, which backends are usable, what to improve."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from runners.console import Console

if TYPE_CHECKING:
    from profiles.facts import Facts

__all__ = ["advice", "doctor_command"]

_GIB = 2**30


@click.command("doctor")
@click.option(
    "--json", "as_json", is_flag=True, help="The facts as one JSON line, for other hosts."
)
def doctor_command(as_json: bool) -> None:  # noqa: FBT001
    """Show this machine's facts: processor, memory, disk, cards, and usable backends."""
    from profiles.facts import read_facts

    facts = read_facts()
    Console(json_output=as_json).result("\n".join(_lines(facts)), facts.document())


def _lines(facts: Facts) -> Iterator[str]:
    libc = f", glibc {facts.glibc}" if facts.glibc else ""
    yield f"system     {facts.os} on {facts.machine}{libc}"
    yield f"processor  {facts.cpu.name}, {facts.cpu.cores} cores ({', '.join(facts.cpu.isa)})"
    yield f"memory     {_gib(facts.ram_bytes)}, {_gib(facts.ram_available_bytes)} available"
    if facts.disk is not None:
        kind = {True: "NVMe", False: "not NVMe", None: "NVMe or not isn't told"}[facts.disk.nvme]
        yield f"disk       {_gib(facts.disk.free_bytes)} free here ({kind})"
    if not facts.cards:
        yield "cards      no NVIDIA card with a driver"
    for card in facts.cards:
        memory = "of unknown memory"
        if card.memory_bytes is not None:
            memory = f"{_gib(card.memory_bytes)}, {_gib(card.memory_free_bytes or 0)} free"
        yield f"card       {card.name}, compute capability {card.capability}, {memory}"
    if facts.driver:
        yield f"driver     {facts.driver}, CUDA up to {facts.cuda}"
    yield f"profile    {facts.profile or 'none fits'}"
    yield f"tier       {_tier(facts)}"
    for one in facts.backends:
        state = "usable" if one.usable else f"not usable: {one.fix}"
        yield f"backend    {one.name:<13}{one.version or 'not installed':<15}{state}"
    for what, passes, words in advice(facts):
        yield f"{'pass' if passes else 'advice':<11}{what}: {words}"
    for fact in facts.unread:
        yield f"not read   {fact}"


def _tier(facts: Facts) -> str:
    """The matched tier in words: of the largest card, or of the machine's memory without one."""
    from profiles.tiers import tier_for

    found = tier_for(facts)
    return found.describe() if found else "below the smallest: the least is 8 GB"


def advice(facts: Facts) -> Iterator[tuple[str, bool, str]]:
    """The requirements of the guide that the project grew from: what, whether it is met, words."""
    yield "8 cores or more", facts.cpu.cores >= 8, f"{facts.cpu.cores} are usable"
    ram = facts.ram_bytes / _GIB
    # systems keep up to a sixteenth for themselves: a machine sold with 16 GB shows 15.x GiB
    enough = "16 are the least and 32 recommended" if ram < 30 else "enough"
    yield "16 GB of memory, 32 recommended", ram >= 15, f"{ram:.1f} GiB, {enough}"
    if facts.disk is not None:
        free = facts.disk.free_bytes / _GIB
        words = f"{free:.0f} GiB are free" + (
            "" if free >= 100 else "; a fleet of models takes 100"
        )
        yield "50 to 100 GB free", free >= 50, words
        told = {True: "it is", False: "it isn't: loading takes longer", None: "isn't told here"}
        yield "on NVMe", facts.disk.nvme is True, told[facts.disk.nvme]
    words = "no card: engines for the processor run" if not facts.cards else f"tier {facts.tier}"
    yield "8 GB of card memory", facts.tier not in ("processor", "below entry"), words


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
