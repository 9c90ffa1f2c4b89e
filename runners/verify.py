"""`kiln verify`: whether a bundle is exactly what a trusted key has signed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import click

from profiles.errors import BundleError
from runners.bundle import signed_manifest
from runners.console import Console
from runners.files import check_file
from runners.manifest import Manifest
from runners.manifest_file import BESIDE, DIGEST_NAME, MANIFEST_NAME
from runners.trust import Trust, load_trust

__all__ = ["Verified", "verify_command", "verify_folder"]


class Verified(NamedTuple):
    """What was found right."""

    key: str
    """Id of the key that signed it."""
    name: str
    files: int
    size: int
    """Bytes of all files of the manifest."""


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--trust",
    type=click.Path(path_type=Path),
    help="NAME.pub or trust file [default: what `kiln trust ls` shows]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
def verify_command(
    bundle: Path,
    trust: Path | None,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Hash BUNDLE's files and check them against its signature; no engine is opened.

    Exit codes: 11 where it isn't signed or its key isn't trusted, 12 where signature or digests
    don't match the bytes. A bundle that was compiled here and never signed is 11. Of a folder that
    `kiln pack` wrote, every bundle is verified.
    """
    from runners.offers import is_layout

    if is_layout(bundle):
        _verify_packed(bundle, load_trust(trust), Console(json_output=as_json))
        return
    found = verify_folder(bundle, load_trust(trust))
    Console(json_output=as_json).result(
        f"{bundle} is {found.name}, {found.files} files and {found.size} bytes as signed by the "
        f"key {found.key}.",
        found._asdict(),
    )


def _verify_packed(folder: Path, trust: Trust, console: Console) -> None:
    from runners.offers import verified_layout

    rows = [
        {
            "key": one.key_id,
            "name": one.offer.name,
            "files": len(one.offer.files),
            "size": sum(entry.size for entry in one.offer.files.values()),
        }
        for one in verified_layout(folder, trust)
    ]
    lines = [
        f"{row['name']} in {folder}: {row['files']} files and {row['size']} bytes as signed by the "
        f"key {row['key']}."
        for row in rows
    ]
    console.result("\n".join(lines), {"bundles": rows})


def verify_folder(folder: Path, trust: Trust) -> Verified:
    """Verify an unpacked bundle: all of it is signed, and nothing else lies there.

    Raises SpecError where there is no bundle, UntrustedError and BundleError as `open_bundle`.
    """
    key, manifest = signed_manifest(folder, trust)
    _require_no_others(folder, manifest)
    for name, entry in manifest.files.items():
        check_file(folder, name, entry)
    size = sum(entry.size for entry in manifest.files.values())
    return Verified(key, manifest.model.name, len(manifest.files), size)


def _require_no_others(folder: Path, manifest: Manifest) -> None:
    """Raise BundleError for a file that nobody signed, which model-signing refuses as well."""
    known = {MANIFEST_NAME, DIGEST_NAME, *manifest.files}
    for path, folders, files in os.walk(folder):
        below = Path(path).relative_to(folder)
        links = [name for name in folders if Path(path, name).is_symlink()]
        if below == Path():
            folders[:] = [name for name in folders if name not in BESIDE]
            files = [name for name in files if name not in BESIDE]
        for name in (*files, *links):
            if (below / name).as_posix() not in known:
                raise BundleError(
                    f"{below / name} in {folder} isn't signed: remove it, or copy the bundle again."
                )
