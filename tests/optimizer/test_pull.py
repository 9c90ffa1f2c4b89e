"""`kiln pull` with the real hub library against a local server: cut off, resumed, refused."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.optimizer.hub import Hub
from tests.optimizer.hub_server import COMMIT, GATED, MODEL, TOKEN, serve_model
from tests.optimizer.tiny_folder import WEIGHTS, write_model

UNET = f"unet/{WEIGHTS['unet']}"
_CHUNK = 10 << 20
"""What the hub library writes at a time; what is cut off within it is lost."""
_GONE = [0] * 6
"""As often as the hub library tries again while nothing arrives."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Its UNet is two and a half chunks."""
    from safetensors.numpy import save_file

    folder = write_model(tmp_path / "model")
    codes = np.random.default_rng(0).integers(0, 255, _CHUNK * 5 // 2, np.uint8)
    save_file({"a.weight": codes}, folder / UNET)
    with serve_model(folder) as served:
        yield Hub(served, tmp_path / "cache")


def test_what_was_pulled_is_described(hub: Hub) -> None:
    code, out, err = hub.kiln("pull", MODEL)
    folder = hub.cache / "hub" / "models--owner--tiny" / "snapshots" / COMMIT
    assert code == 0, err
    assert out.splitlines() == [
        "owner/tiny at 0123456789ab (Stable Diffusion 1.x and 2.x), licence creativeml-openrail-m",
        f"10 files, 26.2 MB in {folder}",
    ]
    assert err.startswith("Download owner/tiny: 26.2 MB, ")
    assert (folder / UNET).read_bytes() == (hub.folder / UNET).read_bytes()
    assert not {"README.md", "safety_checker/model.safetensors"} & set(hub.downloads)


def test_the_json_line_and_that_nothing_comes_twice(hub: Hub) -> None:
    hub.kiln("pull", MODEL)
    del hub.downloads[:]
    code, out, err = hub.kiln("pull", MODEL, "--json")
    document = json.loads(out)
    assert (code, err, hub.downloads) == (0, "", [])
    assert (document["model"], document["revision"]) == (MODEL, COMMIT)
    assert (document["family"], document["licence"]) == ("sd1", "creativeml-openrail-m")
    assert (document["files"], document["downloaded_bytes"]) == (10, 0)
    assert document["bytes"] == sum(
        path.stat().st_size for path in Path(document["folder"]).rglob("*") if path.is_file()
    )


def test_a_lost_connection_is_one_sentence_and_the_next_pull_goes_on(hub: Hub) -> None:
    size = (hub.folder / UNET).stat().st_size
    hub.served.cuts[UNET] = [_CHUNK + 5, *_GONE]
    code, out, err = hub.kiln("pull", MODEL)
    assert (code, out) == (20, "")
    assert "Error: the connection to the hub was lost (RemoteProtocolError) with 10.5 MB of" in err
    assert "run `kiln pull owner/tiny` again, which goes on where this stopped" in err
    assert hub.served.sent[UNET] == _CHUNK + 5

    hub.served.sent.clear()
    code, _, err = hub.kiln("pull", MODEL)
    assert code == 0, err
    assert hub.served.sent[UNET] == size - _CHUNK
    [blob] = (hub.cache / "hub").glob(f"models--owner--tiny/snapshots/{COMMIT}/{UNET}")
    assert blob.read_bytes() == (hub.folder / UNET).read_bytes()
    assert not list((hub.cache / "hub").rglob("*.incomplete"))


def test_a_connection_that_breaks_now_and_then_goes_on_by_itself(hub: Hub) -> None:
    hub.served.cuts[UNET] = [_CHUNK + 5, 0, 0, _CHUNK + 5]
    code, _, err = hub.kiln("pull", MODEL)
    assert (code, hub.downloads.count(UNET)) == (0, 5)
    assert err.startswith("Download owner/tiny: 26.2 MB, ")
    assert len(err.splitlines()) == 1


def test_offline_a_model_that_is_here_in_part_is_refused(hub: Hub) -> None:
    hub.served.cuts[UNET] = [0, *_GONE]
    hub.kiln("pull", MODEL)
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        code, _, err = hub.kiln("pull", MODEL, **environment)
        assert code == 17
        assert "run `kiln pull owner/tiny` where there is a connection" in err


def test_a_cut_off_update_leaves_the_old_version_usable(hub: Hub) -> None:
    hub.kiln("pull", MODEL)
    hub.served.commit = "f" * 40
    (hub.folder / UNET).write_bytes((hub.folder / UNET).read_bytes()[:-1] + b"\1")
    hub.served.cuts[UNET] = [0, *_GONE]
    assert hub.kiln("pull", MODEL)[0] == 20
    code, out, _ = hub.kiln("pull", MODEL, HF_HUB_OFFLINE="1")
    assert (code, out.split()[2]) == (0, COMMIT[:12])


def test_offline_the_licence_is_still_known(hub: Hub) -> None:
    hub.kiln("pull", MODEL)
    code, out, err = hub.kiln("pull", MODEL, "--json", HF_HUB_OFFLINE="1")
    assert (code, err) == (0, "")
    assert json.loads(out)["licence"] == "creativeml-openrail-m"
    code, _, err = hub.kiln("pull", MODEL, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 0
    assert err == (
        "owner/tiny: the hub cannot be reached (ConnectError); what its cache has is used\n"
    )


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"license": "other", "license_name": "flux-1-dev"}, "licence flux-1-dev\n"),
        ({"license": ["mit", "apache-2.0"]}, "licence mit, apache-2.0\n"),
        ({}, "its card names no licence\n"),
    ],
)
def test_the_licence_is_shown_as_the_card_names_it(
    hub: Hub, card: dict[str, object], words: str
) -> None:
    hub.served.card = card
    assert words in hub.kiln("pull", MODEL)[1]


