"""A bundle on disk: opened only after its origin and every byte that it names have been verified.

The order is fixed: the signature, size-capped and strictly parsed; whether it, or the local mark,
makes the manifest's bytes ones to trust; the manifest, strictly parsed; whether the caller can run
what it describes; then the files, each opened without following a link, hashed, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from profiles.errors import BundleError, UntrustedError
from runners.engines.base import Buffer
from runners.files import verified_buffer
from runners.manifest import Manifest
from runners.manifest_file import (
    DIGEST_NAME,
    MANIFEST_NAME,
    RawManifest,
    bundle_digests,
    digest_line,
    parse_manifest,
    read_manifest,
    read_raw,
)
from runners.mark import is_marked
from runners.signing import Signed, check_signature, read_signature, require_digests
from runners.strict_json import strict_json
from runners.trust import Trust, load_trust

__all__ = [
    "DIGEST_NAME",
    "MANIFEST_NAME",
    "Bundle",
    "digest_line",
    "open_bundle",
    "read_manifest",
    "signed_manifest",
    "trusted_manifest",
]


PACKAGE = "package"
"""What the names of native code for the processor begin with in every backend."""


class Bundle:
    """A verified bundle: `file(rel)` gives the very bytes that were hashed."""

    def __init__(self, path: Path, manifest: Manifest, *, always_hash: bool = False) -> None:
        """Use `open_bundle` instead, which verifies."""
        self.path, self.manifest, self._always_hash = path, manifest, always_hash
        self._buffers: dict[str, Buffer] = {}
        self._code = {
            name
            for entry in manifest.engines
            for role, name in entry.files.items()
            if entry.requires.capabilities is not None or role.startswith(PACKAGE)
        }
        """Files that a card's driver, or the processor, would execute."""

    def verify(self, *, without: Collection[str] = (), hold: bool = True) -> None:
        """Hash every file but those `without`, which are hashed if they are ever read.

        BundleError names the first that isn't what the manifest says. Bytes that aren't held are
        read and hashed again when they are needed.
        """
        for name in self.manifest.files:
            if name not in without:
                self.file(name)
                if not hold:
                    self.release()

    def file(self, name: str) -> Buffer:
        """The bytes of one file: hashed, and the same buffer given out every time."""
        if name not in self._buffers:
            self._buffers[name] = verified_buffer(
                self.path,
                name,
                self.manifest.files[name],
                private=name in self._code,
                always_hash=self._always_hash,
            )
        return self._buffers[name]

    def release(self) -> None:
        """Drop the buffers; the engines that use one keep theirs."""
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
        try:
            document = strict_json(bytes(self.file(name)))
        except ValueError as error:
            raise BundleError(f"{name} in {self.path} isn't valid JSON: {error}.") from error
        if not isinstance(document, dict):
            raise BundleError(f"{name} in {self.path} should hold a JSON object.")
        return document


def open_bundle(
    path: str | Path,
    *,
    trust: Trust | None = None,
    check: Callable[[Manifest], object] | None = None,
    always_hash: bool = False,
    without: Callable[[Manifest], Collection[str]] | None = None,
    hold: bool = True,
) -> Bundle:
    """The bundle at `path`, its origin and all its files verified.

    `trust` (default: the user's own) says whose signatures count; `check` sees the manifest, and
    raises where the bundle can't run here, before any other file is opened. Large files that
    haven't changed since they were last hashed are hashed with `always_hash` only. `without` says
    which files wait until they are read, if ever; `hold` whether verified bytes stay. Raises
    SpecError where there is no bundle, UntrustedError where nobody trusted has signed it and it
    wasn't compiled here, BundleError for wrong bytes, UnsupportedError for a newer schema.
    """
    manifest = trusted_manifest(path, trust=trust)
    if check is not None:
        check(manifest)
    bundle = Bundle(Path(path), manifest, always_hash=always_hash)
    bundle.verify(without=without(manifest) if without else (), hold=hold)
    return bundle


def trusted_manifest(path: str | Path, *, trust: Trust | None = None) -> Manifest:
    """The manifest at `path`, signed by a key of `trust` or marked here; no other file is read.

    Raises as `open_bundle`. A mark makes up for a signature that isn't trusted, never for one that
    is damaged.
    """
    found = read_raw(path)
    try:
        return _signed(found, load_trust(None) if trust is None else trust)[1]
    except UntrustedError:
        if not is_marked(found):
            raise
    return parse_manifest(found.raw, path)


def signed_manifest(path: str | Path, trust: Trust) -> tuple[str, Manifest]:
    """The id of the trusted key and the manifest that it has signed; raises as `open_bundle`."""
    signed, manifest = _signed(read_raw(path), trust)
    return signed.key.id, manifest


def _signed(found: RawManifest, trust: Trust) -> tuple[Signed, Manifest]:
    """Signature, then manifest: nothing is parsed that isn't the signed bytes."""
    signed = check_signature(read_signature(found.folder), trust)
    own = found.digests
    require_digests(Signed(signed.key, {name: signed.digests.get(name, "") for name in own}), own)
    manifest = parse_manifest(found.raw, found.folder)
    require_digests(signed, bundle_digests(found, manifest))
    signed.key.require_name(manifest.model.name)
    return signed, manifest
