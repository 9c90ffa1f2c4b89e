from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimizer import families, single_file
from optimizer.families import base_checkpoint, sdxl_checkpoint
from optimizer.store import Store
from profiles.errors import SpecError, UnsupportedError
from tests.optimizer.checkpoints import (
    ASSETS,
    Small,
    assert_same_pictures,
    assert_same_weights,
    build,
    checkpoint_keys,
    read_configs,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""diffusers 0.42's Euler scheduler on numpy 2."""

UNET = "model.diffusion_model."
REAL = {
    UNET + "input_blocks.0.0.weight": (320, 4, 3, 3),
    UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    UNET + "label_emb.0.0.weight": (1280, 2816),
}
REAL_REFINER = {
    UNET + "input_blocks.0.0.weight": (384, 4, 3, 3),
    UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (768, 1280),
    UNET + "label_emb.0.0.weight": (1536, 2560),
}
REAL_SD21_UNCLIP = {UNET + "label_emb.0.0.weight": (1280, 2048)}


def make(name: str, folder: Path, patch: pytest.MonkeyPatch) -> Small:
    patch.setattr(base_checkpoint, "_ASSETS", folder / "assets")
    return Small(name, folder)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    return make("sdxl", tmp_path, monkeypatch)


def config(folder: Path, file: str) -> dict[str, Any]:
    document = json.loads((folder / file).read_text())
    assert isinstance(document, dict)
    return document


def test_a_checkpoint_becomes_a_pipeline_that_draws_the_same(small: Small) -> None:
    import torch
    from diffusers import StableDiffusionXLPipeline

    sdxl_checkpoint.convert(small.save(), small.folder)
    assert_same_weights(small, small.folder)
    converted = StableDiffusionXLPipeline.from_pretrained(small.folder, dtype=torch.float32)
    assert converted.tokenizer.pad_token_id == 49407
    assert converted.tokenizer_2.pad_token_id == 0
    assert_same_pictures(small, converted)


def test_a_checkpoint_is_converted_once(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(small.file.parent / "cache")
    monkeypatch.setattr(families, "detect_checkpoint", lambda _: "sdxl")
    folder = single_file.convert(small.save(), store)
    assert_same_weights(small, folder)
    monkeypatch.setattr(sdxl_checkpoint, "convert", None)
    assert single_file.convert(small.file, store) == folder


def test_the_refiner_becomes_a_pipeline_that_draws_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    import torch
    from diffusers import StableDiffusionXLImg2ImgPipeline

    small = make("sdxl_refiner", tmp_path, monkeypatch)
    sdxl_checkpoint.convert(small.save(), small.folder)
    assert_same_weights(small, small.folder)
    assert config(small.folder, "model_index.json")["text_encoder"] == [None, None]
    converted = StableDiffusionXLImg2ImgPipeline.from_pretrained(small.folder, dtype=torch.float32)
    assert converted.config.requires_aesthetics_score
    assert not converted.config.force_zeros_for_empty_prompt
    image = np.random.default_rng(0).random((1, 32, 32, 3), np.float32)
    assert_same_pictures(small, converted, image=image, strength=1.0, height=None, width=None)


@pytest.mark.slow
def test_a_converted_refiner_changes_pictures_on_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Callable[..., Path]
) -> None:
    import numpy as np
    import torch
    from diffusers import StableDiffusionXLImg2ImgPipeline
    from PIL import Image

    import runners

    small = make("sdxl_refiner", tmp_path, monkeypatch)
    sdxl_checkpoint.convert(small.save(), small.folder)
    theirs = StableDiffusionXLImg2ImgPipeline.from_pretrained(small.folder, dtype=torch.float32)
    ours = runners.load(bundle("onnxruntime", model=small.folder), task="img2img", threads=1)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    found = []
    for pipeline in (theirs, ours):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        image = pipeline("a cat", image=Image.fromarray(pixels), generator=generator).images[0]
        found.append(np.asarray(image, dtype=np.int16))
    ours.kiln.close()
    assert np.abs(found[0] - pixels).mean() > 1
    assert np.abs(found[0] - found[1]).max() <= 1


def test_an_inpainting_unet_is_told_by_its_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_checkpoint, "_ASSETS", tmp_path / "assets")
    small = Small("sdxl", tmp_path, unet={"in_channels": 9})
    sdxl_checkpoint.convert(small.save(), small.folder)
    assert_same_weights(small, small.folder)
    index = config(small.folder, "model_index.json")
    assert index["_class_name"] == "StableDiffusionXLInpaintPipeline"
    assert config(small.folder, "unet/config.json")["in_channels"] == 9


