"""Installing: only what a trusted key signed, whole or not at all; updates, and the way back."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from profiles.errors import (
    BundleError,
    DiskFullError,
    KilnError,
    MissingError,
    SpecError,
    UnsupportedError,
    UntrustedError,
)
from runners import installing, writing
from runners.bundle import open_bundle
from runners.installed import located, read_pointer, roll_back, selftest_passed
from runners.manifest_file import read_manifest
from tests.shipments import Shop, files_of

Kiln = Callable[..., Any]


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


@pytest.fixture
def packed(shop: Shop) -> Shop:
    shop.pack(shop.toy(size=5000))
    return shop


@pytest.mark.usefixtures("way")
def test_an_installed_bundle_is_the_packed_one_and_opens(packed: Shop) -> None:
    result = packed.install()
    there, wanted = files_of(result.path), files_of(packed.folder / "bundles/toy")
    del there["signature.json"], wanted["local.mark"]
    assert there == wanted
    assert open_bundle(result.path, trust=packed.trust).manifest.model.name == "toy"
    assert result.path.parent == packed.root / "toy"
    assert result.path.name.startswith(read_manifest(result.path).key[:12])


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_installed_files_are_read_only(packed: Shop) -> None:
    path = packed.install().path
    assert {one.stat().st_mode & 0o777 for one in path.rglob("*") if one.is_file()} == {0o444}


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_work_in_progress_is_private(packed: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def publish(folder: Path, path: Path, *_: object) -> None:
        seen.append((folder.parent.stat().st_mode & 0o777, folder.parent.parent == path.parent))
        raise BundleError("stop")

    monkeypatch.setattr(installing, "_publish", publish)
    with pytest.raises(BundleError, match="stop"):
        packed.install()
    assert seen == [(0o700, True)]
    assert files_of(packed.root) == {}


def test_a_bundles_own_folder_is_a_source_too(packed: Shop, tmp_path: Path) -> None:
    first = packed.install()
    share = shutil.copytree(first.path, tmp_path / "share" / "fast")
    packed.root = tmp_path / "elsewhere"
    second = packed.install(share)
    assert (second.name, second.version) == ("fast", first.version)
    assert files_of(second.path) == files_of(first.path)


def test_the_same_again_fetches_nothing(packed: Shop) -> None:
    first, again = packed.install(), packed.install()
    assert (again.path, again.fetched) == (first.path, 0)


def test_a_damaged_installation_is_repaired(packed: Shop) -> None:
    path = packed.install().path
    right = files_of(path)
    victim = path / "unet/weights.bin"
    victim.chmod(0o644)
    victim.write_bytes(b"x" * 5000)
    (path / "unet/component.json").unlink()
    result = packed.install()
    assert files_of(path) == right
    assert 5000 <= result.fetched < result.bytes
    assert not list(packed.root.rglob("*.kiln-part"))


def test_an_unsigned_and_a_foreign_bundle_are_refused(packed: Shop, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Shop(tmp_path / "other")
    other.out = packed.out
    with pytest.raises(UntrustedError, match="signed with a key that isn't trusted here"):
        other.install()
    assert not other.root.exists()
    with pytest.raises(UntrustedError, match="isn't signed"):
        packed.install(packed.folder / "bundles/toy")
    assert not packed.root.exists()


@pytest.mark.usefixtures("way")
def test_every_wrong_byte_is_refused_and_nothing_is_left(packed: Shop) -> None:
    config = b'"modelfs"'
    refused = 0
    for path in sorted((packed.out / "blobs/sha256").iterdir()):
        right = path.read_bytes()
        for wrong in (right[:-1] + bytes([right[-1] ^ 1]), right[:-1], right + b"\0", b""):
            path.write_bytes(wrong)
            if config in right:
                continue
            with pytest.raises(BundleError):
                packed.install()
            assert files_of(packed.root) == {}
            refused += 1
        path.write_bytes(right)
    assert refused >= 40
    assert packed.install().fetched


@pytest.mark.usefixtures("way")
def test_swapped_blobs_are_refused(packed: Shop) -> None:
    blobs = sorted((packed.out / "blobs/sha256").iterdir(), key=lambda one: one.stat().st_size)
    same = [one for one in blobs if one.stat().st_size == 5000]
    assert len(same) == 4
    same[0].rename(packed.folder / "kept")
    same[1].rename(same[0])
    (packed.folder / "kept").rename(same[1])
    with pytest.raises(BundleError, match="other bytes than were signed"):
        packed.install()
    assert files_of(packed.root) == {}


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"schemaVersion": 2}'),
        *(b'{"schemaVersion": 1, "manifests": []}', b'{"schemaVersion": "2", "manifests": []}'),
        b'{"schemaVersion": 2, "manifests": [], "x": 1}',
        b'{"schemaVersion": 2, "schemaVersion": 2, "manifests": []}',
        b'{"schemaVersion": 2, "manifests": [{}]}',
    ],
    ids=lambda raw: ascii(raw[:40]),
)
def test_an_index_that_is_not_quite_right_is_refused(packed: Shop, raw: bytes) -> None:
    (packed.out / "index.json").write_bytes(raw)
    with pytest.raises(BundleError, match=r"index\.json of .* pack it again"):
        packed.install()


def test_of_several_bundles_one_is_named(kiln: Kiln, shop: Shop) -> None:
    shop.pack(shop.toy(), "one")
    shop.pack(shop.toy("other", seed=1), "two")
    arguments = ("install", shop.out, "--trust", shop.public, "--to", shop.root)
    ended = kiln(*arguments)
    assert ended.code == 2
    assert ended.sentence.endswith("holds one, two: name one bundle with --only.")
    ended = kiln(*arguments, "--only", "three")
    assert ended.code == 2
    assert ended.sentence.endswith("has no bundle for 'three': it holds one, two.")
    ended = kiln(*arguments, "--only", "two")
    assert ended.code == 0
    assert Path(ended.out.strip()).parent == shop.root / "two"


def for_cards(shop: Shop, name: str, capabilities: tuple[str, ...], seed: int) -> Path:
    """A toy bundle whose denoiser was built for cards."""
    bundle = shop.toy(name, seed=seed)
    parts = read_manifest(bundle).components
    built = tuple(
        one.model_copy(
            update={"requires": one.requires.model_copy(update={"capabilities": capabilities})}
        )
        if one.role == "denoiser"
        else one
        for one in parts
    )
    return shop.toy(name, seed=seed, components=built)


def test_a_bundle_is_chosen_by_what_it_was_built_for(shop: Shop) -> None:
    shop.pack(shop.toy(), "processor")
    shop.pack(for_cards(shop, "older", ("8.6", "8.9"), 1), "older")
    shop.pack(for_cards(shop, "newer", ("12.0",), 2), "newer")
    for only, name in {
        "sm86": "older",
        "rtx-4090": "older",
        "sm86,sm89": "older",
        "sm120": "newer",
        "cpu": "processor",
    }.items():
        assert shop.install(only=only).name == name
    with pytest.raises(SpecError, match="has no bundle for 'sm75'"):
        shop.install(only="sm75")


def test_a_bundle_for_other_machines_is_installed_with_a_warning(kiln: Kiln, shop: Shop) -> None:
    from profiles.facts import read_facts

    if read_facts(ask_driver=True).cards:
        pytest.skip("there is a card")
    shop.pack(for_cards(shop, "older", ("8.6",), 1), "older")
    shop.pack(shop.toy("fits", seed=2), "fits")
    arguments = ("install", shop.out, "--trust", shop.public, "--to", shop.root, "--only")
    ended = kiln(*arguments, "older")
    assert ended.code == 0
    assert "Warning: older won't run on this machine. " in ended.err
    assert "Warning" not in kiln(*arguments, "fits").err


def test_a_wrong_listing_does_not_choose(shop: Shop) -> None:
    """The index isn't signed; the manifest is."""
    shop.pack(for_cards(shop, "older", ("8.6",), 1), "older")
    index = shop.out / "index.json"
    index.write_bytes(index.read_bytes().replace(b"sm86", b"sm120"))
    with pytest.raises(UnsupportedError, match=r"its signed manifest says 8\.6"):
        shop.install(only="sm120")
    assert files_of(shop.root) == {}


