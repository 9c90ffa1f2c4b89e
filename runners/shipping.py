"""`kiln pack`, `install`, `bundles`, `rollback`, `uninstall`: bundles on other machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runners.console import Console

if TYPE_CHECKING:
    from runners.installing import Result

__all__ = [
    "bundles_command",
    "install_command",
    "pack_command",
    "rollback_command",
    "uninstall_command",
]

_FILE = click.Path(path_type=Path)


@click.command("pack")
@click.argument("bundle", type=_FILE)
@click.option("-o", "--out", type=_FILE, required=True, help="Folder; may hold other bundles.")
@click.option(
    "--key", type=_FILE, metavar="NAME", help="Private key of `kiln keygen` to sign with."
)
@click.option("--name", help="Name in OUT [default: the bundle's folder's]")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["oci", "folder"]),
    default="oci",
    show_default=True,
    help="An OCI image layout, which registry tools push, or the bundle's plain folder.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
def pack_command(
    bundle: Path,
    out: Path,
    key: Path | None,
    name: str | None,
    kind: str,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Pack BUNDLE for other machines; files that OUT has already are not written again."""
    from profiles.errors import SpecError
    from runners.packing import pack_folder, pack_layout

    console = Console(json_output=as_json)
    if kind == "folder" and name is not None:
        raise SpecError("--name is for `--format oci`: a folder is called as -o says.")
    if kind == "folder":
        packed = pack_folder(bundle, out, console, key=key)
    else:
        packed = pack_layout(bundle, out, console, key=key, name=name)
    if not packed.signed:
        console.info("It isn't signed, so nobody can install it: pack it with --key NAME.")
    document = {"out": str(out), "signed": packed.signed, "name": packed.name}
    numbers = {"digest": packed.digest, "bytes": packed.bytes, "written": packed.written}
    console.result(str(out), {**document, **numbers})


@click.command("install")
@click.argument("source", metavar="SRC")
@click.option(
    "--trust", type=_FILE, metavar="FILE", help="NAME.pub or a trust file [default: yours]"
)
@click.option("--only", metavar="TARGET", help="Of several: a name, a card, sm89 or cpu.")
@click.option("--to", type=_FILE, help="Folder for bundles [default: $KILN_BUNDLES or your data's]")
@click.option("--name", help="Install under this name [default: the packed one]")
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
def install_command(
    source: str,
    trust: Path | None,
    only: str | None,
    to: Path | None,
    name: str | None,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Install a bundle from SRC: a folder of `kiln pack`, a bundle, or http(s)://server/path.

    Prints the installed path. Only what a trusted key has signed is installed; what an installed
    version has already isn't fetched again.
    """
    from runners.installed import bundles_root
    from runners.installing import Request, install
    from runners.trust import load_trust

    console = Console(json_output=as_json)
    request = Request(source=source, root=bundles_root(to), only=only, name=name)
    result = install(request, load_trust(trust), console)
    if result.pointer is not None and result.pointer.waiting == result.version:
        console.info(
            f"{result.name} runs {result.pointer.current} until this version has passed "
            f"`kiln selftest {result.path}`."
        )
    console.result(str(result.path), _document(result))


def _document(result: Result) -> dict[str, Any]:
    assert result.pointer is not None
    return {
        "path": str(result.path),
        "name": result.name,
        "version": result.version,
        "current": result.pointer.current == result.version,
        "key_id": result.key_id,
        "bytes": result.bytes,
        "fetched": result.fetched,
        "kept": result.kept,
        "shared": result.shared,
    }


@click.command("bundles")
@click.option("--in", "root", type=_FILE, help="Folder that `kiln install --to` was given.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
def bundles_command(root: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """List the installed bundles: versions, sizes, who signed them, and which one runs."""
    from runners.installed import bundles_root, names

    root = bundles_root(root)
    rows = [row for name in names(root) for row in _rows(root, name)]
    lines = [f"{'name':<24}{'version':<23}{'state':<9}{'MB':>9}  key"]
    lines += [
        f"{row['name']:<24}{row['version']:<23}{row['state']:<9}{row['bytes'] / 1e6:>9.1f}  "
        f"{row['key_id'][:16]}"
        for row in rows
    ]
    text = "\n".join(lines) if rows else f"No bundle is installed in {root}."
    Console(json_output=as_json).result(text, {"root": str(root), "bundles": rows})


def _rows(root: Path, name: str) -> list[dict[str, Any]]:
    from runners.installed import read_pointer, selftest_passed, versions

    pointer = read_pointer(root, name)
    rows = []
    for version in versions(root, name):
        state = {pointer.current: "current", pointer.waiting: "waiting"}.get(version, "")
        if selftest_passed(root / name / version) is False:
            state = "failed"
        rows.append(
            {
                "name": name,
                "version": version,
                "state": state,
                "current": version == pointer.current,
                "path": str(root / name / version),
                **pointer.installed[version].model_dump(),
            }
        )
    return rows


@click.command("rollback")
@click.argument("name")
@click.option("--in", "root", type=_FILE, help="Folder that `kiln install --to` was given.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
def rollback_command(name: str, root: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """Run the version of NAME that ran before the current one; prints its path."""
    from runners.installed import bundles_root, require_name, roll_back

    root = bundles_root(root)
    pointer = roll_back(root, require_name(name))
    path = root / name / pointer.current
    Console(json_output=as_json).result(
        str(path), {"name": name, "current": pointer.current, "path": str(path)}
    )


@click.command("uninstall")
@click.argument("name")
@click.option("--version", help="Only this version.")
@click.option("--old", is_flag=True, help="Only versions that neither run nor wait.")
@click.option("--in", "root", type=_FILE, help="Folder that `kiln install --to` was given.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
def uninstall_command(
    name: str,
    version: str | None,
    old: bool,  # noqa: FBT001
    root: Path | None,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Remove NAME, or some of its versions; files that other versions have stay theirs."""
    from profiles.errors import SpecError
    from runners.installed import bundles_root, require_name
    from runners.uninstalling import uninstall

    if version is not None and old:
        raise SpecError("--version and --old exclude each other: give one of them.")
    root = bundles_root(root)
    gone = uninstall(root, require_name(name), version=version, old=old)
    text = (
        f"Removed from {root / name}: {', '.join(gone)}" if gone else f"{name} has no old version."
    )
    Console(json_output=as_json).result(text, {"name": name, "removed": gone})
