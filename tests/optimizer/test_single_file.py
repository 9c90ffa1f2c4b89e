from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from optimizer import families
from optimizer.families import sd1_checkpoint
from optimizer.source import resolve
from optimizer.store import Store
from optimizer.unpickle import main as unpickle
from profiles.errors import SpecError, UnsupportedError
from tests.optimizer import ldm_layout
from tests.optimizer.tiny_folder import write_weights

ASSETS = Path(sd1_checkpoint.__file__).parent / "assets"
COMPONENTS = ("text_encoder", "unet", "vae")
WIDTHS = {"sd1": 768, "sd2": 1024}


def small_configs(version: str, folder: Path) -> None:
    """The shipped configs with few and narrow layers; the widths that tell the versions stay."""
    shutil.copytree(ASSETS / version, folder)
    changes: dict[str, dict[str, Any]] = {
        "text_encoder": {
            "vocab_size": 50,
            "num_hidden_layers": 2,
            "intermediate_size": 32,
            "bos_token_id": 48,
            "eos_token_id": 49,
            "pad_token_id": 0,
        },
        "unet": {
            "block_out_channels": [32, 64],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "attention_head_dim": 8,
        },
        "vae": {
            "block_out_channels": [32, 64],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
        },
    }
    for component, change in changes.items():
        path = folder / component / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def build(component: str, configs: Path) -> Any:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    config = json.loads((configs / component / "config.json").read_text())
    if component == "text_encoder":
        return CLIPTextModel(CLIPTextConfig(**config))
    return getattr(diffusers, config["_class_name"]).from_config(config)


def ldm_checkpoint(version: str, configs: Path, *, device: str = "cpu") -> dict[str, Any]:
    """Random weights in fp16 under the keys of a single file."""
    import torch

    torch.manual_seed(0)
    with torch.device(device):
        weights = {
            component: {k: v.half() for k, v in build(component, configs).state_dict().items()}
            for component in COMPONENTS
        }
    unet = json.loads((configs / "unet" / "config.json").read_text())
    vae = json.loads((configs / "vae" / "config.json").read_text())
    clip_keys = ldm_layout.clip_keys if version == "sd1" else ldm_layout.open_clip_keys
    return {
        **clip_keys(weights["text_encoder"]),
        **ldm_layout.unet_keys(
            weights["unet"], layers=unet["layers_per_block"], up_types=unet["up_block_types"]
        ),
        **ldm_layout.vae_keys(weights["vae"], levels=len(vae["block_out_channels"])),
        "alphas_cumprod": torch.zeros(1000),
    }


class Small:
    """A checkpoint file of a version, the configs it was made from, and a store."""

    def __init__(self, version: str, folder: Path) -> None:
        self.configs = folder / "assets" / version
        self.file = folder / "checkpoint.safetensors"
        self.store = Store(folder / "cache")
        small_configs(version, self.configs)
        shutil.copytree(ASSETS / "clip", folder / "assets" / "clip")
        self.tensors = ldm_checkpoint(version, self.configs)
        self.save()

    def save(self) -> None:
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in self.tensors.items()}, self.file)