@pytest.mark.parametrize(
    ("marks", "change"),
    [
        ((), {}),
        (("v_pred",), {"prediction_type": "v_prediction"}),
        (
            ("v_pred", "ztsnr"),
            {
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            },
        ),
    ],
)
def test_velocity_is_told_by_its_key(
    small: Small, marks: tuple[str, ...], change: dict[str, Any]
) -> None:
    import torch

    small.tensors |= {mark: torch.tensor([]) for mark in marks}
    sdxl_checkpoint.convert(small.save(), small.folder)
    found = config(small.folder, "scheduler/scheduler_config.json")
    shipped = config(ASSETS / "sdxl", "scheduler/scheduler_config.json")
    assert found == {**shipped, **change}


def test_edm_schedules_are_refused_with_the_fix(small: Small) -> None:
    import torch

    small.tensors["edm_mean"] = torch.zeros(4)
    with pytest.raises(UnsupportedError, match=r"it has edm_mean, as Playground.*diffusers folder"):
        sdxl_checkpoint.convert(small.save(), small.folder)


def test_other_channels_are_refused_with_the_fix(small: Small) -> None:
    import torch

    small.tensors[UNET + "input_blocks.0.0.weight"] = torch.zeros(32, 8, 3, 3)
    with pytest.raises(UnsupportedError, match=r"8 input channels \(8: instruct-pix2pix\): give"):
        sdxl_checkpoint.convert(small.save(), small.folder)


def test_a_unet_alone_is_refused_with_all_that_is_missing(small: Small) -> None:
    small.drop("conditioner.", "first_stage_model.")
    message = (
        r"is Stable Diffusion XL without CLIP-L text encoder \(conditioner\.embedders\.0\.trans"
        r".*, OpenCLIP bigG text encoder .*, VAE \(first_stage_model\.\*\): give a file that holds"
    )
    with pytest.raises(SpecError, match=message):
        sdxl_checkpoint.convert(small.save(), small.folder)
    assert not small.folder.exists()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (UNET + "label_emb.0.2.bias", "UNet"),
        (UNET + "input_blocks.1.0.in_layers.2.weight", "UNet"),
        (UNET + "output_blocks.0.1.norm.bias", "UNet"),
        ("first_stage_model.decoder.up.1.upsample.conv.bias", "VAE"),
        ("conditioner.embedders.1.model.text_projection", "OpenCLIP bigG text encoder"),
    ],
)
def test_a_missing_weight_is_named(small: Small, name: str, part: str) -> None:
    del small.tensors[name]
    message = rf"lacks 1 of the \d+ weights of its {part}.* \(the first is .*\): download it again"
    with pytest.raises(SpecError, match=message):
        sdxl_checkpoint.convert(small.save(), small.folder)


@pytest.mark.parametrize(
    "name",
    [
        UNET + "input_blocks.1.1.norm.weight",
        UNET + "another.weight",
        "first_stage_model.another.weight",
        "conditioner.embedders.0.transformer.text_model.another",
        "conditioner.embedders.1.model.transformer.resblocks.2.ln_1.bias",
    ],
)
def test_an_unknown_weight_of_a_part_is_named(small: Small, name: str) -> None:
    import torch

    small.tensors[name] = torch.zeros(3)
    with pytest.raises(
        SpecError, match=r"weights in its .* that the architecture has not \(1, the first is "
    ):
        sdxl_checkpoint.convert(small.save(), small.folder)


