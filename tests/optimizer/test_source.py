from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimizer.source import resolve
from optimizer.store import sha256_file
from optimizer.weights import Parameter
from profiles.errors import SpecError, UnsupportedError
from runners import receipts
from tests.optimizer.tiny_folder import write_json, write_model, write_weights

USED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def test_a_folder_is_described(model: Path) -> None:
    source = resolve(str(model))
    assert (source.kind, source.name, source.folder) == ("folder", str(model), model)
    assert (source.family, source.pipeline_class) == ("sd1", "StableDiffusionPipeline")
    assert source.revision is None
    assert list(source.files) == USED
    assert source.files[UNET].size == (model / UNET).stat().st_size
    assert source.files[UNET].sha256 == sha256_file(model / UNET)


@pytest.mark.skipif(sys.platform == "win32", reason="no receipts are kept there")
def test_a_model_that_has_not_changed_is_hashed_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))
    real, now, hashed = receipts._hashed, time.time_ns(), list[int]()

    def counted(descriptor: int) -> str:
        hashed.append(descriptor)
        return real(descriptor)

    monkeypatch.setattr(receipts, "_hashed", counted)
    monkeypatch.setattr(receipts.time, "time_ns", lambda: now + 10 * 10**9)
    first = resolve(str(model))
    assert resolve(str(model)).digest == first.digest
    assert len(hashed) == len(USED)
    (model / "unet/config.json").write_text('{"sample_size": 8}')
    assert resolve(str(model)).digest != first.digest
    assert len(hashed) == len(USED) + 1
    resolve(str(model), always_hash=True)
    assert len(hashed) == 2 * len(USED) + 1


@pytest.mark.parametrize(
    ("options", "always"),
    [((), False), (("--verify", "changed"), False), (("--verify", "always"), True)],
)
def test_compile_says_whether_receipts_count(
    model: Path, monkeypatch: pytest.MonkeyPatch, kiln: Any, options: tuple[str, ...], always: bool
) -> None:
    seen = []

    def noted(*_: object, always_hash: bool, **__: object) -> None:
        seen.append(always_hash)
        raise SpecError("Stop here.")

    monkeypatch.setattr("optimizer.compile.resolve", noted)
    for more in (("--dry-run",), ("-o", str(model.parent / "out"))):
        assert kiln("compile", model, *more, *options).sentence == "Error: Stop here."
    assert seen == [always, always]


def test_configs_and_parameters_are_read(model: Path) -> None:
    source = resolve(str(model))
    assert source.component_config("unet") == {"sample_size": 16}
    assert source.component_config("scheduler") == {"_class_name": "DDIMScheduler"}
    assert source.component_config("tokenizer") == {}
    assert source.parameters("unet") == {
        "a.weight": Parameter((2, 2), "fp16"),
        "a.bias": Parameter((2,), "fp16"),
    }
    assert source.weight_files("unet") == (model / UNET,)
    assert source.variant("unet") is None


def test_the_digest_is_of_the_used_files_and_not_of_the_place(model: Path, tmp_path: Path) -> None:
    before = resolve(str(model)).digest
    moved = shutil.copytree(model, tmp_path / "elsewhere")
    (moved / "README.md").unlink()
    assert resolve(str(moved)).digest == before
    write_json(moved / "unet" / "config.json", {"sample_size": 32})
    assert resolve(str(moved)).digest != before


def test_calibration_prompts_and_defaults_beside_a_model_count(model: Path) -> None:
    before = resolve(str(model)).digest
    write_json(model / "kiln.json", {"steps": 20})
    (model / "prompts").mkdir()
    (model / "prompts" / "calibration.txt").write_text("a cat\n")
    source = resolve(str(model))
    assert {"kiln.json", "prompts/calibration.txt"} < set(source.files)
    assert source.digest != before


def test_resolving_imports_no_torch(model: Path) -> None:
    code = (
        "import sys; from optimizer.source import resolve; resolve(sys.argv[1]);"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(model)], check=True)


def rename(model: Path, *names: str) -> None:
    (model / UNET).unlink()
    for name in names:
        write_weights(model / "unet" / name)


def test_an_fp16_variant_is_used_where_it_is_alone(model: Path) -> None:
    rename(model, "diffusion_pytorch_model.fp16.safetensors")
    source = resolve(str(model))
    assert source.variant("unet") == "fp16"
    assert source.variant("vae") is None


