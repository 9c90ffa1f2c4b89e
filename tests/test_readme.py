"""Every command that the README shows works, in its order, in one folder.

The folder sees the repository's files and a `.venv` that is the environment of the tests. Blocks
that aren't run by default carry `<!-- not run in tests: reason -->` above them; those whose reason
begins with "minutes" are slow tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tracked import ROOT

_BLOCK = re.compile(
    r"(?:<!-- not run in tests: (?P<reason>[^>]+?) -->\n+)?^```sh\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_MOST_NEVER_RUN = 2
_OWN = {".venv", "out"}


@dataclass(frozen=True)
class Block:
    text: str
    reason: str | None


def blocks_of(markdown: str) -> list[Block]:
    return [Block(match["text"], match["reason"]) for match in _BLOCK.finditer(markdown)]


README = ROOT / "README.md"
BLOCKS = blocks_of(README.read_text(encoding="utf-8")) if README.exists() else []
RUN = [block for block in BLOCKS if block.reason is None]
LONG = [block for block in BLOCKS if block.reason and block.reason.startswith("minutes")]


def test_blocks_and_reasons_are_found() -> None:
    text = "x\n```sh\na\nb\n```\n<!-- not run in tests: slow -->\n```sh\nc\n```\n```py\nd\n```\n"
    assert blocks_of(text) == [Block("a\nb\n", None), Block("c\n", "slow")]


def test_the_readme_shows_commands_and_few_are_not_run() -> None:
    assert RUN
    assert len(BLOCKS) - len(RUN) - len(LONG) <= _MOST_NEVER_RUN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository by links, and the tests' own Python as if `make setup` had made it."""
    folder = tmp_path_factory.mktemp("readme")
    for path in ROOT.iterdir():
        if path.name not in _OWN and not path.name.startswith(".git"):
            (folder / path.name).symlink_to(path)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    starts = {"kiln": "-m runners.cli", "pip": "-m pip", "python": "", "python3": ""}
    for name, arguments in starts.items():
        script = f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n'
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    (programs / "activate").write_text("")
    for extra in ("compile", "bench", "dev"):
        (folder / ".venv" / f"with-{extra}").touch()
    return folder


@pytest.mark.skipif(shutil.which("bash") is None, reason="the commands are for a POSIX shell")
@pytest.mark.parametrize(
    "block",
    [*RUN, *(pytest.param(block, marks=pytest.mark.slow) for block in LONG)],
    ids=[block.text.partition("\n")[0] for block in (*RUN, *LONG)],
)
def test_a_block_of_commands_works(folder: Path, block: Block) -> None:
    environment = {
        **os.environ,
        "PATH": f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "KILN_CACHE": str(folder / "cache"),
        "KILN_CONFIG": str(folder / "config"),
        "HF_HUB_OFFLINE": "1",
    }
    child = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", block.text],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, f"{block.text}\n{child.stdout}\n{child.stderr}"
