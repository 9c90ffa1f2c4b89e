"""The script for a machine with a card: without one it says what is refused, and times the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.gpu.run import main

pytest.importorskip("tensorrt_rtx")

MakeBundle = Callable[..., Path]


def test_what_is_refused_is_an_answer_and_the_rest_is_measured(
    bundle: MakeBundle, tmp_path: Path
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a card")
    made = bundle("tensorrt-rtx", "int8", "fp16", "sm86,sm89,sm120")
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"other": 1}))
    ended = CliRunner().invoke(
        main,
        ["--section", "tensorrt", "--bundle", str(made), "-o", str(out)],
        catch_exceptions=False,
    )
    assert ended.exit_code == 0
    document = json.loads(out.read_text())
    assert document["other"] == 1
    found = document["tensorrt"]
    assert found["built_for"] == ["8.6", "8.9", "12.0"]
    assert set(found["components"]) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    for row in found["components"].values():
        assert "no NVIDIA card is usable here" in row["refused"]
        assert row["ms"]["eager"] > 0
