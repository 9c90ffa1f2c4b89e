"""`kiln selftest`: a bundle's recorded calls and picture on this machine, in a child process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import click

from profiles import errors
from profiles.errors import KilnError, SelfTestError, SpecError
from runners.console import Console

__all__ = ["SelfTest", "run_selftest", "selftest_command"]

_CHILD = (sys.executable, "-m", "runners.selftest_child")


@dataclass
class SelfTest:
    """What the child said, so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """name, machine, db (of each call, or the picture's PSNR) and needed_db of what was judged."""
    during: str = ""
    """What was being tested last; nothing at first."""
    error: tuple[str, str] | None = None
    finished: bool = False

    @property
    def failure(self) -> str | None:
        """A sentence about the first thing that is worse than it must be."""
        for row in self.rows:
            worst = min(row["db"].values())
            if worst < row["needed_db"]:
                what = "The picture" if row["name"] == "picture" else f"The engine of {row['name']}"
                unit = "PSNR to the recorded one" if row["name"] == "picture" else "SQNR to fp32"
                return (
                    f"{what} has {worst:.1f} dB {unit} where {row['needed_db']:.1f} are needed: "
                    "install the versions that `kiln inspect` lists, or compile the bundle again."
                )
        return None


@click.command("selftest")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--trust", type=click.Path(path_type=Path), help="NAME.pub or trust file [default: yours]"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
def selftest_command(bundle: Path, trust: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """Run BUNDLE's recorded calls and draw its picture; a failure keeps it from being used."""
    console = Console(json_output=as_json)
    with console.stage(f"Test {bundle}"):
        tested = run_selftest(bundle, trust=trust)
    lines = [
        f"{row['name']:<14}{min(row['db'].values()):>7.1f} dB, {row['needed_db']:.1f} needed"
        for row in tested.rows
    ]
    console.result("\n".join([*lines, "passed"]), {"passed": True, "tests": tested.rows})


def run_selftest(
    path: Path, *, trust: Path | None = None, child: Sequence[str] = _CHILD
) -> SelfTest:
    """Test the bundle at `path` on this machine and keep the result for `runners.load`.

    Raises SelfTestError, and keeps it, where an engine crashes or is wrong; what else keeps the
    bundle from being tried (a wrong byte, another machine) is raised as it is, and nothing kept.
    """
    from runners.bundle import Bundle, read_manifest
    from runners.compatibility import require_compatible
    from runners.selftest import facts_for, store_outcome

    bundle = Bundle(path, read_manifest(path))
    manifest = bundle.manifest
    if manifest.picture is None and not any(entry.selftest for entry in manifest.engines):
        raise SpecError(f"{path} has nothing recorded to test it with: compile it again.")
    facts = facts_for(manifest)
    require_compatible(manifest, facts)
    named = [] if trust is None else [str(trust.absolute())]
    tested, failure = _run([*child, str(path.absolute()), *named])
    failure = failure or tested.failure
    passed = {
        f"{row['name']} on {row['machine']}": {"sqnr_db": row["db"], "needed_db": row["needed_db"]}
        for row in tested.rows
    }
    store_outcome(bundle, facts, passed=passed, failure=failure)
    if failure is not None:
        raise SelfTestError(failure)
    return tested


def _run(command: list[str]) -> tuple[SelfTest, str | None]:
    """What the child said, and a sentence where an engine made it end."""
    tested, root = SelfTest(), Path(__file__).parents[1]
    with (
        TemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=root) as running,
    ):
        assert running.stdout is not None
        try:
            for line in running.stdout:
                _take(tested, json.loads(line))
            code = running.wait()
        finally:
            if running.poll() is None:
                running.kill()
        log.seek(0)
        words = log.read().decode("utf-8", errors="replace").strip().splitlines()
    if tested.error is not None:
        return tested, _raised(tested)
    if tested.finished:
        return tested, None
    if not tested.during:
        raise SelfTestError(
            f"The self-test couldn't start ({_ending(code)}: {(words or ['no message'])[-1]}): "
            "run it again, or install kiln again."
        )
    return tested, (
        f"{tested.during} crashed the process that tested it ({_ending(code)}): update the driver "
        "and the libraries, or compile the bundle again."
    )


def _take(tested: SelfTest, message: dict[str, Any]) -> None:
    if "start" in message:
        tested.during = str(message["start"])
    elif "error" in message:
        tested.error = (str(message["error"]), str(message["message"]))
    elif "finished" in message:
        tested.finished = True
    else:
        tested.rows.append(message)


def _raised(tested: SelfTest) -> str:
    """The sentence of a failed test; what says nothing about the engines is raised as it is."""
    assert tested.error is not None
    name, message = tested.error
    kind = getattr(errors, name, SelfTestError)
    if isinstance(kind, type) and issubclass(kind, KilnError) and kind is not SelfTestError:
        raise kind(message)
    return (
        f"{tested.during or 'The bundle'} can't be tested: {message.rstrip('.')}; "
        "update the libraries, or compile the bundle again."
    )


def _ending(code: int) -> str:
    """How a process ended, in the system's own word for it where it has one."""
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code:#x}" if code > 255 else f"exit code {code}"
