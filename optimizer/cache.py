"""`kiln cache`: what kiln keeps on this disk, whether it is whole, and making room."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from profiles.errors import BundleError, SpecError
from runners.console import Console

if TYPE_CHECKING:
    from optimizer.collecting import Collected, Item
    from optimizer.inventory import Damage, StoredEntry
    from optimizer.store import Store

__all__ = ["cache_command", "parse_size"]

_OTHERS = {
    "kernels": "kernels that TensorRT-RTX compiled for this card",
    "known_bundles": "notes: where bundles were written",
    "known_licences": "notes: licences of hub models",
    "known_models": "notes: where models lie",
    "receipts": "digests of files that were hashed before",
    "reference_model": "training runs of the reference model",
    "selftest": "results of self-tests",
    "v1": "store of an older kiln; `kiln cache gc` removes it",
}
"""What else of kiln's lies in the cache folder. `gc` leaves all but the last."""

_PARTS = {
    "_condemned": "names of what is being removed",
    "_damaged": "damaged entries, set aside",
    "_leases": "names of what is in use",
    "_partial": "partial files",
    "_tmp": "entries being made or removed",
    "blobs": "blobs that no entry holds",
}
"""What a store has beside its entries."""

_DAY = 24 * 3600.0
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")


@click.group("cache")
def cache_command() -> None:
    """Show what kiln keeps in its cache, check it, and make room.

    Stages of compiles lie there, so that the same one needn't run again; bundles don't, they are
    whole without it. $KILN_CACHE moves it.
    """


@cache_command.command("ls")
@_JSON
def ls_command(
    as_json: bool,  # noqa: FBT001
) -> None:
    """List the entries: kind, model, size, last use; the least recently used first."""
    from optimizer.inventory import model_names, stored_entries
    from optimizer.store import Store

    store, names = Store(), model_names()
    entries = stored_entries(store)
    rows = [_entry_document(entry, names) for entry in entries]
    document = {"path": str(store.root), "entries": rows}
    Console(json_output=as_json).result(
        "\n".join(_entry_lines(rows)) or f"Nothing is kept in {store.root}.", document
    )


def _entry_document(entry: StoredEntry, names: dict[str, str]) -> dict[str, Any]:
    digest = entry.model
    component = entry.key.get("component")
    return {
        "kind": entry.kind,
        "name": entry.path.name,
        "model": names.get(digest, digest[:12]) if digest else None,
        "model_digest": digest,
        "component": component if isinstance(component, str) else None,
        "bytes": entry.bytes,
        "last_used": entry.last_used,
        "in_use": entry.leased,
    }


def _entry_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    from optimizer.hub_files import byte_text

    for row in rows:
        of = " ".join(filter(None, (row["model"] or "(unknown)", row["component"])))
        used = "in use" if row["in_use"] else f"used {_ago(row['last_used'])}"
        size = byte_text(row["bytes"])
        yield f"{row['kind']:<12} {row['name'][:12]}  {size:>9}  {used:<16}  {of}"


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("days", _DAY), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


@cache_command.command("du")
@_JSON
def du_command(
    as_json: bool,  # noqa: FBT001
) -> None:
    """Show what takes how much room; files that entries share count once."""
    from optimizer.hub_files import byte_text
    from optimizer.inventory import inodes_under
    from optimizer.store import Store

    store = Store()
    kinds, others = _usage(store)
    total = sum(inodes_under(store.root).values())
    document = {"path": str(store.root), "bytes": total, "kinds": kinds, "others": others}
    lines = [f"{byte_text(total):>10}  {store.root}, files with several names once"]
    lines += (f"{byte_text(size):>10}  entries: {kind}" for kind, size in kinds.items())
    names = {**_OTHERS, **_PARTS}
    lines += (
        f"{byte_text(size):>10}  {names.get(name, f'not known to this kiln: {name}')}"
        for name, size in others.items()
    )
    Console(json_output=as_json).result("\n".join(lines), document)


def _usage(store: Store) -> tuple[dict[str, int], dict[str, int]]:
    """Kind -> bytes of its entries, and whatever else is in the cache folder -> its bytes."""
    from optimizer.folders import children
    from optimizer.inventory import inodes_under, stored_entries

    found: dict[str, dict[tuple[int, int], int]] = defaultdict(dict)
    for entry in stored_entries(store):
        found[entry.kind].update(entry.inodes)
    kinds = {kind: sum(inodes.values()) for kind, inodes in sorted(found.items())}
    held = {inode for inodes in found.values() for inode in inodes}
    others = {}
    for path in (*children(store.base), *children(store.root)):
        if path != store.base and path.name not in kinds:
            inodes = inodes_under(path)
            others[path.name] = sum(size for inode, size in inodes.items() if inode not in held)
    return kinds, {name: size for name, size in others.items() if size or name in _OTHERS}