def test_the_plain_variant_is_used_where_there_are_several(model: Path) -> None:
    write_weights(model / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    write_weights(model / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    assert list(resolve(str(model)).files) == USED


@pytest.mark.parametrize(
    ("names", "index", "variant"),
    [
        (
            [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)],
            "diffusion_pytorch_model.safetensors.index.json",
            None,
        ),
        (
            [f"diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)],
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "fp16",
        ),
        (
            [f"diffusion_pytorch_model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)],
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "fp16",
        ),
    ],
)
def test_shards_are_used_with_their_index(
    model: Path, names: list[str], index: str, variant: str | None
) -> None:
    rename(model, *names)
    write_json(model / "unet" / index, {})
    source = resolve(str(model))
    assert [path.name for path in source.weight_files("unet")] == names
    assert f"unet/{index}" in source.files
    assert source.variant("unet") == variant


def drop_shard(model: Path) -> None:
    rename(model, "diffusion_pytorch_model-00001-of-00002.safetensors")


def drop_weights(model: Path) -> None:
    (model / UNET).unlink()


def drop_component(model: Path) -> None:
    shutil.rmtree(model / "vae")


def drop_index(model: Path) -> None:
    (model / "model_index.json").unlink()


def drop_config(model: Path) -> None:
    (model / "unet" / "config.json").unlink()


def drop_index_and_checkpoint(model: Path) -> None:
    drop_index(model)
    (model / "whole-checkpoint.safetensors").unlink()


def make_bundle(model: Path) -> None:
    (model / "model_index.json").rename(model / "manifest.json")


def make_component(model: Path) -> None:
    (model / "model_index.json").rename(model / "config.json")


def forget_unet(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    write_json(model / "model_index.json", {**index, "unet": [None, None]})


def break_index(model: Path) -> None:
    (model / "model_index.json").write_text('{"_class_name": ')


def list_index(model: Path) -> None:
    (model / "model_index.json").write_text("[]")


def pickle_weights(model: Path) -> None:
    (model / UNET).rename(model / "unet" / "diffusion_pytorch_model.bin")


def truncate(model: Path) -> None:
    content = (model / UNET).read_bytes()
    (model / UNET).write_bytes(content[:-1])


def truncate_header(model: Path) -> None:
    (model / UNET).write_bytes((model / UNET).read_bytes()[:20])


def truncate_to_nothing(model: Path) -> None:
    (model / UNET).write_bytes(b"")


def break_header(model: Path) -> None:
    (model / UNET).write_bytes((model / UNET).read_bytes().replace(b"dtype", b'd"ype'))


def break_shape(model: Path) -> None:
    (model / UNET).write_bytes((model / UNET).read_bytes().replace(b"[2,2]", b"[2,4]"))


def leave_pointer(model: Path) -> None:
    (model / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def no_safetensors(model: Path) -> None:
    (model / UNET).write_bytes(b"PK\x03\x04" + b"\xff" * 100)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shard, r"has 1 of the 2 weight files of unet: download the model again"),
        (drop_weights, r"has no weights for unet: download the model again"),
        (drop_component, r"has no folder vae, which .*download the model again"),
        (drop_index, r"has no model_index\.json; give .*whole-checkpoint\.safetensors itself"),
        (drop_index_and_checkpoint, r"has no model_index\.json; give the folder that has it"),
        (make_component, r"it may be one component: give the whole model, such as"),
        (make_bundle, r"is a kiln bundle: give the model that it was made from"),
        (forget_unet, r"names no unet: give a whole pipeline"),
        (break_index, r"model_index\.json is damaged: .*; download it again"),
        (list_index, r"model_index\.json is damaged: it holds no JSON object; download"),
        (pickle_weights, r"as pickle .*convert it with `python -m optimizer\.unpickle .*model`"),
        (truncate, r"truncated: its header promises \d+ bytes and it has \d+; download it again"),
        (truncate_header, r"truncated: its header promises .*; download it again"),
        (truncate_to_nothing, r"truncated: it has 0 bytes; download it again"),
        (break_header, r"damaged: its header cannot be read .*; download it again"),
        (break_shape, r"shape \(2, 4\) in fp16 does not fill 8 bytes\); download it again"),
        (leave_pointer, r"is a Git LFS pointer .*run `git lfs pull`"),
        (no_safetensors, r"is no safetensors file: its first bytes are b'PK"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_fix(
    model: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(model)
    with pytest.raises(SpecError, match=message):
        resolve(str(model))


def test_a_missing_config_is_refused_with_the_fix(model: Path) -> None:
    drop_config(model)
    with pytest.raises(SpecError, match=r"unet has no config\.json: download the model again"):
        resolve(str(model)).component_config("unet")


def test_another_family_is_refused_with_the_known_ones(model: Path) -> None:
    write_json(model / "model_index.json", {"_class_name": "KandinskyPipeline"})
    said = r"is a KandinskyPipeline, .*give one of .*Stable Diffusion 1\.x and 2\.x \(Stable"
    with pytest.raises(UnsupportedError, match=said) as caught:
        resolve(str(model))
    assert caught.value.exit_code == 10


@pytest.mark.parametrize("name", ["absent", "absent.safetensors", "absent.ckpt", "a/b/c"])
def test_what_is_not_there_is_refused_with_what_can_be_given(tmp_path: Path, name: str) -> None:
    said = r"no file or folder here and no hub id: give a diffusers folder, a \.safetensors"
    with pytest.raises(SpecError, match=said):
        resolve(str(tmp_path / name))


def test_a_revision_of_a_folder_is_refused(model: Path) -> None:
    with pytest.raises(SpecError, match="has no revisions: leave --revision out"):
        resolve(str(model), revision="main")