def test_an_update_fetches_only_what_changed(packed: Shop) -> None:
    old = packed.install()
    packed.pack(packed.toy("new", size=5000, seed=1))
    new = packed.install()
    assert new.path != old.path
    small = ("manifest.json", "manifest.sha256", "signature.json")
    changed = 5000 + sum((new.path / name).stat().st_size for name in small)
    assert new.fetched == changed < new.bytes
    assert new.shared == new.bytes - changed
    assert open_bundle(new.path, trust=packed.trust)
    assert open_bundle(old.path, trust=packed.trust)


def test_what_an_installed_version_has_is_hashed_before_it_is_taken(packed: Shop) -> None:
    old = packed.install()
    victim = old.path / "vae_decoder/weights.bin"
    right = victim.read_bytes()
    victim.chmod(0o644)
    victim.write_bytes(b"x" * 5000)
    packed.pack(packed.toy("new", size=5000, seed=1))
    new = packed.install()
    assert (new.path / "vae_decoder/weights.bin").read_bytes() == right
    assert new.fetched > 10_000


def test_rollback_runs_the_version_before(kiln: Kiln, packed: Shop) -> None:
    old = packed.install()
    packed.pack(packed.toy("new", size=5000, seed=1))
    new = packed.install()
    assert located(packed.root / "toy") == new.path
    ended = kiln("rollback", "toy", "--in", packed.root)
    assert (ended.code, ended.out) == (0, f"{old.path}\n")
    assert located(packed.root / "toy") == old.path
    ended = kiln("rollback", "toy", "--in", packed.root)
    assert ended.code == 2
    assert "has no version before" in ended.sentence
    assert packed.install().fetched == 0
    assert located(packed.root / "toy") == new.path
    assert roll_back(packed.root, "toy").current == old.version


