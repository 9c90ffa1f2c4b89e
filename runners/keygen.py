"""`kiln keygen`: a pair of keys to sign bundles with."""

from __future__ import annotations

from pathlib import Path

import click

from runners.console import Console

__all__ = ["keygen_command"]


@click.command("keygen")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="NAME of the private key."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
def keygen_command(
    out: Path,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Make a key: NAME is private and signs, NAME.pub is for those who install.

    NAME is for its owner alone (mode 0600) and has no passphrase. Neither file is ever overwritten.
    """
    from runners.keys import make_keys

    identity = make_keys(out)
    Console(json_output=as_json).result(
        f"{out} signs and stays with you; give {out}.pub to those who install.\nkey id     "
        f"{identity}",
        {"private": str(out), "public": f"{out}.pub", "id": identity},
    )
