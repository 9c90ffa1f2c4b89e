"""What is wrong with a bundle is found before anything of it is loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from profiles.errors import BundleError, SpecError, UnsupportedError, UntrustedError
from runners.bundle import Bundle, open_bundle, read_manifest
from runners.manifest import SCHEMA, Manifest
from runners.manifest_file import bundle_digests, read_raw
from runners.mark import mark_bundle
from tests.toy_bundle import toy_bundle

Kiln = Callable[..., Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_bundle(tmp_path_factory.mktemp("bundles") / "toy")


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def rewrite(folder: Path, raw: bytes) -> None:
    """Give the bundle another manifest, with its right digest and mark."""
    (folder / "manifest.json").write_bytes(raw)
    digest = hashlib.sha256(raw).hexdigest()
    (folder / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
    mark_bundle(folder)


def change(folder: Path, **fields: Any) -> None:
    document = json.loads((folder / "manifest.json").read_bytes())
    rewrite(folder, json.dumps({**document, **fields}).encode())


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flips(folder: Path) -> Iterator[Path]:
    """Every file of the bundle but the mark in turn, with one bit of one byte flipped."""
    for path in files_of(folder):
        if path.name == "local.mark":
            continue
        right = path.read_bytes()
        position = len(right) // 2
        path.write_bytes(right[:position] + bytes([right[position] ^ 1]) + right[position + 1 :])
        yield path
        path.write_bytes(right)


def test_every_file_but_the_manifests_own_is_in_it(original: Path) -> None:
    names = {path.relative_to(original).as_posix() for path in files_of(original)}
    assert names - {"local.mark", "manifest.json", "manifest.sha256"} == set(
        read_manifest(original).files
    )


def test_one_flipped_byte_in_any_file_ends_generate_with_12(
    kiln: Kiln, copy: Path, tmp_path: Path
) -> None:
    flipped = 0
    for path in flips(copy):
        ended = kiln("generate", copy, "--prompt", "x", "--steps", "1", "-o", tmp_path / "x.png")
        assert ended.code == 12, path
        name = "manifest.json" if path.name == "manifest.sha256" else path.name
        assert name in ended.sentence
        assert "copy or compile it again" in ended.sentence
        assert not (tmp_path / "x.png").exists()
        flipped += 1
    assert flipped == len(files_of(copy)) - 1 > 10
    open_bundle(copy)


def test_the_callers_check_comes_after_trust_and_before_any_file(copy: Path) -> None:
    def refuse(manifest: Manifest) -> None:
        raise UnsupportedError(f"{manifest.model.name} can't run here: get another.")

    (copy / "unet" / "weights.bin").unlink()
    with pytest.raises(UnsupportedError, match="toy can't run here"):
        open_bundle(copy, check=refuse)
    (copy / "local.mark").unlink()
    with pytest.raises(UntrustedError, match="isn't signed"):
        open_bundle(copy, check=refuse)


@pytest.mark.parametrize("name", ["signature.json", "local.mark", ".git/x", "manifest.json"])
def test_a_bundles_own_files_cant_be_listed_as_its_content(original: Path, name: str) -> None:
    found, manifest = read_raw(original), read_manifest(original)
    entry = next(iter(manifest.files.values()))
    changed = manifest.model_copy(update={"files": {**manifest.files, name: entry}})
    with pytest.raises(BundleError, match="can't be a bundle's file"):
        bundle_digests(found, changed)


def test_a_flip_of_any_byte_of_the_manifests_digest_is_found(copy: Path) -> None:
    path = copy / "manifest.sha256"
    right = path.read_bytes()
    for position in range(len(right)):
        wrong = bytearray(right)
        wrong[position] ^= 1
        path.write_bytes(wrong)
        with pytest.raises(BundleError, match="copy or compile it again"):
            read_manifest(copy)


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def extended(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [shortened, extended, emptied, Path.unlink])
@pytest.mark.parametrize("name", ["unet/weights.bin", "tokenizer/vocab.json"])
def test_a_file_of_another_size_or_none_is_found(
    copy: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    spoil(copy / name)
    with pytest.raises(BundleError) as caught:
        open_bundle(copy)
    assert str(caught.value).startswith(f"{name} in {copy} ")
    assert "copy or compile it again" in str(caught.value)


def test_a_folder_in_the_place_of_a_file_is_found(copy: Path) -> None:
    (copy / "unet" / "weights.bin").unlink()
    (copy / "unet" / "weights.bin").mkdir()
    with pytest.raises(BundleError, match="can't be read"):
        open_bundle(copy)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"0" * 64 + b"  manifest.json\n"])
def test_a_missing_or_wrong_digest_of_the_manifest_is_found(
    copy: Path, content: bytes | None
) -> None:
    (copy / "manifest.sha256").unlink()
    if content is not None:
        (copy / "manifest.sha256").write_bytes(content)
    with pytest.raises(BundleError, match=r"doesn't match manifest\.sha256"):
        read_manifest(copy)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"comment": "x"}, "is wrong at comment"),
        ({"key": None}, "is wrong at key"),
        ({"schema_version": "new"}, "is wrong at schema_version"),
        ({"files": {"../x": {"size": 0, "sha256": "0" * 64}}}, "not a plain relative path"),
        ({"files": {"/etc/x": {"size": 0, "sha256": "0" * 64}}}, "not a plain relative path"),
        ({"files": {"C:\\x": {"size": 0, "sha256": "0" * 64}}}, "not a plain relative path"),
        ({"files": {"unet/nul": {"size": 0, "sha256": "0" * 64}}}, "not a plain relative path"),
        ({"components": []}, "one denoiser"),
        ({"recipe": {"size_min": 32, "batch": 1}}, "size_max must be a whole number"),
        ({"size_step": 0}, "is wrong at size_step"),
        ({"size_step": "8"}, "is wrong at size_step"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_manifest_that_is_not_as_it_must_be_is_refused(
    copy: Path, fields: dict[str, Any], words: str
) -> None:
    change(copy, **fields)
    with pytest.raises(BundleError) as caught:
        read_manifest(copy)
    assert words in str(caught.value)
    assert "compile the bundle again" in str(caught.value)


def test_a_component_whose_file_has_no_digest_is_refused(copy: Path) -> None:
    document = json.loads((copy / "manifest.json").read_bytes())
    del document["files"]["unet/weights.bin"]
    rewrite(copy, json.dumps(document).encode())
    with pytest.raises(BundleError, match=r"unet/weights\.bin"):
        read_manifest(copy)


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"",
        b"[]",
        b"null",
        b"\xff",
        b'{"key": "a", "key": "b"}',
        b'{"a": NaN}',
        b"[" * 100_000,
    ],
)
def test_a_manifest_that_is_no_proper_json_is_refused(copy: Path, raw: bytes) -> None:
    rewrite(copy, raw)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        read_manifest(copy)


def test_a_key_that_stands_twice_is_named_as_such(copy: Path) -> None:
    raw = (copy / "manifest.json").read_text("utf-8")
    rewrite(copy, raw.replace('"size_step"', '"native_size": 8, "size_step"', 1).encode())
    with pytest.raises(BundleError, match="a key stands twice"):
        read_manifest(copy)


def test_a_newer_schema_is_incompatible_not_corrupt(kiln: Kiln, copy: Path) -> None:
    change(copy, schema_version=SCHEMA + 1, something_new=True)
    with pytest.raises(UnsupportedError, match="pip install -U kiln-diffusion"):
        open_bundle(copy)
    ended = kiln("inspect", copy)
    assert ended.code == 10
    assert f"schema {SCHEMA + 1} and this kiln reads up to {SCHEMA}" in ended.sentence


@pytest.mark.parametrize("what", ["absent", "empty", "file"])
def test_what_is_no_bundle_names_the_command_that_makes_one(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    elif what == "file":
        path.write_text("x")
    with pytest.raises(SpecError) as caught:
        open_bundle(path)
    assert (
        f"is not a bundle (it has no manifest.json): make one with `kiln compile MODEL -o {path}`"
        in str(caught.value)
    )


def test_a_file_is_the_same_mapping_every_time(original: Path) -> None:
    bundle = open_bundle(original)
    assert bundle.file("unet/weights.bin") is bundle.file("unet/weights.bin")
    bundle.release()
    assert bundle.file("unet/weights.bin") is not None


def test_a_change_after_opening_does_not_reach_what_was_verified(copy: Path) -> None:
    """Small files are read from the mapping; a file that is replaced leaves it as it was."""
    bundle = open_bundle(copy)
    name = "scheduler/scheduler_config.json"
    right = bundle.json(name)
    (copy / name).unlink()
    (copy / name).write_text("{}")
    assert bundle.json(name) == right


def test_a_private_folder_holds_the_verified_files_and_goes(original: Path) -> None:
    bundle = Bundle(original, read_manifest(original))
    with bundle.folder("tokenizer") as folder:
        names = {path.name for path in folder.iterdir()}
        assert names == {path.name for path in (original / "tokenizer").iterdir()}
    assert not folder.exists()
