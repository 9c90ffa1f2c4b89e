"""A bundle on disk: opened only after every byte that its manifest names has been verified."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from profiles.errors import BundleError, SpecError, UnsupportedError
from runners.engines.base import Buffer
from runners.manifest import SCHEMA, FileEntry, Manifest

__all__ = ["DIGEST_NAME", "MANIFEST_NAME", "Bundle", "digest_line", "open_bundle", "read_manifest"]

MANIFEST_NAME = "manifest.json"
DIGEST_NAME = "manifest.sha256"

_MANIFEST_LIMIT = 64 << 20
_CHUNK = 1 << 24


class Bundle:
    """A verified bundle: `file(rel)` gives the very bytes that were hashed."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Use `open_bundle` instead, which verifies."""
        self.path, self.manifest = path, manifest
        self._buffers: dict[str, Buffer] = {}

    def verify(self) -> None:
        """Hash every file; BundleError names the first that isn't what the manifest says."""
        for name in self.manifest.files:
            self.file(name)

    def file(self, name: str) -> Buffer:
        """The bytes of one file: mapped, hashed, and the same mapping given out every time."""
        if name not in self._buffers:
            self._buffers[name] = _verified(self.path, name, self.manifest.files[name])
        return self._buffers[name]

    def release(self) -> None:
        """Drop the mappings; the engines that use one keep theirs."""
        self._buffers.clear()

    @contextmanager
    def folder(self, prefix: str) -> Iterator[Path]:
        """A private folder with the verified files below `prefix`, for libraries that need paths.

        Removed when the context closes.
        """
        with TemporaryDirectory(prefix="kiln-") as private:
            for name in self.manifest.files:
                if name.startswith(f"{prefix}/"):
                    target = Path(private) / name.removeprefix(f"{prefix}/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(bytes(self.file(name)))
            yield Path(private)

    def json(self, name: str) -> dict[str, object]:
        """A verified JSON file as a dict."""
        document = json.loads(bytes(self.file(name)))
        if not isinstance(document, dict):
            raise BundleError(f"{name} in {self.path} should hold a JSON object.")
        return document


def open_bundle(path: str | Path) -> Bundle:
    """The bundle at `path`, all its files verified.

    Raises SpecError where there is no bundle, BundleError for wrong bytes, UnsupportedError for a
    newer schema.
    """
    bundle = Bundle(Path(path), read_manifest(path))
    bundle.verify()
    return bundle


def read_manifest(path: str | Path) -> Manifest:
    """The manifest at `path`, verified against manifest.sha256; no other file is read."""
    folder = Path(path)
    if not folder.is_dir() or not (folder / MANIFEST_NAME).is_file():
        raise SpecError(
            f"{path} is not a bundle (it has no {MANIFEST_NAME}): make one with "
            f"`kiln compile MODEL -o {path}`."
        )
    if (folder / MANIFEST_NAME).stat().st_size > _MANIFEST_LIMIT:
        raise BundleError(f"{MANIFEST_NAME} of {path} is larger than any manifest: refused.")
    raw = (folder / MANIFEST_NAME).read_bytes()
    recorded = b""
    with contextlib.suppress(OSError):
        recorded = (folder / DIGEST_NAME).read_bytes()
    if recorded != digest_line(raw):
        raise BundleError(
            f"{MANIFEST_NAME} of {path} doesn't match {DIGEST_NAME}: the bundle is damaged; "
            "copy or compile it again."
        )
    return _parsed(raw, folder)


def digest_line(raw: bytes) -> bytes:
    """What manifest.sha256 holds, as `sha256sum` writes it."""
    return f"{hashlib.sha256(raw).hexdigest()}  {MANIFEST_NAME}\n".encode()


def _parsed(raw: bytes, folder: Path) -> Manifest:
    try:
        document = json.loads(raw, object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise BundleError(f"{MANIFEST_NAME} of {folder} isn't valid JSON: {error}.") from error
    schema = document.get("schema_version") if isinstance(document, Mapping) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise UnsupportedError(
            f"{folder} was written in schema {schema} and this kiln reads up to {SCHEMA}: "
            "upgrade with `pip install -U kiln-diffusion`."
        )
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            f"{MANIFEST_NAME} of {folder} is wrong at {where or 'the top'}: {first['msg']}; "
            "compile the bundle again."
        ) from error


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _verified(folder: Path, name: str, entry: FileEntry) -> Buffer:
    """The bytes of `name` below `folder`; BundleError unless they are the manifest's."""
    path = folder
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise BundleError(f"{name} in {folder} is a link: a bundle holds plain files only.")
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            buffer: Buffer = (
                mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) if size else b""
            )  # private and writable, as OpenVINO wants; nobody writes to it
    except OSError as error:
        raise BundleError(
            f"{name} in {folder} can't be read ({error.strerror}): copy or compile it again."
        ) from error
    if len(buffer) != entry.size or _sha256(buffer) != entry.sha256:
        raise BundleError(
            f"{name} in {folder} isn't what the manifest says (digest differs): the bundle is "
            "damaged; copy or compile it again."
        )
    return buffer


def _sha256(buffer: Buffer) -> str:
    digest = hashlib.sha256()
    view = memoryview(buffer)
    for start in range(0, len(view), _CHUNK):
        digest.update(view[start : start + _CHUNK])
    return digest.hexdigest()
