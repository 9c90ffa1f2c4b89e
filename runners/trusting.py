"""`kiln trust`: whose bundles run here."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path

import click

from profiles.errors import SpecError
from runners.console import Console
from runners.keys import read_key_file
from runners.trust import Trust, TrustedKey, default_trust_path, load_trust, save_trust, trusted_key

__all__ = ["trust_command"]

_DAY = click.DateTime(["%Y-%m-%d"])
_SHORTEST = 8
"""Characters of an id that may stand for all of it."""


@click.group("trust")
def trust_command() -> None:
    """Say whose signed bundles may run here; bundles compiled on this machine always do."""


@trust_command.command("add")
@click.argument("public", metavar="NAME.pub", type=click.Path(path_type=Path))
@click.option(
    "--name", "names", multiple=True, help="Pattern of the models' names, as acme/* [default: *]"
)
@click.option("--from", "start", type=_DAY, metavar="DATE", help="First day, in UTC.")
@click.option("--until", "end", type=_DAY, metavar="DATE", help="Last day, in UTC.")
def _add(
    public: Path, names: tuple[str, ...], start: datetime | None, end: datetime | None
) -> None:
    """Trust the key in NAME.pub; a key that is trusted already gets these names and days."""
    trust = load_trust(None)
    key = trusted_key(read_key_file(public), str(public))
    if key.id in trust.revoked:
        raise SpecError(
            f"The key {key.id} is revoked: get another one from its owner, or take the id out of "
            f'"revoked" in {default_trust_path()} if you are sure.'
        )
    first, last = start and start.date(), end and end.date()
    if first is not None and last is not None and first > last:
        raise SpecError(f"--from {first} is after --until {last}: give an earlier first day.")
    limits = {"names": names or key.names, "valid_from": first, "valid_until": last}
    others = [other for other in trust.keys if other.id != key.id]
    added = key.model_copy(update=limits)
    path = save_trust(trust.model_copy(update={"keys": (*others, added)}))
    Console().result(f"{_line(added, trust)}\nwritten to {path}", {})


@trust_command.command("ls")
@click.option("--json", "as_json", is_flag=True, help="One JSON line on stdout.")
def _ls(
    as_json: bool,  # noqa: FBT001
) -> None:
    """List the keys that are trusted, and those that are revoked."""
    trust = load_trust(None)
    lines = [_line(key, trust) for key in trust.keys]
    known = {key.id for key in trust.keys}
    lines += [f"{identity}  revoked" for identity in trust.revoked if identity not in known]
    text = "\n".join(lines) or "No key is trusted: add one with `kiln trust add NAME.pub`."
    Console(json_output=as_json).result(text, trust.model_dump(mode="json"))


@trust_command.command("revoke")
@click.argument("identity", metavar="KEYID")
def _revoke(identity: str) -> None:
    """Accept nothing from the key KEYID any more: its id, or the beginning of a trusted one."""
    trust = load_trust(None)
    found = _full(identity.lower(), trust)
    if found not in trust.revoked:
        save_trust(trust.model_copy(update={"revoked": (*trust.revoked, found)}))
    Console().result(f"{found}  revoked", {})


def _full(identity: str, trust: Trust) -> str:
    """The whole id; SpecError where it is none and not the beginning of exactly one."""
    if len(identity) == 64 and not set(identity) - set("0123456789abcdef"):
        return identity
    known = [key.id for key in trust.keys if key.id.startswith(identity)]
    if len(identity) < _SHORTEST or len(known) != 1:
        raise SpecError(
            f"{identity} is no key's id: give the 64 characters that `kiln trust ls` shows, or at "
            f"least the first {_SHORTEST} of one key."
        )
    return known[0]


def _line(key: TrustedKey, trust: Trust) -> str:
    days = _days(key.valid_from, key.valid_until)
    state = "revoked" if key.id in trust.revoked else f"{', '.join(key.names)}{days}"
    return f"{key.id}  {state}  ({key.comment})"


def _days(first: date | None, last: date | None) -> str:
    return f"{f' from {first}' if first else ''}{f' until {last}' if last else ''}"
