"""`kiln selftest`: in a child, so that a crashing engine is one sentence; a failure is kept."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizer.calls import Call, save_calls
from optimizer.digests import sha256_file
from profiles.errors import BundleError, DeviceMismatch, SelfTestError, SpecError
from runners.bundle import Bundle, open_bundle, read_manifest
from runners.manifest import FileEntry
from runners.selftest import facts_for, require_passed, result_paths
from runners.selftest_command import SelfTest, run_selftest
from runners.signature import Signature, TensorSpec
from tests.toy_bundle import toy_bundle

Kiln = Callable[..., Any]
MakeBundle = Callable[..., Path]
DIES = "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"
CHILD = (sys.executable, "-m", "tests.toy_engine")
"""The real child, with a toy's engine in a backend's place."""


def recorded(folder: Path, weights: bytes = b"right", **changed: Any) -> Path:
    """A toy bundle whose denoiser has one recorded call, and these weights."""
    plain = read_manifest(toy_bundle(folder))
    x = np.arange(6, dtype=np.float32)
    save_calls({"smallest": Call((x,), (2 * x,))}, folder / "unet" / "selftest.safetensors")
    (folder / "unet" / "weights.bin").write_bytes(weights)
    files = dict(plain.files)
    for name in ("unet/selftest.safetensors", "unet/weights.bin"):
        path = folder / name
        files[name] = FileEntry(size=path.stat().st_size, sha256=sha256_file(path))
    update = {
        "selftest": "unet/selftest.safetensors",
        "selftest_db": 40.0,
        "signature": Signature(
            inputs=(TensorSpec(name="x", dtype="float32", axes=(6,)),),
            outputs=(TensorSpec(name="y", dtype="float32", axes=(6,)),),
        ),
        **changed,
    }
    components = tuple(
        entry.model_copy(update=update) if entry.name == "unet" else entry
        for entry in plain.components
    )
    raw = tuple(entry.model_dump() for entry in components)
    _write_toy(folder, components=raw, files=files)
    return folder


def _write_toy(folder: Path, **fields: Any) -> None:
    """Another manifest for the files that are there."""
    from runners.bundle import DIGEST_NAME, MANIFEST_NAME, digest_line
    from runners.manifest import Manifest
    from runners.mark import mark_bundle

    given = {**read_manifest(folder).model_dump(), **fields}
    manifest = Manifest.model_validate(given)
    raw = json.dumps(manifest.model_dump(mode="json")).encode()
    (folder / MANIFEST_NAME).write_bytes(raw)
    (folder / DIGEST_NAME).write_bytes(digest_line(raw))
    mark_bundle(folder)


def require_here(folder: Path) -> None:
    bundle = Bundle(folder, read_manifest(folder))
    require_passed(bundle, facts_for(bundle.manifest))


def test_right_engines_pass_and_what_they_reached_is_kept(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "toy")
    tested = run_selftest(folder, child=CHILD)
    assert tested.rows == [
        {"name": "unet", "machine": "this processor", "db": {"smallest": 200.0}, "needed_db": 40.0}
    ]
    beside = json.loads((tmp_path / "toy.selftest.json").read_text())
    assert beside["passed"]["unet on this processor"]["sqnr_db"] == {"smallest": 200.0}
    require_here(folder)


def test_a_wrong_engine_fails_and_is_not_loaded_until_it_passes(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "toy", b"wrong")
    with pytest.raises(SelfTestError) as caught:
        run_selftest(folder, child=CHILD)
    assert caught.value.exit_code == 18
    assert "The engine of unet has 20.0 dB SQNR to fp32 where 40.0 are needed: install the" in str(
        caught.value
    )
    with pytest.raises(SelfTestError, match="failed here, so it isn't run; The engine of unet"):
        require_here(folder)
    recorded(folder)  # other bytes under the same name are another bundle
    require_here(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="the toy dies by a signal")
def test_a_crash_is_one_sentence_that_names_engine_and_signal(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "toy", b"crash")
    with pytest.raises(SelfTestError) as caught:
        run_selftest(folder, child=CHILD)
    assert str(caught.value) == (
        "The engine of unet crashed the process that tested it (SIGSEGV): update the driver and "
        "the libraries, or compile the bundle again."
    )
    with pytest.raises(SelfTestError, match="SIGSEGV"):
        require_here(folder)


def test_what_a_library_raises_is_one_sentence(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "toy", b"cannot open")
    with pytest.raises(SelfTestError) as caught:
        run_selftest(folder, child=CHILD)
    assert str(caught.value) == (
        "The engine of unet can't be tested: it ended with RuntimeError: no kernel for this; "
        "update the libraries, or compile the bundle again."
    )


def test_a_wrong_byte_is_no_failed_test(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "toy")
    (folder / "unet" / "weights.bin").write_bytes(b"Right")
    with pytest.raises(BundleError, match="digest differs"):
        run_selftest(folder, child=CHILD)
    assert not (tmp_path / "toy.selftest.json").exists()


def test_another_machines_bundle_is_no_failed_test(tmp_path: Path) -> None:
    requires = read_manifest(toy_bundle(tmp_path / "plain")).components[0].requires
    foreign = requires.model_copy(update={"machines": ("sparc",)})
    folder = recorded(tmp_path / "toy", requires=foreign)
    with pytest.raises(DeviceMismatch, match="sparc"):
        run_selftest(folder, child=CHILD)
    assert not any(path.exists() for path in result_paths(Bundle(folder, read_manifest(folder))))


def test_nothing_recorded_is_said(tmp_path: Path, kiln: Kiln) -> None:
    folder = toy_bundle(tmp_path / "toy")
    with pytest.raises(SpecError, match="nothing recorded to test it with: compile it again"):
        run_selftest(folder, child=CHILD)
    assert kiln("selftest", folder).code == 2


def test_a_child_that_cannot_start_says_nothing_about_the_bundle(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "toy")
    with pytest.raises(SelfTestError, match=r"couldn't start \(exit code 3: no such thing\)"):
        run_selftest(folder, child=(sys.executable, "-c", DIES))
    require_here(folder)


def test_another_driver_may_try_again(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "toy", b"wrong")
    with pytest.raises(SelfTestError):
        run_selftest(folder, child=CHILD)
    bundle = Bundle(folder, read_manifest(folder))
    facts = facts_for(bundle.manifest)
    with pytest.raises(SelfTestError):
        require_passed(bundle, facts)
    require_passed(bundle, facts.model_copy(update={"driver": "599.99"}))


def test_a_picture_that_is_too_different_fails() -> None:
    row = {"name": "picture", "machine": "", "db": {"psnr": 12.0}, "needed_db": 25.0}
    assert str(SelfTest(rows=[row]).failure).startswith(
        "The picture has 12.0 dB PSNR to the recorded one where 25.0 are needed: "
    )
    assert SelfTest(rows=[{**row, "db": {"psnr": 26.0}}]).failure is None


def test_a_compiled_bundle_passes_by_its_engines_and_its_picture(
    kiln: Kiln, bundle: MakeBundle, tmp_path: Path
) -> None:
    """And one with another picture in it doesn't, nor is it then drawn with."""
    from PIL import Image

    folder = Path(shutil.copytree(bundle("openvino"), tmp_path / "bundle"))
    manifest = open_bundle(folder).manifest
    assert manifest.picture is not None
    assert manifest.observed.build_seconds > 0
    assert manifest.component("denoiser").requires.library.rule == "minimum"
    recorded_bytes = sum(manifest.files[str(entry.selftest)].size for entry in manifest.components)
    assert recorded_bytes + manifest.files[manifest.picture.file].size < 4_000_000
    ended = kiln("selftest", folder, "--json")
    assert ended.code == 0, ended.err
    rows = {row["name"]: row for row in json.loads(ended.out)["tests"]}
    assert rows.keys() == {*(entry.name for entry in manifest.components), "picture"}
    assert rows["picture"]["db"]["psnr"] >= 40, "the same machine draws it"
    path = folder / manifest.picture.file
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).point(lambda v: 255 - v).save(path)
    entry = FileEntry(size=path.stat().st_size, sha256=sha256_file(path))
    _write_toy(folder, files={**manifest.files, manifest.picture.file: entry})
    ended = kiln("selftest", folder)
    assert ended.code == 18
    assert "The picture has " in ended.sentence
    drawn = kiln("generate", folder, "--prompt", "x", "--steps", "1", "-o", tmp_path / "x.png")
    assert drawn.code == 18
    assert "tries again" in drawn.sentence
