"""`kiln verify`: 0, 11 or 12; and what `kiln generate` refuses before it loads anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runners.keys import make_keys
from runners.signing import sign_bundle
from tests.test_lean_import import HEAVY
from tests.toy_bundle import toy_bundle
from tests.tracked import ROOT

Kiln = Callable[..., Any]


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "builder"
    make_keys(path)
    return path


@pytest.fixture
def signed(key: Path, tmp_path: Path) -> Path:
    folder = toy_bundle(tmp_path / "bundle")
    sign_bundle(folder, key)
    return folder


def test_from_keygen_to_verify(kiln: Kiln, tmp_path: Path) -> None:
    made = json.loads(kiln("keygen", "-o", tmp_path / "builder", "--json").out)
    folder = toy_bundle(tmp_path / "bundle")
    sign_bundle(folder, made["private"])
    ended = kiln("verify", folder, "--trust", made["public"])
    assert ended.code == 0
    assert "is toy, 10 files and 4" in ended.out
    assert made["id"] in ended.out
    again = json.loads(kiln("verify", folder, "--trust", made["public"], "--json").out)
    assert (again["key"], again["name"], again["files"]) == (made["id"], "toy", 10)
    assert kiln("keygen", "-o", tmp_path / "builder").code == 2


def test_the_users_own_trust_is_the_default(
    kiln: Kiln, signed: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILN_CONFIG", str(tmp_path / "config"))
    assert kiln("verify", signed).code == 11
    kiln("trust", "add", f"{key}.pub")
    assert kiln("verify", signed).code == 0
    kiln("trust", "add", f"{key}.pub", "--until", "2020-01-01")
    assert kiln("verify", signed).code == 11


def test_a_bundle_without_signature_is_untrusted_even_where_it_was_made(
    kiln: Kiln, signed: Path, key: Path
) -> None:
    (signed / "signature.json").unlink()
    ended = kiln("verify", signed, "--trust", f"{key}.pub")
    assert ended.code == 11
    assert "isn't signed (it has no signature.json)" in ended.sentence


def test_another_key_is_untrusted(kiln: Kiln, signed: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "other")
    ended = kiln("verify", signed, "--trust", tmp_path / "other.pub")
    assert ended.code == 11
    assert "kiln trust add NAME.pub" in ended.sentence


def test_one_flipped_byte_in_any_file_ends_with_12(kiln: Kiln, signed: Path, key: Path) -> None:
    files = sorted(path for path in signed.rglob("*") if path.is_file())
    checked = 0
    for path in files:
        if path.name == "local.mark":
            continue
        right = path.read_bytes()
        middle = len(right) // 2
        path.write_bytes(right[:middle] + bytes([right[middle] ^ 1]) + right[middle + 1 :])
        ended = kiln("verify", signed, "--trust", f"{key}.pub")
        assert ended.code == 12, path
        path.write_bytes(right)
        checked += 1
    assert checked == 13
    assert kiln("verify", signed, "--trust", f"{key}.pub").code == 0


@pytest.mark.parametrize("name", ["more.bin", "unet/more.bin", "a/b/c", ".git2"])
def test_a_file_that_nobody_signed_is_refused(
    kiln: Kiln, signed: Path, key: Path, name: str
) -> None:
    (signed / name).parent.mkdir(parents=True, exist_ok=True)
    (signed / name).write_text("x")
    ended = kiln("verify", signed, "--trust", f"{key}.pub")
    assert ended.code == 12
    assert f"{Path(name)} in {signed} isn't signed: remove it" in ended.sentence


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_link_to_a_folder_is_refused(kiln: Kiln, signed: Path, key: Path) -> None:
    (signed / "more").symlink_to(signed / "unet")
    assert kiln("verify", signed, "--trust", f"{key}.pub").code == 12


def test_what_is_no_bundle_is_wrong_input(kiln: Kiln, tmp_path: Path, key: Path) -> None:
    assert kiln("verify", tmp_path, "--trust", f"{key}.pub").code == 2
    assert kiln("verify", tmp_path, "--trust", tmp_path / "absent").code == 2


def test_generate_refuses_what_nobody_trusted_has_signed(
    kiln: Kiln, signed: Path, tmp_path: Path
) -> None:
    (signed / "local.mark").unlink()
    ended = kiln("generate", signed, "--prompt", "x", "-o", tmp_path / "x.png")
    assert ended.code == 11
    assert "kiln trust add NAME.pub" in ended.sentence
    assert "--trust NAME.pub" in ended.sentence


def test_generate_takes_the_trust_that_is_given(
    kiln: Kiln, signed: Path, key: Path, tmp_path: Path
) -> None:
    """A later check fails, so the first has passed: nothing of a toy bundle can run."""
    (signed / "local.mark").unlink()
    (signed / "unet" / "weights.bin").write_bytes(b"x")
    options = ("--prompt", "x", "-o", tmp_path / "x.png", "--trust", f"{key}.pub")
    ended = kiln("generate", signed, *options)
    assert ended.code == 12
    assert "unet/weights.bin" in ended.sentence


def test_damage_is_found_before_any_heavy_library_is_loaded(signed: Path, tmp_path: Path) -> None:
    """An engine, a config, a tokenizer's and the scheduler's file, and the manifest, in turn."""
    names = [
        *("unet/weights.bin", "unet/component.json", "tokenizer/vocab.json"),
        *("scheduler/scheduler_config.json", "manifest.json"),
    ]
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from runners.cli import main\n"
        "bundle, out, *names = sys.argv[1:]\n"
        "for name in names:\n"
        "    path = Path(bundle, name)\n"
        "    right = path.read_bytes()\n"
        "    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))\n"
        "    try:\n"
        "        main(['generate', bundle, '--prompt', 'x', '-o', out])\n"
        "    except SystemExit as ended:\n"
        "        print(ended.code)\n"
        "    path.write_bytes(right)\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, signed, tmp_path / "x.png", *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.stdout.split("\n") == [*["12"] * len(names), "[]", ""], child.stderr
