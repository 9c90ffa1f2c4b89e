"""`kiln pull`: what kiln uses of a hub model, fetched before it is needed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from profiles.errors import SpecError
from runners.console import Console, quiet_libraries

__all__ = ["pull_command"]


@click.command("pull")
@click.argument("model")
@click.option("--revision", help="Commit, tag or branch of the model.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
def pull_command(
    model: str,
    revision: str | None,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Download what kiln uses of MODEL, a hub model, autoencoder or ControlNet; cut off, it goes on
    where it stopped.
    """
    quiet_libraries()
    from optimizer.hub import fetch
    from optimizer.layout import AUTOENCODER, PIPELINE

    if Path(model).expanduser().exists():
        raise SpecError(
            f"{model} is on disk already: give it to `kiln compile`, or the id of a hub model "
            "such as owner/name"
        )
    console, start = Console(json_output=as_json), time.monotonic()
    accepted = (PIPELINE, AUTOENCODER)
    found = fetch(model, revision=revision, accepted=accepted, console=console)
    document = {
        "model": model,
        "revision": found.revision,
        **_described(model, found.folder),
        "folder": str(found.folder),
        "licence": found.licence,
        "downloaded_bytes": found.downloaded_bytes,
        "seconds": round(time.monotonic() - start, 3),
    }
    console.result(_text(document), document)


def _described(model: str, folder: Path) -> dict[str, Any]:
    """The family of a folder, None of an autoencoder's, and its used files, seen to be whole."""
    from optimizer.autoencoder import inspect_autoencoder
    from optimizer.layout import PIPELINE
    from optimizer.source import inspect_folder

    family = None
    if (folder / PIPELINE).is_file():
        family, class_name, used = inspect_folder(folder, name=model)
    else:
        used, class_name = inspect_autoencoder(folder, name=model)
    return {
        "family": family,
        "pipeline_class": class_name,
        "files": len(used),
        "bytes": sum((folder / name).stat().st_size for name in used),
    }


def _text(found: dict[str, Any]) -> str:
    from optimizer.families import family
    from optimizer.hub_files import byte_text

    what = family(found["family"]).title if found["family"] else found["pipeline_class"]
    licence = f"licence {found['licence']}" if found["licence"] else "its card names no licence"
    return (
        f"{found['model']} at {found['revision'][:12]} ({what}), "
        f"{licence}\n{found['files']} files, {byte_text(found['bytes'])} in {found['folder']}"
    )
