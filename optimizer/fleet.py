"""`kiln fleet plan`: which bundles many machines need, where each is built, who gets which."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from profiles.errors import PartialError, SpecError
from profiles.facts import Facts, load_facts
from runners.console import Console

if TYPE_CHECKING:
    from optimizer.fleet_plan import FleetPlan, Variant

__all__ = ["fleet_command"]

_SHOWN = 4
"""Machines that are named of those that can build one bundle."""


@click.group("fleet")
def fleet_command() -> None:
    """Plan builds for many machines, from what `kiln doctor --json` said on each."""


@fleet_command.command("plan")
@click.argument("arguments", metavar="HOST.json... MODEL|RECIPE", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
def _plan(arguments: tuple[str, ...], as_json: bool) -> None:  # noqa: FBT001
    """The fewest builds of MODEL (or of a RECIPE's file) that run on all the machines."""
    from optimizer.fleet_plan import plan_fleet
    from optimizer.recipe import Recipe, load_recipe
    from optimizer.source import resolve

    *files, model = arguments
    if not files:
        raise SpecError(
            "Give the machines' facts first and the MODEL last: write facts on each with "
            "`kiln doctor --json > NAME.json`."
        )
    hosts = _hosts([Path(file) for file in files])
    is_recipe = model.endswith(".json")
    recipe = load_recipe(Path(model)) if is_recipe else Recipe(model=model)
    console = Console(json_output=as_json)
    source = resolve(recipe.model, revision=recipe.revision, console=console)
    plan = plan_fleet(recipe, source, hosts)
    console.result(_text(plan, hosts, model), _document(plan, hosts, model))
    if plan.uncovered:
        name, why = next(iter(plan.uncovered.items()))
        raise PartialError(
            f"{len(plan.uncovered)} of {len(hosts)} machines get no bundle; {name}: {why}"
        )


def _hosts(files: list[Path]) -> dict[str, Facts]:
    """Facts by the names of their files; SpecError where two have one name."""
    names = [file.stem for file in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SpecError(f"Two files are called {twice[0]}: give every machine another name.")
    return {file.stem: load_facts(file) for file in files}


def _document(plan: FleetPlan, hosts: Mapping[str, Facts], model: str) -> dict[str, Any]:
    return {
        "variants": [
            {
                "name": one.name,
                "command": one.command(model),
                "build_on": one.builders(hosts),
                "builds_for_others": one.anywhere,
                "predicted_bytes": sum(size for _, size in one.parts()),
                "predicted_memory_bytes": one.plan.predicted_memory_bytes,
                "machines": [name for name, got in plan.machines.items() if got is one],
            }
            for one in plan.variants
        ],
        "machines": {
            name: {
                "variant": one.name,
                "outcome": one.verdicts[name].outcome,
                "reason": one.verdicts[name].reason,
                "missing": _missing(one, hosts[name]),
                "idle_card": plan.idle_cards.get(name),
            }
            for name, one in plan.machines.items()
        },
        "uncovered": dict(plan.uncovered),
        "predicted_bytes": plan.bytes,
    }


def _missing(one: Variant, facts: Facts) -> str | None:
    """What still has to be installed on a machine that gets this build."""
    from runners.compatibility import Reason, met

    verdict = met(one.needs, facts)
    libraries = (Reason.LIBRARY_MISSING, Reason.LIBRARY_TOO_OLD, Reason.LIBRARY_DIFFERS)
    return verdict.sentence if verdict.reason in libraries else None


def _text(plan: FleetPlan, hosts: Mapping[str, Facts], model: str) -> str:
    width = 2 + max(map(len, ("machine", *hosts)))
    lines = [f"{'machine':<{width}}{'verdict':<12}bundle"]
    for name in hosts:
        if name in plan.machines:
            one = plan.machines[name]
            lines.append(f"{name:<{width}}{one.verdicts[name].outcome:<12}{one.name}")
            said = (_missing(one, hosts[name]), plan.idle_cards.get(name))
            lines += [f"{'':<{width}}{words}" for words in said if words is not None]
        else:
            lines.append(f"{name:<{width}}{'none':<12}{plan.uncovered[name]}")
    for one in plan.variants:
        lines += ["", f"{one.command(model)}", f"  build on {_where(one, hosts)}"]
    total = sum(size for one in plan.variants for _, size in one.parts())
    shared = total - plan.bytes
    lines += [
        "",
        f"{len(plan.variants)} builds, {plan.bytes / 1e6:.1f} MB in all"
        + (f" ({shared / 1e6:.1f} MB are shared)" if shared else ""),
    ]
    return "\n".join(lines)


def _where(one: Variant, hosts: Mapping[str, Facts]) -> str:
    able, memory = one.builders(hosts), one.plan.predicted_memory_bytes / 2**30
    if not able:
        return f"another machine: it takes {memory:.1f} GiB of memory, more than these have"
    kind = "any machine, such as" if one.anywhere else "one of"
    more = f" and {len(able) - _SHOWN} more" if len(able) > _SHOWN else ""
    return f"{kind} {', '.join(able[:_SHOWN])}{more} ({memory:.1f} GiB of memory)"
