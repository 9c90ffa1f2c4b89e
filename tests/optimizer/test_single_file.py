from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizer import families, single_file
from optimizer.source import resolve
from optimizer.unpickle import main as unpickle
from profiles.errors import SpecError, UnsupportedError
from tests.optimizer.tiny_folder import write_weights


def test_every_family_says_what_it_looks_for() -> None:
    assert families.FAMILIES.keys() <= single_file.CONVERTERS.keys()
    assert single_file._LOOKED_FOR.keys() == single_file.CONVERTERS.keys()


def test_every_converter_is_there() -> None:
    for entry in single_file.CONVERTERS.values():
        module, function = entry.split(":")
        assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_unet_down_blocks_0.lora_up.weight", "holds a LoRA and no whole model: give one of"),
        ("double_blocks.0.img_attn.proj.lora_A.weight", "holds a LoRA and no whole model"),
        ("lycoris_unet_mid.hada_w1_a", "holds a LoRA and no whole model"),
        ("emb_params", r"holds an embedding \(textual inversion\) and no whole model"),
        ("control_model.input_blocks.0.0.weight", "holds a ControlNet and no whole model"),
        ("down_blocks.0.resnets.0.conv1.weight", "holds one component and no whole model"),
        ("single_transformer_blocks.0.norm.weight", "holds one component and no whole model"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "holds one component and no whole"),
        ("first_stage_model.decoder.conv_in.weight", "holds one component and no whole model"),
    ],
)
def test_a_piece_of_a_model_is_called_so(tmp_path: Path, name: str, message: str) -> None:
    write_weights(tmp_path / "a.safetensors", {name: (2,)})
    with pytest.raises(UnsupportedError, match=message) as caught:
        resolve(str(tmp_path / "a.safetensors"))
    assert "Stable Diffusion 1.x and 2.x" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("layers.0.weight", "layers.1.weight", "head"),
            r"does not know \(looked for .*model\.diffusion_model\.input_blocks\.1\.1\..*; its 3 "
            r"tensors are layers\.\* \(2\), head\): give one of",
        ),
        (
            ("single_stream_modulation.lin.weight", "double_blocks.0.img_mlp.0.weight"),
            r"does not know, flux-2-dev in diffusers' words \(looked for ",
        ),
        ((), r"its 0 tensors are none\)"),
    ],
)
def test_an_unknown_family_is_refused_with_what_was_seen(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.zeros(2, np.float16) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match=message) as caught:
        resolve(str(tmp_path / "a.safetensors"))
    assert "Stable Diffusion 1.x and 2.x" in str(caught.value)


def test_the_room_for_eight_bit_weights_is_counted_twice(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F8_E4M3", "shape": [10, 10], "data_offsets": [0, 100]}}
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(100))
    assert single_file._folder_bytes(path) == path.stat().st_size + 100


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
