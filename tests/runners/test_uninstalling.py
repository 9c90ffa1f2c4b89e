"""Removing installed versions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from profiles.errors import MissingError
from runners.bundle import open_bundle
from runners.installed import located, read_pointer, roll_back, versions
from tests.shipments import Shop

Kiln = Callable[..., Any]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Shop, str, str]:
    """A shop, and the old and the current version that are installed."""
    shop = Shop(tmp_path)
    shop.pack(shop.toy(size=5000))
    old = shop.install()
    shop.pack(shop.toy("new", size=5000, seed=1))
    return shop, old.version, shop.install().version


def test_old_versions_go_and_the_current_one_stays_whole(
    kiln: Kiln, two: tuple[Shop, str, str]
) -> None:
    shop, old, new = two
    ended = kiln("uninstall", "toy", "--old", "--in", shop.root, "--json")
    assert json.loads(ended.out) == {"name": "toy", "removed": [old]}
    assert versions(shop.root, "toy") == [new]
    assert [path.name for path in (shop.root / "toy").iterdir() if path.is_dir()] == [new]
    assert open_bundle(located(shop.root / "toy"), trust=shop.trust)
    assert kiln("rollback", "toy", "--in", shop.root).code == 2
    assert kiln("uninstall", "toy", "--old", "--in", shop.root).out == "toy has no old version.\n"


def test_what_runs_is_not_removed_alone(kiln: Kiln, two: tuple[Shop, str, str]) -> None:
    shop, old, new = two
    ended = kiln("uninstall", "toy", "--version", new, "--in", shop.root)
    assert ended.code == 2
    assert "go back with `kiln rollback toy` first" in ended.sentence
    roll_back(shop.root, "toy")
    assert kiln("uninstall", "toy", "--version", new, "--in", shop.root).code == 0
    assert read_pointer(shop.root, "toy").current == old
    assert open_bundle(located(shop.root / "toy"), trust=shop.trust)


def test_all_of_it_goes_and_what_is_not_kilns_stays(kiln: Kiln, two: tuple[Shop, str, str]) -> None:
    shop, old, new = two
    note = shop.root / "toy/note.txt"
    note.write_text("mine")
    ended = kiln("uninstall", "toy", "--in", shop.root)
    assert ended.out == f"Removed from {shop.root / 'toy'}: {old}, {new}\n"
    assert list((shop.root / "toy").iterdir()) == [note]
    with pytest.raises(MissingError, match="No bundle 'toy' is installed"):
        read_pointer(shop.root, "toy")


def test_wrong_requests_are_one_sentence(kiln: Kiln, two: tuple[Shop, str, str]) -> None:
    shop, old, new = two
    wrong = kiln("uninstall", "toy", "--version", "0-00000000", "--in", shop.root)
    assert wrong.code == 2
    assert f"it has {old}, {new}" in wrong.sentence
    both = kiln("uninstall", "toy", "--version", old, "--old", "--in", shop.root)
    assert (both.code, "exclude each other" in both.sentence) == (2, True)
    assert kiln("uninstall", "nothing", "--in", shop.root).code == 17
