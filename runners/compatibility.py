"""Can a bundle's engines run on a machine? A pure function of the manifest and the machine's facts.

Nothing is opened and no engine's library is imported. Whatever isn't known of a machine is held
against it: "run" is only said where every need is met.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from profiles.errors import DeviceMismatch, KilnError, MissingError, OutOfMemory
from profiles.facts import Facts
from profiles.gpu import SINCE, lacking
from profiles.hardware import BF16
from profiles.target import parse_target
from runners.manifest import Manifest
from runners.needs import Outcome, Reason, findings
from runners.requires import Requires

__all__ = [
    "Outcome",
    "Reason",
    "Verdict",
    "compatibility",
    "met",
    "require_compatible",
    "require_verdict",
]


@dataclass(frozen=True)
class Verdict:
    """The worst that was found of all engines."""

    outcome: Outcome
    reason: Reason
    sentence: str
    """What is needed, what is there, and the fix."""
    needed: str = ""
    found: str = ""
    component: str | None = None
    """The first engine that it is true of; None where it is true of all together."""
    minutes: int | None = None
    """What a rebuild is estimated to take."""
    command: str | None = None
    """Of the rebuild."""

    def document(self) -> dict[str, object]:
        """As `kiln check --json` prints it."""
        return asdict(self)


def compatibility(
    manifest: Manifest, facts: Facts, *, bundle: str = "BUNDLE", variant: str | None = None
) -> Verdict:
    """Whether `facts` meets what the engines of `manifest` require; `bundle` is named in commands.

    Of several findings the worst outcome counts, of equal ones the first reason in `Reason`. Where
    no `variant` of the denoiser is asked for, that which runs best counts.
    """
    asked = list(manifest.denoisers) if variant is None else [variant]
    verdicts = [
        met({entry.name: entry.requires for entry in manifest.run_by(name)}, facts)
        for name in asked
    ]
    verdict = min(verdicts, key=lambda found: list(Outcome).index(found.outcome))
    if verdict.outcome is not Outcome.REBUILD:
        return verdict
    minutes = max(1, math.ceil(manifest.observed.build_seconds / 60))
    command = (
        f"kiln inspect {shlex.quote(bundle)} --recipe > recipe.json && "
        f"kiln compile --recipe recipe.json{_options(verdict, manifest)} -o rebuilt"
    )
    sentence = (
        f"{verdict.sentence} Rebuilding takes about {minutes} min, as it did on "
        f"{manifest.observed.host.cpu.name}: {command}"
    )
    return replace(verdict, sentence=sentence, minutes=minutes, command=command)


def _options(verdict: Verdict, manifest: Manifest) -> str:
    """What a rebuild for the machine must ask for otherwise than the recipe does."""
    if verdict.reason is Reason.BUILD_ISA_MISSING:
        return " --dtype fp32" if BF16[0] in verdict.needed else ""
    if verdict.reason is not Reason.OTHER_CARD or not manifest.recipe.get("target"):
        return ""
    card = verdict.found.split(" ")[0]
    entry = manifest.component("denoiser")
    here = parse_target(card).capabilities
    lesser = "".join(
        f" {option}"
        for value, option in ((entry.dtype, "--dtype fp16"), (entry.quant, "--quant int8"))
        if value in SINCE and lacking(here, value)
    )
    return f" --target {card}{lesser}"


def met(needs: Mapping[str, Requires], facts: Facts) -> Verdict:
    """The verdict on engines by their names, without the command of a rebuild."""
    order = list(Reason)
    found = [
        (list(Outcome).index(finding[0]), -order.index(finding[1]), finding, name)
        for name, finding in findings(needs, facts)
    ]
    if not found:
        return Verdict(Outcome.RUN, Reason.MEETS_ALL, "The machine has all that the engines need.")
    _, _, (outcome, reason, needed, there, fix), name = max(found, key=lambda row: row[:2])
    sentence = f"The engine needs {needed}, and {there}: {fix}."
    return Verdict(outcome, reason, sentence, needed, there, name)


def require_compatible(manifest: Manifest, facts: Facts, variant: str | None = None) -> Verdict:
    """The verdict, where the engines can be opened; else its sentence is raised.

    MissingError where a library isn't installed, OutOfMemory where memory is too small,
    DeviceMismatch for everything else.
    """
    return require_verdict(compatibility(manifest, facts, variant=variant))


def require_verdict(verdict: Verdict) -> Verdict:
    """The verdict, unless it has to be raised: see `require_compatible`."""
    if verdict.outcome.runs:
        return verdict
    kinds: dict[Reason, type[KilnError]] = {
        Reason.LIBRARY_MISSING: MissingError,
        Reason.MEMORY_TOO_SMALL: OutOfMemory,
    }
    raise kinds.get(verdict.reason, DeviceMismatch)(verdict.sentence)
