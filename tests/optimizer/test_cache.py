"""`kiln cache` and its four commands."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimizer import known_models
from optimizer.cache import parse_size
from optimizer.store import Store
from profiles.errors import SpecError
from tests.optimizer.test_store import flip, overwrite
from tests.toy_bundle import toy_bundle

Kiln = Callable[..., Any]
DAY = 24 * 3600.0
HOUR = 3600.0


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))
    return Store()


def add(
    store: Store, name: str, *, size: int = 1000, age: float = 0.0, kind: str = "engine"
) -> Path:
    """An entry of `size` bytes that no other has, and 500 that all have."""
    key = {"model": "0" * 64, "component": name}
    with store.create(kind, key) as folder:
        (folder / "own.bin").write_bytes((name.encode() * size)[:size])
        (folder / "shared.bin").write_bytes(b"s" * 500)
    path = store.path(kind, key)
    grow_old(path, age)
    return path


def grow_old(path: Path, age: float) -> None:
    os.utime(path, (time.time() - age, time.time() - age))


def names(store: Store) -> list[str]:
    """The components whose entries are there and whole."""
    paths = sorted((store.base / "engine").iterdir())
    found = [json.loads((path / "entry.json").read_bytes())["key"] for path in paths]
    assert all(store.find("engine", key, verify=True) is not None for key in found)
    return sorted(key["component"] for key in found)


def test_ls_names_kind_model_size_and_last_use(kiln: Kiln, store: Store, tmp_path: Path) -> None:
    known_models.remember_bundle(toy_bundle(tmp_path / "bundle"))
    digest = json.loads((tmp_path / "bundle" / "manifest.json").read_bytes())["model"]["digest"]
    with store.create("engine", {"model": digest, "component": "unet"}) as folder:
        (folder / "a").write_text("x")
    older = add(store, "vae", age=3 * DAY)
    listed = json.loads(kiln("cache", "ls", "--json").out)["entries"]
    assert [(row["kind"], row["component"], row["model"]) for row in listed] == [
        ("engine", "vae", "0" * 12),
        ("engine", "unet", "toy"),
    ]
    assert listed[0]["bytes"] == sum(file.stat().st_size for file in older.iterdir())
    said = kiln("cache", "ls").out.splitlines()
    assert "used 3 days ago" in said[0]
    assert "toy unet" in said[1]


def test_an_empty_cache_is_said(kiln: Kiln, store: Store) -> None:
    for command in ("ls", "du", "verify", "gc"):
        ended = kiln("cache", command)
        assert ended.code == 0
    assert kiln("cache", "ls").out == f"Nothing is kept in {store.root}.\n"
    assert not store.root.exists()


def test_du_counts_shared_bytes_once_and_names_everything(kiln: Kiln, store: Store) -> None:
    first, second = add(store, "a"), add(store, "b")
    other = add(store, "c", kind="prepared")
    for name in ("receipts", "selftest", "mystery"):
        (store.root / name).mkdir()
        (store.root / name / "file").write_bytes(b"x" * 7)
    found = json.loads(kiln("cache", "du", "--json").out)
    sidecars = [(path / "entry.json").stat().st_size for path in (first, second, other)]
    assert found["kinds"] == {
        "engine": 2000 + 500 + sidecars[0] + sidecars[1],
        "prepared": 1000 + 500 + sidecars[2],
    }
    assert found["bytes"] == 3000 + 500 + sum(sidecars) + 3 * 7
    assert {name: size for name, size in found["others"].items() if size} == {
        "receipts": 7,
        "selftest": 7,
        "mystery": 7,
    }
    said = kiln("cache", "du").out
    assert "results of self-tests" in said
    assert "not known to this kiln: mystery" in said


def cut(path: Path) -> None:
    overwrite(path, path.read_bytes()[:-1])


def extend(path: Path) -> None:
    overwrite(path, path.read_bytes() + b"x")


def test_verify_finds_nothing_in_a_whole_store(kiln: Kiln, store: Store) -> None:
    add(store, "a")
    ended = kiln("cache", "verify")
    assert ended.code == 0
    assert ended.out.startswith("All 1 entries are whole (")


@pytest.mark.parametrize("damage", [flip, cut, extend])
@pytest.mark.parametrize("file", ["own.bin", "entry.json"])
def test_a_damaged_entry_ends_with_12_and_is_repaired(
    kiln: Kiln, store: Store, damage: Callable[[Path], None], file: str
) -> None:
    path = add(store, "a")
    add(store, "b")
    damage(path / file)
    ended = kiln("cache", "verify", "--json")
    assert ended.code == 12
    assert "run `kiln cache verify --repair`, and compile again." in ended.sentence
    found = json.loads(ended.out)["damaged"]
    assert {"path": f"engine/{path.name}", "files": [file]} in found
    assert len(found) == (2 if file == "own.bin" else 1)  # its blob too
    assert kiln("cache", "verify", "--repair").code == 0
    assert kiln("cache", "verify").code == 0
    assert names(store) == ["b"]
    add(store, "a")
    assert names(store) == ["a", "b"]


def test_a_damaged_shared_file_damages_all_that_share_it(kiln: Kiln, store: Store) -> None:
    path = add(store, "a")
    add(store, "b")
    flip(path / "shared.bin")
    found = json.loads(kiln("cache", "verify", "--json").out)["damaged"]
    assert len(found) == 3
    assert kiln("cache", "verify", "--repair").code == 0
    assert add(store, "a").exists()
    assert kiln("cache", "verify").code == 0


def test_gc_takes_what_was_not_used_for_long(kiln: Kiln, store: Store) -> None:
    add(store, "old", age=31 * DAY)
    add(store, "new", age=29 * DAY)
    dry = json.loads(kiln("cache", "gc", "--dry-run", "--json").out)
    assert names(store) == ["new", "old"]
    grow_old(store.path("engine", {"model": "0" * 64, "component": "old"}), 31 * DAY)
    done = json.loads(kiln("cache", "gc", "--json").out)
    assert names(store) == ["new"]
    assert [row["what"] for row in done["removed"]] == ["engine"]
    assert dry["removed_bytes"] == done["removed_bytes"] >= 1000
    assert dry["left_bytes"] == done["left_bytes"]
    assert list(store.blobs.garbage()) == []
    assert kiln("cache", "gc", "--keep-days", "7").out.splitlines()[-1].startswith("0 removed")


def test_max_size_takes_the_least_recently_used_first(kiln: Kiln, store: Store) -> None:
    for number in range(4):
        add(store, f"{number}", size=100_000, age=(10 - number) * DAY)
    done = json.loads(kiln("cache", "gc", "--max-size", "250kB", "--json").out)
    assert names(store) == ["2", "3"]
    assert done["left_bytes"] <= 250_000
    assert done["removed_bytes"] >= 200_000


def test_the_last_hour_stays_whatever_the_size(kiln: Kiln, store: Store) -> None:
    add(store, "now", age=0.5 * HOUR)
    add(store, "before", age=2 * HOUR)
    ended = kiln("cache", "gc", "--max-size", "0", "--keep-days", "0")
    assert names(store) == ["now"]
    assert ended.out.splitlines()[-1] == (
        "1 more stay: they are in use, or were within the last hour."
    )


@pytest.mark.parametrize(("age", "stays"), [(0.1 * HOUR, True), (2 * HOUR, False)])
def test_the_old_layout_goes_but_for_its_notes(
    kiln: Kiln, store: Store, tmp_path: Path, age: float, stays: bool
) -> None:
    old = store.root / "v1"
    entry = old / "engine" / ("0" * 24)
    entry.mkdir(parents=True)
    (entry / "weights.bin").write_bytes(b"x" * 10)
    (old / "known_bundles").mkdir()
    bundle = toy_bundle(tmp_path / "bundle")
    (old / "known_bundles" / "a.json").write_text(json.dumps({"path": str(bundle)}))
    assert known_models.seen_bundles() == [bundle]
    for path in (entry, *old.iterdir(), old):
        grow_old(path, age)
    ended = kiln("cache", "gc")
    assert old.exists() == stays
    assert ("store of an older version" in ended.out) != stays
    assert known_models.seen_bundles() == [bundle]


def test_an_old_store_is_neither_read_nor_in_the_way(store: Store) -> None:
    path = add(store, "a")
    old = store.root / "v1" / "engine"
    old.mkdir(parents=True)
    path.rename(old / path.name)
    assert store.find("engine", {"model": "0" * 64, "component": "a"}) is None
    add(store, "a")
    assert names(store) == ["a"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("50GB", 50 * 10**9), ("1.5 GiB", 3 * 2**29), ("2mb", 2 * 10**6), ("7 B", 7)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 XB", "1e3", "nan"])
def test_other_sizes_are_refused_with_an_example(kiln: Kiln, store: Store, text: str) -> None:
    with pytest.raises(SpecError, match=r"write it as 50GB, 1\.5GiB or a number of bytes"):
        parse_size(text)
    add(store, "a", age=40 * DAY)
    if text:
        assert kiln("cache", "gc", f"--max-size={text}").code == 2
        assert names(store) == ["a"]
