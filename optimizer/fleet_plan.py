"""Machines x model -> the smallest set of builds that covers them all, from configs and facts.

A machine gets a build of its own kind: for its card where one runs there, else for its processor.
Libraries count as installed, because whoever sets the machines up installs them; what a machine
lacks is said.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from optimizer.backends import BACKENDS, Backend, backend
from optimizer.cover import smallest_cover
from optimizer.digests import digest
from optimizer.job import Job
from optimizer.plan import Plan, make_plan
from optimizer.recipe import Recipe
from optimizer.requiring import requires_of
from optimizer.source import ModelSource
from optimizer.tools import versions
from profiles import profile as profiles
from profiles.errors import KilnError
from profiles.facts import Facts
from profiles.gpu import numbers
from profiles.libraries import version_of
from profiles.target import sm
from runners.compatibility import Outcome, Verdict, met
from runners.requires import Requires

__all__ = ["FleetPlan", "Variant", "candidates", "plan_fleet"]

_CARDS = "nvidia-rtx"


@dataclass(frozen=True)
class Variant:
    """One build, and what it does on each machine."""

    name: str
    plan: Plan
    needs: Mapping[str, Requires]
    """Component -> what its engine will require."""
    own: frozenset[str]
    """Machines whose own profile would choose it."""
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    """Machine -> the verdict, libraries left out."""

    @property
    def on_card(self) -> bool:
        """Whether it runs on cards."""
        return any(need.capabilities is not None for need in self.needs.values())

    @property
    def anywhere(self) -> bool:
        """Whether machines that can't run it can build it."""
        return bool(backend(self.plan.denoiser.backend).capabilities)

    def builders(self, hosts: Mapping[str, Facts]) -> list[str]:
        """The machines that can build it: with its library's system, and memory enough."""
        needed = self.plan.predicted_memory_bytes
        return [
            name
            for name, facts in hosts.items()
            if facts.ram_bytes >= needed
            and (_has_system(self, facts) if self.anywhere else self.verdicts[name].outcome.runs)
        ]

    def parts(self) -> Iterator[tuple[str, int]]:
        """A digest of everything that decides a component's bytes, and how many they will be."""
        for job in self.plan.jobs:
            yield _identity(job), job.bundle_bytes

    def command(self, model: str) -> str:
        """What makes it; `model` is a model or, ending in .json, a recipe."""
        recipe = self.plan.recipe
        given = ["--recipe", model] if model.endswith(".json") else [model]
        options = [
            "--backend",
            str(recipe.backend),
            "--quant",
            ",".join((str(recipe.quant), *recipe.variants)),
        ]
        options += ["--dtype", recipe.dtype]
        if recipe.target:
            options += ["--target", recipe.target]
        return shlex.join(["kiln", "compile", *given, *options, "-o", self.name])


@dataclass(frozen=True)
class FleetPlan:
    """What to build, and who gets what."""

    variants: tuple[Variant, ...]
    machines: Mapping[str, Variant]
    uncovered: Mapping[str, str]
    """Machine -> why nothing fits it."""
    idle_cards: Mapping[str, str]
    """Machine with a card that gets a build for its processor -> what keeps the card from one."""

    @property
    def bytes(self) -> int:
        """Of all variants, equal components counted once."""
        return sum(dict(part for one in self.variants for part in one.parts()).values())


def plan_fleet(recipe: Recipe, source: ModelSource, hosts: Mapping[str, Facts]) -> FleetPlan:
    """The smallest set of builds; of equally small ones, the one that most machines would choose
    for themselves, then the one that runs slower on fewest, then the one of fewest bytes.

    What the recipe decides is kept; the rest comes from each machine's profile.
    """
    found, refused = candidates(recipe, source, hosts)
    usable = {name: _usable(name, found) for name in hosts}
    covered = {name for name, able in usable.items() if able}
    chosen = smallest_cover(
        [
            frozenset(host for host in covered if index in usable[host])
            for index in range(len(found))
        ],
        covered,
        [_cost(one, covered) for one in found],
    )
    machines = {
        host: found[min(usable[host] & chosen, key=lambda index: _rank(host, found[index]))]
        for host in hosts
        if host in covered
    }
    return FleetPlan(
        idle_cards={
            host: why
            for host, one in machines.items()
            if hosts[host].cards
            and not one.on_card
            and (why := _why(host, found, refused, on_card=True))
        },
        variants=tuple(found[index] for index in sorted(chosen)),
        machines=machines,
        uncovered={
            name: _why(name, found, refused, on_card=bool(facts.cards))
            for name, facts in hosts.items()
            if name not in covered
        },
    )


def candidates(
    recipe: Recipe, source: ModelSource, hosts: Mapping[str, Facts]
) -> tuple[list[Variant], dict[str, str]]:
    """Every build that could be of use, and for machines whose own can't be made, why."""
    made: dict[str, Variant] = {}
    refused: dict[str, str] = {}

    def add(wish: Recipe, facts: Facts, own: frozenset[str]) -> bool:
        try:
            one = _variant(wish, source, facts, own)
        except KilnError as error:
            refused.update(dict.fromkeys(own, str(error)))
            return False
        both = one.own | made[one.name].own if one.name in made else one.own
        verdicts = {name: met(one.needs, _set_up(other, one)) for name, other in hosts.items()}
        made[one.name] = Variant(one.name, one.plan, one.needs, both, verdicts)
        return True

    for_cards = recipe.target or (recipe.backend and backend(recipe.backend).device == "gpu")
    if recipe.target:
        add(recipe, next(iter(hosts.values())), frozenset(hosts))
    elif recipe.backend is None or for_cards:
        _add_for_cards(recipe, hosts, add)
    if not for_cards:
        for name, facts in hosts.items():
            add(recipe, facts, frozenset({name}))
    return list(made.values()), refused


