"""Wrong input of `kiln compile`: one sentence with the fix, and its documented exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimizer import compile as compiling
from profiles import hardware

Kiln = Callable[..., Any]


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be spoiled."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def fails(kiln: Kiln, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kiln:
    """Compile, expect the exit code, no output, no bundle and no stage; return the sentence."""

    def started(target: str, *_arguments: object, **_keywords: object) -> str:
        raise AssertionError(f"{target} was run")

    def run(code: int, *arguments: object) -> str:
        monkeypatch.setattr(compiling, "run_stage", started)
        ended = kiln("compile", "-o", tmp_path / "out", *arguments)
        assert ended.code == code, ended.err
        assert ended.out == ""
        assert not (tmp_path / "out").exists()
        assert ended.sentence.startswith("Error: ")
        return str(ended.sentence)

    return run


def test_a_missing_folder(fails: Kiln, tmp_path: Path) -> None:
    sentence = fails(2, tmp_path / "none")
    assert "give a diffusers folder, a .safetensors checkpoint, or a hub id" in sentence
    assert "no hub id" in fails(2, "./none")


def test_no_model(fails: Kiln) -> None:
    assert "Say which MODEL to compile" in fails(2)


def test_no_out(kiln: Kiln, tiny_model: Path) -> None:
    ended = kiln("compile", tiny_model)
    assert ended.code == 2
    assert ended.sentence == "Error: Say where the bundle goes with -o FOLDER."


def test_a_folder_that_is_no_pipeline(fails: Kiln, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    sentence = fails(2, tmp_path / "empty")
    assert "is not a diffusers pipeline: it has no model_index.json; give the folder" in sentence


def test_one_component_of_a_pipeline(fails: Kiln, model: Path) -> None:
    assert f"give the whole model, such as {model}" in fails(2, model / "unet")


def test_a_bundle_in_the_place_of_a_model(fails: Kiln, bundle: Callable[..., Path]) -> None:
    assert "give the model that it was made from" in fails(2, bundle("openvino"))


def test_a_family_that_is_not_known(fails: Kiln, model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "KandinskyPipeline"})
    )
    sentence = fails(10, model)
    assert (
        "is a KandinskyPipeline, which kiln does not know; give one of Stable Diffusion" in sentence
    )


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt"])
def test_a_pickle_checkpoint(fails: Kiln, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    assert "optimizer.unpickle" in fails(2, tmp_path / name)


def test_weights_as_pickle_only(fails: Kiln, model: Path) -> None:
    (model / "unet" / "diffusion_pytorch_model.safetensors").rename(
        model / "unet" / "diffusion_pytorch_model.bin"
    )
    assert "only as pickle (unet/diffusion_pytorch_model.bin)" in fails(2, model)


def test_truncated_weights(fails: Kiln, model: Path) -> None:
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    sentence = fails(2, model)
    assert "diffusion_pytorch_model.safetensors" in sentence
    assert "download" in sentence


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--size", "60x60"), 2, "is not a multiple of 8, which this model needs: use 64."),
        (("--size", "big"), 2, "big is not a size: write it as --size 512x512."),
        (("--size-range", "32-64"), 2, "write it as --size-range 256:1024."),
        (("--size-range", "64:32"), 2, "--size-range 64:32 is backwards: the smaller side first."),
        (("--size", "64", "--size-range", "32:64"), 2, "Give --size or --size-range, not both."),
        (("--quant", "int3"), 2, "--quant int3 is not known: use one of none, int8, int8w, "),
        (("--backend", "tvm"), 2, "--backend tvm is not known: use one of openvino, onnxruntime, "),
        (("--dtype", "int8"), 2, "Input should be 'auto', 'fp32', 'fp16' or 'bf16'."),
        (("--profile", "x86-amd"), 2, "no profile is called 'x86-amd'; did you mean x86-am"),
        (("--steps", "-1"), 2, "The recipe's steps is wrong: Input should be greater than or "),
        (("--batch", "0"), 2, "The recipe's batch is wrong: Input should be greater than or "),
        (("--dtype", "fp16"), 10, "--dtype fp16 can't be used with the backend "),
        (("--dtype", "fp16"), 10, " on a CPU: use fp32"),
        (("--revision", "main"), 2, "is on disk and has no revisions: leave --revision out"),
        (("--prediction-type", "x"), 2, "Input should be 'epsilon' or 'v_prediction'."),
        (("--prediction-type", "epsilon"), 2, "leave --prediction-type out, which is for single "),
        (("--recipe", "none.json"), 2, "write one with `kiln inspect BUNDLE --recipe`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_option(
    fails: Kiln, tiny_model: Path, options: tuple[str, ...], code: int, words: str
) -> None:
    assert words in fails(code, tiny_model, *options)


def test_a_full_disk(fails: Kiln, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_disk_bytes", lambda _path: 1000)
    sentence = fails(14, tiny_model)
    assert "GiB free and has 0.0: free some space, or set KILN_CACHE and -o" in sentence


def test_out_that_is_a_file_or_holds_other_things(
    kiln: Kiln, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("x")
    for out, words in (
        ("file", "is a file: give the folder that should become the bundle."),
        ("folder", "holds other files: give a new or empty folder."),
        ("file/bundle", "give a folder that you can write."),
    ):
        for options in ((), ("--force",)):
            ended = kiln("compile", tiny_model, "-o", tmp_path / out, *options)
            assert ended.code == 2
            assert words in ended.sentence
    assert (tmp_path / "folder" / "mine.txt").read_text() == "x"


def test_a_cache_that_cannot_be_written(
    kiln: Kiln, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "file"))
    ended = kiln("compile", tiny_model, "-o", tmp_path / "out")
    assert ended.code == 2
    assert "set KILN_CACHE to a folder that you can write" in ended.sentence


def test_a_library_that_is_not_installed(
    fails: Kiln, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimizer import tools

    monkeypatch.setattr(tools, "find_spec", lambda name: None if name == "onnxscript" else name)
    sentence = fails(17, tiny_model)
    assert "Compiling needs onnxscript, which isn't installed: run pip install" in sentence
    assert '"kiln-diffusion[' in sentence


def spoil(path: Path, name: str, value: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors[name].view(-1)[1] = value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(
    kiln: Kiln, model: Path, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))
    name = "text_model.encoder.layers.1.mlp.fc1.weight"
    file = model / "text_encoder" / "model.safetensors"
    try:
        spoil(file, name, value)
    except KeyError:  # transformers 5 saves without the prefix
        name = name.removeprefix("text_model.")
        spoil(file, name, value)
    ended = kiln("compile", model, "-o", tmp_path / "out")
    assert ended.code == 2, ended.err
    assert "mlp.fc1.weight of text_encoder holds NaN or infinite values" in ended.sentence
    assert "download it again" in ended.sentence
    assert not (tmp_path / "out").exists()
