"""What is at -o already counts only if it was made here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from optimizer.bundling import check_target, same_bundle
from profiles.errors import SpecError
from runners.manifest_file import read_manifest
from tests.toy_bundle import toy_bundle


def test_a_bundle_made_here_with_the_same_key_is_left_alone(tmp_path: Path) -> None:
    out = toy_bundle(tmp_path / "out")
    manifest = read_manifest(out)
    assert same_bundle(out, manifest.key, force=False) == manifest
    assert same_bundle(out, "0" * 64, force=False) is None


def test_a_bundle_that_only_claims_the_key_is_not_taken_for_it(tmp_path: Path) -> None:
    """Its key is no secret: somebody else's engines could lie there under it."""
    out = toy_bundle(tmp_path / "out")
    (out / "local.mark").unlink()
    assert same_bundle(out, read_manifest(out).key, force=False) is None
    with pytest.raises(SpecError, match="holds another bundle: add --force"):
        check_target(out, force=False)


def test_no_compile_starts_where_its_bundle_could_not_be_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("KILN_CONFIG", str(tmp_path / "file" / "config"))
    with pytest.raises(SpecError, match="KILN_CONFIG"):
        check_target(tmp_path / "out", force=False)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    monkeypatch.setenv("KILN_CONFIG", str(tmp_path / "config"))
    check_target(tmp_path / "out", force=False)
