"""No path in a bundle leads outside of its folder, or means another file on another system."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from profiles.errors import BundleError, KilnError, SpecError
from runners.paths import plain_path, require_distinct
from tests.shipments import Shop, files_of, write_layout

TRAVERSAL = [
    *("..", ".", "", "/", "../x", "../../x", "a/../x", "a/..", "a/../../x", "a/b/../../../x"),
    *("./x", "a/./x", "a/.", "a//x", "a/", "//x", "x/../../../../etc/passwd", "unet/../../x"),
    *("..\\x", "a\\..\\..\\x", "..\\..\\x", "a/..\\x", "\\..\\x", "%2e%2e\\x", "...", ".. /x"),
    *("../", "..//x", ".../../x", "a/.../x", "../root/toy/current.json", "../current.json"),
]
ABSOLUTE = [
    *("/etc/passwd", "/tmp/x", "//etc/passwd", "///x", "/../x", "/dev/null", "/proc/self/mem"),
    *("\\x", "\\\\x", "/", "~/../x", "file:///etc/passwd", "http://host/x"),
]
WINDOWS = [
    *("C:\\x", "C:/x", "C:x", "c:", "Z:\\..\\x", "\\\\host\\share\\x", "//host/share\\x"),
    *("\\\\?\\C:\\x", "\\\\.\\PhysicalDrive0", "\\??\\C:\\x", "x:stream", "unet:$DATA"),
    *("unet/x::$DATA", "a?b", "a*b", 'a"b', "a<b", "a>b", "a|b", "a\\b"),
]
RESERVED = [
    *("con", "CON", "prn", "aux", "nul", "NUL", "Nul.txt", "aux.tar.gz", "unet/con", "con/x"),
    *("com0", "com1", "COM9.bin", "lpt1", "LPT9", "com¹", "lpt².x", "COM³", "conin$", "CONOUT$"),
    *("nul .txt", "unet/nul.weights.bin", "prn./x"),
]
TRAILING = ["a.", "a ", "a./x", "a /x", "x/a..", "x/a. .", "unet /weights.bin", "a . "]
SHORT = ["MANIFE~1.JSO", "manife~1.jso", "unet/WEIGHT~1.BIN", "UNET~1/weights.bin", "SIGNAT~2.JSO"]
UNSEEN = [
    *("a\0b", "a\0/../x", "\0", "x\n", "a\rb", "a\tb", "a\x1bb", "a\x7fb", "a\x85b", "x\x00.bin"),
    *("a\u200bb", "a\u202eb", "a\ufeffb", "a\u200db", "a\u2028b", "a\u2029b", "a\u00adb"),
    *("a\ud800b", "\udfff", "a\u2066b"),
]
UNICODE = ["e\u0301", "unet/cafe\u0301.bin", "A\u030a", "\u212b", "\u1100\u1161", "\u2126"]
TOO_MUCH = ["a/" * 12 + "x", "a/" * 200 + "x", "x" * 181, "ä" * 128, "d" * 90 + "/" + "e" * 90]
OWN = ["local.mark", "signature.json", ".git/hooks/x", ".gitattributes", "local.mark/x"]
OWN_MANIFEST = ["manifest.json/x", "Manifest.json", "MANIFEST.SHA256", "Signature.JSON"]
COLLISIONS = [
    *("unet/Weights.bin", "UNET/weights.bin", "Unet/x", "unet/WEIGHTS.BIN", "tokenizer/Vocab.json"),
    *("unet", "unet/weights.bin/x", "Tokenizer", "unet/weights.bin/component.json"),
    *(
        "unet/\uff57eights.bin",
        "\uff55net/x",
        "unet/weight\u017f.bin",
        "unet/weights\u2024bin",
        "scheduler",
    ),
]
SINGLE = [
    *TRAVERSAL,
    *ABSOLUTE,
    *WINDOWS,
    *RESERVED,
    *TRAILING,
    *SHORT,
    *UNSEEN,
    *UNICODE,
    *TOO_MUCH,
]
ALL = [*SINGLE, *OWN, *OWN_MANIFEST, *COLLISIONS]


def test_there_are_enough_of_them() -> None:
    assert len(set(ALL)) >= 120


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    shop = Shop(tmp_path_factory.mktemp("hostile"))
    shop.toy()
    (shop.folder / "outside").write_text("mine")
    return shop


@pytest.mark.parametrize("path", SINGLE, ids=ascii)
def test_the_rule_itself_refuses_what_is_wrong_with_one_path(path: str) -> None:
    with pytest.raises(ValueError, match="is not a plain relative path"):
        plain_path(path)


@pytest.mark.parametrize("path", ["a", "unet/weights.bin", ".a", "a~b", "ä/é.bin", "a b", "con1"])
def test_the_rule_takes_plain_paths(path: str) -> None:
    assert plain_path(path) == path


def test_paths_that_differ_everywhere_are_distinct() -> None:
    require_distinct(["a/b", "a/c", "d", "unet/b", "e/a/b"])


@pytest.mark.parametrize("path", ALL, ids=ascii)
def test_a_signed_bundle_with_such_a_path_is_refused(shop: Shop, path: str) -> None:
    """Signed by a trusted key, too: a key may be stolen, and its owner's tool be wrong."""
    out = shop.folder / "layout"
    write_layout(out, shop.folder / "bundles" / "toy", {path: b"theirs"}, shop.key)
    with pytest.raises(BundleError) as caught:
        shop.install(out)
    assert "\n" not in str(caught.value)
    assert not shop.root.exists()
    assert (shop.folder / "outside").read_text() == "mine"
    assert sorted(one.name for one in shop.folder.iterdir()) == NAMES


