"""What a bundle or a model takes of a device's memory, for `kiln plan`: rows, a pick, the tier."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from profiles.errors import SpecError
from profiles.tiers import Device, matching
from runners.memory import Asked, Parts, Row, choose, gib, is_guided, parts_of, rows
from runners.requests import sides_of
from runners.signature import Dim

if TYPE_CHECKING:
    from profiles.facts import Facts
    from runners.manifest import Manifest

__all__ = [
    "Budget",
    "Outlook",
    "budget_of",
    "document",
    "lines",
    "memory_of",
    "outlook_of",
    "tier_verdict",
]

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power, _letter: 1024**_power}


@dataclass(frozen=True)
class Outlook:
    """Everything that `kiln plan` needs to know of a bundle or a model."""

    name: str
    family: str
    device: Device
    parts: Parts
    side: Dim
    """Legal sides in pixels."""
    native: int
    batch_max: int | None
    """Pictures at once that a bundle was compiled for; None for a model."""
    guided: bool
    tokens: int
    build_bytes: Mapping[str, int]
    """Variant -> the peak of compiling it; empty for a bundle."""

    def asked(self, width: int, height: int, batch: int) -> Asked:
        """What is to be drawn; SpecError, with the nearest that is legal, for what isn't."""
        if not (self.side.legal(width) and self.side.legal(height)):
            near = f"{self.side.nearest(width)}x{self.side.nearest(height)}"
            raise SpecError(
                f"--size {width}x{height} is not among the sizes of {self.name} (sides of "
                f"{self.side.describe()}): use {near}."
            )
        if batch < 1 or (self.batch_max is not None and batch > self.batch_max):
            most = f"1 to {self.batch_max}" if self.batch_max else "1 or more"
            raise SpecError(f"--batch {batch} is not possible with {self.name}: use {most}.")
        return Asked(width, height, batch, guided=self.guided, tokens=self.tokens)


@dataclass(frozen=True)
class Budget:
    """How much memory there is, and of what."""

    bytes: int
    total_bytes: int
    """Of the whole device, by which its tier goes."""
    what: str
    """In words: where the number comes from."""


def outlook_of(manifest: Manifest, name: str) -> Outlook:
    """Of a bundle; SpecError where it carries no measurement."""
    parts = parts_of(manifest)
    if parts is None:
        raise SpecError(
            f"{name} says nothing of memory (it was compiled by an older kiln, or for a machine "
            "that wasn't there): compile it again, or plan for the model that it was made from."
        )
    dims = {dim.name: dim for dim in manifest.component("denoiser").signature.dims}
    return Outlook(
        name=name,
        family=manifest.model.family,
        device="card" if manifest.on_card else "processor",
        parts=parts,
        side=sides_of(manifest),
        native=manifest.native_size,
        batch_max=int(manifest.recipe["batch"]),
        guided=is_guided(manifest),
        tokens=dims["tokens"].opt if "tokens" in dims else 77,
        build_bytes={},
    )


