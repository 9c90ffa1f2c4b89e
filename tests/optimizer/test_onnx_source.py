"""Folders that optimum exported, as MODEL: read, run, refused and compiled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizer import compile as compiling
from optimizer.source import resolve
from tests.optimizer.optimum_folder import write_optimum

Kiln = Callable[..., Any]

FORMS: dict[str, dict[str, bool]] = {
    "current": {},
    "older": {"older": True},
    "half": {"half": True, "external": True},
}


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model as optimum exports it, in one of `FORMS`; not to be changed."""
    root = tmp_path_factory.mktemp("optimum")

    def export(form: str) -> Path:
        if not (root / form).exists():
            (root / form).mkdir()
            write_optimum(tiny_model, root / form, **FORMS[form])
        return root / form

    return export


@pytest.fixture
def folder(exported: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the current form, to be spoiled."""
    return Path(shutil.copytree(exported("current"), tmp_path / "exported"))


def test_a_folder_is_described(exported: Callable[[str], Path], tiny_model: Path) -> None:
    source, plain = resolve(str(exported("half"))), resolve(str(tiny_model))
    assert (source.kind, source.family) == ("onnx", "sd1")
    assert (source.pipeline_class, source.revision) == ("StableDiffusionPipeline", None)
    assert source.component_config("vae") == plain.component_config("vae")
    sizes = {
        name: sum(np.prod(p.shape) for p in found.parameters(name).values())
        for name in ("text_encoder", "unet", "vae")
        for found in (plain,)
    }
    for name, size in sizes.items():
        here = sum(np.prod(p.shape) for p in source.parameters(name).values())
        assert here == pytest.approx(size, rel=0.05)
    assert resolve(str(exported("half"))).digest == source.digest


def test_graphs_are_kept_as_kilns_own_are(exported: Callable[[str], Path]) -> None:
    """TensorRT's types are written out for initializers, not for constants."""
    import onnx

    source = resolve(str(exported("half")))
    for name in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        graph = onnx.load(source.folder / name / "model.onnx", load_external_data=False).graph
        assert "Constant" not in {node.op_type for node in graph.node}
        types = {tensor.data_type for tensor in graph.initializer}
        assert onnx.TensorProto.FLOAT16 not in types


@pytest.mark.parametrize("form", FORMS)
def test_each_component_gives_what_the_torch_model_gives(
    exported: Callable[[str], Path], tiny_model: Path, form: str
) -> None:
    import torch

    from optimizer.load import load_module
    from runners.modules import WRAPPERS

    source, plain = resolve(str(exported(form))), resolve(str(tiny_model))
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    steps = torch.full((3,), 333.0)
    inputs = {
        "clip_plain": ("text_encoder", [torch.randint(0, 70, (3, 32), generator=random)]),
        "unet_timestep": ("unet", [noise(3, 4, 8, 12), steps, noise(3, 32, 32)]),
        "vae_decoder": ("vae", [noise(2, 4, 6, 8)]),
        "vae_encoder": ("vae", [noise(2, 3, 40, 56)]),
    }
    # weights in fp16 have 11 significant bits; the losses of a dozen layers add up to a few of them
    limit = 5e-3 if form == "half" else 1e-5
    for wrapper, (name, given) in inputs.items():
        with torch.inference_mode():
            wanted = WRAPPERS[wrapper](load_module(plain, name))(*given)
            found = WRAPPERS[wrapper](load_module(source, name))(*given)
        for a, b in zip(wanted, found, strict=True):
            assert a.shape == b.shape
            assert float((a - b).norm() / a.norm()) < limit, wrapper


def test_it_compiles_and_generates(
    kiln: Kiln, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    options = ("--backend", "onnxruntime", "--steps", 2, "--size-range", "32:64", "--batch", 1)
    ended = kiln("compile", exported("half"), *options, "-o", out, "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert document["speed"] is None  # there is no torch model to measure against
    names = [entry["name"] for entry in document["components"]]
    assert names == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert all(entry["sqnr_db"] > 100 for entry in document["components"])
    drawn = kiln("generate", out, "--prompt", "a", "--size", "48x64", "-o", tmp_path / "a.png")
    assert drawn.code == 0, drawn.err
    again = kiln("compile", exported("half"), *options, "-o", out, "--json")
    assert json.loads(again.out)["reused"]
    models = json.loads(kiln("models", "--json").out)["models"]
    [model] = [model for model in models if model["path"] == str(exported("half"))]
    assert (model["kind"], model["family"], model["problem"]) == ("onnx", "sd1", None)
    assert [bundle["path"] for bundle in model["bundles"]] == [str(out)]


def test_nothing_is_quantized_unless_asked_and_sides_suit_the_traced_graph(
    kiln: Kiln, exported: Callable[[str], Path]
) -> None:
    ended = kiln("compile", exported("current"), "--dry-run", "--json")
    document = json.loads(ended.out)
    assert {entry["quant"] for entry in document["components"]} == {"none"}
    assert (document["recipe"]["size_min"], document["recipe"]["size_max"]) == (32, 256)
    ended = kiln("compile", exported("current"), "--dry-run", "--size", "40x40")
    assert "The smallest side 40 is not a multiple of 16, which this model" in ended.sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--quant", "int8"), "can't be quantized (--quant int8): compile from the model that it"),
        (("--quant", "auto", "--budget", "1x"), "can't be quantized (--quant auto): compile from"),
        (("--backend", "eager"), "the backend eager can't build from: use --backend openvino, "),
    ],
)
def test_what_needs_torch_weights_is_refused(
    kiln: Kiln,
    exported: Callable[[str], Path],
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    ended = kiln("compile", exported("current"), "-o", tmp_path / "out", *arguments)
    assert (ended.code, ended.out) == (10, "")
    assert words in ended.sentence


def test_analyze_and_compare_are_refused(
    kiln: Kiln, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    ended = kiln("analyze", exported("current"), "-o", tmp_path / "a.json")
    assert ended.code == 10
    assert "can't be quantized (--quant auto)" in ended.sentence
    ended = kiln("compare", exported("current"), "--levels", "none", "-o", tmp_path / "report")
    assert ended.code == 10
    assert "is an ONNX export, and plain diffusers, which is compared with, can't" in ended.sentence


def drop_config(folder: Path) -> None:
    (folder / "vae_decoder" / "config.json").unlink()


def drop_graph(folder: Path) -> None:
    (folder / "vae_encoder" / "model.onnx").unlink()


def drop_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def break_config(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("{")


def swap_graphs(folder: Path) -> None:
    shutil.copyfile(folder / "vae_encoder" / "model.onnx", folder / "unet" / "model.onnx")


def damage_graph(folder: Path) -> None:
    path = folder / "unet" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop_config, "has no vae_decoder/config.json: export the whole pipeline again"),
        (drop_graph, "has no vae_encoder/model.onnx: export the whole pipeline again"),
        (drop_tokenizer, "has no tokenizer: export the whole pipeline again"),
        (break_config, "config.json is damaged: "),
        (swap_graphs, "unet/model.onnx gives latent_parameters and no out_sample: export it"),
        (damage_graph, "unet/model.onnx is damaged ("),
    ],
)
def test_a_spoiled_folder_is_one_sentence(
    kiln: Kiln,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    words: str,
) -> None:
    def started(*_arguments: object, **_keywords: object) -> str:
        raise AssertionError("a stage was run")

    monkeypatch.setattr(compiling, "run_stage", started)
    spoil(folder)
    ended = kiln("compile", folder, "-o", folder.parent / "out")
    assert (ended.code, ended.out) == (2, "")
    assert words in ended.sentence


def test_another_family_is_refused(kiln: Kiln, folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "ORTKandinskyPipeline"}')
    ended = kiln("compile", folder, "--dry-run")
    assert ended.code == 10
    assert "is a KandinskyPipeline, which kiln does not know" in ended.sentence


def test_an_export_of_one_size_is_refused(kiln: Kiln, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "fixed").mkdir()
    ended = kiln("compile", write_optimum(tiny_model, tmp_path / "fixed", fixed=True), "--dry-run")
    assert ended.code == 10
    assert "was exported for one size (input_ids is 2x32): export it again" in ended.sentence


def test_safetensors_are_used_where_both_are_there(folder: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    assert resolve(str(folder)).kind == "folder"
