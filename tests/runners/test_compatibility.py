"""Verdicts on 400 pairs of machine and bundle, and an oracle that none is falsely compatible."""

from __future__ import annotations

import json
import os
from itertools import product
from pathlib import Path

import pytest

from profiles.errors import DeviceMismatch, MissingError, OutOfMemory
from profiles.facts import Facts, load_facts
from runners.compatibility import (
    Outcome,
    Reason,
    Verdict,
    compatibility,
    met,
    require_compatible,
    require_verdict,
)
from runners.needs import release
from runners.requires import Requires
from tests.host_bundles import KINDS, manifest_of
from tests.toy_bundle import REQUIRES
from tests.tracked import ROOT

HOSTS = {path.stem: load_facts(path) for path in sorted((ROOT / "tests/hosts").glob("*.json"))}
BUNDLES = {name: manifest_of(kind) for name, kind in KINDS.items()}
GOLDEN = Path(__file__).parent / "compatibility.json"
"""Host -> bundle -> "outcome reason"; `KILN_WRITE_GOLDEN=1` writes it anew, for a review."""


def verdict(host: str, bundle: str) -> Verdict:
    return compatibility(BUNDLES[bundle], HOSTS[host])


def table() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {host: {} for host in HOSTS}
    for host, bundle in product(HOSTS, BUNDLES):
        one = verdict(host, bundle)
        found[host][bundle] = f"{one.outcome} {one.reason}"
    return found


