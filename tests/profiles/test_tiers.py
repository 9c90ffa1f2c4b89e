"""Memory tiers: the guide's table as data, and which one a machine is in."""

from __future__ import annotations

import pytest

from profiles.facts import load_facts
from profiles.tiers import matching, tier_for, tiers
from tests.tracked import ROOT

GIB = 1 << 30


def test_the_guides_table_is_there() -> None:
    guide = {tier.name: (tier.memory_gib, tier.side) for tier in tiers("card")}
    assert (
        guide.items()
        >= {
            "entry": (8, 768),
            "mid-range": (12, 1024),
            "performance": (16, 1536),
            "professional": (24, 2048),
        }.items()
    )


@pytest.mark.parametrize("device", ["card", "processor"])
def test_more_memory_never_means_less(device: str) -> None:
    found = tiers(device)  # type: ignore[arg-type]
    sizes = [(tier.memory_gib, tier.side) for tier in found]
    assert sizes == sorted(sizes)
    assert len({tier.name for tier in found}) == len(found)
    assert all(tier.source for tier in found)


def test_what_drivers_and_systems_keep_does_not_lower_a_tier() -> None:
    for memory, name in ((7.6, "entry"), (7.4, None), (23.6, "professional"), (141, "larger")):
        found = matching(int(memory * GIB), "card")
        assert (found and found.name) == name
    assert matching(int(15.3 * GIB), "processor") == tiers("processor")[1]


def test_a_machine_goes_by_its_largest_card_or_else_its_memory() -> None:
    def name(host: str) -> str | None:
        found = tier_for(load_facts(ROOT / "tests" / host))
        return found and found.name

    assert name("memory_hosts/rtx-4080-half-full-and-3060.json") == "performance"
    assert name("memory_hosts/mini-pc-16gb.json") == "memory-16"
    assert name("hosts/h200-server.json") == "larger"
    assert name("memory_hosts/rtx-2060-6gb.json") is None
