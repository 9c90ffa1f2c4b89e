from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from runners.bundle import read_manifest
from runners.manifest import FileEntry, Manifest, RelativePath

PATH = TypeAdapter(RelativePath)


@pytest.mark.parametrize(
    "path", ["a", "unet/weights.bin", "a b/.c", "tokenizer/merges.txt", "con1"]
)
def test_plain_relative_paths_are_taken(path: str) -> None:
    assert PATH.validate_python(path) == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../x",
        "a/..",
        "./x",
        "a//b",
        "a/",
        "/etc/passwd",
        "C:\\x",
        "C:x",
        "a\\b",
        "\\\\host\\share",
        "a\0b",
        "a?",
        "a*",
        "a|b",
        'a"b',
        "<a>",
        "con",
        "CON",
        "aux.txt",
        "unet/NUL.bin",
        "com1",
        "lpt9.json",
        "a.",
        "a ",
        "a./b",
    ],
)
def test_paths_that_leave_the_bundle_or_are_illegal_somewhere_are_refused(path: str) -> None:
    with pytest.raises(ValidationError, match="not a plain relative path"):
        PATH.validate_python(path)


@pytest.mark.parametrize("change", [{"size": -1}, {"sha256": "AB" * 32}, {"sha256": "0" * 63}])
def test_a_file_entry_is_parsed_strictly(change: dict[str, Any]) -> None:
    good = {"size": 0, "sha256": "0" * 64}
    assert FileEntry.model_validate(good).size == 0
    with pytest.raises(ValidationError):
        FileEntry.model_validate({**good, **change})


def test_a_manifest_round_trips_through_its_file(bundle: Callable[..., Path]) -> None:
    folder = bundle("openvino")
    manifest = read_manifest(folder)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    document = json.loads((folder / "manifest.json").read_bytes())
    assert manifest.model_dump(mode="json") == document


def test_a_component_is_found_by_its_role(bundle: Callable[..., Path]) -> None:
    manifest = read_manifest(bundle("openvino"))
    assert manifest.component("denoiser").name == "unet"
    with pytest.raises(KeyError, match="controlnet"):
        manifest.component("controlnet")
