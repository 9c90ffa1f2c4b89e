"""What a packed folder, a bundle or a server offers: lists first, small and strictly parsed.

Nothing of an offer is believed before `verified`: its signature covers the digest of every file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from profiles.errors import BundleError, SpecError, UntrustedError
from profiles.target import parse_target
from runners import oci
from runners.dsse import SIGNATURE_LIMIT
from runners.fetching import FolderPlace, Place, place_of
from runners.files import check_file
from runners.manifest import FileEntry, Manifest
from runners.manifest_file import (
    BESIDE,
    DIGEST_NAME,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    digest_line,
    parse_manifest,
)
from runners.paths import plain_path, require_distinct
from runners.signing import verify_signature
from runners.trust import Trust

__all__ = [
    "Listed",
    "Offer",
    "Verified",
    "is_layout",
    "listed",
    "offer_of",
    "verified",
    "verified_layout",
]

_SMALL = {MANIFEST_NAME: 64 << 20, DIGEST_NAME: 1024, SIGNATURE_NAME: SIGNATURE_LIMIT}
"""Files that are read before anything is verified -> their most bytes."""


@dataclass(frozen=True)
class Offer:
    """One bundle as its list of files says."""

    name: str
    place: Place
    files: Mapping[str, FileEntry]
    """Path in the bundle -> what the file must be; paths are plain and distinct."""
    where: Mapping[str, str]
    """Path in the bundle -> name at the place."""
    targets: str | None
    """What it is listed for; not signed, so only good for choosing."""


@dataclass(frozen=True)
class Verified:
    """An offer whose signature was found to be right and trusted."""

    offer: Offer
    manifest: Manifest
    key_id: str
    small: Mapping[str, bytes]
    """The small files' verified bytes."""

    @property
    def version(self) -> str:
        """Name of this very content: the beginnings of its key and of its files' digest."""
        lines = "".join(f"{e.sha256}  {n}\n" for n, e in sorted(self.offer.files.items()))
        return f"{self.manifest.key[:12]}-{hashlib.sha256(lines.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Listed:
    """A bundle that a place lists, whose list of files hasn't been read yet."""

    name: str
    targets: str | None
    read: Callable[[], Offer]


def offer_of(source: str, only: str | None) -> Offer:
    """The one bundle of `source` that `only` names, by its name or by what it was built for.

    Raises SpecError where none or several do, with the names that there are.
    """
    every = listed(place_of(source))
    found = every
    if only is not None:
        found = [one for one in every if one.name == only] or _built_for(every, only)
    if len(found) == 1:
        return found[0].read()
    known = ", ".join(one.name for one in found or every) or "nothing"
    if only is None or found:
        raise SpecError(f"{source} holds {known}: name one bundle with --only.")
    raise SpecError(f"{source} has no bundle for {only!r}: it holds {known}.")


def _built_for(every: list[Listed], only: str) -> list[Listed]:
    if only == "cpu":
        return [one for one in every if one.targets is None]
    try:
        wanted = set(parse_target(only).capabilities)
    except SpecError:
        return []
    return [one for one in every if one.targets and wanted <= _capabilities(one.targets)]


def _capabilities(targets: str) -> set[str]:
    try:
        return set(parse_target(targets).capabilities)
    except SpecError:
        return set()


def listed(place: Place) -> list[Listed]:
    """Every bundle of a place: of a layout's index, or the one whose own folder it is."""
    if isinstance(place, FolderPlace) and os.path.lexists(place.root / MANIFEST_NAME):
        offer = _folder_offer(place)
        return [Listed(offer.name, offer.targets, lambda: offer)]
    if isinstance(place, FolderPlace) and not os.path.lexists(place.root / oci.INDEX_NAME):
        raise SpecError(
            f"{place.text} is neither a bundle nor a folder of `kiln pack` (it has no "
            f"{MANIFEST_NAME} and no {oci.INDEX_NAME}): give one of them."
        )
    raw = place.small(oci.INDEX_NAME, oci.DOCUMENT_LIMIT)
    index = oci.parsed(oci.Index, raw, f"{oci.INDEX_NAME} of {place.text}")
    found = [_listed(place, one) for one in index.manifests]
    if len({one.name for one in found}) != len(found):
        raise BundleError(f"{oci.INDEX_NAME} of {place.text} names a bundle twice: pack it again.")
    return found


def _listed(place: Place, descriptor: oci.Descriptor) -> Listed:
    notes = descriptor.annotations
    return Listed(
        notes.get(oci.NAME_KEY, ""),
        notes.get(oci.TARGETS_KEY),
        lambda: _layout_offer(place, descriptor),
    )


