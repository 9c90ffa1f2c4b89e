"""`kiln profiles`: the kinds of machines and the cards that kiln knows, and all that it knows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from runners.console import Console

if TYPE_CHECKING:
    from profiles.gpu import Gpu
    from profiles.profile import Profile

__all__ = ["profiles_command"]

_PEAK_UNIT = "10^12 dense operations a second"


@click.group("profiles", invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="All of it as one JSON line.")
@click.pass_context
def profiles_command(ctx: click.Context, as_json: bool) -> None:  # noqa: FBT001
    """List the kinds of machines (--profile) and the cards (--target) that kiln knows."""
    ctx.obj = as_json
    if ctx.invoked_subcommand is not None:
        return
    from profiles import gpu, profile

    machines = [profile.load(name) for name in profile.names()]
    cards = [gpu.load(name) for name in gpu.names()]
    document = {
        "profiles": [machine.model_dump(mode="json") for machine in machines],
        "cards": [_card_document(card) for card in cards],
    }
    text = f"{_machine_table(machines)}\n\n{_card_table(cards)}"
    Console(json_output=as_json).result(text, document)


@profiles_command.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="All of it as one JSON line.")
@click.pass_obj
def _show(
    group_as_json: bool,  # noqa: FBT001
    name: str,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Show everything of NAME, a profile or a card, with the source of every number."""
    from profiles import gpu, profile
    from profiles.errors import SpecError

    console = Console(json_output=as_json or group_as_json)
    if name in profile.names():
        machine = profile.load(name)
        console.result(_machine_text(machine), machine.model_dump(mode="json"))
    elif name in gpu.names():
        card = gpu.load(name)
        console.result(_card_text(card), _card_document(card))
    else:
        near = gpu.nearest(name, (*profile.names(), *gpu.names()))
        raise SpecError(
            f"No profile and no card is called {name!r}{near}: `kiln profiles` lists them all."
        )


def _card_document(card: Gpu) -> dict[str, Any]:
    extra = {"formats": list(card.formats), "fast": list(card.fast)}
    return {**card.model_dump(mode="json"), **extra}


def _machine_table(machines: Iterable[Profile]) -> str:
    lines = [f"{'profile':<22}{'machine':<9}{'quant':<7}{'dtype':<7}description"]
    lines += [
        f"{one.name:<22}{one.machine:<9}{one.quant:<7}{one.dtype:<7}{one.description}"
        for one in machines
    ]
    return "\n".join(lines)


def _card_table(cards: Iterable[Gpu]) -> str:
    """A line a card; a type that the card's tensor cores lack is left blank."""
    shown = ("fp16", "int8", "fp8", "fp4")
    lines = [
        f"{'card':<23}{'capability':>10}{'GiB':>7}{'GB/s':>7}"
        + "".join(f"{kind:>8}" for kind in shown)
        + "  description"
    ]
    for card in cards:
        peaks = card.peak
        lines.append(
            f"{card.name:<23}{card.capability:>10}{card.memory_gib:>7g}{card.bandwidth_gb_s:>7g}"
            + "".join(f"{peaks[kind]:>8.1f}" if kind in peaks else " " * 8 for kind in shown)
            + f"  {card.description.removeprefix('NVIDIA ')}"
        )
    lines.append(f"{shown[0]} to {shown[-1]}: peaks in {_PEAK_UNIT}")
    return "\n".join(lines)


def _machine_text(machine: Profile) -> str:
    return _facts(
        {
            "name": machine.name,
            "description": machine.description,
            "machine": machine.machine,
            "requires": ", ".join(machine.requires) or "nothing",
            "rank": str(machine.rank),
            "backends": ", ".join(machine.backends),
            "quant": machine.quant,
            "dtype": machine.dtype,
        },
        machine.sources,
    )


def _card_text(card: Gpu) -> str:
    from profiles.target import sm

    peaks = ", ".join(f"{kind} {value:g}" for kind, value in card.peak.items())
    return _facts(
        {
            "name": card.name,
            "description": card.description,
            "cards": ", ".join(card.cards),
            "capability": f"{card.capability} ({sm(card.capability)})",
            "memory": f"{card.memory_gib:g} GiB",
            "bandwidth": f"{card.bandwidth_gb_s:g} GB/s",
            "peak": f"{peaks} ({_PEAK_UNIT})",
            "formats": ", ".join(card.formats),
            "fast": f"{', '.join(card.fast)} (more operations a second than fp16)",
        },
        card.sources,
    )


def _facts(facts: dict[str, str], sources: dict[str, str]) -> str:
    lines = [f"{label:<12}{value}" for label, value in facts.items()]
    lines += [f"source of {label}: {source}" for label, source in sources.items()]
    return "\n".join(lines)
