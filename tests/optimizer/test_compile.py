"""Model -> bundle: what is in it, what is not done twice, and what survives a kill."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimizer import compile as compiling
from runners.bundle import open_bundle, read_manifest
from tests.tracked import ROOT

Kiln = Callable[..., Any]
MakeBundle = Callable[..., Path]
OPTIONS = ("--size-range", "32:128", "--batch", "2", "--steps", "4", "--no-lora", "--no-tiles")
PLAIN = ("--quant", "none", "--dtype", "fp32", "--backend", "openvino", *OPTIONS)
BUNDLES = [
    ("openvino", "none"),
    ("openvino", "int8"),
    ("openvino", "int4"),
    ("onnxruntime", "none"),
]
COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


@pytest.fixture
def no_stage(bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bundles are there, and no worker process may be started any more."""
    for how in BUNDLES:
        bundle(*how)

    def started(target: str, *_arguments: object, **_keywords: object) -> str:
        raise AssertionError(f"{target} was run")

    monkeypatch.setattr(compiling, "run_stage", started)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def without_numbers(name: str, content: bytes) -> bytes:
    """A graph without the numbers that OpenVINO counts on in a process that builds several."""
    if not name.endswith(".xml.gz"):
        return content
    return re.sub(rb"_[0-9]+", b"", gzip.decompress(content))


