"""The store under kill -9, crowds and full disks: a sample by default, all with -m faults.

The samples differ from the full runs in their counts alone.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optimizer.collecting import Rules, collect
from optimizer.inventory import damages, stored_entries
from optimizer.store import Store
from profiles.errors import DiskFullError
from tests.optimizer import store_faults
from tests.optimizer.store_faults import KEYS, count_events, is_right, make

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and modes are POSIX's")

faults = pytest.mark.faults


def counts(sample: int, full: int) -> pytest.MarkDecorator:
    """A sample by default, all of it with -m faults."""
    return pytest.mark.parametrize("count", [sample, pytest.param(full, marks=faults)])


@pytest.fixture(scope="module")
def context() -> Any:
    """Children fork from a process that has imported the store: they start in milliseconds."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.optimizer.store_faults"])
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def finds(store: Store) -> set[int]:
    """The entries that are hits; each must be right in every byte, and the others whole misses."""
    hits = set()
    for number in range(KEYS):
        path = store.find("engine", {"n": number}, verify=True)
        if path is not None:
            assert is_right(path, number)
            hits.add(number)
        else:
            assert not store.path("engine", {"n": number}).exists()
    return hits


def ended(child: Any, after: float | None = None) -> int:
    """The exit code of a started child, killed after so many seconds."""
    if after is not None:
        time.sleep(after)
        child.kill()
    child.join(60)
    code = child.exitcode
    assert code is not None
    child.close()
    return int(code)


def _events(context: Any, root: Path, work: str) -> int:
    with context.Pool(1) as pool:
        return int(pool.apply(count_events, (root, work)))


@counts(12, 200)
def test_kills_while_building_lose_nothing_and_show_nothing_half(
    context: Any, store: Store, tmp_path: Path, count: int
) -> None:
    ledger, points = tmp_path / "ledger", random.Random(count)
    ledger.touch()
    events, kills = _events(context, tmp_path / "other", "build"), 0
    for seed in range(count):
        arguments = (store.root, seed, ledger, points.randint(1, events) if seed % 4 else 0)
        child = context.Process(target=store_faults.build, args=arguments)
        child.start()
        kills += ended(child, None if seed % 4 else points.uniform(0, 0.03)) == -9
        assert {int(line) for line in ledger.read_text().split()} <= finds(store)
        if seed % 10 == 9:  # begin again
            shutil.rmtree(store.root)
            ledger.write_text("")
    print(f"builders: {count} started, {kills} killed")
    assert kills >= count // 3
    assert not (store.base / "_damaged").exists()
    make(store, 0)
    assert list((store.base / "_tmp").iterdir()) == []
    assert list((store.base / "_leases").iterdir()) == []


@counts(12, 200)
def test_kills_while_collecting_lose_nothing_that_is_used(
    context: Any, store: Store, tmp_path: Path, count: int
) -> None:
    points = random.Random(count)
    for number in range(KEYS):
        make(Store(tmp_path / "other"), number)
    events, kills, taken = _events(context, tmp_path / "other", "take"), 0, 0
    used = Store(store.root)
    for seed in range(count):
        for number in range(KEYS):
            make(store, number)
        with used.session():
            kept = set(points.sample(range(KEYS), 2))
            assert all(used.find("engine", {"n": number}) is not None for number in kept)
            arguments = (store.root, seed, None, points.randint(1, events))
            child = context.Process(target=store_faults.take, args=arguments)
            child.start()
            kills += ended(child) == -9
            hits = finds(store)
            assert kept <= hits
            taken += KEYS - len(hits)
    print(f"collectors: {count} started, {kills} killed, {taken} entries taken")
    assert kills >= count // 3
    assert taken > 0
    assert not (store.base / "_damaged").exists()
    collect(store, Rules(0.0, grace_seconds=0.0))
    left = [path for path in store.base.rglob("*") if not path.is_dir()]
    assert left == []


@counts(1, 20)
def test_sixteen_builders_of_the_same_keys_agree(context: Any, tmp_path: Path, count: int) -> None:
    for turn in range(count):
        store, barrier = Store(tmp_path / str(turn)), context.Barrier(16)
        children = [
            context.Process(target=store_faults.build_all, args=(store.root, seed, barrier))
            for seed in range(16)
        ]
        for child in children:
            child.start()
        assert [ended(child) for child in children] == [0] * 16
        assert finds(store) == set(range(KEYS))
        assert list(damages(store, lambda _size: None)) == []
        assert not (store.base / "_damaged").exists()
        assert list((store.base / "_tmp").iterdir()) == []
        shared = {(entry.path / "unet/shared.bin").stat().st_ino for entry in stored_entries(store)}
        assert len(shared) == 1


@counts(2, 60)
def test_readers_see_hits_and_misses_only_while_garbage_is_collected(
    context: Any, store: Store, count: int
) -> None:
    answers = context.Queue()
    takers = [
        context.Process(target=store_faults.take_for, args=(store.root, count)) for _ in range(2)
    ]
    readers = [
        context.Process(target=store_faults.read_and_build, args=(store.root, seed, count, answers))
        for seed in range(4)
    ]
    for child in (*takers, *readers):
        child.start()
    found = [answers.get(timeout=count + 60) for _ in readers]
    assert [ended(child) for child in (*takers, *readers)] == [0] * 6
    total = {name: sum(one[name] for one in found) for name in found[0]}
    print(f"readers against collectors, {count} s: {total}")
    assert total["wrong"] == 0
    assert min(total["hit"], total["miss"]) > 0
    assert not (store.base / "_damaged").exists()
    finds(store)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"mount can't be run: {error}")
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs isn't allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, left: int) -> None:
    """Write a file that leaves about so many bytes free."""
    (disk / "filler").unlink(missing_ok=True)
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(b"x" * max(0, free - left))


def _is_refused(store: Store) -> bool:
    """Whether not all entries had room; which must be said as it should."""
    try:
        for number in range(1, KEYS):
            make(store, number)
    except DiskFullError as error:
        return error.exit_code == 14 and "make room (`kiln cache gc`)" in str(error)
    return False


@counts(10, 200)
def test_a_full_disk_is_refused_cleanly_and_work_goes_on_once_there_is_room(
    small_disk: Path, count: int
) -> None:
    store, sizes, refused = Store(small_disk / "cache"), random.Random(count), 0
    make(store, 0)
    for _ in range(count):
        fill(small_disk, sizes.choice([0, 4096, sizes.randrange(2**17)]))
        before = finds(store)
        refused += _is_refused(store)
        assert before <= finds(store)
        assert list((store.base / "_tmp").iterdir()) == []
        collect(store, Rules(0.0, grace_seconds=0.0))  # works on a disk that is still full
        assert finds(store) == set()
        (small_disk / "filler").unlink()
        make(store, 0)
        make(store, 1)
        assert finds(store) == {0, 1}
    print(f"full disks: {count}, of which {refused} refused the work")
    assert refused >= count // 3
    assert not (store.base / "_damaged").exists()


def test_the_command_line_ends_with_14_on_a_full_disk(small_disk: Path, kiln: Any) -> None:
    (small_disk / "cache" / "v2" / "_tmp").mkdir(parents=True)
    fill(small_disk, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILN_CACHE", str(small_disk / "cache"))
        patch.setattr("optimizer.cache.ls_command.callback", lambda **_: make(Store(), 0))
        done = kiln("cache", "ls")
        assert (done.code, "make room (`kiln cache gc`)" in done.sentence) == (14, True)