def test_what_is_no_part_of_the_model_is_left_out_with_a_word(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    small.tensors["bundle_emb.bad.string_to_param.*"] = torch.zeros(1, 4)
    sdxl_checkpoint.convert(small.save(), small.folder)
    assert_same_weights(small, small.folder)
    sentence = "no part of Stable Diffusion XL is left out (tensors: 1, the first is bundle_emb.bad"
    assert sentence in capsys.readouterr().err


def test_eight_bit_floats_become_bf16_with_a_word(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    weight = UNET + "time_embed.0.weight"
    for name, tensor in small.tensors.items():
        if name.startswith(UNET):
            small.tensors[name] = tensor.to(torch.float8_e4m3fn)
    small.tensors[UNET + "time_embed.0.scale_weight"] = torch.tensor(3.0)
    small.tensors[UNET + "scaled_fp8"] = torch.tensor([]).to(torch.float8_e4m3fn)
    sdxl_checkpoint.convert(small.save(), small.folder)
    count = sum(name.startswith(UNET) for name in small.tensors) - 2
    assert f"fp8 weights become bf16, twice as large ({count} tensors)" in capsys.readouterr().err
    found = load_file(small.folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    scaled = (small.tensors[weight].float() * 3).bfloat16()
    assert torch.equal(found["time_embedding.linear_1.weight"], scaled)
    plain = small.tensors[UNET + "time_embed.2.weight"].bfloat16()
    assert torch.equal(found["time_embedding.linear_2.weight"], plain)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ((32, 1), r"has a scale .*time_embed\.0\.scale_weight of shape \(32, 1\).*the 16-bit ver"),
        (None, r"has weights of type uint8, quantized by another tool: give its 16-bit or fp8"),
    ],
)
def test_other_quantized_weights_are_refused_with_the_fix(
    small: Small, scale: tuple[int, int] | None, message: str
) -> None:
    import torch

    if scale is None:
        small.tensors[UNET + "time_embed.0.weight"] = torch.zeros(8, dtype=torch.uint8)
    else:
        small.tensors[UNET + "time_embed.0.scale_weight"] = torch.ones(scale)
    with pytest.raises(UnsupportedError, match=message):
        sdxl_checkpoint.convert(small.save(), small.folder)


def test_the_real_shapes_are_told_from_others() -> None:
    assert sdxl_checkpoint.owns_checkpoint(REAL)
    assert sdxl_checkpoint.owns_checkpoint(REAL_REFINER)
    assert not sdxl_checkpoint.owns_checkpoint(REAL_SD21_UNCLIP)
    assert not sdxl_checkpoint.owns_checkpoint({})


@pytest.mark.parametrize("name", ["sdxl", "sdxl_refiner"])
def test_the_shipped_configs_are_the_real_models(name: str) -> None:
    """Names, shapes and sizes of the full-size models, without weights."""
    configs = read_configs(ASSETS / name)
    modules = {part: build(config, device="meta") for part, config in configs.items()}
    keys = checkpoint_keys(name, modules, configs)
    shapes = {key: tuple(tensor.shape) for key, tensor in keys.items()}
    real = REAL if name == "sdxl" else REAL_REFINER
    assert {key: shapes[key] for key in real} == real
    sizes = {part: sum(p.numel() for p in m.parameters()) for part, m in modules.items()}
    assert sizes["text_encoder_2"] == 694_659_840  # laion/CLIP-ViT-bigG-14, its text half
    assert sizes["vae"] == 83_653_863
    if name == "sdxl":
        # sd_xl_base_1.0.safetensors: 1680 weights of the UNet, 248 of the VAE
        assert sum(key.startswith(UNET) for key in keys) == 1680
        assert sum(key.startswith("first_stage_model.") for key in keys) == 248
        assert (sizes["unet"], sizes["text_encoder"]) == (2_567_463_684, 123_060_480)
