"""P-256 keys: made, read, and named.

A key's id is the sha256 of its SubjectPublicKeyInfo (DER). Signatures name a key by another digest,
the `hint`: model-signing takes the sha256 of the PEM text, as `sha256sum NAME.pub` prints it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from profiles.errors import SpecError
from runners.config import write_private
from runners.outputs import require_writable

__all__ = [
    "hint_of",
    "key_id",
    "load_private_key",
    "make_keys",
    "parse_public_key",
    "pem_of",
    "read_key_file",
]

_LIMIT = 1 << 20
"""Bytes of a key's file (a P-256 key has about 240) or of a trust file (about 500 a key)."""


def make_keys(out: Path) -> str:
    """Write a new private key to `out` (mode 0600) and its public half to `out`.pub; its id.

    Raises SpecError where one of them exists: a key is never overwritten.
    """
    public = out.with_name(f"{out.name}.pub")
    for path in (out, public):
        if path.exists() or path.is_symlink():
            raise SpecError(f"{path} exists and is kept: give another name with -o.")
    require_writable(out)
    key = ec.generate_private_key(ec.SECP256R1())
    raw = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    if not write_private(out, raw, replace=False):
        raise SpecError(f"{out} exists and is kept: give another name with -o.")
    public.write_bytes(pem_of(key.public_key()))
    return key_id(key.public_key())


def load_private_key(path: str | Path) -> ec.EllipticCurvePrivateKey:
    """The P-256 private key in a PEM file; SpecError where there is none that can be used."""
    raw = read_key_file(Path(path))
    try:
        key = serialization.load_pem_private_key(raw, None)
    except TypeError as error:
        raise SpecError(
            f"{path} is encrypted: give a key without passphrase, such as `kiln keygen` makes."
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SpecError(
            f"{path} is no private key in PEM: make one with `kiln keygen -o NAME`."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not _is_p256(key.public_key()):
        raise SpecError(f"{path} is no P-256 key: make one with `kiln keygen -o NAME`.")
    return key


def parse_public_key(raw: bytes, name: str) -> ec.EllipticCurvePublicKey:
    """The P-256 public key in `raw` (PEM), called `name` in the SpecError where it isn't one."""
    try:
        key = serialization.load_pem_public_key(raw)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SpecError(
            f"{name} is no public key in PEM: give the NAME.pub that `kiln keygen` wrote."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not _is_p256(key):
        raise SpecError(f"{name} is no P-256 key, the only kind that kiln verifies with.")
    return key


def read_key_file(path: Path) -> bytes:
    """The bytes of a key's or trust file; SpecError where it can't be read or is far too large."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(_LIMIT + 1)
    except OSError as error:
        raise SpecError(
            f"{path} can't be read ({error.strerror}): give an existing file."
        ) from error
    if len(raw) > _LIMIT:
        raise SpecError(f"{path} has over {_LIMIT} bytes, more than any key: give a key's file.")
    return raw


def pem_of(key: ec.EllipticCurvePublicKey) -> bytes:
    """The text of NAME.pub."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    """sha256 (hex) of the SubjectPublicKeyInfo in DER."""
    raw = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(raw).hexdigest()


def hint_of(key: ec.EllipticCurvePublicKey) -> str:
    """sha256 (hex) of the PEM text, by which model-signing's signatures name a key."""
    return hashlib.sha256(pem_of(key)).hexdigest()


def _is_p256(key: ec.EllipticCurvePublicKey) -> bool:
    return isinstance(key.curve, ec.SECP256R1)
