"""Each test runs a process of its own, because huggingface_hub reads the environment on import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.optimizer.hub import Hub
from tests.optimizer.hub_server import COMMIT, GATED, MODEL, serve_model
from tests.optimizer.tiny_folder import WEIGHTS, write_model, write_weights


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_model(tmp_path / "model")
    with serve_model(folder) as served:
        yield Hub(served, tmp_path / "cache")


def test_only_the_used_files_are_downloaded_and_the_commit_is_recorded(hub: Hub) -> None:
    assert hub.resolve() == (0, f"hub {COMMIT} {COMMIT} 10")
    assert "unet/diffusion_pytorch_model.safetensors" in hub.downloads
    assert not {"README.md", "safety_checker/model.safetensors"} & set(hub.downloads)
    assert len(hub.downloads) == len(set(hub.downloads)) == 10


def test_offline_uses_the_cache(hub: Hub) -> None:
    hub.resolve()
    del hub.downloads[:]
    assert hub.resolve(HF_HUB_OFFLINE="1") == (0, f"hub {COMMIT} {COMMIT} 10")
    unreachable = hub.resolve(HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable == (0, f"hub {COMMIT} {COMMIT} 10")
    assert hub.downloads == []


def test_offline_without_a_cache_says_what_to_run(hub: Hub) -> None:
    code, said = hub.resolve(HF_HUB_OFFLINE="1")
    assert code == 17
    assert said == (
        "owner/tiny is no folder here and not in the hub's cache, and HF_HUB_OFFLINE is set: run "
        "`kiln pull owner/tiny` where there is a connection, or give a folder"
    )
    code, said = hub.resolve(revision=COMMIT, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 17
    assert f"owner/tiny at revision {COMMIT} is no folder here" in said
    assert "the hub cannot be reached (ConnectError): run" in said


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("owner/absent", "", "owner/absent is no folder here and the hub has no model of that"),
        (GATED, "", "owner/gated is gated: accept its terms on its page and set HF_TOKEN"),
        (MODEL, "v9", "has no revision 'v9': give a branch, tag or commit"),
        ("owner/a--b", "", "owner/a--b is no folder here and no hub id: give owner/name"),
    ],
)
def test_an_unknown_model_is_one_sentence(
    hub: Hub, model: str, revision: str, message: str
) -> None:
    code, said = hub.resolve(model, revision)
    assert code == 2
    assert message in said
    assert "\n" not in said


def test_pickle_weights_are_refused_before_they_are_downloaded(hub: Hub) -> None:
    (hub.folder / "unet" / WEIGHTS["unet"]).rename(hub.folder / "unet" / "model.bin")
    code, said = hub.resolve()
    assert code == 2
    assert "the hub model owner/tiny has the weights of unet only as pickle" in said
    assert hub.downloads == ["model_index.json"]


def test_a_checkpoint_repository_is_answered_with_what_to_give(hub: Hub) -> None:
    (hub.folder / "model_index.json").unlink()
    code, said = hub.resolve()
    assert code == 2
    assert "is not a diffusers pipeline: it has no model_index.json; download its" in said


def test_an_update_of_the_model_is_seen(hub: Hub) -> None:
    hub.resolve()
    write_weights(hub.folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert hub.resolve()[0] == 0
    assert "unet/diffusion_pytorch_model.fp16.safetensors" not in hub.downloads
