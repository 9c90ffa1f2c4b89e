"""The bytes of a signature: an in-toto statement in a DSSE envelope in a Sigstore bundle v0.3.

The statement is OpenSSF model-signing's (predicate https://model_signing/signature/v1.0, read off
model-signing 1.1.1): name and sha256 of every file, and a root digest over those digests in the
order of the paths' parts. Nothing here knows which keys are trusted.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from profiles.errors import BundleError
from runners.strict_json import strict_json

__all__ = ["SIGNATURE_LIMIT", "Envelope", "decode", "encode", "pae", "resources_of", "statement"]

SIGNATURE_LIMIT = 4 << 20
"""Bytes of a signature's file: about 20,000 files."""

_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)
_Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
T = TypeVar("T", bound=BaseModel)


class _PublicKey(BaseModel):
    model_config = _STRICT
    hint: _Hex


class _Material(BaseModel):
    model_config = _STRICT
    public_key: _PublicKey = Field(alias="publicKey")
    log: Annotated[list[None], Field(alias="tlogEntries", max_length=0)] = []


class _Signature(BaseModel):
    model_config = _STRICT
    sig: str
    keyid: Literal[""] = ""


class _Envelope(BaseModel):
    model_config = _STRICT
    payload: str
    payload_type: Literal["application/vnd.in-toto+json"] = Field(alias="payloadType")
    signatures: Annotated[list[_Signature], Field(min_length=1, max_length=1)]


class _SigstoreBundle(BaseModel):
    model_config = _STRICT
    media_type: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"] = Field(alias="mediaType")
    material: _Material = Field(alias="verificationMaterial")
    envelope: _Envelope = Field(alias="dsseEnvelope")


class _Sha256(BaseModel):
    model_config = _STRICT
    sha256: _Hex


class _Subject(BaseModel):
    model_config = _STRICT
    name: str
    digest: _Sha256


class _Serialization(BaseModel):
    model_config = _STRICT
    method: Literal["files"]
    hash_type: Literal["sha256"]
    allow_symlinks: bool
    ignore_paths: list[str] = []


class _Resource(BaseModel):
    model_config = _STRICT
    name: str
    algorithm: Literal["sha256"]
    digest: _Hex


class _Predicate(BaseModel):
    model_config = _STRICT
    serialization: _Serialization
    resources: list[_Resource]


class _Statement(BaseModel):
    model_config = _STRICT
    type_: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: Annotated[list[_Subject], Field(min_length=1, max_length=1)]
    predicate_type: Literal["https://model_signing/signature/v1.0"] = Field(alias="predicateType")
    predicate: _Predicate


@dataclass(frozen=True)
class Envelope:
    """A parsed signature; nothing of it has been verified."""

    payload: bytes
    """The statement, as it was signed."""
    signature: bytes
    """ECDSA over `pae(payload)` with SHA-256, in DER."""
    hint: str
    """Which key it claims: see runners.keys."""


def statement(digests: Mapping[str, str], *, name: str, ignored: Iterable[str]) -> bytes:
    """The in-toto statement over `digests` (path -> sha256 in hex); `name` is informative only."""
    names = sorted(digests, key=lambda path: path.split("/"))  # as model-signing sorts
    document = {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": _root(digests[path] for path in names)}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "ignore_paths": sorted(ignored),
                "hash_type": "sha256",
                "allow_symlinks": False,
            },
            "resources": [
                {"name": path, "algorithm": "sha256", "digest": digests[path]} for path in names
            ],
        },
    }
    return json.dumps(document, indent=2).encode()


def pae(payload: bytes) -> bytes:
    """What DSSE signs: the payload with its type and both lengths before it."""
    return b"DSSEv1 %d %s %d %s" % (
        len(_PAYLOAD_TYPE),
        _PAYLOAD_TYPE.encode(),
        len(payload),
        payload,
    )


def encode(envelope: Envelope) -> bytes:
    """The signature's file."""
    document = {
        "mediaType": _MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": envelope.hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(envelope.payload).decode(),
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(envelope.signature).decode(), "keyid": ""}],
        },
    }
    return json.dumps(document, separators=(",", ":")).encode()


def decode(raw: bytes) -> Envelope:
    """Parse a signature's file; BundleError where neither kiln nor model-signing wrote it so."""
    if len(raw) > SIGNATURE_LIMIT:
        raise BundleError(
            f"The signature has {len(raw)} bytes and may have {SIGNATURE_LIMIT}: refused; copy the "
            "bundle again."
        )
    found = _parsed(_SigstoreBundle, raw, "signature")
    return Envelope(
        payload=_base64(found.envelope.payload),
        signature=_base64(found.envelope.signatures[0].sig),
        hint=found.material.public_key.hint,
    )


def resources_of(payload: bytes) -> dict[str, str]:
    """Path -> sha256 of a verified statement; BundleError where it contradicts itself."""
    found = _parsed(_Statement, payload, "signed statement")
    resources = found.predicate.resources
    digests = {resource.name: resource.digest for resource in resources}
    if len(digests) != len(resources):
        raise BundleError("The signed statement names a file twice: sign the bundle again.")
    if _root(resource.digest for resource in resources) != found.subject[0].digest.sha256:
        raise BundleError(
            "The signed statement's root digest isn't that of its files: sign the bundle again."
        )
    return digests


def _parsed(model: type[T], raw: bytes, what: str) -> T:
    try:
        return model.model_validate(strict_json(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            f"The {what} is wrong at {where or 'the top'}: {first['msg']}; copy or sign the bundle "
            "again."
        ) from error
    except ValueError as error:
        raise BundleError(
            f"The {what} isn't valid JSON ({error}): copy or sign the bundle again."
        ) from error


def _base64(text: str) -> bytes:
    """Strictly: one text for each value, so that no unused bit can be changed."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not raw or base64.b64encode(raw).decode() != text:
        raise BundleError("The signature isn't in base64: copy or sign the bundle again.")
    return raw


def _root(digests: Iterable[str]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()
