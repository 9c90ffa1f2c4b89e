from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runners import receipts
from runners.receipts import known, note, sha256_of
from tests.tracked import ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no receipts are kept there")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number is added whenever a file is really hashed."""
    real, calls = receipts._hashed, list[int]()

    def counted(descriptor: int) -> str:
        calls.append(descriptor)
        return real(descriptor)

    monkeypatch.setattr(receipts, "_hashed", counted)
    return calls


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if files had last changed ten seconds ago."""
    real = time.time_ns
    monkeypatch.setattr(receipts.time, "time_ns", lambda: real() + 10 * 10**9)


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(b"weights")
    return tmp_path / "weights"


@pytest.mark.usefixtures("settled")
def test_an_unchanged_file_is_hashed_once(file: Path, hashed: list[int]) -> None:
    for _ in range(3):
        assert sha256_of(file, always=False) == sha256(b"weights")
    assert len(hashed) == 1


@pytest.mark.usefixtures("settled")
def test_always_ignores_receipts(file: Path, hashed: list[int]) -> None:
    for _ in range(2):
        assert sha256_of(file, always=True) == sha256(b"weights")
    assert len(hashed) == 2
    sha256_of(file, always=False)
    assert len(hashed) == 2  # what was hashed is noted all the same


def test_a_file_that_has_just_changed_gets_no_receipt(file: Path, hashed: list[int]) -> None:
    sha256_of(file, always=False)
    sha256_of(file, always=False)
    assert len(hashed) == 2
    assert known(file.stat()) is None


@pytest.mark.usefixtures("settled")
def test_a_descriptor_is_hashed_whole_and_left_where_it_was(file: Path) -> None:
    with file.open("rb") as stream:
        stream.seek(3)
        assert sha256_of(stream.fileno(), always=True) == sha256(b"weights")
        assert os.lseek(stream.fileno(), 0, os.SEEK_CUR) == stream.tell()


def rewrite(file: Path) -> None:
    file.write_bytes(b"WEIGHTS")


def rewrite_with_old_times(file: Path) -> None:
    before = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(file: Path) -> None:
    other = file.with_name("other")
    before = file.stat()
    other.write_bytes(b"WEIGHTS")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


def extend(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"!")


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", [rewrite, rewrite_with_old_times, replace, extend])
def test_a_changed_file_is_hashed_again(file: Path, change: Callable[[Path], None]) -> None:
    sha256_of(file, always=False)
    time.sleep(0.02)  # a tick of the file system's clock
    change(file)
    assert sha256_of(file, always=False) == sha256(file.read_bytes())


@pytest.mark.usefixtures("settled")
def test_a_file_that_changes_while_it_is_hashed_gets_no_receipt(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = receipts._hashed

    def slowly(descriptor: int) -> str:
        found = real(descriptor)
        extend(file)
        return found

    monkeypatch.setattr(receipts, "_hashed", slowly)
    sha256_of(file, always=False)
    assert known(file.stat()) is None


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("damage", [b"", b"[", b"[1, 2]", b"null", b"\xff", None])
def test_a_damaged_receipt_is_none(
    file: Path, cache: Path, hashed: list[int], damage: bytes | None
) -> None:
    sha256_of(file, always=False)
    [receipt] = (path for path in cache.rglob("*") if path.is_file())
    raw = receipt.read_bytes()
    other = raw.replace(sha256(b"weights").encode(), sha256(b"WEIGHTS").encode())
    receipt.write_bytes(other if damage is None else damage)
    assert sha256_of(file, always=False) == sha256(b"weights")
    assert len(hashed) == 2


@pytest.mark.usefixtures("settled")
def test_a_receipt_counts_for_thirty_days(file: Path, cache: Path, hashed: list[int]) -> None:
    sha256_of(file, always=False)
    [receipt] = (path for path in cache.rglob("*") if path.is_file())
    then = time.time() - receipts.KEEP_SECONDS - 60
    os.utime(receipt, (then, then))
    sha256_of(file, always=False)
    assert len(hashed) == 2


@pytest.mark.usefixtures("settled")
def test_a_cache_that_cannot_be_written_is_no_error(file: Path, cache: Path) -> None:
    cache.write_text("a file")
    assert sha256_of(file, always=False) == sha256(b"weights")


def test_only_plain_files_get_receipts(tmp_path: Path) -> None:
    os.utime(tmp_path, (0, 0))
    note(tmp_path.stat(), "0" * 64)
    assert known(tmp_path.stat()) is None


def note_and_read(cache: Path, files: list[Path], rounds: int) -> None:
    """Note each file's digest again and again; whatever is known must be right."""
    os.environ["KILN_CACHE"] = str(cache)  # a forked child has its server's environment
    for _ in range(rounds):
        for file in files:
            note(file.stat(), sha256(file.read_bytes()))
            assert known(file.stat()) in (None, sha256(file.read_bytes()))


def test_sixteen_writers_and_a_kill_leave_right_receipts_only(
    tmp_path: Path, file: Path, cache: Path
) -> None:
    files = [file, *(tmp_path / str(number) for number in range(8))]
    for path in files[1:]:
        path.write_bytes(path.name.encode())
    time.sleep(2.1)  # past the time in which no receipt is given
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runners.test_receipts"])
    children = [context.Process(target=note_and_read, args=(cache, files, 15)) for _ in range(16)]
    for child in children:
        child.start()
    children[0].kill()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children[1:]] == [0] * 15
    assert [known(path.stat()) for path in files] == [sha256(path.read_bytes()) for path in files]
    assert len([path for path in cache.rglob("*") if path.is_file()]) <= len(files) + 1


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, runners.receipts;"
        "assert not {'torch', 'numpy', 'pydantic', 'platformdirs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