def _layout_offer(place: Place, descriptor: oci.Descriptor) -> Offer:
    """The bundle of one image manifest, whose bytes are compared with the index's digest."""
    name = descriptor.annotations.get(oci.NAME_KEY, "")
    where = f"the manifest of {name!r} in {place.text}"
    if descriptor.media_type != oci.MANIFEST_TYPE or descriptor.size > oci.DOCUMENT_LIMIT:
        raise BundleError(f"{where} is no OCI image manifest: pack it again.")
    raw = place.small(oci.blob_name(descriptor.sha256), descriptor.size)
    if hashlib.sha256(raw).hexdigest() != descriptor.sha256:
        raise BundleError(f"{where} isn't what the index says: it is damaged; pack it again.")
    image = oci.parsed(oci.ImageManifest, raw, where)
    if image.artifact_type != oci.MODEL_TYPE:
        raise BundleError(f"{where} is no ModelPack artifact: pack it with `kiln pack`.")
    entries = [
        (layer.annotations.get(oci.PATH_KEY, ""), layer.sha256, layer.size)
        for layer in image.layers
    ]
    return Offer(
        name=name,
        place=place,
        files=_checked(entries, where),
        where={path: oci.blob_name(sha256) for path, sha256, _ in entries},
        targets=descriptor.annotations.get(oci.TARGETS_KEY),
    )


def _folder_offer(place: FolderPlace) -> Offer:
    """A bundle's own folder: what its manifest lists, and the files that go with it."""
    raw = place.small(MANIFEST_NAME, _SMALL[MANIFEST_NAME])
    manifest = parse_manifest(raw, place.text)
    entries = [(name, entry.sha256, entry.size) for name, entry in manifest.files.items()]
    for name, limit in _SMALL.items():
        if os.path.lexists(place.root / name):
            own = place.small(name, limit)
            entries.append((name, hashlib.sha256(own).hexdigest(), len(own)))
    built_for = manifest.component("denoiser").requires.capabilities
    return Offer(
        name=place.root.resolve().name,
        place=place,
        files=_checked(entries, f"the bundle {place.text}"),
        where={name: name for name, _, _ in entries},
        targets=None if built_for is None else str(manifest.recipe.get("target")),
    )


def _checked(entries: list[tuple[str, str, int]], where: str) -> dict[str, FileEntry]:
    """Path -> entry; BundleError for a path that could be written elsewhere or over another."""
    try:
        paths = [plain_path(path) for path, _, _ in entries]
        require_distinct((*paths, *(name for name in BESIDE if name != SIGNATURE_NAME)))
        if len(set(paths)) != len(paths):
            raise ValueError("a path stands twice")
        own = {path for path in paths if path.split("/")[0] in BESIDE} - {SIGNATURE_NAME}
        if own:
            raise ValueError(f"{min(own)!r} is no file of a bundle")
    except ValueError as error:
        raise BundleError(f"A file of {where} is refused: {error}.") from error
    return {path: FileEntry(size=size, sha256=sha256) for path, sha256, size in entries}


def verified(offer: Offer, trust: Trust) -> Verified:
    """Read the small files, compare the list with the manifest's, and the signature with all.

    Raises UntrustedError where nobody trusted has signed, BundleError where anything differs.
    """
    small = {name: _read(offer, name) for name in _SMALL}
    manifest = parse_manifest(small[MANIFEST_NAME], offer.place.text)
    if small[DIGEST_NAME] != digest_line(small[MANIFEST_NAME]):
        raise BundleError(f"{MANIFEST_NAME} of {offer.name} doesn't match {DIGEST_NAME}.")
    files = {name: entry for name, entry in offer.files.items() if name not in _SMALL}
    if files != manifest.files:
        every = {*files, *manifest.files}
        odd = sorted(name for name in every if files.get(name) != manifest.files.get(name))
        raise BundleError(
            f"{odd[0]} of {offer.name} isn't what the bundle's manifest says: pack it again."
        )
    digests = {n: e.sha256 for n, e in offer.files.items() if n != SIGNATURE_NAME}
    key_id = verify_signature(small[SIGNATURE_NAME], digests, trust, name=manifest.model.name)
    return Verified(offer, manifest, key_id, small)


def _read(offer: Offer, name: str) -> bytes:
    entry = offer.files.get(name)
    if entry is None and name == SIGNATURE_NAME:
        raise UntrustedError(
            f"{offer.name} in {offer.place.text} isn't signed: pack it with --key NAME, and "
            "install it with --trust NAME.pub."
        )
    if entry is None:
        raise BundleError(f"{offer.name} in {offer.place.text} has no {name}: pack it again.")
    raw = offer.place.small(offer.where[name], min(entry.size, _SMALL[name]))
    if hashlib.sha256(raw).hexdigest() != entry.sha256:
        raise BundleError(f"{name} of {offer.name} isn't what the list says: it is damaged.")
    return raw


def is_layout(folder: Path) -> bool:
    """Whether a folder is what `kiln pack` wrote, and not one bundle's own."""
    return (folder / oci.INDEX_NAME).is_file() and not (folder / MANIFEST_NAME).exists()


def verified_layout(folder: Path, trust: Trust) -> list[Verified]:
    """Every bundle of a packed folder, all its files hashed.

    Raises SpecError where there is none, UntrustedError and BundleError for the first wrong one.
    """
    found = [verified(one.read(), trust) for one in listed(FolderPlace(folder))]
    if not found:
        raise SpecError(f"{folder} holds no bundle: pack one with `kiln pack BUNDLE -o {folder}`.")
    hashed: set[str] = set()
    for one in found:
        for name, entry in one.offer.files.items():
            if entry.sha256 not in hashed:
                check_file(folder, one.offer.where[name], entry)
                hashed.add(entry.sha256)
    return found
