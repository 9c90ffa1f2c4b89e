"""Whole bundles of compiled packages: minutes each, so all of it runs with -m slow."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from optimizer.check import limit_db
from runners.bundle import open_bundle, read_manifest
from runners.pipeline import open_engine
from runners.selftest import check_calls

MakeBundle = Callable[..., Path]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("backend", "quant"),
    [("aoti", "int8"), ("aoti", "none"), ("aoti-blocks", "none"), ("aoti-blocks", "int4")],
)
def test_a_moved_bundle_loses_what_the_oracle_loses(
    bundle: MakeBundle, tmp_path: Path, backend: str, quant: str
) -> None:
    """Each engine opened elsewhere, on its own recorded calls."""
    moved = open_bundle(shutil.copytree(bundle(backend, quant), tmp_path / "moved"))
    for entry in moved.manifest.components:
        assert entry.sqnr_db is not None
        assert entry.oracle_sqnr_db is not None
        assert entry.selftest_db is not None
        assert entry.sqnr_db >= limit_db(entry.oracle_sqnr_db, "fp32")
        with open_engine(moved, entry, threads=1) as engine:
            assert min(check_calls(moved, entry, engine).values()) >= entry.selftest_db


def test_every_rounded_layer_runs_on_an_int8_kernel(bundle: MakeBundle) -> None:
    entry = read_manifest(bundle("aoti", "int8")).component("denoiser")
    assert entry.properties["frozen"] is True
    assert entry.layers_low_bit == 66  # as the plan counts them: all but the fragile ones
    assert set(entry.files) == {"package"}


def test_weights_beside_a_package_are_the_eager_bundles_own(bundle: MakeBundle) -> None:
    here, eager = (read_manifest(bundle(name, "none")) for name in ("aoti", "eager"))
    for name in ("unet", "text_encoder"):
        file = f"{name}/weights.safetensors"
        assert here.files[file].sha256 == eager.files[file].sha256


def test_what_the_code_needs_is_required_of_machines(bundle: MakeBundle) -> None:
    entry = read_manifest(bundle("aoti", "none")).component("denoiser")
    assert {name for (name,) in entry.requires.build_isa} == set(
        str(entry.properties["isa"]).split(",")
    )
    assert entry.requires.glibc is not None
    assert entry.requires.library.rule == "exact"
    assert entry.requires.systems == ("Linux",)


@pytest.mark.parametrize("backend", ["aoti", "aoti-blocks"])
def test_a_form_has_the_plain_packages_file_of_weights(bundle: MakeBundle, backend: str) -> None:
    entry = read_manifest(bundle(backend, "none", lora=True)).component("denoiser")
    form = entry.forms["lora"]
    assert form.files["weights"] == entry.files["weights"]
    assert form.files["package"] != entry.files["package"]
