"""`kiln plan` of bundles: what their manifests say, without opening an engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runners.manifest import ComponentEntry, Manifest
from runners.manifest_file import DIGEST_NAME, MANIFEST_NAME, digest_line
from runners.memory import Asked, PartMemory, PipelineMemory, parts_of, rows
from tests.toy_bundle import toy_bundle

Kiln = Callable[..., Any]
MIB = 1 << 20
PIPELINE = PipelineMemory(base_bytes=500 * MIB, pixel_bytes=60, source="measured")


def measured(entry: ComponentEntry) -> ComponentEntry:
    part = PartMemory(
        held_bytes=MIB,
        resident_bytes=100 * MIB,
        stays={"pixels": 1000.0},
        peak={"constant": MIB, "pixels": 1500.0},
        source="measured",
    )
    return entry.model_copy(update={"memory": part})


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A toy bundle that says what its engines take."""
    folder = toy_bundle(tmp_path / "toy", memory=PIPELINE)
    manifest = Manifest.model_validate_json((folder / MANIFEST_NAME).read_bytes())
    changed = manifest.model_copy(update={"components": tuple(map(measured, manifest.components))})
    raw = json.dumps(changed.model_dump(mode="json")).encode()
    (folder / MANIFEST_NAME).write_bytes(raw)
    (folder / DIGEST_NAME).write_bytes(digest_line(raw))
    return folder


def said(kiln: Kiln, *arguments: object) -> dict[str, Any]:
    ended = kiln("plan", *arguments, "--json")
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def test_the_plan_is_what_the_manifest_says(bundle: Path, kiln: Kiln) -> None:
    found = said(kiln, bundle, "--memory", "8GiB", "--size", "128x128", "--batch", "2")
    manifest = Manifest.model_validate_json((bundle / MANIFEST_NAME).read_bytes())
    parts = parts_of(manifest)
    assert parts is not None
    # the toy's denoiser takes one prompt at once
    expected = rows(parts, Asked(128, 128, 2, guided=False))
    assert [row["peak_bytes"] for row in found["rows"]] == [row.peak_bytes for row in expected]
    assert found["predicted_peak_bytes"] == expected[0].peak_bytes
    assert found["base_bytes"] == 500 * MIB
    assert found["source"] == "measured"
    assert found["rows"][0]["build_bytes"] is None


def test_less_memory_picks_a_smaller_way(bundle: Path, kiln: Kiln) -> None:
    whole = said(kiln, bundle, "--memory", "8GiB", "--size", "128x128")
    less = said(kiln, bundle, "--memory", whole["predicted_peak_bytes"] - 1, "--size", "128x128")
    assert less["predicted_peak_bytes"] < whole["predicted_peak_bytes"]
    assert not less["rows"][0]["fits"]
    ended = kiln("plan", bundle, "--memory", "100MiB")
    assert ended.code == 13
    assert "one part at a time" in ended.sentence


def test_sizes_batches_and_flags_are_the_bundles(bundle: Path, kiln: Kiln) -> None:
    for arguments, words in (
        (("--size", "512x512"), "use 128x128"),
        (("--batch", "9"), "use 1 to 2"),
        (("--variant", "fp8"), "--variant fp8"),
        (("--backend", "openvino"), "is a bundle"),
        (("--size", "64x64", "--tiled"), "larger than a tile"),
    ):
        ended = kiln("plan", bundle, "--memory", "8GiB", *arguments)
        assert ended.code == 2
        assert words in ended.sentence


def test_a_tier_beyond_the_compiled_sizes_says_so(bundle: Path, kiln: Kiln) -> None:
    found = said(kiln, bundle, "--memory", "16GiB")
    assert not found["tier"]["reached"]
    assert "compiled for sides of 32 to 128" in found["tier"]["why"]


def test_a_bundle_without_measurements_says_what_to_do(tmp_path: Path, kiln: Kiln) -> None:
    ended = kiln("plan", toy_bundle(tmp_path / "toy"), "--memory", "8GiB")
    assert ended.code == 2
    assert "compile it again" in ended.sentence
