"""`kiln compile --vae`: which autoencoders are taken, what is made again, what the bundle says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from optimizer.autoencoder import with_autoencoder
from optimizer.compile import _Stages, plan_recipe
from optimizer.load import load_module
from optimizer.recipe import Recipe, checked
from optimizer.source import resolve
from optimizer.store import Store
from optimizer.unpickle import main as unpickle_main
from profiles.errors import SpecError, UnsupportedError
from runners.bundle import open_bundle, read_manifest
from runners.console import Console
from tests.conftest import HERE, SETTINGS
from tests.optimizer.hub import Hub
from tests.optimizer.hub_server import COMMIT, MODEL, serve_model
from tests.optimizer.tiny_folder import write_json, write_model, write_weights
from tests.tiny_pipelines import tiny_autoencoder, tiny_sd

Kiln = Callable[..., Any]
MakeBundle = Callable[..., Path]
WEIGHTS = "diffusion_pytorch_model.safetensors"
OPTIONS = ("--size-range", "32:128", "--batch", "2", "--steps", "4", "--dtype", "fp32")
PLAIN = ("--quant", "none", "--backend", "onnxruntime", *OPTIONS)


@pytest.fixture
def copy(taesd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(taesd, tmp_path / "copy"))


def changed_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, **changes})


def test_a_plan_says_what_stands_in_the_vaes_place(
    kiln: Kiln, tiny_model: Path, taesd: Path
) -> None:
    how = ("compile", tiny_model, "--vae", taesd, "--dry-run")
    assert f"vae {taesd} (AutoencoderTiny), not the model's own" in kiln(*how).out
    document = json.loads(kiln(*how, "--json").out)
    own = json.loads(kiln("compile", tiny_model, "--dry-run", "--json").out)
    assert (document["vae"], own["vae"]) == (str(taesd), None)
    assert document["recipe"]["vae_digest"] == resolved(tiny_model, taesd).vae.digest
    sizes, theirs = (
        {item["name"]: item["fp32_bytes"] for item in found["components"]}
        for found in (document, own)
    )
    assert {name for name in sizes if sizes[name] != theirs[name]} == {"vae_decoder", "vae_encoder"}


def resolved(model: Path, vae: Path) -> Any:
    return with_autoencoder(resolve(str(model)), str(vae), revision=None)


def test_an_autoencoder_is_hashed_again_where_that_is_asked_for(
    tiny_model: Path, taesd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noted(_: Path, *, always: bool) -> str:
        seen.append(always)
        return "0" * 64

    source = resolve(str(tiny_model))
    monkeypatch.setattr("optimizer.component_source.sha256_of", noted)
    for always in (False, True):
        with_autoencoder(source, str(taesd), revision=None, always_hash=always)
    assert seen == [False, False, True, True]


def test_an_autoencoder_kl_is_taken_too(tiny_model: Path, tmp_path: Path) -> None:
    source = resolved(tiny_model, tiny_autoencoder(tmp_path / "other"))
    ours, own = load_module(source, "vae"), load_module(resolve(str(tiny_model)), "vae")
    assert type(ours).__name__ == "AutoencoderKL"
    assert set(source.parameters("vae")) == set(own.state_dict())
    assert not any(
        (a == b).all()
        for a, b in zip(ours.parameters(), own.parameters(), strict=True)
        if a.dim() > 1
    )


def test_a_model_whose_own_vae_is_tiny_needs_no_option(taesd: Path, tmp_path: Path) -> None:
    model = tiny_sd(tmp_path / "model")
    shutil.rmtree(model / "vae")
    shutil.copytree(taesd, model / "vae")
    index = json.loads((model / "model_index.json").read_text())
    write_json(model / "model_index.json", {**index, "vae": ["diffusers", "AutoencoderTiny"]})
    changed_config(model / "vae", block_out_channels=None, shift_factor=0)  # as old files have it
    plan, _ = plan_recipe(checked({"model": str(model), **SETTINGS}))
    wrappers = {job.spec.name: job.spec.wrapper for job in plan.jobs}
    assert (wrappers["vae_encoder"], wrappers["vae_decoder"]) == ("tiny_vae_encoder", "vae_decoder")
    assert plan.native_size == 64
    assert type(load_module(plan.source, "vae")).__name__ == "AutoencoderTiny"
    assert plan.source.vae is None


def test_what_repaints_is_calibrated_with_the_autoencoder(taesd: Path, tmp_path: Path) -> None:
    import torch

    from optimizer.denoising import pipeline_with

    model = tiny_sd(tmp_path / "model", inpaints=True)
    plan, _ = plan_recipe(checked({"model": str(model), "vae": str(taesd), **SETTINGS}))
    assert not plan.draws_from_text
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        wanted = load_module(plan.source, "vae").encode(image).latents
    found = pipeline_with(plan, {}).vae.encode(image).latents
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", HERE)
def test_its_halves_are_checked_at_two_unseen_shapes(
    bundle: MakeBundle, taesd: Path, backend: str
) -> None:
    manifest = read_manifest(bundle(backend, vae=taesd))
    for name, output in (("vae_decoder", "image"), ("vae_encoder", "latents")):
        entry = manifest.named(name)
        assert [spec.name for spec in entry.signature.outputs] == [output]
        assert len(entry.unseen_sqnr_db) == 2
        assert min(entry.unseen_sqnr_db.values()) > 79
        assert entry.sqnr_db is not None
        assert entry.sqnr_db > 79


def test_the_bundle_says_what_it_was_made_from(
    kiln: Kiln, bundle: MakeBundle, tiny_model: Path, taesd: Path
) -> None:
    made = bundle("onnxruntime", vae=taesd)
    vae, own = read_manifest(made).model.vae, read_manifest(bundle("onnxruntime")).model
    assert vae is not None
    assert (vae.name, vae.revision, vae.class_name) == ("taesd", None, "AutoencoderTiny")
    assert vae.digest == resolved(tiny_model, taesd).vae.digest
    assert (own.vae, own.digest) == (None, read_manifest(made).model.digest)
    shown = kiln("inspect", made).out
    assert "\nvae        taesd (AutoencoderTiny), not the model's own\n" in shown
    assert str(taesd.parent) not in json.dumps(read_manifest(made).model_dump(mode="json"))


def prepare_keys(model: Path, vae: Path | None) -> dict[str, Any]:
    plan, hardware = plan_recipe(checked({"model": str(model), "vae": vae and str(vae)}))
    stages = _Stages(plan, hardware, Console(), Store())
    return {job.spec.name: stages._prepare_key(job) for job in plan.jobs}


@pytest.mark.parametrize("inpaints", [False, True])
def test_only_what_the_autoencoder_changes_is_made_again(
    tiny_model: Path, taesd: Path, tmp_path: Path, inpaints: bool
) -> None:
    """A model that repaints is calibrated on what the VAE encodes."""
    model = tiny_sd(tmp_path / "model", inpaints=True) if inpaints else tiny_model
    own, ours = prepare_keys(model, None), prepare_keys(model, taesd)
    changed = {name for name in own if own[name] != ours[name]}
    assert changed == (set(own) if inpaints else {"vae_decoder", "vae_encoder"})


def test_a_recipe_makes_the_same_bundle_again(
    kiln: Kiln, bundle: MakeBundle, tiny_model: Path, taesd: Path, copy: Path, tmp_path: Path
) -> None:
    made = bundle("onnxruntime", vae=taesd)
    path = tmp_path / "recipe.json"
    path.write_text(kiln("inspect", made, "--recipe").out)
    ended = kiln("compile", tiny_model, "--recipe", path, "-o", made, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["reused"], "found by its digest, where it was last"
    assert json.loads(path.read_text())["vae"] == "taesd"

    changed_config(copy, latent_magnitude=4)
    ended = kiln("compile", tiny_model, "--recipe", path, "--vae", copy, "--dry-run")
    assert ended.code == 2
    assert f"{copy} isn't the autoencoder that the recipe was made for" in ended.sentence


def test_a_recipe_with_a_revision_of_nothing_is_refused() -> None:
    with pytest.raises(SpecError, match="--vae-revision needs --vae"):
        checked({"model": "m", "vae_revision": "main"})
    recipe = Recipe(model="m", vae="owner/taesd", vae_revision="main", vae_digest="0")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_an_export_to_onnx_keeps_its_own_vae(tiny_model: Path, taesd: Path) -> None:
    exported = replace(resolve(str(tiny_model)), kind="onnx")
    with pytest.raises(UnsupportedError, match="an ONNX export, whose VAE can't be replaced"):
        with_autoencoder(exported, str(taesd), revision=None)


def test_an_export_of_an_autoencoder_tiny_is_refused(taesd: Path, tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    node = helper.make_node("Identity", ["a"], ["b"])
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "ab"]
    graph = helper.make_graph([node], "any", values[:1], values[1:])
    folder = tmp_path / "exported"
    for name in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        config = json.loads((taesd / "config.json").read_text()) if "vae" in name else {}
        write_json(folder / name / "config.json", config)
        onnx.save(helper.make_model(graph), folder / name / "model.onnx")
    for name in ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
        write_json(folder / name, {})
    write_json(folder / "model_index.json", {"_class_name": "ORTStableDiffusionPipeline"})
    with pytest.raises(UnsupportedError, match="an AutoencoderTiny, whose ONNX export isn't read"):
        resolve(str(folder))


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def one_half(folder: Path) -> None:
    write_weights(folder / WEIGHTS, {"decoder.layers.0.weight": (8, 4, 3, 3)})


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def pipeline(folder: Path) -> None:
    without_config(folder)
    write_model(folder)


def of_16_channels(folder: Path) -> None:
    changed_config(folder, latent_channels=16)


def of_8_pixels(folder: Path) -> None:
    levels = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), [8] * 4)
    changed_config(folder, **levels)


def unknown(folder: Path) -> None:
    changed_config(folder, _class_name="AutoencoderDC")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_weights, "has no weights for the autoencoder: download the model again"),
        (pickled, "python -m optimizer.unpickle {copy}`, or use a version with .safetensors"),
        (cut, "is truncated"),
        (one_half, "has no weights for vae_encoder"),
        (without_config, "{copy} is no autoencoder: it has no config.json; give a folder that has"),
        (pipeline, "{copy} is a whole pipeline; give its folder vae, or the hub id of an autoenc"),
        (of_16_channels, "--vae {copy} has latents of 16 channels and this model's own have 4"),
        (of_8_pixels, "makes 8 pixels a side of a latent and this model's own VAE makes 4"),
        (unknown, "{copy} is of class AutoencoderDC, which can't be a VAE here: give an Autoenco"),
    ],
)
def test_what_cannot_stand_there_is_refused_in_the_plan(
    kiln: Kiln, tiny_model: Path, copy: Path, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(copy)
    ended = kiln("compile", tiny_model, "--vae", copy, "--dry-run")
    assert ended.code == 2
    assert words.format(copy=copy) in ended.sentence


def test_pickled_weights_are_converted_as_the_refusal_says(tiny_model: Path, copy: Path) -> None:
    import safetensors.torch
    import torch

    weights = safetensors.torch.load_file(copy / WEIGHTS)
    without_weights(copy)
    torch.save(weights, copy / "diffusion_pytorch_model.bin")
    assert unpickle_main([str(copy)]) == 0
    module = load_module(resolved(tiny_model, copy), "vae")
    assert set(module.state_dict()) == set(weights)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--vae", "nowhere"), "--vae nowhere is no folder here and no hub id: give a folder of"),
        (("--vae", "{copy}/config.json"), "is a file: give a folder of one autoencoder"),
        (("--vae", "{copy}", "--vae-revision", "v1"), "on disk and has no revisions: leave"),
        (("--vae-revision", "v1"), "--vae-revision needs --vae"),
    ],
)
def test_what_names_no_autoencoder_is_refused(
    kiln: Kiln, tiny_model: Path, copy: Path, arguments: tuple[str, ...], words: str
) -> None:
    given = [argument.format(copy=copy) for argument in arguments]
    ended = kiln("compile", tiny_model, "--dry-run", *given)
    assert ended.code == 2
    assert words in ended.sentence


def test_an_autoencoder_given_as_the_model_is_told_its_place(kiln: Kiln, taesd: Path) -> None:
    ended = kiln("compile", taesd, "--dry-run")
    assert ended.code == 2
    assert "and an autoencoder with --vae" in ended.sentence


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda folder: changed_config(folder, decoder_block_out_channels=[8, 8, 16]),
            "has tensors of another shape than its config.json says (7, the first is decoder",
        ),
        (one_half, "lacks 47 tensors, the first decoder.layers.0.bias: download the model again"),
    ],
)
def test_weights_that_a_config_does_not_describe_are_refused(
    tiny_model: Path, copy: Path, spoil: Callable[[Path], None], words: str
) -> None:
    source = resolved(tiny_model, copy)
    spoil(copy)
    with pytest.raises(SpecError) as caught:
        load_module(source, "vae")
    assert words in str(caught.value)
    assert str(copy) in str(caught.value)


@pytest.fixture
def hub(taesd: Path, tmp_path: Path) -> Iterator[Hub]:
    """One autoencoder, with files beside it that aren't read."""
    folder = Path(shutil.copytree(taesd, tmp_path / "hub"))
    write_weights(folder / "taesd_decoder.safetensors")
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "README.md").write_text("not the weights")
    with serve_model(folder) as served:
        yield Hub(served, tmp_path / "cache")


