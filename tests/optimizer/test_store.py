from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from optimizer.store import FileDigest, Store, canonical, digest, file_digests, sha256_file
from profiles.errors import DiskFullError, SpecError

KEY = {"model": "a", "steps": [1, 2]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def fill(folder: Path, text: str = "weights") -> None:
    (folder / "unet").mkdir()
    (folder / "unet" / "graph.xml").write_text("<net/>")
    (folder / "weights.bin").write_text(text)


def make(store: Store, text: str = "weights") -> Path:
    with store.create("engine", KEY) as folder:
        fill(folder, text)
    path = store.find("engine", KEY)
    assert path is not None
    return path


@contextmanager
def failing_block(store: Store, error: BaseException) -> Iterator[None]:
    with store.create("engine", KEY) as folder:
        fill(folder)
        raise error
    yield


def temporaries(store: Store) -> list[Path]:
    return list((store.root / "v2" / "_tmp").iterdir())


def test_canonical_is_the_same_for_any_order_and_container() -> None:
    assert canonical({"b": (1, 2), "a": "é"}) == canonical({"a": "é", "b": [1, 2]})
    assert canonical({"b": [1], "a": "é"}) == '{"a":"é","b":[1]}'.encode()
    assert digest({"a": 1}) != digest({"a": True})
    assert digest({"a": 1}) != digest({"a": 1.0})


@pytest.mark.parametrize("value", [{1: "a"}, {"a": {1, 2}}, b"bytes", Path("a"), object()])
def test_canonical_refuses_what_is_not_json(value: object) -> None:
    with pytest.raises(TypeError, match=r"no canonical JSON form|is no string"):
        canonical(value)


def test_canonical_refuses_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical([float("nan")])


def test_sha256_is_that_of_the_standard(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "abc") == expected
    assert file_digests(tmp_path) == {"abc": FileDigest(3, expected)}


def test_entry_appears_only_when_the_block_ends(store: Store) -> None:
    with store.create("engine", KEY) as folder:
        fill(folder)
        assert store.find("engine", KEY) is None
    path = store.find("engine", KEY, verify=True)
    assert path is not None
    assert path.name == digest(KEY)[:24]
    assert (path / "weights.bin").read_text() == "weights"
    assert temporaries(store) == []


def test_sidecar_is_readable_and_states_the_whole_key(store: Store) -> None:
    sidecar = json.loads((make(store) / "entry.json").read_text())
    assert sidecar["key"] == KEY
    assert sidecar["kind"] == "engine"
    assert sidecar["files"]["unet/graph.xml"]["size"] == 6


def test_another_key_or_kind_is_absent(store: Store) -> None:
    make(store)
    assert store.find("engine", {**KEY, "model": "b"}) is None
    assert store.find("source", KEY) is None


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing(store: Store, error: BaseException) -> None:
    with pytest.raises(type(error)), failing_block(store, error):
        pass
    assert store.find("engine", KEY) is None
    assert temporaries(store) == []


def test_the_first_of_two_creators_stays(store: Store) -> None:
    with store.create("engine", KEY) as folder:
        fill(folder, "second")
        make(store, "first")
    path = store.find("engine", KEY, verify=True)
    assert path is not None
    assert (path / "weights.bin").read_text() == "first"
    assert temporaries(store) == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    overwrite(path, content)


def overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def test_a_flipped_byte_is_set_aside_and_made_again(store: Store) -> None:
    flip(make(store) / "weights.bin")
    assert store.find("engine", KEY) is not None  # sizes alone don't show it
    assert store.find("engine", KEY, verify=True) is None
    assert store.find("engine", KEY) is None
    [aside] = (store.root / "v2" / "_damaged").iterdir()
    assert (aside / "weights.bin").exists()
    assert (make(store) / "weights.bin").read_text() == "weights"
    assert store.find("engine", KEY, verify=True) is not None


def truncate(path: Path) -> None:
    overwrite(path / "weights.bin", b"weight")


def remove(path: Path) -> None:
    (path / "weights.bin").unlink()


def add(path: Path) -> None:
    (path / "unet" / "extra").write_text("")


def flip_sidecar(path: Path) -> None:
    flip(path / "entry.json")


def empty_sidecar(path: Path) -> None:
    overwrite(path / "entry.json", b"{}")


def move(path: Path) -> None:
    """Put the entry of another key in this one's place."""
    other = Store(path.parents[2])
    with other.create("engine", {"other": 1}) as folder:
        fill(folder)
    found = other.find("engine", {"other": 1})
    assert found is not None
    shutil.rmtree(path)
    found.rename(path)


@pytest.mark.parametrize("damage", [truncate, remove, add, flip_sidecar, empty_sidecar, move])
def test_damage_that_needs_no_hashing_is_always_seen(
    store: Store, damage: Callable[[Path], None]
) -> None:
    damage(make(store))
    assert store.find("engine", KEY) is None
    make(store)


def test_a_damaged_entry_in_the_way_is_replaced(store: Store) -> None:
    path = make(store)
    with store.create("engine", KEY) as folder:
        fill(folder, "newer")
        truncate(path)
    found = store.find("engine", KEY, verify=True)
    assert found is not None
    assert (found / "weights.bin").read_text() == "newer"


def test_the_sidecars_name_is_taken(store: Store) -> None:
    with pytest.raises(ValueError, match=r"entry\.json"), store.create("engine", KEY) as folder:
        (folder / "entry.json").write_text("mine")


@pytest.mark.parametrize("kind", ["_tmp", "../out", "a b", ""])
def test_a_kind_is_a_plain_word(store: Store, kind: str) -> None:
    with pytest.raises(ValueError, match="no kind of entry"), store.create(kind, KEY):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="making links needs a privilege there")
