"""What garbage collection takes, and what it leaves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from optimizer import collecting
from optimizer.collecting import Rules, collect
from optimizer.leases import held
from optimizer.store import Store
from tests.optimizer.test_cache import DAY, add, grow_old


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def test_finding_an_entry_is_using_it(store: Store) -> None:
    add(store, "a", age=31 * DAY)
    assert store.find("engine", {"model": "0" * 64, "component": "a"}) is not None
    assert collect(store, Rules(30 * DAY)).removed == ()


def test_what_is_leased_stays_until_its_session_ends(store: Store) -> None:
    key = {"model": "0" * 64, "component": "a"}
    path, other = add(store, "a"), Store(store.root)
    with other.session():
        assert other.find("engine", key) == path
        grow_old(path, 31 * DAY)
        assert collect(store, Rules(DAY)).in_use == 1
        assert path.exists()
        assert not store.discard(path, grace_seconds=0)
    assert [item.path for item in collect(store, Rules(DAY)).removed] == [path]
    assert not path.exists()


def test_a_folder_that_is_used_stays_if_it_is_an_entry(store: Store, tmp_path: Path) -> None:
    path = add(store, "a")
    with Store(store.root).session(path, tmp_path / "elsewhere"):
        grow_old(path, 31 * DAY)
        assert collect(store, Rules(DAY)).removed == ()
    assert not (tmp_path / "elsewhere").exists()
    assert collect(store, Rules(DAY)).removed != ()


def test_a_lease_that_comes_in_the_last_moment_is_seen(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = add(store, "a", age=31 * DAY)
    real = collecting.stored_entries
    with Store(store.root).session():

        def lease_then(given: Store) -> Any:
            found = real(given)
            monkeypatch.setattr(store, "leased", lambda: {f"engine-{path.name}"})
            return found

        monkeypatch.setattr(collecting, "stored_entries", lease_then)
        assert collect(store, Rules(DAY)).removed == ()
    assert path.exists()


def test_a_reader_waits_while_it_is_decided_and_gets_a_miss(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = add(store, "a")
    monkeypatch.setattr("optimizer.store._WAIT_SECONDS", 0.05)
    with held(store.base / "_condemned", f"engine-{path.name}"):
        assert store.find("engine", {"model": "0" * 64, "component": "a"}) is None
    assert store.find("engine", {"model": "0" * 64, "component": "a"}) == path


def test_waste_goes_and_what_others_need_stays(store: Store) -> None:
    add(store, "a")
    with store.create("engine", {"being": "made"}) as living:  # before there is any waste
        kept, done = _collect_waste(store)
        assert living.exists()
    assert sorted(item.what for item in done.removed) == [
        "damaged entry",
        "expired receipt",
        "partial file",
        "partial file",
        "temporary of a process that ended",
    ]
    assert all(path.exists() for path in kept)
    assert not any(item.path.exists() for item in done.removed)


def _collect_waste(store: Store) -> tuple[list[Path], collecting.Collected]:
    """Put waste of every sort there and collect it: what must stay, and what was collected."""
    dead = store.base / "_tmp" / "spare.0123.1.1000.abcd"
    dead.mkdir(parents=True)
    (dead / "half").write_bytes(b"x" * 100)
    os.utime(dead, (0, 0))
    damaged = store.base / "_damaged" / "engine-1-2"
    damaged.mkdir(parents=True)
    for name, age in (("1", 8 * DAY), ("2", DAY), ("3.new", 9 * DAY)):
        (store.base / "_partial").mkdir(exist_ok=True)
        (store.base / "_partial" / name).touch()
        grow_old(store.base / "_partial" / name, age)
    receipt = store.root / "receipts" / "ab" / "old"
    receipt.parent.mkdir(parents=True)
    for path in (receipt, receipt.with_name("new")):
        path.touch()
    os.utime(receipt, (0, 0))
    others = [store.root / name for name in ("selftest", "kernels", "known_models", "mystery")]
    for folder in others:
        folder.mkdir()
        os.utime(folder, (0, 0))
    kept = [*others, receipt.with_name("new"), store.base / "_partial" / "2"]
    return kept, collect(store, Rules(30 * DAY))


def test_a_partial_file_in_use_stays(store: Store) -> None:
    with store.partial({"a": 1}) as path:
        path.touch()
        grow_old(path, 8 * DAY)
        assert collect(store, Rules(0.0)).removed == ()
        grow_old(path, 8 * DAY)
        store.sweep()
        assert path.exists()
