"""Bundles from a web server: cut off, taken up, never longer than they should be."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from profiles.errors import BundleError, PartialError, SpecError
from runners import fetching
from runners.fetching import place_of
from tests.shipments import Shop, files_of
from tests.web import Served, serve


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_wait", lambda _: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    shop = Shop(tmp_path)
    shop.pack(shop.toy(size=20_000))
    return shop


@pytest.fixture
def served(shop: Shop) -> Iterator[Served]:
    with serve(shop.out) as served:
        yield served


def weights(shop: Shop) -> str:
    raw = (shop.folder / "bundles/toy/unet/weights.bin").read_bytes()
    return f"blobs/sha256/{hashlib.sha256(raw).hexdigest()}"


@pytest.mark.parametrize("lengths", [True, False])
def test_a_bundle_is_installed_from_a_server(shop: Shop, served: Served, lengths: bool) -> None:
    served.lengths = lengths
    path = shop.install(served.url + "/").path
    there = files_of(path)
    del there["signature.json"]
    wanted = files_of(shop.folder / "bundles/toy")
    del wanted["local.mark"]
    assert there == wanted
    assert {name for name, _ in served.asked} == {
        *(name for name in files_of(shop.out) if name != "oci-layout")
    } - {config_of(shop)}


def config_of(shop: Shop) -> str:
    from runners.offers import listed

    used = set(listed(place_of(str(shop.out)))[0].read().where.values())
    blobs = {name for name in files_of(shop.out) if name.startswith("blobs/")}
    [config] = [name for name in blobs - used if b"modelfs" in (shop.out / name).read_bytes()]
    return config


@pytest.mark.parametrize("ranges", [True, False])
def test_what_breaks_off_is_taken_up_where_it_stopped(
    shop: Shop, served: Served, ranges: bool
) -> None:
    name = weights(shop)
    served.cuts[name] = [7000, 0, 5000, 1]
    served.ranges = ranges
    result = shop.install(served.url)
    assert (result.path / "unet/weights.bin").stat().st_size == 20_000
    asked = [start for file, start in served.asked if file == name]
    assert asked == ([0, 7000, 7000, 12000, 12001] if ranges else [0, 0, 0, 0, 0])


def test_a_dead_server_ends_with_20_and_the_next_try_goes_on(shop: Shop, served: Served) -> None:
    name = weights(shop)
    served.cuts[name] = [7000, *[0] * 10]
    with pytest.raises(
        PartialError, match="run it again when the server answers; what was fetched"
    ):
        shop.install(served.url)
    assert not [path for path in shop.root.rglob("*") if path.name.startswith("5fece")]
    served.cuts.clear()
    served.asked.clear()
    result = shop.install(served.url)
    assert [start for file, start in served.asked if file == name] == [7000]
    assert result.kept >= 7000
    assert result.fetched + result.kept + result.shared == result.bytes
    assert not list(shop.root.rglob("*.kiln-part"))


def test_wrong_bytes_from_an_earlier_try_are_fetched_again(shop: Shop, served: Served) -> None:
    served.cuts[weights(shop)] = [7000, *[0] * 10]
    with pytest.raises(PartialError):
        shop.install(served.url)
    served.cuts.clear()
    [part] = [path for path in shop.root.rglob("weights.bin") if path.stat().st_size == 7000]
    part.write_bytes(b"\0" * 7000)  # as after a power cut
    path = shop.install(served.url).path
    assert (path / "unet/weights.bin").read_bytes() == (
        shop.folder / "bundles/toy/unet/weights.bin"
    ).read_bytes()


@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("more", [b"x", b"x" * 100_000])
def test_a_longer_file_is_refused_before_or_while_it_is_read(
    shop: Shop, served: Served, lengths: bool, more: bytes
) -> None:
    path = shop.out / weights(shop)
    path.write_bytes(b"y" + path.read_bytes()[1:] + more)
    served.lengths = lengths
    with pytest.raises(BundleError, match="pack it again"):
        shop.install(served.url)
    assert not list(shop.root.rglob("*.bin"))


def test_a_shorter_file_is_refused(shop: Shop, served: Served) -> None:
    path = shop.out / weights(shop)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="has 19999 bytes where 20000 are listed"):
        shop.install(served.url)


@pytest.mark.parametrize("name", ["index.json", "manifest"])
def test_an_endless_list_is_refused(shop: Shop, served: Served, name: str) -> None:
    path = shop.out / "index.json"
    if name == "manifest":
        from runners.offers import listed

        [entry] = listed(place_of(str(shop.out)))
        path = max(
            (one for one in (shop.out / "blobs/sha256").iterdir() if b"layers" in one.read_bytes()),
            key=lambda one: b'"layers":[' in one.read_bytes(),
        )
        assert entry.name == "toy"
    path.write_bytes(path.read_bytes() + b" " * (5 << 20))
    with pytest.raises(BundleError, match=r"more than \d+ bytes: refused"):
        shop.install(served.url)
    assert not shop.root.exists()


@pytest.mark.parametrize("status", [403, 404, 410])
def test_an_address_without_a_bundle_is_wrong_input(
    shop: Shop, served: Served, status: int
) -> None:
    served.status = status
    with pytest.raises(SpecError, match=rf"has no index\.json .HTTP {status}.: give the address"):
        shop.install(served.url)


def test_a_failing_server_is_asked_again(shop: Shop, served: Served) -> None:
    served.status = 503
    with pytest.raises(PartialError, match="HTTP 503"):
        shop.install(served.url)
    assert len(served.asked) == 5


@pytest.mark.parametrize("scheme", ["file", "ftp", "data"])
def test_a_redirection_to_this_machines_files_is_not_followed(
    shop: Shop, served: Served, tmp_path: Path, scheme: str
) -> None:
    (tmp_path / "secret").write_text("{}")
    served.redirect = f"{scheme}://{tmp_path}/secret"
    with pytest.raises((PartialError, SpecError)):
        shop.install(served.url)


@pytest.mark.parametrize(
    "url", ["http://", "https:///x", "http://me:word@host/x", "http://host/x?y", "http://host/#x"]
)
def test_an_address_that_means_something_else_is_refused(shop: Shop, url: str) -> None:
    with pytest.raises(SpecError, match="give http"):
        shop.install(url)


def test_a_server_that_is_not_there_is_one_sentence(shop: Shop) -> None:
    with pytest.raises(PartialError, match=r"can't be read .*refused"):
        shop.install("http://127.0.0.1:9/x")