@pytest.fixture(params=["sd1", "sd2"])
def small(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    monkeypatch.setattr(sd1_checkpoint, "_ASSETS", tmp_path / "assets")
    return Small(request.param, tmp_path)


def test_a_checkpoint_becomes_a_folder_with_the_same_weights(small: Small) -> None:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    source = resolve(str(small.file), store=small.store)
    assert (source.kind, source.family) == ("single-file", "sd1")
    classes = (CLIPTextModel, UNet2DConditionModel, AutoencoderKL)
    torch.manual_seed(0)
    for component, module in zip(COMPONENTS, classes, strict=True):
        expected = build(component, small.configs).half().state_dict()
        assert {p.dtype for p in source.parameters(component).values()} == {"fp16"}
        loaded, report = module.from_pretrained(
            source.folder / component, dtype=torch.float16, output_loading_info=True
        )
        assert not any(report.values()), report
        found = loaded.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_second_use_converts_nothing(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve(str(small.file), store=small.store)
    monkeypatch.setattr(sd1_checkpoint, "convert", None)
    copy = shutil.copy(small.file, small.file.with_name("renamed.safetensors"))
    second = resolve(str(copy), store=small.store)
    assert (second.folder, second.digest) == (first.folder, first.digest)


def test_the_whole_pipeline_loads_offline(small: Small) -> None:
    from diffusers import StableDiffusionPipeline

    folder = resolve(str(small.file), store=small.store).folder
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert type(pipeline.scheduler).__name__ in ("PNDMScheduler", "DDIMScheduler")
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def test_the_vocabulary_is_clips(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    shutil.copytree(ASSETS / "sd1" / "tokenizer", tmp_path, dirs_exist_ok=True)
    sd1_checkpoint.write_clip_vocabulary(tmp_path)
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
    keys = {
        name: tuple(tensor.shape)
        for name, tensor in ldm_checkpoint(version, ASSETS / version, device="meta").items()
    }
    # v1-5-pruned-emaonly.safetensors has 1131 weights: 686 UNet, 248 VAE, 197 CLIP
    parts = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    counts = [sum(name.startswith(part) for name in keys) for part in parts]
    assert counts[:2] == [686, 248]
    assert version == "sd2" or counts[2] == 197
    assert families.detect_checkpoint(keys) == "sd1"
    probe = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    assert keys[probe] == (320, WIDTHS[version])


@pytest.mark.parametrize("small", ["sd2"], indirect=True)
def test_velocity_is_told_from_the_weights(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    probe = "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.norm1.bias"
    monkeypatch.setattr(sd1_checkpoint, "_V_PROBE", probe)
    small.tensors[probe] = torch.tensor([-0.1, 0.1] * 16).half()
    small.save()
    source = resolve(str(small.file), store=small.store)
    assert source.component_config("scheduler")["prediction_type"] == "v_prediction"
    assert source.component_config("unet")["sample_size"] == 96
    small.tensors[probe] = torch.tensor([-0.08, 0.08] * 16).half()
    small.save()
    source = resolve(str(small.file), store=small.store)
    assert source.component_config("scheduler")["prediction_type"] == "epsilon"
    assert source.component_config("unet")["sample_size"] == 64


@pytest.mark.parametrize("small", ["sd1"], indirect=True)
def test_a_checkpoint_without_vae_is_refused_with_the_fix(small: Small) -> None:
    small.tensors = {k: v for k, v in small.tensors.items() if "first_stage" not in k}
    small.save()
    with pytest.raises(SpecError, match=r"lacks \d+ of the \d+ weights of its vae.*full checkpoi"):
        resolve(str(small.file), store=small.store)
    assert list((small.store.root / "v1" / "_tmp").iterdir()) == []


@pytest.mark.parametrize("small", ["sd1"], indirect=True)
def test_an_inpainting_checkpoint_is_refused_with_the_fix(small: Small) -> None:
    import torch

    small.tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)
    small.save()
    with pytest.raises(UnsupportedError, match=r"9 input channels .*give the text-to-image"):
        resolve(str(small.file), store=small.store)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("lora_unet_down_blocks_0.lora_up.weight", "holds a LoRA and no whole model: give one of"),
        ("down_blocks.0.resnets.0.conv1.weight", "holds one component and no whole model"),
        ("double_blocks.0.weight", r"does not know \(its first tensor is double_blocks"),
    ],
)
def test_another_file_is_refused_with_the_known_families(
    tmp_path: Path, names: str, message: str
) -> None:
    write_weights(tmp_path / "a.safetensors", {names: (2,)})
    with pytest.raises(UnsupportedError, match=message) as caught:
        resolve(str(tmp_path / "a.safetensors"))
    assert "Stable Diffusion 1.x and 2.x" in str(caught.value)


@pytest.mark.parametrize("ending", ["ckpt", "pt", "pth", "bin"])
def test_a_pickle_is_refused_with_the_fix(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"model.{ending}"
    path.write_bytes(b"\x80\x02.")
    with pytest.raises(SpecError, match=re.escape(f"`python -m optimizer.unpickle {path}`")):
        resolve(str(path))


def test_a_text_file_is_refused_with_what_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(SpecError, match=r"is no model: give a diffusers folder, a \.safetensors"):
        resolve(str(tmp_path / "model.txt"))


def test_unpickle_writes_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import load_file

    shared = torch.arange(6.0)
    (tmp_path / "text_encoder").mkdir()
    pickle = tmp_path / "text_encoder" / "pytorch_model.bin"
    torch.save({"state_dict": {"a": shared, "b": shared[:3]}, "step": 3}, pickle)
    assert unpickle([str(tmp_path)]) == 0
    written = tmp_path / "text_encoder" / "model.safetensors"
    assert capsys.readouterr().out == f"{written}\n"
    assert {name: t.tolist() for name, t in load_file(written).items()} == {
        "a": [0, 1, 2, 3, 4, 5],
        "b": [0, 1, 2],
    }
    assert unpickle([str(pickle)]) == 2
    assert "exists: use it, or move it away first" in capsys.readouterr().err


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harmed"),))


def test_unpickle_runs_no_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"a": Attack()}, tmp_path / "model.ckpt")
    assert unpickle([str(tmp_path / "model.ckpt")]) == 11
    assert "was not loaded: use the .safetensors version" in capsys.readouterr().err
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("arguments", [[], ["a", "b"]])
def test_unpickle_says_its_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert unpickle(arguments) == 2
    assert "usage: python -m optimizer.unpickle" in capsys.readouterr().err
