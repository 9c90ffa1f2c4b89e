"""A bundle compiled here runs here: its mark moves with it, and says nothing elsewhere."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from profiles.errors import BundleError, SpecError, UntrustedError
from runners.bundle import open_bundle
from runners.config import write_private
from runners.keys import make_keys
from runners.manifest_file import read_raw
from runners.mark import is_marked, local_key, mark_bundle
from runners.signing import sign_bundle
from tests.toy_bundle import toy_bundle


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "config"
    monkeypatch.setenv("KILN_CONFIG", str(folder))
    return folder


@pytest.fixture
def bundle(tmp_path: Path, config: Path) -> Path:  # noqa: ARG001
    return toy_bundle(tmp_path / "bundle")


def test_moving_and_copying_keep_the_mark(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    moved = bundle.rename(tmp_path / "moved")
    for folder in (copy, moved):
        open_bundle(folder)


def test_on_another_machine_the_mark_says_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILN_CONFIG", str(tmp_path / "elsewhere"))
    for _ in range(2):
        with pytest.raises(UntrustedError) as caught:
            open_bundle(bundle)
        assert "isn't signed" in str(caught.value)
        assert "`kiln pack BUNDLE -o OUT --key NAME`" in str(caught.value)
        assert "compile it on this machine" in str(caught.value)
        assert not (tmp_path / "elsewhere").exists()
        local_key()
        shutil.rmtree(tmp_path / "elsewhere")


def test_the_mark_is_of_one_manifest(bundle: Path, tmp_path: Path) -> None:
    other = toy_bundle(tmp_path / "other", seed=1)
    shutil.copy(other / "local.mark", bundle / "local.mark")
    with pytest.raises(UntrustedError):
        open_bundle(bundle)
    open_bundle(other)


def test_a_changed_byte_of_the_mark_is_no_mark(bundle: Path) -> None:
    right = (bundle / "local.mark").read_bytes()
    for position in range(len(right)):
        wrong = bytearray(right)
        wrong[position] ^= 1
        (bundle / "local.mark").write_bytes(wrong)
        assert not is_marked(read_raw(bundle))
    (bundle / "local.mark").write_bytes(right + b"\n")
    assert not is_marked(read_raw(bundle))
    (bundle / "local.mark").write_bytes(b"x" * 5000)
    with pytest.raises(BundleError, match="is larger than 1024 bytes"):
        open_bundle(bundle)


def test_the_key_is_made_once_for_the_owner_alone(config: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        keys = set(pool.map(lambda _: local_key(), range(64)))
    assert len(keys) == 1
    assert [path.name for path in config.iterdir()] == ["local.key"]
    if sys.platform != "win32":
        assert stat.S_IMODE((config / "local.key").stat().st_mode) == 0o600


def test_where_there_are_no_hard_links_a_key_is_made_once_too(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_arguments: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    key = local_key()
    assert not write_private(config / "local.key", b"x" * 32, replace=False)
    assert local_key() == key
    assert [path.name for path in config.iterdir()] == ["local.key"]


def test_a_damaged_key_is_named_and_never_replaced(bundle: Path, config: Path) -> None:
    (config / "local.key").write_bytes(b"short")
    with pytest.raises(SpecError, match=r"local\.key isn't this machine's key"):
        mark_bundle(bundle)
    assert (config / "local.key").read_bytes() == b"short"
    with pytest.raises(UntrustedError):
        open_bundle(bundle)


def test_a_config_folder_that_cant_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("KILN_CONFIG", str(tmp_path / "file" / "config"))
    with pytest.raises(SpecError, match="KILN_CONFIG"):
        local_key()


def test_a_mark_makes_up_for_an_unknown_key_and_not_for_damage(
    bundle: Path, tmp_path: Path
) -> None:
    make_keys(tmp_path / "builder")
    sign_bundle(bundle, tmp_path / "builder")
    open_bundle(bundle)
    (bundle / "signature.json").write_text("{}")
    with pytest.raises(BundleError, match="The signature is wrong"):
        open_bundle(bundle)
