"""Pack a bundle for other machines: an OCI image layout that registry tools push, or a folder.

A packed bundle is the same bytes whenever and wherever it is packed. The system copies
files, by reference where the disk can (Btrfs, XFS), and what it wrote is hashed; they are never
hard-linked: who changes a bundle in place would change what was packed. One process at
a time may pack into one folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.errors import BundleError, SpecError
from profiles.target import sm
from runners import oci
from runners.console import Console
from runners.dsse import SIGNATURE_LIMIT
from runners.fetching import FolderPlace, PlacedFile
from runners.files import check_file, read_optional
from runners.installed import require_name
from runners.manifest import FileEntry, Manifest
from runners.manifest_file import (
    DIGEST_NAME,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    bundle_digests,
    digest_line,
    parse_manifest,
    read_raw,
)
from runners.outputs import require_writable
from runners.private import (
    abandoned,
    flush_file,
    flush_folder,
    flush_tree,
    private_folder,
    remove,
    write_flushed,
)
from runners.signing import load_private_key, sign_files
from runners.writing import write_verified

__all__ = ["Packed", "pack_folder", "pack_layout"]


@dataclass(frozen=True)
class Packed:
    """What was packed."""

    name: str
    digest: str
    """sha256 of the image manifest; "" for a folder."""
    bytes: int
    """Of all files of the bundle."""
    written: int
    """Bytes of those that weren't packed there before."""
    signed: bool


@dataclass(frozen=True)
class _Contents:
    """The files of a bundle as they are packed."""

    folder: Path
    manifest: Manifest
    small: Mapping[str, bytes]
    """manifest.json, manifest.sha256 and the signature, where there is one."""
    files: Mapping[str, FileEntry]
    """All of them, the small ones too."""