NAMES = ["bundles", "key", "key.pub", "layout", "outside"]


def test_the_same_bundle_with_a_plain_path_is_installed(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    write_layout(shop.out, shop.toy(), {"unet/extra.bin": b"theirs"}, shop.key)
    assert (shop.install().path / "unet" / "extra.bin").read_bytes() == b"theirs"


@pytest.mark.skipif(os.name != "posix", reason="makes links, pipes and devices")
@pytest.mark.parametrize(
    "kind", ["link", "link to a folder", "pipe", "device", "folder", "nothing"]
)
@pytest.mark.parametrize("packed", [True, False], ids=["layout", "folder"])
def test_what_is_no_plain_file_is_not_read(tmp_path: Path, kind: str, packed: bool) -> None:
    """A pipe would hang, a device never end, a link show another file of the machine."""
    shop = Shop(tmp_path)
    bundle = shop.toy()
    shop.pack(bundle)
    if packed:
        source = shop.out
        raw = (bundle / "unet" / "weights.bin").read_bytes()
        victim = shop.out / "blobs" / "sha256" / hashlib.sha256(raw).hexdigest()
    else:
        source = shop.install().path
        shop.root = tmp_path / "other"
        victim = source / "unet" / "weights.bin"
    put(kind, victim, tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(KilnError) as caught:
        shop.install(source)
    assert caught.value.exit_code == 12
    assert files_of(tmp_path) == before
    assert not list(tmp_path.glob("**/*.kiln-part"))


def put(kind: str, victim: Path, tmp_path: Path) -> None:
    """Something of another kind in the place of a file."""
    secret = tmp_path / "secret"
    victim.rename(secret)
    match kind:
        case "link":
            victim.symlink_to(secret)
        case "link to a folder":
            folder = tmp_path / "elsewhere"
            victim.parent.rename(folder)
            secret.rename(folder / victim.name)
            victim.parent.symlink_to(folder)
        case "pipe":
            getattr(os, "mkfifo")(victim)  # noqa: B009
        case "device":
            victim.symlink_to("/dev/zero")
        case "folder":
            victim.mkdir()


@pytest.mark.skipif(os.name != "posix", reason="makes links")
@pytest.mark.parametrize("kind", ["hard", "soft", "folder"])
def test_a_planted_part_of_an_earlier_try_is_not_written_through(tmp_path: Path, kind: str) -> None:
    """Who may write beside the target plants a link where an interrupted install would go on."""
    shop = Shop(tmp_path)
    bundle = shop.toy()
    shop.pack(bundle)
    version = shop.install().version
    path = shop.root / "toy" / version
    weights = (bundle / "unet" / "weights.bin").read_bytes()
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "weights.bin").write_bytes(weights[:10])
    for one in sorted(path.rglob("*"), reverse=True):
        one.unlink() if one.is_file() else one.rmdir()
    path.rmdir()
    from runners.private import private_folder

    with private_folder(path.parent, version, keep=lambda _: True) as private:
        part = private / "bundle" / "unet"
        part.parent.mkdir()
        if kind == "folder":
            part.symlink_to(victim)
        else:
            part.mkdir()
            if kind == "hard":
                os.link(victim / "weights.bin", part / "weights.bin")
            else:
                (part / "weights.bin").symlink_to(victim / "weights.bin")
        private.rename(private.with_name(private.name.replace(".kiln-part", ".kept")))
    for kept in path.parent.glob(".*.kept"):
        kept.rename(kept.with_name(kept.name.replace(".kept", ".kiln-part")))
    assert shop.install().path == path
    assert (path / "unet" / "weights.bin").read_bytes() == weights
    assert (victim / "weights.bin").read_bytes() == weights[:10]
    assert (path / "unet" / "weights.bin").stat().st_ino != (victim / "weights.bin").stat().st_ino


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_a_hard_link_in_a_source_is_copied_and_not_shared(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    shop.pack(shop.toy())
    first = shop.install().path
    shop.root = tmp_path / "other"
    os.link(first / "unet" / "weights.bin", tmp_path / "second name")
    path = shop.install(first, name="toy").path
    assert not (path / "unet" / "weights.bin").samefile(tmp_path / "second name")


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_a_name_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    shop.pack(shop.toy())
    (tmp_path / "elsewhere").mkdir()
    shop.root.mkdir()
    (shop.root / "toy").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SpecError, match="is a link, which isn't followed"):
        shop.install()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "C:x", "nul", "x" * 65, "ä", "a."])
def test_a_name_that_could_lead_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    shop = Shop(tmp_path)
    write_layout(shop.out, shop.toy(), {}, shop.key, name=name)
    with pytest.raises(SpecError, match=r"can't be a bundle's name.*with --name"):
        shop.install()
    assert not shop.root.exists()
    assert shop.install(name="toy").path.parent == shop.root / "toy"
