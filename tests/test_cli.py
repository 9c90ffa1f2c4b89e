"""The `kiln` command itself: its table, its help, and its exit codes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import click
import pytest

from profiles import errors
from profiles.errors import BuildError, KilnError
from runners import cli

Kiln = Callable[..., Any]


def test_help_shows_every_command_in_one_line(kiln: Kiln) -> None:
    ended = kiln("--help")
    assert ended.code == 0
    for name in cli.COMMANDS:
        assert any(line.strip().startswith(f"{name} ") for line in ended.out.splitlines())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(kiln: Kiln, command: str) -> None:
    ended = kiln(command, "--help")
    assert ended.code == 0
    assert f"Usage: kiln {command}" in ended.out


def test_the_version_is_one_line(kiln: Kiln) -> None:
    ended = kiln("--version")
    assert ended.code == 0
    assert ended.out.startswith("kiln, version ")


@pytest.mark.parametrize("arguments", [("bake",), ("inspect",), ("inspect", "--nope", "x")])
def test_a_wrong_command_line_ends_with_2_and_the_usage(
    kiln: Kiln, arguments: tuple[str, ...]
) -> None:
    ended = kiln(*arguments)
    assert ended.code == 2
    assert "Usage: kiln" in ended.err
    assert ended.out == ""


def test_a_command_that_is_not_installed_names_what_installs_it(
    kiln: Kiln, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "compare", "benchmarks.no_such_module:compare")
    ended = kiln("compare", "x")
    assert ended.code == 17
    assert ended.sentence == (
        "Error: kiln compare needs benchmarks.no_such_module, which isn't installed: run "
        'pip install "kiln-diffusion[bench,compile,cpu]".'
    )


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    @click.command("fail")
    @click.option("-v", "--verbose", is_flag=True)
    def fail(verbose: bool) -> None:  # noqa: ARG001
        raise error

    monkeypatch.setattr(cli.cli, "get_command", lambda *_: fail)


DOCUMENTED = {
    "SpecError": 2,
    "UnsupportedError": 10,
    "DeviceMismatch": 10,
    "UntrustedError": 11,
    "BundleError": 12,
    "OutOfMemory": 13,
    "DiskFullError": 14,
    "BuildError": 15,
    "ParityError": 16,
    "MissingError": 17,
    "SelfTestError": 18,
    "PartialError": 20,
}


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "KilnError"])
def test_every_error_has_its_documented_exit_code(
    kiln: Kiln, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cls = getattr(errors, name)
    assert issubclass(cls, KilnError)
    failing(monkeypatch, cls("What is wrong: the fix."))
    ended = kiln("fail")
    assert (ended.code, ended.sentence) == (DOCUMENTED[name], "Error: What is wrong: the fix.")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "Interrupted"),
        (click.Abort(), 130, "Interrupted"),
        (MemoryError(), 13, "Out of memory: close other programs"),
        (OSError(errno.ENOSPC, "No space left on device", "a.bin"), 14, "No space left for a.bin"),
        (OSError(errno.ENOSPC, "No space left on device"), 14, "No space left for the disk"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            2,
            "/x may not be read or written",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 2, "choose another place with -o"),
    ],
    ids=repr,
)
def test_what_the_system_raises_has_a_code_and_a_sentence(
    kiln: Kiln, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    failing(monkeypatch, error)
    ended = kiln("fail")
    assert ended.code == code
    assert words in ended.sentence


def test_a_failed_tools_log_is_shown_with_v_only(
    kiln: Kiln, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, BuildError("It failed: try again.", log="the tool's own words"))
    quiet, loud = kiln("fail"), kiln("fail", "-v")
    assert quiet.code == loud.code == 15
    assert "the tool's own words" not in quiet.err
    assert "the tool's own words" in loud.err
    assert loud.sentence == quiet.sentence == "Error: It failed: try again."


def test_a_programming_error_is_not_hidden(kiln: Kiln, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        kiln("fail")
