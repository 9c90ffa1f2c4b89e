"""Memory tiers as data (tiers.toml): what cards and processors of so much memory should do."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from profiles.toml_file import parse_toml

if TYPE_CHECKING:
    from profiles.facts import Facts

__all__ = ["Device", "Tier", "matching", "tier_for", "tiers"]

Device = Literal["card", "processor"]

_STRICT = ConfigDict(frozen=True, extra="forbid")
_BELOW = 0.94
"""Drivers report up to 6 % less memory than a card is sold with (profiles/gpu), and systems keep up
to a sixteenth of a machine's for themselves."""


class Tier(BaseModel):
    """What a device of so much memory should do."""

    model_config = _STRICT

    name: str
    device: Device
    memory_gib: int = Field(gt=0)
    """Of the smallest one that is in the tier."""
    quant: str
    """The denoiser's level that is expected to fit at `side`."""
    residency: Literal["keep", "sequential"]
    """How parts are expected to be held at `side`."""
    side: int = Field(gt=0)
    """Pixels of the largest square picture that should be reached."""
    source: str

    def describe(self) -> str:
        """In words, for a sentence."""
        held = "all parts kept" if self.residency == "keep" else "one part at a time"
        return (
            f"{self.name} (from {self.memory_gib} GB): {self.quant}, {held}, up to {self.side} px"
        )


class _File(BaseModel):
    model_config = _STRICT

    name: str
    tier: tuple[Tier, ...]


@cache
def tiers(device: Device) -> tuple[Tier, ...]:
    """Those of a kind of device, the smallest first."""
    text = Path(__file__).with_name("tiers.toml").read_text("utf-8")
    found = parse_toml(_File, text, what="file of", name="tiers").tier
    return tuple(sorted((t for t in found if t.device == device), key=lambda tier: tier.memory_gib))


def matching(memory_bytes: int, device: Device) -> Tier | None:
    """The largest tier that so much memory is in; None below the smallest."""
    gib = memory_bytes / 2**30
    fitting = [tier for tier in tiers(device) if gib >= _BELOW * tier.memory_gib]
    return fitting[-1] if fitting else None


def tier_for(facts: Facts) -> Tier | None:
    """The tier of a machine: its largest card's, or its memory's where it has no card."""
    if facts.cards:
        return matching(max(card.memory_bytes or 0 for card in facts.cards), "card")
    return matching(facts.ram_bytes, "processor")
