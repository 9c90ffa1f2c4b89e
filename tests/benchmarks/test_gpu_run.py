"""The script for a machine with a card: without one it says what is refused, and times the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.gpu.denoisers import DENOISERS, ROWS, _empty
from benchmarks.gpu.loras import measure_form
from benchmarks.gpu.run import main
from runners.bundle import open_bundle

MakeBundle = Callable[..., Path]


def test_what_is_refused_is_an_answer_and_the_rest_is_measured(
    bundle: MakeBundle, tmp_path: Path
) -> None:
    import torch

    pytest.importorskip("tensorrt_rtx")
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


def test_a_lora_changes_what_an_engine_gives_and_its_negative_takes_it_back(
    bundle: MakeBundle,
) -> None:
    """In fp32, on a processor's engine, in the place of a card's."""
    import torch

    found = open_bundle(bundle("onnxruntime", lora=True))
    entry = found.manifest.component("denoiser")
    sizes = {dim.name: dim.nearest(dim.opt) for dim in entry.signature.dims}
    feeds = {
        spec.name: torch.randn([sizes[a] if isinstance(a, str) else a for a in spec.axes])
        for spec in entry.signature.inputs
    }

    def called(contestants: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        return {name: run() for name, run in contestants.items()}

    row = measure_form(found, entry, feeds, called)
    assert row["with_db"] < 40 < 90 < row["cancelled_db"]
    assert set(row) >= {"rank", "first_hold_seconds", "hold_seconds", "plain", "lora"}


def measured(tmp_path: Path, section: str, *options: str) -> dict[str, Any]:
    out = tmp_path / "gpu.json"
    command = ["--section", section, "--small", "-o", str(out), *options]
    ended = CliRunner().invoke(main, command, catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    found: dict[str, Any] = json.loads(out.read_text())[section]
    return found


@pytest.mark.parametrize("section", ["sd15", "sdxl", "flux"])
def test_a_denoisers_share_of_the_machines_peak_is_read_off_its_flops(
    tmp_path: Path, section: str
) -> None:
    found = measured(tmp_path, section, "--rows", "eager")
    assert found["checked"]["eager"]["sqnr_db"] == 200
    assert found["tflops"] > 0
    seconds = found["ms"]["eager"] / 1000
    share = found["tflops"] / seconds / found["peak_tflops_per_second"]
    assert found["share_of_peak"]["eager"] == pytest.approx(share, rel=0.2, abs=1e-3)


@pytest.mark.slow
def test_what_is_compiled_or_rounded_is_checked_against_eager_first(tmp_path: Path) -> None:
    """Every way of a small FLUX; int8 and fp8 products run on a processor too."""
    found = measured(tmp_path, "flux")
    assert set(found["ms"]) == set(found["checked"]) == set(ROWS)
    for row in found["checked"].values():
        assert row["sqnr_db"] >= row["needed_db"]


def test_the_full_sizes_are_the_models_own() -> None:
    """Parameters as their papers and cards name them."""
    millions = {
        name: sum(p.numel() for p in _empty(known, known.config).parameters()) / 1e6
        for name, known in DENOISERS.items()
    }
    assert {name: round(found) for name, found in millions.items()} == {
        "sd15": 860,
        "sdxl": 2567,
        "flux": 11901,
    }


def test_a_way_that_is_not_known_names_the_others() -> None:
    ended = CliRunner().invoke(main, ["--section", "sd15", "--rows", "tvm", "-o", "x"])
    assert ended.exit_code == 2
    assert "tvm is none of eager, torch.compile, aoti" in ended.output
