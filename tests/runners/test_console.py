from __future__ import annotations

import ctypes
import json
import math
import sys

import pytest

from runners.console import Console, finite_json, native_output_to_stderr


def test_what_is_not_finite_is_null_at_any_depth() -> None:
    document = {
        "a": math.nan,
        "b": [1, {"c": -math.inf}],
        "d": (2.5, "\N{LATIN SMALL LETTER A WITH DIAERESIS}"),
        3: None,
    }
    line = finite_json(document)
    assert "\n" not in line
    assert json.loads(line) == {
        "a": None,
        "b": [1, {"c": None}],
        "d": [2.5, "\N{LATIN SMALL LETTER A WITH DIAERESIS}"],
        "3": None,
    }


def test_a_stage_is_one_line_on_stderr_where_that_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Console().stage("Build") as stage:
        stage.advance()
        stage.progress(1, 2)
        stage.note("3 layers")
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("Build: 3 layers, ")
    assert line.endswith(" s")


def test_a_failed_stage_says_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="x"), Console().stage("Build"):
        raise ValueError("x")
    assert capsys.readouterr().err == ""


def test_the_answer_is_text_or_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    Console().result("text", {"a": 1})
    Console(json_output=True).result("text", {"a": 1})
    assert capsys.readouterr().out == 'text\n{"a": 1}\n'


def test_details_are_for_verbose_runs(capsys: pytest.CaptureFixture[str]) -> None:
    Console().detail("hidden")
    Console(verbose=True).detail("shown")
    assert capsys.readouterr().err == "shown\n"


def test_what_native_code_prints_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    runtime = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
    print("a result")
    with native_output_to_stderr():
        runtime.puts(b"a native message")
    print("another")
    found = capfd.readouterr()
    assert found.out == "a result\nanother\n"
    assert found.err == "a native message\n"