def _contents(bundle: Path, key: Path | None) -> _Contents:
    """The bundle's files, signed anew with `key`; without one, its own signature goes along."""
    found = read_raw(bundle)
    manifest = parse_manifest(found.raw, bundle)
    small = {MANIFEST_NAME: found.raw, DIGEST_NAME: digest_line(found.raw)}
    if key is not None:
        small[SIGNATURE_NAME] = sign_files(
            bundle_digests(found, manifest), load_private_key(key), name=manifest.model.name
        )
    elif raw := read_optional(bundle, SIGNATURE_NAME, limit=SIGNATURE_LIMIT):
        small[SIGNATURE_NAME] = raw
    own = {
        name: FileEntry(size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
        for name, raw in small.items()
    }
    return _Contents(bundle, manifest, small, {**manifest.files, **own})


def pack_layout(
    bundle: Path, out: Path, console: Console, *, key: Path | None = None, name: str | None = None
) -> Packed:
    """Add `bundle` to the OCI image layout at `out`, which is made where there is none.

    A bundle of the same name is replaced. Raises SpecError where `out` is something else.
    """
    name = require_name(name or bundle.resolve().name)
    _check_layout(out)
    contents = _contents(bundle, key)
    blobs = out / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    write_flushed(out / oci.LAYOUT_NAME, oci.canonical(oci.LAYOUT))
    for left in abandoned(out, "pack"):
        remove(left)
    with private_folder(out, "pack") as private, console.stage(f"Pack {name}") as stage:
        written = sum(_blob(contents, path, blobs, private) for path in sorted(contents.files))
        config = _small_blob(blobs, _model_config(contents), private)
        layers = [_layer(path, entry) for path, entry in sorted(contents.files.items())]
        image = {
            "schemaVersion": 2,
            "mediaType": oci.MANIFEST_TYPE,
            "artifactType": oci.MODEL_TYPE,
            "config": {"mediaType": oci.MODEL_CONFIG, **config},
            "layers": layers,
        }
        descriptor = _small_blob(blobs, oci.canonical(image), private)
        flush_folder(blobs)
        _add_to_index(out, name, descriptor, contents.manifest)
        stage.note(f"{written} bytes written")
    return Packed(
        name=name,
        digest=str(descriptor["digest"]),
        bytes=sum(entry.size for entry in contents.files.values()),
        written=written,
        signed=SIGNATURE_NAME in contents.small,
    )


def _check_layout(out: Path) -> None:
    """Raise SpecError where `out` holds anything but a layout."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise SpecError(f"-o {out} is a file: give the folder that should hold packed bundles.")
    if out.is_dir() and any(out.iterdir()) and not (out / oci.LAYOUT_NAME).is_file():
        raise SpecError(f"-o {out} holds other files: give a new folder, or one of `kiln pack`.")
    require_writable(out / oci.LAYOUT_NAME)


def _blob(contents: _Contents, path: str, blobs: Path, private: Path) -> int:
    """Put one file among the blobs unless it is there; the bytes that were written."""
    entry = contents.files[path]
    if _is_there(blobs, entry):
        return 0
    _write(contents, path, private / entry.sha256)
    flush_file(private / entry.sha256)
    (private / entry.sha256).replace(blobs / entry.sha256)
    return entry.size


def _is_there(blobs: Path, entry: FileEntry) -> bool:
    try:
        check_file(blobs, entry.sha256, entry)
    except BundleError:
        return False
    return True


def _write(contents: _Contents, path: str, target: Path) -> None:
    if raw := contents.small.get(path):
        write_flushed(target, raw)
        return
    entry = contents.files[path]
    source = PlacedFile(FolderPlace(contents.folder), path, entry.size)
    write_verified(target, entry, source, name=f"{path} of {contents.folder}")


def _small_blob(blobs: Path, raw: bytes, private: Path) -> dict[str, object]:
    """Write a document as a blob; its digest and size as a descriptor has them."""
    sha256 = hashlib.sha256(raw).hexdigest()
    write_flushed(private / sha256, raw)
    (private / sha256).replace(blobs / sha256)
    return {"digest": f"sha256:{sha256}", "size": len(raw)}


def _layer(path: str, entry: FileEntry) -> dict[str, object]:
    return {
        "mediaType": oci.file_type(path),
        "digest": f"sha256:{entry.sha256}",
        "size": entry.size,
        "annotations": {oci.PATH_KEY: path},
    }


def _model_config(contents: _Contents) -> bytes:
    """ModelPack's description of the model."""
    manifest, denoiser = contents.manifest, contents.manifest.component("denoiser")
    descriptor = {
        "name": manifest.model.name,
        "family": manifest.model.family,
        "version": manifest.key,
        "vendor": f"kiln {manifest.kiln}",
    }
    if manifest.model.revision is not None:
        descriptor["revision"] = manifest.model.revision
    digests = (f"sha256:{entry.sha256}" for _, entry in sorted(contents.files.items()))
    return oci.canonical(
        {
            "descriptor": descriptor,
            "modelfs": {"type": "layers", "diffIds": list(digests)},
            "config": {
                "architecture": manifest.model.pipeline_class,
                "format": denoiser.backend,
                "precision": denoiser.dtype,
                "quantization": denoiser.quant,
            },
        }
    )


def _add_to_index(
    out: Path, name: str, descriptor: Mapping[str, object], manifest: Manifest
) -> None:
    """Put the bundle's descriptor in the index, in the place of one of the same name."""
    notes = {oci.NAME_KEY: name}
    built = manifest.component("denoiser").requires.capabilities
    if built is not None:
        notes[oci.TARGETS_KEY] = ",".join(map(sm, built)) or "portable"
    mine: dict[str, Any] = {
        "mediaType": oci.MANIFEST_TYPE,
        "artifactType": oci.MODEL_TYPE,
        **descriptor,
        "annotations": notes,
    }
    others = [one for one in _index(out) if one["annotations"].get(oci.NAME_KEY) != name]
    listed = sorted((*others, mine), key=lambda one: str(one["annotations"].get(oci.NAME_KEY)))
    index = {"schemaVersion": 2, "mediaType": oci.INDEX_TYPE, "manifests": listed}
    write_flushed(out / oci.INDEX_NAME, oci.canonical(index))


def _index(out: Path) -> list[dict[str, Any]]:
    """The descriptors that are in the index, as they are."""
    raw = read_optional(out, oci.INDEX_NAME, limit=oci.DOCUMENT_LIMIT)
    if raw is None:
        return []
    index = oci.parsed(oci.Index, raw, f"{oci.INDEX_NAME} of {out}")
    return [
        one.model_dump(mode="json", by_alias=True, exclude_none=True) for one in index.manifests
    ]


def pack_folder(bundle: Path, out: Path, console: Console, *, key: Path | None = None) -> Packed:
    """Copy the bundle to a plain folder at `out`, which must be new or empty."""
    out = Path(os.path.abspath(out))  # noqa: PTH100 (resolve would follow links; "." has no name)
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise SpecError(f"-o {out} is taken: give a new folder for `--format folder`.")
    require_writable(out)
    contents = _contents(bundle, key)
    for left in abandoned(out.parent, out.name):
        remove(left)
    with private_folder(out.parent, out.name) as private, console.stage(f"Pack {out.name}"):
        folder = private / "bundle"
        folder.mkdir()
        for path in sorted(contents.files):
            _write(contents, path, folder / path)
        flush_tree(folder)
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
        flush_folder(out.parent)
    size = sum(entry.size for entry in contents.files.values())
    return Packed(out.name, "", size, size, SIGNATURE_NAME in contents.small)
