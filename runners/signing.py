"""Signatures over a bundle's files, in OpenSSF model-signing's format, with `cryptography` alone.

A bundle's signature is `signature.json` in its own folder: it moves with the files that it covers,
and model-signing's tool, which is given folder and signature separately, leaves it out because the
signature itself lists it among the ignored paths. So these two say the same of a bundle:

    kiln verify DIR --trust NAME.pub
    python -m model_signing verify key DIR --signature DIR/signature.json --public_key NAME.pub

It covers manifest.json, manifest.sha256 and every file that the manifest lists; runners.dsse has
the bytes, runners.trust says whose signatures count. P-256 with SHA-256 only.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from profiles.errors import BundleError, UntrustedError
from runners import dsse
from runners.files import check_file, read_optional
from runners.keys import hint_of, load_private_key, parse_public_key
from runners.manifest_file import (
    BESIDE,
    SIGNATURE_NAME,
    bundle_digests,
    parse_manifest,
    read_raw,
)
from runners.trust import Trust, TrustedKey, load_trust

__all__ = [
    "Signed",
    "check_signature",
    "load_private_key",
    "load_trust",
    "read_signature",
    "require_digests",
    "sign_bundle",
    "sign_files",
    "verify_signature",
]

_ALGORITHM = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True)
class Signed:
    """What a trusted key has signed."""

    key: TrustedKey
    digests: Mapping[str, str]
    """Path -> sha256, in hex."""


def sign_bundle(folder: str | Path, key_path: str | Path) -> None:
    """Sign the bundle at `folder`, all its files verified first, into its signature.json."""
    key = load_private_key(key_path)
    found = read_raw(folder)
    manifest = parse_manifest(found.raw, folder)
    digests = bundle_digests(found, manifest)
    for name, entry in manifest.files.items():
        check_file(found.folder, name, entry)
    fresh = found.folder / f".{SIGNATURE_NAME}.{secrets.token_hex(8)}"
    try:
        fresh.write_bytes(sign_files(digests, key, name=manifest.model.name))
        fresh.replace(found.folder / SIGNATURE_NAME)
    finally:
        fresh.unlink(missing_ok=True)


def sign_files(
    digests: Mapping[str, str], key: ec.EllipticCurvePrivateKey, *, name: str = "bundle"
) -> bytes:
    """The signature of `key` over files: path -> sha256 in hex. `name` is informative only."""
    payload = dsse.statement(digests, name=name, ignored=BESIDE)
    same = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)  # RFC 6979: equal packed bytes
    signature = key.sign(dsse.pae(payload), same)
    return dsse.encode(dsse.Envelope(payload, signature, hint_of(key.public_key())))


def verify_signature(raw: bytes, digests: Mapping[str, str], trust: Trust, *, name: str) -> str:
    """The id of the trusted key that signed exactly `digests` for a bundle called `name`.

    `digests` are path -> sha256 (hex) of all files but the signature; `name` is the manifest's
    `model.name`, for the patterns that a key is limited to. Raises UntrustedError for a key that is
    unknown, revoked, outside of its days or limited to other names, and BundleError where the
    signature can't be parsed, isn't that key's, or is of other files.
    """
    signed = check_signature(raw, trust)
    require_digests(signed, digests)
    signed.key.require_name(name)
    return signed.key.id


def check_signature(raw: bytes, trust: Trust) -> Signed:
    """What was signed, and by whom, before any file is compared; raises as `verify_signature`."""
    envelope = dsse.decode(raw)
    key = trust.key_of(envelope.hint)
    public = parse_public_key(key.public_key.encode(), key.comment)
    try:
        public.verify(envelope.signature, dsse.pae(envelope.payload), _ALGORITHM)
    except InvalidSignature as error:
        raise BundleError(
            f"The signature isn't the one that the key {key.id} made: the bundle is damaged or "
            "was changed; copy it again."
        ) from error
    trust.require_accepted(key)
    return Signed(key, dsse.resources_of(envelope.payload))


def require_digests(signed: Signed, digests: Mapping[str, str]) -> None:
    """Raise BundleError naming the first file that isn't what was signed."""
    for name in sorted({*signed.digests, *digests}):
        wanted, got = signed.digests.get(name), digests.get(name)
        if wanted == got:
            continue
        what = "isn't signed" if wanted is None else "is missing" if got is None else "differs"
        raise BundleError(
            f"{name!r} {what}, by the signature of the key {signed.key.id}: the bundle is damaged "
            "or was changed; copy it again."
        )


def read_signature(folder: Path) -> bytes:
    """The bytes of a bundle's signature; UntrustedError where it has none."""
    raw = read_optional(folder, SIGNATURE_NAME, limit=dsse.SIGNATURE_LIMIT)
    if raw is None:
        raise UntrustedError(
            f"{folder} isn't signed (it has no {SIGNATURE_NAME}): ask whoever made it for a signed "
            "one (`kiln pack BUNDLE -o OUT --key NAME`), or compile it on this machine."
        )
    return raw
