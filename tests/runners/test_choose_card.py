"""With two cards, engines go to the largest one that they were built for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runners import pipeline

CARDS = [((8, 6), 24), ((8, 9), 16), ((8, 9), 12)]
"""Compute capability and memory, in the driver's order."""


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The cards that were made the current one."""
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(CARDS))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: CARDS[index][0])
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(total_memory=CARDS[index][1]),
    )
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    return found


def bundle(*capabilities: str) -> Any:
    entry = SimpleNamespace(requires=SimpleNamespace(capabilities=capabilities))
    return SimpleNamespace(manifest=SimpleNamespace(components=(entry,)))


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [((), [0]), (("8.6",), [0]), (("8.9",), [1]), (("8.9", "12.0"), [1]), (("9.0",), [])],
)
def test_the_largest_card_that_fits_is_chosen(
    chosen: list[int], capabilities: tuple[str, ...], expected: list[int]
) -> None:
    pipeline._choose_card(bundle(*capabilities))
    assert chosen == expected