@cache_command.command("verify")
@click.option("--repair", "repairs", is_flag=True, help="Set damaged entries aside.")
@_JSON
def verify_command(
    repairs: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
) -> None:
    """Hash every byte. Damaged entries end with 12; with --repair the next compile makes them."""
    from optimizer.inventory import damages, entry_folders, inodes_under, repair
    from optimizer.store import Store

    console, store = Console(json_output=as_json), Store()
    count = sum(1 for _ in entry_folders(store))
    total = sum(inodes_under(store.base).values())
    found = []
    with console.stage("Verify", total, in_bytes=True) as stage:
        for damage in damages(store, stage.advance):
            found.append(damage)
            if repairs:
                repair(store, damage)
    document = {
        "path": str(store.root),
        "entries": count,
        "bytes": total,
        "damaged": [_damage_document(store, damage) for damage in found],
        "repaired": repairs,
    }
    console.result("\n".join(_damage_lines(document)), document)
    if found and not repairs:
        raise BundleError(
            f"{len(found)} of what lies in {store.root} is damaged: run `kiln cache verify "
            "--repair`, and compile again."
        )


def _damage_document(store: Store, damage: Damage) -> dict[str, Any]:
    path = damage.path.relative_to(store.base).as_posix()
    return {"path": path, "files": list(damage.files)}


def _damage_lines(document: dict[str, Any]) -> Iterator[str]:
    for row in document["damaged"]:
        files = f": {', '.join(row['files'])}" if row["files"] else ""
        yield f"damaged{', set aside' if document['repaired'] else ''}: {row['path']}{files}"
    if not document["damaged"]:
        yield f"All {document['entries']} entries are whole ({document['bytes']} bytes)."


@cache_command.command("gc")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option(
    "--keep-days",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="N",
    help="What was used within N days stays.",
)
@click.option("--max-size", metavar="50GB", help="Then more goes until the store is that small.")
@_JSON
def gc_command(
    dry_run: bool,  # noqa: FBT001
    keep_days: float,
    max_size: str | None,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Remove waste and what was used longest ago; never what is in use, or was in the last hour."""
    from optimizer.collecting import Rules, collect
    from optimizer.store import Store

    rules = Rules(keep_days * _DAY, parse_size(max_size) if max_size else None)
    store = Store()
    done = collect(store, rules, dry_run=dry_run)
    rows = [_item_document(store.root, item) for item in done.removed]
    document = {
        "path": str(store.root),
        "dry_run": dry_run,
        "removed": rows,
        "removed_bytes": sum(item.bytes for item in done.removed),
        "left_bytes": done.left_bytes,
        "in_use": done.in_use,
    }
    Console(json_output=as_json).result("\n".join(_gc_lines(done, document)), document)


def _item_document(root: Path, item: Item) -> dict[str, Any]:
    path = item.path.absolute().relative_to(root.absolute()).as_posix()
    return {"path": path, "what": item.what, "bytes": item.bytes, "last_used": item.last_used}


def _gc_lines(done: Collected, document: dict[str, Any]) -> Iterator[str]:
    from optimizer.hub_files import byte_text

    verb = "would go" if document["dry_run"] else "removed"
    for row in document["removed"]:
        used = f", used {_ago(row['last_used'])}" if row["last_used"] else ""
        yield f"{verb}: {row['path']} ({row['what']}, {byte_text(row['bytes'])}{used})"
    yield (
        f"{len(document['removed'])} {verb}, {byte_text(document['removed_bytes'])}; the store "
        f"{'would have' if document['dry_run'] else 'has'} {byte_text(done.left_bytes)}."
    )
    if done.in_use:
        yield f"{done.in_use} more stay: they are in use, or were within the last hour."


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "B": 1,
}


def parse_size(text: str) -> int:
    """Bytes of "50GB", "1.5 GiB" or "1000000"; raises `SpecError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise SpecError(f"{text} is no size: write it as 50GB, 1.5GiB or a number of bytes.")
    return int(float(match[1]) * _UNITS[match[2].upper()])