def test_a_link_is_refused(store: Store) -> None:
    said = pytest.raises(SpecError, match="symbolic link: put the file itself")
    with said, store.create("engine", KEY) as folder:
        (folder / "link").symlink_to("/etc/hostname")
    assert store.find("engine", KEY) is None


CHILD = """
import sys, time
from pathlib import Path
from optimizer.store import Store
with Store(sys.argv[1]).create("engine", {"model": "a", "steps": [1, 2]}) as folder:
    (folder / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def start_and_kill(store: Store) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(store.root)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.kill()
    child.wait()
    child.stdout.close()


def test_a_killed_creator_leaves_nothing_visible_and_the_next_one_sweeps(store: Store) -> None:
    start_and_kill(store)
    [left] = temporaries(store)
    assert (left / "half").exists()
    assert store.find("engine", KEY) is None
    make(store)
    assert temporaries(store) == []


def test_a_living_creators_temporary_is_not_swept(store: Store) -> None:
    with store.create("engine", {"other": 1}) as folder:
        make(store)
        assert folder.exists()
    assert store.find("engine", {"other": 1}) is not None


def test_leftovers_of_a_reused_process_number_are_swept(store: Store) -> None:
    with store.create("engine", {"other": 1}) as folder:
        what, host, number, started, token = folder.name.split(".")
    earlier = str(int(started) - 10 * 24 * 3600 * 1000)
    twin = folder.with_name(".".join((what, host, number, earlier, token)))
    twin.mkdir()
    make(store)
    assert not twin.exists()


@pytest.mark.parametrize(("days", "stays"), [(1, True), (8, False)])
def test_another_hosts_leftovers_are_kept_for_a_week(store: Store, days: int, stays: bool) -> None:
    make(store)
    strange = store.root / "v2" / "_tmp" / "0123.otherhost.1.1000.abcd"
    strange.mkdir()
    then = time.time() - days * 24 * 3600
    os.utime(strange, (then, then))
    with store.create("engine", {"other": 1}):
        pass
    assert strange.exists() == stays


def create_slowly(root: Path, number: int, barrier: object) -> None:
    with Store(root).create("engine", KEY) as folder:
        fill(folder, str(number))
        barrier.wait(30)  # type: ignore[attr-defined]


def test_processes_that_make_the_same_entry_agree_on_one(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    children = [
        context.Process(target=create_slowly, args=(store.root, number, barrier))
        for number in range(3)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    path = store.find("engine", KEY, verify=True)
    assert path is not None
    assert (path / "weights.bin").read_text() in {"0", "1", "2"}
    assert temporaries(store) == []
    assert not (store.root / "v2" / "_damaged").exists()


class NativeError(Exception):
    """What safetensors raises when a write fails."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        NativeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_with_the_fix(store: Store, error: Exception) -> None:
    said = pytest.raises(DiskFullError, match=r"is full: .*make room .*or set KILN_CACHE")
    with said as caught, failing_block(store, error):
        pass
    assert caught.value.exit_code == 14
    assert temporaries(store) == []
    assert store.find("engine", KEY) is None


def test_too_little_space_is_said_before_work_starts(store: Store) -> None:
    with (
        pytest.raises(DiskFullError, match=r"free and 1048576\.00 GiB are needed: make room"),
        store.create("engine", KEY, needed_bytes=2**50),
    ):
        pytest.fail("the block ran")
    assert temporaries(store) == []


def test_a_store_that_cannot_be_written_is_said_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    with (
        pytest.raises(SpecError, match=r"cannot be written .*set KILN_CACHE to a folder"),
        store.create("engine", KEY),
    ):
        pytest.fail("the block ran")


def test_the_environment_says_where_the_store_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path))
    assert Store().root == tmp_path
    monkeypatch.delenv("KILN_CACHE")
    assert Store().root.name.lower() in ("kiln", "cache")
    assert list(tmp_path.iterdir()) == []
