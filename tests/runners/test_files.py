"""Files are opened without following links, and what was verified is what a loader gets."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

import numpy as np
import pytest

from profiles.errors import BundleError, KilnError
from runners import files
from runners.bundle import open_bundle
from runners.engines.base import Array, Engine
from runners.files import check_file, read_optional, verified_buffer
from runners.manifest_file import read_manifest
from runners.signature import Signature
from tests.toy_bundle import toy_bundle

NAME = "unet/weights.bin"

posix = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")


@final
class Recorder(Engine):
    """A loader: `loaded` is what it got."""

    def _open(self) -> None:
        self.loaded = bytes(self.files["weights"])

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        return {name: np.copy(array) for name, array in feeds.items()}

    def _close(self) -> None:
        del self.loaded


def loaded_from(bundle: Path, swap: Callable[[], None]) -> bytes:
    """What an engine gets of a bundle in which `swap` was done after it was verified."""
    opened = open_bundle(bundle)
    swap()
    signature = Signature(inputs=(), outputs=(), dims=())
    weights = {"weights": opened.file(NAME)}
    with Recorder(weights, signature=signature, properties={}, threads=1) as engine:
        return engine.loaded


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return toy_bundle(tmp_path / "bundle")


def renamed_over(path: Path, evil: bytes) -> None:
    path.with_name("evil").write_bytes(evil)
    path.with_name("evil").replace(path)


def overwritten(path: Path, evil: bytes) -> None:
    with path.open("rb+") as stream:
        stream.write(evil)


def truncated_and_written(path: Path, evil: bytes) -> None:
    path.write_bytes(evil)


def emptied(path: Path, evil: bytes) -> None:  # noqa: ARG001
    path.write_bytes(b"")


def removed(path: Path, evil: bytes) -> None:  # noqa: ARG001
    path.unlink()


def linked(path: Path, evil: bytes) -> None:
    path.with_name("evil").write_bytes(evil)
    path.unlink()
    path.symlink_to(path.with_name("evil"))


def folder_swapped(path: Path, evil: bytes) -> None:
    path.parent.rename(path.parent.with_name("was"))
    path.parent.mkdir()
    path.write_bytes(evil)


SWAPS = (
    renamed_over,
    overwritten,
    truncated_and_written,
    emptied,
    removed,
    *(() if sys.platform == "win32" else (linked, folder_swapped)),
)


def swapped_every_time(folder: Path, times: int) -> dict[str, int]:
    """How often the loader had the verified bytes, for each way to swap them."""
    right = (toy_bundle(folder / "model") / NAME).read_bytes()
    evil = bytes(byte ^ 255 for byte in right)
    found = dict.fromkeys((swap.__name__ for swap in SWAPS), 0)
    for turn in range(times):
        bundle = toy_bundle(folder / f"{turn}")
        swap = SWAPS[turn % len(SWAPS)]
        got = loaded_from(bundle, lambda: swap(bundle / NAME, evil))  # noqa: B023
        assert got == right, (turn, swap.__name__)
        found[swap.__name__] += 1
        with pytest.raises(KilnError):  # the swap was one
            open_bundle(bundle)
    return found


def test_a_file_swapped_between_verify_and_load_is_never_loaded(tmp_path: Path) -> None:
    assert min(swapped_every_time(tmp_path, 4 * len(SWAPS)).values()) == 4


@pytest.mark.faults
def test_a_file_swapped_a_thousand_times_is_never_loaded(tmp_path: Path) -> None:
    assert sum(swapped_every_time(tmp_path, 1000).values()) == 1000


@contextmanager
def swapping(path: Path, contents: tuple[bytes, ...]) -> Iterator[None]:
    """Another thread that writes and renames without end."""
    done = threading.Event()

    def work() -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            way = (renamed_over, overwritten)[turn // len(contents) % 2]
            way(path, contents[turn % len(contents)])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def raced(bundle: Path, times: int) -> tuple[int, int]:
    """How often the right bytes were loaded, and how often the bundle was refused."""
    right = (bundle / NAME).read_bytes()
    evil = bytes(byte ^ 255 for byte in right)
    loaded = refused = 0
    with swapping(bundle / NAME, (right, evil)):
        for _ in range(times):
            try:
                got = loaded_from(bundle, lambda: None)
            except BundleError:
                refused += 1
                continue
            assert got == right
            loaded += 1
    return loaded, refused


def test_a_file_that_changes_all_the_time_is_loaded_right_or_not_at_all(bundle: Path) -> None:
    assert sum(raced(bundle, 50)) == 50


@pytest.mark.faults
def test_a_thousand_races_load_the_right_bytes_or_none(bundle: Path) -> None:
    loaded, refused = raced(bundle, 1000)
    assert loaded > 0
    assert refused > 0


def test_a_large_file_is_mapped_and_a_rename_is_not_seen(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAPPED_FROM", 0)
    right = (bundle / NAME).read_bytes()
    for swap in (renamed_over, removed):
        fresh = toy_bundle(bundle)
        assert loaded_from(fresh, lambda: swap(fresh / NAME, b"x" * len(right))) == right  # noqa: B023


@posix
def test_a_large_file_that_others_may_write_is_copied(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAPPED_FROM", 0)
    path = bundle / NAME
    right = path.read_bytes()
    path.chmod(0o666)
    assert loaded_from(bundle, lambda: overwritten(path, b"x" * len(right))) == right


def test_code_is_copied_whatever_its_size(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAPPED_FROM", 0)
    entry = read_manifest(bundle).files[NAME]
    right = (bundle / NAME).read_bytes()
    buffer = verified_buffer(bundle, NAME, entry, private=True)
    overwritten(bundle / NAME, b"x" * len(right))
    assert bytes(buffer) == right


def test_an_empty_file_has_no_bytes(tmp_path: Path) -> None:
    from runners.manifest import FileEntry

    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "a").write_bytes(b"")
    entry = FileEntry(size=0, sha256=empty)
    assert verified_buffer(tmp_path, "a", entry, private=True) == b""
    check_file(tmp_path, "a", entry)


def every_reader(folder: Path, name: str) -> Iterator[Callable[[], object]]:
    entry = read_manifest(folder).files[NAME]
    yield lambda: verified_buffer(folder, name, entry, private=False)
    yield lambda: check_file(folder, name, entry)
    yield lambda: read_optional(folder, name, limit=1 << 20)


@posix
@pytest.mark.parametrize("walks", [True, False])
@pytest.mark.parametrize("part", ["unet", NAME])
def test_no_part_of_a_path_may_be_a_link(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, walks: bool
) -> None:
    """`walks` False is how a system without relative opening does it."""
    monkeypatch.setattr(files, "_WALKS", walks)
    (bundle / part).rename(tmp_path / "elsewhere")
    (bundle / part).symlink_to(tmp_path / "elsewhere")
    for read in every_reader(bundle, NAME):
        with pytest.raises(BundleError, match="is a link: a bundle holds plain files only"):
            read()


@posix
@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", "local.mark"])
def test_a_link_in_the_place_of_the_bundles_own_files_is_refused(
    bundle: Path, tmp_path: Path, name: str
) -> None:
    (bundle / name).rename(tmp_path / "elsewhere")
    (bundle / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=f"{name} in .* is a link"):
        open_bundle(bundle)


@posix
def test_a_bundle_may_be_reached_by_a_link(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(bundle)
    open_bundle(tmp_path / "current")


@posix
@pytest.mark.parametrize("walks", [True, False])
def test_what_is_no_file_is_refused_at_once(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, walks: bool
) -> None:
    monkeypatch.setattr(files, "_WALKS", walks)
    (bundle / NAME).unlink()
    os.mkfifo(bundle / NAME)
    for read in every_reader(bundle, NAME):
        with pytest.raises(BundleError, match="is no plain file"):
            read()


@posix
def test_a_device_is_refused() -> None:
    with pytest.raises(BundleError, match="is no plain file"):
        read_optional(Path("/dev"), "zero", limit=10)


def test_a_name_that_no_system_knows_is_refused(bundle: Path) -> None:
    for read in every_reader(bundle, "x" * 5000):
        with pytest.raises(BundleError, match="can't be read"):
            read()
