"""manifest.json and manifest.sha256: read without following links, checked, strictly parsed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from profiles.errors import BundleError, SpecError, UnsupportedError
from runners.files import read_optional
from runners.manifest import SCHEMA, Manifest
from runners.strict_json import strict_json

__all__ = [
    "BESIDE",
    "DIGEST_NAME",
    "MANIFEST_NAME",
    "MARK_NAME",
    "SIGNATURE_NAME",
    "RawManifest",
    "bundle_digests",
    "digest_line",
    "parse_manifest",
    "read_manifest",
    "read_raw",
]

MANIFEST_NAME = "manifest.json"
DIGEST_NAME = "manifest.sha256"
SIGNATURE_NAME = "signature.json"
MARK_NAME = "local.mark"

BESIDE = (".git", ".gitattributes", ".github", ".gitignore", MARK_NAME, SIGNATURE_NAME)
"""What may lie in a bundle's folder and is no part of it: model-signing ignores the first four, and
each signature tells it to ignore the rest. None of them is ever given to a loader."""

_LIMIT = 64 << 20


@dataclass(frozen=True)
class RawManifest:
    """A manifest's bytes, which are what manifest.sha256 says, not yet parsed."""

    folder: Path
    raw: bytes

    @property
    def sha256(self) -> str:
        """Of manifest.json, in hex."""
        return hashlib.sha256(self.raw).hexdigest()

    @property
    def digests(self) -> dict[str, str]:
        """Of manifest.json and manifest.sha256."""
        line = hashlib.sha256(digest_line(self.raw)).hexdigest()
        return {MANIFEST_NAME: self.sha256, DIGEST_NAME: line}


def read_raw(path: str | Path) -> RawManifest:
    """The manifest's bytes at `path`, compared with manifest.sha256.

    Raises SpecError where there is no bundle, BundleError where the two differ.
    """
    folder = Path(path)
    raw = read_optional(folder, MANIFEST_NAME, limit=_LIMIT) if folder.is_dir() else None
    if raw is None:
        raise SpecError(
            f"{path} is not a bundle (it has no {MANIFEST_NAME}): make one with "
            f"`kiln compile MODEL -o {path}`."
        )
    if read_optional(folder, DIGEST_NAME, limit=1 << 10) != digest_line(raw):
        raise BundleError(
            f"{MANIFEST_NAME} of {path} doesn't match {DIGEST_NAME}: the bundle is damaged; "
            "copy or compile it again."
        )
    return RawManifest(folder, raw)


def read_manifest(path: str | Path) -> Manifest:
    """The manifest at `path`, verified against manifest.sha256; no other file is read.

    It says what somebody wrote: only `open_bundle` asks who that was.
    """
    found = read_raw(path)
    return parse_manifest(found.raw, found.folder)


def digest_line(raw: bytes) -> bytes:
    """What manifest.sha256 holds, as `sha256sum` writes it."""
    return f"{hashlib.sha256(raw).hexdigest()}  {MANIFEST_NAME}\n".encode()


def bundle_digests(found: RawManifest, manifest: Manifest) -> dict[str, str]:
    """Path -> sha256 (hex) of every file of a bundle, as its manifest says: what is signed."""
    digests = {name: entry.sha256 for name, entry in manifest.files.items()}
    for name in digests:
        if name.split("/")[0] in (*BESIDE, MANIFEST_NAME, DIGEST_NAME):
            raise BundleError(
                f"{MANIFEST_NAME} of {found.folder} lists {name}, which can't be a bundle's file: "
                "compile the bundle again."
            )
    return {**digests, **found.digests}


def parse_manifest(raw: bytes, folder: str | Path) -> Manifest:
    """The manifest in `raw`; `folder` is what errors call it.

    Raises BundleError for a duplicate or unknown key, or a wrong value, UnsupportedError for a
    newer schema.
    """
    try:
        document = strict_json(raw)
    except ValueError as error:
        raise BundleError(
            f"{MANIFEST_NAME} of {folder} isn't valid JSON: {error}; compile the bundle again."
        ) from error
    schema = document.get("schema_version") if isinstance(document, Mapping) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise UnsupportedError(
            f"{folder} was written in schema {schema} and this kiln reads up to {SCHEMA}: "
            "upgrade with `pip install -U kiln-diffusion`."
        )
    try:
        return Manifest.model_validate_json(raw, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            f"{MANIFEST_NAME} of {folder} is wrong at {where or 'the top'}: {first['msg']}; "
            "compile the bundle again."
        ) from error