def memory_of(text: str) -> int:
    """Bytes of `--memory`: "8GiB", "8G", "7.5 GB" or "8000000000"; SpecError for anything else."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        raise SpecError(
            f"--memory {text} is no size: write it as 8GiB, 7.5GB or a number of bytes."
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def budget_of(facts: Facts, device: Device, given: int | None) -> Budget:
    """What a machine has free for engines on `device`, or what was given.

    Of several cards the one with the most free memory counts, for a pipeline runs on one. Raises
    SpecError where that couldn't be read.
    """
    if given is not None:
        return Budget(given, given, "as --memory says")
    if device == "card":
        known = [card for card in facts.cards if card.memory_free_bytes]
        if not known:
            raise SpecError(
                "The machine shows no card whose free memory could be read: say how much there is "
                "with --memory 8GiB."
            )
        card = max(known, key=lambda one: one.memory_free_bytes or 0)
        free = card.memory_free_bytes or 0
        return Budget(free, card.memory_bytes or free, f"free on {card.name}")
    if not facts.ram_available_bytes:
        raise SpecError(
            "The machine's free memory couldn't be read: say how much there is with --memory 8GiB."
        )
    return Budget(facts.ram_available_bytes, facts.ram_bytes, "of the machine's memory is free")


def tier_verdict(outlook: Outlook, budget: Budget) -> dict[str, Any] | None:
    """Whether the largest side of the device's tier fits it, and what stands in the way otherwise;
    None below the smallest tier.
    """
    tier = matching(budget.total_bytes, outlook.device)
    if tier is None:
        return None
    said: dict[str, Any] = {"name": tier.name, "side": tier.side, "reached": False, "why": None}
    side = outlook.side.nearest(tier.side)
    if side < tier.side and outlook.batch_max is not None:
        return {**said, "why": f"the bundle was compiled for sides of {outlook.side.describe()}"}
    found = rows(outlook.parts, outlook.asked(side, side, 1))
    best = next((row for row in found if row.peak_bytes <= budget.bytes), None)
    if best is not None:
        return {**said, "reached": True, "why": best.way.describe()}
    least = min(found, key=lambda row: row.peak_bytes)
    return {**said, "why": _obstacle(outlook, least, side)}


def _obstacle(outlook: Outlook, row: Row, side: int) -> str:
    """What makes the largest stage of a row so large."""
    stage = max(row.stages, key=lambda one: one.peak_bytes)
    parts = outlook.parts
    opened = {
        "text_encoding": parts.text_encoders,
        "encoding": (parts.encoder,),
        "denoising": (parts.denoisers[row.way.variant],),
        "decoding": (parts.decoder,),
    }[stage.name]
    weights = max(part.resident_bytes for part in opened if part is not None)
    rest = max(0, stage.peak_bytes - weights - parts.pipeline.base_bytes)
    return (
        f"{stage.name.replace('_', ' ')} at {side} px takes {gib(stage.peak_bytes)} with "
        f"{row.way.describe()}: {gib(weights)} of weights, {gib(rest)} of activations and files, "
        f"{gib(parts.pipeline.base_bytes)} of libraries"
    )


def document(outlook: Outlook, found: tuple[Row, ...], budget: Budget) -> dict[str, Any]:
    """As `kiln plan --json` prints it; OutOfMemory where no row fits."""
    pick = choose(found, budget.bytes)
    return {
        "name": outlook.name,
        "family": outlook.family,
        "device": outlook.device,
        "source": outlook.parts.pipeline.source,
        "memory_bytes": budget.bytes,
        "base_bytes": outlook.parts.pipeline.base_bytes,
        "predicted_peak_bytes": pick.peak_bytes,
        "pick": _row(outlook, pick, budget),
        "rows": [_row(outlook, row, budget) for row in found],
        "tier": tier_verdict(outlook, budget),
    }


def _row(outlook: Outlook, row: Row, budget: Budget) -> dict[str, Any]:
    way = row.way
    return {
        "variant": way.variant,
        "residency": way.residency,
        "tiled": way.tiled,
        "batch": way.batch,
        "peak_bytes": row.peak_bytes,
        "fits": row.peak_bytes <= budget.bytes,
        "stages": {stage.name: stage.peak_bytes for stage in row.stages},
        "build_bytes": outlook.build_bytes.get(way.variant),
    }


def lines(said: Mapping[str, Any], what: str) -> list[str]:
    """The document as a table for people; `what`: where the memory's number comes from."""
    stages = list(said["rows"][0]["stages"])
    names = "".join(f"{name.replace('_', ' '):>16}" for name in stages)
    built = any(row["build_bytes"] for row in said["rows"])
    text = [f"{'':<42}{names}{'build' if built else '':>10}   (GiB)"]
    for row in said["rows"]:
        way = f"{row['variant']}, {row['residency']}"
        way += ", tiled" if row["tiled"] else ""
        way += f", batch {row['batch']}" if row["batch"] > 1 else ""
        numbers = "".join(f"{row['stages'][name] / 2**30:>16.2f}" for name in stages)
        build = f"{row['build_bytes'] / 2**30:>10.2f}" if row["build_bytes"] else f"{'':>10}"
        text.append(f"{'* ' if row == said['pick'] else '  '}{way:<40}{numbers}{build}{_fits(row)}")
    base, peak = gib(said["base_bytes"]), gib(said["predicted_peak_bytes"])
    free = gib(said["memory_bytes"])
    text.append(f"* fits best: {peak}, {base} of it libraries ({said['source']}); {free} {what}")
    if (tier := said["tier"]) is not None:
        verdict = "fits with" if tier["reached"] else "doesn't fit:"
        text.append(f"tier {tier['name']}: {tier['side']} px {verdict} {tier['why']}")
    return text


def _fits(row: Mapping[str, Any]) -> str:
    return "" if row["fits"] else "   too large"
