"""Stage functions for the tests of the worker; each runs in a child process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from profiles.errors import BuildError, SpecError


def write(out: Path, text: str) -> None:
    out.write_text(text, encoding="utf-8")


def count(total: int, progress: Callable[[float, float], None]) -> None:
    for done in range(1, total + 1):
        progress(done, total)


def chatter(progress: Callable[[float, float], None]) -> None:
    """Print by every way a library has: Python's streams and the descriptors themselves."""
    print('{"progress": "not ours"}')
    os.write(1, b"native output\n")
    sys.stderr.write("a warning\n")
    progress(1, 1)
    print("{", flush=True)


def refuse() -> None:
    raise SpecError("The weight x is wrong: give another.")


def fail_to_build() -> None:
    raise BuildError("The tool failed: try another.", log="what the tool said")


def crash() -> None:
    print("before the crash", flush=True)
    raise ValueError("first line\nsecond line")


def starve() -> None:
    raise MemoryError


def leave() -> None:
    print("the last words", file=sys.stderr, flush=True)
    os._exit(7)


def wait(note: Path) -> None:
    """Say which process this is, and work for ten minutes."""
    note.with_suffix(".part").write_text(str(os.getpid()))
    note.with_suffix(".part").replace(note)
    time.sleep(600)


def die() -> None:
    import psutil

    psutil.Process().kill()


def who() -> None:
    """Print whether sqlite3 is there already, our parent and ourselves."""
    print("shared" if "sqlite3" in sys.modules else "none", os.getppid(), os.getpid())


def say_variable(name: str) -> None:
    print(os.environ.get(name))
