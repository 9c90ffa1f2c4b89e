from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optimizer.families import base_checkpoint, flux_checkpoint, sd3_checkpoint
from optimizer.source import resolve
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
from tests.optimizer.transformer_layout import flux_keys

UNET = "model.diffusion_model."
REAL = {
    "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
    "img_in.weight": (3072, 64),
    "single_blocks.0.linear1.weight": (21504, 3072),
    "vector_in.in_layer.weight": (3072, 768),
}
REAL_OTHERS = {
    "FLUX.2": {k: v for k, v in REAL.items() if not k.startswith("vector_in")},
    "HunyuanVideo": {
        "double_blocks.0.img_attn_qkv.weight": (9216, 3072),
        "single_blocks.0.linear1.weight": (21504, 3072),
        "vector_in.in_layer.weight": (3072, 768),
    },
    "ControlNet": {k: v for k, v in REAL.items() if not k.startswith("single_")},
}


def make(folder: Path, patch: pytest.MonkeyPatch, **more: dict[str, Any]) -> Small:
    patch.setattr(base_checkpoint, "_ASSETS", folder / "assets")
    return Small("flux", folder, **more)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    return make(tmp_path, monkeypatch)


def config(folder: Path, file: str) -> dict[str, Any]:
    document = json.loads((folder / file).read_text())
    assert isinstance(document, dict)
    return document


def test_a_checkpoint_becomes_a_pipeline_that_draws_the_same(small: Small) -> None:
    import torch
    from diffusers import FluxPipeline

    flux_checkpoint.convert(small.save(), small.folder)
    assert_same_weights(small, small.folder)
    scheduler = config(small.folder, "scheduler/scheduler_config.json")
    assert (scheduler["shift"], scheduler["use_dynamic_shifting"]) == (3.0, True)
    converted = FluxPipeline.from_pretrained(small.folder, dtype=torch.float32)
    # the ids that google/t5-v1_1-xxl's own tokenizer gives
    assert converted.tokenizer_2("The house is wonderful.").input_ids == [37, 629, 19, 1627, 5, 1]
    assert_same_pictures(small, converted, max_sequence_length=16)


def test_names_without_prefix_are_the_same(small: Small) -> None:
    small.tensors = {key.removeprefix(UNET): tensor for key, tensor in small.tensors.items()}
    flux_checkpoint.convert(small.save(), small.folder)
    assert_same_weights(small, small.folder)


def test_schnell_is_told_by_its_missing_guidance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make(tmp_path, monkeypatch, transformer={"guidance_embeds": False, "num_layers": 1})
    flux_checkpoint.convert(small.save(), small.folder)
    assert_same_weights(small, small.folder)
    assert config(small.folder, "transformer/config.json") == small.configs["transformer"]
    scheduler = config(small.folder, "scheduler/scheduler_config.json")
    assert (scheduler["shift"], scheduler["use_dynamic_shifting"]) == (1.0, False)


def test_a_prediction_type_is_refused(small: Small, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="of a family that predicts a flow and nothing else: leave"):
        resolve(str(small.save()), store=Store(tmp_path / "cache"), prediction_type="epsilon")


def test_fill_is_told_by_its_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = make(tmp_path, monkeypatch, transformer={"in_channels": 384})
    flux_checkpoint.convert(small.save(), small.folder)
    assert_same_weights(small, small.folder)
    assert config(small.folder, "model_index.json")["_class_name"] == "FluxFillPipeline"


def test_depth_and_canny_are_refused_with_the_fix(small: Small) -> None:
    import torch

    small.tensors[UNET + "img_in.weight"] = torch.ones(32, 128)
    with pytest.raises(UnsupportedError, match=r"128 input channels .*: give FLUX\.1 dev or"):
        flux_checkpoint.convert(small.save(), small.folder)


@pytest.mark.parametrize("prefix", [UNET, ""])
def test_a_transformer_alone_is_refused_with_what_is_missing(small: Small, prefix: str) -> None:
    small.drop("text_encoders.", "vae.")
    small.tensors = {k.replace(UNET, prefix): tensor for k, tensor in small.tensors.items()}
    message = (
        r"is FLUX\.1 without CLIP-L text encoder \(text_encoders\.clip_l\.transformer\.\*\), "
        r"T5-XXL text encoder .*, VAE .*: give a file that holds all parts, or the diffusers folder"
    )
    with pytest.raises(SpecError, match=message):
        flux_checkpoint.convert(small.save(), small.folder)


def test_missing_weights_are_counted_and_the_first_is_named(small: Small) -> None:
    small.drop(UNET + "single_blocks.1.linear1.weight", UNET + "txt_in.")
    message = r"lacks 6 of the \d+ weights of its transformer.*first is transformer's context_emb"
    with pytest.raises(SpecError, match=message):
        flux_checkpoint.convert(small.save(), small.folder)


@pytest.mark.parametrize("name", ["another.weight", "single_blocks.1.linear3.weight"])
def test_an_unknown_weight_is_named(small: Small, name: str) -> None:
    import torch

    small.tensors[UNET + name] = torch.ones(3)
    with pytest.raises(SpecError, match=rf"weights in its transformer .*\(1, the .*{name}\)"):
        flux_checkpoint.convert(small.save(), small.folder)


def test_eight_bit_floats_become_bf16_with_a_word(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    small.tensors = {
        name: tensor.to(torch.float8_e4m3fn) if name.startswith(UNET) else tensor
        for name, tensor in small.tensors.items()
    }
    flux_checkpoint.convert(small.save(), small.folder)
    assert ": fp8 weights become bf16, twice as large" in capsys.readouterr().err
    found = load_file(small.folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    joined = small.tensors[UNET + "single_blocks.2.linear1.weight"].bfloat16()
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    names = [f"single_transformer_blocks.2.{part}.weight" for part in parts]
    assert torch.equal(torch.cat([found[name] for name in names]), joined)


@pytest.mark.slow
def test_the_table_is_diffusers_at_the_real_width() -> None:
    """1.5 GB: diffusers' converter takes no other width."""
    import torch
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders import single_file_utils

    with torch.device("meta"):
        shapes = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    weights = {name: torch.randn(t.shape).half() for name, t in shapes.state_dict().items()}
    keys = flux_keys(weights, prefix=UNET)
    expected = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(dict(keys))
    width = {"num_attention_heads": 24, "attention_head_dim": 128}
    found = flux_checkpoint._transformer_weights(keys, width)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_real_shapes_are_told_from_others() -> None:
    assert flux_checkpoint.owns_checkpoint(REAL)
    assert flux_checkpoint.owns_checkpoint({UNET + name: shape for name, shape in REAL.items()})
    assert not sd3_checkpoint.owns_checkpoint(REAL)
    owned = [name for name, k in REAL_OTHERS.items() if flux_checkpoint.owns_checkpoint(k)]
    assert owned == []


def test_the_shipped_configs_are_the_real_model() -> None:
    """Names, shapes and sizes of the full-size model, without weights."""
    configs = read_configs(ASSETS / "flux")
    modules = {part: build(config, device="meta") for part, config in configs.items()}
    keys = checkpoint_keys("flux", modules, configs)
    assert {key: tuple(keys[UNET + key].shape) for key in REAL} == REAL
    assert sum(key.startswith(UNET) for key in keys) == 780  # flux1-dev.safetensors
    size = sum(parameter.numel() for parameter in modules["transformer"].parameters())
    assert size == 11_901_408_320
