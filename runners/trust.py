"""Which keys may sign what: the trust file.

JSON, strictly parsed; `kiln trust` writes the user's own, `trust.json` in the config folder:

    {
      "schema_version": 1,
      "keys": [
        {
          "id": "sha256 of the key's SubjectPublicKeyInfo (DER), in hex",
          "public_key": "the text of NAME.pub",
          "names": ["acme/*"],
          "valid_from": "2026-01-01",
          "valid_until": "2026-12-31",
          "comment": "build server"
        }
      ],
      "revoked": ["ids of keys that nothing is accepted from any more"]
    }

`names` are patterns (*, ?, [abc]) of a bundle's name, which is its model's: `kiln inspect` prints
it first, and the signature covers it, so that renaming a folder gets around none. Days are in
UTC, both ends included, and compared with today: a signature holds no time that could be trusted.
What the user's own file revokes stays revoked with every `--trust`.
"""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from profiles.errors import SpecError, UnsupportedError, UntrustedError
from runners.config import config_folder, write_private
from runners.keys import hint_of, key_id, parse_public_key, pem_of, read_key_file
from runners.strict_json import strict_json

__all__ = [
    "TRUST_SCHEMA",
    "KeyId",
    "Trust",
    "TrustedKey",
    "default_trust_path",
    "load_trust",
    "save_trust",
    "trusted_key",
]

TRUST_SCHEMA = 1
"""Of the trust file; raised when a reader of the old one would misread the new one."""

_STRICT = ConfigDict(frozen=True, extra="forbid")
KeyId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TrustedKey(BaseModel):
    """One key, and what it is trusted with."""

    model_config = _STRICT

    id: KeyId
    public_key: str
    """PEM."""
    names: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    """Patterns of the bundles' names that it may sign."""
    valid_from: date | None = None
    """First day, in UTC."""
    valid_until: date | None = None
    """Last day, in UTC."""
    comment: str = ""

    @model_validator(mode="after")
    def _id_is_the_keys(self) -> Self:
        try:
            found = key_id(parse_public_key(self.public_key.encode(), "public_key"))
        except SpecError as error:
            raise ValueError(str(error)) from error
        if found != self.id:
            raise ValueError(f"the id of this public key is {found}")
        return self

    @property
    def hint(self) -> str:
        """By which signatures name it."""
        return hint_of(parse_public_key(self.public_key.encode(), "public_key"))

    def require_valid(self, today: date) -> None:
        """Raise UntrustedError outside of its days."""
        if self.valid_from is not None and today < self.valid_from:
            raise UntrustedError(
                f"The key {self.id} is trusted from {self.valid_from} and today is {today}: wait, "
                "or trust it earlier with `kiln trust add NAME.pub --from DATE`."
            )
        if self.valid_until is not None and today > self.valid_until:
            raise UntrustedError(
                f"The key {self.id} was trusted until {self.valid_until} and today is {today}: get "
                "a bundle that is signed with a newer key, or extend it with "
                "`kiln trust add NAME.pub --until DATE`."
            )

    def require_name(self, name: str) -> None:
        """Raise UntrustedError where none of its patterns is of the bundle called `name`."""
        if not any(fnmatchcase(name, pattern) for pattern in self.names):
            raise UntrustedError(
                f"The key {self.id} is trusted for {', '.join(self.names)} and this bundle is "
                f"{name!r}: trust it for more with `kiln trust add NAME.pub --name {name!r}`."
            )


class Trust(BaseModel):
    """The keys that signatures are accepted from."""

    model_config = _STRICT

    schema_version: int = TRUST_SCHEMA
    keys: tuple[TrustedKey, ...] = ()
    revoked: tuple[KeyId, ...] = ()

    @model_validator(mode="after")
    def _ids_differ(self) -> Self:
        ids = [key.id for key in self.keys]
        if len(set(ids)) != len(ids):
            raise ValueError("a key stands twice")
        return self

    def key_of(self, hint: str) -> TrustedKey:
        """The key that a signature names; UntrustedError where it isn't among them."""
        for key in self.keys:
            if key.hint == hint:
                return key
        raise UntrustedError(
            "The bundle is signed with a key that isn't trusted here (its NAME.pub has the sha256 "
            f"{hint}): if you know whose it is, run `kiln trust add NAME.pub`, or give "
            "--trust NAME.pub."
        )

    def require_accepted(self, key: TrustedKey, *, today: date | None = None) -> None:
        """Raise UntrustedError where `key` is revoked or outside of its days."""
        if key.id in self.revoked:
            raise UntrustedError(
                f"The key {key.id} is revoked: get a bundle that is signed with another one."
            )
        key.require_valid(today or datetime.now(UTC).date())


def default_trust_path() -> Path:
    """The user's own trust file; it needn't exist."""
    return config_folder() / "trust.json"


def load_trust(path: str | Path | None) -> Trust:
    """The trust in a public key's file or a trust file; None is the user's own.

    Raises SpecError where it is neither, UnsupportedError for a newer schema.
    """
    own = default_trust_path()
    mine = _parsed(read_key_file(own), own) if own.is_file() else Trust()
    if path is None:
        return mine
    raw = read_key_file(Path(path))
    if raw.lstrip().startswith(b"-----BEGIN"):
        given = Trust(keys=(trusted_key(raw, str(path)),))
    else:
        given = _parsed(raw, Path(path))
    revoked = dict.fromkeys((*given.revoked, *mine.revoked))
    return given.model_copy(update={"revoked": tuple(revoked)})


def save_trust(trust: Trust) -> Path:
    """Write the user's own trust file; its path."""
    path = default_trust_path()
    document = trust.model_dump(mode="json")
    write_private(path, json.dumps(document, indent=2).encode() + b"\n", replace=True)
    return path


def trusted_key(raw: bytes, name: str) -> TrustedKey:
    """The public key in `raw` (PEM), trusted with everything; `name` is its comment."""
    key = parse_public_key(raw, name)
    return TrustedKey(id=key_id(key), public_key=pem_of(key).decode(), comment=Path(name).name)


def _parsed(raw: bytes, path: Path) -> Trust:
    try:
        document = strict_json(raw)
        schema = document.get("schema_version") if isinstance(document, dict) else None
        if type(schema) is not int:
            raise ValueError('it should be an object with "schema_version"')
        if schema > TRUST_SCHEMA:
            raise UnsupportedError(
                f"{path} was written in schema {schema} and this kiln reads up to {TRUST_SCHEMA}: "
                "upgrade with `pip install -U kiln-diffusion`."
            )
        return Trust.model_validate_json(raw, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SpecError(
            f"The trust file {path} is wrong at {where or 'the top'}: {first['msg']}; correct it, "
            "or write another with `kiln trust add NAME.pub`."
        ) from error
    except ValueError as error:
        raise SpecError(
            f"{path} is neither a public key nor a trust file ({error}): give the NAME.pub that "
            "`kiln keygen` wrote, or a JSON trust file."
        ) from error
