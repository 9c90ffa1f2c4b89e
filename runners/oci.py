"""An OCI image layout of bundles: a ModelPack artifact each, one blob a file, read strictly.

    OUT/oci-layout                  the layout's version
    OUT/index.json                  a descriptor for each bundle, with its name as an annotation
    OUT/blobs/sha256/<64 digits>    files of bundles, and the image manifests that list them

Sources: OCI image-spec 1.1 (image-layout, image-index, manifest), CNCF ModelPack's model-spec
(docs/spec.md, specs-go/v1/mediatype.go, docs/annotations.md).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from profiles.errors import BundleError
from runners.strict_json import strict_json

__all__ = [
    "DOCUMENT_LIMIT",
    "INDEX_NAME",
    "INDEX_TYPE",
    "LAYOUT",
    "LAYOUT_NAME",
    "MANIFEST_TYPE",
    "MODEL_CONFIG",
    "MODEL_TYPE",
    "NAME_KEY",
    "PATH_KEY",
    "TARGETS_KEY",
    "Descriptor",
    "ImageManifest",
    "Index",
    "blob_name",
    "canonical",
    "file_type",
    "parsed",
]

LAYOUT_NAME = "oci-layout"
INDEX_NAME = "index.json"
LAYOUT = {"imageLayoutVersion": "1.0.0"}
DOCUMENT_LIMIT = 4 << 20
"""Bytes of an index or image manifest; registries take no larger ones (distribution-spec)."""
_MOST_FILES = 4096
_MOST_BUNDLES = 1024

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
MODEL_TYPE = "application/vnd.cncf.model.manifest.v1+json"
MODEL_CONFIG = "application/vnd.cncf.model.config.v1+json"

NAME_KEY = "org.opencontainers.image.ref.name"
PATH_KEY = "org.cncf.model.filepath"
TARGETS_KEY = "io.github.kiln.targets"
"""sm86,sm89 or portable; absent for a bundle that runs on processors."""

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class Descriptor(BaseModel):
    """What one blob must be; foreign urls and inline data are refused."""

    model_config = _STRICT

    media_type: str = Field(alias="mediaType")
    digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    size: int = Field(ge=0, lt=1 << 50)
    artifact_type: str | None = Field(None, alias="artifactType")
    platform: dict[str, Any] | None = None
    annotations: dict[str, str] = {}

    @property
    def sha256(self) -> str:
        """The digest without its algorithm."""
        return self.digest.removeprefix("sha256:")


class Index(BaseModel):
    """index.json."""

    model_config = _STRICT

    version: Annotated[int, Field(alias="schemaVersion", ge=2, le=2)]
    media_type: str = Field(INDEX_TYPE, alias="mediaType")
    artifact_type: str | None = Field(None, alias="artifactType")
    manifests: list[Descriptor] = Field(max_length=_MOST_BUNDLES)
    annotations: dict[str, str] = {}


class ImageManifest(BaseModel):
    """The list of one bundle's files."""

    model_config = _STRICT

    version: Annotated[int, Field(alias="schemaVersion", ge=2, le=2)]
    media_type: str = Field(MANIFEST_TYPE, alias="mediaType")
    artifact_type: str | None = Field(None, alias="artifactType")
    config: Descriptor
    layers: list[Descriptor] = Field(max_length=_MOST_FILES)
    annotations: dict[str, str] = {}


_Document = TypeVar("_Document", Index, ImageManifest)


def parsed(kind: type[_Document], raw: bytes, where: str) -> _Document:
    """The document, parsed strictly; BundleError says what is wrong with it."""
    try:
        return kind.model_validate(strict_json(raw))
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"])) or "the top"
        raise BundleError(f"{where} is wrong at {at}: {first['msg']}; pack it again.") from error
    except ValueError as error:
        raise BundleError(f"{where} isn't valid JSON: {error}; pack it again.") from error


def canonical(document: object) -> bytes:
    """The one JSON text of a document, so that the same bundle is packed to the same bytes."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def blob_name(sha256: str) -> str:
    """Where a blob lies below the layout's folder."""
    return f"blobs/sha256/{sha256}"


def file_type(path: str) -> str:
    """ModelPack's media type of one file of a bundle: uncompressed, as it is."""
    config = path.endswith((".json", ".txt", ".model", ".sha256"))
    return f"application/vnd.cncf.model.weight{'.config' if config else ''}.v1.raw"