def test_rollback_passes_over_versions_that_are_gone(packed: Shop) -> None:
    first = packed.install()
    for seed in (1, 2):
        packed.pack(packed.toy(f"new{seed}", size=5000, seed=seed))
        last = packed.install()
        if seed == 1:
            gone = last
    shutil.rmtree(gone.path)
    assert roll_back(packed.root, "toy").current == first.version


def test_bundles_lists_what_is_installed(
    kiln: Kiln, packed: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILN_BUNDLES", str(packed.root))
    assert kiln("bundles").out == f"No bundle is installed in {packed.root}.\n"
    old = packed.install()
    packed.pack(packed.toy("new", size=5000, seed=1))
    new = packed.install()
    rows = json.loads(kiln("bundles", "--json").out)["bundles"]
    assert [(row["version"], row["state"]) for row in rows] == [
        (old.version, ""),
        (new.version, "current"),
    ]
    assert {row["key_id"] for row in rows} == {packed.trust.keys[0].id}
    assert rows[0]["bytes"] == sum(map(len, files_of(old.path).values()))
    assert old.version in kiln("bundles").out
    assert located(Path("toy")) == new.path


def test_a_name_that_is_not_installed_is_one_sentence(kiln: Kiln, shop: Shop) -> None:
    ended = kiln("rollback", "toy", "--in", shop.root)
    assert ended.code == 17
    assert "No bundle 'toy' is installed" in ended.sentence
    with pytest.raises(MissingError, match="kiln install SRC"):
        read_pointer(shop.root, "toy")


@pytest.mark.parametrize("raw", [b"", b"{}", b'{"current": "../x", "installed": {}}', b"\xff"])
def test_a_damaged_pointer_is_found_and_installing_writes_it_anew(packed: Shop, raw: bytes) -> None:
    path = packed.install().path
    (packed.root / "toy/current.json").write_bytes(raw)
    with pytest.raises(BundleError, match="is damaged: install toy again"):
        read_pointer(packed.root, "toy")
    packed.install()
    assert located(packed.root / "toy") == path


def judged(shop: Shop, name: str, seed: int) -> Path:
    """A toy bundle whose denoiser needs a self-test."""
    parts = read_manifest(shop.toy(name, size=5000, seed=seed)).components
    recorded = tuple(
        one.model_copy(update={"selftest": "unet/component.json", "selftest_db": 20.0})
        if one.role == "denoiser"
        else one
        for one in parts
    )
    return shop.toy(name, size=5000, seed=seed, components=recorded)


def write_result(path: Path, **fields: object) -> None:
    from runners.bundle import Bundle
    from runners.selftest import result_paths, state_of

    bundle = Bundle(path, read_manifest(path))
    result_paths(bundle)[0].write_text(
        json.dumps({"bundle": state_of(bundle), "passed": {}, **fields})
    )


def test_an_update_waits_until_its_self_test_has_passed(packed: Shop) -> None:
    old = packed.install()
    packed.pack(judged(packed, "new", 1))
    new = packed.install()
    assert selftest_passed(new.path) is None
    assert new.pointer is not None
    assert (new.pointer.current, new.pointer.waiting) == (old.version, new.version)
    assert located(packed.root / "toy") == old.path
    write_result(new.path, passed={"unet on this card": {}})
    assert located(packed.root / "toy") == new.path
    assert roll_back(packed.root, "toy").current == old.version
    assert located(packed.root / "toy") == old.path


def test_a_result_of_other_bytes_does_not_count(packed: Shop) -> None:
    old = packed.install()
    packed.pack(judged(packed, "new", 1))
    new = packed.install()
    write_result(new.path, passed={"unet on this card": {}}, bundle="0" * 64)
    assert selftest_passed(new.path) is None
    assert located(packed.root / "toy") == old.path


def test_a_failed_self_test_is_shown_and_never_promoted(kiln: Kiln, packed: Shop) -> None:
    old = packed.install()
    packed.pack(judged(packed, "new", 1))
    new = packed.install()
    write_result(new.path, failed={"unet on this card": {}})
    assert selftest_passed(new.path) is False
    assert located(packed.root / "toy") == old.path
    rows = json.loads(kiln("bundles", "--in", packed.root, "--json").out)["bundles"]
    assert [row["state"] for row in rows] == ["current", "failed"]


def test_the_first_version_runs_without_a_result(packed: Shop) -> None:
    packed.pack(judged(packed, "new", 1), "other")
    path = packed.install(only="other").path
    assert located(packed.root / "other") == path


@pytest.fixture(params=["streamed", "copied"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How files get from a folder to the disk: by us, or by the system where it can."""
    monkeypatch.setattr(writing, "_COPIED_FROM", 1 if request.param == "copied" else 1 << 60)
    return str(request.param)


class Full:
    """A disk that has room for so many bytes more."""

    def __init__(self, room: int) -> None:
        self.room, self._write = room, os.write
        self._copy = getattr(os, "copy_file_range", None)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "write", self.write)
        if self._copy is not None:
            monkeypatch.setattr(os, "copy_file_range", self.copy)

    def copy(self, source: int, target: int, count: int) -> int:
        assert self._copy is not None
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        copied = int(self._copy(source, target, min(count, self.room)))
        self.room -= copied
        return copied

    def write(self, descriptor: int, chunk: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(descriptor, chunk[: self.room])
        self.room -= written
        return written


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("room", [0, 1, 4000, 5000, 12_000, 25_000])
def test_a_full_disk_is_refused_and_the_next_try_goes_on(
    packed: Shop, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    with monkeypatch.context() as patch:
        Full(room).patch(patch)
        with pytest.raises(DiskFullError, match="free some, and run it again") as caught:
            packed.install()
    assert caught.value.exit_code == 14
    assert not [one for one in packed.root.glob("*/*") if not one.name.startswith(".")]
    result = packed.install()
    linked = len(b"{}")  # files with a second name aren't taken over: it could be anybody's
    assert room - linked <= result.kept <= room
    assert result.fetched + result.kept + result.shared == result.bytes
    assert open_bundle(result.path, trust=packed.trust)
    assert not list(packed.root.rglob("*.kiln-part"))


@pytest.mark.parametrize("way", ["copied"], indirect=True)
@pytest.mark.parametrize("answer", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, None])
def test_where_the_system_cannot_copy_we_do(
    packed: Shop, monkeypatch: pytest.MonkeyPatch, way: str, answer: int | None
) -> None:
    """None is a network share that copies nothing and says so."""
    asked = []

    def cannot(*_: int) -> int:
        asked.append(way)
        if answer is None:
            return 0
        raise OSError(answer, "no")

    monkeypatch.setattr(os, "copy_file_range", cannot, raising=False)
    assert open_bundle(packed.install().path, trust=packed.trust)
    assert asked


def test_too_little_room_is_known_before_anything_is_written(
    packed: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installing, "free_disk_bytes", lambda _: 4000)
    with pytest.raises(DiskFullError, match=r"has 0\.0 MB free and 0\.0 MB are needed"):
        packed.install()
    assert files_of(packed.root) == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Four megabytes of memory as a disk of their own, where root may have one."""
    from subprocess import run

    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    if shutil.which("mount") is None or run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield path
    run(["umount", str(path)], check=True)


@pytest.mark.usefixtures("way")
def test_a_disk_that_is_really_full(
    shop: Shop, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.pack(shop.toy(size=800_000))
    shop.root = small_disk / "root"
    (small_disk / "ballast").write_bytes(b"x" * 1_800_000)
    with pytest.raises(DiskFullError, match=r"has 2\.\d MB free and 3\.2 MB are needed"):
        shop.install()
    assert files_of(shop.root) == {}
    monkeypatch.setattr(installing, "free_disk_bytes", lambda _: 1 << 40)
    with pytest.raises(DiskFullError):
        shop.install()
    assert not (shop.root / "toy/current.json").exists()
    (small_disk / "ballast").unlink()
    result = shop.install()
    assert result.kept > 1_000_000
    assert open_bundle(result.path, trust=shop.trust)


def test_a_full_disk_while_packing_leaves_whole_blobs_only(
    packed: Shop, monkeypatch: pytest.MonkeyPatch, kiln: Kiln
) -> None:
    before = files_of(packed.out)
    bundle = packed.toy("new", size=5000, seed=1)
    Full(1000).patch(monkeypatch)
    ended = kiln("pack", bundle, "-o", packed.out, "--key", packed.key)
    assert ended.code == 14
    left = files_of(packed.out)
    assert {name: left.pop(name) for name in before} == before
    for name, raw in left.items():  # whole blobs stay for the next try
        assert name == f"blobs/sha256/{hashlib.sha256(raw).hexdigest()}"


def test_no_error_of_a_command_is_more_than_a_sentence(kiln: Kiln, packed: Shop) -> None:
    for source in (packed.folder / "nothing", packed.key, packed.folder):
        ended = kiln("install", source, "--trust", packed.public, "--to", packed.root)
        assert ended.code == 2
        assert len(ended.err.strip().splitlines()) == 1


def test_install_prints_one_json_line(kiln: Kiln, packed: Shop) -> None:
    arguments = ("--trust", packed.public, "--to", packed.root, "--json")
    document = json.loads(kiln("install", packed.out, *arguments).out)
    assert Path(document["path"]).is_dir()
    assert document["current"] is True
    assert document["fetched"] + document["shared"] == document["bytes"]


def test_every_refusal_is_a_typed_error(packed: Shop) -> None:
    """Any document of the layout, shortened anywhere: never another exception, never a success."""
    index = packed.out / "index.json"
    right = index.read_bytes()
    for end in range(0, len(right), 7):
        index.write_bytes(right[:end])
        with pytest.raises(KilnError) as caught:
            packed.install()
        assert caught.value.exit_code == 12
