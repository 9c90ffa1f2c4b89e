from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from optimizer.worker import run_stage
from profiles.errors import BuildError, OutOfMemory, SpecError
from tests.tracked import ROOT


def stage(name: str, *arguments: object) -> tuple[str, list[tuple[float, float]]]:
    seen: list[tuple[float, float]] = []
    printed = run_stage(
        f"tests.optimizer.stages:{name}",
        arguments,
        progress=lambda done, total: seen.append((done, total)),
    )
    return printed, seen


def test_a_stage_gets_its_arguments(tmp_path: Path) -> None:
    stage("write", tmp_path / "out", "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n")
    assert (tmp_path / "out").read_bytes() == b"gr\xc3\xbcn"


def test_progress_passes() -> None:
    assert stage("count", 3)[1] == [(1, 3), (2, 3), (3, 3)]


def test_what_libraries_print_is_kept_and_breaks_nothing() -> None:
    printed, seen = stage("chatter")
    assert seen == [(1, 1)]
    for words in ('{"progress": "not ours"}', "native output", "a warning"):
        assert words in printed


def test_an_error_of_ours_is_raised_as_itself() -> None:
    with pytest.raises(SpecError) as caught:
        stage("refuse")
    assert str(caught.value) == "The weight x is wrong: give another."


def test_a_build_error_keeps_the_tools_log() -> None:
    with pytest.raises(BuildError, match="The tool failed: try another") as caught:
        stage("fail_to_build")
    assert "what the tool said" in caught.value.log


def test_any_other_error_is_a_build_error_with_its_trace() -> None:
    with pytest.raises(BuildError) as caught:
        stage("crash")
    assert str(caught.value) == "crash failed: first line (run again with -v for the log)."
    assert "before the crash" in caught.value.log
    assert "ValueError: first line\nsecond line" in caught.value.log


def test_a_memory_error_is_out_of_memory() -> None:
    with pytest.raises(OutOfMemory, match="close other programs"):
        stage("starve")


def test_a_child_that_ends_without_an_answer_shows_its_last_words() -> None:
    with pytest.raises(BuildError) as caught:
        stage("leave")
    assert str(caught.value) == "The stage 'leave' failed (exit code 7): the last words"


@pytest.mark.skipif(sys.platform == "win32", reason="no signals: a killed child ends with code 1")
def test_a_killed_child_most_likely_lacked_memory() -> None:
    with pytest.raises(OutOfMemory) as caught:
        stage("die")
    sentence = "The stage 'die' was killed, most likely for lack of memory: close other programs"
    assert str(caught.value).startswith(sentence)


def test_a_stage_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    """Else a killed compile would go on beside the one that resumes it."""
    note = tmp_path / "pid"
    call = (
        "from pathlib import Path; from optimizer.worker import run_stage;"
        f"run_stage('tests.optimizer.stages:wait', (Path({str(note)!r}),), progress=print)"
    )
    parent = subprocess.Popen([sys.executable, "-c", call], cwd=ROOT)
    try:
        while not note.exists():
            assert parent.poll() is None
            time.sleep(0.05)
        child = psutil.Process(int(note.read_text()))
    finally:
        parent.kill()
        parent.wait()
    child.wait(timeout=60)
