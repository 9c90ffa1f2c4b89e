"""`kiln models`: what is found on a machine, and which bundles were made from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimizer.known_models import remember, remember_bundle, remember_licence
from optimizer.source import resolve
from tests.optimizer.hub_server import COMMIT, MODEL
from tests.optimizer.tiny_folder import WEIGHTS, write_json, write_model, write_weights
from tests.tracked import ROOT

Kiln = Callable[..., Any]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing on it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "kiln"))
    monkeypatch.delenv("KILN_MODELS", raising=False)
    return tmp_path


def in_hub(machine: Path, commit: str = COMMIT) -> Path:
    """A model as the hub library keeps it: a snapshot of links to blobs."""
    storage = machine / "hub" / "models--owner--tiny"
    blob = write_model(storage / "blobs" / commit)
    (storage / "snapshots").mkdir(exist_ok=True)
    (storage / "snapshots" / commit).symlink_to(blob, target_is_directory=True)
    return storage / "snapshots" / commit


def listed(kiln: Kiln) -> list[dict[str, Any]]:
    ended = kiln("models", "--json")
    assert (ended.code, ended.err) == (0, "")
    models: list[dict[str, Any]] = json.loads(ended.out)["models"]
    return models


def test_nothing_here_says_what_to_do(kiln: Kiln) -> None:
    assert listed(kiln) == []
    assert "`kiln pull owner/name` fetches one" in kiln("models").out


def test_models_of_the_hubs_cache(kiln: Kiln, machine: Path) -> None:
    folder = in_hub(machine)
    remember_licence(MODEL, COMMIT, "mit")
    [model] = listed(kiln)
    assert model == {
        "model": MODEL,
        "kind": "hub",
        "family": "sd1",
        "revision": COMMIT,
        "licence": "mit",
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "path": str(folder),
        "problem": None,
        "bundles": [],
    }
    assert kiln("models").out.splitlines()[0].startswith("owner/tiny at 0123456789ab: sd1, ")


def test_each_commit_is_listed_and_a_file_of_two_names_counts_once(
    kiln: Kiln, machine: Path
) -> None:
    first, _ = in_hub(machine), in_hub(machine, "f" * 40)
    before = listed(kiln)[0]["bytes"]
    (first / "unet" / "again.safetensors").symlink_to(first / "unet" / WEIGHTS["unet"])
    assert [model["revision"] for model in listed(kiln)] == [COMMIT, "f" * 40]
    assert listed(kiln)[0]["bytes"] == before


def test_what_cannot_be_compiled_says_why(kiln: Kiln, machine: Path) -> None:
    shutil.rmtree(in_hub(machine) / "vae")
    write_json(in_hub(machine, "f" * 40) / "model_index.json", {"_class_name": "WanPipeline"})
    first, second = listed(kiln)
    assert (first["family"], second["family"]) == (None, None)
    assert "has no folder vae, which its model_index.json names" in first["problem"]
    assert second["problem"].startswith("owner/tiny is a WanPipeline, which kiln does not know")
    text = kiln("models").out
    assert "owner/tiny at 0123456789ab: not usable, " in text
    assert "has no folder vae" in text


def test_a_compiled_folder_is_listed_while_it_is_there(kiln: Kiln, machine: Path) -> None:
    folder = write_model(machine / "mine")
    remember(resolve(str(folder)))
    [model] = listed(kiln)
    assert (model["model"], model["kind"], model["family"]) == (str(folder), "folder", "sd1")
    folder.rename(machine / "elsewhere")
    assert listed(kiln) == []


def test_bundles_are_listed_with_their_model_while_they_are_there(
    kiln: Kiln, machine: Path, store_root: Path, tiny_model: Path, bundle: Callable[..., Path]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILN_CACHE", str(store_root))
        made = Path(shutil.copytree(bundle("onnxruntime"), machine / "bundle"))
    other = shutil.copytree(made, machine / "other")
    remember(resolve(str(tiny_model)))
    remember(resolve(str(write_model(machine / "mine"))))
    for path in (made, other, machine / "never"):
        remember_bundle(path)
    (other / "manifest.json").write_text("{}")
    models = {model["model"]: model for model in listed(kiln)}
    assert models[str(machine / "mine")]["bundles"] == []
    [found] = models[str(tiny_model)]["bundles"]
    assert (found["path"], found["quant"], found["backend"]) == (str(made), "none", "onnxruntime")
    assert f"  bundle {made}: none/fp32 on onnxruntime, " in kiln("models").out
    shutil.rmtree(made)
    assert all(not model["bundles"] for model in listed(kiln))


def test_a_bundle_of_a_hub_models_folder_is_that_models(
    kiln: Kiln, machine: Path, store_root: Path, tiny_model: Path, bundle: Callable[..., Path]
) -> None:
    """Whether it was compiled by the hub id or by the path of its snapshot."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILN_CACHE", str(store_root))
        made = bundle("onnxruntime")
    snapshots = machine / "hub" / "models--owner--tiny" / "snapshots"
    shutil.copytree(tiny_model, snapshots / COMMIT)
    remember(resolve(str(snapshots / COMMIT)))
    remember_bundle(made)
    [model] = listed(kiln)
    assert (model["model"], [found["path"] for found in model["bundles"]]) == (MODEL, [str(made)])


def test_compile_notes_the_bundle(
    kiln: Kiln, store_root: Path, bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILN_CACHE", str(store_root))
    made = bundle("onnxruntime")
    assert str(made) in {b["path"] for model in listed(kiln) for b in model["bundles"]}


def test_folders_of_models_are_searched(
    kiln: Kiln, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    shelf = machine / "shelf"
    write_model(shelf / "deep" / "folder")
    write_weights(shelf / "sub" / "whole.safetensors", {checkpoint: (2, 768)})
    write_weights(shelf / "lora.safetensors", {"lora_unet.weight": (2, 2)})
    (shelf / "broken.safetensors").write_bytes(b"\x08")
    monkeypatch.setenv("KILN_MODELS", os.pathsep.join((str(shelf), str(machine / "absent"))))
    assert [(model["model"], model["kind"]) for model in listed(kiln)] == [
        (str(shelf / "deep" / "folder"), "folder"),
        (str(shelf / "sub" / "whole.safetensors"), "single-file"),
    ]


def test_damaged_notes_are_no_error(kiln: Kiln, machine: Path) -> None:
    for kind in ("known_models", "known_bundles", "v1/known_models", "v1/known_bundles"):
        folder = machine / "kiln" / kind
        folder.mkdir(parents=True)
        (folder / "a.json").write_text("{")
        (folder / "b.json").write_text('{"path": null}')
        (folder / "c.json").write_text('{"path": 3}')
    assert listed(kiln) == []


def test_it_imports_nothing_heavy(machine: Path) -> None:
    remember(resolve(str(write_model(machine / "mine"))))
    code = (
        "import sys; from optimizer.models import local_models; assert local_models();"
        "assert not {'torch', 'diffusers', 'transformers', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
