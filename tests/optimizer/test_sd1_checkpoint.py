from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from optimizer import families
from optimizer.families import base_checkpoint, sd1_checkpoint, text_checkpoint
from optimizer.source import resolve
from optimizer.store import Store
from profiles.errors import SpecError, UnsupportedError
from tests.optimizer.checkpoints import (
    ASSETS,
    Small,
    assert_same_weights,
    build,
    checkpoint_keys,
    read_configs,
)

UNET = "model.diffusion_model."
WIDTHS = {"sd1": 768, "sd2": 1024}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture(params=["sd1", "sd2"])
def small(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    monkeypatch.setattr(base_checkpoint, "_ASSETS", tmp_path / "assets")
    return Small(request.param, tmp_path)


def config(folder: Path, file: str) -> dict[str, Any]:
    document = json.loads((folder / file).read_text())
    assert isinstance(document, dict)
    return document


def test_a_checkpoint_becomes_a_folder_with_the_same_weights(small: Small, store: Store) -> None:
    source = resolve(str(small.save()), store=store)
    assert (source.kind, source.family) == ("single-file", "sd1")
    for component in small.modules:
        assert {p.dtype for p in source.parameters(component).values()} == {"fp16"}
    assert_same_weights(small, source.folder)


def test_a_second_use_converts_nothing(
    small: Small, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve(str(small.save()), store=store)
    monkeypatch.setattr(sd1_checkpoint, "convert", None)
    copy = shutil.copy(small.file, small.file.with_name("renamed.safetensors"))
    second = resolve(str(copy), store=store)
    assert (second.folder, second.digest) == (first.folder, first.digest)


def test_the_whole_pipeline_loads_offline(small: Small, store: Store) -> None:
    from diffusers import StableDiffusionPipeline

    folder = resolve(str(small.save()), store=store).folder
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert type(pipeline.scheduler).__name__ in ("PNDMScheduler", "DDIMScheduler")
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def test_the_vocabulary_is_clips(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    shutil.copytree(ASSETS / "sd1" / "tokenizer", tmp_path, dirs_exist_ok=True)
    text_checkpoint.write_clip_vocabulary(tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocabulary) == 49408
    assert sorted(vocabulary.values()) == list(range(49408))
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    # the ids that OpenAI's tokenizer gives, between its start and end mark
    photo = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("a photo of a cat").input_ids == photo
    assert tokenizer("A  Photo of a CAT").input_ids == photo
    assert tokenizer.pad_token_id == 49407
    assert tokenizer.model_max_length == 77


@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_the_real_keys_are_detected(version: str) -> None:
    """Names and shapes of the full-size models, without weights."""
    configs = read_configs(ASSETS / version)
    modules = {part: build(config, device="meta") for part, config in configs.items()}
    tensors = checkpoint_keys(version, modules, configs)
    keys = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # v1-5-pruned-emaonly.safetensors has 1131 weights: 686 UNet, 248 VAE, 197 CLIP
    parts = (UNET, "first_stage_model.", "cond_stage_model.")
    counts = [sum(name.startswith(part) for name in keys) for part in parts]
    assert counts[:2] == [686, 248]
    assert version == "sd2" or counts[2] == 197
    assert families.detect_checkpoint(keys) == "sd1"
    probe = UNET + "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    assert keys[probe] == (320, WIDTHS[version])


@pytest.mark.parametrize("small", ["sd2"], indirect=True)
def test_velocity_is_told_from_the_weights(
    small: Small, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    probe = UNET + "output_blocks.5.1.transformer_blocks.0.norm1.bias"
    monkeypatch.setattr(sd1_checkpoint, "_V_PROBE", probe)
    for deviation, prediction, size in ((0.1, "v_prediction", 96), (0.08, "epsilon", 64)):
        small.tensors[probe] = torch.tensor([-deviation, deviation] * 16).half()
        source = resolve(str(small.save()), store=store)
        assert source.component_config("scheduler")["prediction_type"] == prediction
        assert source.component_config("unet")["sample_size"] == size
        other = {"v_prediction": "epsilon", "epsilon": "v_prediction"}[prediction]
        told = resolve(str(small.file), store=store, prediction_type=other)
        assert told.component_config("scheduler")["prediction_type"] == other
        assert told.component_config("unet")["sample_size"] == size
        assert told.digest != source.digest


@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_an_inpainting_unet_is_told_by_its_channels(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_checkpoint, "_ASSETS", tmp_path / "assets")
    # ComfyUI's limit isn't for inpainting: no probe may be asked
    monkeypatch.setattr(sd1_checkpoint, "_predicts_velocity", None)
    small = Small(version, tmp_path, unet={"in_channels": 9})
    sd1_checkpoint.convert(small.save(), small.folder)
    assert_same_weights(small, small.folder)
    index = config(small.folder, "model_index.json")
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
    assert config(small.folder, "unet/config.json")["in_channels"] == 9


@pytest.mark.parametrize("small", ["sd2"], indirect=True)
def test_turbo_names_its_text_encoder_otherwise(small: Small) -> None:
    small.tensors = {
        name.replace("cond_stage_model.", "conditioner.embedders.0."): tensor
        for name, tensor in small.tensors.items()
    }
    sd1_checkpoint.convert(small.save(), small.folder)
    assert_same_weights(small, small.folder)


@pytest.mark.parametrize("small", ["sd2"], indirect=True)
def test_the_last_layer_of_openclip_is_not_used(small: Small) -> None:
    import torch

    last = "cond_stage_model.model.transformer.resblocks.23."
    small.tensors[last + "ln_1.weight"] = torch.zeros(1024)
    small.tensors[last + "attn.in_proj_weight"] = torch.zeros(3072, 1024)
    sd1_checkpoint.convert(small.save(), small.folder)
    assert_same_weights(small, small.folder)


@pytest.mark.parametrize("small", ["sd1"], indirect=True)
def test_a_checkpoint_without_vae_is_refused_with_the_fix(small: Small, store: Store) -> None:
    small.drop("first_stage_model.")
    with pytest.raises(SpecError, match=r"Diffusion 1\.x without VAE \(first_.*give a file that"):
        resolve(str(small.save()), store=store)
    assert list((store.root / "v2" / "_tmp").iterdir()) == []


@pytest.mark.parametrize("small", ["sd1"], indirect=True)
@pytest.mark.parametrize("channels", [5, 8])
def test_other_channels_are_refused_with_the_fix(small: Small, channels: int, store: Store) -> None:
    import torch

    small.tensors[UNET + "input_blocks.0.0.weight"] = torch.zeros(32, channels, 3, 3)
    message = rf"UNet of {channels} input channels \(8: instruct-pix2pix, .*give a text-to-image"
    with pytest.raises(UnsupportedError, match=message):
        resolve(str(small.save()), store=store)


@pytest.mark.parametrize("small", ["sd1"], indirect=True)
def test_a_unet_without_its_first_convolution_is_refused_with_its_name(small: Small) -> None:
    small.drop(UNET + "input_blocks.0.0.")
    with pytest.raises(SpecError, match=r"lacks 2 of the \d+ weights of its UNet.*unet's conv_in"):
        sd1_checkpoint.convert(small.save(), small.folder)


@pytest.mark.parametrize("small", ["sd1"], indirect=True)
def test_averaged_weights_are_ignored(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    small.tensors["model_ema.diffusion_modeltime_embed0weight"] = torch.zeros(3)
    sd1_checkpoint.convert(small.save(), small.folder)
    assert_same_weights(small, small.folder)
    assert "is left out" not in capsys.readouterr().err
