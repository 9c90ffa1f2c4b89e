"""Which of a store's bytes go: waste first, then what was used longest ago."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from optimizer import known_models, leases
from optimizer.folders import age_seconds, children, remove
from optimizer.inventory import StoredEntry, inodes_under, stored_entries
from optimizer.store import Store
from runners import receipts

__all__ = ["GRACE_SECONDS", "Collected", "Item", "Rules", "collect"]

GRACE_SECONDS = 3600.0
"""What was used within the last hour stays: whoever found it may still be reading."""


@dataclass(frozen=True)
class Rules:
    """What stays."""

    keep_seconds: float
    """What was used within so long."""
    max_bytes: int | None = None
    """How large the store may be: then more goes, the least recently used first."""
    grace_seconds: float = GRACE_SECONDS
    """What was used within so long stays whatever the size."""


@dataclass(frozen=True)
class Item:
    """Something that goes."""

    path: Path
    what: str
    """An entry's kind, or what sort of waste it is."""
    bytes: int
    """What the disk gets back; of shared files, with the last entry that holds them."""
    last_used: float | None = None


@dataclass(frozen=True)
class Collected:
    """What went (or would), and what is left."""

    removed: tuple[Item, ...]
    left_bytes: int
    """Of the store, shared files once."""
    in_use: int
    """How many entries only stayed because something uses them, or did within the grace."""


def collect(store: Store, rules: Rules, *, dry_run: bool = False) -> Collected:
    """Remove waste, then entries by the rules; with `dry_run`, only say what would go.

    Safe at any time beside everything else: see optimizer.store. Killed, it can be run again.
    """
    partial = list(_stale_partials(store, rules))
    waste = list(_waste(store, rules))
    gone = [item for item in waste if dry_run or _removed(store, item)]
    inside = sum(item.bytes for item in waste if item.path.is_relative_to(store.base))
    total = sum(inodes_under(store.base).values()) - sum(item.bytes for item in partial)
    if dry_run:
        total -= inside
    chosen, in_use = _chosen(stored_entries(store), rules, total)
    for item in (*partial, *chosen):
        if dry_run or store.discard(item.path, grace_seconds=rules.grace_seconds):
            gone.append(item)
    if dry_run:
        return Collected(tuple(gone), total - sum(item.bytes for item in chosen), in_use)
    for blob in store.blobs.garbage():
        remove(blob)
    store.sweep()
    return Collected(tuple(gone), sum(inodes_under(store.base).values()), in_use)


def _chosen(entries: list[StoredEntry], rules: Rules, total: int) -> tuple[list[Item], int]:
    """The entries that go, the least recently used first, and how many are spared for their use."""
    holders = Counter(inode for entry in entries for inode in entry.inodes)
    now, chosen, spared = time.time(), [], 0
    for entry in entries:
        too_large = rules.max_bytes is not None and total > rules.max_bytes
        if now - entry.last_used <= rules.keep_seconds and not too_large:
            continue
        if entry.leased or now - entry.last_used < rules.grace_seconds:
            spared += 1
            continue
        holders.subtract(entry.inodes.keys())
        freed = sum(size for inode, size in entry.inodes.items() if not holders[inode])
        total -= freed
        chosen.append(Item(entry.path, entry.kind, freed, entry.last_used))
    return chosen, spared


def _waste(store: Store, rules: Rules) -> Iterator[Item]:
    """What no process will ever ask for."""
    for path in store.abandoned():
        yield _item(path, "temporary of a process that ended")
    for path in children(store.base / "_damaged"):
        yield _item(path, "damaged entry")
    for path in store.blobs.garbage():
        yield _item(path, "blob that no entry holds")
    old = store.root / known_models.OLD_PLACE
    if old.is_dir() and _youngest_seconds(old) >= rules.grace_seconds:
        yield _item(old, "store of an older version")
    for folder in children(store.root / receipts.FOLDER):
        for path in children(folder):
            if age_seconds(path) > receipts.KEEP_SECONDS:
                yield _item(path, "expired receipt")


def _stale_partials(store: Store, rules: Rules) -> Iterator[Item]:
    """What was begun and hasn't been worked on for long."""
    leased = store.leased()
    keep = max(rules.grace_seconds, min(rules.keep_seconds, leases.KEEP_SECONDS))
    for path in children(store.base / "_partial"):
        if age_seconds(path) > keep and f"_partial-{path.name.partition('.')[0]}" not in leased:
            yield _item(path, "partial file")


def _item(path: Path, what: str) -> Item:
    """Waste; a file that has another name as well gives nothing back."""
    freed = 0
    files = path.rglob("*") if path.is_dir() else (path,)
    for file in files:
        with suppress(OSError):
            status = file.lstat()
            freed += status.st_size if file.is_file() and status.st_nlink <= 1 else 0
    return Item(path, what, freed)


def _youngest_seconds(folder: Path) -> float:
    """How long ago an old store was last written: one that an older kiln uses stays."""
    kinds = [kind for kind in children(folder) if kind.name not in known_models.KINDS]
    entries = [entry for kind in kinds for entry in children(kind)]
    return min(map(age_seconds, (folder, *kinds, *entries)))


def _removed(store: Store, item: Item) -> bool:
    if item.path == store.root / known_models.OLD_PLACE:
        known_models.move_old_notes(store.root)
    remove(item.path)
    return True
