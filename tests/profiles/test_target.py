from __future__ import annotations

import pytest
from pydantic import ValidationError

from profiles import gpu
from profiles.errors import SpecError
from profiles.target import SUPPORTED, Target, parse_target, sm


@pytest.mark.parametrize(
    ("text", "name", "capabilities", "memory_gib"),
    [
        ("portable", "portable", (), None),
        (" Portable ", "portable", (), None),
        ("rtx-4090", "rtx-4090", ("8.9",), 24),
        ("rtx-4090, sm86", "rtx-4090,sm86", ("8.6", "8.9"), None),
        ("RTX-5090,rtx-3060 , rtx-4060", "rtx-5090,rtx-3060,rtx-4060", ("8.6", "8.9", "12.0"), 8),
        ("rtx-4090,rtx-4080", "rtx-4090,rtx-4080", ("8.9",), 16),
        ("sm120,sm75,sm89", "sm120,sm75,sm89", ("7.5", "8.9", "12.0"), None),
        ("sm86,SM86", "sm86", ("8.6",), None),
        ("sm90,sm100", "sm90,sm100", ("9.0", "10.0"), None),
    ],
)
def test_a_target_is_parsed(
    text: str, name: str, capabilities: tuple[str, ...], memory_gib: float | None
) -> None:
    target = parse_target(text)
    assert target == Target(name=name, capabilities=capabilities, memory_gib=memory_gib)
    assert parse_target(target.name) == target
    assert Target.model_validate_json(target.model_dump_json()) == target


@pytest.mark.parametrize("name", gpu.names())
def test_every_card_is_a_target(name: str) -> None:
    card = gpu.load(name)
    assert parse_target(name) == Target(
        name=name, capabilities=(card.capability,), memory_gib=card.memory_gib
    )


@pytest.mark.parametrize("capability", SUPPORTED)
def test_every_supported_architecture_is_a_target(capability: str) -> None:
    assert parse_target(sm(capability)).capabilities == (capability,)


def test_an_architectures_last_digit_is_its_minor_number() -> None:
    assert (sm("8.6"), sm("12.0"), sm("12.1")) == ("sm86", "sm120", "sm121")


@pytest.mark.parametrize(
    ("text", "part", "near"),
    [
        ("rtx-4090,rtx-409", "rtx-409", "rtx-4090"),
        ("rtx 4080", "rtx 4080", "rtx-4080"),
        ("sm68", "sm68", "sm86"),
        ("sm1", "sm1", "sm120"),
        ("sm999", "sm999", "sm89"),
        ("sm_89", "sm_89", "sm89"),
        ("sm٨٦", "sm٨٦", "sm"),
        ("portabel", "portabel", "portable"),
    ],
)
def test_an_unknown_part_is_answered_with_the_nearest(text: str, part: str, near: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_target(text)
    assert f"part {part!r} is neither a card" in str(error.value)
    assert near in str(error.value).partition("(nearest: ")[2].partition(")")[0]


@pytest.mark.parametrize("text", ["", "rtx-4090,", ",sm86", "8.6"])
def test_an_empty_or_bare_part_is_refused_with_the_fix(text: str) -> None:
    with pytest.raises(SpecError, match="name one or several, separated by commas, or portable"):
        parse_target(text)


def test_portable_is_alone() -> None:
    with pytest.raises(SpecError, match="names portable among others: use portable alone, or"):
        parse_target("portable,rtx-4090")


def test_a_target_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse_target("sm86").name = "sm89"  # type: ignore[misc]
