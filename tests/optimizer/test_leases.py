from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optimizer.leases import held, holders, is_abandoned, owned_name, sweep
from tests.tracked import ROOT

CHILD = """
import sys, time
from pathlib import Path
from optimizer.leases import held
with held(Path(sys.argv[1]), "engine-1"):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_lease_counts_while_its_block_runs(tmp_path: Path) -> None:
    with held(tmp_path / "leases", "engine-1"):
        assert holders(tmp_path / "leases") == {"engine-1"}
        with held(tmp_path / "leases", "engine-1"):
            pass
        assert holders(tmp_path / "leases") == {"engine-1"}
    assert holders(tmp_path / "leases") == set()
    assert holders(tmp_path / "absent") == set()


def test_a_killed_process_holds_nothing_even_before_it_is_waited_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert holders(tmp_path) == {"engine-1"}
        child.kill()
        limit = time.monotonic() + 30
        while holders(tmp_path) and time.monotonic() < limit:
            time.sleep(0.01)
        assert holders(tmp_path) == set()
    assert len(list(tmp_path.iterdir())) == 1
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def renamed(path: Path, **parts: str) -> Path:
    """A path's name with some of its parts replaced."""
    names = ("what", "host", "process", "start", "random")
    given = dict(zip(names, path.name.split("."), strict=True))
    return path.with_name(".".join({**given, **parts}.values()))


@pytest.mark.parametrize("process", ["own", "parent"])
def test_a_process_that_reuses_a_number_is_another_one(tmp_path: Path, process: str) -> None:
    process = str(os.getpid() if process == "own" else os.getppid())
    name = tmp_path / owned_name("engine-1")
    assert not is_abandoned(name)
    assert is_abandoned(renamed(name, process=process, start="1000"))


@pytest.mark.parametrize(("days", "abandoned"), [(1, False), (8, True)])
def test_another_hosts_lease_counts_for_a_week(tmp_path: Path, days: int, abandoned: bool) -> None:
    strange = renamed(tmp_path / owned_name("engine-1"), host="01234567")
    strange.touch()
    then = time.time() - days * 24 * 3600
    os.utime(strange, (then, then))
    assert is_abandoned(strange) == abandoned


@pytest.mark.parametrize("name", ["", "x", "x.y", "x.y.z.1.2", "a.b.c.d.e.f"])
def test_a_name_that_nobody_owns_is_kept_for_a_week(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"_{name}"
    path.touch()
    assert not is_abandoned(path)
    os.utime(path, (0, 0))
    assert is_abandoned(path)
