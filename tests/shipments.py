"""Signed toy bundles on their way: keys, packed folders, and what a hostile packer could write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runners import oci
from runners.bundle import digest_line
from runners.console import Console
from runners.installing import Request, Result, install
from runners.keys import load_private_key, make_keys
from runners.packing import Packed, pack_layout
from runners.signing import sign_files
from runners.trust import Trust, load_trust
from tests.toy_bundle import toy_bundle

__all__ = ["Shop", "files_of", "write_layout"]


class Shop:
    """A key, bundles that are signed with it, and a place to install them in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out, self.root = folder / "out", folder / "root"
        self.key, self.public = folder / "key", folder / "key.pub"
        if not self.key.exists():
            make_keys(self.key)

    @property
    def trust(self) -> Trust:
        return load_trust(self.public)

    def toy(self, name: str = "toy", **fields: Any) -> Path:
        return toy_bundle(self.folder / "bundles" / name, **fields)

    def pack(self, bundle: Path, name: str = "toy") -> Packed:
        return pack_layout(bundle, self.out, Console(), key=self.key, name=name)

    def install(self, source: object = None, **fields: Any) -> Result:
        request = Request(source=str(source or self.out), root=self.root, **fields)
        return install(request, self.trust, Console())


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; links as where they point to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = str(path.readlink()).encode()
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def write_layout(
    out: Path, bundle: Path, extra: Mapping[str, bytes], key: Path, *, name: str = "toy"
) -> None:
    """A layout whose bundle has files of any path, all of it rightly listed and signed."""
    document = json.loads((bundle / "manifest.json").read_bytes())
    contents = {path: (bundle / path).read_bytes() for path in document["files"]} | dict(extra)
    document["files"] = {
        path: {"size": len(raw), "sha256": _sha256(raw)} for path, raw in contents.items()
    }
    raw = json.dumps(document).encode()
    contents |= {"manifest.json": raw, "manifest.sha256": digest_line(raw)}
    digests = {path: _sha256(raw) for path, raw in contents.items() if path.isprintable()}
    layers = [*contents.items(), ("signature.json", sign_files(digests, load_private_key(key)))]
    blobs = out / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    listed = []
    for path, raw in layers:
        (blobs / _sha256(raw)).write_bytes(raw)
        listed.append(
            {**_descriptor(raw, oci.file_type(path)), "annotations": {oci.PATH_KEY: path}}
        )
    (blobs / _sha256(b"{}")).write_bytes(b"{}")
    image = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": oci.MANIFEST_TYPE,
            "artifactType": oci.MODEL_TYPE,
            "config": _descriptor(b"{}", oci.MODEL_CONFIG),
            "layers": listed,
        }
    ).encode()
    (blobs / _sha256(image)).write_bytes(image)
    entry = {**_descriptor(image, oci.MANIFEST_TYPE), "annotations": {oci.NAME_KEY: name}}
    index = {"schemaVersion": 2, "manifests": [entry]}
    (out / oci.LAYOUT_NAME).write_text(json.dumps(oci.LAYOUT))
    (out / oci.INDEX_NAME).write_text(json.dumps(index))


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _descriptor(raw: bytes, kind: str) -> dict[str, object]:
    return {"mediaType": kind, "digest": f"sha256:{_sha256(raw)}", "size": len(raw)}