@pytest.mark.usefixtures("no_stage")
def test_the_same_compile_again_leaves_the_bundle_alone(
    kiln: Kiln, bundle: MakeBundle, tiny_model: Path
) -> None:
    out = bundle("openvino")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    ended = kiln("compile", tiny_model, "-o", out, *PLAIN, "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["reused"] is True
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_the_same_compile_again_imports_nothing_heavy(bundle: MakeBundle, tiny_model: Path) -> None:
    code = (
        "import sys; from runners.cli import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx', 'openvino', 'onnxruntime'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, "compile", tiny_model, "-o", bundle("openvino"), *PLAIN],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines()[-1] == "[]"


@pytest.mark.usefixtures("no_stage")
def test_a_second_bundle_of_the_same_things_comes_from_the_store(
    kiln: Kiln, bundle: MakeBundle, tiny_model: Path, tmp_path: Path
) -> None:
    ended = kiln("compile", tiny_model, "-o", tmp_path / "deep" / "er", *PLAIN)
    assert ended.code == 0
    assert files_of(tmp_path / "deep" / "er") == files_of(bundle("openvino"))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["er"]


@pytest.mark.usefixtures("no_stage")
@pytest.mark.parametrize("out", [".", "../here", "./."])
def test_an_empty_folder_becomes_the_bundle_whatever_it_is_called(
    kiln: Kiln, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ended = kiln("compile", tiny_model, "-o", out, *PLAIN)
    assert ended.code == 0, ended.err
    open_bundle(tmp_path / "here")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_an_interrupted_compile_leaves_nothing_half_written(
    kiln: Kiln, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **_keywords: object) -> str:
        (arguments[1][-1] / "half").write_text("written")
        raise KeyboardInterrupt

    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "run_stage", interrupted)
    ended = kiln("compile", tiny_model, "-o", tmp_path / "out", *PLAIN)
    assert ended.code == 130
    assert ended.sentence == "Error: Interrupted; what was finished is kept."
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").rglob("half"))


@pytest.mark.usefixtures("no_stage")
def test_another_bundle_at_o_is_replaced_with_force_only(
    kiln: Kiln, bundle: MakeBundle, tiny_model: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(bundle("onnxruntime"), tmp_path / "out"))
    before = files_of(out)
    refused = kiln("compile", tiny_model, "-o", out, *PLAIN)
    assert refused.code == 2
    assert refused.sentence == (
        f"Error: -o {out} holds another bundle: add --force to replace it, or give another folder."
    )
    assert files_of(out) == before
    assert kiln("compile", tiny_model, "-o", out, *PLAIN, "--force").code == 0
    assert files_of(out) == files_of(bundle("openvino"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("no_stage")
def test_a_damaged_bundle_of_the_same_key_is_named_and_replaced_with_force(
    kiln: Kiln, bundle: MakeBundle, tiny_model: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(bundle("openvino"), tmp_path / "out"))
    (out / "unet" / "weights.bin").write_bytes(b"x")
    refused = kiln("compile", tiny_model, "-o", out, *PLAIN)
    assert refused.code == 12
    assert "unet/weights.bin" in refused.sentence
    assert "compile again with --force" in refused.sentence
    assert kiln("compile", tiny_model, "-o", out, *PLAIN, "--force").code == 0
    open_bundle(out)


@pytest.mark.usefixtures("no_stage")
def test_a_recipe_makes_the_same_bundle_again(
    kiln: Kiln, bundle: MakeBundle, tmp_path: Path
) -> None:
    """The model is found by its digest, though the recipe names no path of this machine."""
    original = bundle("openvino", "int8")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(kiln("inspect", original, "--recipe").out)
    ended = kiln("compile", "--recipe", recipe, "-o", tmp_path / "again")
    assert ended.code == 0, ended.err
    assert read_manifest(tmp_path / "again").key == read_manifest(original).key
    assert files_of(tmp_path / "again") == files_of(original)


@pytest.mark.usefixtures("no_stage")
def test_options_beside_a_recipe_win(kiln: Kiln, bundle: MakeBundle, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(kiln("inspect", bundle("openvino", "int8"), "--recipe").out)
    ended = kiln("compile", "--recipe", recipe, "--quant", "int4", "--dry-run", "--json")
    assert json.loads(ended.out)["recipe"]["quant"] == "int4"


@pytest.mark.usefixtures("no_stage")
def test_json_is_one_line_with_what_scripts_read(
    kiln: Kiln, bundle: MakeBundle, tiny_model: Path
) -> None:
    out = bundle("openvino", "int8")
    options = ("--quant", "int8", "--dtype", "fp32", "--backend", "openvino", *OPTIONS)
    ended = kiln("compile", tiny_model, "-o", out, *options, "--json")
    [line] = ended.out.splitlines()
    document = json.loads(line)
    assert document["bundle"] == str(out)
    assert document["seconds"] >= 0
    assert [component["name"] for component in document["components"]] == list(COMPONENTS)
    for component in document["components"]:
        assert {
            "name",
            "role",
            "backend",
            "quant",
            "dtype",
            "engine_bytes",
            "fp32_bytes",
            "layers_quantized",
            "layers_total",
            "sqnr_db",
        } <= set(component)
        files = read_manifest(out).component(component["role"]).files.values()
        assert component["engine_bytes"] == sum((out / name).stat().st_size for name in files)
    denoiser = document["components"][1]
    assert denoiser["fp32_bytes"] == 12528656
    assert denoiser["quant"] == "int8"
    assert denoiser["layers_quantized"] == 81
    assert denoiser["layers_total"] == 83
    assert 20 < denoiser["sqnr_db"] < 60


@pytest.mark.parametrize(("backend", "quant"), BUNDLES)
def test_a_bundle_holds_no_path_of_this_machine(
    bundle: MakeBundle, tiny_model: Path, backend: str, quant: str
) -> None:
    out = bundle(backend, quant)
    places = {tiny_model, out, ROOT, Path(sys.prefix), Path.home(), Path(os.environ["KILN_CACHE"])}
    words = [*(str(place).encode() for place in places), b"site-packages", b".py:", b"tmp/pytest"]
    for name, raw in files_of(out).items():
        text = gzip.decompress(raw) if name.endswith(".gz") else raw
        found = [word for word in words if word in text]
        assert not found, name


@pytest.mark.parametrize(("backend", "quant"), BUNDLES)
def test_a_bundle_holds_plain_files_and_no_pickle(
    bundle: MakeBundle, backend: str, quant: str
) -> None:
    out = bundle(backend, quant)
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    for name, raw in files_of(out).items():
        assert not name.endswith((".bin.index.json", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"))
        assert raw[:2] not in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        assert raw[:2] != b"PK", name


@pytest.mark.parametrize(("quant", "most"), [("none", 1.01), ("int8", 0.30), ("int4", 0.22)])
def test_the_denoisers_weights_are_as_small_as_the_level_promises(
    bundle: MakeBundle, quant: str, most: float
) -> None:
    """Issue 2, section 6. The weights alone: a tiny model's graph is large beside them."""
    out = bundle("openvino", quant)
    entry = read_manifest(out).component("denoiser")
    weights = (out / entry.files["weights"]).stat().st_size
    assert weights / entry.fp32_bytes <= most


def test_openvino_graphs_are_ir_and_not_exported_blobs(bundle: MakeBundle) -> None:
    graph = gzip.decompress((bundle("openvino") / "unet" / "graph.xml.gz").read_bytes())
    assert graph.startswith(b"<?xml")


def test_every_engine_was_checked_at_two_unseen_sizes(bundle: MakeBundle) -> None:
    for backend, quant in BUNDLES:
        for entry in read_manifest(bundle(backend, quant)).components:
            assert len(entry.unseen_sqnr_db) == 2
            assert entry.sqnr_db is not None
            assert entry.layers_total >= entry.layers_quantized


@pytest.mark.skipif(sys.platform == "win32", reason="an open store's files can't be copied there")
def test_a_killed_compile_resumes_and_shows_nothing_half_written(
    kiln: Kiln,
    bundle: MakeBundle,
    tiny_model: Path,
    tmp_path: Path,
    store_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed while the second engine is built; runs and exports come from a copy of the store."""
    original = bundle("openvino")
    cache, out = tmp_path / "cache", tmp_path / "out" / "bundle"
    for kind in ("record", "prepared"):
        shutil.copytree(store_root / "v2" / kind, cache / "v2" / kind)
    monkeypatch.setenv("KILN_CACHE", str(cache))
    command = ["compile", str(tiny_model), "-o", str(out), *PLAIN, "-v"]
    with subprocess.Popen(
        [sys.executable, "-m", "runners.cli", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        try:
            for line in child.stderr:
                if line.startswith("Build and check text_encoder: "):
                    break
        finally:
            child.kill()
    assert not out.exists()
    assert not out.parent.exists() or not list(out.parent.iterdir())
    assert len(list((cache / "v2" / "engine").iterdir())) == 1

    out.parent.mkdir(exist_ok=True)
    for suffix in ("new", "old"):  # what a kill while the bundle is put together leaves
        (out.parent / f".bundle.{child.pid}.kiln-{suffix}" / "unet").mkdir(parents=True)
    ended = kiln(*command)
    assert ended.code == 0, ended.err
    assert "Build and check text_encoder: found in the cache" in ended.err
    assert "Build and check unet: found in the cache" not in ended.err
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    assert list((cache / "v2" / "_tmp").iterdir()) == []
    open_bundle(out)
    first, second = files_of(original), files_of(out)
    assert first.keys() == second.keys()
    own = {"local.mark", "manifest.json", "manifest.sha256"}  # their timings differ
    first, second = ({n: without_numbers(n, f) for n, f in x.items()} for x in (first, second))
    assert [name for name in first if name not in own and first[name] != second[name]] == []
