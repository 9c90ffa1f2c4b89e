"""What the processes of test_store_faults.py do: they are killed, or work against each other."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from optimizer.collecting import Rules, collect
from optimizer.store import Store

__all__ = ["KEYS", "build", "content", "count_events", "is_right", "read_and_build", "take"]

KEYS = 6
"""Entries that are built again and again."""

_EVENTS = ("open", "os.", "shutil.")


def content(number: int) -> dict[str, bytes]:
    """The files of an entry: some are its own, some are other entries' too, some are empty."""
    block = hashlib.sha256(str(number).encode()).digest()
    return {
        "weights.bin": block * 200,
        "unet/graph.xml": f"<net n='{number}'/>".encode(),
        "unet/shared.bin": b"s" * 3000,
        "tokenizer/vocab.json": str(number % 2).encode() * 100,
        "empty": b"",
    }


def is_right(path: Path, number: int) -> bool:
    """Whether every byte of an entry is there, and nothing else."""
    found = {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != "entry.json"
    }
    return found == content(number)


def make(store: Store, number: int) -> None:
    with store.create("engine", {"n": number}) as folder:
        for name, raw in content(number).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(raw)


def die_at(point: int) -> None:
    """Be killed as by kill -9 right before this process's `point`-th operation on a file."""
    count = 0

    def hook(event: str, _arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event.startswith(_EVENTS):
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def count_events(root: Path, work: str) -> int:
    """How many operations `work` takes from its begin to its end."""
    count = 0

    def hook(event: str, _arguments: tuple[Any, ...]) -> None:
        nonlocal count
        count += event.startswith(_EVENTS)

    sys.addaudithook(hook)
    WORKS[work](root, 0, None)
    return count


def build(root: Path, seed: int, ledger: Path | None, point: int = 0) -> None:
    """Build some entries that aren't there, and note in `ledger` each that was finished."""
    store, numbers = Store(root), random.Random(seed).sample(range(KEYS), 3)
    if point:
        die_at(point)
    for number in numbers:
        if store.find("engine", {"n": number}) is None:
            make(store, number)
        if ledger is not None:
            with ledger.open("a") as stream:
                stream.write(f"{number}\n")


def take(root: Path, seed: int, _ledger: Path | None, point: int = 0) -> None:
    """Collect garbage, all that isn't leased or so much that little is left."""
    store = Store(root)
    if point:
        die_at(point)
    largest = random.Random(seed).choice([None, 0, 20_000])
    collect(store, Rules(0.0 if largest is None else 3600.0, largest, grace_seconds=0.0))


WORKS = {"build": build, "take": take}


def build_all(root: Path, seed: int, barrier: Any) -> None:
    """Build every entry, all builders at the same time and in orders of their own."""
    store, numbers = Store(root), random.Random(seed).sample(range(KEYS), KEYS)
    barrier.wait(120)
    for number in numbers:
        make(store, number)
        path = store.find("engine", {"n": number}, verify=True)
        assert path is not None
        assert is_right(path, number)


def take_for(root: Path, seconds: float) -> None:
    """Collect garbage without any grace, again and again."""
    store, limit = Store(root), time.monotonic() + seconds
    while time.monotonic() < limit:
        collect(store, Rules(0.0, grace_seconds=0.0))


def read_and_build(root: Path, seed: int, seconds: float, answers: Any) -> None:
    """Use entries while others remove them: each is a miss, or whole as long as it is used."""
    numbers, found = random.Random(seed), {"hit": 0, "miss": 0, "wrong": 0}
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        store, number = Store(root), numbers.randrange(KEYS)
        with store.session():
            path = store.find("engine", {"n": number})
            found["miss" if path is None else "hit"] += 1
            if path is None:
                make(store, number)
                path = store.find("engine", {"n": number}, verify=True)
            for _ in range(3):
                found["wrong"] += path is None or not is_right(path, number)
                time.sleep(0.001)
    answers.put(found)
