from __future__ import annotations

import json
from pathlib import Path

import pytest

from optimizer.families import base_checkpoint, family, flux_checkpoint, sd3_checkpoint
from optimizer.source import resolve
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

UNET = "model.diffusion_model."
REAL = {
    UNET + "joint_blocks.0.context_block.attn.qkv.weight": (4608, 1536),
    UNET + "pos_embed": (1, 36864, 1536),
    UNET + "x_embedder.proj.weight": (1536, 16, 2, 2),
}
V35 = {
    "attention_head_dim": 16,
    "dual_attention_layers": [0],
    "num_attention_heads": 4,
    "num_layers": 3,
    "qk_norm": "rms_norm",
}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    monkeypatch.setattr(base_checkpoint, "_ASSETS", tmp_path / "assets")
    return Small("sd3", tmp_path)


def test_a_checkpoint_becomes_a_pipeline_that_draws_the_same(small: Small) -> None:
    import torch
    from diffusers import StableDiffusion3Pipeline

    sd3_checkpoint.convert(small.save(), small.folder)
    assert_same_weights(small, small.folder)
    converted = StableDiffusion3Pipeline.from_pretrained(small.folder, dtype=torch.float32)
    assert converted.tokenizer_2.pad_token_id == 0
    # the ids that google/t5-v1_1-xxl's own tokenizer gives
    assert converted.tokenizer_3("The house is wonderful.").input_ids == [37, 629, 19, 1627, 5, 1]
    assert_same_pictures(small, converted)


def test_version_3_5_is_read_from_the_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_checkpoint, "_ASSETS", tmp_path / "assets")
    small = Small("sd3", tmp_path, transformer={**V35, "pos_embed_max_size": 20})
    sd3_checkpoint.convert(small.save(), small.folder)
    assert_same_weights(small, small.folder)
    found = json.loads((small.folder / "transformer" / "config.json").read_text())
    assert found == small.configs["transformer"]


def test_a_file_without_text_encoders_is_refused_with_what_is_missing(small: Small) -> None:
    small.drop("text_encoders.")
    message = (
        r"is Stable Diffusion 3 without CLIP-L text encoder \(text_encoders\.clip_l\.transformer"
        r"\.\*\), OpenCLIP bigG text encoder \(text_encoders.clip_g\.transformer\.\*\): give a "
        r"file that holds all parts, or the diffusers folder or hub id of the model"
    )
    with pytest.raises(SpecError, match=message):
        sd3_checkpoint.convert(small.save(), small.folder)


def test_a_file_without_t5_becomes_a_pipeline_without_it(small: Small) -> None:
    """As Stability's sd3_medium_incl_clips.safetensors."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    small.drop("text_encoders.t5xxl.")
    del small.modules["text_encoder_3"]
    sd3_checkpoint.convert(small.save(), small.folder)
    assert_same_weights(small, small.folder)
    assert not any(small.folder.glob("*_3"))
    converted = StableDiffusion3Pipeline.from_pretrained(
        small.folder, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    assert_same_pictures(small, converted)
    source = resolve(str(small.folder))
    kept = [spec.name for spec in family(source.family).of(source.folders).components]
    assert kept == ["text_encoder", "text_encoder_2", "transformer", "vae_decoder", "vae_encoder"]


def test_missing_weights_are_counted_and_the_first_is_named(small: Small) -> None:
    small.drop(UNET + "joint_blocks.1.x_block.attn.qkv.", UNET + "final_layer.linear.bias")
    message = r"lacks 7 of the \d+ weights of its transformer.*first is transformer's transformer_"
    with pytest.raises(SpecError, match=message):
        sd3_checkpoint.convert(small.save(), small.folder)


@pytest.mark.parametrize("name", ["another.weight", "joint_blocks.1.x_block.attn3.proj.weight"])
def test_an_unknown_weight_is_named(small: Small, name: str) -> None:
    import torch

    small.tensors[UNET + name] = torch.ones(3)
    with pytest.raises(SpecError, match=rf"weights in its transformer .*\(1, the .*{name}\)"):
        sd3_checkpoint.convert(small.save(), small.folder)


def test_other_channels_are_refused_with_the_fix(small: Small) -> None:
    import torch

    small.tensors[UNET + "x_embedder.proj.weight"] = torch.ones(64, 33, 2, 2)
    with pytest.raises(UnsupportedError, match=r"33 input channels: give a text-to-image version"):
        sd3_checkpoint.convert(small.save(), small.folder)


def test_the_real_shapes_are_told_from_others() -> None:
    bare = {name.removeprefix(UNET): shape for name, shape in REAL.items()}
    assert sd3_checkpoint.owns_checkpoint(REAL)
    assert sd3_checkpoint.owns_checkpoint(bare)
    assert not flux_checkpoint.owns_checkpoint(REAL)
    assert not sd3_checkpoint.owns_checkpoint({})


def test_the_shipped_configs_are_the_real_model() -> None:
    """Names, shapes and sizes of the full-size model, without weights."""
    configs = read_configs(ASSETS / "sd3")
    modules = {part: build(config, device="meta") for part, config in configs.items()}
    keys = checkpoint_keys("sd3", modules, configs)
    assert {key: tuple(keys[key].shape) for key in REAL} == REAL
    sizes = {part: sum(p.numel() for p in m.parameters()) for part, m in modules.items()}
    assert sizes["text_encoder_2"] == 694_659_840  # laion/CLIP-ViT-bigG-14, its text half
    assert sizes["text_encoder_3"] == 4_762_310_656  # google/t5-v1_1-xxl, its encoder
    assert sizes["vae"] == 83_819_683