def test_a_disk_too_small_is_refused_before_any_weight(hub: Hub) -> None:
    code, out, err = hub.kiln("pull", MODEL, free="20000000")
    assert (code, out) == (14, "")
    assert (
        f"Error: owner/tiny needs 26.2 MB more in {hub.cache / 'hub'} and 20.0 MB are free" in err
    )
    assert hub.downloads == ["model_index.json"]


def test_only_what_is_still_missing_must_fit(hub: Hub) -> None:
    hub.served.cuts[UNET] = [2 * _CHUNK + 5, *_GONE]
    hub.kiln("pull", MODEL)
    assert hub.kiln("pull", MODEL, free="6000000")[0] == 0


def test_a_gated_model_needs_a_token(hub: Hub) -> None:
    code, _, err = hub.kiln("pull", GATED)
    assert code == 2
    assert "owner/gated is gated: accept its terms on its page and set HF_TOKEN" in err
    code, _, err = hub.kiln("pull", GATED, HF_TOKEN=TOKEN)
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("owner/absent",), "the hub has no model of that name: check the spelling"),
        ((MODEL, "--revision", "v9"), "has no revision 'v9': give a branch, tag or commit"),
        (("a/b/c",), "a/b/c is no folder here and no hub id: give owner/name"),
    ],
)
def test_an_unknown_model_is_one_sentence(hub: Hub, arguments: tuple[str, ...], words: str) -> None:
    code, out, err = hub.kiln("pull", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


def test_a_model_on_disk_needs_no_pull(hub: Hub) -> None:
    code, _, err = hub.kiln("pull", str(hub.folder))
    assert code == 2
    assert "is on disk already: give it to `kiln compile`" in err


def test_bytes_that_are_not_what_the_hub_promised_are_thrown_away(hub: Hub) -> None:
    hub.served.cuts[UNET] = [_CHUNK + 5, *_GONE]
    hub.kiln("pull", MODEL)
    [partial] = (hub.cache / "hub").rglob("*.incomplete")
    partial.write_bytes(b"\1" + partial.read_bytes()[1:])
    code, _, err = hub.kiln("pull", MODEL)
    assert code == 2
    assert f"what arrived as {UNET} of owner/tiny isn't what the hub promised" in err
    assert hub.kiln("pull", MODEL)[0] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no such permissions")
def test_a_cache_that_is_no_folder(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = hub.kiln("pull", MODEL, HF_HOME=str(tmp_path / "file"))
    assert code == 2
    assert "cannot be used" in err
    assert "set HF_HOME to a folder that you can write" in err


def test_where_there_are_no_links_nothing_is_stored_twice(hub: Hub) -> None:
    code, _, err = hub.kiln("pull", MODEL, HF_HUB_DISABLE_SYMLINKS="1")
    assert code == 0, err
    large = [path for path in hub.cache.rglob("*") if path.is_file() and _size(path) > _CHUNK]
    assert [path.name for path in large] == [WEIGHTS["unet"]]


def _size(path: Path) -> int:
    return os.lstat(path).st_size


def test_compile_downloads_with_the_same_progress(tiny_model: Path, tmp_path: Path) -> None:
    with serve_model(tiny_model) as served:
        code, out, err = Hub(served, tmp_path).kiln("compile", MODEL, "--dry-run")
    assert code == 0, err
    assert out.startswith("owner/tiny: Stable Diffusion 1.x and 2.x, 64 px")
    assert err.startswith("Download owner/tiny: 13.6 MB, ")