def _add_for_cards(
    recipe: Recipe, hosts: Mapping[str, Facts], add: Callable[[Recipe, Facts, frozenset[str]], bool]
) -> None:
    """A cross-build for each architecture and one for all those that can be built, and builds on
    the machines themselves whose card none of them is for.
    """
    crossing = next(one for one in BACKENDS.values() if one.capabilities)
    of_host = {
        name: {card.capability for card in facts.cards if card.capability}
        for name, facts in hosts.items()
    }
    if recipe.backend in (None, crossing.name):
        there = [have for name, have in of_host.items() if _reached(crossing, hosts[name])]
        known = sorted(set().union(*there) & set(crossing.capabilities), key=numbers)
        first = next(iter(hosts.values()))

        def cross(*names: str) -> bool:
            update = {"backend": crossing.name, "target": ",".join(map(sm, names))}
            owners = frozenset(name for name, have in of_host.items() if have & set(names))
            return add(recipe.model_copy(update=update), first, owners)

        able = [name for name in known if cross(name)]
        if len(able) > 1:
            cross(*able)
    own = next(one for one in BACKENDS.values() if one.device == "gpu" and not one.capabilities)
    if recipe.backend in (None, own.name):
        for name, have in of_host.items():
            crossed = _reached(crossing, hosts[name]) and have & set(crossing.capabilities)
            if have and not crossed:
                wish = recipe.model_copy(update={"backend": own.name})
                add(wish, hosts[name], frozenset({name}))


def _reached(crossing: Backend, facts: Facts) -> bool:
    """Whether the library that builds for others runs on the machine's system at all."""
    systems, machines = crossing.runs.only or ((facts.os,), (facts.machine,))
    return facts.os in systems and facts.machine in machines


def _variant(recipe: Recipe, source: ModelSource, facts: Facts, own: frozenset[str]) -> Variant:
    """The plan of a recipe on a machine, and what its engines will require."""
    on_card = recipe.target or (recipe.backend and backend(recipe.backend).device == "gpu")
    profile = profiles.load(_CARDS) if on_card else profiles.match(facts)
    plan = make_plan(recipe, source, profile=profile, hardware=facts)
    job = plan.denoiser
    cards = tuple(sorted({card.capability for card in facts.cards if card.capability}, key=numbers))
    here = cards if on_card and not recipe.target else None
    words = [plan.source.family, job.backend, str(plan.recipe.quant), job.dtype]
    needs = {
        one.spec.name: requires_of(
            one,
            built_on=(facts.os, facts.machine),
            version=_version(backend(one.backend).library, facts, here=here is None),
            memory_bytes=one.predicted_bytes,
            capabilities=here,
        )
        for one in plan.jobs
        if not one.is_variant
    }
    if recipe.target:
        words.append(recipe.target.replace(",", "-"))
    elif here:
        words += [*map(sm, here), facts.os.lower()]
    if job.backend != "tensorrt-rtx" and facts.machine != "x86_64":
        words.append(facts.machine)
    return Variant("-".join(words), plan, needs, own)


def _usable(host: str, found: list[Variant]) -> set[int]:
    """The candidates that the machine may get: those for its card where there are any."""
    running = {i for i, one in enumerate(found) if one.verdicts[host].outcome.runs}
    return {i for i in running if found[i].on_card} or running


def _cost(one: Variant, covered: set[str]) -> tuple[float, ...]:
    slower = sum(one.verdicts[host].outcome is Outcome.RUN_SLOWER for host in covered)
    return -len(one.own & covered), slower, sum(size for _, size in one.parts())


def _rank(host: str, one: Variant) -> tuple[bool, bool, int]:
    slower = one.verdicts[host].outcome is Outcome.RUN_SLOWER
    return slower, host not in one.own, sum(size for _, size in one.parts())


def _why(host: str, found: list[Variant], refused: Mapping[str, str], *, on_card: bool) -> str:
    """Why no build for its card, or for its processor, runs on a machine."""
    kind = [one for one in found if one.on_card == on_card]
    mine = [one.verdicts[host] for one in kind if host in one.own]
    if host in refused and not mine:
        return refused[host]
    order = list(Outcome)
    verdicts = mine or [one.verdicts[host] for one in kind or found]
    if not verdicts:
        return "No backend is for this machine."
    return min(verdicts, key=lambda verdict: order.index(verdict.outcome)).sentence


def _version(library: str, facts: Facts, *, here: bool) -> str:
    """Of the library that would build: the one installed here, or the machine's own."""
    return versions([library])[library] if here else version_of(library, facts.libraries) or ""


def _set_up(facts: Facts, one: Variant) -> Facts:
    """The machine once the build's libraries are installed there."""
    libraries = {need.library.distribution: need.library.version for need in one.needs.values()}
    return facts.model_copy(update={"libraries": {**facts.libraries, **libraries}})


def _has_system(one: Variant, facts: Facts) -> bool:
    need = next(iter(one.needs.values()))
    return facts.os in need.systems and facts.machine in need.machines


def _identity(job: Job) -> str:
    known: dict[str, Any] = {
        "name": job.spec.name,
        "backend": job.backend,
        "dtype": job.dtype,
        "layers": {name: scheme.model_dump(mode="json") for name, scheme in job.layers.items()},
        "signature": job.signature.model_dump(mode="json"),
        "for": list(job.capabilities),
    }
    return digest(known)