def test_of_a_hub_id_only_what_is_needed_is_fetched(hub: Hub, tiny_model: Path) -> None:
    how = ("compile", str(tiny_model), "--vae", MODEL, "--dry-run", "--json")
    code, out, err = hub.kiln(*how)
    assert code == 0, err
    assert set(hub.downloads) == {"config.json", WEIGHTS}
    assert err.startswith(f"Download {MODEL}: ")
    recipe = json.loads(out)["recipe"]
    assert (recipe["vae"], recipe["vae_revision"]) == (MODEL, COMMIT)

    del hub.downloads[:]
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        code, out, err = hub.kiln(*how, "--vae-revision", COMMIT, **environment)
        assert code == 0, err
        assert json.loads(out)["recipe"] == recipe
    assert hub.downloads == []


def test_pull_takes_an_autoencoder(hub: Hub) -> None:
    code, out, err = hub.kiln("pull", MODEL)
    assert code == 0, err
    assert out.startswith(f"{MODEL} at {COMMIT[:12]} (AutoencoderTiny), licence ")
    assert "\n2 files, " in out


def test_what_the_hub_has_not_is_one_sentence(hub: Hub, tiny_model: Path) -> None:
    def refused(*arguments: str, **environment: str) -> tuple[int, str]:
        code, _, err = hub.kiln("compile", *arguments, "--dry-run", **environment)
        assert len(err.splitlines()) == 1
        return code, err

    model = str(tiny_model)
    code, err = refused(model, "--vae", MODEL, HF_HUB_OFFLINE="1")
    assert (code, "run `kiln pull owner/tiny` where there is a connection" in err) == (17, True)
    code, err = refused(model, "--vae", MODEL, "--vae-revision", "v9")
    assert (code, "has no revision 'v9'" in err) == (2, True)
    code, err = refused(MODEL)
    assert (code, "and an autoencoder is given with --vae" in err) == (2, True)
    changed_config(hub.folder, _class_name="UNet2DConditionModel")
    code, err = refused(model, "--vae", MODEL)
    assert (code, "is of class UNet2DConditionModel, which can't be a VAE" in err) == (2, True)
    assert WEIGHTS not in hub.downloads


def test_nothing_of_a_whole_pipeline_is_fetched_for_its_vae(
    tiny_model: Path, tmp_path: Path
) -> None:
    with serve_model(write_model(tmp_path / "model")) as served:
        hub = Hub(served, tmp_path / "cache")
        code, _, err = hub.kiln("compile", str(tiny_model), "--vae", MODEL, "--dry-run")
        assert code == 2
        assert f"the hub model {MODEL} is a whole pipeline; give its folder vae" in err
        assert hub.downloads == []


def test_tensorrt_builds_both_halves(bundle: MakeBundle, taesd: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from runners.engines.tensorrt_plan import read_header

    found = open_bundle(bundle("tensorrt-rtx", "none", "fp16", "sm86,sm89,sm120", vae=taesd))
    for name in ("vae_decoder", "vae_encoder"):
        entry = found.manifest.named(name)
        header = read_header(found.file(entry.files["engine"]))
        assert header is not None
        assert header.capabilities == ("8.6", "8.9", "12.0")
        assert len(entry.unseen_sqnr_db) == 2
