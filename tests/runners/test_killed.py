"""kill -9 at any moment of pack and install: nothing verified is lost, nothing partial is seen."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runners.bundle import open_bundle
from runners.installed import located, versions
from runners.offers import verified_layout
from tests.shipments import Shop, files_of
from tests.tracked import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes")

SIZE = 400_000

STEP = """
import os, signal, sys
from pathlib import Path
from runners import installing, packing, private, writing
from tests.shipments import Shop

left = int(sys.argv[1])

def dying(call):
    def wrapped(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)
    return wrapped

writing._COPIED_FROM = 1
for name in (*"write fsync open link mkdir replace rename unlink rmdir".split(), "copy_file_range"):
    setattr(os, name, dying(getattr(os, name)))
"""
"""Dies at the system call of this number that changes the disk, counted from the start."""

WORK = {
    "pack": "shop.pack(shop.folder / 'bundles/new')",
    "install": "shop.install()",
}


def prepared(folder: Path, work: str) -> Shop:
    """A packed and installed version, and another one that is to follow."""
    shop = Shop(folder)
    shop.pack(shop.toy(size=SIZE))
    shop.install()
    new = shop.toy("new", size=SIZE, seed=1)
    if work == "install":
        shop.pack(new)
    return shop


def died(shop: Shop, work: str, step: int) -> bool:
    """Run the work in a process that kills itself at `step`; whether it came so far."""
    code = f"{STEP}\nshop = Shop(Path(sys.argv[2]))\n{WORK[work]}\n"
    child = subprocess.run(
        [sys.executable, "-c", code, str(step), str(shop.folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode in (0, -signal.SIGKILL), child.stderr
    return child.returncode != 0


def check(shop: Shop, work: str, first: Path) -> None:
    """What was there is whole; what is new is whole or not there; and the work can be done."""
    trust = shop.trust
    assert [one.offer.name for one in verified_layout(shop.out, trust)] == ["toy"]
    open_bundle(first, trust=trust)
    open_bundle(located(shop.root / "toy"), trust=trust)
    for version in (shop.root / "toy").iterdir():
        if version.is_dir() and not version.name.startswith("."):
            open_bundle(version, trust=trust)
    if work == "pack":
        shop.pack(shop.folder / "bundles/new")
    last = shop.install()
    assert (last.path / "unet/weights.bin").read_bytes() == (
        shop.folder / "bundles/new/unet/weights.bin"
    ).read_bytes()
    assert set(versions(shop.root, "toy")) == {first.name, last.version}
    assert not list(shop.root.rglob("*.kiln-part"))
    assert not list(shop.out.rglob("*.kiln-part"))


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("step", [7, 40])
def test_a_kill_at_a_step_loses_nothing(tmp_path: Path, work: str, step: int) -> None:
    shop = prepared(tmp_path, work)
    first = located(shop.root / "toy")
    assert died(shop, work, step)
    check(shop, work, first)


@pytest.mark.faults
@pytest.mark.parametrize("work", WORK)
def test_a_kill_at_every_step_loses_nothing(tmp_path: Path, work: str) -> None:
    step, last = 0, 0
    while not last:
        step += 1
        folder = tmp_path / str(step)
        folder.mkdir()
        shop = prepared(folder, work)
        first = located(shop.root / "toy")
        last = 0 if died(shop, work, step) else step
        check(shop, work, first)
        for path in files_of(folder):
            (folder / path).unlink()
    assert last > 40


@pytest.mark.faults
@pytest.mark.parametrize("work", WORK)
def test_a_kill_at_200_random_times_loses_nothing(tmp_path: Path, work: str) -> None:
    """From outside, at no system call in particular; whoever comes next goes on."""
    chance, killed = random.Random(work), 0
    for attempt in range(100):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        shop = prepared(folder, work)
        first = located(shop.root / "toy")
        code = f"{STEP}\nshop = Shop(Path(sys.argv[2]))\nprint(flush=True)\n{WORK[work]}\n"
        child = subprocess.Popen(
            [sys.executable, "-c", code, "0", str(shop.folder)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(chance.uniform(0, 0.15))
        child.kill()
        killed += child.wait() != 0
        child.stdout.close()
        check(shop, work, first)
        for path in files_of(folder):
            (folder / path).unlink()
    assert killed > 50