def test_400_verdicts_are_as_they_were_reviewed() -> None:
    found = table()
    assert sum(map(len, found.values())) == 400
    if os.environ.get("KILN_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(GOLDEN.read_text())


def test_every_outcome_and_every_reason_is_among_them() -> None:
    seen = {row for rows in table().values() for row in rows.values()}
    assert {row.split()[0] for row in seen} == set(Outcome)
    assert {row.split()[1] for row in seen} == set(Reason)


def numbers(version: str | None) -> list[int]:
    """Of a version, the slow way; nothing is before everything."""
    if version is None:
        return []
    return [int(part) for part in version.split("+")[0].split(".")] + [0] * 6


def satisfied(need: Requires, facts: Facts) -> bool:
    """The oracle: each requirement in its plainest words, none knowing of the others."""
    installed = facts.libraries.get(need.library.distribution)
    if installed is None:
        return False
    same = numbers(installed)[:4] == numbers(need.library.version)[:4]
    newer = numbers(installed)[:6] >= numbers(need.library.version)[:6]
    if not (same if need.library.rule == "exact" else newer):
        return False
    if need.systems and facts.os not in need.systems:
        return False
    if need.machines and facts.machine not in need.machines:
        return False
    old = need.glibc is not None and numbers(facts.glibc)[:2] < numbers(need.glibc)[:2]
    if facts.os == "Linux" and old:
        return False
    for group in (*need.isa, *need.build_isa):
        if not any(name in facts.cpu.isa for name in group):
            return False
    if need.capabilities is None:
        return need.memory_bytes <= facts.ram_bytes
    if need.driver and numbers(facts.driver)[:1] < numbers(need.driver)[:1]:
        return False
    for card in facts.cards:
        if card.capability in need.capabilities and card.memory_bytes is not None:
            if need.memory_bytes <= card.memory_bytes:
                return True
            if need.streams and need.memory_bytes <= facts.ram_bytes:
                return True
    return False


def test_none_is_falsely_compatible_and_none_falsely_incompatible() -> None:
    for host, bundle in product(HOSTS, BUNDLES):
        (entry,) = BUNDLES[bundle].components
        fits = satisfied(entry.requires, HOSTS[host])
        assert verdict(host, bundle).outcome.runs == fits, (host, bundle)


def test_both_values_and_the_fix_are_named() -> None:
    for host, bundle in product(HOSTS, BUNDLES):
        one = verdict(host, bundle)
        if one.reason is not Reason.MEETS_ALL:
            assert one.needed in one.sentence
            assert one.found in one.sentence
            assert ": " in one.sentence
        assert (one.command is not None) == (one.outcome is Outcome.REBUILD)


def test_a_rebuild_names_minutes_and_a_command_for_the_card() -> None:
    one = compatibility(BUNDLES["rtx-turing"], HOSTS["rtx-3060-12gb"], bundle="my bundle")
    assert (one.outcome, one.reason, one.minutes) == (Outcome.REBUILD, Reason.OTHER_CARD, 5)
    assert one.command == (
        "kiln inspect 'my bundle' --recipe > recipe.json && "
        "kiln compile --recipe recipe.json --target sm86 -o rebuilt"
    )
    assert one.sentence.startswith(
        "The engine needs sm75, and sm86 (NVIDIA GeForce RTX 3060) is here: compile with "
        "--target sm86. Rebuilding takes about 5 min, as it did on a processor: kiln inspect"
    )


def test_a_rebuild_for_a_card_that_lacks_the_type_or_the_level_asks_for_others() -> None:
    command = compatibility(BUNDLES["rtx-nvfp4"], HOSTS["rtx-2080-ti"]).command
    assert command is not None
    assert " --target sm75 --dtype fp16 --quant int8 -o " in command


def test_an_update_of_the_library_names_both_versions() -> None:
    one = verdict("rtx-4090-rtx-1-6", "rtx-portable")
    assert one.sentence.startswith(
        "The engine needs tensorrt-rtx 1.7.1.116, and 1.6.0.48 is installed: run pip install "
        '"tensorrt-rtx==1.7.1.116", or compile the bundle again.'
    )


def test_the_worst_of_all_engines_counts_and_is_named() -> None:
    facts = HOSTS["zen3-desktop"]
    slow = REQUIRES.model_copy(update={"fast_isa": (("amx_int8",),)})
    bad = REQUIRES.model_copy(update={"glibc": "2.99"})
    one = met({"a": REQUIRES, "b": slow, "c": bad}, facts)
    assert (one.outcome, one.reason, one.component) == (
        Outcome.REFUSE,
        Reason.GLIBC_TOO_OLD,
        "c",
    )
    assert met({"a": REQUIRES, "b": slow}, facts).component == "b"


def test_engines_that_fit_one_by_one_and_not_together_are_refused() -> None:
    facts = HOSTS["laptop-8gb"]
    half = REQUIRES.model_copy(update={"memory_bytes": 5 << 30})
    assert met({"a": half}, facts).outcome is Outcome.RUN
    both = met({"a": half, "b": half}, facts)
    assert (both.reason, both.component) == (Reason.MEMORY_TOO_SMALL, None)


def test_what_is_not_known_is_held_against_the_machine() -> None:
    need = BUNDLES["rtx-portable"].components[0].requires
    facts = HOSTS["rtx-3060-12gb"]
    card = facts.cards[0]
    for unknown in (
        {"driver": None},
        {"cards": (card.model_copy(update={"capability": None}),)},
        {"cards": (card.model_copy(update={"memory_bytes": None}),)},
    ):
        assert met({"x": need}, facts).outcome is Outcome.RUN
        assert not met({"x": need}, facts.model_copy(update=unknown)).outcome.runs


@pytest.mark.parametrize(
    ("host", "bundle", "error", "code"),
    [
        ("alpine-container", "eager-fp32", DeviceMismatch, 10),
        ("laptop-8gb", "openvino-12gb", OutOfMemory, 13),
        ("laptop-arm-windows", "openvino-arm", MissingError, 17),
    ],
)
def test_loading_raises_the_sentence_with_its_exit_code(
    host: str, bundle: str, error: type[Exception], code: int
) -> None:
    with pytest.raises(error) as caught:
        require_compatible(BUNDLES[bundle], HOSTS[host])
    assert str(caught.value) == verdict(host, bundle).sentence
    assert getattr(caught.value, "exit_code", None) == code


def test_what_runs_raises_nothing() -> None:
    one = verdict("zen3-desktop", "openvino-int8")
    assert one.outcome is Outcome.RUN_SLOWER
    assert require_verdict(one) is one


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ("2.13.0+cpu", (2, 13)),
        ("1.7.1.116", (1, 7, 1, 116)),
        ("580.95.05", (580, 95, 5)),
        ("2026.4.0rc1", (2026, 4)),
        ("10", (10,)),
        ("", ()),
    ],
)
def test_versions_compare_by_their_numbers(version: str, found: tuple[int, ...]) -> None:
    assert release(version) == found
