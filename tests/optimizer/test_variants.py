"""Several levels of the denoiser in one bundle: compiled, stored once where equal, chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import runners
from profiles.errors import SpecError
from runners.bundle import open_bundle, read_manifest
from runners.requests import Request
from runners.workflows import pictures

MakeBundle = Callable[..., Path]
Kiln = Callable[..., Any]


@pytest.fixture(scope="session")
def variants(bundle: MakeBundle) -> Path:
    """A bundle of two variants on ONNX Runtime; not to be changed."""
    return bundle("onnxruntime", "none,int8w")


def draw(folder: Path, **options: Any) -> bytes:
    pipeline = runners.load(folder, threads=1, **options)
    request = Request(prompt="a red circle", steps=2, seed=3)
    [(picture, _)] = pictures(pipeline, request)
    pipeline.kiln.close()
    return bytes(picture.tobytes())


def test_a_bundle_holds_the_levels_in_their_order(variants: Path) -> None:
    manifest = read_manifest(variants)
    assert list(manifest.denoisers) == ["none", "int8w"]
    assert [entry.name for entry in manifest.engines[-2:]] == ["vae_encoder", "unet-int8w"]
    assert manifest.component("denoiser").name == "unet"
    best, *others = [entry.engine_bytes for entry in manifest.denoisers.values()]
    assert max(others) < best
    assert set(manifest.policies) >= {"unet", "unet-int8w"}


def test_equal_files_are_stored_once(variants: Path) -> None:
    manifest = read_manifest(variants)
    base, *others = manifest.denoisers.values()
    for other in others:
        assert other.config == base.config
        assert not set(other.files.values()) & set(base.files.values())
    digests = [entry.sha256 for name, entry in manifest.files.items() if name.startswith("unet")]
    assert len(set(digests)) == len(digests)


def test_each_variant_draws_its_own_picture(variants: Path, bundle: MakeBundle) -> None:
    best, int8w = draw(variants), draw(variants, variant="int8w")
    assert best == draw(variants, variant="none")
    assert best != int8w
    assert int8w == draw(bundle("onnxruntime", "int8w"))


def test_what_another_variant_needs_is_not_read(variants: Path) -> None:
    manifest = read_manifest(variants)
    skipped = manifest.unused_by("int8w")
    assert {name.split("/")[0] for name in skipped} == {"unet"}
    assert manifest.component("denoiser").config not in skipped
    found = open_bundle(variants, without=lambda manifest: manifest.unused_by("int8w"))
    assert not skipped & set(found._buffers)
    assert set(found._buffers) == set(manifest.files) - skipped


def test_an_unknown_variant_is_one_sentence(variants: Path) -> None:
    with pytest.raises(SpecError) as caught:
        runners.load(variants, variant="fp8")
    assert str(caught.value) == (
        "--variant fp8 is not in the bundle: use none or int8w, or compile with --quant "
        "none,int8w,fp8."
    )


@pytest.mark.parametrize("levels", ["none,none", "auto,int8", "int8,auto", "none,int3", ",int8"])
def test_levels_that_cannot_be_together_are_one_sentence(
    kiln: Kiln, tiny_model: Path, tmp_path: Path, levels: str
) -> None:
    ended = kiln("compile", tiny_model, "--quant", levels, "-o", tmp_path / "b")
    assert ended.code == 2
    assert "--quant " in ended.sentence
    assert ended.sentence.endswith(".")
    assert not (tmp_path / "b").exists()


def test_inspect_lists_every_variant(kiln: Kiln, variants: Path) -> None:
    ended = kiln("inspect", variants)
    assert ended.code == 0
    assert all(name in ended.out for name in ("unet ", "unet-int8w"))
