"""Stages in processes of their own: each test for a fresh interpreter and for a forked one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

from optimizer import nursery
from optimizer.worker import run_stage, warm_stages
from profiles.errors import BuildError, OutOfMemory, SpecError
from tests.tracked import ROOT

needs_forks = pytest.mark.skipif(not nursery.supported(), reason="no safe fork here")
LIGHT = ("tests.optimizer.stages", "sqlite3")
"""In torch's place, which takes ten seconds; test_compile has that."""

Stage = Callable[..., tuple[str, list[tuple[float, float]]]]


@pytest.fixture(scope="module", params=["fresh", pytest.param("forked", marks=needs_forks)])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """`stage(name, *arguments)` runs a function of stages.py: what it printed, and its progress."""
    warm = request.param == "forked"

    def run(name: str, *arguments: object) -> tuple[str, list[tuple[float, float]]]:
        seen: list[tuple[float, float]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("PYTEST_CURRENT_TEST")  # another environment: another nursery
            printed = run_stage(
                f"tests.optimizer.stages:{name}",
                arguments,
                progress=lambda done, total: seen.append((done, total)),
                warm=warm,
            )
        return printed, seen

    with warm_stages(LIGHT) if warm else nullcontext():
        yield run


def test_a_stage_gets_its_arguments(stage: Stage, tmp_path: Path) -> None:
    stage("write", tmp_path / "out", "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n")
    assert (tmp_path / "out").read_bytes() == b"gr\xc3\xbcn"


def test_progress_passes(stage: Stage) -> None:
    assert stage("count", 3)[1] == [(1, 3), (2, 3), (3, 3)]


def test_what_libraries_print_is_kept_and_breaks_nothing(stage: Stage) -> None:
    printed, seen = stage("chatter")
    assert seen == [(1, 1)]
    for words in ('{"progress": "not ours"}', "native output", "a warning"):
        assert words in printed


def test_an_error_of_ours_is_raised_as_itself(stage: Stage) -> None:
    with pytest.raises(SpecError) as caught:
        stage("refuse")
    assert str(caught.value) == "The weight x is wrong: give another."


def test_a_build_error_keeps_the_tools_log(stage: Stage) -> None:
    with pytest.raises(BuildError, match="The tool failed: try another") as caught:
        stage("fail_to_build")
    assert "what the tool said" in caught.value.log


def test_any_other_error_is_a_build_error_with_its_trace(stage: Stage) -> None:
    with pytest.raises(BuildError) as caught:
        stage("crash")
    assert str(caught.value) == "crash failed: first line (run again with -v for the log)."
    assert "before the crash" in caught.value.log
    assert "ValueError: first line\nsecond line" in caught.value.log


def test_a_memory_error_is_out_of_memory(stage: Stage) -> None:
    with pytest.raises(OutOfMemory, match="close other programs"):
        stage("starve")


def test_a_child_that_ends_without_an_answer_shows_its_last_words(stage: Stage) -> None:
    with pytest.raises(BuildError) as caught:
        stage("leave")
    assert str(caught.value) == "The stage 'leave' failed (exit code 7): the last words"


@pytest.mark.skipif(sys.platform == "win32", reason="no signals: a killed child ends with code 1")
def test_a_killed_child_most_likely_lacked_memory(stage: Stage) -> None:
    with pytest.raises(OutOfMemory) as caught:
        stage("die")
    sentence = "The stage 'die' was killed, most likely for lack of memory: close other programs"
    assert str(caught.value).startswith(sentence)


@needs_forks
def test_forked_stages_find_the_libraries_imported_and_see_no_other() -> None:
    with warm_stages(LIGHT):
        seen = [
            run_stage("tests.optimizer.stages:who", (), progress=lambda _done, _of: None, warm=warm)
            for warm in (True, True, False)
        ]
    first, second, fresh = (words.split() for words in seen)
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    assert first[0] == "shared"
    assert fresh[0] == "none"
    assert not psutil.pid_exists(int(first[1]))


@needs_forks
def test_another_environment_gets_another_nursery(monkeypatch: pytest.MonkeyPatch) -> None:
    def say() -> str:
        target = "tests.optimizer.stages:say_variable"
        return run_stage(target, ("KILN_OF_A_TEST",), progress=lambda _done, _of: None, warm=True)

    with warm_stages(LIGHT):
        assert say() == "None\n"
        monkeypatch.setenv("KILN_OF_A_TEST", "blue")
        assert say() == "blue\n"


@needs_forks
def test_threads_of_forked_stages_soon_sleep_unless_the_user_says_how_they_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spins(*, warm: bool) -> str:
        target, given = "tests.optimizer.stages:say_variable", ("GOMP_SPINCOUNT",)
        return run_stage(target, given, progress=lambda _done, _of: None, warm=warm).strip()

    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    with warm_stages(LIGHT):
        assert (spins(warm=True), spins(warm=False)) == ("10000", "None")
        monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
        assert spins(warm=True) == "None"


@pytest.mark.parametrize("warm", [False, pytest.param(True, marks=needs_forks)])
def test_a_stage_ends_when_its_parent_is_killed(tmp_path: Path, warm: bool) -> None:
    """Else a killed compile would go on beside the one that resumes it."""
    note = tmp_path / "pid"
    call = (
        "from pathlib import Path; from optimizer.worker import run_stage, warm_stages\n"
        f"with warm_stages({LIGHT}):\n"
        f"    target, given = 'tests.optimizer.stages:wait', (Path({str(note)!r}),)\n"
        f"    run_stage(target, given, progress=print, warm={warm})"
    )
    parent = subprocess.Popen([sys.executable, "-c", call], cwd=ROOT)
    try:
        while not note.exists():
            assert parent.poll() is None
            time.sleep(0.05)
        child = psutil.Process(int(note.read_text()))
        started = psutil.Process(parent.pid).children(recursive=True)
    finally:
        parent.kill()
        parent.wait()
    assert child in started
    assert len(started) == 1 + warm
    assert not psutil.wait_procs(started, timeout=60)[1]


@needs_forks
def test_an_interrupt_ends_forked_stages_too(tmp_path: Path) -> None:
    """Ctrl-C reaches the whole process group; what was started is gone when the command is."""
    note = tmp_path / "pid"
    call = (
        "from pathlib import Path; from optimizer.worker import run_stage, warm_stages\n"
        f"with warm_stages({LIGHT}):\n"
        f"    target, given = 'tests.optimizer.stages:wait', (Path({str(note)!r}),)\n"
        "    run_stage(target, given, progress=print, warm=True)"
    )
    command = [sys.executable, "-c", call]
    parent = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    while not note.exists():
        assert parent.poll() is None
        time.sleep(0.05)
    started = psutil.Process(parent.pid).children(recursive=True)
    os.killpg(parent.pid, signal.SIGINT)
    parent.wait(timeout=60)
    assert len(started) == 2
    assert not [process for process in started if process.is_running()]
