"""`kiln check`: whether a bundle runs on this machine, or on one whose facts are in a file."""

from __future__ import annotations

from pathlib import Path

import click

from runners.console import Console

__all__ = ["check_command"]


@click.command("check")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", type=click.Path(path_type=Path), help="A file of `kiln doctor --json`.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
def check_command(
    bundle: Path,
    host: Path | None,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Say whether BUNDLE runs here: run, run-slower, rebuild or refuse; nothing of it is opened."""
    from profiles.errors import UnsupportedError
    from profiles.facts import load_facts, read_facts
    from runners.bundle import read_manifest
    from runners.compatibility import compatibility

    manifest = read_manifest(bundle)
    facts = read_facts() if host is None else load_facts(host)
    verdict = compatibility(manifest, facts, bundle=str(bundle))
    text = f"{verdict.outcome} ({verdict.reason})"
    if verdict.outcome.runs:
        text = f"{text}: {verdict.sentence}"
    Console(json_output=as_json).result(text, verdict.document())
    if not verdict.outcome.runs:
        raise UnsupportedError(verdict.sentence)
