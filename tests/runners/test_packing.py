"""A packed folder is what registry tools read, the same bytes every time, each file once."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from profiles.errors import BundleError, SpecError
from runners.console import Console
from runners.packing import pack_folder, pack_layout
from tests.shipments import Shop, files_of

Kiln = Callable[..., Any]


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def index_of(out: Path) -> dict[str, Any]:
    document = json.loads((out / "index.json").read_bytes())
    assert isinstance(document, dict)
    return document


def image_of(out: Path, name: str) -> dict[str, Any]:
    [entry] = [
        one
        for one in index_of(out)["manifests"]
        if one["annotations"]["org.opencontainers.image.ref.name"] == name
    ]
    document = json.loads(
        (out / "blobs/sha256" / entry["digest"].removeprefix("sha256:")).read_bytes()
    )
    assert isinstance(document, dict)
    return document


def test_a_layout_has_what_oci_and_modelpack_ask_for(shop: Shop) -> None:
    bundle = shop.toy()
    shop.pack(bundle)
    assert json.loads((shop.out / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    [entry] = index_of(shop.out)["manifests"]
    assert entry["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    image = image_of(shop.out, "toy")
    assert image["schemaVersion"] == 2
    assert image["mediaType"] == entry["mediaType"]
    assert image["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert image["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    for layer in image["layers"]:
        path = layer["annotations"]["org.cncf.model.filepath"]
        raw = (shop.out / "blobs/sha256" / layer["digest"].removeprefix("sha256:")).read_bytes()
        assert len(raw) == layer["size"]
        if path != "signature.json":
            assert raw == (bundle / path).read_bytes()
        kind = "weight.v1.raw" if path.endswith(".bin") else "weight.config.v1.raw"
        assert layer["mediaType"] == f"application/vnd.cncf.model.{kind}"
    config = image["config"]["digest"].removeprefix("sha256:")
    described = json.loads((shop.out / "blobs/sha256" / config).read_bytes())
    assert set(described) == {"descriptor", "modelfs", "config"}
    assert described["descriptor"]["name"] == "toy"
    assert described["modelfs"]["diffIds"] == [layer["digest"] for layer in image["layers"]]


def test_every_file_of_the_bundle_is_a_layer_but_the_local_mark(shop: Shop) -> None:
    bundle = shop.toy()
    shop.pack(bundle)
    paths = {
        one["annotations"]["org.cncf.model.filepath"] for one in image_of(shop.out, "toy")["layers"]
    }
    assert "local.mark" in files_of(bundle)
    assert paths == {*files_of(bundle), "signature.json"} - {"local.mark"}


def test_every_blob_is_named_by_its_digest_and_nothing_else_lies_there(shop: Shop) -> None:
    shop.pack(shop.toy())
    for name, raw in files_of(shop.out).items():
        if name.startswith("blobs/"):
            assert name == f"blobs/sha256/{hashlib.sha256(raw).hexdigest()}"
        else:
            assert name in {"oci-layout", "index.json"}


def test_packing_twice_and_elsewhere_gives_the_same_bytes(shop: Shop, tmp_path: Path) -> None:
    bundle = shop.toy()
    shop.pack(bundle)
    first = files_of(shop.out)
    assert shop.pack(bundle).written == 0
    assert files_of(shop.out) == first
    moved = shutil.copytree(bundle, tmp_path / "moved" / "elsewhere")
    pack_layout(moved, tmp_path / "second", Console(), key=shop.key, name="toy")
    assert files_of(tmp_path / "second") == first


def test_what_bundles_share_is_stored_once(shop: Shop) -> None:
    first = shop.pack(shop.toy(size=5000), "one")
    second = shop.pack(shop.toy("other", size=5000, seed=1), "two")
    assert [one["annotations"] for one in index_of(shop.out)["manifests"]] == [
        {"org.opencontainers.image.ref.name": "one"},
        {"org.opencontainers.image.ref.name": "two"},
    ]
    assert first.bytes == second.bytes > 20_000
    changed = 5000 + sum(
        len(raw)
        for name, raw in files_of(shop.folder / "bundles/other").items()
        if "manifest" in name
    )
    signature = next(
        one["size"]
        for one in image_of(shop.out, "two")["layers"]
        if one["annotations"]["org.cncf.model.filepath"] == "signature.json"
    )
    assert second.written == changed + signature


def test_the_same_name_is_replaced(shop: Shop) -> None:
    shop.pack(shop.toy())
    shop.pack(shop.toy("new", seed=1))
    [entry] = index_of(shop.out)["manifests"]
    assert image_of(shop.out, "toy")["layers"]
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": "toy"}


def test_a_damaged_blob_is_packed_again(shop: Shop) -> None:
    bundle = shop.toy()
    shop.pack(bundle)
    right = files_of(shop.out)
    for path in (shop.out / "blobs/sha256").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    shop.pack(bundle)
    assert files_of(shop.out) == right


@pytest.mark.parametrize("kind", ["oci", "folder"])
@pytest.mark.parametrize("spoil", ["flip", "shorten", "extend", "remove"])
def test_a_damaged_bundle_is_not_packed(shop: Shop, kind: str, spoil: str) -> None:
    bundle = shop.toy()
    path = bundle / "unet" / "weights.bin"
    raw = path.read_bytes()
    new = {"flip": b"x" + raw[1:], "shorten": raw[:-1], "extend": raw + b"x"}.get(spoil)
    path.unlink() if new is None else path.write_bytes(new)
    pack = {
        "oci": lambda: shop.pack(bundle),
        "folder": lambda: pack_folder(bundle, shop.out, Console(), key=shop.key),
    }[kind]
    with pytest.raises(BundleError, match=r"unet/weights\.bin.*again"):
        pack()
    assert not (shop.out / "index.json").exists()
    assert not list(shop.folder.rglob("*.kiln-part"))


def test_a_plain_folder_is_the_bundle_with_its_signature(shop: Shop) -> None:
    bundle = shop.toy()
    pack_folder(bundle, shop.out, Console(), key=shop.key)
    there, wanted = files_of(shop.out), files_of(bundle)
    del wanted["local.mark"]
    assert json.loads(there.pop("signature.json"))["mediaType"].startswith(
        "application/vnd.dev.sig"
    )
    assert there == wanted
    assert not (shop.out / "unet/weights.bin").samefile(bundle / "unet/weights.bin")
    with pytest.raises(SpecError, match="is taken: give a new folder"):
        pack_folder(bundle, shop.out, Console(), key=shop.key)


def test_without_a_key_the_bundles_own_signature_goes_along(shop: Shop, tmp_path: Path) -> None:
    pack_folder(shop.toy(), tmp_path / "signed", Console(), key=shop.key)
    assert pack_layout(tmp_path / "signed", shop.out, Console()).signed
    assert shop.install().name == "signed"


def test_the_command_says_that_an_unsigned_bundle_cannot_be_installed(
    kiln: Kiln, shop: Shop
) -> None:
    ended = kiln("pack", shop.toy(), "-o", shop.out)
    assert (ended.code, ended.out) == (0, f"{shop.out}\n")
    assert ended.sentence == "It isn't signed, so nobody can install it: pack it with --key NAME."
    refused = kiln("install", shop.out, "--trust", shop.public, "--to", shop.root)
    assert refused.code == 11
    assert "isn't signed: pack it with --key NAME" in refused.sentence
    assert not shop.root.exists()


def test_the_command_prints_one_json_line(kiln: Kiln, shop: Shop) -> None:
    ended = kiln("pack", shop.toy(), "-o", shop.out, "--key", shop.key, "--json")
    document = json.loads(ended.out)
    assert document["signed"] is True
    assert re.fullmatch("sha256:[0-9a-f]{64}", document["digest"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda out: out.write_text("x"), "is a file: give the folder"),
        (lambda out: (out.mkdir(), (out / "mine.txt").write_text("x")), "holds other files"),
    ],
    ids=["file", "other files"],
)
def test_an_output_that_is_something_else_is_refused(
    kiln: Kiln, shop: Shop, make: Callable[[Path], object], words: str
) -> None:
    bundle = shop.toy()
    make(shop.out)
    before = files_of(shop.folder)
    ended = kiln("pack", bundle, "-o", shop.out, "--key", shop.key)
    assert ended.code == 2
    assert words in ended.sentence
    assert files_of(shop.folder) == before


def test_what_is_no_bundle_is_refused(kiln: Kiln, shop: Shop) -> None:
    ended = kiln("pack", shop.folder / "nothing", "-o", shop.out)
    assert ended.code == 2
    assert "is not a bundle" in ended.sentence
    ended = kiln("pack", shop.toy(), "-o", shop.out, "--format", "folder", "--name", "x")
    assert ended.code == 2
    assert "--name is for `--format oci`" in ended.sentence


def other_key(tmp_path: Path) -> Path:
    (tmp_path / "other").mkdir()
    return Shop(tmp_path / "other").public


def test_verify_reads_a_packed_folder(kiln: Kiln, shop: Shop, tmp_path: Path) -> None:
    shop.pack(shop.toy(), "one")
    shop.pack(shop.toy("other", seed=1), "two")
    ended = kiln("verify", shop.out, "--trust", shop.public)
    assert ended.code == 0
    assert [line.split(" ")[0] for line in ended.out.splitlines()] == ["one", "two"]
    assert kiln("verify", shop.out, "--trust", other_key(tmp_path)).code == 11


def test_verify_finds_any_wrong_byte_of_a_packed_folder(kiln: Kiln, shop: Shop) -> None:
    shop.pack(shop.toy())
    config = image_of(shop.out, "toy")["config"]["digest"].removeprefix("sha256:")
    spoiled = 0
    for path in sorted((shop.out / "blobs/sha256").iterdir()):
        if path.name == config:  # a description for registries, which nobody here reads
            continue
        right = path.read_bytes()
        for wrong in (bytes([right[0] ^ 1]) + right[1:], right[:-1], right + b" "):
            path.write_bytes(wrong)
            assert kiln("verify", shop.out, "--trust", shop.public).code == 12, path
            spoiled += 1
        path.write_bytes(right)
    assert spoiled >= 30
    assert kiln("verify", shop.out, "--trust", shop.public).code == 0
