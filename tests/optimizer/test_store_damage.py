"""Wrong bytes of every kind in every kind of file: a sample by default, all with -m faults."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from optimizer.entries import read_entry
from optimizer.inventory import damages, repair
from optimizer.store import Store
from tests.optimizer.store_faults import content, make
from tests.optimizer.test_store_faults import counts, finds

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and modes are POSIX's")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def flip(file: Path, at: float) -> None:
    raw = bytearray(file.read_bytes())
    raw[int(at * len(raw))] ^= 1 << int(at * 1000) % 8
    overwrite(file, bytes(raw))


def truncate(file: Path, at: float) -> None:
    overwrite(file, file.read_bytes()[: int(at * file.stat().st_size)])


def extend(file: Path, at: float) -> None:
    overwrite(file, file.read_bytes() + os.urandom(1 + int(at * 10)))


def swap(file: Path, at: float) -> None:
    """Put another file of the same size there, as whoever mixes up files does."""
    raw = file.read_bytes()
    other = random.Random(at).randbytes(len(raw))
    assert other != raw
    replace(file, other)


def overwrite(file: Path, raw: bytes) -> None:
    """In place: all names of the file are damaged."""
    file.chmod(0o644)
    file.write_bytes(raw)


def replace(file: Path, raw: bytes) -> None:
    """By another file: other names keep the old one."""
    file.unlink()
    file.write_bytes(raw)


CLASSES = [name for name, raw in content(0).items() if raw] + ["entry.json"]


@counts(1, 50)
@pytest.mark.parametrize("damage", [flip, truncate, extend, swap])
@pytest.mark.parametrize("name", CLASSES)
def test_every_damage_of_every_class_of_file_is_found(
    store: Store, count: int, damage: Callable[[Path, float], None], name: str
) -> None:
    places = random.Random(count)
    for _ in range(count):
        for number in (0, 1):
            make(store, number)
        path = store.path("engine", {"n": 0})
        damage(path / name, places.random())
        found = list(damages(store, lambda _size: None))
        assert path in {one.path for one in found}
        assert store.find("engine", {"n": 0}, verify=True) is None
        for one in found:
            repair(store, one)
        assert list(damages(store, lambda _size: None)) == []
        make(store, 0)
        assert 0 in finds(store)


@counts(1, 50)
@pytest.mark.parametrize("damage", [flip, truncate, extend, swap])
def test_every_damage_of_a_blob_is_found_and_never_spreads(
    store: Store, count: int, damage: Callable[[Path, float], None]
) -> None:
    places = random.Random(count)
    for _ in range(count):
        make(store, 0)
        blob = places.choice(sorted(store.blobs.all()))
        damage(blob, places.random())
        found = [one.path for one in damages(store, lambda _size: None)]
        assert blob in found
        if store.find("engine", {"n": 2}, verify=True) is None:  # it has bytes of the blob's too
            make(store, 2)
        path = store.find("engine", {"n": 2}, verify=True)
        assert path is not None
        for one in damages(store, lambda _size: None):
            repair(store, one)
        assert list(damages(store, lambda _size: None)) == []


def test_two_entries_that_changed_places_are_both_found(store: Store) -> None:
    make(store, 0)
    make(store, 1)
    first, second = (store.path("engine", {"n": number}) for number in (0, 1))
    first.rename(first.with_name("between"))
    second.rename(first)
    first.with_name("between").rename(second)
    assert {one.path for one in damages(store, lambda _size: None)} == {first, second}
    assert finds_nothing(store)


def finds_nothing(store: Store) -> bool:
    return all(store.find("engine", {"n": number}) is None for number in (0, 1))


def test_a_sidecar_of_another_kind_or_key_is_damage(store: Store) -> None:
    make(store, 0)
    path = store.path("engine", {"n": 0})
    assert read_entry(path) is not None
    document = json.loads((path / "entry.json").read_bytes())
    for changed in ({"kind": "prepared"}, {"key": {"n": 1}}, {"schema": 3}):
        raw = json.dumps({**document, **changed}, indent=1, sort_keys=True) + "\n"
        overwrite(path / "entry.json", raw.encode())
        assert read_entry(path) is None
