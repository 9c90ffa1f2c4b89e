from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

from optimizer.digests import sha256_file
from optimizer.store import Store
from tests.optimizer.test_store import flip

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="link counts and modes are POSIX's")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def make(store: Store, number: int, text: str = "the same weights") -> Path:
    with store.create("engine", {"n": number}) as folder:
        (folder / "weights.bin").write_text(text)
        (folder / "own.txt").write_text(str(number))
        (folder / "empty").touch()
    path = store.find("engine", {"n": number}, verify=True)
    assert path is not None
    return path


def blobs(store: Store) -> list[Path]:
    return sorted(store.blobs.all())


def test_equal_files_of_entries_are_one_file(store: Store) -> None:
    first, second = make(store, 1), make(store, 2)
    assert (first / "weights.bin").samefile(second / "weights.bin")
    blob = store.blobs.path(sha256_file(first / "weights.bin"))
    assert blob.samefile(first / "weights.bin")
    assert blob.relative_to(store.base).parts[:3] == ("blobs", "sha256", blob.name[:2])
    assert len(blobs(store)) == 3  # the weights, and each one's own
    assert not list((store.base / "_tmp").iterdir())


def test_what_is_stored_is_read_only(store: Store) -> None:
    path = make(store, 1)
    for file in (*path.iterdir(), *blobs(store)):
        assert stat.S_IMODE(file.stat().st_mode) == 0o444


def test_equal_files_within_an_entry_are_one_file(store: Store) -> None:
    with store.create("engine", {}) as folder:
        (folder / "a").write_text("x")
        (folder / "b").write_text("x")
    path = store.find("engine", {}, verify=True)
    assert path is not None
    assert (path / "a").samefile(path / "b")


def test_a_damaged_blob_is_replaced_and_never_linked_to(store: Store) -> None:
    first = make(store, 1)
    flip(first / "weights.bin")
    second = make(store, 2)
    assert not (first / "weights.bin").samefile(second / "weights.bin")
    assert sha256_file(second / "weights.bin") == blob_name(store, second)
    assert store.find("engine", {"n": 1}, verify=True) is None


def blob_name(store: Store, entry: Path) -> str:
    """The name of the blob that is an entry's weights."""
    [name] = [blob.name for blob in blobs(store) if blob.samefile(entry / "weights.bin")]
    return name


@pytest.mark.parametrize("number", [errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_without_links_entries_keep_their_own_files(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    first, second = make(store, 1), make(store, 2)
    assert (first / "weights.bin").read_text() == (second / "weights.bin").read_text()
    assert blobs(store) == []


def test_a_blob_that_goes_while_it_is_looked_at_costs_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(store, 1)
    real, seen = sha256_file, []

    def remove_first(path: Path) -> str:
        digest = real(path)
        seen.append(path)
        path.unlink()
        return digest

    monkeypatch.setattr("optimizer.blobs.sha256_file", remove_first)
    second = make(store, 2)
    assert len(seen) == 1
    assert sha256_file(second / "weights.bin") == blob_name(store, second)


def test_garbage_is_what_no_entry_holds(store: Store) -> None:
    path = make(store, 1)
    assert list(store.blobs.garbage()) == []
    (path / "own.txt").unlink()
    [blob] = store.blobs.garbage()
    assert blob.read_text() == "1"
